"""A large file in parts: where it is cut, and each part as a zstd frame.

A swap of the agent moves the small files behind it by whole blocks, if it moves anything. So the content says where a
part ends, but only at the ends of blocks: after one whose CRC-32 is a multiple of so many blocks as a part should have.
What came before does not matter to it, and the parts behind a change are the ones they were. (Looking at every byte, as
is usual, would find no more, and takes Python minutes.) Zeros are parts of their own, of any length, and next to
nothing when packed.

The blocks of a file that zstd made, an initramfs, are zstd's, which lie anywhere and have any size: the larger one is,
the likelier a part ends after it.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from osbuild import publication, zstd, zstd_blocks
from osbuild.content import HOLE
from osbuild.errors import InputError
from osbuild.output import next_data
from osbuild.publication import Piece
from osbuild.tree import Backing, quote

HOLE_MAX: Final = 256 << 20  # readers refuse too much out of too little
PARTS_MAX: Final = 4600  # of a file; two files of so many are a manifest of less than the 4 MiB that registries take
_BLOCK: Final = 4096
_ZEROS: Final = bytes(HOLE)
_SHORTEST: Final = 4  # a part has no less than its size divided by this, but for the last before a hole
_LONGEST: Final = 4  # … and no more than this many times its size
_LEVEL: Final = 3


@dataclass(frozen=True, slots=True)
class Cut:
    """Some bytes of the file."""

    offset: int
    size: int
    hole: bool  # all of them zeros


def cuts(file: Backing, name: str) -> tuple[Cut, ...]:
    """The whole file, in order, in as many parts as a manifest has room for: coarser where it has more stretches.

    By the file alone: a pull cuts what it has, and finds the same parts.
    """
    coarse = 1
    while coarse * HOLE <= 2 * HOLE_MAX:
        found = tuple(itertools.islice(_cuts(file, coarse), PARTS_MAX + 1))
        if len(found) <= PARTS_MAX:
            return found
        coarse *= 2
    raise InputError(
        f"{quote(name)} has {file.size} bytes in more than {PARTS_MAX} stretches: no registry's manifest holds them"
    )


def _cuts(file: Backing, coarse: int) -> Iterator[Cut]:
    """The same with parts `coarse` times as long, and zeros among them where they are `coarse` times as few."""
    began = 0
    for cut in _zstd_cuts(file, coarse):
        yield cut
        began = cut.offset + cut.size
    for stretch in _joined(_stretches(file, began), coarse * HOLE):
        yield from (stretch,) if stretch.hole else _block_cuts(file, stretch, coarse)


def _lengths(file: Backing, coarse: int) -> tuple[int, int, int]:
    """How long a part is about, at least, and at most."""
    part = publication.part_size(file.size) * coarse
    return part, part // _SHORTEST, min(part * _LONGEST, HOLE_MAX)


def _zstd_cuts(file: Backing, coarse: int) -> Iterator[Cut]:
    """What lies in zstd's blocks at the file's beginning: all of it or nothing, but in a damaged file."""
    part, shortest, longest = _lengths(file, coarse)
    began = last = 0
    for end in zstd_blocks.block_ends(file):
        long = end - began
        if long >= longest or (long >= shortest and _chosen(file.read(last, end - last), part)):
            yield Cut(began, long, hole=False)
            began = end
        last = end
    if began < last:
        yield Cut(began, last - began, hole=False)


def _chosen(block: bytes, part: int) -> bool:
    """Whether a part ends here: for one byte in `part`, as it were."""
    return zlib.crc32(block) * part < len(block) << 32


def _stretches(file: Backing, began: int) -> Iterator[Cut]:
    """Zeros and data by turns; zeros are found by what they are, whether or not the file has holes there."""
    hole = False
    for at in range(began, file.size, HOLE):
        size = min(HOLE, file.size - at)
        empty = next_data(file.descriptor, at, at + size) >= at + size or file.read(at, size) == _ZEROS[:size]
        if at > began and (empty != hole or (hole and at - began >= HOLE_MAX)):
            yield Cut(began, at - began, hole)
            began = at
        hole = empty
    if began < file.size:
        yield Cut(began, file.size - began, hole)


def _joined(stretches: Iterator[Cut], least: int) -> Iterator[Cut]:
    """Zeros of fewer than `least` bytes are data like what lies around them."""
    began = end = 0
    for stretch in stretches:
        if stretch.hole and stretch.size >= least:
            if began < end:
                yield Cut(began, end - began, hole=False)
            yield stretch
            began = end = stretch.offset + stretch.size
        else:
            began = stretch.offset if began == end else began
            end = stretch.offset + stretch.size
    if began < end:
        yield Cut(began, end - began, hole=False)


def _block_cuts(file: Backing, stretch: Cut, coarse: int) -> Iterator[Cut]:
    """Data, cut."""
    part, shortest, longest = _lengths(file, coarse)
    every = part // _BLOCK
    began, end = stretch.offset, stretch.offset + stretch.size
    for at in range(began, end, HOLE):
        data = file.read(at, min(HOLE, end - at))
        for start in range(0, len(data), _BLOCK):
            here = min(at + start + _BLOCK, end)
            long = here - began
            if long >= longest or (long >= shortest and zlib.crc32(data[start : start + _BLOCK]) % every == 0):
                yield Cut(began, long, hole=False)
                began = here
    if began < end:
        yield Cut(began, end - began, hole=False)


def pack(file: Backing, cut: Cut, name: str, number: int) -> tuple[Piece, bytes]:
    """A part and its frame."""
    data = bytes(cut.size) if cut.hole else file.read(cut.offset, cut.size)
    packed = zstd.frame(data, _LEVEL)
    sha256, digest = hashlib.sha256(data).hexdigest(), hashlib.sha256(packed).hexdigest()
    return publication.part(name, number, cut.offset, cut.size, sha256, f"sha256:{digest}", len(packed)), packed


def known(file: Backing, name: str) -> dict[str, Cut]:
    """The parts of a file that is here already, by sha256; not the zeros, which cost nothing."""
    found = {}
    for cut in cuts(file, name):
        if not cut.hole:
            found[hashlib.sha256(file.read(cut.offset, cut.size)).hexdigest()] = cut
    return found
