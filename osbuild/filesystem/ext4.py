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
file data. No blocks are kept for more group descriptors: resize2fs shrinks and grows a writable one while it is not
mounted, by moving what is in the way.

Source: Documentation/filesystems/ext4/ of the kernel (the on-disk format), nothing else.
"""

from __future__ import annotations

import bisect
import hashlib
import heapq
import stat
import struct
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from stat import S_IFMT, S_ISDIR, S_ISLNK, S_ISREG
from typing import Final

from osbuild.errors import InputError
from osbuild.filesystem import ext4_directory, ext4_xattrs
from osbuild.filesystem.base import NO_ROOM, NOTHING, Room, encode_name, encode_target
from osbuild.filesystem.ext4_format import (
    BLOCK,
    EXTENT_BLOCKS,
    EXTENTS_FLAG,
    EXTRA_ISIZE,
    FAST_SYMLINK,
    FILE_BLOCKS_MAX,
    FILE_TYPES,
    FIRST_INODE,
    HUGE_FILE_FLAG,
    INDEX_FLAG,
    INLINE_EXTENTS,
    INODE,
    INODE_CHECKSUMS,
    INODE_WHOLE,
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
from osbuild.filesystem.ext4_placing import Demand, Places, Run, place
from osbuild.filesystem.ext4_super import Identity, group_blocks, journal_superblock, superblock
from osbuild.filesystem.pieces import write_pieces
from osbuild.garbage import uncollected
from osbuild.tree import Content, Entry, Slice, Sparse, Tree, quote, without_sockets

_DIRECTORY: Final = FILE_TYPES[stat.S_IFDIR]


def mount_words(*, dax: bool) -> tuple[str, ...]:
    """Kernel words for a root of this kind (kata-contract 5.1)."""
    return (
        "rootflags=dax,data=ordered,errors=remount-ro" if dax else "rootflags=data=ordered,errors=remount-ro",
        "ro",
        "rootfstype=ext4",
    )


def plan(tree: Tree, *, start: int, epoch: int, dax: bool = True, room: Room = NO_ROOM, digest: str = "") -> Plan:
    """Lay a tree out. InputError for what ext4 cannot hold, SpecError when it does not fit into the size asked for.

    start: a multiple of 4096. Large files are aligned with `dax` only.
    """
    with uncollected():
        layout = _Layout(tree, start // BLOCK if dax else None, room)
        return layout.finish(_identity(digest or without_sockets(tree).digest(), epoch))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A laid out filesystem: where each file's bytes go, and what the metadata are made from."""

    size: int
    uuid: str
    skipped: tuple[str, ...]  # sockets: nothing listens on them in an image
    make_metadata: Callable[[], Sequence[tuple[int, bytes | bytearray]]]  # not every plan is written
    bodies: Sequence[tuple[int, Content]]  # byte offset, content; in order
    again: Callable[[str], Plan]

    def with_digest(self, digest: str) -> Plan:
        """The plan of the same tree with another digest; this one cannot be written any more."""
        with uncollected():
            return self.again(digest)

    @property
    def contents(self) -> Sequence[tuple[int, Content]]:
        """Every file's bytes: none of their blocks holds anything else."""
        return self.bodies

    @property
    def metadata(self) -> Sequence[tuple[int, bytes | bytearray]]:
        """Byte offset and bytes of everything else; in order."""
        with uncollected():
            return self.make_metadata()

    def write(
        self,
        descriptor: int,
        offset: int,
        done: Callable[[int], None] | None = None,
        there: Mapping[int, Content] = NOTHING,
    ) -> None:
        """Write everything at `offset` of a file that reads as zeros there."""
        pieces = heapq.merge(self.metadata, self.bodies, key=itemgetter(0))
        write_pieces(descriptor, offset, pieces, done, there)


@dataclass(slots=True)
class _Inode:
    """What the layout knows of one inode."""

    number: int
    entry: Entry
    path: str
    links: int = 0
    size: int = 0
    runs: Sequence[Run] = ()  # of its data: all but the holes
    extents: bytes = b""  # i_block, where blocks of extents belong to it
    index_blocks: int = 0  # how many those are
    indexed: bool = False  # a directory with an index
    xattrs_inside: bytes = b""
    xattr_block: int = 0

    @property
    def blocks(self) -> int:
        return sum(run.blocks for run in self.runs)


class _Layout:
    def __init__(self, tree: Tree, start: int | None, room: Room) -> None:
        self._start = start
        self._room = room
        self._inodes: list[_Inode] = []
        self._children: dict[int, list[ext4_directory.Child]] = {}
        self._parents: dict[int, int] = {ROOT_INODE: ROOT_INODE}
        self._skipped: list[str] = []
        self._xattrs: list[tuple[_Inode, bytes]] = []  # that take a block
        self._targets: list[_Inode] = []  # symbolic links that take a block
        self._used = 0  # inodes
        self._identity: Identity
        self._places: Places | None = None
        self._sizes: list[int] = []  # blocks of each directory, with which those places were found
        self._files: list[tuple[int, Content]] = []
        self._number(tree)

    def finish(self, identity: Identity) -> Plan:
        """Sizes first, then places; bytes when they are written."""
        self._identity = identity
        directories = [inode for inode in self._inodes if S_ISDIR(inode.entry.mode)]
        packed = {inode.number: self._pack_directory(inode) for inode in directories if self._measure(inode) > 1}
        files = [inode for inode in self._inodes if S_ISREG(inode.entry.mode) and inode.runs]
        indexed = [inode for inode in (*directories, *files) if _index(inode)]
        sizes = [inode.runs[0].blocks for inode in directories]
        if self._places is None or sizes != self._sizes:  # else everything lies where it did
            self._sizes = sizes
            self._places = place(
                Demand(
                    inodes=self._used,
                    directories=[inode.runs[0] for inode in directories],
                    blobs=len(self._xattrs) + len(self._targets) + sum(inode.index_blocks for inode in indexed),
                    files=[run for inode in files for run in inode.runs],
                    start=self._start,
                ),
                self._room,
            )
            self._files = sorted((body for inode in files for body in _bodies(inode)), key=itemgetter(0))
        places = self._places
        return Plan(
            size=places.blocks * BLOCK,
            uuid=str(uuid.UUID(bytes=identity.uuid)),
            skipped=tuple(self._skipped),
            make_metadata=lambda: self._written(identity, directories, packed, indexed),
            bodies=self._files,
            again=lambda digest: self.finish(_identity(digest, identity.epoch)),
        )

    def _written(
        self, identity: Identity, directories: Sequence[_Inode], packed: Mapping[int, bytes], indexed: Sequence[_Inode]
    ) -> list[tuple[int, bytes | bytearray]]:
        assert identity is self._identity  # a plan that another one was made from is void
        assert self._places is not None
        whole = [(inode, packed.get(inode.number) or self._pack_directory(inode)) for inode in directories]
        return self._metadata(self._places, whole, indexed)

    # Numbering

    def _number(self, tree: Tree) -> None:
        """Give every inode its number in the order of first paths, and every directory its entries."""
        known: dict[Entry, _Inode] = {}
        at: dict[str, tuple[_Inode, list[ext4_directory.Child]]] = {}
        following = FIRST_INODE
        for path, entry in tree.items():
            kind = FILE_TYPES.get(S_IFMT(entry.mode))
            if kind is None:
                self._skipped.append(path)
                continue
            inode = known.get(entry)
            if inode is None:
                number = ROOT_INODE if path == "/" else following
                following += number != ROOT_INODE
                inode = known[entry] = self._new_inode(number, path, entry)
            _count_link(inode, path, kind)
            if kind == _DIRECTORY:
                children: list[ext4_directory.Child] = []
                at[path] = inode, children
                self._children[inode.number] = children
            if path != "/":
                above, _, name = path.rpartition("/")
                parent, names = at[above or "/"]
                names.append((encode_name(name, path), inode.number, kind))
                if kind == _DIRECTORY:
                    parent.links += 1
                    self._parents[inode.number] = parent.number
        self._used = following - 1

    def _new_inode(self, number: int, path: str, entry: Entry) -> _Inode:
        inode = _Inode(number, entry, path)
        self._inodes.append(inode)
        if entry.xattrs:
            inode.xattrs_inside, outside = ext4_xattrs.pack(entry.xattrs, path)
            if outside:
                self._xattrs.append((inode, outside))
        if S_ISLNK(entry.mode):
            inode.size = len(encode_target(entry, path))
            if inode.size >= FAST_SYMLINK:
                inode.runs = (Run(0, 1),)
                self._targets.append(inode)
        elif S_ISREG(entry.mode):
            inode.size = entry.content.size
            if -(-inode.size // BLOCK) > FILE_BLOCKS_MAX:
                raise InputError(f"{quote(path)}: {inode.size} bytes are more than an ext4 file can have")
            inode.runs = _runs(entry.content)
        return inode

    def _measure(self, inode: _Inode) -> int:
        """Its blocks: 1, or more than that, and how many its names' hashes say."""
        if not ext4_directory.is_small(self._children[inode.number]):
            return 2
        first = inode.runs[0] if inode.runs else Run(0, 1)
        inode.size, inode.runs = BLOCK, (first,)
        return 1

    def _pack_directory(self, inode: _Inode) -> bytes:
        children = self._children[inode.number]
        seed = inode_seed(self._identity.seed, inode.number)
        hash_seed = struct.unpack("<4I", self._identity.hash_seed)
        parent = self._parents[inode.number]
        data, inode.indexed = ext4_directory.pack(inode.path, inode.number, parent, children, seed, hash_seed)
        inode.size = len(data)
        if not inode.runs:
            inode.runs = (Run(0, 0),)
        inode.runs[0].blocks = len(data) // BLOCK
        return data

    # Bytes

    def _metadata(
        self, places: Places, directories: Sequence[tuple[_Inode, bytes]], indexed: Sequence[_Inode]
    ) -> list[tuple[int, bytes | bytearray]]:
        """Byte offset and bytes of all that is no file; in order."""
        found: list[tuple[int, bytes | bytearray]] = [
            (inode.runs[0].first * BLOCK, data) for inode, data in directories
        ]
        found += self._blobs(places.blobs, indexed)
        journal = _journal(places.journal)
        found.append((places.table * BLOCK, self._inode_table(journal)))
        found.extend(group_blocks(places, self._used, self._children, self._identity.seed))
        found.append((journal.runs[0].first * BLOCK, journal_superblock(self._identity, journal.blocks)))
        found.append((1024, superblock(places, self._used, self._identity, _block_field(journal))))
        return sorted(found, key=itemgetter(0))

    def _blobs(self, at: int, indexed: Sequence[_Inode]) -> Iterator[tuple[int, bytes]]:
        """The single blocks that belong to inodes besides their data, from block `at` on."""
        for inode, block in self._xattrs:
            inode.xattr_block = at
            yield at * BLOCK, ext4_xattrs.with_checksum(block, at, self._identity.seed)
            at += 1
        for inode in self._targets:
            inode.runs[0].first = at
            yield at * BLOCK, encode_target(inode.entry, inode.path).ljust(BLOCK, b"\0")
            at += 1
        for inode in indexed:
            seed = inode_seed(self._identity.seed, inode.number)
            inode.extents, blocks = extent_tree(_extents(inode), range(at, at + inode.index_blocks), seed)
            for block in blocks:
                yield at * BLOCK, block
                at += 1

    def _inode_table(self, journal: _Inode) -> bytearray:
        """The inodes that are used; the rest of the table is a hole."""
        table = bytearray(self._used * INODE)
        for inode in (*self._inodes, journal):
            at = (inode.number - 1) * INODE
            data = _inode_bytes(inode, self._identity.epoch)
            table[at : at + INODE] = data
            total = checksum(inode_seed(self._identity.seed, inode.number), data)
            low, high = INODE_CHECKSUMS
            table[at + low : at + low + 2] = (total & 0xFFFF).to_bytes(2, "little")
            table[at + high : at + high + 2] = (total >> 16).to_bytes(2, "little")
        return table


def _count_link(inode: _Inode, path: str, kind: int) -> None:
    if kind != _DIRECTORY:
        inode.links += 1
        if inode.links > LINKS_MAX:
            raise InputError(f"{quote(path)}: more than {LINKS_MAX} hard links to one file")
        return
    if inode.links:
        raise InputError(f"{quote(path)}: a directory with two names")
    inode.links = 2


def _index(inode: _Inode) -> int:
    """How many blocks its extents need: none, for nearly all."""
    if len(inode.runs) > 1 or inode.runs[0].blocks > INLINE_EXTENTS * EXTENT_BLOCKS:
        inode.index_blocks = extent_blocks(sum(-(-run.blocks // EXTENT_BLOCKS) for run in inode.runs))
    return inode.index_blocks


def _journal(run: Run) -> _Inode:
    entry = Entry(mode=stat.S_IFREG | 0o600)
    return _Inode(JOURNAL_INODE, entry, "", 1, run.blocks * BLOCK, (run,))


def _inode_bytes(inode: _Inode, epoch: int) -> bytes:
    """An inode without its checksum."""
    entry = inode.entry
    seconds, extra = encode_time(epoch * 1_000_000_000 if entry.mtime_ns is None else entry.mtime_ns)
    sectors = (inode.blocks + inode.index_blocks + (inode.xattr_block != 0)) * SECTORS
    flags = EXTENTS_FLAG if inode.runs or entry.is_file else 0
    flags |= INDEX_FLAG if inode.indexed else 0
    if sectors >= 1 << 32:  # counted in blocks, then
        flags |= HUGE_FILE_FLAG
        sectors //= SECTORS
    return INODE_WHOLE.pack(
        entry.mode, entry.uid & 0xFFFF, inode.size & 0xFFFFFFFF, seconds, seconds, seconds, 0,
        entry.gid & 0xFFFF, inode.links if inode.links <= LINKS_MAX else 1,  # dir_nlink: too many to count
        sectors & 0xFFFFFFFF, flags, 0,
        _block_field(inode),
        0, inode.xattr_block & 0xFFFFFFFF, inode.size >> 32, 0,
        sectors >> 32, 0, entry.uid >> 16, entry.gid >> 16, 0, 0,
        EXTRA_ISIZE, 0, extra, extra, extra, seconds, extra, 0, 0,
        inode.xattrs_inside,
    )  # fmt: skip


def _identity(digest: str, epoch: int) -> Identity:
    made = hashlib.sha256(b"ext4" + bytes.fromhex(digest)).digest()
    own = uuid.UUID(bytes=made[:16], version=5).bytes
    return Identity(uuid=own, hash_seed=made[16:], seed=checksum(0xFFFFFFFF, own), epoch=epoch)


def _runs(content: Content) -> Sequence[Run]:
    """The blocks that have data."""
    if not isinstance(content, Sparse):
        return (Run(0, -(-content.size // BLOCK)),) if content.size else ()
    runs: list[Run] = []
    for offset, _, size in content.pieces:
        first, end = offset // BLOCK, -(-(offset + size) // BLOCK)
        if runs and first <= runs[-1].logical + runs[-1].blocks:
            runs[-1].blocks = max(runs[-1].blocks, end - runs[-1].logical)
        else:
            runs.append(Run(first, end - first))
    return runs


def _extents(inode: _Inode) -> list[tuple[int, int, int]]:
    return [
        (piece.logical + logical, count, first)
        for piece in inode.runs
        for logical, count, first in run(piece.first, piece.blocks)
    ]


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


def _block_field(inode: _Inode) -> bytes:
    """i_block: extents, a short symbolic link, or a device number."""
    entry = inode.entry
    if inode.extents:
        return inode.extents
    if inode.runs or entry.is_file:
        return extent_tree(_extents(inode), (), 0)[0]
    if entry.is_symlink:
        return entry.target.encode(errors="surrogateescape")
    return encode_device(entry) if entry.is_device else b""
