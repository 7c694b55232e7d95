"""XFS through mkfs.xfs, an experiment: for those who need XFS, not for those who may choose.

mkfs.xfs fills a new filesystem from a "protofile": a line for each inode, contents from files of the host, which we
number. It knows neither times nor the sticky bit; so each line gets a serial number as owner, and afterwards every
inode is found by that number and given what it should have. So two runs of one mkfs.xfs come to the same bytes; another
version may place things otherwise.

What a protofile cannot say is refused by name: hard links, extended attributes, names with blanks.

Source: mkfs.xfs(8), xfs_protofile in it; "XFS Algorithms & Data Structures", 3rd edition (AGI, inode B+trees, inodes).
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.crc import crc32c
from osbuild.errors import BuildError, InputError, SpecError
from osbuild.filesystem.base import NO_ROOM, NOTHING, Room, encode_name, encode_target
from osbuild.tree import Content, Entry, Tree, copy_range, quote

BLOCK: Final = 4096
MIB: Final = 1 << 20
_LEAST: Final = 300 * MIB  # mkfs.xfs makes nothing smaller
_LOG: Final = 64 * MIB  # the log, and what mkfs.xfs keeps for itself
_FILE_MAX: Final = (1 << 31) - 1  # mkfs.xfs reads a file at once, and counts its bytes in an int
_INODE: Final = 512
_TARGET_MAX: Final = 1024  # bytes: a longer symbolic link is damage to xfs
_TYPES: Final[Mapping[int, str]] = {
    stat.S_IFREG: "-", stat.S_IFDIR: "d", stat.S_IFLNK: "l", stat.S_IFCHR: "c", stat.S_IFBLK: "b", stat.S_IFIFO: "p",
}  # fmt: skip
_TIME_MIN: Final = -(1 << 31) * 1_000_000_000
_TIME_MAX: Final = (1 << 64) - 1 + _TIME_MIN

# In the superblock and in an AG's inode header (AGI), big-endian
_SB_UUID: Final = slice(32, 48)
_AGI: Final = 2 * 512
_AGI_ROOT: Final = struct.Struct(">20xII")  # block in the AG, levels
_TREE_HEAD: Final = 56
_TREE_RECORD: Final = struct.Struct(">IIQ")  # first inode in the AG, holes and counts, which of the 64 are free
_CHUNK: Final = 64
# In an inode
_BIGTIME: Final = 1 << 3  # di_flags2
_CRC_AT: Final = 100


def mount_words(*, dax: bool) -> tuple[str, ...]:
    """Kernel words that mount it read-only as root (kata-contract 5.1)."""
    return ("rootflags=dax", "ro", "rootfstype=xfs") if dax else ("rootflags=ro", "rootfstype=xfs")


def plan(tree: Tree, *, start: int, epoch: int, dax: bool = True, room: Room = NO_ROOM, digest: str = "") -> Plan:
    """Choose a size; InputError for what a protofile cannot say. Where files lie is up to mkfs.xfs."""
    del start, dax  # it has no say in where mkfs.xfs puts files; all of them can be mapped
    skipped = tuple(path for path, entry in tree.items() if stat.S_IFMT(entry.mode) not in _TYPES)
    _check(tree)
    needed = _needed(tree) + room.free
    if room.size and room.size < needed:
        raise SpecError(f"xfs needs {needed} bytes for this tree; {room.size} are given")
    return Plan(size=room.size or needed, uuid=_uuid(digest or tree.digest()), skipped=skipped, tree=tree, epoch=epoch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What mkfs.xfs is going to be asked for."""

    size: int
    uuid: str
    skipped: tuple[str, ...]
    tree: Tree
    epoch: int

    @property
    def contents(self) -> Iterable[tuple[int, Content]]:
        """Nobody knows before mkfs.xfs has run."""
        return ()

    def write(
        self,
        descriptor: int,
        offset: int,
        done: Callable[[int], None] | None = None,
        there: Mapping[int, Content] = NOTHING,
    ) -> None:
        """Make it beside the temporary files, and copy what is not a hole; BuildError when mkfs.xfs fails."""
        del done, there  # it goes back and forth
        with tempfile.TemporaryDirectory(prefix="osbuilder-xfs-") as name:
            work = Path(name)
            entries = list(_down(self.tree))
            (work / "proto").write_bytes(b"\n".join(_protofile(entries, work)) + b"\n")
            # In there, by names of ours: a protofile cannot say a path with a blank in it.
            command.run(*_mkfs(self.uuid, self.size), cwd=work)
            image = os.open(work / "filesystem", os.O_RDWR | os.O_CLOEXEC)
            try:
                _settle(image, [entry for _, entry in entries], self.epoch)
                _copy(image, descriptor, offset)
            finally:
                os.close(image)


def _mkfs(identity: str, size: int) -> Sequence[str]:
    return (
        command.find("mkfs.xfs", package="xfsprogs"), "-q", "-p", "proto", "-d", f"file,name=filesystem,size={size}",
        "-m", f"uuid={identity},crc=1,reflink=0,rmapbt=0", "-i", f"size={_INODE}", "-b", f"size={BLOCK}",
    )  # fmt: skip


def _needed(tree: Tree) -> int:
    """Bytes that are surely enough: mkfs.xfs does not tell before it tries."""
    total = 0
    for path, entry in tree.items():
        body = max(entry.content.size, len(entry.target)) if entry.is_file or entry.is_symlink else 0
        total += body + -body % BLOCK + 2 * _INODE + 2 * (len(path) + 16)
        total += BLOCK if entry.is_dir else 0
    total = max(_LEAST, total + total // 20 + _LOG)
    return total + -total % MIB


def _uuid(digest: str) -> str:
    made = hashlib.sha256(b"xfs" + bytes.fromhex(digest)).digest()
    return str(uuid.UUID(bytes=made[:16], version=4))


def _check(tree: Tree) -> None:
    for entry, paths in tree.names().items():
        where = quote(paths[0])
        if len(paths) > 1:
            raise InputError(f"{where} and {quote(paths[1])}: mkfs.xfs makes no hard links", hint="take ext4 or erofs")
        if entry.xattrs:
            raise InputError(f"{where}: mkfs.xfs sets no extended attributes", hint="take ext4 or erofs")
        if entry.content.size > _FILE_MAX:
            raise InputError(f"{where}: {entry.content.size} bytes; mkfs.xfs copies files below 2 GiB only")
        name = paths[0].rpartition("/")[2]
        encode_name(name, paths[0])
        if entry.is_symlink:
            encode_target(entry, paths[0], _TARGET_MAX)
        if name == "$" or name.startswith(":") or _has_blank(name):
            raise InputError(f"{where}: mkfs.xfs cannot be told this name", hint="take ext4 or erofs")
        if entry.is_symlink and (_has_blank(entry.target) or entry.target.startswith(":")):
            raise InputError(f"{where}: mkfs.xfs cannot be told the target {quote(entry.target)}")


def _has_blank(text: str) -> bool:
    return any(letter in text for letter in " \t\n\v\f\r\0")


# The protofile


def _protofile(entries: Sequence[tuple[str, Entry]], work: Path) -> Iterator[bytes]:
    """Its lines: a serial number, from 1, stands where an owner should. Files' bytes are written beside it."""
    yield b"/\n0 0"
    depth = 0
    for serial, (path, entry) in enumerate(entries, start=1):
        above = 0 if path == "/" else path.count("/")
        yield from [b"$"] * (depth - above)
        depth = above
        words = [f"{_TYPES[stat.S_IFMT(entry.mode)]}--777 {serial} 0"]
        if entry.is_file:
            _write_body(work / str(serial), entry)
            words.append(str(serial))
        elif entry.is_symlink:
            words.append(entry.target)
        elif entry.is_device:
            words.append(f"{entry.major} {entry.minor}")
        name = "" if path == "/" else path.rpartition("/")[2] + " "
        yield (name + " ".join(words)).encode(errors="surrogateescape")
        depth += entry.is_dir
    yield from [b"$"] * depth


def _down(tree: Tree) -> list[tuple[str, Entry]]:
    """What is written, each after the directory that it lies in, and before anything outside of that."""
    known = ((path, entry) for path, entry in tree.items() if stat.S_IFMT(entry.mode) in _TYPES)
    return sorted(known, key=lambda item: [part for part in item[0].split("/") if part])


def _write_body(out: Path, entry: Entry) -> None:
    descriptor = os.open(out, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(descriptor, entry.content.size)
        entry.content.copy_to(descriptor, 0)
    finally:
        os.close(descriptor)


# What mkfs.xfs could not be told


def _settle(image: int, entries: Sequence[Entry], epoch: int) -> None:
    """Give every inode its owner, mode and times, and mkfs.xfs's own the time `epoch`."""
    found = 0
    for at in list(_inodes(image)):
        inode = bytearray(os.pread(image, _INODE, at))
        (serial,) = struct.unpack_from(">I", inode, 8)
        entry = entries[serial - 1] if 0 < serial <= len(entries) else None
        mtime = epoch * 1_000_000_000
        if entry is not None:
            found += 1
            struct.pack_into(">H", inode, 2, entry.mode)
            struct.pack_into(">II", inode, 8, entry.uid, entry.gid)
            mtime = mtime if entry.mtime_ns is None else min(max(entry.mtime_ns, _TIME_MIN), _TIME_MAX)
        if not struct.unpack_from(">Q", inode, 120)[0] & _BIGTIME:
            raise BuildError("this mkfs.xfs makes inodes whose times end in 2038", hint="xfsprogs 5.15 or later")
        stamp = mtime - _TIME_MIN
        struct.pack_into(">QQQ", inode, 32, stamp, stamp, stamp)  # accessed, modified, changed
        struct.pack_into(">Q", inode, 144, stamp)  # created
        struct.pack_into("<I", inode, _CRC_AT, 0)
        struct.pack_into("<I", inode, _CRC_AT, crc32c(bytes(inode), 0))
        os.pwrite(image, inode, at)
    if found != len(entries):
        raise BuildError(f"mkfs.xfs made {found} of {len(entries)} inodes")


def _inodes(image: int) -> Iterator[int]:
    """Where each inode in use lies: every AG has a B+tree of chunks of 64."""
    blocks, count = struct.unpack_from(">II", os.pread(image, 512, 0), 84)
    for base in range(0, blocks * count * BLOCK, blocks * BLOCK):
        root, levels = _AGI_ROOT.unpack_from(os.pread(image, 512, base + _AGI))
        yield from _chunks(image, base, root, levels)


def _chunks(image: int, base: int, block: int, levels: int) -> Iterator[int]:
    data = os.pread(image, BLOCK, base + block * BLOCK)
    (records,) = struct.unpack_from(">H", data, 6)
    if levels > 1:
        pointers = _TREE_HEAD + (BLOCK - _TREE_HEAD) // 8 * 4  # after room for as many keys
        for below in struct.unpack_from(f">{records}I", data, pointers):
            yield from _chunks(image, base, below, levels - 1)
        return
    for index in range(records):
        first, _, free = _TREE_RECORD.unpack_from(data, _TREE_HEAD + index * _TREE_RECORD.size)
        yield from (base + (first + number) * _INODE for number in range(_CHUNK) if not free >> number & 1)


def _copy(image: int, descriptor: int, offset: int) -> None:
    """Everything but the holes."""
    end = os.fstat(image).st_size
    at = 0
    while at < end:
        try:
            at = os.lseek(image, at, os.SEEK_DATA)
        except OSError:  # only a hole is left
            return
        following = os.lseek(image, at, os.SEEK_HOLE)
        copy_range(image, at, following - at, descriptor, offset + at)
        at = following
