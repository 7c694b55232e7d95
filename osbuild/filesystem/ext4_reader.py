"""Reads an ext4 filesystem out of a file: its tree, where everything lies, and what is wrong with it.

Contents are not copied: they are slices of the file, and holes stay holes. Reading is linear in what is there: no inode
is visited twice, trees of blocks only go down, and nothing is allocated because a number in the image asks for it.

    superblock, descriptors      ext4_reader_head
    inodes, blocks, names        ext4_reader_inode
    the walk                     here
    bitmaps and counts           ext4_reader_check
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from osbuild.borrowed import Borrowed
from osbuild.errors import InputError
from osbuild.filesystem import ext4_reader_check as check
from osbuild.filesystem import ext4_reader_head as head
from osbuild.filesystem import ext4_reader_inode as inodes
from osbuild.filesystem import ext4_reader_journal as journal
from osbuild.filesystem.base import Place, Volume
from osbuild.filesystem.ext4_reader_head import DamageError, Disk, Group, Superblock
from osbuild.filesystem.ext4_reader_inode import Inode, Run
from osbuild.limits import BODY_COST, INODE_COST, PIECE_COST, XATTR_COST, Limits, text_cost
from osbuild.tree import EMPTY, PATH_MAX, Content, Entry, Slice, Sparse, Tree, directory, quote

ROOT: Final = 2
_PROBLEMS_MAX: Final = 100
_FAST_SYMLINK: Final = 60
_SHORT: Final = PATH_MAX // 4  # characters that cannot be more bytes than a path may have
_PIECE: Final = 1 << 18  # bytes of an inode table read at a time
_PIECES_KEPT: Final = 64
_TYPES: Final = {
    1: stat.S_IFREG, 2: stat.S_IFDIR, 3: stat.S_IFCHR, 4: stat.S_IFBLK, 5: stat.S_IFIFO, 6: stat.S_IFSOCK,
    7: stat.S_IFLNK,
}  # fmt: skip
_KINDS: Final = frozenset(_TYPES.values())


def read(descriptor: int, offset: int, size: int) -> Volume:
    """Everything in the filesystem at `offset` of an open file, of which `size` bytes are there.

    InputError when nothing can be made of it; smaller damage stands in Volume.problems, and what it concerns is left
    out of the tree.
    """
    disk = Disk(Borrowed(Path(f"/proc/self/fd/{descriptor}")), offset, size)
    problems: list[str] = []
    superblock = head.read_superblock(disk, problems)
    groups = head.read_groups(disk, superblock, problems)
    walk = Walk(disk, superblock, groups)
    tree = walk.tree()
    problems += walk.problems
    problems += check.accounts(disk, superblock, groups, walk.found, walk.claimed)
    if len(problems) > _PROBLEMS_MAX:
        problems[_PROBLEMS_MAX:] = [f"… and {len(problems) - _PROBLEMS_MAX} more problems"]
    return Volume(
        tree=tree,
        uuid=superblock.uuid,
        size=superblock.blocks * superblock.block_size,
        facts=head.facts(superblock),
        places=walk.places,
        problems=tuple(problems),
        regions=check.regions(superblock, groups, walk.belongings),
    )


class _Here:
    """Which inode it is, for messages: nearly none has one, and to spell it takes a while."""

    __slots__ = ("_number", "_path")

    def __init__(self, number: int, path: str) -> None:
        self._number = number
        self._path = path

    def __str__(self) -> str:
        return f"inode {self._number} {quote(self._path)}"


class Walk:
    """One walk from the root through every directory."""

    def __init__(self, disk: Disk, superblock: Superblock, groups: list[Group]) -> None:
        self.problems: list[str] = []
        self.places: dict[str, Place] = {}
        self.found: dict[int, check.Found] = {}  # inode -> how often it is named
        self.claimed: list[tuple[int, int, int]] = []  # blocks in use: first, count, inode
        self.belongings: list[tuple[int, int, int, str]] = []  # blocks no path leads to: first, count, inode, what
        self._disk = disk
        self._super = superblock
        self._groups = groups
        self._per_group = superblock.number("inodes_per_group")
        self._most = min(superblock.number("inodes_count"), len(groups) * self._per_group)
        self._mapper = inodes.Mapper(disk, superblock)
        self._entries: dict[int, tuple[Entry, Place]] = {}
        self._attribute_blocks: set[int] = set()
        self._pieces: dict[int, bytes] = {}  # of inode tables
        self._limits = Limits()
        self._memory = 0  # of what was found so far, estimated
        self._blocks = 0  # claimed so far

    def tree(self) -> Tree:
        """Everything that a path leads to."""
        made: dict[str, Entry] = {"/": directory()}
        self.places["/"] = Place(inode=ROOT)
        self._special()
        root = self._visit(ROOT, "/", _Here(ROOT, "/"))
        if root is None or not root.is_dir:
            self.problems.append("inode 2 '/' is no directory")
            return Tree(made)
        made["/"] = root
        self.places["/"] = self._entries[ROOT][1]
        todo = [("", ROOT, ROOT)]
        while todo:
            above, number, parent = todo.pop()
            for name, child, kind in self._names(number, above or "/", parent):
                path = f"{above}/{name}"
                found = self._child(path, child, kind, made)
                if found is None:
                    continue
                made[path] = found
                self.places[path] = self._entries[child][1]
                if found.is_dir:
                    self.found[number].children += 1
                    todo.append((path, child, number))
        return Tree(made)

    def _special(self) -> None:
        """Inodes without a name: the journal, quotas, orphans, room for more descriptors."""
        for field in ("journal_inum", "usr_quota_inum", "grp_quota_inum", "prj_quota_inum", "orphan_file_inum"):
            number = self._super.number(field)
            if number:
                self._claim_special(number, field)
        self._claim_special(1, "bad blocks")
        if self._super.has("compat", "resize_inode"):
            # It owns reserved descriptor blocks, which are counted with the descriptors, and one block of numbers.
            inode = self._inode(7, "inode 7")
            if inode is not None:
                (block,) = struct.unpack_from("<I", inode.block, 52)
                if block:
                    self.claimed.append((block, 1, 7))

    def _claim_special(self, number: int, what: str) -> None:
        if number in self.found:
            self.problems.append(f"inode {number} is the {what}, and something else")
            return
        inode = self._inode(number, f"inode {number} ({what})")
        if inode is None:
            return
        self.found[number] = check.Found(links=inode.links, names=inode.links, is_dir=False)
        runs = self._runs(inode, f"inode {number} ({what})")
        self._claim(inode, inode.claimed)
        self.belongings += [(run.physical, run.count, number, what.removesuffix("_inum")) for run in runs]
        if what == "journal_inum":
            self._check_journal(inode, runs)

    def _check_journal(self, inode: Inode, runs: list[Run]) -> None:
        size = self._super.block_size
        try:
            if not runs or runs[0].logical:
                raise DamageError("it has no blocks")
            block = self._disk.read(runs[0].physical * size, journal.SIZE)
            noted = list(journal.check(block, inode.size // size, size))
        except DamageError as damage:
            noted = [str(damage)]
        self.problems += [f"the journal (inode {inode.number}): {what}" for what in noted]

    def _child(self, path: str, number: int, kind: int, made: dict[str, Entry]) -> Entry | None:
        """The inode that a name leads to; None, with a problem noted, when it cannot be."""
        here = _Here(number, path)
        if path in made:
            self.problems.append(f"{here}: a second entry of this name")
            return None
        if len(path) > _SHORT and len(path.encode(errors="surrogateescape")) > PATH_MAX:
            self.problems.append(f"{str(here)[:200]}…: a path of more than {PATH_MAX} bytes")
            return None
        if number in self.found:
            self._spend(text_cost(path))
            if number not in self._entries:
                return None  # known to be bad, or one without a name
            known = self._entries[number][0]
            if known.is_dir:
                self.problems.append(f"{here}: a directory with two names")
                return None
            self.found[number].names += 1
            return known
        entry = self._visit(number, path, here)
        if entry is not None and kind and _TYPES.get(kind) != stat.S_IFMT(entry.mode):
            self.problems.append(f"{here}: its directory says that it has type {kind}, its mode is {entry.mode:#o}")
        return entry

    def _visit(self, number: int, path: str, here: _Here) -> Entry | None:
        """Read an inode for the first time."""
        found = self.found[number] = check.Found(names=1)
        inode = self._inode(number, here)
        if inode is None:
            return None
        found.links = inode.links
        self._spend(INODE_COST + 2 * text_cost(path))
        try:
            entry, place = self._entry(inode, here)
        except DamageError as damage:
            self.problems.append(f"{here}: {damage}")
            return None
        finally:
            if inode.claimed:
                self._claim(inode, inode.claimed)
                self.belongings += [(first, count, number, "") for first, count in inode.claimed]
        found.is_dir = stat.S_ISDIR(entry.mode)
        self._entries[number] = entry, place
        return entry

    def _entry(self, inode: Inode, here: _Here) -> tuple[Entry, Place]:
        noted: list[str] = []
        kind = stat.S_IFMT(inode.mode)
        if kind not in _KINDS:
            raise DamageError(f"its mode is {inode.mode:#o}, which is no type of file")
        if inode.flags & inodes.INLINE_DATA_FLAG:
            raise DamageError("its data lies in the inode, which this reader does not know")
        target, major, minor = "", 0, 0
        content: Content = EMPTY
        extents: tuple[tuple[int, int], ...] = ()
        if inode.file_acl and inode.file_acl not in self._attribute_blocks:  # equal ones may share a block
            self._attribute_blocks.add(inode.file_acl)
            inode.claimed.append((inode.file_acl, 1))
        attributes = inodes.xattrs(inode, self._disk, self._super, noted)
        if kind in (stat.S_IFCHR, stat.S_IFBLK):
            major, minor = _device(inode.block)
        elif kind == stat.S_IFLNK and self._is_fast(inode):
            target = _target(inode.block[: inode.size], inode.size)
        elif kind in (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK):
            runs = self._runs(inode, here)
            extents = self._places(runs, inode.size)
            if kind == stat.S_IFREG:
                content = self._content(inode, extents, runs)
            elif kind == stat.S_IFLNK:
                target = self._slow_target(inode, runs)
        if noted:
            self.problems += [f"{here}: {what}" for what in noted]
        if attributes:
            self._spend(sum(XATTR_COST + len(name) + len(value) for name, value in attributes.items()))
        entry = Entry(
            mode=inode.mode, uid=inode.uid, gid=inode.gid, mtime_ns=inode.mtime_ns, xattrs=attributes, target=target,
            major=major, minor=minor, content=content,
        )  # fmt: skip
        return entry, Place(inode=inode.number, extents=extents)

    # Blocks

    def _runs(self, inode: Inode, here: _Here | str) -> list[Run]:
        """An inode's runs, counted; what is wrong with its map is noted, and what was found before it stays."""
        noted: list[str] = []
        runs: list[Run] = []
        try:
            for run in self._mapper.runs(inode, noted):
                self._spend(PIECE_COST)
                self._claim(inode, ((run.physical, run.count),))
                runs.append(run)
        except DamageError as damage:
            noted.append(str(damage))
        if noted:
            self.problems += [f"{here}: {what}" for what in noted]
        return runs

    def _claim(self, inode: Inode, runs: Iterable[tuple[int, int]]) -> None:
        for first, count in runs:
            self._blocks += count
            self.claimed.append((first, count, inode.number))
        if self._blocks > 2 * self._super.blocks:
            raise InputError(f"inode {inode.number}: more blocks are in use than the {self._super.blocks} there are")

    def _places(self, runs: list[Run], size: int) -> tuple[tuple[int, int], ...]:
        """Where the data is: byte offset in the filesystem and bytes, neighbours joined, nothing beyond the end."""
        block = self._super.block_size
        if len(runs) == 1 and runs[0].written and not runs[0].logical and 0 < size <= runs[0].count * block:
            return ((runs[0].physical * block, size),)
        joined: list[tuple[int, int]] = []
        end = 0
        for run in runs:
            count = min(run.count * block, size - run.logical * block)
            if count <= 0 or not run.written:
                continue
            at = run.physical * block
            if joined and sum(joined[-1]) == at and end == run.logical:
                joined[-1] = joined[-1][0], joined[-1][1] + count
            else:
                joined.append((at, count))
            end = run.logical + run.count
        return tuple(joined)

    def _content(self, inode: Inode, extents: tuple[tuple[int, int], ...], runs: list[Run]) -> Content:
        block = self._super.block_size
        if inode.size > block << 32:
            raise DamageError(f"its size is {inode.size}, more than ext4 can hold")
        if not inode.size:
            return EMPTY
        for at, size in extents:
            if at + size > self._disk.size:
                raise DamageError("its bytes are beyond the end of what is there")
        self._spend(BODY_COST)
        if len(extents) == 1 and extents[0][1] == inode.size:
            return Slice(self._disk.backing, self._disk.offset + extents[0][0], inode.size)
        pieces: list[tuple[int, int, int]] = []
        for run in runs:
            start = run.logical * block
            size = min(run.count * block, inode.size - start)
            if size <= 0 or not run.written:
                continue
            source = self._disk.offset + run.physical * block
            if pieces and pieces[-1][0] + pieces[-1][2] == start and pieces[-1][1] + pieces[-1][2] == source:
                pieces[-1] = (pieces[-1][0], pieces[-1][1], pieces[-1][2] + size)
            else:
                pieces.append((start, source, size))
        return Sparse(self._disk.backing, inode.size, tuple(pieces))

    def _is_fast(self, inode: Inode) -> bool:
        """Whether a link's target lies in the inode: then no blocks but that of its attributes are counted."""
        own = self._super.block_size // 512 if inode.file_acl else 0
        return inode.size < _FAST_SYMLINK and inode.sectors == own

    def _slow_target(self, inode: Inode, runs: list[Run]) -> str:
        if not runs or runs[0].logical or not 0 < inode.size <= min(PATH_MAX, self._super.block_size):
            raise DamageError(f"a symbolic link of {inode.size} bytes whose target is nowhere")
        return _target(self._disk.read(runs[0].physical * self._super.block_size, inode.size), inode.size)

    # Directories

    def _names(self, number: int, path: str, parent: int) -> Iterator[tuple[str, int, int]]:
        """(name, inode, type) of everything in a directory but itself and the one above."""
        here = f"inode {number} {quote(path)}"
        inode = self._inode(number, here, quiet=True)
        assert inode is not None  # it was read before
        expected = [(b".", number), (b"..", parent)]
        noted: list[str] = []
        for index, data in self._blocks_of(inode, noted):
            try:
                for name, child, kind in inodes.names(data, index == 0, self._super):
                    if expected:
                        self._dots(here, expected.pop(0), (name, child))
                    else:
                        yield name.decode(errors="surrogateescape"), child, kind
            except DamageError as damage:
                noted.append(str(damage))
        if expected:
            noted.append("it has no entries for itself and for the directory above")
        self.problems += [f"{here}: {what}" for what in noted]

    def _dots(self, here: str, wanted: tuple[bytes, int], found: tuple[bytes, int]) -> None:
        if found != wanted:
            name = quote(found[0].decode(errors="surrogateescape"))
            self.problems.append(
                f"{here}: an entry {name} to inode {found[1]} stands where {quote(wanted[0].decode())} to inode "
                f"{wanted[1]} belongs"
            )

    def _blocks_of(self, inode: Inode, noted: list[str]) -> Iterator[tuple[int, bytes]]:
        """The blocks of a directory with their numbers; indexes among them look like entries of nothing."""
        size = self._super.block_size
        indexed = bool(inode.flags & inodes.INDEX_FLAG)
        following = 0
        if inode.size % size:
            noted.append(f"its size is {inode.size}, no multiple of {size}")
        last = -(-inode.size // size)
        try:
            for run in self._mapper.runs(inode, []):
                if run.logical != following and run.logical < last:
                    noted.append(f"its block {following} is a hole")
                following = run.logical + run.count
                for index in range(run.logical, min(run.logical + run.count, last)):
                    data = self._disk.read((run.physical + index - run.logical) * size, size)
                    if self._super.csum:
                        is_index = indexed and (index == 0 or data[:8] == struct.pack("<IHH", 0, size & 0xFFFF, 0))
                        inodes.check_directory_block(inode, data, index, is_index, noted)
                    yield index, data
        except DamageError as damage:
            if self._disk.size >= self._super.blocks * size:  # else it was said before
                noted.append(str(damage))
        if following < last:
            noted.append(f"it has {last} blocks, of which only {following} are mapped")

    # Inodes

    def _inode(self, number: int, here: _Here | str, *, quiet: bool = False) -> Inode | None:
        """An inode's fields, or None with the reason noted."""
        if not 0 < number <= self._most:
            self.problems.append(f"{here}: there is no inode of this number")
            return None
        noted: list[str] = []
        try:
            raw = self._raw(number)
        except DamageError as damage:
            self.problems.append(f"{here}: its inode: {damage}")
            return None
        inode = inodes.parse_inode(number, raw, self._super, noted)
        if noted and not quiet:
            self.problems += [f"{here}: {what}" for what in noted]
        return inode

    def _raw(self, number: int) -> bytes:
        group, index = divmod(number - 1, self._per_group)
        size = self._super.inode_size
        at = self._groups[group].inode_table * self._super.block_size + index * size
        piece = at // _PIECE
        data = self._pieces.get(piece)
        if data is None:
            if len(self._pieces) >= _PIECES_KEPT:
                self._pieces.clear()
            start = piece * _PIECE
            data = self._disk.read(start, max(0, min(_PIECE, self._disk.size - start)))
            self._pieces[piece] = data
        raw = data[at % _PIECE : at % _PIECE + size]
        return raw if len(raw) == size else self._disk.read(at, size)

    def _spend(self, size: int) -> None:
        self._memory += size
        if self._memory > 4 * self._limits.memory_bytes or len(self.found) > 4 * self._limits.entries:
            raise InputError("ext4 with more inodes, names and extents than fit into memory")


def _device(block: bytes) -> tuple[int, int]:
    """A device's numbers: both below 256 in the first word, else in the second."""
    old, new = struct.unpack_from("<II", block)
    if old:
        return old >> 8 & 0xFF, old & 0xFF
    return new >> 8 & 0xFFF, (new & 0xFF) | (new >> 12 & 0xFFF00)


def _target(data: bytes, size: int) -> str:
    if not data or len(data) != size or b"\0" in data:
        raise DamageError(f"a symbolic link whose target is {quote(data.decode(errors='surrogateescape'))}")
    return data.decode(errors="surrogateescape")
