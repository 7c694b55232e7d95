"""ext4's structures as bytes: feature bits, checksums, times, and what an inode keeps in its 60 bytes of i_block.

Every piece of metadata has a crc32c, whose seed says whose it is: the filesystem's for what belongs to all of it, and
from that one for each inode. Checksums are the raw register: it starts with the seed, and is not inverted at the end.

Source: Documentation/filesystems/ext4/ of the kernel (the on-disk format).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from osbuild.crc import crc32c as _crc32c
from osbuild.tree import Entry

BLOCK: Final = 4096
SECTORS: Final = BLOCK // 512  # what i_blocks counts, of one block
GROUP_BLOCKS: Final = 8 * BLOCK
INODE: Final = 256
EXTRA_ISIZE: Final = 32
FIRST_INODE: Final = 11
ROOT_INODE: Final = 2
JOURNAL_INODE: Final = 8
EXTENT_BLOCKS: Final = 32768  # the longest initialised extent
INLINE_EXTENTS: Final = 4
BLOCK_EXTENTS: Final = (BLOCK - 12) // 12
FAST_SYMLINK: Final = 60  # targets shorter than this lie in the inode
LINKS_MAX: Final = 65000
FILE_BLOCKS_MAX: Final = (1 << 32) - 2  # logical block numbers have 32 bits

# Feature bits (ext4/super.rst)
COMPAT: Final = 0x0004 | 0x0008 | 0x0020 | 0x0200  # has_journal, ext_attr, dir_index, sparse_super2
INCOMPAT: Final = 0x0002 | 0x0040 | 0x0200 | 0x2000  # filetype, extents, flex_bg, csum_seed
# sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum
RO_COMPAT: Final = 0x0001 | 0x0002 | 0x0008 | 0x0020 | 0x0040 | 0x0400

INDEX_FLAG: Final = 0x1000
EXTENTS_FLAG: Final = 0x80000
HUGE_FILE_FLAG: Final = 0x40000
GROUP_ZEROED: Final = 0x4  # its inode table needs no clearing

FILE_TYPES: Final[Mapping[int, int]] = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFLNK: 7,
}  # fmt: skip
INODE_WHOLE: Final = struct.Struct("<HHIIIIIHHIII 60s IIII HHHHHH HHIIIIIII 96s")  # the last are attributes
INODE_CHECKSUMS: Final = (0x7C, 0x82)  # of its low and high halves
GROUP: Final = struct.Struct("<IIIHHHHIHHHH")
_EXTENT_MAGIC: Final = 0xF30A
_EXTENT_HEADER: Final = struct.Struct("<HHHHI")
_EXTENT: Final = struct.Struct("<IHHI")
_EXTENT_INDEX: Final = struct.Struct("<IIHH")
_TIME_MIN: Final = -(1 << 31)
_TIME_MAX: Final = (1 << 34) - (1 << 31) - 1

Extents = Sequence[tuple[int, int, int]]  # logical block, how many, physical block


def checksum(seed: int, *parts: bytes) -> int:
    """The raw crc32c register after these bytes."""
    register = seed ^ 0xFFFFFFFF
    for part in parts:
        register = _crc32c(part, register)
    return register ^ 0xFFFFFFFF


def inode_seed(seed: int, number: int) -> int:
    """What the checksums of an inode, and of the blocks that belong to it, start with; generations are all 0."""
    return checksum(seed, struct.pack("<II", number, 0))


def encode_time(mtime_ns: int) -> tuple[int, int]:
    """Seconds in 32 bits, and the extra field: two more bits of seconds, 30 of nanoseconds. Clamped to ext4's range."""
    seconds, rest = divmod(mtime_ns, 1_000_000_000)
    if not _TIME_MIN <= seconds <= _TIME_MAX:
        seconds, rest = min(max(seconds, _TIME_MIN), _TIME_MAX), 0
    epoch = ((seconds - ((seconds + (1 << 31)) % (1 << 32) - (1 << 31))) >> 32) & 3
    return seconds & 0xFFFFFFFF, rest << 2 | epoch


def encode_device(entry: Entry) -> bytes:
    """A device number: the old form where it fits, else the new one."""
    major, minor = entry.major, entry.minor
    if major < 256 and minor < 256:
        return struct.pack("<II", major << 8 | minor, 0)
    return struct.pack("<II", 0, (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12)


# Extents


def extent_blocks(count: int) -> int:
    """How many blocks an inode needs for a tree of so many extents."""
    total = 0
    while count > INLINE_EXTENTS:
        count = -(-count // BLOCK_EXTENTS)
        total += count
    return total


def extent_tree(extents: Extents, blocks: Sequence[int], seed: int) -> tuple[bytes, list[bytes]]:
    """What lies in i_block, and in each of `blocks` (as many as `extent_blocks` said): leaves, then what is above.

    seed: the inode's.
    """
    records = [_EXTENT.pack(*extent[:2], 0, extent[2]) for extent in extents]
    firsts = [extent[0] for extent in extents]
    depth = 0
    made: list[bytes] = []
    while len(records) > INLINE_EXTENTS:
        above, above_firsts = [], []
        for start in range(0, len(records), BLOCK_EXTENTS):
            part = records[start : start + BLOCK_EXTENTS]
            data = _EXTENT_HEADER.pack(_EXTENT_MAGIC, len(part), BLOCK_EXTENTS, depth, 0) + b"".join(part)
            data = data.ljust(BLOCK - 4, b"\0")
            above.append(_EXTENT_INDEX.pack(firsts[start], blocks[len(made)], 0, 0))
            above_firsts.append(firsts[start])
            made.append(data + struct.pack("<I", checksum(seed, data)))
        records, firsts, depth = above, above_firsts, depth + 1
    head = _EXTENT_HEADER.pack(_EXTENT_MAGIC, len(records), INLINE_EXTENTS, depth, 0)
    return head + b"".join(records), made


def run(first: int, blocks: int) -> list[tuple[int, int, int]]:
    """The extents of a file without holes."""
    return [
        (logical, min(EXTENT_BLOCKS, blocks - logical), first + logical) for logical in range(0, blocks, EXTENT_BLOCKS)
    ]
