"""What describes a whole ext4: the superblock, group descriptors, bitmaps, and the journal's own superblock."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from osbuild.filesystem.ext4_directory import HALF_MD4
from osbuild.filesystem.ext4_format import (
    BLOCK,
    COMPAT,
    EXTRA_ISIZE,
    FIRST_INODE,
    GROUP,
    GROUP_BLOCKS,
    GROUP_ZEROED,
    INCOMPAT,
    INODE,
    JOURNAL_INODE,
    RO_COMPAT,
    checksum,
)

_UNSIGNED_HASH: Final = 2  # s_flags: hashes treat names as unsigned bytes
_CRC32C: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Where everything is that has a fixed place, in blocks, and how much of it there is."""

    groups: int
    per_group: int  # inodes
    last: int  # the last inode that is used; all before it are, too
    blocks: int
    gaps: Sequence[tuple[int, int]]  # free blocks: first, how many
    directories: Sequence[int]  # their inodes
    descriptors: int
    block_bitmaps: int
    inode_bitmaps: int
    table: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What tells this filesystem from all others, and when it was made."""

    uuid: bytes
    hash_seed: bytes
    seed: int  # of checksums
    epoch: int


def superblock(shape: Shape, identity: Identity, journal: bytes, journal_size: int) -> bytes:
    """Its 1024 bytes; `journal` is the journal inode's i_block."""
    block = bytearray(1024)
    inodes = shape.groups * shape.per_group
    now = identity.epoch & 0xFFFFFFFF
    struct.pack_into(
        "<13I 6H 4I 2H", block, 0,
        inodes, shape.blocks, 0, sum(count for _, count in shape.gaps), inodes - shape.last, 0, 2, 2,
        GROUP_BLOCKS, GROUP_BLOCKS, shape.per_group, 0, now,  # times of last mount and last write
        0, 0xFFFF, 0xEF53, 1, 2, 0,  # mounts, no forced check, magic, clean, on errors read-only, minor revision
        now, 0, 0, 1,  # last check, its interval, Linux, dynamic revision
        0, 0,
    )  # fmt: skip
    struct.pack_into("<IHH III", block, 84, FIRST_INODE, INODE, 0, COMPAT, INCOMPAT, RO_COMPAT)
    block[104:120] = identity.uuid
    struct.pack_into("<I", block, 224, JOURNAL_INODE)
    block[236:252] = identity.hash_seed
    block[252] = HALF_MD4
    block[253] = 1  # a copy of where the journal is follows
    block[268:336] = journal.ljust(60, b"\0") + struct.pack("<II", 0, journal_size)
    struct.pack_into("<II", block, 264, now, 0)  # when it was made
    struct.pack_into("<HHI", block, 348, EXTRA_ISIZE, EXTRA_ISIZE, _UNSIGNED_HASH)
    block[372] = 4  # 16 groups in a flex group
    block[373] = _CRC32C
    struct.pack_into("<I", block, 624, identity.seed)
    struct.pack_into("<I", block, 1020, checksum(0xFFFFFFFF, bytes(block[:1020])))
    return bytes(block)


def journal_superblock(identity: Identity, blocks: int) -> bytes:
    """An empty journal (ext4/journal.rst): big-endian, version 2, nothing in it."""
    block = struct.pack(">III IIIII IIII", 0xC03B3998, 4, 0, BLOCK, blocks, 1, 1, 0, 0, 0, 0, 0)
    block += identity.uuid + struct.pack(">I", 1)  # one user: this filesystem
    return block.ljust(BLOCK, b"\0")


def group_blocks(shape: Shape, seed: int) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of group descriptors and both kinds of bitmaps."""
    used, free_blocks = _block_bitmaps(shape)
    directories = [0] * shape.groups
    for number in shape.directories:
        directories[(number - 1) // shape.per_group] += 1
    descriptors = bytearray()
    inode_bitmaps = bytearray()
    table_blocks = shape.per_group * INODE // BLOCK
    for group in range(shape.groups):
        taken = min(max(shape.last - group * shape.per_group, 0), shape.per_group)
        bitmap = ((1 << 8 * BLOCK) - (1 << shape.per_group) + (1 << taken) - 1).to_bytes(BLOCK, "little")
        inode_bitmaps += bitmap
        fields = GROUP.pack(
            shape.block_bitmaps + group, shape.inode_bitmaps + group, shape.table + group * table_blocks,
            free_blocks[group], shape.per_group - taken, directories[group], GROUP_ZEROED, 0,
            checksum(seed, bytes(used[group * BLOCK : (group + 1) * BLOCK])) & 0xFFFF,
            checksum(seed, bitmap[: shape.per_group // 8]) & 0xFFFF,
            shape.per_group - taken, 0,
        )  # fmt: skip
        total = checksum(seed, struct.pack("<I", group), fields)
        descriptors += fields[:-2] + struct.pack("<H", total & 0xFFFF)
    yield shape.descriptors * BLOCK, bytes(descriptors)
    yield shape.block_bitmaps * BLOCK, bytes(used)
    yield shape.inode_bitmaps * BLOCK, bytes(inode_bitmaps)


def _block_bitmaps(shape: Shape) -> tuple[bytearray, list[int]]:
    """A bit for each block of all groups, those past the end set; and how many are free in each group."""
    used = bytearray(b"\xff" * (shape.groups * BLOCK))
    free = [0] * shape.groups
    for first, count in shape.gaps:
        end = first + count
        for group in range(first // GROUP_BLOCKS, (end - 1) // GROUP_BLOCKS + 1):
            free[group] += min(end, (group + 1) * GROUP_BLOCKS) - max(first, group * GROUP_BLOCKS)
        whole, ends = -(-first // 8), end // 8
        for block in (*range(first, min(whole * 8, end)), *range(max(ends * 8, first), end)):
            used[block >> 3] &= ~(1 << (block & 7))
        if ends > whole:
            used[whole:ends] = bytes(ends - whole)
    return used, free
