"""What lies where in a disk image: both MBRs, the nd_pfn superblock between them, partitions, what is in each.

Nothing here follows from what we write (nvdimm_image.py draws that); it is read, and held against the rules of those
who will read it: the kernel's partition scanner, its nd_pfn driver, and QEMU.

Source: UEFI specification 2.10, table 5.1 (MBR); struct nd_pfn_sb of drivers/nvdimm/pfn.h and the checks that
kata-contract 5.6 lists (nd_pfn).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from osbuild.content import stretches
from osbuild.filesystem import READERS, recognise
from osbuild.nvdimm_image import ALIGN, DATA_OFFSET, MIB, SECTOR, fletcher64
from osbuild.tree import Backing

HEAD: Final = 4096
PFN_AT: Final = 4096
_PFN_SIZE: Final = 4096
_SIGNATURE: Final = b"NVDIMM_PFN_INFO\0"
_ENTRY: Final = struct.Struct("<B3sB3sII")
_MODES: Final = {0: "none", 1: "RAM", 2: "PMEM"}
_TYPES: Final = {0x83: "Linux", 0x82: "swap", 0x0B: "FAT", 0x0C: "FAT", 0xEE: "GPT", 0xEF: "EFI", 0x05: "extended"}
_READ: Final = 1 << 20
_RESERVE: Final = 8192  # bytes that the nd_pfn driver keeps at a namespace's start
_PFN_FIELDS: Final[tuple[tuple[str, int, str], ...]] = (
    ("signature", 0, "16s"), ("uuid", 16, "16s"), ("parent_uuid", 32, "16s"), ("flags", 48, "I"),
    ("version_major", 52, "H"), ("version_minor", 54, "H"), ("dataoff", 56, "Q"), ("npfns", 64, "Q"),
    ("mode", 72, "I"), ("start_pad", 76, "I"), ("end_trunc", 80, "I"), ("align", 84, "I"), ("page_size", 88, "I"),
    ("page_struct_size", 92, "H"), ("checksum", 4088, "Q"),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One entry of an MBR."""

    number: int
    boot: int
    type: int
    start: int  # bytes, from where the MBR is
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Mbr:
    """A master boot record."""

    at: int  # bytes, of the file
    signature: str  # hex, of the disk
    slots: tuple[Slot, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pfn:
    """The nd_pfn superblock."""

    fields: tuple[tuple[str, str], ...]
    data_offset: int
    problems: tuple[str, ...]  # each a reason for which no disk appears


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """What an MBR's entry leads to."""

    number: int
    start: int  # bytes, of the file
    size: int
    kind: str  # a row of READERS; "hash tree", or empty for what nobody knows


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskLayout:
    """A whole image."""

    size: int
    outer: Mbr | None  # what a block device shows; None for a filesystem without partitions
    pfn: Pfn | None = None
    inner: Mbr | None = None  # what an NVDIMM shows
    partitions: tuple[Partition, ...] = ()
    problems: tuple[str, ...] = ()


def read_layout(backing: Backing) -> DiskLayout | None:
    """What lies in an image; None when it is neither a disk with partitions nor a filesystem."""
    head = backing.read(0, HEAD)
    kind = recognise(head)
    if kind:
        whole = Partition(number=0, start=0, size=backing.size, kind=kind)
        return DiskLayout(size=backing.size, outer=None, partitions=(whole,))
    outer = _mbr(head, 0)
    pfn = _pfn(backing.read(PFN_AT, _PFN_SIZE), backing.size)
    second = pfn.data_offset if pfn else DATA_OFFSET
    inner = _mbr(backing.read(second, SECTOR), second)
    if outer is None and pfn is None and inner is None:
        return None
    problems = list(_problems(outer, pfn, inner, backing.size))
    shown = outer or inner
    partitions = tuple(_partitions(backing, shown)) if shown else ()
    if not any(partition.kind in READERS for partition in partitions):
        if pfn is None and inner is None and not _looks_like_ours(outer):
            return None  # a boot sector of something else
        problems.append("no partition holds a filesystem that is known here")
    problems += _behind(backing, max((part.start + part.size for part in partitions), default=backing.size))
    if not pfn and outer and not _leads_inside(outer):
        inner = None  # what happens to stand at 2 MiB belongs to the filesystem
    return DiskLayout(
        size=backing.size, outer=outer, pfn=pfn, inner=inner, partitions=partitions, problems=tuple(problems)
    )  # fmt: skip


def _looks_like_ours(mbr: Mbr | None) -> bool:
    return mbr is not None and any(slot.start in (MIB, 3 * MIB) for slot in mbr.slots)


def _leads_inside(outer: Mbr) -> bool:
    """Whether everything that it names lies beyond the second MBR."""
    return all(slot.start >= DATA_OFFSET + SECTOR for slot in outer.slots)


def _mbr(sector: bytes, at: int) -> Mbr | None:
    if len(sector) < SECTOR or sector[510:512] != b"\x55\xaa":
        return None
    slots = []
    for number in range(4):
        boot, _, kind, _, start, size = _ENTRY.unpack_from(sector, 446 + 16 * number)
        if kind or start or size:
            slots.append(Slot(number=number + 1, boot=boot, type=kind, start=start * SECTOR, size=size * SECTOR))
    return Mbr(at=at, signature=sector[440:444].hex(), slots=tuple(slots)) if slots else None


def _pfn(block: bytes, size: int) -> Pfn | None:
    if block[:16] != _SIGNATURE or len(block) < _PFN_SIZE:
        return None
    values = {name: struct.unpack_from("<" + code, block, at)[0] for name, at, code in _PFN_FIELDS}
    wanted = fletcher64(block[:4088] + bytes(8))
    shown = []
    for name, value in values.items():
        if isinstance(value, bytes):
            text = value.rstrip(b"\0").decode("latin-1") if name == "signature" else value.hex()
        elif name == "checksum":
            text = f"{value:#018x}"
        else:
            text = f"{value} ({_MODES.get(value, 'unknown')})" if name == "mode" else str(value)
        shown.append((name, text))
    offset = values["dataoff"]
    return Pfn(
        fields=tuple(shown), data_offset=offset if offset < size else DATA_OFFSET,
        problems=tuple(_pfn_problems(values, wanted, size)),
    )  # fmt: skip


def _pfn_problems(values: dict[str, int], wanted: int, size: int) -> Iterator[str]:
    """Every reason for which the kernel would not take it."""
    offset, align = values["dataoff"], values["align"]
    if values["checksum"] != wanted:
        yield f"its checksum is {values['checksum']:#018x}, its bytes give {wanted:#018x}"
    if values["version_major"] or values["version_minor"] > 4:
        yield f"its version is {values['version_major']}.{values['version_minor']}; 0.4 is the last that is known"
    if values["mode"] not in (1, 2):
        yield f"its mode is {values['mode']}, and only 1 (RAM) and 2 (PMEM) are known"
    if align < 4096 or align & (align - 1):
        yield f"its align is {align}, no power of two from 4096 on"
    elif offset % align:
        yield f"its dataoff of {offset} is no multiple of its align, {align}"
    if offset >= size:
        yield f"its dataoff of {offset} is beyond the end, {size}"
    elif offset < PFN_AT + _RESERVE:
        yield f"its dataoff of {offset} leaves no room for itself"
    if values["start_pad"] or values["end_trunc"]:
        yield f"it cuts {values['start_pad']} bytes from the start and {values['end_trunc']} from the end"


def _problems(outer: Mbr | None, pfn: Pfn | None, inner: Mbr | None, size: int) -> Iterator[str]:
    if outer is None:
        yield "there is no MBR at 0: a block device shows no partitions"
    else:
        yield from _slot_problems("MBR 1", outer, size)
    if pfn is not None:
        yield from (f"nd_pfn superblock: {problem}" for problem in pfn.problems)
        if size % ALIGN:
            yield f"the file has {size} bytes, no multiple of 2 MiB: as an NVDIMM no disk appears"
        if inner is None:
            yield f"there is no MBR at {pfn.data_offset}, where an NVDIMM's disk begins"
    if inner is None or (pfn is None and outer is not None and not _leads_inside(outer)):
        return
    if pfn is None:
        yield f"an MBR stands at {inner.at}, but the 4096 bytes at {PFN_AT} are no nd_pfn superblock"
    yield from _slot_problems("MBR 2", inner, size)
    if outer is not None:
        yield from _differences(outer, inner)


def _slot_problems(name: str, mbr: Mbr, size: int) -> Iterator[str]:
    end = 0
    for slot in sorted(mbr.slots, key=lambda slot: slot.start):
        here = f"{name}: partition {slot.number}"
        start, stop = mbr.at + slot.start, mbr.at + slot.start + slot.size
        if not slot.start or not slot.size:
            yield f"{here} starts at {slot.start} and has {slot.size} bytes"
        if stop > size:
            yield f"{here} ends at {stop}, and the file at {size}"
        if start < end:
            yield f"{here} starts at {start}, before the one in front of it ends at {end}"
        if slot.start % 4096:
            yield f"{here} starts at {slot.start}, no multiple of 4096: DAX cannot map it"
        if slot.boot not in (0, 0x80):
            yield f"{here} has {slot.boot:#04x} where 0x80 says that it is to be booted: the kernel takes it for no MBR"
        if slot.type != 0x83:
            yield f"{here} has type {slot.type:#04x} ({_TYPES.get(slot.type, 'unknown')}), not 0x83 (Linux)"
        end = max(end, stop)


def _differences(outer: Mbr, inner: Mbr) -> Iterator[str]:
    """Where the two do not describe the same bytes."""
    if outer.signature != inner.signature:
        yield f"the MBRs have different disk signatures: {outer.signature} and {inner.signature}"
    first = {slot.number: slot for slot in outer.slots}
    second = {slot.number: slot for slot in inner.slots}
    for number in sorted(first.keys() | second.keys()):
        one, two = first.get(number), second.get(number)
        if one is None or two is None:
            yield f"only MBR {1 if one else 2} has a partition {number}"
            continue
        if (outer.at + one.start, one.size) != (inner.at + two.start, two.size):
            yield (
                f"the MBRs disagree on partition {number}: {one.size} bytes at {outer.at + one.start} of the file, and "
                f"{two.size} at {inner.at + two.start}"
            )
        if (one.type, one.boot) != (two.type, two.boot):
            yield f"the MBRs disagree on partition {number}: types {one.type:#x}, {two.type:#x}, or the boot flag"


def _behind(backing: Backing, end: int) -> Iterator[str]:
    """Bytes behind the last partition that are no zeros: of another image, or of a partition that an MBR has lost."""
    for start, size in stretches(backing.descriptor, backing.size):
        for at in range(max(start, end), start + size, _READ):
            data = backing.read(at, min(_READ, start + size - at))
            if data.strip(b"\0"):
                first = at + len(data) - len(data.lstrip(b"\0"))
                yield f"no partition reaches to the bytes from {first} on: the last one ends at {end}"
                return


def _partitions(backing: Backing, mbr: Mbr) -> Iterator[Partition]:
    """Each partition that begins inside the file, and what is in it."""
    previous = ""
    for slot in mbr.slots:
        start = mbr.at + slot.start
        if start >= backing.size:
            continue
        kind = recognise(backing.read(start, HEAD))
        if not kind and slot.number == 2 and previous in READERS:
            kind = "hash tree"  # it has no superblock: only its place says what it is
        yield Partition(number=slot.number, start=start, size=min(slot.size, backing.size - start), kind=kind)
        previous = kind
