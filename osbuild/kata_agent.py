"""The row `kata` of AGENTS: a kata-agent that the user brings, as a binary or in a tarball of Kata's.

    kata-static-agent.tar.zst   ./usr/bin/kata-agent, and units that we write ourselves
    anything else               the only regular file called kata-agent

Sources: kata-containers, src/agent/Makefile and tools/packaging/static-build/agent (what the tarball is made of);
kata-contract 4.2 (the kernel word), 4.4 and 9.2 (where it lies).
"""

from __future__ import annotations

import hashlib
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from osbuild import agent_binary
from osbuild.agent import Agent
from osbuild.agent_binary import GRPC, KATA
from osbuild.arch import Arch
from osbuild.borrowed import Borrowed
from osbuild.cache import Cache
from osbuild.errors import InputError
from osbuild.limits import Limits
from osbuild.tree import Spool, quote

PROGRAM: Final = f"/usr/bin/{KATA}"
# As the first process it sets cgroups up; without this word it wants the memory controller of version 1, which kernels
# from 6.11 on have no more, and powers the guest off.
INIT_WORDS: Final = ("cgroup_no_v1=all",)

_PLACES: Final = (PROGRAM, f"/opt/kata/bin/{KATA}", f"/{KATA}")
_LIMITS: Final = Limits(image_bytes=8 << 30, file_bytes=4 << 30)  # Kata's largest bundle has some 2 GiB
_ELF: Final = b"\x7fELF"
_XZ: Final = b"\xfd7zXZ\0"
_XZ_MEMORY: Final = 256 << 20
_CHUNK: Final = 1 << 20


def obtain(source: str, arch: Arch, cache: Cache) -> Agent:
    """The agent that a file is or holds; InputError when it is none, or could not answer in such a guest."""
    del cache
    path = Path(source)
    data = _unpack(path) if _compression(path) else agent_binary.read_program(path)
    found = agent_binary.identify(data, source)
    if found.arch != arch.name:
        raise InputError(
            f"{quote(source)} is for {found.arch}, the guest is {arch.name}", hint="an agent for it, or --arch"
        )
    if found.name == agent_binary.UNKNOWN:
        raise InputError(
            f"{quote(source)} is no agent that is known here: neither osbuilder's nor Kata's names are in it",
            hint="osbuilder agent version FILE says what is seen",
        )
    if found.protocol == GRPC:
        raise InputError(
            f"{quote(source)} is an agent of Kata 1.x, which speaks gRPC; since 2.0 it is ttRPC, and so is all of this",
            hint="a kata-agent from 2.0 on",
        )
    return Agent(
        kind="builtin" if found.name != KATA else "kata", name=found.name, version=found.version,
        sha256=hashlib.sha256(data).hexdigest(), data=data, wants_policy=found.wants_policy,
    )  # fmt: skip


def check(source: str) -> None:
    """InputError for what cannot be read."""
    _compression(Path(source))


def _compression(path: Path) -> str:
    """How an archive is compressed; empty for what is none."""
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as problem:
        raise InputError(
            f"cannot read {quote(str(path))}: {problem.strerror}",
            hint="an agent is builtin, or the path of a program, or of a tarball that holds kata-agent",
        ) from None
    if head.startswith(_ELF):
        return ""
    if head.startswith(_XZ):
        return "xz"
    from osbuild import uncompress  # a program needs no more than this

    compression = uncompress.sniff(head.ljust(4, b"\0"))
    return compression if compression != "none" or head[257:262] == b"ustar" else ""


def _unpack(path: Path) -> bytes:
    """The agent out of a tarball: the only file of its name, or the one that lies where Kata puts it."""
    from osbuild import tar

    where = quote(str(path))
    spool = Spool()
    for piece in _pieces(path):
        spool.append(piece)
    found = {}
    for member in tar.read(spool, 0, spool.size, _LIMITS):
        if member.name.rpartition("/")[2] == KATA and member.kind == 0o100000:
            found[member.name] = member
    if not found:
        raise InputError(
            f"{where} holds no file called {KATA}",
            hint="Kata's large bundles have it inside their images: take kata-static-agent.tar.zst",
        )
    place = next((place for place in _PLACES if place in found), next(iter(found)))
    if len(found) > 1 and place not in _PLACES:
        names = ", ".join(quote(name) for name in sorted(found)[:8])
        raise InputError(f"{where} holds more than one {KATA}: {names}", hint="take one out, and give its path")
    member = found[place]
    if member.size > agent_binary.LARGEST:
        raise InputError(f"{where}: {quote(place)}: {member.size} bytes are no agent")
    return b"".join(tar.content(member, spool).chunks())


def _pieces(path: Path) -> Iterator[bytes]:
    """The tar, uncompressed, in pieces of bounded size."""
    from osbuild import uncompress

    where, compression = quote(str(path)), _compression(path)
    backing = Borrowed(path)
    chunks: Iterator[bytes] = (backing.read(at, _CHUNK) for at in range(0, backing.size, _CHUNK))
    if compression == "xz":
        chunks, compression = _unxz(chunks, where), "none"
    yield from uncompress.uncompressed(chunks, compression, where, _LIMITS)


def _unxz(chunks: Iterable[bytes], where: str) -> Iterator[bytes]:
    """One xz stream after the other, as xz(1) reads them."""
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    try:
        for data in chunks:
            while data or not (stream.eof or stream.needs_input):
                if stream.eof:
                    data = data.lstrip(b"\0")
                    if not data:
                        break
                    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
                yield stream.decompress(data, _CHUNK)
                data = stream.unused_data if stream.eof else b""
    except lzma.LZMAError as problem:
        raise InputError(f"{where}: damaged xz data: {problem}") from None
    if not stream.eof:
        raise InputError(f"{where}: xz data is cut off")
