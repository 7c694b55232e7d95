"""ext4's directories: a block of entries; or, when one is not enough, leaves by the hash of their names, and an index.

    block 0    ".", "..", and the index's root: from which hash on which block
    1 …        leaves: entries in the order of their hashes; the last 12 bytes of each hold its checksum
    at the end nodes between root and leaves, for more leaves than the root can point to (507)

Programs that know nothing of the index see blocks with entries: the root's second entry, and the only one of a node,
reach to the block's end. Source: Documentation/filesystems/ext4/directory.rst; the hash is half of MD4 (RFC 1320):
three rounds of eight steps on eight words.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from osbuild.errors import InputError
from osbuild.filesystem.ext4_format import BLOCK, checksum
from osbuild.tree import quote

HALF_MD4: Final = 1  # the hash's number in superblock and root
_DIRECTORY: Final = 2  # a directory entry's file type
_TAIL: Final = struct.Struct("<IHBBI")
_TAIL_TYPE: Final = 0xDE
_SPACE: Final = BLOCK - _TAIL.size
_ENTRY: Final = struct.Struct("<IHBB")
_ROOT_AT: Final = 32  # where the root's index begins: after two entries and 8 bytes about it
_NODE_AT: Final = 8
_ROOT_LIMIT: Final = (BLOCK - _ROOT_AT - 8) // 8
_NODE_LIMIT: Final = (BLOCK - _NODE_AT - 8) // 8
_END_HASH: Final = 0xFFFFFFFE  # means the end of a directory to readdir
_MASK: Final = 0xFFFFFFFF

Child = tuple[bytes, int, int]  # name, inode, file type


def pack(
    path: str, own: int, parent: int, children: Sequence[Child], seed: int, hash_seed: Sequence[int]
) -> tuple[bytes, bool]:
    """A directory's blocks, and whether they have an index.

    seed: the inode's, for checksums; hash_seed: four 32 bit words, the filesystem's. InputError for more entries than
    an index of two levels can hold (some 40 million).
    """
    dots: list[Child] = [(b".", own, _DIRECTORY), (b"..", parent, _DIRECTORY)]
    blocks = _fill([*dots, *children])
    if len(blocks) == 1:
        return _with_tail(blocks[0], seed), False
    hashed = sorted((half_md4(name, hash_seed), name, number, kind) for name, number, kind in children)
    leaves = _fill([child[1:] for child in hashed])
    starts = _starts(hashed, leaves)
    data = [_with_tail(leaf, seed) for leaf in leaves]
    index = list(zip(starts, range(1, len(leaves) + 1), strict=True))
    levels = 0
    if len(index) > _ROOT_LIMIT:
        levels = 1
        above = []
        for start in range(0, len(index), _NODE_LIMIT):
            part = index[start : start + _NODE_LIMIT]
            above.append((part[0][0], len(data) + 1))
            data.append(_node(part, seed))
        index = above
    if len(index) > _ROOT_LIMIT:
        raise InputError(f"{quote(path)}: {len(children)} entries are more than an ext4 directory can have")
    return b"".join([_root(dots, index, levels, seed), *data]), True


def is_small(children: Sequence[Child]) -> bool:
    """Whether these entries fit into one block, with those for the directory itself and the one above."""
    return 24 + sum([8 + (len(name) + 3 & ~3) for name, _, _ in children]) <= _SPACE


def _fill(children: Sequence[Child]) -> list[list[Child]]:
    """Entries block by block, none across a block's end."""
    blocks: list[list[Child]] = [[]]
    used = 0
    for child in children:
        size = _size(child[0])
        if used + size > _SPACE:
            blocks.append([])
            used = 0
        blocks[-1].append(child)
        used += size
    return blocks


def _size(name: bytes) -> int:
    return 8 + len(name) + -len(name) % 4


def _starts(hashed: Sequence[tuple[int, bytes, int, int]], leaves: Sequence[Sequence[Child]]) -> list[int]:
    """From which hash on each leaf is looked at; bit 0 says that the leaf before ends with the same hash."""
    starts = [0]
    at = 0
    for leaf in leaves[:-1]:
        at += len(leaf)
        starts.append(hashed[at][0] | (hashed[at][0] == hashed[at - 1][0]))
    return starts


def _with_tail(children: Sequence[Child], seed: int) -> bytes:
    parts = []
    used = 0
    for index, (name, number, kind) in enumerate(children):
        size = _size(name) if index + 1 < len(children) else _SPACE - used
        parts.append((_ENTRY.pack(number, size, len(name), kind) + name).ljust(size, b"\0"))
        used += size
    data = b"".join(parts)
    return data + _TAIL.pack(0, _TAIL.size, 0, _TAIL_TYPE, checksum(seed, data))


def _root(dots: Sequence[Child], index: Sequence[tuple[int, int]], levels: int, seed: int) -> bytes:
    own = _ENTRY.pack(dots[0][1], 12, 1, _DIRECTORY) + b".\0\0\0"
    parent = _ENTRY.pack(dots[1][1], BLOCK - 12, 2, _DIRECTORY) + b"..\0\0"
    about = struct.pack("<IBBBB", 0, HALF_MD4, 8, levels, 0)
    return _with_index(own + parent + about, index, _ROOT_LIMIT, seed)


def _node(index: Sequence[tuple[int, int]], seed: int) -> bytes:
    return _with_index(_ENTRY.pack(0, BLOCK, 0, 0), index, _NODE_LIMIT, seed)


def _with_index(head: bytes, index: Sequence[tuple[int, int]], limit: int, seed: int) -> bytes:
    """Limit and count stand where the first record's hash would: everything below the second one is in its block."""
    data = head + struct.pack("<HHI", limit, len(index), index[0][1])
    data += b"".join(struct.pack("<II", *record) for record in index[1:])
    total = checksum(seed, data, bytes(8))  # the tail, with a checksum of 0
    return data.ljust(BLOCK - 8, b"\0") + struct.pack("<II", 0, total)


# The hash


def half_md4(name: bytes, seed: Sequence[int]) -> int:
    """The hash of a name whose bytes count as unsigned."""
    a, b, c, d = seed
    for start in range(0, len(name), 32):
        a, b, c, d = _step(a, b, c, d, _words(name[start:]))
    found = b & ~1
    return found if found != _END_HASH else _END_HASH - 2


def _words(rest: bytes) -> tuple[int, ...]:
    """Eight big-endian words; where bytes are missing, in front of the last ones, stands how many there were."""
    pad = bytes([len(rest)])
    part = rest[:32]
    whole = len(part) & ~3
    data = part[:whole]
    if len(part) > whole:
        data += pad * (4 - len(part) + whole) + part[whole:]
    return struct.unpack(">8I", data.ljust(32, pad))


def _step(a: int, b: int, c: int, d: int, word: Sequence[int]) -> tuple[int, int, int, int]:
    one, two, three, four = a, b, c, d
    for at, shift in _FIRST:
        total = (a + (d ^ b & (c ^ d)) + word[at]) & _MASK
        a, b, c, d = d, (total << shift | total >> 32 - shift) & _MASK, b, c
    for at, shift in _SECOND:
        total = (a + (b & c) + ((b ^ c) & d) + word[at] + 0x5A827999) & _MASK
        a, b, c, d = d, (total << shift | total >> 32 - shift) & _MASK, b, c
    for at, shift in _THIRD:
        total = (a + (b ^ c ^ d) + word[at] + 0x6ED9EBA1) & _MASK
        a, b, c, d = d, (total << shift | total >> 32 - shift) & _MASK, b, c
    return (one + a) & _MASK, (two + b) & _MASK, (three + c) & _MASK, (four + d) & _MASK


# Which word each of the eight steps of a round takes, and how far it rotates
_FIRST: Final = tuple(zip((0, 1, 2, 3, 4, 5, 6, 7), (3, 7, 11, 19) * 2, strict=True))
_SECOND: Final = tuple(zip((1, 3, 5, 7, 0, 2, 4, 6), (3, 5, 9, 13) * 2, strict=True))
_THIRD: Final = tuple(zip((3, 7, 2, 6, 1, 5, 0, 4), (3, 9, 11, 15) * 2, strict=True))
