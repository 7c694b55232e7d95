"""Whether an ext4 filesystem's books agree: bitmaps, counts and links with what the walk from the root came across.

Source: Documentation/filesystems/ext4/ of the kernel (bitmaps.rst, group_descr.rst, checksums.rst).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from osbuild.filesystem.base import Region
from osbuild.filesystem.ext4_reader_head import (
    GROUP_FIELDS,
    SUPERBLOCK,
    SUPERBLOCK_AT,
    SUPERBLOCK_SIZE,
    DamageError,
    Disk,
    Group,
    Superblock,
    checksum,
)
from osbuild.filesystem.ext4_reader_inode import FIELDS

_INODE_UNINIT = 1
_BLOCK_UNINIT = 2
_LINKS_MAX = 65000


@dataclass(slots=True)
class Found:
    """How the walk came across an inode."""

    names: int = 0
    links: int = 0  # by its own count
    is_dir: bool = False
    children: int = 0  # directories in it


def accounts(
    disk: Disk,
    superblock: Superblock,
    groups: list[Group],
    found: Mapping[int, Found],
    claimed: list[tuple[int, int, int]],
) -> list[str]:
    """Everything that does not add up, a sentence each."""
    problems: list[str] = []
    if len(groups) < superblock.groups:
        return problems  # said before, and nothing can be counted
    problems += _links(found)
    problems += _shared([*claimed, *((first, count, 0) for first, count in _metadata(superblock, groups))])
    problems += _blocks(disk, superblock, groups, claimed)
    problems += _inodes(disk, superblock, groups, found)
    return problems


def _links(found: Mapping[int, Found]) -> Iterator[str]:
    for number, inode in found.items():
        wanted = 2 + inode.children if inode.is_dir else inode.names
        if inode.links == wanted or (inode.is_dir and wanted > _LINKS_MAX and inode.links == 1):
            continue
        yield f"inode {number}: it says that it has {inode.links} links, and has {wanted}"


def _shared(claimed: list[tuple[int, int, int]]) -> Iterator[str]:
    end, owner = 0, 0
    for first, count, inode in sorted(claimed):
        if first < end:
            yield f"block {first} belongs to {_owner(owner)} and to {_owner(inode)}"
        if first + count > end:
            end, owner = first + count, inode


def _owner(inode: int) -> str:
    return f"inode {inode}" if inode else "the filesystem itself"


# Blocks


def _blocks(
    disk: Disk, superblock: Superblock, groups: list[Group], claimed: list[tuple[int, int, int]]
) -> Iterator[str]:
    if superblock.has("ro_compat", "bigalloc"):
        return  # its bitmaps count clusters
    used = _used(superblock, groups, claimed)
    free_total = 0
    for number, group in enumerate(groups):
        first, count = _span(superblock, number)
        mask = (1 << count) - 1
        mine = used.get(number, 0) & mask
        free = count - mine.bit_count()
        if not group.flags & _BLOCK_UNINIT:
            try:
                data = disk.read(group.block_bitmap * superblock.block_size, superblock.block_size)
            except DamageError as damage:
                yield f"group {number}: its block bitmap: {damage}"
                continue
            wanted = checksum(superblock.seed, data[: superblock.per_group // 8]) if superblock.csum else 0
            yield from _bitmap_checksum(superblock, number, "block", group.block_bitmap_csum, wanted)
            bits = int.from_bytes(data, "little")
            yield from _padding(superblock, number, "block", bits, count)
            marked = bits & mask
            free = count - marked.bit_count()
            yield from _marks(number, first, marked, mine)
        free_total += free
        if group.free_blocks != free:
            yield f"group {number}: it says that {group.free_blocks} blocks are free, its bitmap says {free}"
    said = superblock.number("free_blocks_count_lo")
    said |= superblock.number("free_blocks_count_hi") << 32 if superblock.wide else 0
    if said != free_total:
        yield f"the superblock says that {said} blocks are free, the bitmaps say {free_total}"


def _marks(group: int, first: int, marked: int, used: int) -> Iterator[str]:
    """Differences between a bitmap and what is used."""
    lost = used & ~marked
    if lost:
        yield f"group {group}: {lost.bit_count()} blocks from {first + _lowest(lost)} on are in use and marked as free"
    idle = marked & ~used
    if idle:
        yield f"group {group}: {idle.bit_count()} blocks from {first + _lowest(idle)} on are marked as used by nobody"


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _used(superblock: Superblock, groups: list[Group], claimed: list[tuple[int, int, int]]) -> dict[int, int]:
    """For each group the blocks in use, as bits."""
    used: dict[int, int] = {}
    per_group, start = superblock.per_group, superblock.first_block

    def mark(first: int, count: int) -> None:
        first -= start
        while count > 0:
            group, at = divmod(first, per_group)
            part = min(count, per_group - at)
            used[group] = used.get(group, 0) | ((1 << part) - 1) << at
            first, count = first + part, count - part

    for first, count in _metadata(superblock, groups):
        if start <= first and count <= superblock.blocks:
            mark(first, count)
    for first, count, _ in claimed:
        mark(first, count)
    return used


def _metadata(superblock: Superblock, groups: list[Group]) -> Iterator[tuple[int, int]]:
    """Blocks of the filesystem itself: superblocks, descriptors and room for more of them, bitmaps, tables."""
    size = superblock.block_size
    descriptors = -(-superblock.groups * superblock.group_size // size)
    reserved = superblock.number("reserved_gdt_blocks")
    table = superblock.number("inodes_per_group") * superblock.inode_size // size
    for number, group in enumerate(groups):
        if _has_copy(superblock, number):
            yield superblock.first_block + number * superblock.per_group, 1 + descriptors + reserved
        yield group.block_bitmap, 1
        yield group.inode_bitmap, 1
        yield group.inode_table, table
    if superblock.has("incompat", "mmp"):
        yield superblock.number("mmp_block"), 1


def _has_copy(superblock: Superblock, group: int) -> bool:
    """Whether a group begins with a superblock."""
    if group == 0:
        return True
    if superblock.has("compat", "sparse_super2"):
        return group in (superblock.number("backup_bgs_0"), superblock.number("backup_bgs_1"))
    if not superblock.has("ro_compat", "sparse_super") or group == 1:
        return True
    return any(_is_power(group, base) for base in (3, 5, 7))


def _is_power(number: int, base: int) -> bool:
    while number % base == 0:
        number //= base
    return number == 1


def _span(superblock: Superblock, group: int) -> tuple[int, int]:
    """A group's first block, and how many it has."""
    first = superblock.first_block + group * superblock.per_group
    return first, min(superblock.per_group, superblock.blocks - first)


def _bitmap_checksum(superblock: Superblock, group: int, what: str, given: int, wanted: int) -> Iterator[str]:
    mask = 0xFFFFFFFF if superblock.group_size >= 64 else 0xFFFF
    if superblock.csum and given & mask != wanted & mask:
        yield f"group {group}: the checksum of its {what} bitmap is {given:#x}, its bytes give {wanted & mask:#x}"


def _padding(superblock: Superblock, group: int, what: str, bits: int, count: int) -> Iterator[str]:
    """What a bitmap's block has behind its last bit must be ones: nothing there is free."""
    rest = superblock.block_size * 8 - count
    lacking = rest - (bits >> count).bit_count()
    if lacking:
        yield f"group {group}: {lacking} of the {rest} bits behind the last of its {what} bitmap are not set"


# Inodes


def _inodes(disk: Disk, superblock: Superblock, groups: list[Group], found: Mapping[int, Found]) -> Iterator[str]:
    per_group = superblock.number("inodes_per_group")
    used: dict[int, int] = {}
    directories: dict[int, int] = {}
    for inode, how in found.items():
        home, at = divmod(inode - 1, per_group)
        used[home] = used.get(home, 0) | 1 << at
        directories[home] = directories.get(home, 0) + how.is_dir
    used[0] = used.get(0, 0) | (1 << superblock.number("first_ino") - 1) - 1  # reserved, whether used or not
    free_total = 0
    for number, group in enumerate(groups):
        marked = 0
        if not group.flags & _INODE_UNINIT:
            try:
                data = disk.read(group.inode_bitmap * superblock.block_size, superblock.block_size)
            except DamageError as damage:
                yield f"group {number}: its inode bitmap: {damage}"
                continue
            wanted = checksum(superblock.seed, data[: per_group // 8]) if superblock.csum else 0
            yield from _bitmap_checksum(superblock, number, "inode", group.inode_bitmap_csum, wanted)
            bits = int.from_bytes(data, "little")
            yield from _padding(superblock, number, "inode", bits, per_group)
            marked = bits & (1 << per_group) - 1
        yield from _inode_marks(number, number * per_group + 1, marked, used.get(number, 0))
        free = per_group - marked.bit_count()
        free_total += free
        for what, said, real in (
            ("inodes are free", group.free_inodes, free),
            ("inodes are directories", group.directories, directories.get(number, 0)),
        ):
            if said != real:
                yield f"group {number}: it says that {said} {what}, but {real} are"
    said = superblock.number("free_inodes_count")
    if said != free_total:
        yield f"the superblock says that {said} inodes are free, the bitmaps say {free_total}"


def _inode_marks(group: int, first: int, marked: int, used: int) -> Iterator[str]:
    lost, idle = used & ~marked, marked & ~used
    if lost:
        yield f"group {group}: {lost.bit_count()} inodes from {first + _lowest(lost)} on are in use and marked as free"
    if idle:
        yield f"group {group}: {idle.bit_count()} inodes from {first + _lowest(idle)} on are marked and have no name"


# Names for what no path names


def regions(
    superblock: Superblock, groups: list[Group], belongings: list[tuple[int, int, int, str]]
) -> tuple[Region, ...]:
    """The filesystem's own parts, with the names of their fields; blocks that belong to inodes without being data."""
    size = superblock.block_size
    descriptors_at = (superblock.first_block + 1) * size
    found = [
        Region(
            offset=SUPERBLOCK_AT, size=SUPERBLOCK_SIZE, name="superblock",
            fields=tuple((name, at, _width(code)) for name, at, code in SUPERBLOCK),
        ),
        Region(
            offset=descriptors_at, size=len(groups) * superblock.group_size, name="group descriptors", of="group",
            record=superblock.group_size, fields=GROUP_FIELDS,
        ),
    ]  # fmt: skip
    per_group = superblock.number("inodes_per_group")
    for number, group in enumerate(groups):
        found += [
            Region(offset=group.block_bitmap * size, size=size, name=f"block bitmap of group {number}"),
            Region(offset=group.inode_bitmap * size, size=size, name=f"inode bitmap of group {number}"),
            Region(
                offset=group.inode_table * size, size=per_group * superblock.inode_size,
                name=f"inode table of group {number}", of="inode", record=superblock.inode_size,
                first=number * per_group + 1, fields=FIELDS,
            ),
        ]  # fmt: skip
    for first, count, inode, what in belongings:
        at, length = first * size, count * size
        if what:
            found.append(Region(offset=at, size=length, name=what))
        else:
            found.append(Region(offset=at, size=length, name="beside", of="inode", record=length, first=inode))
    apart: list[Region] = []
    for region in sorted(found, key=lambda region: region.offset):
        if not apart or apart[-1].offset + apart[-1].size <= region.offset:
            apart.append(region)
    return tuple(apart)


def _width(code: str) -> int:
    return int(code[:-1]) if code.endswith("s") else {"B": 1, "H": 2, "I": 4, "Q": 8}[code]
