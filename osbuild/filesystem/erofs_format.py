"""The bytes of erofs that its writer and its reader share.

    0      boot area
    1024   superblock, 128 bytes; what follows it in its block is under the same checksum
    …      inodes: inode number n ("nid") is at meta_blkaddr * 4096 + n * 32

    inode: 32 bytes (compact: 16-bit ids, the superblock's time) or 64 (extended); behind it
           its attributes: a 12 byte header, 4 bytes for each shared one, then those that are its own;
           then the end of its data (FLAT_INLINE), or where its chunks are (CHUNK_BASED), 4 bytes each

    directory: blocks of 12-byte entries (nid, where the name starts, type), then their names without an end mark;
           names are in the order of their bytes over all blocks, "." and ".." among them

    attribute: length of the name, index of its prefix, length of the value; name; value; a multiple of 4 bytes

Source: Documentation/filesystems/erofs.rst of the kernel and the on-disk structures that it describes.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping
from typing import Final

from osbuild.crc import crc32c

BLOCK: Final = 4096
BLOCK_BITS: Final = 12
MAGIC: Final = 0xE0F5E1E2
SUPERBLOCK_AT: Final = 1024
SLOT: Final = 32  # bytes that inode numbers count in
NO_BLOCK: Final = 0xFFFFFFFF  # in a chunk's place: a hole

HAS_CHECKSUM: Final = 0x1  # compatible features
HAS_MTIME: Final = 0x2
HAS_CHUNKS: Final = 0x4  # incompatible features

FLAT_PLAIN: Final = 0  # data layouts
FLAT_INLINE: Final = 2
CHUNK_BASED: Final = 4
EXTENDED: Final = 1  # bit 0 of an inode's format; the layout stands above it

CHUNK_BITS_MASK: Final = 0x1F  # of a chunk format: a chunk's size, as a power of two of blocks
CHUNK_INDEXES: Final = 0x20  # 8 bytes for a chunk instead of 4: a device stands before the block

SUPERBLOCK_FIELDS: Final = (
    ("magic", "I"), ("checksum", "I"), ("compatible features", "I"), ("block bits", "B"), ("slots", "B"),
    ("root inode", "H"), ("inodes", "Q"), ("built", "Q"), ("built (ns)", "I"), ("blocks", "I"),
    ("metadata block", "I"), ("attribute block", "I"), ("uuid", "16s"), ("label", "16s"),
    ("incompatible features", "I"), ("compression", "H"), ("devices", "H"), ("device slot", "H"),
    ("directory block bits", "B"), ("long prefixes", "B"), ("long prefixes at", "I"), ("packed inode", "Q"),
    ("attribute filter", "B"), ("reserved", "23s"),
)  # fmt: skip
SUPERBLOCK: Final = struct.Struct("<" + "".join(form for _, form in SUPERBLOCK_FIELDS))
# format, attributes, mode, links, size, -, data, number, uid, gid, -
COMPACT_INODE: Final = struct.Struct("<HHHH I I II HH I")
# format, attributes, mode, -, size, data, number, uid, gid, seconds, nanoseconds, links
EXTENDED_INODE: Final = struct.Struct("<HHHH Q II II q I I 16x")
DIRENT: Final = struct.Struct("<Q HBB")
XATTR_HEADER: Final = struct.Struct("<I B 7x")
XATTR_ENTRY: Final = struct.Struct("<BBH")
CHUNK_INDEX: Final = struct.Struct("<HHI")

FILE_TYPES: Final[Mapping[int, int]] = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}  # fmt: skip
XATTR_PREFIXES: Final = (("user.", 1), ("trusted.", 4), ("security.", 6))
ACLS: Final[Mapping[str, int]] = {"system.posix_acl_access": 2, "system.posix_acl_default": 3}


def checksum(block: bytes) -> int:
    """Of a superblock and all that follows it in its block, with zeros where the sum itself is."""
    # The kernel starts with all ones as everybody does, but does not invert the end.
    return crc32c(block[:4] + bytes(4) + block[8:], 0) ^ 0xFFFFFFFF
