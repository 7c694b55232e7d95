"""dm-verity's Merkle tree: whoever knows the root hash notices every changed byte of the data it was made from.

    level n   1 block     digests of the blocks below          at the start of the tree
    …                     128 digests in each block
    level 0               digests of the data's blocks         at its end

Blocks of 4096 bytes, sha256(salt + block), unused ends are zeros. No superblock: what a reader must know stands on
the kernel's command line. It is what `veritysetup format --no-superblock` writes.

Source: Documentation/admin-guide/device-mapper/verity.rst of the kernel.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from osbuild.errors import InputError, SpecError
from osbuild.tree import quote, write_all

BLOCK: Final = 4096  # of the data, and of the tree
DIGEST: Final = 32
SALT_MAX: Final = 256  # bytes; veritysetup takes no more
# When none is asked for: the same for all images, so that a block has one digest wherever it lies. What a change leaves
# as it was need not be hashed again, and is in a registry already; the digests' strength does not rest on the salt.
DEFAULT_SALT: Final = hashlib.sha256(b"osbuilder dm-verity salt").digest()
_PER_BLOCK: Final = BLOCK // DIGEST
_BATCH: Final = 256 * BLOCK  # bytes at a time: a mebibyte, whose digests fill two blocks


@dataclass(frozen=True, slots=True)
class Known:
    """Digests of blocks, salted alike, that stand in another tree already."""

    descriptor: int  # of the file that has them
    runs: Sequence[tuple[int, int, int]]  # offset and bytes in the data that is hashed, whole blocks, in order, apart;
    #                                       where in that file the first digest lies

    def within(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """What of them is about these bytes of the data, whole blocks."""
        first = bisect.bisect_right(self.runs, start, key=lambda run: run[0])
        for number in range(max(first - 1, 0), len(self.runs)):
            offset, size, at = self.runs[number]
            if offset >= end:
                return
            here, last = max(offset, start), min(offset + size, end)
            if here < last:
                yield here, last - here, at + (here - offset) // BLOCK * DIGEST


NONE: Final = Known(-1, ())


def hash_tree(
    descriptor: int, offset: int, size: int, salt: bytes, target: int, target_offset: int, known: Known = NONE
) -> bytes:
    """Hash `size` bytes at `offset` of an open file, write the tree at `target_offset` of another, give the root hash.

    Both may be the same file, which reads as zeros where the tree goes. Memory does not grow with the size; holes are
    not read, nor are blocks whose digests are known.
    """
    if size <= 0 or size % BLOCK:
        raise InputError(f"{size} bytes cannot be hashed for dm-verity: it takes blocks of {BLOCK} bytes")
    levels = _levels(size)
    if not levels:
        return hashlib.sha256(salt + os.pread(descriptor, BLOCK, offset)).digest()
    for at, blocks in levels:
        written = target_offset + at
        for digests in _digests(descriptor, offset, size, salt, known):
            write_all(target, digests, written)
            written += len(digests)
        descriptor, offset, size, known = target, target_offset + at, blocks * BLOCK, NONE
    return hashlib.sha256(salt + os.pread(target, BLOCK, target_offset)).digest()


def stored_root(descriptor: int, offset: int, size: int, salt: bytes) -> bytes | None:
    """The root hash of the tree that lies at `offset`, over `size` bytes; None where a level denies the one below it.

    The data is not read: whoever knows the root hash from elsewhere knows then that the digests of the data's blocks
    are those that were written.
    """
    levels = [(offset + at, blocks * BLOCK) for at, blocks in _levels(size)]
    for (below, length), (above, _) in itertools.pairwise(levels):
        digests = b"".join(_digests(descriptor, below, length, salt))
        if os.pread(descriptor, len(digests), above) != digests:
            return None
    return block_digest(salt, os.pread(descriptor, BLOCK, levels[-1][0])) if levels else None


def tree_size(size: int) -> int:
    """Bytes that the tree over `size` bytes takes, itself whole blocks."""
    return sum(blocks for _, blocks in _levels(size)) * BLOCK


def first_level(size: int) -> int | None:
    """Where in the tree over `size` bytes the digests of the data's own blocks begin; None when it has no levels."""
    levels = _levels(size)
    return levels[0][0] if levels else None


def block_digest(salt: bytes, block: bytes) -> bytes:
    """What the tree holds for one block."""
    return hashlib.sha256(salt + block).digest()


def parse_salt(text: str) -> bytes:
    """The bytes of a salt in hex."""
    if not re.fullmatch(r"([0-9A-Fa-f]{2})+", text) or len(text) > 2 * SALT_MAX:
        raise SpecError(f"no salt {quote(text)}", hint=f"1 to {SALT_MAX} bytes as hex digits, two for each")
    return bytes.fromhex(text)


def _levels(size: int) -> list[tuple[int, int]]:
    """Offset in the tree and blocks of every level, the one over the data first; none when one block is all."""
    counts = []
    blocks = size // BLOCK
    while blocks > 1:
        blocks = -(-blocks // _PER_BLOCK)
        counts.append(blocks)
    return [(sum(counts[number + 1 :]) * BLOCK, count) for number, count in enumerate(counts)]


def _digests(descriptor: int, offset: int, size: int, salt: bytes, known: Known = NONE) -> Iterator[bytes]:
    """The digests of all blocks, in whole blocks."""
    hole = block_digest(salt, bytes(BLOCK))
    for start in range(0, size, _BATCH):
        end = min(start + _BATCH, size)
        parts, at = [], start
        for begin, length, there in (*known.within(start, end), (end, 0, 0)):
            if begin > at:
                parts.append(_hashed(descriptor, offset + at, begin - at, salt, hole))
            if length:
                parts.append(_read(known.descriptor, there, length // BLOCK * DIGEST))
            at = begin + length
        digests = b"".join(parts)
        yield digests + bytes(-len(digests) % BLOCK)


def _hashed(descriptor: int, start: int, length: int, salt: bytes, hole: bytes) -> bytes:
    if _is_hole(descriptor, start, length):
        return hole * (length // BLOCK)
    return b"".join(_each(salt, _read(descriptor, start, length)))


def _read(descriptor: int, start: int, length: int) -> bytes:
    data = os.pread(descriptor, length, start)
    if len(data) != length:
        raise InputError(f"a file became shorter while it was hashed: {length - len(data)} bytes are missing")
    return data


def _each(salt: bytes, data: bytes) -> Iterator[bytes]:
    """The digest of every block in whole blocks of data."""
    # To copy one that knows the salt is a fifth quicker than to make one and to put the salt before each block.
    salted = hashlib.sha256(salt)
    view = memoryview(data)
    for at in range(0, len(data), BLOCK):
        block = salted.copy()
        block.update(view[at : at + BLOCK])
        yield block.digest()


def _is_hole(descriptor: int, start: int, length: int) -> bool:
    try:
        return os.lseek(descriptor, start, os.SEEK_DATA) >= start + length
    except OSError as problem:
        return problem.errno == errno.ENXIO  # nothing but a hole until the end; anything else the read will say
