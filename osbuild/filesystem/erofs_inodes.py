"""Inodes of an erofs image that may be damaged or hostile: every offset is checked before anything is read there."""

from __future__ import annotations

import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from osbuild.borrowed import Borrowed
from osbuild.errors import InputError
from osbuild.filesystem import erofs_format as disk
from osbuild.filesystem.erofs_format import BLOCK
from osbuild.limits import INODE_COST, PIECE_COST, XATTR_COST, Limits
from osbuild.tree import EMPTY, ID_MAX, PATH_MAX, Content, Entry, Slice, Sparse

_SECOND: Final = 1_000_000_000
_WINDOW: Final = 1 << 16
_WINDOWS: Final = 64
_COMPRESSED: Final = (1, 3)  # data layouts
_PREFIXES: Final[Mapping[int, str]] = {
    **{index: prefix for prefix, index in disk.XATTR_PREFIXES},
    **{index: name for name, index in disk.ACLS.items()},
}

Piece = tuple[int, int, int]  # offset in the file, offset in the filesystem, bytes


class DamageError(Exception):
    """A rule of the format is broken; who catches it adds where."""


class Image:
    """A filesystem in a file: its bytes, and how much memory may go into what they say."""

    def __init__(self, backing: Borrowed, offset: int, size: int) -> None:
        self.backing = backing
        self.offset = offset
        self.size = max(0, min(size, backing.size - offset))
        self.limits = Limits()
        self._room = self.limits.memory_bytes
        self._windows: dict[int, bytes] = {}

    def bytes(self, at: int, length: int) -> bytes:
        """`length` bytes at `at` of the filesystem."""
        self.check(at, length)
        begin = at - at % _WINDOW
        if at + length > begin + _WINDOW:
            return self.backing.read(self.offset + at, length)
        window = self._windows.get(begin)
        if window is None:
            if len(self._windows) >= _WINDOWS:
                self._windows.clear()
            window = self.backing.read(self.offset + begin, min(_WINDOW, self.size - begin))
            self._windows[begin] = window
        return window[at - begin : at - begin + length]

    def check(self, at: int, length: int) -> None:
        """DamageError when that is not inside the filesystem."""
        if length < 0 or at < 0 or at + length > self.size:
            raise DamageError(f"something of it is at byte {at}, {length} bytes long: that is not in the filesystem")

    def take(self, memory: int) -> None:
        """Account for bytes of memory; InputError when that is too much for all that was read."""
        self._room -= memory
        if self._room < 0:
            raise InputError(f"what is in this erofs takes more than {self.limits.memory_bytes} bytes of memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class Inode:
    """One inode as it was found."""

    nid: int
    entry: Entry
    links: int
    size: int
    pieces: tuple[Piece, ...]  # its data: of files, directories and symbolic links


@dataclass(frozen=True, slots=True, kw_only=True)
class _Head:
    """The fixed part of an inode."""

    layout: int
    xattrs: int
    mode: int
    links: int
    size: int
    where: int
    uid: int
    gid: int
    mtime_ns: int
    end: int  # offset of what follows it


class Inodes:
    """Inodes by number."""

    def __init__(self, image: Image, *, metadata: int, shared: int, mtime_ns: int) -> None:
        """metadata, shared: bytes at which inode 0 and the shared attributes are; mtime_ns: of compact inodes."""
        self._image = image
        self._metadata = metadata
        self._shared = shared
        self._mtime_ns = mtime_ns
        self.blocks: set[int] = set()  # in which inodes begin
        self.shared_blocks: set[int] = set()  # in which shared attributes do
        self._map_room = image.size  # bytes of chunk maps that may still be read: two could lie in one place

    def read(self, nid: int) -> Inode:
        """DamageError when there is no inode, or none that we can read."""
        self._image.take(INODE_COST)
        head = self._head(nid)
        kind = stat.S_IFMT(head.mode)
        if kind not in disk.FILE_TYPES:
            raise DamageError(f"a mode of {head.mode:o} is no kind of file")
        if kind == stat.S_IFLNK and not 0 < head.size <= PATH_MAX:
            raise DamageError(f"a symbolic link to a path of {head.size} bytes")
        if max(head.uid, head.gid) > ID_MAX:
            raise DamageError(f"owned by {head.uid}:{head.gid}; {ID_MAX + 1} is nobody's number")
        xattrs_size = disk.XATTR_HEADER.size + 4 * (head.xattrs - 1) if head.xattrs else 0
        xattrs = self._xattrs(head.end, xattrs_size) if head.xattrs else {}
        pieces: tuple[Piece, ...] = ()
        if kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            pieces = tuple(self._pieces(head, head.end + xattrs_size))
            self._image.take(PIECE_COST * len(pieces))
        is_device = kind in (stat.S_IFCHR, stat.S_IFBLK)
        entry = Entry(
            mode=head.mode,
            uid=head.uid,
            gid=head.gid,
            mtime_ns=head.mtime_ns,
            xattrs=xattrs,
            target=self._target(pieces) if kind == stat.S_IFLNK else "",
            major=head.where >> 8 & 0xFFF if is_device else 0,
            minor=head.where & 0xFF | head.where >> 12 & 0xFFF00 if is_device else 0,
            content=self._content(head.size, pieces) if kind == stat.S_IFREG else EMPTY,
        )
        return Inode(nid=nid, entry=entry, links=head.links, size=head.size, pieces=pieces)

    def _head(self, nid: int) -> _Head:
        at = self._metadata + nid * disk.SLOT
        form = int.from_bytes(self._image.bytes(at, 2), "little")
        if form & ~0xF:
            raise DamageError(f"an inode of the unknown format {form:#x}")
        if not form & disk.EXTENDED:
            data = self._image.bytes(at, disk.COMPACT_INODE.size)
            _, xattrs, mode, links, size, _, where, _, uid, gid, _ = disk.COMPACT_INODE.unpack(data)
            mtime_ns = self._mtime_ns
        else:
            data = self._image.bytes(at, disk.EXTENDED_INODE.size)
            _, xattrs, mode, _, size, where, _, uid, gid, seconds, rest, links = disk.EXTENDED_INODE.unpack(data)
            if rest >= _SECOND:
                raise DamageError(f"a time with {rest} ns")
            mtime_ns = seconds * _SECOND + rest
        self.blocks.add(at // BLOCK)
        return _Head(
            layout=form >> 1, xattrs=xattrs, mode=mode, links=links, size=size, where=where, uid=uid, gid=gid,
            mtime_ns=mtime_ns, end=at + len(data),
        )  # fmt: skip

    # Data

    def _pieces(self, head: _Head, after: int) -> Iterator[Piece]:
        """Where its data is; `after`: the offset behind the inode and its attributes."""
        if head.layout in _COMPRESSED:
            raise DamageError("it is compressed, and only what is not can be read")
        if head.size > self._image.limits.file_bytes:
            raise DamageError(f"{head.size} bytes are more than a file may have")
        if head.layout == disk.CHUNK_BASED and stat.S_ISREG(head.mode):
            yield from self._chunks(head, after)
            return
        if head.layout not in (disk.FLAT_PLAIN, disk.FLAT_INLINE):
            raise DamageError(f"data in the unknown layout {head.layout}")
        size = head.size
        if head.layout == disk.FLAT_INLINE and size:
            size = (size - 1) // BLOCK * BLOCK
            if after % BLOCK + head.size - size > BLOCK:
                raise DamageError("the end of its data goes over the end of a block")
        if size:
            self._image.check(head.where * BLOCK, size)
            yield 0, head.where * BLOCK, size
        if head.size > size:
            self._image.check(after, head.size - size)
            yield size, after, head.size - size

    def _chunks(self, head: _Head, after: int) -> Iterator[Piece]:
        """Pieces of a file in chunks; those that follow each other in both places are one."""
        form = head.where & 0xFFFF
        if form & ~(disk.CHUNK_BITS_MASK | disk.CHUNK_INDEXES):
            raise DamageError(f"chunks of the unknown format {form:#x}")
        chunk = BLOCK << (form & disk.CHUNK_BITS_MASK)
        unit = disk.CHUNK_INDEX.size if form & disk.CHUNK_INDEXES else 4
        count = -(-head.size // chunk)
        self._map_room -= count * unit
        if self._map_room < 0:
            raise DamageError("the maps of all chunks are larger than the filesystem")
        data = self._image.bytes(after + -after % unit, count * unit)
        found = 0
        last: Piece = (0, 0, 0)
        for number in range(count):
            block = int.from_bytes(data[(number + 1) * unit - 4 : (number + 1) * unit], "little")
            if block == disk.NO_BLOCK:
                continue
            if unit == disk.CHUNK_INDEX.size and data[number * unit + 2 : number * unit + 4] != b"\0\0":
                raise DamageError("a part of it is on another device")
            at, size = number * chunk, min(chunk, head.size - number * chunk)
            self._image.check(block * BLOCK, size)
            if last[0] + last[2] == at and last[1] + last[2] == block * BLOCK:
                last = (last[0], last[1], last[2] + size)
                continue
            if last[2]:
                yield last
            last = (at, block * BLOCK, size)
            found += 1
            if found > self._image.limits.sparse_pieces:
                raise DamageError(f"more than {self._image.limits.sparse_pieces} pieces")
        if last[2]:
            yield last

    def _content(self, size: int, pieces: tuple[Piece, ...]) -> Content:
        here = self._image.offset
        if not size:
            return EMPTY
        if len(pieces) == 1 and pieces[0][2] == size:
            return Slice(self._image.backing, here + pieces[0][1], size)
        return Sparse(self._image.backing, size, tuple((at, here + place, length) for at, place, length in pieces))

    def _target(self, pieces: tuple[Piece, ...]) -> str:
        target = b"".join(self._image.bytes(place, length) for _, place, length in pieces)
        if b"\0" in target:
            raise DamageError("a symbolic link to a path with a NUL byte")
        self._image.take(len(target))
        return target.decode(errors="surrogateescape")

    # Extended attributes

    def _xattrs(self, at: int, size: int) -> dict[str, bytes]:
        """Those of the inode whose attributes are `size` bytes at `at`."""
        data = self._image.bytes(at, size)
        _, count = disk.XATTR_HEADER.unpack_from(data)
        begin = disk.XATTR_HEADER.size + 4 * count
        if begin > size:
            raise DamageError(f"{count} shared attributes in {size} bytes")
        found: dict[str, bytes] = {}
        for index in range(disk.XATTR_HEADER.size, begin, 4):
            place = self._shared + 4 * int.from_bytes(data[index : index + 4], "little")
            head = self._image.bytes(place, disk.XATTR_ENTRY.size)
            self.shared_blocks.add(place // BLOCK)
            length, _, value = disk.XATTR_ENTRY.unpack(head)
            self._add(found, self._image.bytes(place, len(head) + length + value))
        while begin < size:
            if begin + disk.XATTR_ENTRY.size > size:
                raise DamageError("an extended attribute that is cut off")
            length, _, value = disk.XATTR_ENTRY.unpack_from(data, begin)
            end = begin + disk.XATTR_ENTRY.size + length + value
            if end > size:
                raise DamageError("an extended attribute that is cut off")
            self._add(found, data[begin:end])
            begin = end + -end % 4
        return found

    def _add(self, found: dict[str, bytes], entry: bytes) -> None:
        length, index, _ = disk.XATTR_ENTRY.unpack_from(entry)
        rest = entry[disk.XATTR_ENTRY.size :]
        if index not in _PREFIXES:
            raise DamageError(f"an extended attribute with the unknown prefix {index}")
        name = _PREFIXES[index] + rest[:length].decode(errors="surrogateescape")
        if name in found or b"\0" in rest[:length] or (length > 0) == (index in disk.ACLS.values()):
            raise DamageError(f"an extended attribute that cannot be called {name!a}")
        self._image.take(XATTR_COST + len(entry))
        found[name] = rest[length:]
