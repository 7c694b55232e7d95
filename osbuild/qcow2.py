"""What a qcow2 file says of itself, and whether what it points at is there; the disk in it is not looked at.

    header        big-endian: where the tables are, how large the disk is
    L1 table      8 bytes for each L2 table: where it is
    L2 tables     8 bytes for each cluster of the disk: where it is; 0: a hole

Source: docs/interop/qcow2.txt of QEMU.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from osbuild.content import Backing
from osbuild.errors import InputError

MAGIC: Final = b"QFI\xfb"
_HEADER: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_PLACE: Final = 0x00FFFFFFFFFFFE00  # of a table or a cluster, in an entry
_PACKED: Final = 1 << 62  # a cluster that is compressed; its place has other bits
_CLUSTER_BITS: Final = range(9, 22)
_TABLES_MAX: Final = 1 << 16  # of the second level that are read
_SAID: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2:
    """A qcow2 file's header."""

    virtual_size: int  # bytes of the disk
    problems: tuple[str, ...]


def read(backing: Backing) -> Qcow2:
    """InputError when not even the header is there."""
    head = backing.read(0, _HEADER.size)
    if len(head) < _HEADER.size:
        raise InputError("a qcow2 image that is cut off in its header")
    _, version, other, _, bits, size, encrypted, entries, table, counts, count_clusters, _, _ = _HEADER.unpack(head)
    if version not in (2, 3):
        return Qcow2(virtual_size=size, problems=(f"a qcow2 image of the unknown version {version}",))
    if bits not in _CLUSTER_BITS:
        return Qcow2(virtual_size=size, problems=(f"its clusters have 2^{bits} bytes; 2^9 to 2^21 are possible",))
    problems = []
    if other:
        problems.append("it is not whole without another file, which it names")
    if encrypted:
        problems.append("it is encrypted")
    if not size:
        problems.append("the disk has 0 bytes")
    if counts + (count_clusters << bits) > backing.size:
        problems.append(f"its table of reference counts goes beyond the end, {backing.size}")
    need = -(-size // (1 << bits + bits - 3))
    if entries < need:
        problems.append(f"its first table has {entries} entries, and the disk takes {need}")
    if table + entries * 8 > backing.size:
        problems.append(f"its first table goes beyond the end, {backing.size}")
    else:
        problems += _some(_clusters(backing, table, min(entries, need), 1 << bits))
    return Qcow2(virtual_size=size, problems=tuple(problems))


def _some(found: Iterator[str]) -> Iterator[str]:
    for number, problem in enumerate(found):
        if number == _SAID:
            yield "… and more clusters"
            return
        yield problem


def _clusters(backing: Backing, table: int, entries: int, cluster: int) -> Iterator[str]:
    """Tables and clusters that are not there."""
    seen: set[int] = set()
    for number, (entry,) in enumerate(struct.iter_unpack(">Q", backing.read(table, entries * 8))):
        at = entry & _PLACE
        if not at:
            continue
        if at in seen or at % cluster or len(seen) == _TABLES_MAX:
            yield f"entry {number} of its first table leads to {at}, where no table of its own is"
            continue
        seen.add(at)
        data = backing.read(at, cluster)
        if len(data) < cluster:
            yield f"table {number} begins at {at}, and the file ends at {backing.size}"
            continue
        for index, (inner,) in enumerate(struct.iter_unpack(">Q", data)):
            place = inner & _PLACE
            if place >= backing.size and not inner & _PACKED:
                first = (number * (cluster // 8) + index) * cluster
                yield f"the disk's bytes from {first} on lie at {place}, and the file ends at {backing.size}"
