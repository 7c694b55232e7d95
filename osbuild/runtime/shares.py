"""Directories of this host that a guest shares: by virtio-fs, which virtiofsd serves, and by 9p, which QEMU serves.

run/shares/share-9p      the guest may write there
run/shares/share-9p-ro   there it may not
run/share-virtio-fs.sock a virtiofsd of its own for each; it gets the listening socket, for where it makes one itself it
                         leaves a file under /run

Two programs are called virtiofsd: QEMU's own, in C, until 7.2, and a later one, in Rust, whose options differ.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.errors import CommandError, HostError
from osbuild.runtime import bounds

VIRTIO_FS: Final = "virtio-fs"
NINEP: Final = "9p"
DAEMON: Final = "virtiofsd"
LOG: Final = "virtiofsd.log"

# Neither is on PATH: where Debian and others have the Rust one, and where QEMU's packages had the C one.
_PLACES: Final = ("/usr/libexec", "/usr/lib", "/usr/lib/qemu", "/usr/libexec/qemu", "/usr/lib/qemu-kvm")
_HOME: Final = "shares"
_SANDBOXES: Final = ("namespace", "chroot")  # the better one first; a container may allow the other only
_GET_FEATURES: Final = struct.pack("=III", 1, 1, 0)  # vhost-user: the request, version 1, no payload
_REPLY_BYTES: Final = 12 + 8
_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One directory, as a guest finds it."""

    way: str  # the driver of the agent's storages
    tag: str
    home: Path
    read_only: bool
    refuses: bool  # the host's side of a read-only one refuses to write; else only the guest's mount can
    socket: Path | None = None  # where it is served, if not by the VMM


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """What a guest shares with its host, and what it cannot: why not."""

    home: Path  # of all of them, and of what is in none
    shares: tuple[Share, ...]
    missing: Mapping[str, str]

    def of(self, way: str) -> tuple[Share, Share]:
        """The one to write to, and the other."""
        writable, read_only = sorted((one for one in self.shares if one.way == way), key=lambda one: one.read_only)
        return writable, read_only

    @property
    def ways(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(one.way for one in self.shares))


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A virtiofsd that was seen to work here."""

    program: str
    usage: str
    sandbox: str

    @property
    def can_refuse(self) -> bool:
        return "--readonly" in self.usage


@contextlib.contextmanager
def opened(wanted: bool, run: Path, log: Path) -> Iterator[Shares | None]:
    """For the length of the block, a writable and a read-only directory for each way that this host has."""
    if not wanted:
        yield None
        return
    home = run / _HOME
    home.mkdir(mode=0o700)
    missing: dict[str, str] = {}
    made = [_plain(home, NINEP, read_only=one, refuses=one) for one in (False, True)]
    with contextlib.ExitStack() as stack:
        try:
            server = find_server(run, log)
        except HostError as problem:
            missing[VIRTIO_FS] = f"{problem}: {problem.hint}" if problem.hint else str(problem)
        else:
            made += [stack.enter_context(_served(server, home, run, log, read_only=one)) for one in (False, True)]
        yield Shares(home=home, shares=tuple(made), missing=missing)


def _plain(home: Path, way: str, *, read_only: bool, refuses: bool) -> Share:
    tag = f"share-{way}{'-ro' * read_only}"
    (home / tag).mkdir(mode=0o755)
    return Share(way=way, tag=tag, home=home / tag, read_only=read_only, refuses=refuses)


# --- virtiofsd ------------------------------------------------------------------------------------------------------


def find_program(path: str | None = None) -> str:
    """Where virtiofsd is; HostError when it is nowhere."""
    places = os.pathsep.join([path if path is not None else os.environ.get("PATH", os.defpath), *_PLACES])
    found = shutil.which(DAEMON, path=places)
    if found is None:
        raise HostError(f"{DAEMON} is not installed", hint=f"apt-get install {DAEMON}, or qemu-system-common before 8")
    return found


def find_server(run: Path, log: Path) -> Server:
    """A virtiofsd that was tried: it serves a directory here, shut in as well as this host allows."""
    program = find_program()
    try:
        usage = command.run(program, "--help", seconds=_SECONDS).output
    except CommandError as problem:
        raise HostError(f"{program} does not work here: {command.last_line(problem.tail)}") from problem
    home = run / f"{_HOME}-trial"
    home.mkdir(exist_ok=True)
    try:
        for sandbox in _SANDBOXES:
            server = Server(program=program, usage=usage, sandbox=sandbox)
            if _works(server, home, run, log):
                return server
    finally:
        home.rmdir()
    said = command.last_line(log.read_text(errors="replace"))
    raise HostError(f"{program} does not work here: {said}")


def arguments(server: Server, home: Path, descriptor: int, *, read_only: bool) -> tuple[str, ...]:
    """Its options: as Kata's runtime has it, what the guest knows of a file may be a second old (cache=auto)."""
    common = (f"--fd={descriptor}", "--rlimit-nofile=0")  # more files than we may have takes a privilege
    if "--shared-dir" in server.usage:
        refuse = ("--readonly",) if read_only and server.can_refuse else ()
        return (*common, f"--shared-dir={home}", f"--sandbox={server.sandbox}", "--cache=auto", *refuse)
    source = str(home).replace("\\", "\\\\").replace(",", "\\,")
    return (*common, "-f", "-o", f"source={source}", "-o", f"sandbox={server.sandbox}", "-o", "cache=auto")


@contextlib.contextmanager
def _served(server: Server, home: Path, run: Path, log: Path, *, read_only: bool) -> Iterator[Share]:
    share = _plain(home, VIRTIO_FS, read_only=read_only, refuses=read_only and server.can_refuse)
    path = run / f"{share.tag}.sock"
    with _started(server, share.home, path, log, read_only=read_only):
        yield Share(
            way=share.way, tag=share.tag, home=share.home, read_only=read_only, refuses=share.refuses, socket=path
        )  # fmt: skip


@contextlib.contextmanager
def _started(
    server: Server, home: Path, path: Path, log: Path, *, read_only: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """It serves one VMM, and ends with it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        listener.bind(str(path))
        listener.listen(1)
        options = arguments(server, home, listener.fileno(), read_only=read_only)
        process = stack.enter_context(
            command.start(
                server.program,
                *options,
                cwd=path.parent,
                log=log,
                descriptors=(listener.fileno(),),
                limits=bounds.limits(),
            )
        )
        listener.close()  # else a VMM would wait for one that has died
        yield process


def _works(server: Server, home: Path, run: Path, log: Path) -> bool:
    """Whether it comes to answer: it shuts itself in before it does, the C one only once somebody is there."""
    path = run / "trial.sock"
    try:
        with (
            _started(server, home, path, log),
            socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as us,
        ):
            us.settimeout(_SECONDS)
            us.connect(str(path))
            us.sendall(_GET_FEATURES)
            left = _REPLY_BYTES  # in two pieces, of the C one
            while left and (piece := us.recv(left)):
                left -= len(piece)
            return left == 0
    except OSError:
        return False
    finally:
        path.unlink(missing_ok=True)
