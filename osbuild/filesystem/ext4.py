"""ext4: a whole tree laid out at once; for reading it has no free space, and nothing is left to chance.

    block 0          boot sector, superblock at byte 1024
    1 …              group descriptors, 32 bytes each
    …                all block bitmaps, all inode bitmaps, all inode tables (flex_bg lets them stand together)
    …                directories, long symbolic links, attribute blocks, extent blocks
    …                files; those of 2 MiB and more on 2 MiB boundaries of the namespace, smaller ones in between
    then             an empty journal; for reading the smallest there is: 4 MiB, of which one block is not a hole
    at the end       free space, when it was asked for

Nobody writes to the journal of a filesystem that is only read. It is there because Kata mounts with data=ordered, which
the kernel refuses without one.

Blocks are 4 KiB, inodes 256 bytes, groups 32768 blocks; all metadata has checksums. There are no superblock copies
(sparse_super2 without backups): a damaged image is replaced, not repaired, and every group after the first is free for
file data. There is no room for more group descriptors either: such a filesystem keeps the size that it was made with.

Source: Documentation/filesystems/ext4/ of the kernel (the on-disk format), nothing else.
"""

from __future__ import annotations

import bisect
import hashlib
import stat
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from osbuild.errors import InputError, SpecError
from osbuild.filesystem import ext4_directory, ext4_xattrs
from osbuild.filesystem.base import NO_ROOM, Room
from osbuild.filesystem.ext4_format import (
    BLOCK,
    EXTENTS_FLAG,
    EXTRA_ISIZE,
    FAST_SYMLINK,
    FILE_BLOCKS_MAX,
    FILE_TYPES,
    FIRST_INODE,
    GROUP,
    GROUP_BLOCKS,
    HUGE_FILE_FLAG,
    INDEX_FLAG,
    INODE,
    INODE_CHECKSUMS,
    INODE_HEAD,
    INODE_TAIL,
    JOURNAL_INODE,
    LINKS_MAX,
    ROOT_INODE,
    SECTORS,
    checksum,
    encode_device,
    encode_time,
    extent_blocks,
    extent_tree,
    inode_seed,
    run,
)
from osbuild.filesystem.ext4_super import Identity, Shape, group_blocks, journal_superblock, superblock
from osbuild.tree import Content, Entry, Slice, Sparse, Tree, quote, write_all

HUGE: Final = 2 << 20  # what DAX maps with one page table entry
_STEP: Final = HUGE // BLOCK
_JOURNAL_BLOCKS: Final = 1024  # JBD2_MIN_JOURNAL_BLOCKS
# A journal that is written to: below so many blocks of filesystem, so many blocks; what mke2fs gives.
_JOURNALS: Final = (
    (1 << 15, 1024), (1 << 18, 4096), (1 << 19, 8192), (1 << 22, 16384), (1 << 23, 32768), (1 << 24, 65536),
)  # fmt: skip
_JOURNAL_MAX: Final = 131072
_INODE_RATIO: Final = 16384  # bytes of free space for which there is one inode more


def mount_words(*, dax: bool) -> tuple[str, ...]:
    """Kernel words for a root of this kind (kata-contract 5.1)."""
    return (
        "rootflags=dax,data=ordered,errors=remount-ro" if dax else "rootflags=data=ordered,errors=remount-ro",
        "ro",
        "rootfstype=ext4",
    )


def plan(tree: Tree, *, start: int, epoch: int, dax: bool = True, room: Room = NO_ROOM) -> Plan:
    """Lay a tree out. InputError for what ext4 cannot hold, SpecError when it does not fit into the size asked for.

    start: a multiple of 4096. Large files are aligned with `dax` only.
    """
    return _Layout(tree, start // BLOCK if dax else None, epoch, room).finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A laid out filesystem: metadata in memory, and where each file's bytes go."""

    size: int
    uuid: str
    skipped: tuple[str, ...]  # sockets: nothing listens on them in an image
    metadata: Sequence[tuple[int, bytes]]  # byte offset, bytes
    bodies: Sequence[tuple[int, Content]]  # byte offset, content

    def write(self, descriptor: int, offset: int) -> None:
        """Write everything at `offset` of a file that reads as zeros there."""
        for at, data in self.metadata:
            write_all(descriptor, data, offset + at)
        for at, content in self.bodies:
            content.copy_to(descriptor, offset + at)


@dataclass(slots=True)
class _Inode:
    """What the layout knows of one inode."""

    number: int
    entry: Entry
    path: str
    links: int = 0
    size: int = 0
    runs: list[_Run] = field(default_factory=list)  # of its data: all but the holes
    extents: bytes = b""  # i_block of what has data
    index_blocks: int = 0  # of its extents, when the inode cannot hold them
    indexed: bool = False  # a directory with an index
    xattrs_inside: bytes = b""
    xattr_block: int = 0

    @property
    def blocks(self) -> int:
        return sum(run.blocks for run in self.runs)


@dataclass(slots=True)
class _Run:
    """Blocks that follow each other in a file, and on the disk."""

    logical: int
    blocks: int
    first: int = 0


class _Layout:
    def __init__(self, tree: Tree, start: int | None, epoch: int, room: Room) -> None:
        self._start = start
        self._room = room
        self._identity = _identity(tree, epoch)
        self._inodes: list[_Inode] = []
        self._children: dict[int, list[tuple[bytes, _Inode]]] = {}
        self._parents: dict[int, int] = {ROOT_INODE: ROOT_INODE}
        self._skipped: list[str] = []
        self._xattrs: list[tuple[_Inode, bytes]] = []  # that take a block
        self._targets: list[_Inode] = []  # symbolic links that take a block
        self._metadata: list[tuple[int, bytes]] = []
        self._number(tree)

    def finish(self) -> Plan:
        """Sizes first, then places, then bytes."""
        directories = [inode for inode in self._inodes if inode.entry.is_dir]
        packed = [self._pack_directory(inode) for inode in directories]
        files = [inode for inode in self._inodes if inode.entry.is_file and inode.runs]
        content = sum(inode.blocks for inode in files)
        self._journal = _Inode(
            JOURNAL_INODE, Entry(mode=stat.S_IFREG | 0o600), "", 1, runs=[_Run(0, self._journal_blocks(content))]
        )
        self._journal.size = self._journal.blocks * BLOCK
        shape = self._place(directories, files)
        for inode, data in zip(directories, packed, strict=True):
            self._metadata.append((inode.runs[0].first * BLOCK, data))
        self._write_blobs()
        self._metadata.append((shape.table * BLOCK, self._inode_table()))
        self._metadata.extend(group_blocks(shape, self._identity.seed))
        journal = self._journal
        self._metadata.append((journal.runs[0].first * BLOCK, journal_superblock(self._identity, journal.blocks)))
        self._metadata.append((1024, superblock(shape, self._identity, journal.extents, journal.size)))
        bodies = [body for inode in files for body in _bodies(inode)]
        return Plan(
            size=shape.blocks * BLOCK,
            uuid=str(uuid.UUID(bytes=self._identity.uuid)),
            skipped=tuple(self._skipped),
            metadata=_joined(self._metadata),
            bodies=tuple(sorted(bodies, key=lambda body: body[0])),
        )

    # Numbering

    def _number(self, tree: Tree) -> None:
        """Give every inode its number in the order of first paths, and every directory its entries."""
        known: dict[Entry, _Inode] = {}
        at: dict[str, _Inode] = {}
        following = FIRST_INODE
        for path, entry in tree.items():
            if stat.S_IFMT(entry.mode) not in FILE_TYPES:
                self._skipped.append(path)
                continue
            inode = known.get(entry)
            if inode is None:
                number = ROOT_INODE if path == "/" else following
                following += number != ROOT_INODE
                inode = known[entry] = self._new_inode(number, path, entry)
            if entry.is_dir:
                if inode.links:
                    raise InputError(f"{quote(path)}: a directory with two names")
                inode.links = 2
                at[path] = inode
                self._children[inode.number] = []
            else:
                inode.links += 1
                if inode.links > LINKS_MAX:
                    raise InputError(f"{quote(path)}: more than {LINKS_MAX} hard links to one file")
            if path != "/":
                above, _, name = path.rpartition("/")
                parent = at[above or "/"]
                self._children[parent.number].append((name.encode(errors="surrogateescape"), inode))
                if entry.is_dir:
                    parent.links += 1
                    self._parents[inode.number] = parent.number
        self._last = following - 1

    def _new_inode(self, number: int, path: str, entry: Entry) -> _Inode:
        inode = _Inode(number, entry, path)
        self._inodes.append(inode)
        if entry.xattrs:
            inode.xattrs_inside, outside = ext4_xattrs.pack(entry.xattrs, path)
            if outside:
                self._xattrs.append((inode, outside))
        if entry.is_symlink:
            inode.size = len(entry.target.encode(errors="surrogateescape"))
            if inode.size >= FAST_SYMLINK:
                inode.runs = [_Run(0, 1)]
                self._targets.append(inode)
        elif entry.is_file:
            inode.size = entry.content.size
            if -(-inode.size // BLOCK) > FILE_BLOCKS_MAX:
                raise InputError(f"{quote(path)}: {inode.size} bytes are more than an ext4 file can have")
            inode.runs = _runs(entry.content)
        return inode

    def _pack_directory(self, inode: _Inode) -> bytes:
        children = [
            (name, child.number, FILE_TYPES[stat.S_IFMT(child.entry.mode)])
            for name, child in self._children[inode.number]
        ]
        seed = inode_seed(self._identity.seed, inode.number)
        hash_seed = struct.unpack("<4I", self._identity.hash_seed)
        parent = self._parents[inode.number]
        data, inode.indexed = ext4_directory.pack(inode.path, inode.number, parent, children, seed, hash_seed)
        inode.size = len(data)
        inode.runs = [_Run(0, len(data) // BLOCK)]
        return data

    # Placing

    def _journal_blocks(self, content: int) -> int:
        if not self._room.writable:
            return _JOURNAL_BLOCKS
        total = self._room.size // BLOCK or content + self._room.free // BLOCK
        return next((blocks for most, blocks in _JOURNALS if total < most), _JOURNAL_MAX)

    def _place(self, directories: Sequence[_Inode], files: Sequence[_Inode]) -> Shape:
        """Find a place for everything; the number of groups and what fits into them depend on each other."""
        room = self._room
        with_extents = [inode for inode in (*directories, *self._targets, *files, self._journal) if inode.runs]
        for inode in with_extents:
            inode.index_blocks = extent_blocks(sum(-(-run.blocks // GROUP_BLOCKS) for run in inode.runs))
        blobs = len(self._xattrs) + len(self._targets) + sum(inode.index_blocks for inode in with_extents)
        inodes = self._last + (16 if room.writable else 0) + max(room.size, room.free) // _INODE_RATIO
        given = room.size // BLOCK
        # An inode bitmap is one block, too: a group has at most as many inodes as that has bits.
        groups, wanted = 0, max(1, -(-inodes // GROUP_BLOCKS), -(-given // GROUP_BLOCKS))
        while wanted > groups:
            groups = wanted
            per_group = -(-inodes // groups // (BLOCK // INODE)) * (BLOCK // INODE)
            block_bitmaps = 1 + -(-groups * GROUP.size // BLOCK)
            table = block_bitmaps + 2 * groups
            cursor = table + groups * per_group * INODE // BLOCK
            for inode in directories:
                inode.runs[0].first = cursor
                cursor += inode.runs[0].blocks
            self._first_blob = cursor
            journal, gaps = _place_files(files, cursor + blobs, self._start)
            self._journal.runs[0].first = journal
            end = journal + self._journal.blocks
            needed = end + max(0, -(-room.free // BLOCK) - sum(count for _, count in gaps))
            wanted = -(-needed // GROUP_BLOCKS)
        if given and needed > given:
            raise SpecError(f"ext4 needs {needed * BLOCK} bytes for this tree; {given * BLOCK} are given")
        # Groups that are there for their inodes only still have to be there: free blocks, and a hole in the image.
        total = given or max(needed, (groups - 1) * GROUP_BLOCKS + 8)
        if total >= 1 << 32:
            raise InputError(f"the tree needs {total} blocks of {BLOCK} bytes; this ext4 writer stops at 2^32")
        if total > end:
            gaps.append((end, total - end))
        self._with_extents = with_extents
        return Shape(
            groups=groups, per_group=per_group, last=self._last, blocks=total, gaps=gaps,
            directories=tuple(self._children), descriptors=1, block_bitmaps=block_bitmaps,
            inode_bitmaps=block_bitmaps + groups, table=table,
        )  # fmt: skip

    # Bytes

    def _write_blobs(self) -> None:
        """The single blocks that belong to inodes besides their data, and every inode's extents."""
        at = self._first_blob
        for inode, block in self._xattrs:
            inode.xattr_block = at
            self._metadata.append((at * BLOCK, ext4_xattrs.with_checksum(block, at, self._identity.seed)))
            at += 1
        for inode in self._targets:
            inode.runs[0].first = at
            target = inode.entry.target.encode(errors="surrogateescape")
            self._metadata.append((at * BLOCK, target.ljust(BLOCK, b"\0")))
            at += 1
        for inode in self._with_extents:
            extents = [
                (piece.logical + logical, count, first)
                for piece in inode.runs
                for logical, count, first in run(piece.first, piece.blocks)
            ]
            seed = inode_seed(self._identity.seed, inode.number)
            inode.extents, blocks = extent_tree(extents, range(at, at + inode.index_blocks), seed)
            for block in blocks:
                self._metadata.append((at * BLOCK, block))
                at += 1

    def _inode_table(self) -> bytes:
        """The inodes that are used; the rest of the table is a hole."""
        table = bytearray(self._last * INODE)
        for inode in (*self._inodes, self._journal):
            at = (inode.number - 1) * INODE
            table[at : at + INODE] = self._inode_bytes(inode)
        return bytes(table)

    def _inode_bytes(self, inode: _Inode) -> bytes:
        entry = inode.entry
        seconds, extra = encode_time(self._identity.epoch * 1_000_000_000 if entry.mtime_ns is None else entry.mtime_ns)
        sectors = (inode.blocks + inode.index_blocks + (inode.xattr_block != 0)) * SECTORS
        flags = EXTENTS_FLAG if entry.is_dir or entry.is_file or inode.runs else 0
        flags |= INDEX_FLAG if inode.indexed else 0
        if sectors >= 1 << 32:  # counted in blocks, then
            flags |= HUGE_FILE_FLAG
            sectors //= SECTORS
        data = bytearray(INODE)
        INODE_HEAD.pack_into(
            data, 0, entry.mode, entry.uid & 0xFFFF, inode.size & 0xFFFFFFFF, seconds, seconds, seconds, 0,
            entry.gid & 0xFFFF, inode.links if inode.links <= LINKS_MAX else 1,  # dir_nlink: too many to count
            sectors & 0xFFFFFFFF, flags, 0,
        )  # fmt: skip
        where = _block_field(inode)
        data[40 : 40 + len(where)] = where
        INODE_TAIL.pack_into(
            data, 100, 0, inode.xattr_block & 0xFFFFFFFF, inode.size >> 32, 0,
            sectors >> 32, 0, entry.uid >> 16, entry.gid >> 16, 0, 0,
            EXTRA_ISIZE, 0, extra, extra, extra, seconds, extra, 0, 0,
        )  # fmt: skip
        inside = 128 + EXTRA_ISIZE
        data[inside : inside + len(inode.xattrs_inside)] = inode.xattrs_inside
        total = checksum(inode_seed(self._identity.seed, inode.number), bytes(data))
        for place, half in zip(INODE_CHECKSUMS, (total & 0xFFFF, total >> 16), strict=True):
            struct.pack_into("<H", data, place, half)
        return bytes(data)


def _identity(tree: Tree, epoch: int) -> Identity:
    digest = hashlib.sha256(b"ext4" + bytes.fromhex(tree.digest())).digest()
    own = uuid.UUID(bytes=digest[:16], version=5).bytes
    return Identity(uuid=own, hash_seed=digest[16:], seed=checksum(0xFFFFFFFF, own), epoch=epoch)


def _runs(content: Content) -> list[_Run]:
    """The blocks that have data."""
    if not isinstance(content, Sparse):
        blocks = -(-content.size // BLOCK)
        return [_Run(0, blocks)] if blocks else []
    runs: list[_Run] = []
    for offset, _, size in content.pieces:
        first, end = offset // BLOCK, -(-(offset + size) // BLOCK)
        if runs and first <= runs[-1].logical + runs[-1].blocks:
            runs[-1].blocks = max(runs[-1].blocks, end - runs[-1].logical)
        else:
            runs.append(_Run(first, end - first))
    return runs


def _bodies(inode: _Inode) -> list[tuple[int, Content]]:
    """Where the bytes of a file go, the holes left out."""
    content = inode.entry.content
    if not isinstance(content, Sparse):
        return [(inode.runs[0].first * BLOCK, content)]
    starts = [run.logical * BLOCK for run in inode.runs]
    found: list[tuple[int, Content]] = []
    for offset, source, size in content.pieces:
        index = bisect.bisect_right(starts, offset) - 1
        at = inode.runs[index].first * BLOCK + offset - starts[index]
        found.append((at, Slice(content.spool, source, size)))
    return found


def _place_files(files: Sequence[_Inode], cursor: int, start: int | None) -> tuple[int, list[tuple[int, int]]]:
    """Large runs on huge-page boundaries; the gaps that leaves are filled with the largest runs that fit.

    Returns the first block after them, and the gaps that stay. Without `start` nothing is aligned.
    """
    gaps = []
    runs = [(run, inode.number) for inode in files for run in inode.runs]
    large = [run for run, _ in runs if start is not None and run.blocks >= _STEP]
    small = [(run.blocks, -number, -run.logical, run) for run, number in runs if start is None or run.blocks < _STEP]
    waiting = sorted(small, key=lambda item: item[:3])
    sizes = [item[0] for item in waiting]
    for run_ in large:
        # A page of 2 MiB is 2 MiB of the file that start on such a boundary of the file and of the namespace.
        aligned = cursor + (run_.logical - (start or 0) - cursor) % _STEP
        while cursor < aligned:
            index = bisect.bisect_right(sizes, aligned - cursor) - 1
            if index < 0:
                gaps.append((cursor, aligned - cursor))
                break
            del sizes[index]
            filler = waiting.pop(index)[3]
            filler.first = cursor
            cursor += filler.blocks
        run_.first = aligned
        cursor = aligned + run_.blocks
    for item in sorted(waiting, key=lambda item: (-item[1], -item[2])):
        item[3].first = cursor
        cursor += item[0]
    return cursor, gaps


def _block_field(inode: _Inode) -> bytes:
    """i_block: extents, a short symbolic link, or a device number."""
    entry = inode.entry
    if inode.extents:
        return inode.extents
    if entry.is_symlink:
        return entry.target.encode(errors="surrogateescape")
    if entry.is_device:
        return encode_device(entry)
    return extent_tree((), (), 0)[0] if entry.is_file else b""


def _joined(metadata: Sequence[tuple[int, bytes]]) -> tuple[tuple[int, bytes], ...]:
    """The same bytes in fewer pieces: what touches becomes one."""
    pieces: list[tuple[int, list[bytes]]] = []
    end = -1
    for at, data in sorted(metadata, key=lambda piece: piece[0]):
        if at == end:
            pieces[-1][1].append(data)
        else:
            pieces.append((at, [data]))
        end = at + len(data)
    return tuple((at, b"".join(parts)) for at, parts in pieces)
