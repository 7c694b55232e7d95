"""Where an ext4's blocks go, and how large it becomes: metadata in front, files behind it, a journal, free space.

What stands in front depends on how many groups there are, and that on everything: groups are counted from below until
they suffice. Large files start on huge-page boundaries, and small ones fill what lies between.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final

from osbuild.errors import InputError, SpecError
from osbuild.filesystem.base import Room
from osbuild.filesystem.ext4_format import BLOCK, GROUP, GROUP_BLOCKS, INODE

HUGE: Final = 2 << 20  # what DAX maps with one page table entry
_STEP: Final = HUGE // BLOCK
_BLOCKS_MAX: Final = (1 << 32) - 1  # block numbers have 32 bits
_LAST_GROUP: Final = 1  # block that it has at least: with flex_bg it holds no metadata
_INODE_RATIO: Final = 16384  # bytes of free space for which there is one inode more
_INODES_TO_SPARE: Final = 16  # at least, where somebody writes
_JOURNAL_BLOCKS: Final = 1024  # JBD2_MIN_JOURNAL_BLOCKS
# A journal that is written to: below so many blocks of filesystem, so many blocks; what mke2fs gives.
_JOURNALS: Final = (
    (1 << 15, 1024), (1 << 18, 4096), (1 << 19, 8192), (1 << 22, 16384), (1 << 23, 32768), (1 << 24, 65536),
)  # fmt: skip
_JOURNAL_MAX: Final = 131072


@dataclass(slots=True)
class Run:
    """Blocks that follow each other in a file, and on the disk."""

    logical: int
    blocks: int
    first: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What wants a place."""

    inodes: int  # in use
    directories: Sequence[Run]
    blobs: int  # single blocks that belong to inodes
    files: Sequence[Run]  # in the order in which they should lie
    start: int | None  # block of the namespace at which the filesystem starts; None: nothing is aligned

    @property
    def blocks(self) -> int:
        return sum(run.blocks for run in self.directories) + self.blobs + sum(run.blocks for run in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where everything is that is no file and no directory: those have it in their runs."""

    groups: int
    per_group: int  # inodes
    descriptors: int
    block_bitmaps: int
    inode_bitmaps: int
    table: int
    blobs: int
    journal: Run
    blocks: int  # of the whole
    gaps: Sequence[tuple[int, int]]  # free blocks: first, how many; in order


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extra:
    """What a filesystem has beside its contents."""

    inodes: int
    journal: int


def place(demand: Demand, room: Room) -> Places:
    """Give every run its place. SpecError, with the size that would suffice, for one that does not."""
    ample, least = _ample(demand, room), _Extra(inodes=_INODES_TO_SPARE * room.writable, journal=_JOURNAL_BLOCKS)
    found = _place(demand, room, ample)
    given = room.size // BLOCK
    if given and found.blocks > given:
        # A filesystem as full as this has little use for what is spared; and whoever gives what it needs is served.
        found = _place(demand, room, least)
    if given and found.blocks > given:
        raise SpecError(f"ext4 needs {found.blocks * BLOCK} bytes for this tree; {given * BLOCK} are given")
    if found.blocks > _BLOCKS_MAX:
        raise InputError(f"the tree needs {found.blocks} blocks of {BLOCK} bytes; this ext4 writer stops at 2^32")
    return found


def _ample(demand: Demand, room: Room) -> _Extra:
    inodes = _INODES_TO_SPARE * room.writable + max(room.size, room.free) // _INODE_RATIO
    if room.size:  # no more than its groups can have
        inodes = min(inodes, max(0, _groups(room.size // BLOCK) * GROUP_BLOCKS - demand.inodes))
    journal = _JOURNAL_BLOCKS
    if room.writable:
        total = room.size // BLOCK or demand.blocks + room.free // BLOCK
        journal = next((blocks for most, blocks in _JOURNALS if total < most), _JOURNAL_MAX)
    return _Extra(inodes=inodes, journal=journal)


def _groups(blocks: int) -> int:
    return -(-blocks // GROUP_BLOCKS)


def _place(demand: Demand, room: Room, extra: _Extra) -> Places:
    """Places in a filesystem that is as large as was asked for, or larger when that cannot be."""
    inodes = demand.inodes + extra.inodes
    given, free = room.size // BLOCK, -(-room.free // BLOCK)
    total = max(given, demand.blocks + extra.journal + free + inodes * INODE // BLOCK)
    # An inode bitmap is one block, too: a group has at most as many inodes as that has bits.
    groups, wanted = 0, max(1, _groups(inodes), _groups(total))
    while wanted > groups:
        groups = wanted
        per_group = -(-inodes // groups // (BLOCK // INODE)) * (BLOCK // INODE)
        block_bitmaps = 1 + -(-groups * GROUP.size // BLOCK)
        table = block_bitmaps + 2 * groups
        cursor = table + groups * per_group * INODE // BLOCK
        for run in demand.directories:
            run.first = cursor
            cursor += run.blocks
        blobs = cursor
        journal, gaps = _place_files(demand.files, blobs + demand.blobs, demand.start)
        end = journal + extra.journal
        total = max(given, end + max(0, free - sum(count for _, count in gaps)))
        # Groups that are there for their inodes only still have to be there: free blocks, and a hole in the image.
        total = max(total, (groups - 1) * GROUP_BLOCKS + _LAST_GROUP)
        wanted = _groups(total)
    if total > end:
        gaps.append((end, total - end))
    return Places(
        groups=groups, per_group=per_group, descriptors=1, block_bitmaps=block_bitmaps,
        inode_bitmaps=block_bitmaps + groups, table=table, blobs=blobs, journal=Run(0, extra.journal, journal),
        blocks=total, gaps=gaps,
    )  # fmt: skip


def _place_files(runs: Sequence[Run], cursor: int, start: int | None) -> tuple[int, list[tuple[int, int]]]:
    """Large runs on huge-page boundaries; the gaps that leaves are filled with the largest runs that fit.

    Returns the first block after them, and the gaps that stay. Without `start` nothing is aligned.
    """
    gaps: list[tuple[int, int]] = []
    large = [run for run in runs if run.blocks >= _STEP] if start is not None else []
    small = [run for run in runs if run.blocks < _STEP] if large else runs
    for run in small:
        run.first = 0
    # Of one size, the last stands first, and the first is taken first: from the end.
    waiting = sorted(small, key=attrgetter("blocks"), reverse=True)[::-1] if large else []
    sizes = [run.blocks for run in waiting]
    for run in large:
        # A page of 2 MiB is 2 MiB of the file that start on such a boundary of the file and of the namespace.
        aligned = cursor + (run.logical - (start or 0) - cursor) % _STEP
        while cursor < aligned:
            index = bisect.bisect_right(sizes, aligned - cursor) - 1
            if index < 0:
                gaps.append((cursor, aligned - cursor))
                break
            del sizes[index]
            filler = waiting.pop(index)
            filler.first = cursor
            cursor += filler.blocks
        run.first = aligned
        cursor = aligned + run.blocks
    for run in small:
        if not run.first:
            run.first = cursor
            cursor += run.blocks
    return cursor, gaps
