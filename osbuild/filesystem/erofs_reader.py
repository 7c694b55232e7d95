"""Everything in an erofs image, without mounting it: what is damaged is said and left out; it may be hostile.

Files that are compressed are left out, too; the rest of an image with such files is read.
"""

from __future__ import annotations

import struct
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild.borrowed import Borrowed
from osbuild.errors import InputError
from osbuild.filesystem import erofs_format as disk
from osbuild.filesystem.base import Place, Region, Volume
from osbuild.filesystem.erofs_format import BLOCK
from osbuild.filesystem.erofs_inodes import DamageError, Image, Inode, Inodes
from osbuild.limits import DIRECTORY_COST, text_cost
from osbuild.tree import DEPTH_MAX, NAME_MAX, PATH_MAX, Entry, Tree, quote

_SECOND: Final = 1_000_000_000
_PLACE_COST: Final = 256  # bytes of memory, as in osbuild.limits
_PROBLEMS_MAX: Final = 1000  # that are said
_LINKS_MANY: Final = 1  # what other filesystems say for too many to count
_COMPATIBLE: Final = ((0x1, "sb_csum"), (0x2, "mtime"), (0x4, "xattr_filter"))
_INCOMPATIBLE: Final = (
    (0x1, "0padding"), (0x2, "compr_cfgs"), (0x4, "chunked_file"), (0x8, "device_table"), (0x10, "ztailpacking"),
    (0x20, "fragments"), (0x40, "xattr_prefixes"),
)  # fmt: skip
_KNOWN: Final = 0x7F


def read(descriptor: int, offset: int, size: int) -> Volume:
    """Everything in the erofs at `offset` of an open file, of which `size` bytes are there.

    InputError when nothing can be made of it; smaller damage stands in Volume.problems.
    """
    # Opened again by this name it is ours: it stays open as long as contents that lie in it are used.
    image = Image(Borrowed(Path(f"/proc/self/fd/{descriptor}")), offset, size)
    return _Reader(image).volume()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Super:
    """What the superblock says that reading needs."""

    root: int
    inodes: int
    mtime_ns: int
    blocks: int
    metadata: int
    shared: int
    uuid: str
    packed: int


class _Reader:
    def __init__(self, image: Image) -> None:
        self._image = image
        self._problems: list[str] = []
        self._unsaid = 0
        self._facts: dict[str, str] = {}
        try:
            self._super = self._superblock()
        except DamageError:
            raise InputError(f"an erofs of {image.size} bytes, which is not even a superblock") from None
        self._inodes = Inodes(
            image, metadata=self._super.metadata * BLOCK, shared=self._super.shared * BLOCK,
            mtime_ns=self._super.mtime_ns,
        )  # fmt: skip
        self._known: dict[int, Inode | None] = {}  # None: damaged
        self._names: Counter[int] = Counter()  # of each inode
        self._room = image.size  # bytes of directories that may still be read: two could lie in one place
        self._entries: dict[str, Entry] = {}
        self._places: dict[str, Place] = {}

    def volume(self) -> Volume:
        """Walk from the root, then compare what was found with what was said."""
        found = self._super
        try:
            root = self._inodes.read(found.root)
        except DamageError as problem:
            raise InputError(f"the root of this erofs (inode {found.root}): {problem}") from None
        if not root.entry.is_dir:
            raise InputError(f"the root of this erofs (inode {found.root}) is no directory")
        self._known[root.nid] = root
        self._keep("/", root)
        todo = [("", root, root, 0)]
        while todo:
            path, here, above, depth = todo.pop()
            todo += [(name, child, here, depth + 1) for name, child in self._directory(path, here, above, depth)]
        count = sum(inode is not None for inode in self._known.values())
        if count != found.inodes and not found.packed:
            self._say(f"the superblock says {found.inodes} inodes, {count} were found")
        for nid, inode in self._known.items():
            if inode is not None and not inode.entry.is_dir and inode.links != self._names[nid]:
                self._say(f"inode {nid}: {inode.links} links, but {self._names[nid]} names")
        if self._unsaid:
            self._problems.append(f"{self._unsaid} more problems")
        return Volume(
            tree=Tree(self._entries), uuid=found.uuid, size=found.blocks * BLOCK, facts=self._facts,
            places=self._places, problems=tuple(self._problems), regions=tuple(self._regions()),
        )  # fmt: skip

    def _say(self, problem: str) -> None:
        if len(self._problems) < _PROBLEMS_MAX:
            self._problems.append(problem)
        else:
            self._unsaid += 1

    # The superblock

    def _superblock(self) -> _Super:
        block = self._image.bytes(disk.SUPERBLOCK_AT, BLOCK - disk.SUPERBLOCK_AT)
        (
            magic, checksum, compatible, bits, _, root, inodes, seconds, nanoseconds, blocks, metadata, shared,
            identity, label, incompatible, _, devices, _, directory_bits, _, _, packed, _, _,
        ) = disk.SUPERBLOCK.unpack_from(block)  # fmt: skip
        if magic != disk.MAGIC:
            raise InputError(f"no erofs: its superblock begins with {magic:#010x}")
        if bits != disk.BLOCK_BITS or directory_bits:
            raise InputError(
                f"an erofs with blocks of 2^{bits} and 2^{bits + directory_bits} bytes; only 4096 are read"
            )
        if incompatible & ~_KNOWN:
            raise InputError(f"an erofs with features that this reader does not know: {incompatible & ~_KNOWN:#x}")
        if devices:
            raise InputError(f"an erofs with {devices} other devices, on which its contents lie")
        if compatible & disk.HAS_CHECKSUM and checksum != disk.checksum(block):
            self._say(f"the superblock's checksum is {checksum:#010x}, but must be {disk.checksum(block):#010x}")
        if blocks * BLOCK > self._image.size:
            self._say(f"the superblock says {blocks * BLOCK} bytes, {self._image.size} are there")
        names = [name for bit, name in _COMPATIBLE if compatible & bit]
        names += [name for bit, name in _INCOMPATIBLE if incompatible & bit]
        self._facts |= {
            "blocks": str(blocks),
            "block size": str(BLOCK),
            "built": f"{seconds}.{nanoseconds:09}",
            "features": " ".join(names),
            "inodes": str(inodes),
            "label": label.rstrip(b"\0").decode(errors="backslashreplace"),
            "metadata block": str(metadata),
            "root inode": str(root),
            "attribute block": str(shared),
            "checksum": f"{checksum:#010x}" if compatible & disk.HAS_CHECKSUM else "none",
        }
        return _Super(
            root=root, inodes=inodes, mtime_ns=seconds * _SECOND + nanoseconds, blocks=blocks, metadata=metadata,
            shared=shared, uuid=str(uuid.UUID(bytes=identity)), packed=packed,
        )  # fmt: skip

    def _regions(self) -> Iterator[Region]:
        """What no path names: the superblock, the blocks with inodes in them, those with shared attributes."""
        yield Region(
            offset=disk.SUPERBLOCK_AT, size=disk.SUPERBLOCK.size, name="superblock",
            record=disk.SUPERBLOCK.size, fields=tuple(_superblock_fields()),
        )  # fmt: skip
        kinds = dict.fromkeys(self._inodes.shared_blocks, "shared attributes")
        kinds |= dict.fromkeys(self._inodes.blocks, "inodes")
        runs: list[tuple[int, int, str]] = []  # first block, blocks, what they are
        for block, kind in sorted(kinds.items()):
            if runs and runs[-1][0] + runs[-1][1] == block and runs[-1][2] == kind:
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, kind)
            else:
                runs.append((block, 1, kind))
        for block, count, kind in runs:
            begin = max(block * BLOCK, disk.SUPERBLOCK_AT + disk.SUPERBLOCK.size)
            size = (block + count) * BLOCK - begin
            if kind == "inodes":
                first = (begin - self._super.metadata * BLOCK) // disk.SLOT
                yield Region(offset=begin, size=size, name=kind, of="inode", record=disk.SLOT, first=first)
            else:
                yield Region(offset=begin, size=size, name=kind)

    # Directories

    def _directory(self, path: str, here: Inode, above: Inode, depth: int) -> list[tuple[str, Inode]]:
        """Keep what lies in a directory; those in it that are directories still have to be read."""
        found = []
        shown = quote(path or "/")
        dots = {b".": here.nid, b"..": above.nid}
        last = b""
        for name, nid, kind in self._listing(here, shown):
            if name <= last:
                self._say(f"{shown}: {_quoted(name)} stands behind {_quoted(last)}, where nobody finds it")
            last = name
            if name in (b".", b".."):
                if dots.pop(name, -1) != nid:
                    self._say(f"{shown}: {_quoted(name)} is inode {nid}")
                continue
            child = self._child(path, name, nid, depth)
            if child is None:
                continue
            inode, full = child
            if disk.FILE_TYPES[inode.entry.mode & 0o170000] != kind:
                self._say(f"{quote(full)}: a file of type {inode.entry.mode:o}, but {kind} in its directory")
            self._keep(full, inode)
            if inode.entry.is_dir:
                found.append((full, inode))
        for missing in dots:
            self._say(f"{shown}: no {_quoted(missing)} in it")
        if here.links not in (2 + len(found), _LINKS_MANY):
            self._say(f"{shown}: {here.links} links, but {len(found)} directories in it")
        return found

    def _child(self, path: str, name: bytes, nid: int, depth: int) -> tuple[Inode, str] | None:
        full = f"{path}/{name.decode(errors='surrogateescape')}"
        if not 0 < len(name) <= NAME_MAX or b"/" in name or b"\0" in name:
            self._say(f"{quote(full)}: a name that no file can have")
            return None
        if depth >= DEPTH_MAX or len(full) > PATH_MAX or len(full.encode(errors="surrogateescape")) > PATH_MAX:
            self._say(f"{quote(full[:100])}…: a path that is too long")
            return None
        if full in self._entries:
            self._say(f"{quote(full)}: twice in its directory")
            return None
        inode = self._inode(nid, full)
        if inode is None:
            return None
        if inode.entry.is_dir and self._names[nid]:
            self._say(f"{quote(full)}: a directory with two names")
            return None
        return inode, full

    def _inode(self, nid: int, path: str) -> Inode | None:
        if nid not in self._known:
            try:
                self._known[nid] = self._inodes.read(nid)
            except DamageError as problem:
                self._known[nid] = None
                self._say(f"{quote(path)}: {problem}")
        return self._known[nid]

    def _keep(self, path: str, inode: Inode) -> None:
        self._image.take(text_cost(path) + _PLACE_COST + (DIRECTORY_COST if inode.entry.is_dir else 0))
        self._names[inode.nid] += 1
        self._entries[path] = inode.entry
        extents = tuple((place, size) for _, place, size in inode.pieces) if inode.entry.is_file else ()
        self._places[path] = Place(inode=inode.nid, extents=extents)

    def _listing(self, inode: Inode, shown: str) -> Iterator[tuple[bytes, int, int]]:
        """Name, inode and type of everything in a directory."""
        self._room -= inode.size
        if self._room < 0:
            raise InputError("the directories of this erofs are larger than itself")
        for _, place, size in inode.pieces:
            for at in range(place, place + size, BLOCK):
                length = min(BLOCK, place + size - at)
                try:
                    yield from _names_in(self._image.bytes(at, length))
                except DamageError as problem:
                    self._say(f"{shown}: {problem}")


def _names_in(block: bytes) -> Iterator[tuple[bytes, int, int]]:
    """The entries of one block of a directory; the last name ends with the block, or with a zero."""
    if len(block) < disk.DIRENT.size:
        raise DamageError(f"a block of {len(block)} bytes")
    _, begin, _, _ = disk.DIRENT.unpack_from(block)
    count, odd = divmod(begin, disk.DIRENT.size)
    if odd or not count or begin > len(block):
        raise DamageError(f"a block whose names begin at {begin}")
    heads = [disk.DIRENT.unpack_from(block, index * disk.DIRENT.size) for index in range(count)]
    ends = [head[1] for head in heads[1:]] + [len(block)]
    for (nid, start, kind, _), end in zip(heads, ends, strict=True):
        if not begin <= start <= end <= len(block):
            raise DamageError(f"a name from {start} to {end} in a block")
        name = block[start:end]
        yield (name if end < len(block) else name.rstrip(b"\0").partition(b"\0")[0]), nid, kind


def _superblock_fields() -> Iterator[tuple[str, int, int]]:
    at = 0
    for name, form in disk.SUPERBLOCK_FIELDS:
        size = struct.calcsize("<" + form)
        yield name, at, size
        at += size


def _quoted(name: bytes) -> str:
    return quote(name.decode(errors="surrogateescape"))
