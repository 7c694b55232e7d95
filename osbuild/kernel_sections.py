"""Where two kernels differ: which of an ELF file's sections, and how.

0x28 offset of the section headers   0x3a their size   0x3c their number   0x3e which of them has the names
header   name:u32 type:u32 flags:u64 address:u64 offset:u64 size:u64 …      64 bytes, little endian

Source: System V gABI, chapter 4. What is no 64-bit ELF file with such headers has no sections here.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping
from typing import Final

from osbuild.tree import Backing

_NOBITS: Final = 8  # a section that takes no bytes of the file
_HEADER: Final = 64
_MOST: Final = 4096
_CHUNK: Final = 1 << 20

Section = tuple[int, str]  # size, and sha256 of the bytes


def sections(backing: Backing) -> Mapping[str, Section]:
    """Each section that has bytes, by name; a name that comes again gets a number."""
    head = backing.read(0, _HEADER)
    if len(head) < _HEADER or head[:6] != b"\x7fELF\x02\x01":
        return {}
    (at,) = struct.unpack_from("<Q", head, 0x28)
    each, count, names = struct.unpack_from("<HHH", head, 0x3A)
    if each != _HEADER or not 0 < count <= _MOST or names >= count or at + each * count > backing.size:
        return {}
    table = backing.read(at, each * count)
    rows = [struct.unpack_from("<IIQQQQ", table, _HEADER * number) for number in range(count)]
    texts = backing.read(rows[names][4], min(rows[names][5], _CHUNK))
    found: dict[str, Section] = {}
    for name, kind, _, _, offset, size in rows:
        if kind in (0, _NOBITS) or offset + size > backing.size:
            continue
        text = texts[name : texts.find(b"\0", name)].decode(errors="replace")
        while text in found:
            text += "'"
        found[text] = (size, _digest(backing, offset, size))
    return found


def unequal(one: Backing, two: Backing) -> Iterator[tuple[str, str, str]]:
    """(name, what the first has, what the second has) of each section that is not the same in both."""
    first, second = sections(one), sections(two)
    if not first or not second:
        return
    for name in dict.fromkeys((*first, *second)):
        if first.get(name) != second.get(name):
            yield name, _spelled(first.get(name)), _spelled(second.get(name))


def _spelled(section: Section | None) -> str:
    return f"{section[0]} bytes, sha256 {section[1][:12]}" if section is not None else "none"


def _digest(backing: Backing, at: int, size: int) -> str:
    total = hashlib.sha256()
    for start in range(at, at + size, _CHUNK):
        total.update(backing.read(start, min(_CHUNK, at + size - start)))
    return total.hexdigest()
