"""What describes a whole ext4: the superblock, group descriptors, bitmaps, and the journal's own superblock."""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Iterator
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
from osbuild.filesystem.ext4_placing import Places

_UNSIGNED_HASH: Final = 2  # s_flags: hashes treat names as unsigned bytes
_CRC32C: Final = 1
_JOURNAL_CRC32C: Final = 4
_JOURNAL_CHECKSUMS: Final = 0x10  # checksums of version 3
_JOURNAL_CHECKSUM_AT: Final = 0xFC
_JOURNAL_HEAD: Final = 1024  # bytes of its superblock
_ALL_FREE: Final = bytes(BLOCK)
_ALL_USED: Final = b"\xff" * BLOCK


@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """What tells this filesystem from all others, and when it was made."""

    uuid: bytes
    hash_seed: bytes
    seed: int  # of checksums
    epoch: int


def superblock(places: Places, used: int, identity: Identity, journal: bytes) -> bytes:
    """Its 1024 bytes; used: how many inodes are, which are the first; journal: the journal inode's i_block."""
    block = bytearray(1024)
    inodes = places.groups * places.per_group
    journal_size = places.journal.blocks * BLOCK
    now = identity.epoch & 0xFFFFFFFF
    struct.pack_into(
        "<13I 6H 4I 2H", block, 0,
        inodes, places.blocks, 0, sum(count for _, count in places.gaps), inodes - used, 0, 2, 2,
        GROUP_BLOCKS, GROUP_BLOCKS, places.per_group, 0, now,  # times of last mount and last write
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
    """An empty journal (ext4/journal.rst): big-endian, version 2, with checksums, nothing in it."""
    block = struct.pack(">III IIIII IIII", 0xC03B3998, 4, 0, BLOCK, blocks, 1, 1, 0, 0, 0, _JOURNAL_CHECKSUMS, 0)
    block += identity.uuid + struct.pack(">IIII B", 1, 0, 0, 0, _JOURNAL_CRC32C)  # one user: this filesystem
    block = block.ljust(_JOURNAL_HEAD, b"\0")
    total = checksum(0xFFFFFFFF, block)
    block = block[:_JOURNAL_CHECKSUM_AT] + struct.pack(">I", total) + block[_JOURNAL_CHECKSUM_AT + 4 :]
    return block.ljust(BLOCK, b"\0")


def group_blocks(places: Places, used: int, directories: Iterable[int], seed: int) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of group descriptors and both kinds of bitmaps; a bitmap of free blocks only is a hole.

    used: how many inodes are; directories: the inodes of all of them.
    """
    per_group = places.per_group
    counts = Counter((number - 1) // per_group for number in directories)
    untouched = _inode_bitmap(per_group, 0)
    descriptors = bytearray()
    table_blocks = per_group * INODE // BLOCK
    for group, (blocks, free) in enumerate(_block_bitmaps(places)):
        taken = min(max(used - group * per_group, 0), per_group)
        inodes = _inode_bitmap(per_group, taken) if taken else untouched
        fields = GROUP.pack(
            places.block_bitmaps + group, places.inode_bitmaps + group, places.table + group * table_blocks,
            free, per_group - taken, counts[group], GROUP_ZEROED, 0,
            checksum(seed, blocks) & 0xFFFF, checksum(seed, inodes[: per_group // 8]) & 0xFFFF, per_group - taken, 0,
        )  # fmt: skip
        total = checksum(seed, struct.pack("<I", group), fields)
        descriptors += fields[:-2] + struct.pack("<H", total & 0xFFFF)
        if blocks is not _ALL_FREE:
            yield (places.block_bitmaps + group) * BLOCK, blocks
        yield (places.inode_bitmaps + group) * BLOCK, inodes
    yield places.descriptors * BLOCK, bytes(descriptors)


def _inode_bitmap(per_group: int, taken: int) -> bytes:
    """A bit for each inode of a group, of which the first ones are taken; those past its last one are set."""
    return ((1 << 8 * BLOCK) - (1 << per_group) + (1 << taken) - 1).to_bytes(BLOCK, "little")


def _block_bitmaps(places: Places) -> Iterator[tuple[bytes, int]]:
    """A bit for each block of each group, those past the end set; and how many are free in it."""
    free: dict[int, list[tuple[int, int]]] = {}
    for first, count in places.gaps:
        end = first + count
        for group in range(first // GROUP_BLOCKS, (end - 1) // GROUP_BLOCKS + 1):
            base = group * GROUP_BLOCKS
            free.setdefault(group, []).append((max(first - base, 0), min(end - base, GROUP_BLOCKS)))
    for group in range(places.groups):
        runs = free.get(group, [])
        if runs == [(0, GROUP_BLOCKS)]:
            yield _ALL_FREE, GROUP_BLOCKS
            continue
        bits = int.from_bytes(_ALL_USED, "little")
        for first, end in runs:
            bits ^= (1 << end) - (1 << first)
        yield bits.to_bytes(BLOCK, "little") if runs else _ALL_USED, sum(end - first for first, end in runs)
