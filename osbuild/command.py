"""Starting other programs: `run` waits for one, `start` keeps one beside us. Nothing else starts a process.

Programs get argument lists, never shell lines; an environment made from scratch (C locale, UTC, the caller's PATH);
standard input from /dev/null unless they are given one; a process group of their own, which is ended whatever happens
to us: on every way out of the block, and by the kernel (PR_SET_PDEATHSIG) when we are killed. None writes a core file:
what a program has in memory, a guest's or a password, is not for the disk.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from osbuild.errors import CommandError, HostError

TAIL_BYTES: Final = 4096  # of a program's output that goes into an error
GRACE_SECONDS: Final = 3.0  # between SIGTERM and SIGKILL
_POLL_SECONDS: Final = 0.005
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A program that ended with 0: what it printed (empty when that went to a log) and how long it took."""

    output: str
    seconds: float


def find(program: str, *, package: str = "") -> str:
    """The absolute path of `program` on PATH; HostError with the Debian package that has it when it is missing."""
    # Debian keeps e2fsck and mke2fs out of an ordinary user's PATH.
    search = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    found = shutil.which(program, path=search)
    if found is None:
        raise HostError(f"{program} is not installed", hint=f"apt-get install {package}" if package else "")
    return found


def last_line(text: str) -> str:
    """What a program said last."""
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it gave no reason"


def version(program: str) -> str:
    """The first line of what a program says to --version."""
    lines = run(program, "--version").output.strip().splitlines()
    return lines[0] if lines else ""


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The small environment every program gets, and what the caller adds to it."""
    base = {"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C", "TZ": "UTC"}
    for name in ("HOME", "TMPDIR"):
        if name in os.environ:
            base[name] = os.environ[name]
    return base | dict(extra or {})


def run(
    *argv: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    seconds: float | None = None,
    watch: Callable[[str], None] | None = None,
    merge: bool = True,
    stdin: bytes = b"",
) -> Completed:
    """Run a program to its end. Its output goes to `log` when given, else into the result; `watch` sees each line.

    `stdin` is what it reads. With `merge=False` standard error is kept out of the result. CommandError on a non-zero
    exit, on a signal, and after `seconds`.
    """
    began = time.monotonic()
    kept = bytearray()
    straight_to_log = log is not None and watch is None
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(log.open("ab")) if log is not None and watch is not None else None
        given = stack.enter_context(_in_memory(stdin)) if stdin else None
        process = stack.enter_context(
            start(
                *argv, cwd=cwd, env=env, log=log if straight_to_log else None, pipe=not straight_to_log, merge=merge,
                stdin=given,
            )
        )  # fmt: skip
        timed_out = stack.enter_context(_deadline(process, seconds))
        for line in process.stdout or ():
            if watch is not None:
                watch(line.decode(errors="replace").rstrip("\n"))
            if sink is not None:
                sink.write(line)
            else:
                kept += line
        has_ended(process, 0)
        _signal_group(process, signal.SIGKILL)  # what it started and left behind
        status = process.wait()
    output = kept.decode(errors="replace")
    if status != 0:
        tail = _tail_of(log) if log is not None else output[-TAIL_BYTES:]
        raise CommandError(_explain(argv[0], status, seconds if timed_out.is_set() else None), log=log, tail=tail)
    return Completed(output=output, seconds=time.monotonic() - began)


@contextlib.contextmanager
def start(
    *argv: str,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    log: Path | None = None,
    pipe: bool = False,
    merge: bool = True,
    stdin: IO[bytes] | None = None,
    descriptors: Sequence[int] = (),
    terminal: bool = False,
    outlives: bool = False,
    limits: Mapping[int, int] | None = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """Keep a program beside us for the length of the block; its whole process group is gone afterwards.

    Output goes to `log` when given, to a pipe when `pipe` (standard error with it, unless `merge` is false), else
    nowhere. It also gets these open files, under their numbers. With `terminal` it has our input and output.
    Only one that `outlives` us is not killed with us: what it ends by is its own business. `limits` are resources of
    setrlimit(2) and the most of each, for it and its children; less where we may use less ourselves.
    """
    program = argv[0] if "/" in argv[0] else find(argv[0])
    with contextlib.ExitStack() as stack:
        out: int | IO[bytes] = subprocess.DEVNULL
        if log is not None:
            out = stack.enter_context(log.open("ab"))
        elif pipe:
            out = subprocess.PIPE
        try:
            process = subprocess.Popen(
                (program, *argv[1:]),
                cwd=cwd,
                env=environment(env),
                stdin=None if terminal else stdin or subprocess.DEVNULL,
                stdout=None if terminal else out,
                stderr=None if terminal else subprocess.STDOUT if merge else subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=descriptors,
                preexec_fn=_prepared({resource.RLIMIT_CORE: 0} | dict(limits or {}), outlives=outlives),
            )
        except OSError as problem:
            raise HostError(f"cannot start {program}: {problem.strerror}") from problem
        try:
            yield process
        finally:
            end(process)
            if process.stdout is not None:
                process.stdout.close()


def _in_memory(data: bytes) -> IO[bytes]:
    """A file without a name: unlike a pipe it is never full, and unlike a real one it is never on a disk."""
    file = os.fdopen(os.memfd_create("stdin"), "w+b")
    file.write(data)
    file.seek(0)
    return file


def end(process: subprocess.Popen[bytes], *, grace: float = GRACE_SECONDS) -> None:
    """End a program and everything in its group: politely first, then not. Does nothing to one already reaped."""
    # Once reaped, the number may belong to somebody else's group.
    if process.returncode is not None:
        return
    _signal_group(process, signal.SIGTERM)
    wait(process, grace)
    _signal_group(process, signal.SIGKILL)  # what its children left running, too
    process.wait()


def wait(process: subprocess.Popen[bytes], seconds: float) -> None:
    """Until the program has ended, without reaping it; or so many seconds."""
    deadline = time.monotonic() + seconds
    while not has_ended(process) and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)


def has_ended(process: subprocess.Popen[bytes], options: int = os.WNOHANG) -> bool:
    """Whether the program has ended, without reaping it: until then, its number is its group's."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | options) is not None


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _prepared(limits: Mapping[int, int], *, outlives: bool) -> Callable[[], None]:
    """What the child does before it is the program. All that can be done before the fork, is: we may have threads."""
    lowered = [(number, _lowered(number, most)) for number, most in limits.items()]
    die_with_us = None if outlives else _die_with_parent(os.getpid())

    def prepare() -> None:
        for number, pair in lowered:
            resource.setrlimit(number, pair)
        if die_with_us is not None:
            die_with_us()

    return prepare


def _lowered(number: int, most: int) -> tuple[int, int]:
    """The two values of a limit: both as asked, for to raise the second takes a privilege, and to lower it none."""
    _, hard = resource.getrlimit(number)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    return most, most


def _die_with_parent(parent: int) -> Callable[[], None]:
    import ctypes  # before the fork, and not by commands that start no program

    libc = ctypes.CDLL(None, use_errno=True)

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # the parent died before we asked
            os._exit(127)

    return prepare


@contextlib.contextmanager
def _deadline(process: subprocess.Popen[bytes], seconds: float | None) -> Iterator[threading.Event]:
    """Kill the program's group after `seconds`; the event says whether that happened."""
    fired = threading.Event()
    if seconds is None:
        yield fired
        return

    def fire() -> None:
        fired.set()
        if process.returncode is None:
            _signal_group(process, signal.SIGKILL)

    timer = threading.Timer(seconds, fire)
    timer.daemon = True
    timer.start()
    try:
        yield fired
    finally:
        timer.cancel()


def _tail_of(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - TAIL_BYTES))
        return file.read().decode(errors="replace")


def _explain(program: str, status: int, seconds: float | None) -> str:
    name = Path(program).name
    if seconds is not None:
        return f"{name} did not end within {seconds:g} s"
    if status < 0:
        return f"{name} was killed by {signal.Signals(-status).name}"
    return f"{name} exited with {status}"
