"""One ext4 inode as it is found: its fields, where its data is, its attributes, the names in a directory.

    0     128 bytes that every inode has, i_block at 40: extents, block numbers, a short link, or a device number
    128   fields that large inodes have, as many bytes as extra_isize says
    …     extended attributes that fit here; more of them in a block of their own

Nothing is believed: every number is held against the filesystem's bounds before it is used, and trees only go down.

Source: Documentation/filesystems/ext4/ of the kernel (inodes.rst, ifork.rst, directory.rst, attributes.rst).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from osbuild.filesystem.ext4_reader_head import DamageError, Disk, Superblock, checksum
from osbuild.tree import quote

EXTENTS_FLAG: Final = 0x80000
INDEX_FLAG: Final = 0x1000
HUGE_FILE_FLAG: Final = 0x40000
INLINE_DATA_FLAG: Final = 0x10000000
_HEAD: Final = struct.Struct("<HHIIIIIHHIII60sIIIIHHHHHH")
_EXTRA: Final = struct.Struct("<HHIIIIIII")
_EXTENT_MAGIC: Final = 0xF30A
_EXTENT_HEADER: Final = struct.Struct("<HHHHI")
_EXTENT: Final = struct.Struct("<IHHI")
_INDEX: Final = struct.Struct("<IIHH")
_DEPTH_MAX: Final = 5
_LONGEST: Final = 32768  # blocks of an initialised extent; beyond that it is one that was never written
_XATTR_MAGIC: Final = 0xEA020000
_XATTR_HEAD: Final = struct.pack("<I", _XATTR_MAGIC)
_XATTR: Final = struct.Struct("<BBHIII")
_PREFIXES: Final = {1: "user.", 4: "trusted.", 6: "security.", 7: "system."}
_ACLS: Final = {2: "system.posix_acl_access", 3: "system.posix_acl_default"}
_DIRENT: Final = struct.Struct("<IHBB")
_TAIL: Final = 12  # bytes of the checksum's entry at the end of a directory's block

# name, offset, bytes: what a difference inside an inode is called
FIELDS: Final[tuple[tuple[str, int, int], ...]] = (
    ("mode", 0x0, 2), ("uid", 0x2, 2), ("size", 0x4, 4), ("atime", 0x8, 4), ("ctime", 0xC, 4), ("mtime", 0x10, 4),
    ("dtime", 0x14, 4), ("gid", 0x18, 2), ("links_count", 0x1A, 2), ("blocks_lo", 0x1C, 4), ("flags", 0x20, 4),
    ("version", 0x24, 4), ("block", 0x28, 60), ("generation", 0x64, 4), ("file_acl", 0x68, 4), ("size_high", 0x6C, 4),
    ("obso_faddr", 0x70, 4), ("blocks_high", 0x74, 2), ("file_acl_high", 0x76, 2), ("uid_high", 0x78, 2),
    ("gid_high", 0x7A, 2), ("checksum_lo", 0x7C, 2), ("reserved", 0x7E, 2), ("extra_isize", 0x80, 2),
    ("checksum_hi", 0x82, 2), ("ctime_extra", 0x84, 4), ("mtime_extra", 0x88, 4), ("atime_extra", 0x8C, 4),
    ("crtime", 0x90, 4), ("crtime_extra", 0x94, 4), ("version_hi", 0x98, 4), ("projid", 0x9C, 4),
    ("attributes inside", 0xA0, 0xFFFF),
)  # fmt: skip


@dataclass(slots=True)
class Inode:
    """The fields of one inode."""

    number: int
    raw: bytes
    mode: int
    uid: int
    gid: int
    size: int
    links: int
    flags: int
    sectors: int  # of 512 bytes, or blocks with HUGE_FILE_FLAG
    block: bytes  # i_block
    file_acl: int
    mtime_ns: int
    seed: int  # of the checksums of what belongs to it
    claimed: list[tuple[int, int]] = field(default_factory=list)  # blocks that it has besides its data: first, count


def parse_inode(number: int, raw: bytes, superblock: Superblock, problems: list[str]) -> Inode:
    """An inode's fields; what is odd about them goes into `problems`."""
    (
        mode, uid, size, _, _, mtime, _, gid, links, sectors, flags, _, block, generation, file_acl, size_high, _,
        sectors_high, acl_high, uid_high, gid_high, _, _,
    ) = _HEAD.unpack_from(raw)  # fmt: skip
    extra, mtime_extra = 0, 0
    if len(raw) > 128:
        extra, _, _, mtime_extra = _EXTRA.unpack_from(raw, 128)[:4]
        if extra > len(raw) - 128 or extra % 4:
            problems.append(f"extra_isize is {extra}, of {len(raw) - 128} bytes")
            extra = 0
    if extra < 12:
        mtime_extra = 0
    if mtime_extra >> 2 >= 1_000_000_000:
        problems.append(f"mtime has {mtime_extra >> 2} nanoseconds")
    seed = checksum(superblock.seed, struct.pack("<II", number, generation)) if superblock.csum else 0
    if superblock.csum and any(raw):  # one that was never used has none
        _check_inode(raw, extra, seed, problems)
    seconds = mtime - (mtime >> 31 << 32) + ((mtime_extra & 3) << 32)
    if superblock.wide:
        file_acl |= acl_high << 32
    return Inode(
        number, raw, mode, uid | uid_high << 16, gid | gid_high << 16, size | size_high << 32, links, flags,
        sectors | sectors_high << 32, block, file_acl, seconds * 1_000_000_000 + (mtime_extra >> 2), seed,
    )  # fmt: skip


def _check_inode(raw: bytes, extra: int, seed: int, problems: list[str]) -> None:
    wide = extra >= 4
    given = int.from_bytes(raw[124:126], "little") | (int.from_bytes(raw[130:132], "little") << 16 if wide else 0)
    if wide:
        wanted = checksum(seed, b"".join((raw[:124], b"\0\0", raw[126:130], b"\0\0", raw[132:])))
    else:
        wanted = checksum(seed, raw[:124], b"\0\0", raw[126:]) & 0xFFFF
    if given != wanted:
        problems.append(f"its checksum is {given:#010x}, its bytes give {wanted:#010x}")


# Where the data is


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks of a file that lie one after another."""

    logical: int
    physical: int
    count: int
    written: bool = True  # False: room was taken, and reads as zeros


class Mapper:
    """Finds an inode's blocks."""

    def __init__(self, disk: Disk, superblock: Superblock) -> None:
        self._disk = disk
        self._super = superblock
        self._size = superblock.block_size

    def runs(self, inode: Inode, problems: list[str]) -> Iterator[Run]:
        """All runs in order, each inside the filesystem. DamageError where the map itself cannot be followed."""
        if inode.flags & EXTENTS_FLAG:
            found = self._extents(inode, inode.block, None, 0, problems)
        else:
            found = self._mapped(inode)
        following = 0
        for run in found:
            if run.logical < following:
                raise DamageError(f"its block {run.logical} is mapped twice, or out of order")
            if run.physical <= self._super.first_block or run.physical + run.count > self._super.blocks:
                raise DamageError(
                    f"its blocks from {run.logical} are said to be at {run.physical} to {run.physical + run.count}, "
                    f"of {self._super.blocks}"
                )
            following = run.logical + run.count
            yield run

    def _extents(self, inode: Inode, node: bytes, depth: int | None, lowest: int, problems: list[str]) -> Iterator[Run]:
        magic, entries, most, here, _ = _EXTENT_HEADER.unpack_from(node)
        room = (len(node) - 12) // 12
        if magic != _EXTENT_MAGIC:
            raise DamageError(f"its extents begin with {magic:#06x}, not {_EXTENT_MAGIC:#06x}")
        if most > room or entries > most or here > _DEPTH_MAX or (depth is not None and here != depth):
            raise DamageError(f"its extents cannot be: {entries} of at most {most} in {room} places, at depth {here}")
        for at in range(12, 12 + 12 * entries, 12):
            if here:
                logical, low, high, _ = _INDEX.unpack_from(node, at)
                child = self._extent_block(inode, low | high << 32, problems)
                yield from self._extents(inode, child, here - 1, max(lowest, logical), problems)
            else:
                logical, count, high, low = _EXTENT.unpack_from(node, at)
                written = count <= _LONGEST
                count = count if written else count - _LONGEST
                if not count or logical < lowest:
                    raise DamageError(f"its extent at block {logical} has {count} blocks, in a branch from {lowest} on")
                yield Run(logical, low | high << 32, count, written)

    def _extent_block(self, inode: Inode, block: int, problems: list[str]) -> bytes:
        data = self._block(inode, block, "extents")
        if self._super.csum:
            end = 12 + 12 * int.from_bytes(data[4:6], "little")
            if end + 4 <= len(data):
                compare(data[end : end + 4], checksum(inode.seed, data[:end]), f"extents at {block}", problems)
        return data

    def _mapped(self, inode: Inode) -> Iterator[Run]:
        """The older way: twelve numbers of blocks, then of blocks full of numbers, and of blocks of such blocks."""
        numbers = struct.unpack("<15I", inode.block)
        last = -(-inode.size // self._size)
        logical = 0
        for depth, number in zip((*[0] * 12, 1, 2, 3), numbers, strict=True):
            if logical >= last:
                break
            yield from self._branch(inode, number, depth, logical, last)
            logical += (self._size // 4) ** depth

    def _branch(self, inode: Inode, number: int, depth: int, logical: int, last: int) -> Iterator[Run]:
        if not number or logical >= last:
            return
        if depth == 0:
            yield Run(logical, number, 1)
            return
        step = (self._size // 4) ** (depth - 1)
        data = self._block(inode, number, "block numbers")
        for index, (child,) in enumerate(struct.iter_unpack("<I", data)):
            yield from self._branch(inode, child, depth - 1, logical + index * step, last)

    def _block(self, inode: Inode, block: int, what: str) -> bytes:
        """One block of an inode's map."""
        # A block that leads to itself, or to one above it, ends here.
        if len(inode.claimed) > self._disk.size // self._size:
            raise DamageError(f"its {what} take more blocks than there are")
        data = read_block(self._disk, self._super, block, what)
        inode.claimed.append((block, 1))
        return data


def read_block(disk: Disk, superblock: Superblock, block: int, what: str) -> bytes:
    """One block that belongs to an inode besides its data."""
    if not superblock.first_block < block < superblock.blocks:
        raise DamageError(f"its {what} are said to be at block {block}, of {superblock.blocks}")
    return disk.read(block * superblock.block_size, superblock.block_size)


def compare(given: bytes, wanted: int, what: str, problems: list[str]) -> None:
    """Note a checksum that is not what it should be."""
    number = int.from_bytes(given, "little")
    if number != wanted:
        problems.append(f"the checksum of its {what} is {number:#010x}, its bytes give {wanted:#010x}")


# Extended attributes


def xattrs(inode: Inode, disk: Disk, superblock: Superblock, problems: list[str]) -> dict[str, bytes]:
    """All attributes, those of the inode and those of its block, as getxattr(2) gives them."""
    found: dict[str, bytes] = {}
    raw = inode.raw
    start = 128 + int.from_bytes(raw[128:130], "little") if len(raw) > 128 else len(raw)
    if raw[start : start + 4] == _XATTR_HEAD:
        area = raw[start + 4 :]
        _entries(area, 0, area, found)
    if inode.file_acl:
        block = read_block(disk, superblock, inode.file_acl, "extended attributes")
        magic, _, count = struct.unpack_from("<III", block)
        if magic != _XATTR_MAGIC or count != 1:
            raise DamageError(f"the block of its extended attributes begins with {magic:#010x} and has {count} blocks")
        if superblock.csum:
            where = struct.pack("<Q", inode.file_acl)
            wanted = checksum(superblock.seed, where, block[:16], bytes(4), block[20:])
            compare(block[16:20], wanted, f"extended attributes at {inode.file_acl}", problems)
        _entries(block, 32, block, found)
    return found


def _entries(area: bytes, at: int, values: bytes, found: dict[str, bytes]) -> None:
    """Entries from `at` on until four zero bytes; where a value is counts from the start of `values`."""
    while area[at : at + 4] not in (b"\0\0\0\0", b""):
        if at + _XATTR.size > len(area):
            raise DamageError("its extended attributes do not end")
        length, index, offset, inum, size, _ = _XATTR.unpack_from(area, at)
        name = area[at + _XATTR.size : at + _XATTR.size + length]
        if inum or len(name) < length or (size and (offset < at or offset + size > len(values))):
            raise DamageError(f"its extended attribute {quote(name.decode(errors='surrogateescape'))} reaches outside")
        key, value = _spelled(index, name, values[offset : offset + size])
        if key in found:
            raise DamageError(f"it has the extended attribute {quote(key)} twice")
        found[key] = value
        at += _XATTR.size + length + -length % 4


def _spelled(index: int, name: bytes, value: bytes) -> tuple[str, bytes]:
    text = name.decode(errors="surrogateescape")
    if index in _ACLS:
        if name:
            raise DamageError(f"it has an ACL called {quote(text)}")
        return _ACLS[index], _long_acl(value)
    if index not in _PREFIXES:
        raise DamageError(f"it has an extended attribute {quote(text)} of the unknown kind {index}")
    return _PREFIXES[index] + text, value


def _long_acl(value: bytes) -> bytes:
    """A POSIX ACL as getxattr(2) gives it, version 2, from ext4's short form, version 1."""
    if value[:4] != b"\1\0\0\0":
        raise DamageError("it has an ACL of an unknown version")
    made = bytearray(b"\2\0\0\0")
    at = 4
    while at < len(value):
        if at + 4 > len(value):
            raise DamageError("its ACL is cut off")
        tag, permissions = struct.unpack_from("<HH", value, at)
        at += 4
        who = 0xFFFFFFFF
        if tag in (0x02, 0x08):  # a named user or group
            if at + 4 > len(value):
                raise DamageError("its ACL is cut off")
            (who,) = struct.unpack_from("<I", value, at)
            at += 4
        made += struct.pack("<HHI", tag, permissions, who)
    return bytes(made)


# Directories


def names(block: bytes, first: bool, superblock: Superblock) -> Iterator[tuple[bytes, int, int]]:
    """(name, inode, file type) of every entry in one block of a directory; DamageError at the first bad one."""
    at = 0
    end = len(block)
    if superblock.csum and block[end - 12 :][:8] == b"\0\0\0\0\x0c\0\0\xde":
        end -= _TAIL
    typed = superblock.typed
    while at < end:
        if at + 8 > end:
            raise DamageError(f"its entry at {at} of a block is cut off")
        number, size, length, kind = _DIRENT.unpack_from(block, at)
        if size in (0, 0xFFFF) and len(block) == 65536:
            size = 65536
        if not typed:
            length, kind = length | kind << 8, 0
        if size % 4 or size < 8 + length or at + size > end + (_TAIL if number == 0 else 0):
            raise DamageError(f"its entry at {at} of a block has {size} bytes and a name of {length}")
        name = block[at + 8 : at + 8 + length]
        if number:
            dots = first and at <= 12
            if not name or b"/" in name or b"\0" in name or (not dots and name in (b".", b"..")):
                raise DamageError(
                    f"its entry at {at} of a block is called {quote(name.decode(errors='surrogateescape'))}"
                )
            yield name, number, kind
        at += size


def check_directory_block(inode: Inode, block: bytes, logical: int, indexed: bool, problems: list[str]) -> None:
    """The checksum of one block of a directory: of names at its end, of an index after its last place."""
    what = f"block {logical}"
    if indexed:
        count_at = 32 if logical == 0 else 8
        limit, count = struct.unpack_from("<HH", block, count_at)
        tail = count_at + 8 * limit
        if tail + 8 > len(block) or count > limit:
            problems.append(f"the index in its {what} has {count} of {limit} places")
            return
        wanted = checksum(inode.seed, block[: count_at + 8 * count], block[tail : tail + 4], bytes(4))
        compare(block[tail + 4 : tail + 8], wanted, what, problems)
    elif block[-12:-4] != b"\0\0\0\0\x0c\0\0\xde":
        problems.append(f"its {what} has no checksum")
    else:
        compare(block[-4:], checksum(inode.seed, block[:-12]), what, problems)
