"""What an ELF file says about itself: for which machine it is, and what it needs to be started.

    0  7f 45 4c 46   class  byte order  …        class 1: 32 bits, 2: 64;  order 1: little endian, 2: big
    16 type machine  …  program headers at e_phoff, e_phnum of e_phentsize bytes each
    PT_LOAD          which bytes of the file appear at which addresses
    PT_INTERP        path of the dynamic loader
    PT_DYNAMIC       pairs (tag, value); names are offsets into the table at DT_STRTAB, itself an address
    DT_VERNEED       versions wanted of libraries: (file, [version names]); DT_VERDEF: versions that a library has

Source: System V gABI, chapters 4 and 5; the GNU extensions from the LSB core specification. Files are hostile: every
offset is looked up, never trusted, and every count has a limit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from osbuild.errors import InputError
from osbuild.tree import Content
from osbuild.view import read_at

EXECUTABLE: Final = 2  # e_type: at fixed addresses
SHARED: Final = 3  # e_type: anywhere; a library or a position-independent program
_TYPES: Final[Mapping[int, str]] = {1: "an object file", 4: "a core dump"}
_MACHINES: Final[Mapping[int, str]] = {
    2: "sparc", 3: "i386", 8: "mips", 20: "ppc", 21: "ppc64", 22: "s390", 40: "arm", 43: "sparc64", 50: "ia64",
    62: "x86_64", 183: "aarch64", 243: "riscv", 247: "bpf", 258: "loongarch",
}  # fmt: skip

_LOAD: Final = 1
_DYNAMIC: Final = 2
_INTERP: Final = 3
_NEEDED: Final = 1
_STRTAB: Final = 5
_STRSZ: Final = 10
_SONAME: Final = 14
_RPATH: Final = 15
_RUNPATH: Final = 29
_VERDEF: Final = 0x6FFFFFFC
_VERDEFNUM: Final = 0x6FFFFFFD
_VERNEED: Final = 0x6FFFFFFE
_VERNEEDNUM: Final = 0x6FFFFFFF

_HEADERS_MAX: Final = 256  # program headers; programs have about a dozen, the kernel stops at 1170
_DYNAMIC_MAX: Final = 1 << 20  # bytes of PT_DYNAMIC
_NEEDED_MAX: Final = 1024  # libraries that one file asks for
_STRING_MAX: Final = 4096  # bytes: PATH_MAX, and enough for the longest RUNPATHs seen
_VERSIONS_MAX: Final = 8192  # glibc 2.40 defines some 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Elf:
    """One file's own words."""

    bits: int  # 32 or 64
    big_endian: bool
    machine: int  # e_machine
    type: int  # e_type
    interpreter: str = ""  # of a program that a dynamic loader starts
    needed: tuple[str, ...] = ()
    soname: str = ""
    rpath: str | None = None  # DT_RPATH: searched before everything else, unless there is a RUNPATH
    runpath: str | None = None
    wants: Mapping[str, tuple[str, ...]]  # library -> versions that it must define
    defines: frozenset[str]

    @property
    def loadable(self) -> bool:
        """A program or a library: something that a kernel or a loader maps."""
        return self.type in (EXECUTABLE, SHARED)

    @property
    def kind(self) -> str:
        """What it is, when it is not loadable."""
        return _TYPES.get(self.type, f"an ELF file of type {self.type}")

    @property
    def machine_name(self) -> str:
        """As uname -m would say, with what tells apart two that share a number."""
        name = _MACHINES.get(self.machine, f"machine {self.machine}")
        if name == "x86_64" and self.bits == 32:
            return "x32"
        if name == "ppc64" and not self.big_endian:
            return "ppc64le"
        if name in ("riscv", "loongarch"):
            return f"{name}{self.bits}"
        return name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Load:
    address: int
    offset: int
    size: int


def read_elf(content: Content) -> Elf | None:
    """The file's own words; None when it is no ELF file, InputError when it is one that cannot be read."""
    head = read_at(content, 0, 64)
    if head[:4] != b"\x7fELF":
        return None
    return _Reader(content, head).read()


class _Reader:
    def __init__(self, content: Content, head: bytes) -> None:
        if len(head) < 52 or head[4] not in (1, 2) or head[5] not in (1, 2) or len(head) < 32 * head[4]:
            raise InputError("its ELF header is cut short or broken")
        self._content = content
        self._wide = head[4] == 2
        self._order = "<" if head[5] == 1 else ">"
        word = "Q" if self._wide else "I"
        fields = struct.unpack_from(f"{self._order}HHI{word}{word}{word}IHHHHHH", head, 16)
        self._type, self._machine, _, _, self._offset = fields[:5]
        self._entry_size, self._count = fields[8], fields[9]
        self._loads: list[_Load] = []

    def read(self) -> Elf:
        interpreter = ""
        dynamic: dict[int, list[int]] = {}
        for kind, load in self._headers():
            if kind == _INTERP:
                interpreter = self._interpreter(load)
            elif kind == _DYNAMIC:
                dynamic = self._dynamic(load)
        rpath, runpath = (self._optional(dynamic, tag) for tag in (_RPATH, _RUNPATH))
        return Elf(
            bits=64 if self._wide else 32, big_endian=self._order == ">", machine=self._machine, type=self._type,
            interpreter=interpreter, needed=tuple(self._name(dynamic, at) for at in dynamic.get(_NEEDED, [])),
            soname=self._optional(dynamic, _SONAME) or "", rpath=rpath, runpath=runpath,
            wants=self._wants(dynamic), defines=frozenset(self._defines(dynamic)),
        )  # fmt: skip

    def _headers(self) -> list[tuple[int, _Load]]:
        """The program headers; those of type PT_LOAD are remembered."""
        size = 56 if self._wide else 32
        if self._count == 0:
            return []
        if self._entry_size != size:
            raise InputError(f"its program headers are {self._entry_size} bytes each, not {size}")
        if self._count > _HEADERS_MAX:
            raise InputError(f"it has {self._count} program headers; at most {_HEADERS_MAX} are read")
        found = []
        for raw in self._records(self._offset, size, self._count, "program headers"):
            if self._wide:
                kind, _, offset, address, _, length, _, _ = struct.unpack(f"{self._order}IIQQQQQQ", raw)
            else:
                kind, offset, address, _, length, _, _, _ = struct.unpack(f"{self._order}IIIIIIII", raw)
            found.append((kind, _Load(address=address, offset=offset, size=length)))
        self._loads = [load for kind, load in found if kind == _LOAD]
        return found

    def _interpreter(self, load: _Load) -> str:
        if not 2 <= load.size <= _STRING_MAX:
            raise InputError(f"the path of its dynamic loader has {load.size} bytes")
        data = self._bytes(load.offset, load.size, "path of its dynamic loader")
        if data[-1]:
            raise InputError("the path of its dynamic loader does not end")
        return data[: data.index(0)].decode(errors="surrogateescape")

    def _dynamic(self, load: _Load) -> dict[int, list[int]]:
        size = 16 if self._wide else 8
        if load.size > _DYNAMIC_MAX:
            raise InputError(f"its dynamic section has {load.size} bytes; at most {_DYNAMIC_MAX} are read")
        found: dict[int, list[int]] = {}
        pair = f"{self._order}{'QQ' if self._wide else 'II'}"
        for raw in self._records(load.offset, size, load.size // size, "dynamic section"):
            tag, value = struct.unpack(pair, raw)
            if tag == 0:
                break
            found.setdefault(tag, []).append(value)
        if len(found.get(_NEEDED, [])) > _NEEDED_MAX:
            raise InputError(f"it needs more than {_NEEDED_MAX} libraries")
        return found

    def _wants(self, dynamic: dict[int, list[int]]) -> dict[str, tuple[str, ...]]:
        """DT_VERNEED: a list of libraries, each with a list of versions; links are distances in bytes."""
        wanted: dict[str, tuple[str, ...]] = {}
        budget = _VERSIONS_MAX
        for at, raw in self._chain(dynamic, _VERNEED, _VERNEEDNUM, 16, 12):
            _, count, name, first, _ = struct.unpack(f"{self._order}HHIII", raw)
            versions = []
            here = at + first
            for _ in range(count):
                budget -= 1
                if budget < 0:
                    raise InputError(f"it wants more than {_VERSIONS_MAX} versions of libraries")
                _, flags, _, version, step = struct.unpack(
                    f"{self._order}IHHII", self._bytes(here, 16, "list of wanted versions")
                )
                if not flags & 2:  # VER_FLG_WEAK: may be missing
                    versions.append(self._name(dynamic, version))
                if step == 0:
                    break
                here += step
            wanted[self._name(dynamic, name)] = tuple(versions)
        return wanted

    def _defines(self, dynamic: dict[int, list[int]]) -> Iterator[str]:
        """DT_VERDEF: each definition's first auxiliary record has its name."""
        for at, raw in self._chain(dynamic, _VERDEF, _VERDEFNUM, 20, 16):
            (auxiliary,) = struct.unpack_from(f"{self._order}I", raw, 12)
            (name,) = struct.unpack(f"{self._order}I", self._bytes(at + auxiliary, 4, "list of defined versions"))
            yield self._name(dynamic, name)

    def _chain(
        self, dynamic: dict[int, list[int]], table: int, number: int, size: int, step_at: int
    ) -> Iterator[tuple[int, bytes]]:
        if table not in dynamic:
            return
        count = dynamic.get(number, [0])[0]
        if count > _VERSIONS_MAX:
            raise InputError(f"it has {count} lists of versions; at most {_VERSIONS_MAX} are read")
        at = self._place(dynamic[table][0], "list of versions")
        for _ in range(count):
            raw = self._bytes(at, size, "list of versions")
            yield at, raw
            (step,) = struct.unpack_from(f"{self._order}I", raw, step_at)
            if step == 0:
                return
            at += step

    def _optional(self, dynamic: dict[int, list[int]], tag: int) -> str | None:
        values = dynamic.get(tag)
        return None if values is None else self._name(dynamic, values[0])

    def _name(self, dynamic: dict[int, list[int]], at: int) -> str:
        table, size = dynamic.get(_STRTAB), dynamic.get(_STRSZ)
        if table is None or size is None or at >= size[0]:
            raise InputError("a name lies outside its table of names")
        start = self._place(table[0], "table of names") + at
        data = read_at(self._content, start, min(_STRING_MAX, size[0] - at))
        end = data.find(0)
        if end < 0:
            raise InputError(f"a name in it does not end within {_STRING_MAX} bytes")
        return data[:end].decode(errors="surrogateescape")

    def _place(self, address: int, what: str) -> int:
        """Where in the file lies what will be at an address."""
        for load in self._loads:
            if load.address <= address < load.address + load.size:
                return address - load.address + load.offset
        raise InputError(f"its {what} is not among the bytes that are loaded")

    def _records(self, offset: int, size: int, count: int, what: str) -> Iterator[bytes]:
        data = self._bytes(offset, size * count, what)
        return (data[start : start + size] for start in range(0, len(data), size))

    def _bytes(self, offset: int, length: int, what: str) -> bytes:
        data = read_at(self._content, offset, length) if offset < self._content.size else b""
        if len(data) != length:
            raise InputError(f"its {what} {'lie' if what.endswith('s') else 'lies'} behind its end")
        return data
