"""ext4 for reading: a whole tree laid out at once, no free space, nothing left to chance.

    block 0          boot sector, superblock at byte 1024
    1 …              group descriptors, 32 bytes each
    …                all block bitmaps, all inode bitmaps, all inode tables (flex_bg lets them stand together)
    …                directories, long symbolic links, attribute blocks
    …                files; those of 2 MiB and more on 2 MiB boundaries of the namespace, smaller ones in between
    at the end       an empty journal, the smallest there is: 4 MiB, of which one block is not a hole

Nobody writes to the journal. It is there because Kata mounts with data=ordered, which the kernel refuses without one.

Blocks are 4 KiB, inodes 256 bytes, groups 32768 blocks. There are no superblock copies (sparse_super2 without
backups): a damaged image is replaced, not repaired, and every group after the first is free for file data.

Source: Documentation/filesystems/ext4/ of the kernel (the on-disk format), nothing else.
"""

from __future__ import annotations

import bisect
import hashlib
import stat
import struct
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from osbuild.errors import InputError
from osbuild.filesystem.base import NO_ROOM, Room
from osbuild.tree import Content, Entry, Tree, quote, write_all

BLOCK: Final = 4096
GROUP_BLOCKS: Final = 8 * BLOCK
HUGE: Final = 2 << 20  # what DAX maps with one page table entry
INODE: Final = 256
_EXTRA_ISIZE: Final = 32
_FIRST_INODE: Final = 11
_ROOT_INODE: Final = 2
_JOURNAL_INODE: Final = 8
_JOURNAL_BLOCKS: Final = 1024  # JBD2_MIN_JOURNAL_BLOCKS
_EXTENT_BLOCKS: Final = 32768  # the longest initialised extent
_INLINE_EXTENTS: Final = 4
_BLOCK_EXTENTS: Final = (BLOCK - 12) // 12
_FAST_SYMLINK: Final = 60  # targets shorter than this lie in the inode
_LINKS_MAX: Final = 65000
_FILE_BLOCKS_MAX: Final = (1 << 32) - 2  # logical block numbers have 32 bits

# Feature bits (ext4/super.rst)
_COMPAT: Final = 0x0004 | 0x0008 | 0x0200  # has_journal, ext_attr, sparse_super2
_INCOMPAT: Final = 0x0002 | 0x0040 | 0x0200  # filetype, extents, flex_bg
# sparse_super, large_file, huge_file, dir_nlink, extra_isize
_RO_COMPAT: Final = 0x0001 | 0x0002 | 0x0008 | 0x0020 | 0x0040

_EXTENTS_FLAG: Final = 0x80000
_HUGE_FILE_FLAG: Final = 0x40000
_XATTR_MAGIC: Final = 0xEA020000
_XATTR_SPACE: Final = INODE - 128 - _EXTRA_ISIZE
_XATTR_PREFIXES: Final = (("user.", 1), ("trusted.", 4), ("security.", 6), ("system.", 7))
_ACLS: Final[Mapping[str, int]] = {"system.posix_acl_access": 2, "system.posix_acl_default": 3}
_TIME_MIN: Final = -(1 << 31)
_TIME_MAX: Final = (1 << 34) - (1 << 31) - 1

_FILE_TYPES: Final[Mapping[int, int]] = {
    stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFCHR: 3, stat.S_IFBLK: 4, stat.S_IFIFO: 5, stat.S_IFLNK: 7,
}  # fmt: skip
_INODE_HEAD: Final = struct.Struct("<HHIIIIIHHIII")
_INODE_TAIL: Final = struct.Struct("<IIII HHHHHH HHIIIIIII")
_EXTENT_MAGIC: Final = 0xF30A
_GROUP: Final = struct.Struct("<IIIHHHHIHHHH")
_EXTENT_HEADER: Final = struct.Struct("<HHHHI")
_EXTENT: Final = struct.Struct("<IHHI")
_DIR_ENTRY: Final = struct.Struct("<IHBB")
_XATTR_ENTRY: Final = struct.Struct("<BBHIII")


def mount_words(*, dax: bool) -> tuple[str, ...]:
    """Kernel words for a root of this kind (kata-contract 5.1)."""
    return (
        "rootflags=dax,data=ordered,errors=remount-ro" if dax else "rootflags=data=ordered,errors=remount-ro",
        "ro",
        "rootfstype=ext4",
    )


def plan(tree: Tree, *, start: int, epoch: int, dax: bool = True, room: Room = NO_ROOM) -> Plan:
    """Lay a tree out; InputError for what ext4 cannot hold. `start` is a multiple of 4096."""
    return _Layout(tree, start // BLOCK, epoch).finish()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A laid out filesystem: metadata in memory, and where each file's bytes go."""

    size: int
    uuid: str
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
    first: int = 0  # block
    blocks: int = 0
    extent_blocks: list[int] = field(default_factory=list)  # where the extents are when the inode cannot hold them
    xattrs_inside: bytes = b""
    xattr_block: int = 0


@dataclass(frozen=True, slots=True)
class _Blob:
    """One block that belongs to an inode besides its data: attributes, a long symbolic link, or extents."""

    inode: _Inode
    purpose: str
    data: bytes


class _Layout:
    def __init__(self, tree: Tree, start: int, epoch: int) -> None:
        self._start = start
        self._epoch = epoch
        self._inodes: list[_Inode] = []
        self._directories: dict[int, list[tuple[bytes, _Inode]]] = {}
        self._parents: dict[int, int] = {_ROOT_INODE: _ROOT_INODE}
        self._blobs: list[_Blob] = []
        self._metadata: list[tuple[int, bytes]] = []
        self._gaps: list[tuple[int, int]] = []  # blocks that alignment leaves free: first, how many
        self._number(tree)
        self._journal = _Inode(
            _JOURNAL_INODE, Entry(mode=stat.S_IFREG | 0o600), "", 1, _JOURNAL_BLOCKS * BLOCK, blocks=_JOURNAL_BLOCKS
        )

    def finish(self) -> Plan:
        """Sizes first, then places, then bytes."""
        packed = [(inode, self._pack_directory(inode)) for inode in self._directory_inodes()]
        for inode, data in packed:
            inode.size, inode.blocks = len(data), len(data) // BLOCK
        files = [inode for inode in self._inodes if inode.entry.is_file and inode.size]
        self._place(packed, files)
        for inode, data in packed:
            self._metadata.append((inode.first * BLOCK, data))
        for at, blob in enumerate(self._blobs, start=self._first_blob):
            self._metadata.append((at * BLOCK, self._settle(blob, at).ljust(BLOCK, b"\0")))
        self._metadata.append((self._table * BLOCK, self._inode_table()))
        identity = self._identity()
        self._metadata.extend(self._group_blocks())
        self._metadata.append((self._journal.first * BLOCK, _journal_superblock(identity)))
        self._metadata.append((1024, self._superblock(identity)))
        return Plan(
            size=self._total * BLOCK,
            uuid=str(_uuid(identity)),
            metadata=tuple(self._metadata),
            bodies=tuple(sorted(((inode.first * BLOCK, inode.entry.content) for inode in files), key=lambda at: at[0])),
        )

    # Numbering

    def _number(self, tree: Tree) -> None:
        """Give every inode its number in the order of first paths, and every directory its entries."""
        known: dict[Entry, _Inode] = {}
        at: dict[str, _Inode] = {}
        following = _FIRST_INODE
        for path, entry in tree.items():
            if stat.S_IFMT(entry.mode) not in _FILE_TYPES:
                continue  # sockets: nothing listens on them in an image
            inode = known.get(entry)
            if inode is None:
                number = _ROOT_INODE if path == "/" else following
                following += number != _ROOT_INODE
                inode = known[entry] = self._new_inode(number, path, entry)
            if entry.is_dir:
                if inode.links:
                    raise InputError(f"{quote(path)}: a directory with two names")
                inode.links = 2
                at[path] = inode
                self._directories[inode.number] = []
            else:
                inode.links += 1
                if inode.links > _LINKS_MAX:
                    raise InputError(f"{quote(path)}: more than {_LINKS_MAX} hard links to one file")
            if path != "/":
                above, _, name = path.rpartition("/")
                parent = at[above or "/"]
                self._directories[parent.number].append((name.encode(errors="surrogateescape"), inode))
                if entry.is_dir:
                    parent.links += 1
                    self._parents[inode.number] = parent.number
        self._last = following - 1

    def _directory_inodes(self) -> list[_Inode]:
        return [inode for inode in self._inodes if inode.entry.is_dir]

    def _new_inode(self, number: int, path: str, entry: Entry) -> _Inode:
        inode = _Inode(number, entry, path)
        self._inodes.append(inode)
        if entry.xattrs:
            entries = _xattr_entries(entry.xattrs, path)
            inside = _pack_xattrs(entries, _XATTR_SPACE - 4, 0)
            if inside is not None:
                inode.xattrs_inside = struct.pack("<I", _XATTR_MAGIC) + inside
            else:
                block = _xattr_block(entries)
                if block is None:
                    raise InputError(f"{quote(path)}: its extended attributes do not fit into one 4096 byte block")
                self._blobs.append(_Blob(inode, "xattrs", block))
        if entry.is_symlink:
            target = entry.target.encode(errors="surrogateescape")
            inode.size = len(target)
            if len(target) >= _FAST_SYMLINK:
                self._blobs.append(_Blob(inode, "target", target))
        elif entry.is_file:
            inode.size = entry.content.size
            inode.blocks = -(-inode.size // BLOCK)
            if inode.blocks > _FILE_BLOCKS_MAX:
                raise InputError(f"{quote(path)}: {inode.size} bytes are more than an ext4 file can have")
            extents = -(-inode.blocks // _EXTENT_BLOCKS)
            if extents > _INLINE_EXTENTS * _BLOCK_EXTENTS:
                raise InputError(f"{quote(path)}: {inode.size} bytes need more extents than this writer makes")
            if extents > _INLINE_EXTENTS:
                self._blobs += [_Blob(inode, "extents", b"")] * -(-extents // _BLOCK_EXTENTS)
        return inode

    # Placing

    def _place(self, packed: Sequence[tuple[_Inode, bytes]], files: Sequence[_Inode]) -> None:
        """Find a place for everything; the number of groups and what fits into them depend on each other."""
        directory_blocks = sum(len(data) // BLOCK for _, data in packed)
        total = 1 + directory_blocks + len(self._blobs) + sum(inode.blocks for inode in files) + _JOURNAL_BLOCKS
        # An inode bitmap is one block, too: a group has at most as many inodes as that has bits.
        least = -(-self._last // GROUP_BLOCKS)
        groups, wanted = 0, max(least, -(-total // GROUP_BLOCKS))
        while wanted > groups:
            groups = wanted
            cursor = self._place_fixed(groups)
            for inode, data in packed:
                inode.first = cursor
                cursor += len(data) // BLOCK
            self._first_blob = cursor
            self._journal.first = self._place_files(files, cursor + len(self._blobs))
            total = self._journal.first + _JOURNAL_BLOCKS
            wanted = -(-total // GROUP_BLOCKS)
        # Groups that are there for their inodes only still have to be there: free blocks, and a hole in the image.
        self._total = max(total, (groups - 1) * GROUP_BLOCKS + 8)
        if self._total > total:
            self._gaps.append((total, self._total - total))
        if self._total >= 1 << 32:
            raise InputError(f"the tree needs {self._total} blocks of 4096 bytes; this ext4 writer stops at 2^32")

    def _place_fixed(self, groups: int) -> int:
        """The superblock, descriptors, bitmaps and inode tables; returns the first block after them."""
        inodes_per_block = BLOCK // INODE
        self._groups = groups
        self._per_group = -(-self._last // groups // inodes_per_block) * inodes_per_block
        self._descriptors = 1
        self._block_bitmaps = self._descriptors + -(-groups * _GROUP.size // BLOCK)
        self._inode_bitmaps = self._block_bitmaps + groups
        self._table = self._inode_bitmaps + groups
        return self._table + groups * self._per_group // inodes_per_block

    def _place_files(self, files: Iterable[_Inode], cursor: int) -> int:
        """Large files on huge-page boundaries; the gaps that leaves are filled with the largest files that fit."""
        step = HUGE // BLOCK
        self._gaps = []
        large = [inode for inode in files if inode.size >= HUGE]
        waiting = sorted((inode.blocks, -inode.number, inode) for inode in files if inode.size < HUGE)
        sizes = [blocks for blocks, _, _ in waiting]
        for inode in large:
            aligned = cursor + -(self._start + cursor) % step
            while cursor < aligned:
                index = bisect.bisect_right(sizes, aligned - cursor) - 1
                if index < 0:
                    self._gaps.append((cursor, aligned - cursor))
                    break
                del sizes[index]
                filler = waiting.pop(index)[2]
                filler.first = cursor
                cursor += filler.blocks
            inode.first = aligned
            cursor = aligned + inode.blocks
        for inode in sorted((inode for _, _, inode in waiting), key=lambda inode: inode.number):
            inode.first = cursor
            cursor += inode.blocks
        return cursor

    def _settle(self, blob: _Blob, at: int) -> bytes:
        """Tell the inode where its blob is, and give the blob's bytes."""
        inode = blob.inode
        if blob.purpose == "xattrs":
            inode.xattr_block = at
        elif blob.purpose == "target":
            inode.first, inode.blocks = at, 1
        else:
            extents = _extents(inode)[len(inode.extent_blocks) * _BLOCK_EXTENTS :][:_BLOCK_EXTENTS]
            inode.extent_blocks.append(at)
            return _EXTENT_HEADER.pack(_EXTENT_MAGIC, len(extents), _BLOCK_EXTENTS, 0, 0) + b"".join(extents)
        return blob.data

    # Bytes

    def _pack_directory(self, inode: _Inode) -> bytes:
        """A directory's blocks: entries in the order of their names, none across a block's end."""
        children = [(b".", inode.number, 2), (b"..", self._parents[inode.number], 2)]
        children += [
            (name, child.number, _FILE_TYPES[stat.S_IFMT(child.entry.mode)])
            for name, child in self._directories[inode.number]
        ]
        blocks: list[bytes] = []
        parts: list[bytes] = []
        used = last = 0  # bytes in this block, and of them in its last entry
        for name, number, kind in children:
            size = 8 + len(name) + -len(name) % 4
            if used + size > BLOCK:
                parts[-1] = _stretch(parts[-1], last + BLOCK - used)
                blocks.append(b"".join(parts))
                parts, used = [], 0
            parts.append((_DIR_ENTRY.pack(number, size, len(name), kind) + name).ljust(size, b"\0"))
            used, last = used + size, size
        parts[-1] = _stretch(parts[-1], last + BLOCK - used)
        blocks.append(b"".join(parts))
        return b"".join(blocks)

    def _inode_table(self) -> bytes:
        table = bytearray(self._groups * self._per_group * INODE)
        for inode in (*self._inodes, self._journal):
            at = (inode.number - 1) * INODE
            entry = inode.entry
            seconds, extra = _time(entry.mtime_ns if entry.mtime_ns is not None else self._epoch * 1_000_000_000)
            sectors = (inode.blocks + len(inode.extent_blocks) + (inode.xattr_block != 0)) * (BLOCK // 512)
            flags = _EXTENTS_FLAG if entry.is_dir or entry.is_file or inode.blocks else 0
            if sectors >= 1 << 32:  # counted in blocks, then
                flags |= _HUGE_FILE_FLAG
                sectors //= BLOCK // 512
            links = inode.links if inode.links <= _LINKS_MAX else 1  # dir_nlink: too many to count
            _INODE_HEAD.pack_into(
                table, at, entry.mode, entry.uid & 0xFFFF, inode.size & 0xFFFFFFFF, seconds, seconds, seconds, 0,
                entry.gid & 0xFFFF, links, sectors & 0xFFFFFFFF, flags, 0,
            )  # fmt: skip
            where = _block_field(inode)
            table[at + 40 : at + 40 + len(where)] = where
            _INODE_TAIL.pack_into(
                table, at + 100, 0, inode.xattr_block & 0xFFFFFFFF, inode.size >> 32, 0,
                sectors >> 32, 0, entry.uid >> 16, entry.gid >> 16, 0, 0,
                _EXTRA_ISIZE, 0, extra, extra, extra, seconds, extra, 0, 0,
            )  # fmt: skip
            if inode.xattrs_inside:
                inside = at + 128 + _EXTRA_ISIZE
                table[inside : inside + len(inode.xattrs_inside)] = inode.xattrs_inside
        return bytes(table)

    def _group_blocks(self) -> Iterable[tuple[int, bytes]]:
        """Group descriptors and both kinds of bitmaps."""
        used = bytearray(b"\xff" * (self._groups * BLOCK))
        for first, count in self._gaps:
            for block in range(first, first + count):
                used[block >> 3] &= ~(1 << (block & 7))
        free_blocks = [0] * self._groups
        for first, count in self._gaps:
            for block in range(first, first + count):
                free_blocks[block // GROUP_BLOCKS] += 1
        self._free_blocks = sum(free_blocks)
        directories = [0] * self._groups
        for number in self._directories:
            directories[(number - 1) // self._per_group] += 1
        descriptors = bytearray()
        table_blocks = self._per_group * INODE // BLOCK
        inode_bitmaps = []
        for group in range(self._groups):
            taken = min(max(self._last - group * self._per_group, 0), self._per_group)
            bitmap = (1 << 8 * BLOCK) - (1 << self._per_group) + (1 << taken) - 1
            inode_bitmaps.append(bitmap.to_bytes(BLOCK, "little"))
            descriptors += _GROUP.pack(
                self._block_bitmaps + group, self._inode_bitmaps + group, self._table + group * table_blocks,
                free_blocks[group], self._per_group - taken, directories[group], 0, 0, 0, 0, 0, 0,
            )  # fmt: skip
        yield self._descriptors * BLOCK, bytes(descriptors)
        yield self._block_bitmaps * BLOCK, bytes(used)
        yield self._inode_bitmaps * BLOCK, b"".join(inode_bitmaps)

    def _identity(self) -> bytes:
        """32 bytes made from all names, owners, times, sizes and places, for the UUID and the hash seed."""
        digest = hashlib.sha256(struct.pack("<Q", self._total))
        for at, data in self._metadata:
            digest.update(struct.pack("<Q", at))
            digest.update(data)
        return digest.digest()

    def _superblock(self, identity: bytes) -> bytes:
        block = bytearray(1024)
        inodes = self._groups * self._per_group
        struct.pack_into(
            "<13I 6H 4I 2H", block, 0,
            inodes, self._total, 0, self._free_blocks, inodes - self._last, 0, 2, 2, GROUP_BLOCKS, GROUP_BLOCKS,
            self._per_group, 0, self._epoch & 0xFFFFFFFF,  # times of last mount and last write
            0, 0xFFFF, 0xEF53, 1, 2, 0,  # mounts, no forced check, magic, clean, on errors read-only, minor revision
            self._epoch & 0xFFFFFFFF, 0, 0, 1,  # last check, its interval, Linux, dynamic revision
            0, 0,
        )  # fmt: skip
        struct.pack_into("<IHH III", block, 84, _FIRST_INODE, INODE, 0, _COMPAT, _INCOMPAT, _RO_COMPAT)
        block[104:120] = _uuid(identity).bytes
        struct.pack_into("<I", block, 224, _JOURNAL_INODE)
        block[236:252] = identity[16:32]  # hash seed
        block[252] = 1  # half MD4, for directories that get an index later
        block[253] = 1  # a copy of where the journal is follows
        field_ = _block_field(self._journal).ljust(60, b"\0")
        block[268:336] = field_ + struct.pack("<II", 0, self._journal.size)
        struct.pack_into("<II", block, 264, self._epoch & 0xFFFFFFFF, 0)  # when it was made
        struct.pack_into("<HHI", block, 348, _EXTRA_ISIZE, _EXTRA_ISIZE, 2)  # hashes treat names as unsigned bytes
        block[372] = 4  # 16 groups in a flex group
        return bytes(block)


def _uuid(identity: bytes) -> uuid.UUID:
    return uuid.UUID(bytes=identity[:16], version=5)


def _journal_superblock(identity: bytes) -> bytes:
    """An empty journal (ext4/journal.rst): big-endian, version 2, nothing in it."""
    block = struct.pack(">III IIIII IIII", 0xC03B3998, 4, 0, BLOCK, _JOURNAL_BLOCKS, 1, 1, 0, 0, 0, 0, 0)
    block += _uuid(identity).bytes + struct.pack(">I", 1)  # one user: this filesystem
    return block.ljust(BLOCK, b"\0")


def _block_field(inode: _Inode) -> bytes:
    """i_block: extents, a short symbolic link, or a device number."""
    entry = inode.entry
    if entry.is_symlink and not inode.blocks:
        return entry.target.encode(errors="surrogateescape")
    if entry.is_device:
        major, minor = entry.major, entry.minor
        if major < 256 and minor < 256:
            return struct.pack("<II", major << 8 | minor, 0)
        return struct.pack("<II", 0, (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12)
    if not (entry.is_dir or entry.is_file or inode.blocks):
        return b""
    if inode.extent_blocks:
        indexes = [
            struct.pack("<IIHH", number * _BLOCK_EXTENTS * _EXTENT_BLOCKS, block, 0, 0)
            for number, block in enumerate(inode.extent_blocks)
        ]
        return _EXTENT_HEADER.pack(_EXTENT_MAGIC, len(indexes), _INLINE_EXTENTS, 1, 0) + b"".join(indexes)
    extents = _extents(inode)
    return _EXTENT_HEADER.pack(_EXTENT_MAGIC, len(extents), _INLINE_EXTENTS, 0, 0) + b"".join(extents)


def _extents(inode: _Inode) -> list[bytes]:
    return [
        _EXTENT.pack(logical, min(_EXTENT_BLOCKS, inode.blocks - logical), 0, inode.first + logical)
        for logical in range(0, inode.blocks, _EXTENT_BLOCKS)
    ]


def _stretch(entry: bytes, size: int) -> bytes:
    """A directory entry that reaches to the end of its block."""
    number, _, length, kind = _DIR_ENTRY.unpack_from(entry)
    return (_DIR_ENTRY.pack(number, size, length, kind) + entry[8:]).ljust(size, b"\0")


def _time(nanoseconds: int) -> tuple[int, int]:
    """The low 32 bits of the seconds, and the extra field: 2 more bits of them, and 30 of nanoseconds."""
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    if not _TIME_MIN <= seconds <= _TIME_MAX:
        seconds, rest = min(max(seconds, _TIME_MIN), _TIME_MAX), 0
    epoch = ((seconds - ((seconds + (1 << 31)) % (1 << 32) - (1 << 31))) >> 32) & 3
    return seconds & 0xFFFFFFFF, rest << 2 | epoch


# Extended attributes (ext4/attributes.rst)


def _xattr_entries(xattrs: Mapping[str, bytes], path: str) -> list[tuple[int, bytes, bytes]]:
    """(name index, name without its prefix, value), in the order in which a block must hold them."""
    entries = []
    for name, value in xattrs.items():
        if name in _ACLS:
            entries.append((_ACLS[name], b"", _acl(value, path)))
            continue
        for prefix, index in _XATTR_PREFIXES:
            if name.startswith(prefix):
                entries.append((index, name.removeprefix(prefix).encode(errors="surrogateescape"), value))
                break
        else:
            raise InputError(f"{quote(path)}: ext4 has no place for the extended attribute {quote(name)}")
    return sorted(entries, key=lambda item: (item[0], len(item[1]), item[1]))


def _pack_xattrs(entries: Sequence[tuple[int, bytes, bytes]], space: int, base: int) -> bytes | None:
    """Entries from the front and values from the end of `space` bytes; offsets count from `base` before them."""
    values_at = space
    heads = bytearray()
    area = bytearray(space)
    for index, name, value in entries:
        values_at -= len(value) + -len(value) % 4
        size = _XATTR_ENTRY.size + len(name) + -len(name) % 4
        if len(heads) + size + 4 > values_at:  # four zero bytes end the entries
            return None
        value_at = values_at + base if value else 0
        heads += _XATTR_ENTRY.pack(len(name), index, value_at, 0, len(value), _xattr_hash(name, value))
        heads += name.ljust(size - _XATTR_ENTRY.size, b"\0")
        area[values_at : values_at + len(value)] = value
    area[: len(heads)] = heads
    return bytes(area)


def _xattr_block(entries: Sequence[tuple[int, bytes, bytes]]) -> bytes | None:
    packed = _pack_xattrs(entries, BLOCK - 32, 32)
    if packed is None:
        return None
    total = 0
    for _, name, value in entries:
        total = (total << 16 ^ total >> 16 ^ _xattr_hash(name, value)) & 0xFFFFFFFF
    return struct.pack("<IIII", _XATTR_MAGIC, 1, 1, total).ljust(32, b"\0") + packed


def _xattr_hash(name: bytes, value: bytes) -> int:
    total = 0
    for byte in name:
        total = (total << 5 ^ total >> 27 ^ byte) & 0xFFFFFFFF
    padded = value + bytes(-len(value) % 4)
    for (word,) in struct.iter_unpack("<I", padded):
        total = (total << 16 ^ total >> 16 ^ word) & 0xFFFFFFFF
    return total


def _acl(value: bytes, path: str) -> bytes:
    """A POSIX ACL in ext4's short form (version 1) from the one that getxattr(2) gives (version 2)."""
    if len(value) < 4 or (len(value) - 4) % 8 or value[:4] != b"\2\0\0\0":
        raise InputError(f"{quote(path)}: a POSIX ACL that is none")
    short = bytearray(b"\1\0\0\0")
    for tag, permissions, identity in struct.iter_unpack("<HHI", value[4:]):
        short += struct.pack("<HH", tag, permissions)
        if tag in (0x02, 0x08):  # a named user or group
            short += struct.pack("<I", identity)
    return bytes(short)
