"""Which agent a program is, by its own bytes: nothing is run unless somebody says so.

What each carries in the parts of its file that are loaded:

    osbuilder's        osbuilder-agent version=0.1.0;
    kata-agent, Rust   kata-agent   grpc.AgentService   ttrpc…   4.1.0-<40 hex digits of the commit>[-dirty]
    kata-agent 1.x, Go kata-agent   grpc.AgentService   google.golang.org/grpc   "\\xff Go buildinf:"   the same version

Rust and Go keep texts without an end, one beside the other: "0.0.1" in front of "4.1.0-…" reads as 0.0.14.1.0. Where
the text in front ends in a digit, only a pointer with a length (what a Rust &str and a Go string are) tells where it
begins. Such pairs lie in the data, or, in a static PIE, in a relocation and behind the place that it names.

Sources: kata-containers, src/agent: Makefile, src/version.rs.in, src/main.rs (2.0 to 4.1); kata-containers/agent,
Makefile; Go's debug/buildinfo. No real agent was at hand: tests build programs with the same texts by rustc and go.
"""

from __future__ import annotations

import dataclasses
import re
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import agent, command
from osbuild.arch import ARCHES, find_arch, host_arch
from osbuild.elf import Elf, read_elf
from osbuild.errors import CommandError, InputError
from osbuild.tree import Bytes, quote

UNKNOWN: Final = "unknown"
KATA: Final = "kata-agent"
TTRPC: Final = "ttRPC"
GRPC: Final = "gRPC"  # over HTTP/2: agents before 2.0
LARGEST: Final = 256 << 20  # bytes of an agent with all its debugging information

_SERVICE: Final = b"grpc.AgentService"
_GO: Final = b"\xff Go buildinf:"
_POLICY: Final = b"/etc/kata-opa/default-policy.rego"  # in agents that were built with a policy engine
_VERSION: Final = re.compile(
    rb"[0-9.]{0,32}[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}(?:-[A-Za-z][0-9A-Za-z.]{0,16})?-([0-9a-f]{40})(-dirty)?"
)
_STARTS: Final = re.compile(rb"(?=[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}-)")
_PIN: Final = re.compile(r"^(?P<name>\S+) (?:version )?(?P<version>[0-9]\S*)")
_RELATIVE: Final = {62: 8, 183: 1027}  # R_X86_64_RELATIVE, R_AARCH64_RELATIVE
_LOAD: Final = 1
_RUN_SECONDS: Final = 5.0
_OUTPUT_MAX: Final = 64 << 10


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentBinary:
    """What a program's bytes say; UNKNOWN for what they do not."""

    name: str
    version: str
    arch: str  # a name of arch.ARCHES
    interpreter: str  # of a program that a dynamic loader starts; empty: it is static
    needed: tuple[str, ...]  # libraries
    protocol: str
    wants_policy: bool  # it does not serve without a policy in the guest
    evidence: tuple[str, ...]  # how each was found out

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self) | {"static": not self.interpreter, "needed": list(self.needed)}


def read_binary(path: Path) -> AgentBinary:
    """The same for a file; InputError in one line when it is no program for a guest."""
    return identify(read_program(path), str(path))


def read_program(path: Path) -> bytes:
    """The bytes of a file that should be an agent."""
    try:
        if not path.is_file():
            raise InputError(f"{quote(str(path))} is {'no regular file' if path.exists() else 'not there'}")
        size = path.stat().st_size
        if size > LARGEST:
            raise InputError(f"{quote(str(path))}: {size} bytes are no agent; {LARGEST} would be a large one")
        return path.read_bytes()
    except OSError as problem:
        raise InputError(f"cannot read {quote(str(path))}: {problem.strerror}") from None


def identify(data: bytes, name: str) -> AgentBinary:
    """What these bytes are; `name` is for messages. InputError when they are no program for a guest."""
    elf = _check(data, name)
    arch = next(row.name for row in ARCHES.values() if row.elf_machine == elf.machine)
    image = _Image(data, elf)
    found = _ours(image) or _katas(image) or (UNKNOWN, UNKNOWN, UNKNOWN, ("it has nothing of an agent that is known",))
    return AgentBinary(
        name=found[0], version=found[1], protocol=found[2], evidence=found[3], arch=arch,
        interpreter=elf.interpreter, needed=elf.needed,
        wants_policy=found[0] == KATA and image.has(_POLICY),
    )  # fmt: skip


def ask(path: Path, found: AgentBinary) -> AgentBinary:
    """Run it with --version, and take its word: with no environment, no time to speak of, and no room to write."""
    if find_arch(found.arch) is not host_arch():
        raise InputError(f"{quote(str(path))} is for {found.arch}, and cannot be run on {host_arch().name}")
    limits = ("--cpu=5", f"--as={1 << 30}", f"--fsize={_OUTPUT_MAX}", "--nofile=64", "--core=0")
    prlimit = command.find("prlimit", package="util-linux")
    with tempfile.TemporaryDirectory(prefix="osbuilder-") as work:
        log = Path(work) / "output"
        argv = (prlimit, *limits, command.find("env"), "-i", str(path.absolute()), "--version")
        try:
            command.run(*argv, cwd=Path(work), log=log, seconds=_RUN_SECONDS)
        except CommandError as problem:
            raise InputError(f"{quote(str(path))} --version: {problem}") from None
        lines = log.read_text(errors="replace").splitlines() or [""]
    said = _PIN.match(lines[0])
    if said is None:
        raise InputError(f"{quote(str(path))} --version says {quote(lines[0][:80])}, which is no NAME VERSION")
    # 1.x says VERSION-COMMIT here, where others say VERSION.
    version = re.sub(r"-[0-9a-f]{40}(-dirty)?$", "", said["version"])
    return dataclasses.replace(
        found, name=said["name"], version=version, evidence=(f"it says {quote(lines[0][:120])}", *found.evidence)
    )


def _check(data: bytes, name: str) -> Elf:
    """The ELF header of a whole program for one of our architectures."""
    where = quote(name)
    if data[:2] == b"#!":
        raise InputError(f"{where} is a script, no agent's binary")
    try:
        elf = read_elf(Bytes(data))
    except InputError as problem:
        raise InputError(f"{where} is a broken ELF file: {problem}") from None
    if elf is None:
        raise InputError(f"{where} is {'empty' if not data else 'no ELF file'}, so no agent's binary")
    if not elf.loadable:
        raise InputError(f"{where} is {elf.kind}, no program")
    if elf.bits != 64 or elf.big_endian or all(elf.machine != row.elf_machine for row in ARCHES.values()):
        raise InputError(f"{where} is for {elf.machine_name}; guests are {' or '.join(ARCHES)}")
    for offset, size, _ in _segments(data):
        if offset + size > len(data):
            raise InputError(f"{where} is cut off: it has {len(data)} bytes, and speaks of {offset + size}")
    if elf.needed and not elf.interpreter:
        raise InputError(f"{where} is a library, no program")
    return elf


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Offset, bytes and address of everything that is loaded. read_elf has checked the table."""
    (table,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    for index in range(count):
        kind, _, offset, address, _, stored = struct.unpack_from("<IIQQQQ", data, table + size * index)
        if kind == _LOAD:
            yield offset, stored, address


class _Image:
    """What is loaded of a program: debugging information and symbols are not."""

    def __init__(self, data: bytes, elf: Elf) -> None:
        self._data = data
        self._relative = _RELATIVE[elf.machine]
        self._segments = tuple(_segments(data))

    def has(self, text: bytes) -> bool:
        """Whether it is there."""
        return any(self._data.find(text, offset, offset + size) >= 0 for offset, size, _ in self._segments)

    def matches(self, pattern: re.Pattern[bytes]) -> Iterator[tuple[re.Match[bytes], int]]:
        """Each with the address of its segment's first byte less that byte's offset."""
        for offset, size, address in self._segments:
            for match in pattern.finditer(self._data, offset, offset + size):
                yield match, address - offset

    def is_text(self, address: int, length: int) -> bool:
        """Whether something points there with that length."""
        if self._data.find(struct.pack("<QQ", address, length)) >= 0:
            return True
        relocation = struct.pack("<QQ", self._relative, address)
        at = self._data.find(relocation, 8)
        while at >= 0:
            (place,) = struct.unpack_from("<Q", self._data, at - 8)
            if self._word(place + 8) == length:
                return True
            at = self._data.find(relocation, at + 1)
        return False

    def _word(self, address: int) -> int | None:
        for offset, size, start in self._segments:
            if start <= address <= start + size - 8:
                return int(struct.unpack_from("<Q", self._data, offset + address - start)[0])
        return None


_Found = tuple[str, str, str, tuple[str, ...]]  # name, version, protocol, evidence


def _ours(image: _Image) -> _Found | None:
    versions = {match[1].decode() for match, _ in image.matches(agent.MARKER)}
    if len(versions) != 1:
        return None
    (version,) = versions
    return agent.NAME, version, TTRPC, (f"its text '{agent.NAME} version={version};'",)


def _katas(image: _Image) -> _Found | None:
    if not (image.has(_SERVICE) and image.has(KATA.encode())):
        return None
    version, how = _kata_version(image)
    protocol, why = UNKNOWN, "neither ttRPC's nor gRPC's library is named in it"
    if image.has(_GO) and image.has(b"google.golang.org/grpc"):
        protocol, why = GRPC, "it is a Go program with google.golang.org/grpc"
    elif image.has(b"ttrpc"):
        protocol, why = TTRPC, "its texts name ttrpc"
    return KATA, version, protocol, (f"its texts name {KATA} and {_SERVICE.decode()}", how, why)


def _kata_version(image: _Image) -> tuple[str, str]:
    """The version that stands before a commit, if it is certain where it begins, and all such texts agree."""
    certain, doubtful = set(), set()
    for match, distance in image.matches(_VERSION):
        text = match[0]
        starts = [found.start() for found in _STARTS.finditer(re.sub(rb"-.*", b"-", text))]
        pinned = [start for start in starts if image.is_text(match.start() + start + distance, len(text) - start)]
        tail = len(match[1]) + len(match[2] or b"") + 1
        if len(pinned) == 1:
            certain.add(text[pinned[0] : -tail].decode())
        elif len(starts) == 1:
            certain.add(text[:-tail].decode())
        else:
            doubtful.add(text[:-tail].decode())
    if len(certain) == 1:
        return certain.pop(), "its version stands before a commit"
    if certain or doubtful:
        among = ", ".join(sorted(certain | doubtful))
        return UNKNOWN, f"its version is one of several readings: {among}"
    return UNKNOWN, "no version stands before a commit in it; --run asks it"
