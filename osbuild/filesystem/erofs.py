"""erofs, uncompressed: read-only by nature, every file in one run of whole blocks, so that DAX can map it.

    block 0   boot area, superblock at byte 1024
    block 1   inodes, each with its attributes, the map of its chunks and the end of its data; the root comes first
    …         attributes that many inodes share
    …         directories and symbolic links that are too long for that
    …         files; with DAX those of 2 MiB and more on 2 MiB boundaries of the namespace, smaller ones between them

A file's end lies behind its inode only without DAX, which maps whole blocks. Directories and symbolic links are never
mapped, so theirs always may.

A file with holes of 2 MiB and more is stored in chunks of that size, and no block is named for those that are holes.
(One chunk of zeros for all of them would be read by older tools, too: fsck.erofs 1.5 leaves holes out when it extracts
a file, and says nothing. But with DAX the kernel warns of a page that is in two places.) A smaller hole takes room in
the filesystem, and is a hole of the image.

An inode is compact where that loses nothing: small ids, and the time that the superblock says.
"""

from __future__ import annotations

import bisect
import stat
import struct
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from osbuild.errors import InputError, SpecError
from osbuild.filesystem import erofs_format as disk
from osbuild.filesystem.base import NO_ROOM, NOTHING, Room, encode_name, encode_target
from osbuild.filesystem.erofs_format import BLOCK
from osbuild.filesystem.erofs_xattrs import SharedXattrs, count_field
from osbuild.filesystem.pieces import write_pieces
from osbuild.tree import Bytes, Content, Entry, Slice, Sparse, Tree, quote, without_sockets

HUGE: Final = 2 << 20  # what DAX maps with one page table entry
_HUGE_BITS: Final = 21
_CHUNKS_MAX: Final = 1 << 18  # of one file: a map of 1 MiB
_OPEN_MAX: Final = 64  # metadata blocks with room left that are remembered
_ID_MAX: Final = 0xFFFF  # of a compact inode
_MAJOR_MAX: Final = 0xFFF  # of a device
_MINOR_MAX: Final = 0xFFFFF
_BLOCKS_MAX: Final = 1 << 32
_SECOND: Final = 1_000_000_000

_Piece = tuple[int, bytes | Content]  # byte offset, what lies there


def mount_words(*, dax: bool) -> tuple[str, ...]:
    """Kernel words for a root of this kind (kata-contract 5.1: without DAX, `ro` is an option and no word)."""
    return ("rootflags=dax", "ro", "rootfstype=erofs") if dax else ("rootflags=ro", "rootfstype=erofs")


def plan(tree: Tree, *, start: int, epoch: int, dax: bool = True, room: Room = NO_ROOM, digest: str = "") -> Plan:
    """Lay a tree out; InputError for what erofs cannot hold. `start` is a multiple of 4096."""
    if room != NO_ROOM:
        raise SpecError(
            "erofs is read-only and as large as its contents: it has no room to write, and none that is free",
            hint="ask for no room, or take ext4",
        )
    return _Layout(tree, start // BLOCK, epoch, digest or without_sockets(tree).digest(), dax=dax).finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A laid out filesystem: metadata in memory, and where each file's bytes go."""

    size: int
    uuid: str
    skipped: tuple[str, ...]  # paths that are not in it: sockets
    pieces: Sequence[_Piece]  # in order, apart

    @property
    def contents(self) -> Iterator[tuple[int, Content]]:
        """Files, but for the tails that lie beside their inodes: those begin inside a block."""
        for at, piece in self.pieces:
            if at % BLOCK == 0 and not isinstance(piece, bytes | bytearray):
                yield at, piece

    def write(
        self,
        descriptor: int,
        offset: int,
        done: Callable[[int], None] | None = None,
        there: Mapping[int, Content] = NOTHING,
    ) -> None:
        """Write everything at `offset` of a file that reads as zeros there."""
        write_pieces(descriptor, offset, self.pieces, done, there)


@dataclass(slots=True, eq=False)
class _Inode:
    """What the layout knows of one inode."""

    number: int
    entry: Entry
    path: str
    links: int = 0
    size: int = 0
    compact: bool = False
    layout: int = disk.FLAT_PLAIN
    xattrs: bytes = b""
    tail: int = 0  # bytes of its data that lie behind it
    at: int = 0  # byte offset of the inode
    first: int = disk.NO_BLOCK  # block where the rest of its data is
    blocks: int = 0  # and how many it takes
    chunks: Sequence[int] = ()  # numbers of those that are no holes
    chunk_bits: int = 0
    children: list[list[tuple[bytes, _Inode]]] = field(default_factory=list)  # of a directory, block by block

    @property
    def nid(self) -> int:
        return self.at // disk.SLOT

    @property
    def head(self) -> int:
        """Bytes of the inode with all that lies between it and its tail."""
        size = disk.COMPACT_INODE.size if self.compact else disk.EXTENDED_INODE.size
        return size + len(self.xattrs) + (4 * _chunk_count(self) if self.layout == disk.CHUNK_BASED else 0)


class _Layout:
    def __init__(self, tree: Tree, start: int, epoch: int, digest: str, *, dax: bool) -> None:
        self._start = start
        self._epoch = epoch
        self._dax = dax
        self._inodes: list[_Inode] = []
        self._skipped: list[str] = []
        self._open: list[tuple[int, int]] = []  # room at a metadata block's end, where it begins; least first
        self._end = 1  # blocks that are taken
        self._uuid = uuid.UUID(bytes=bytes.fromhex(digest)[:16], version=5)
        self._number(tree)

    def finish(self) -> Plan:
        """Sizes first, then places, then bytes."""
        shared = SharedXattrs((inode.path, inode.entry.xattrs) for inode in self._inodes if inode.entry.xattrs)
        for inode in self._inodes:
            if inode.entry.xattrs:
                inode.xattrs = shared.pack(inode.path, inode.entry.xattrs)
            self._measure(inode)
            inode.at = self._reserve(inode.head + inode.tail)
        shared_block = self._end
        self._end += -(-len(shared.area) // BLOCK)
        self._place()
        if self._end >= _BLOCKS_MAX:
            raise InputError(f"the tree needs {self._end} blocks of 4096 bytes; erofs counts fewer than 2^32 (16 TiB)")
        pieces: list[_Piece] = [(disk.SUPERBLOCK_AT, self._superblock(shared_block if shared.area else 0))]
        for inode in self._inodes:
            pieces += self._pieces(inode)
        if shared.area:
            pieces.append((shared_block * BLOCK, shared.area))
        pieces.sort(key=lambda piece: piece[0])
        return Plan(size=self._end * BLOCK, uuid=str(self._uuid), skipped=tuple(self._skipped), pieces=pieces)

    # What there is

    def _number(self, tree: Tree) -> None:
        """An inode for each of the tree's, in the order of first paths, and every directory's entries."""
        known: dict[Entry, _Inode] = {}
        listings: dict[str, list[tuple[bytes, _Inode]]] = {}
        for path, entry in tree.items():
            if stat.S_ISSOCK(entry.mode):
                self._skipped.append(path)  # nothing listens on it in an image
                continue
            inode = known.get(entry)
            if inode is None:
                inode = known[entry] = _Inode(len(known) + 1, entry, path)
                self._inodes.append(inode)
            elif entry.is_dir:
                raise InputError(f"{quote(path)}: a directory with two names")
            inode.links += 1
            above, _, name = path.rpartition("/")
            if entry.is_dir:
                here = path if name else ""
                listings[here] = [(b".", inode), (b"..", listings[above][0][1] if name else inode)]
            if name:
                listings[above].append((encode_name(name, path), inode))
        for listing in listings.values():
            directory = listing[0][1]
            directory.links = sum(child.entry.is_dir for _, child in listing)  # "." and ".." stand for its own two
            listing.sort(key=lambda item: item[0])
            directory.children, directory.size = _directory_blocks(listing)

    def _measure(self, inode: _Inode) -> None:
        """How an inode and its data are stored."""
        entry = inode.entry
        if entry.is_symlink:
            inode.size = len(encode_target(entry, inode.path))
        elif entry.is_file:
            inode.size = entry.content.size
        inode.compact = (
            max(entry.uid, entry.gid, inode.links) <= _ID_MAX
            and inode.size < 1 << 32
            and entry.mtime_ns in (None, self._epoch * _SECOND)
        )
        inode.blocks = -(-inode.size // BLOCK)
        content = entry.content
        if isinstance(content, Sparse):
            _find_chunks(inode, content)
        # By what is stored, not by how the content came: an image that is read and written again stays the same.
        if inode.layout != disk.CHUNK_BASED and not (entry.is_file and self._dax):
            tail = inode.size % BLOCK
            if tail and inode.head + tail <= BLOCK:
                inode.layout, inode.tail, inode.blocks = disk.FLAT_INLINE, tail, inode.size // BLOCK

    # Where it goes

    def _reserve(self, size: int) -> int:
        """A place for an inode and what follows it: none crosses a block's end that fits into one."""
        size += -size % disk.SLOT
        index = bisect.bisect_left(self._open, (size, 0))
        if index < len(self._open):
            room, at = self._open.pop(index)
        else:
            at = self._end * BLOCK
            room = -(-size // BLOCK) * BLOCK
            self._end += room // BLOCK
        if room > size:
            bisect.insort(self._open, (room - size, at + size))
            if len(self._open) > _OPEN_MAX:
                del self._open[0]
        return at

    def _place(self) -> None:
        """Blocks for all data: directories and links, then files."""
        with_data = [inode for inode in self._inodes if inode.blocks]
        self._put(inode for inode in with_data if not inode.entry.is_file)
        files = [inode for inode in with_data if inode.entry.is_file]
        if not self._dax:
            self._put(files)
            return
        # The gaps that alignment leaves are filled with the largest files that fit.
        waiting = sorted((inode.blocks, -inode.number, inode) for inode in files if inode.size < HUGE)
        sizes = [blocks for blocks, _, _ in waiting]
        for inode in files:
            if inode.size < HUGE:
                continue
            aligned = self._end + -(self._start + self._end) % (HUGE // BLOCK)
            while self._end < aligned:
                index = bisect.bisect_right(sizes, aligned - self._end) - 1
                if index < 0:
                    break
                del sizes[index]
                self._put([waiting.pop(index)[2]])
            self._end = aligned
            self._put([inode])
        self._put(sorted((inode for _, _, inode in waiting), key=lambda inode: inode.number))

    def _put(self, inodes: Iterable[_Inode]) -> None:
        for inode in inodes:
            inode.first = self._end
            self._end += inode.blocks

    # Bytes

    def _superblock(self, shared_block: int) -> bytes:
        chunked = any(inode.layout == disk.CHUNK_BASED for inode in self._inodes)
        block = disk.SUPERBLOCK.pack(
            disk.MAGIC, 0, disk.HAS_CHECKSUM | disk.HAS_MTIME, disk.BLOCK_BITS, 0, self._inodes[0].nid,
            len(self._inodes), self._epoch, 0, self._end, 0, shared_block, self._uuid.bytes, bytes(16),
            disk.HAS_CHUNKS if chunked else 0, 0, 0, 0, 0, 0, 0, 0, 0, b"",
        )  # fmt: skip
        block = block.ljust(BLOCK - disk.SUPERBLOCK_AT, b"\0")
        return block[:4] + struct.pack("<I", disk.checksum(block)) + block[8:]

    def _pieces(self, inode: _Inode) -> Iterator[_Piece]:
        entry = inode.entry
        head = self._pack(inode) + inode.xattrs
        place = inode.first * BLOCK
        if entry.is_file:
            content = entry.content
            if isinstance(content, Sparse) and inode.layout == disk.CHUNK_BASED:
                head += _chunk_map(inode)
                yield from _chunk_pieces(inode, content)
            elif inode.tail:
                yield inode.at + len(head), _part(content, inode.size - inode.tail, inode.size)
                content = _part(content, 0, inode.size - inode.tail)
            if inode.blocks and inode.layout != disk.CHUNK_BASED:
                yield place, content
        else:
            data = b""
            if entry.is_dir:
                data = b"".join(_pack_directory(inode))
            elif entry.is_symlink:
                data = entry.target.encode(errors="surrogateescape")
            head += data[inode.size - inode.tail :]
            if inode.blocks:
                yield place, data[: inode.size - inode.tail]
        yield inode.at, head

    def _pack(self, inode: _Inode) -> bytes:
        entry = inode.entry
        shape = inode.layout << 1, count_field(len(inode.xattrs)), entry.mode
        where = inode.first
        if inode.layout == disk.CHUNK_BASED:
            where = inode.chunk_bits - disk.BLOCK_BITS
        elif entry.is_device:
            where = _device_number(inode)
        elif not (entry.is_file or entry.is_dir or entry.is_symlink):
            where = 0
        if inode.compact:
            return disk.COMPACT_INODE.pack(
                *shape, inode.links, inode.size, 0, where, inode.number, entry.uid, entry.gid, 0
            )  # fmt: skip
        seconds, rest = divmod(self._epoch * _SECOND if entry.mtime_ns is None else entry.mtime_ns, _SECOND)
        if not -(1 << 63) <= seconds < 1 << 63:
            raise InputError(f"{quote(inode.path)}: a time of {seconds} s; erofs has 64 bits for it")
        return disk.EXTENDED_INODE.pack(
            shape[0] | disk.EXTENDED, *shape[1:], 0, inode.size, where, inode.number, entry.uid, entry.gid,
            seconds, rest, inode.links,
        )  # fmt: skip


def _device_number(inode: _Inode) -> int:
    major, minor = inode.entry.major, inode.entry.minor
    if major > _MAJOR_MAX or minor > _MINOR_MAX:
        raise InputError(
            f"{quote(inode.path)}: device {major}:{minor}; Linux numbers go up to {_MAJOR_MAX}:{_MINOR_MAX}"
        )
    return (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12


# Directories


def _directory_blocks(listing: list[tuple[bytes, _Inode]]) -> tuple[list[list[tuple[bytes, _Inode]]], int]:
    """Entries cut into blocks, and the bytes of all blocks, the last one only as far as it is used."""
    blocks = []
    begin = used = 0
    for index, (name, _) in enumerate(listing):
        size = disk.DIRENT.size + len(name)
        if used + size > BLOCK:
            blocks.append(listing[begin:index])
            begin, used = index, 0
        used += size
    blocks.append(listing[begin:])
    return blocks, (len(blocks) - 1) * BLOCK + used


def _pack_directory(inode: _Inode) -> Iterator[bytes]:
    for block in inode.children:
        name_at = disk.DIRENT.size * len(block)
        heads = []
        for name, child in block:
            heads.append(disk.DIRENT.pack(child.nid, name_at, disk.FILE_TYPES[stat.S_IFMT(child.entry.mode)], 0))
            name_at += len(name)
        data = b"".join(heads) + b"".join([name for name, _ in block])
        yield data if block is inode.children[-1] else data.ljust(BLOCK, b"\0")


# Files


def _part(content: Content, begin: int, end: int) -> Content:
    if isinstance(content, Slice):
        return Slice(content.spool, content.offset + begin, end - begin)
    if isinstance(content, Sparse):
        cut = (
            (max(at, begin), source + max(begin - at, 0), min(at + size, end)) for at, source, size in content.pieces
        )
        pieces = tuple((at - begin, source, stop - at) for at, source, stop in cut if stop > at)
        return Sparse(content.spool, end - begin, pieces)
    assert isinstance(content, Bytes)
    return Bytes(content.data[begin:end])


def _find_chunks(inode: _Inode, content: Sparse) -> None:
    """Store a file in chunks if that saves one of them: those that no piece touches are holes."""
    bits = _HUGE_BITS
    while inode.size >> bits > _CHUNKS_MAX:
        bits += 1
    if bits - disk.BLOCK_BITS > disk.CHUNK_BITS_MASK:
        raise InputError(f"{quote(inode.path)}: {inode.size} bytes with holes are more than an erofs file can have")
    used = sorted(
        {number for at, _, size in content.pieces if size for number in range(at >> bits, (at + size - 1 >> bits) + 1)}
    )
    inode.chunk_bits = bits
    count = _chunk_count(inode)
    if len(used) == count:
        return
    inode.layout, inode.chunks = disk.CHUNK_BASED, used
    inode.blocks = len(used) << bits - disk.BLOCK_BITS
    if used and used[-1] == count - 1:  # the last chunk ends with the file
        inode.blocks -= (-inode.size % (1 << bits)) // BLOCK


def _chunk_count(inode: _Inode) -> int:
    return -(-inode.size >> inode.chunk_bits)


def _chunk_map(inode: _Inode) -> bytes:
    """The block of every chunk; those that are no holes follow each other."""
    blocks = [disk.NO_BLOCK] * _chunk_count(inode)
    for index, number in enumerate(inode.chunks):
        blocks[number] = inode.first + (index << inode.chunk_bits - disk.BLOCK_BITS)
    return struct.pack(f"<{len(blocks)}I", *blocks)


def _chunk_pieces(inode: _Inode, content: Sparse) -> Iterator[_Piece]:
    """A content's pieces; all chunks that a piece touches are stored, so none is torn."""
    ranks = {number: rank for rank, number in enumerate(inode.chunks)}
    for at, source, size in content.pieces:
        if size:
            inside = at & ((1 << inode.chunk_bits) - 1)
            rank = ranks[at >> inode.chunk_bits]
            yield inode.first * BLOCK + (rank << inode.chunk_bits) + inside, Slice(content.spool, source, size)
