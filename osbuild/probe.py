"""A program of ours in a container of the guest, which says what is to be seen there: probe/*.c, put in by CopyFile.

No image needs to have anything for it, and the agent carries none of it. The container is as Docker would make it, with
CAP_MKNOD besides: what it must not do is tried from there.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Final

from osbuild import agent_process
from osbuild.agent_client import AgentClient
from osbuild.agent_compiler import compile_program, find_compiler, program_key
from osbuild.agent_values import Storage
from osbuild.arch import Arch
from osbuild.cache import Cache
from osbuild.container import CAPABILITIES, MOUNTS, Capabilities, ContainerSpec, Mount, ProcessSpec, Resources
from osbuild.resources import resource
from osbuild.ttrpc import CallTimeout, ProtocolError

NAME: Final = "osbuilder-probe"
LONGEST: Final = 1 << 20  # bytes of an answer: probe.h
SECONDS: Final = 30.0  # for one answer; guests may be emulated

_HEAD: Final = re.compile(rb"([+-])([0-9]{1,9})\n")
_HEAD_BYTES: Final = 32
_CACHE_KIND: Final = "probe"
HOME: Final = "/dev/probe"  # in the container, whose /dev is a tmpfs
_WITH_MKNOD: Final = (*CAPABILITIES, "CAP_MKNOD")
_ALLOW_MKNOD: Final = {"io.osbuilder.allow-mknod": "true"}  # what ours takes away unless it is asked for


def build_probe(arch: Arch, cache: Cache) -> Path:
    """The program for guests of `arch`, compiled once."""
    compiler = find_compiler(arch, cache)
    sources = sorted(path for path in resource("probe").iterdir() if path.suffix in (".c", ".h"))

    def make(out: Path) -> None:
        compile_program(compiler, compiler.flags, sources, out, NAME, arch)

    home, _ = cache.get(_CACHE_KIND, program_key(arch, compiler, compiler.flags, sources), make)
    return home / NAME


class Refused(Exception):  # noqa: N818 - an answer
    """What was asked for cannot be done there; the guest's words."""


def question(*words: str) -> bytes:
    """As the program reads it; a path of an image may have any bytes but NUL."""
    encoded = [word.encode(errors="surrogateescape") for word in words]
    if any(not word or b"\0" in word for word in encoded):
        raise ValueError(f"the probe cannot be asked {words!r}")
    return b"".join(word + b"\0" for word in encoded) + b"\0"


def parse_head(line: bytes) -> tuple[int, bool]:
    """How many bytes an answer has, and whether it is one; ProtocolError for what the program does not write."""
    found = _HEAD.fullmatch(line)
    if found is None or int(found[2]) > LONGEST:
        raise ProtocolError(f"the probe in the guest answers {line[:_HEAD_BYTES]!r}")
    return int(found[2]), found[1] == b"+"


def _line(data: bytearray) -> int:
    """Where the first line ends, or what is too long for one; 0 is not yet."""
    return data.find(b"\n") + 1 or (len(data) if len(data) > _HEAD_BYTES else 0)


def answers(data: bytes) -> list[bytes | None]:
    """All that it has answered to several; None for what could not be done."""
    found: list[bytes | None] = []
    while data:
        head, _, rest = data.partition(b"\n")
        size = int(head[1:])
        found.append(rest[:size] if head[:1] == b"+" else None)
        data = rest[size:]
    return found


def pairs(data: bytes) -> dict[str, str]:
    """Lines NAME VALUE."""
    lines = data.decode(errors="surrogateescape").split("\n")  # a path may have what else ends lines
    return {name: value for name, _, value in (line.partition(" ") for line in lines if line)}


class Probe:
    """The program in its container, being asked."""

    def __init__(self, client: AgentClient, container: str) -> None:
        self._client = client
        self._container = container
        self._unread = bytearray()

    def ask(self, *words: str, seconds: float = SECONDS) -> bytes:
        """What it answers; Refused when it says why not."""
        deadline = time.monotonic() + seconds
        left = question(*words)
        while left:
            if time.monotonic() > deadline:
                raise CallTimeout("the probe in the guest takes no question")
            left = left[self._client.write_stdin(self._container, left, seconds=seconds) :]
        size, good = parse_head(self._take(_line, deadline))
        body = self._take(lambda data: size if len(data) >= size else 0, deadline) if size else b""
        if not good:
            raise Refused(body.decode(errors="replace"))
        return body

    def file(self, path: str) -> str:
        """What a file of the container's holds."""
        return self.ask("file", path).decode(errors="replace")

    def facts(self, *words: str, seconds: float = SECONDS) -> dict[str, str]:
        """An answer of lines NAME VALUE."""
        return pairs(self.ask(*words, seconds=seconds))

    def remove(self) -> None:
        """The container with it."""
        agent_process.remove(self._client, self._container)

    def _take(self, end: Callable[[bytearray], int], deadline: float) -> bytes:
        """What is read next, up to where `end` says; 0 is not yet."""
        while not (size := end(self._unread)):
            data = self._client.read_stdout(self._container, seconds=max(deadline - time.monotonic(), 0.01))
            if not data:
                raise ProtocolError("the probe in the guest has ended")
            self._unread += data
        found = bytes(self._unread[:size])
        del self._unread[:size]
        return found


def start_probe(
    client: AgentClient,
    program: bytes,
    *,
    resources: Resources | None = None,
    process: ProcessSpec | None = None,
    storages: Iterable[Storage] = (),
    mounts: Iterable[Mount] = (),
) -> Probe:
    """The program copied into the guest, and running in a container of the guest's own root, in place of `process`.

    The container has these mounts besides, and the agent makes the storages for it.
    """
    name = f"probe-{secrets.token_hex(3)}"
    home = f"{agent_process.SHARED}/{name}"
    agent_process.copy_file(client, f"{home}/{NAME}", program, mode=0o755, seconds=SECONDS)
    bind = Mount(destination=HOME, source=home, kind="bind", options=("rbind", "ro", "rprivate"))
    args = (f"{HOME}/{NAME}",)
    capabilities = Capabilities(bounding=_WITH_MKNOD, effective=_WITH_MKNOD, permitted=_WITH_MKNOD)
    spec = ContainerSpec(
        id=name, mounts=(*MOUNTS, bind, *mounts), storages=tuple(storages),
        process=replace(process, args=args) if process else ProcessSpec(args=args, capabilities=capabilities),
        resources=resources or Resources(), annotations=_ALLOW_MKNOD,
    )  # fmt: skip
    client.create_container(spec, seconds=SECONDS)
    client.start_container(name, seconds=SECONDS)
    return Probe(client, name)
