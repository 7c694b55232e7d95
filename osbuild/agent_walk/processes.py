"""Steps: processes beside the first, their input and output, signals, terminals."""

from __future__ import annotations

import hashlib
import math
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from osbuild.agent_process import execute, executing, running
from osbuild.agent_walk.base import CALL_SECONDS, RUN_SECONDS, SHELL, Step, Walk, expect, refused
from osbuild.container import NO_CAPABILITIES, ProcessSpec, User
from osbuild.findings import Wrong
from osbuild.ttrpc import Code

_OUTPUT_BYTES: Final = 3_000_000
_INPUT_BYTES: Final = 300_000
_FOREVER: Final = "trap 'exit 0' TERM; echo up; while :; do sleep 1; done"


def shell(text: str, **more: object) -> ProcessSpec:
    """A shell script as a process."""
    return replace(ProcessSpec(args=(SHELL, "-c", text)), **more)  # type: ignore[arg-type]


def execute_one(walk: Walk) -> str:
    with running(walk.client, walk.script(_FOREVER)) as first:
        _is_up(first.wait_for_output(b"up", CALL_SECONDS))
        asked = shell(
            'echo "$$ $WALK $(pwd)"; cat /proc/1/comm; echo oops >&2; exit 7', env=("PATH=/bin:/usr/bin", "WALK=1"),
            cwd="/tmp",  # noqa: S108
        )  # fmt: skip
        found = execute(walk.client, first.container, walk.name("exec"), asked, seconds=RUN_SECONDS)
        expect("its exit code", found.status, 7)
        expect("its standard error", found.stderr, b"oops\n")
        number, *rest = found.stdout.decode().split()
        expect("environment and directory", rest[:2], ["1", "/tmp"])  # noqa: S108
        if number == "1":
            raise Wrong("it is the first process of a namespace of its own")
        expect("the container's first process", rest[2], SHELL.rpartition("/")[2])
        who = shell("grep -E '^(Uid|CapEff):' /proc/self/status", user=User(uid=7, gid=8), capabilities=NO_CAPABILITIES)
        words = execute(walk.client, first.container, walk.name("exec"), who, seconds=RUN_SECONDS).stdout.split()
        expect("user and capabilities", [words[1], words[-1]], [b"7", b"0" * 16])
    return f"exit code 7, as process {number} of the container, with its own environment and user"


def execute_where_nobody_is(walk: Walk) -> str:
    refused(
        lambda: walk.client.exec_process("nobody", "exec", shell("exit 0"), seconds=CALL_SECONDS),
        Code.INVALID_ARGUMENT, Code.NOT_FOUND,
    )  # fmt: skip
    with running(walk.client, walk.script(_FOREVER)) as first:
        _is_up(first.wait_for_output(b"up", CALL_SECONDS))
        refused(
            lambda: walk.client.call(
                "grpc.AgentService", "ExecProcess", seconds=CALL_SECONDS, container_id=first.container, exec_id="x"
            )
        )
        name = walk.name("exec")
        with executing(walk.client, first.container, name, shell("sleep 100")):
            refused(lambda: walk.client.exec_process(first.container, name, shell("exit 0"), seconds=CALL_SECONDS))
    return "refused: no such container, no process, a name that is taken"


def kill(walk: Walk) -> str:
    with running(walk.client, walk.script(_FOREVER)) as process:
        _is_up(process.wait_for_output(b"up", CALL_SECONDS))
        process.signal(signal.SIGKILL)
        expect("the status after SIGKILL", process.wait(RUN_SECONDS).status, 128 + signal.SIGKILL)
    return "SIGKILL gives 137"


def kill_the_agent_program(walk: Walk) -> str:
    spec = walk.spec(walk.place.program, "--listen", "unix:/dev/shm/walk")
    walk.client.create_container(spec, seconds=CALL_SECONDS)
    try:
        walk.client.start_container(spec.id, seconds=CALL_SECONDS)
        walk.client.signal_process(spec.id, signal.SIGKILL, seconds=CALL_SECONDS)
        expect("the status after SIGKILL", walk.client.wait_process(spec.id, seconds=CALL_SECONDS), 137)
    finally:
        walk.client.remove_container(spec.id, timeout=10, seconds=CALL_SECONDS)
    return "SIGKILL gives 137"


def terminate(walk: Walk) -> str:
    handled = walk.script("trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done")
    with running(walk.client, handled) as process:
        _is_up(process.wait_for_output(b"up", CALL_SECONDS))
        process.signal(signal.SIGTERM)
        found = process.wait(RUN_SECONDS)
        expect("status and output of one that handles it", (found.status, found.stdout), (3, b"up\nbye\n"))
    with running(walk.client, walk.script("echo up; sleep 100; exit 4")) as process:
        _is_up(process.wait_for_output(b"up", CALL_SECONDS))
        process.signal(signal.SIGTERM)
        status = process.wait(RUN_SECONDS).status
        if status not in (128 + signal.SIGTERM, 128 + signal.SIGKILL):
            raise Wrong(f"a first process without a handler ended with {status}")
    return f"a handler runs; a first process without one ends with {status}"


def signal_nobody(walk: Walk) -> str:
    refused(lambda: walk.client.signal_process("nobody", signal.SIGTERM, seconds=CALL_SECONDS), Code.INVALID_ARGUMENT)
    with running(walk.client, walk.script(_FOREVER)) as process:
        refused(
            lambda: walk.client.signal_process(process.container, signal.SIGTERM, "nobody", seconds=CALL_SECONDS),
            Code.NOT_FOUND,
        )
        refused(lambda: walk.client.wait_process(process.container, "nobody", seconds=CALL_SECONDS), Code.NOT_FOUND)
    return "no such container: INVALID_ARGUMENT; no such process: NOT_FOUND"


def wait_status(walk: Walk) -> str:
    found = [walk.run(walk.script(f"exit {code}")).status for code in (0, 42, 255)]
    expect("exit codes", found, [0, 42, 255])
    expect("one that a signal ended", walk.run(walk.script("sleep 9 & kill -9 $!; wait $!")).status, 137)
    return "0, 42, 255; 137 by a signal"


def wait_twice(walk: Walk) -> str:
    """Several wait, all are told; afterwards the process is forgotten."""
    spec = walk.script("read line; exit 9")
    with running(walk.client, spec) as process, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(walk.client.wait_process, spec.id, seconds=CALL_SECONDS) for _ in range(3)]
        time.sleep(0.2)
        walk.client.check(seconds=CALL_SECONDS)  # nobody is held up by them
        process.write(b"go\n")
        expect("what three who wait are told", [future.result(CALL_SECONDS) for future in waiting], [9, 9, 9])
    return "three at a time are all told 9"


def read_output(walk: Walk) -> str:
    spec = walk.script(f"i=0; head -c {_OUTPUT_BYTES} /dev/zero | tr '\\0' x; echo end")
    found = walk.run(spec)
    expect("how many bytes came", len(found.stdout), _OUTPUT_BYTES + 4)
    if found.stdout.strip(b"x") != b"end\n":
        raise Wrong("they are not those that were written")
    return f"{len(found.stdout)} bytes"


def read_pieces(walk: Walk) -> str:
    """No more than was asked for, nothing at the end, and no waiting for more than there is."""
    with running_bare(walk, "echo 0123456789; read line; echo end") as name:
        first = walk.client.read_stdout(name, size=4, seconds=CALL_SECONDS)
        expect("the first four bytes", first, b"0123")
        expect("the rest", walk.client.read_stdout(name, size=100, seconds=CALL_SECONDS), b"456789\n")
        walk.client.write_stdin(name, b"\n", seconds=CALL_SECONDS)
        expect("what comes later", walk.client.read_stdout(name, seconds=CALL_SECONDS), b"end\n")
        expect("the end", walk.client.read_stdout(name, seconds=CALL_SECONDS), b"")
        expect("the status", walk.client.wait_process(name, seconds=CALL_SECONDS), 0)
        refused(lambda: walk.client.read_stdout(name, seconds=CALL_SECONDS))
    return "as much as is asked for; nothing is the end; after WaitProcess it is forgotten"


class running_bare:  # noqa: N801 - a block
    """A container of which nobody reads yet."""

    def __init__(self, walk: Walk, script: str) -> None:
        self._walk = walk
        self._spec = walk.script(script)

    def __enter__(self) -> str:
        self._walk.client.create_container(self._spec, seconds=CALL_SECONDS)
        self._walk.client.start_container(self._spec.id, seconds=CALL_SECONDS)
        return self._spec.id

    def __exit__(self, *_: object) -> None:
        self._walk.client.remove_container(self._spec.id, timeout=10, seconds=CALL_SECONDS)


def read_errors(walk: Walk) -> str:
    found = walk.run(walk.script("echo out; echo err >&2; echo more >&2"))
    expect("both streams", (found.stdout, found.stderr), (b"out\n", b"err\nmore\n"))
    return "apart from standard output"


def write_input(walk: Walk) -> str:
    data = hashlib.shake_128(b"input").digest(_INPUT_BYTES)
    found = walk.run(walk.spec("/bin/cat"), stdin=data)
    expect("the status", found.status, 0)
    if found.stdout != data:
        raise Wrong(f"{len(data)} bytes went in, {len(found.stdout)} others came out")
    return f"{len(data)} bytes go in, and come out the same"


def close_input(walk: Walk) -> str:
    with running(walk.client, walk.script("cat; echo closed")) as process:
        process.write(b"a\n")
        _is_up(process.wait_for_output(b"a\n", CALL_SECONDS))
        if process.wait_for_output(b"closed", 0.2):
            raise Wrong("it was closed before it was closed")
        process.close_stdin()
        found = process.wait(RUN_SECONDS)
        expect("status and output", (found.status, found.stdout), (0, b"a\nclosed\n"))
        refused(lambda: walk.client.write_stdin(process.container, b"x", seconds=CALL_SECONDS))
    return "a reader sees the end"


def terminal(walk: Walk) -> str:
    script = 'test -t 0 && test -t 1 && test -t 2 && echo terminal; read line; stty size; echo "got $line"; exit 6'
    with running(walk.client, walk.script(script, terminal=True)) as process:
        _is_up(process.wait_for_output(b"terminal\r\n", CALL_SECONDS), f"it has no terminal: {process.stdout!r}")
        walk.client.resize_terminal(process.container, 33, 99, seconds=CALL_SECONDS)
        process.write(b"hello\n")
        found = process.wait(RUN_SECONDS)
        if b"33 99\r\n" not in found.stdout or b"got hello\r\n" not in found.stdout:
            raise Wrong(f"its size is not 33 99, or it did not hear: {found.stdout!r}")
        if found.stdout.count(b"hello\r\n") != 2:
            raise Wrong(f"what is typed is not echoed: {found.stdout!r}")
        expect("its exit code", found.status, 6)
    return "33 99; what is typed is echoed; exit code 6"


def execute_on_terminal(walk: Walk) -> str:
    with running(walk.client, walk.script(_FOREVER)) as first:
        _is_up(first.wait_for_output(b"up", CALL_SECONDS))
        asked = shell("read line; stty size; sleep 100", terminal=True)
        with executing(walk.client, first.container, walk.name("tty"), asked) as process:
            walk.client.resize_terminal(first.container, 10, 20, process.exec_id, seconds=CALL_SECONDS)
            process.write(b"\n")
            if not process.wait_for_output(b"10 20\r\n", CALL_SECONDS):
                raise Wrong(f"its size is not 10 20: {process.stdout!r}")
            process.write(b"\x03")
            expect("the status after Ctrl-C", process.wait(RUN_SECONDS).status, 128 + signal.SIGINT)
    return "10 20; Ctrl-C ends it: 130"


def no_terminal(walk: Walk) -> str:
    with running(walk.client, walk.script(_FOREVER)) as process:
        _is_up(process.wait_for_output(b"up", CALL_SECONDS))
        said = refused(
            lambda: walk.client.resize_terminal(process.container, 10, 20, seconds=CALL_SECONDS), Code.UNAVAILABLE
        )
    return f"UNAVAILABLE: {said.message}"


def blocked_reads(walk: Walk) -> str:
    """Calls that wait do not hold up others."""
    with running_bare(walk, "read line; echo done") as name, ThreadPoolExecutor(1) as pool:
        reading = pool.submit(walk.client.read_stdout, name, seconds=math.inf)
        began = time.monotonic()
        for _ in range(20):
            walk.client.check(seconds=CALL_SECONDS)
        took = time.monotonic() - began
        walk.client.write_stdin(name, b"\n", seconds=CALL_SECONDS)
        expect("what was waited for", reading.result(CALL_SECONDS), b"done\n")
    return f"20 health checks in {took:.2f} s beside it"


def _is_up(up: bool, why: str = "it does not say that it is up") -> None:
    if not up:
        raise Wrong(why)


PROCESSES: Final = (
    Step(call="ExecProcess", about="another process in a container", take=execute_one, needs=("shell",)),
    Step(call="ExecProcess", about="on a terminal", take=execute_on_terminal, needs=("shell",)),
    Step(call="ExecProcess", about="where it cannot be", take=execute_where_nobody_is, needs=("shell",)),
    Step(call="SignalProcess", about="SIGKILL", take=kill, needs=("shell",)),
    Step(call="SignalProcess", about="SIGKILL of the agent as a container", take=kill_the_agent_program,
         needs=("no shell",)),
    Step(call="SignalProcess", about="SIGTERM", take=terminate, needs=("shell",)),
    Step(call="SignalProcess", about="nobody", take=signal_nobody, needs=("shell",)),
    Step(call="WaitProcess", about="how it ended", take=wait_status, needs=("shell",)),
    Step(call="WaitProcess", about="several wait for one", take=wait_twice, needs=("shell",)),
    Step(call="ReadStdout", about="all of it comes", take=read_output, needs=("shell",)),
    Step(call="ReadStdout", about="in pieces", take=read_pieces, needs=("shell",)),
    Step(call="ReadStdout", about="waiting holds up nobody", take=blocked_reads, needs=("shell",)),
    Step(call="ReadStderr", about="apart from the other", take=read_errors, needs=("shell",)),
    Step(call="WriteStdin", about="there and back", take=write_input, needs=("shell",)),
    Step(call="CloseStdin", about="a reader sees the end", take=close_input, needs=("shell",)),
    Step(call="TtyWinResize", about="a terminal and its size", take=terminal, needs=("shell",)),
    Step(call="TtyWinResize", about="without a terminal", take=no_terminal, needs=("shell",)),
)  # fmt: skip
