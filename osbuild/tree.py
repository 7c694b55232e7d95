"""A root filesystem as a value: sorted absolute paths, each with its inode.

Nothing here touches the host's filesystem by a path that an image chose. File bodies stay where they are (a slice of
an unlinked spool file, or bytes in memory) until a writer asks for them.

Two paths that map to the *same* Entry object are hard links of one inode; equal but separate entries are two inodes.
"""

from __future__ import annotations

import hashlib
import stat
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from stat import S_ISDIR, S_ISREG
from types import MappingProxyType
from typing import Final

from osbuild.content import EMPTY as EMPTY
from osbuild.content import Backing as Backing
from osbuild.content import Bytes as Bytes
from osbuild.content import Content as Content
from osbuild.content import Slice as Slice
from osbuild.content import Sparse as Sparse
from osbuild.content import Spool as Spool
from osbuild.content import copy_range as copy_range
from osbuild.content import digests, stored
from osbuild.content import quote as quote
from osbuild.content import write_all as write_all
from osbuild.errors import InputError

PATH_MAX: Final = 4095  # bytes, as the kernel counts them without the NUL
NAME_MAX: Final = 255  # bytes of one component
DEPTH_MAX: Final = 2000  # directories above each other
LINK_HOPS: Final = 40  # symbolic links followed for one path, as in the kernel
ID_MAX: Final = (1 << 32) - 2  # 2^32-1 means "no id" to chown(2)

_KNOWN_MAX: Final = 512  # ways remembered at a time: archives are in the order of directories, mostly
_PARTS: Final = 4096  # of a digest's bytes, at a time
_NO_XATTRS: Final[Mapping[str, bytes]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Entry:
    """One inode. `mode` is st_mode, type included; a field that the type does not use keeps its default."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int | None = None  # None: a directory that exists only because something lies in it
    xattrs: Mapping[str, bytes] = field(default_factory=lambda: _NO_XATTRS)
    target: str = ""
    major: int = 0
    minor: int = 0
    content: Content = EMPTY

    @property
    def is_dir(self) -> bool:
        return S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return S_ISREG(self.mode)

    @property
    def is_symlink(self) -> bool:
        return stat.S_ISLNK(self.mode)

    @property
    def is_device(self) -> bool:
        return stat.S_ISCHR(self.mode) or stat.S_ISBLK(self.mode)


def directory(permissions: int = 0o755, *, mtime_ns: int | None = None, uid: int = 0, gid: int = 0) -> Entry:
    """A directory's inode."""
    return Entry(mode=stat.S_IFDIR | permissions, uid=uid, gid=gid, mtime_ns=mtime_ns)


def regular(data: bytes | Content, permissions: int = 0o644, *, mtime_ns: int = 0) -> Entry:
    """A regular file's inode, owned by root."""
    content = Bytes(data) if isinstance(data, bytes) else data
    return Entry(mode=stat.S_IFREG | permissions, mtime_ns=mtime_ns, content=content)


def symlink(target: str, *, mtime_ns: int = 0) -> Entry:
    """A symbolic link's inode, owned by root."""
    return Entry(mode=stat.S_IFLNK | 0o777, mtime_ns=mtime_ns, target=target)


def device(kind: int, permissions: int, major: int, minor: int, *, mtime_ns: int = 0) -> Entry:
    """A device node's inode; `kind` is stat.S_IFCHR or stat.S_IFBLK."""
    return Entry(mode=kind | permissions, mtime_ns=mtime_ns, major=major, minor=minor)


class Tree(Mapping[str, Entry]):
    """An immutable mapping from absolute path to inode, in the order of the paths; "/" is always there."""

    __slots__ = ("_digest", "_entries")

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = {path: entries[path] for path in sorted(entries)}
        self._digest = ""

    def __getitem__(self, path: str) -> Entry:
        return self._entries[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, path: object) -> bool:
        return path in self._entries

    def edit(self) -> Draft:
        """A mutable copy, for functions from tree to tree."""
        draft = Draft()
        draft.fill(self._entries)
        return draft

    def names(self) -> Mapping[Entry, list[str]]:
        """Each inode with all its paths, in the order of the first of them."""
        found: dict[Entry, list[str]] = {}
        for path, entry in self._entries.items():
            found.setdefault(entry, []).append(path)
        return found

    def stored_size(self) -> int:
        """Bytes of all files, each once, without their holes: what an image of them takes at least."""
        return sum(stored(entry.content) for entry in self.names())

    def digest(self, known: dict[Content, bytes] | None = None) -> str:
        """sha256 in hex over everything that a guest could see: paths, inodes, hard links, bytes. Computed once.

        known: digests of contents, for trees that share some; what is missing is added.
        """
        if not self._digest:
            self._digest = self._compute_digest({} if known is None else known)
        return self._digest

    def _compute_digest(self, known: dict[Content, bytes]) -> str:
        digests((entry.content for entry in self._entries.values() if entry.is_file), known)
        total = hashlib.sha256()
        numbers: dict[Entry, int] = {}
        parts: list[bytes] = []
        for path, entry in self._entries.items():
            number = numbers.setdefault(entry, len(numbers))
            content, xattrs = entry.content, entry.xattrs
            fields = (
                path, number, entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.target,
                entry.major, entry.minor, sorted(xattrs.items()) if xattrs else [], content.size,
            )  # fmt: skip
            # Not repr(): which characters that writes as they are depends on the Unicode tables of each Python.
            parts.append(ascii(fields).encode() + b"\n")
            if number == len(numbers) - 1 and S_ISREG(entry.mode):
                parts.append(known[content])
            if len(parts) >= _PARTS:  # to hash each by itself takes twice as long
                total.update(b"".join(parts))
                parts.clear()
        total.update(b"".join(parts))
        return total.hexdigest()


def without_sockets(tree: Tree) -> Tree:
    """What a filesystem holds of a tree: nothing listens on a socket in an image. The same tree when it has none."""
    if not any(stat.S_ISSOCK(entry.mode) for entry in tree.values()):
        return tree
    return Tree({path: entry for path, entry in tree.items() if not stat.S_ISSOCK(entry.mode)})


class _Directory(dict[str, "_Directory | Entry"]):
    """A directory while it is being put together: what lies in it, and its inode."""

    __slots__ = ("entry",)

    def __init__(self, entry: Entry) -> None:
        self.entry = entry


class _MissingError(InputError):
    """A path leads nowhere."""


class _LoopError(_MissingError):
    """A path leads through too many symbolic links."""


class Draft:
    """A tree being made or changed. Symbolic links in the middle of a path are followed inside the tree only."""

    def __init__(self, *, link_hops: int = LINK_HOPS, depth: int = DEPTH_MAX, steps: int = sys.maxsize) -> None:
        self._root = _Directory(directory())
        self._known: dict[str, _Directory] = {}  # parents found lately, by path as written
        self._link_hops = link_hops
        self._depth = depth
        self._steps = steps  # names that may still be looked up
        self.room = sys.maxsize  # directories that may still be made because something is to lie in them

    def tree(self) -> Tree:
        """What it is now, as a value."""
        entries = {"/": self._root.entry}
        todo = [("", self._root)]
        while todo:
            above, parent = todo.pop()
            for name, child in parent.items():
                path = f"{above}/{name}"
                if isinstance(child, _Directory):
                    entries[path] = child.entry
                    todo.append((path, child))
                else:
                    entries[path] = child
        return Tree(entries)

    def check(self, *, path_bytes: int, total_bytes: int) -> None:
        """InputError when links have made a path too long, or too deep, or all of them together too much to hold."""
        total = 0
        todo = [("/", 0, 0, self._root)]
        while todo:
            where, length, depth, parent = todo.pop()
            if depth > self._depth:
                raise InputError(f"{quote(where)}: more than {self._depth} directories above each other")
            total += (length + 1) * len(parent) + sum(map(len, parent))
            if total > total_bytes:
                raise InputError(f"{quote(where)}: all paths together have more than {total_bytes} bytes")
            close = length + 1 + 4 * NAME_MAX > path_bytes
            for name, child in parent.items():
                if close and length + 1 + len(name.encode(errors="surrogateescape")) > path_bytes:
                    raise InputError(f"{quote(name)}: through symbolic links a path of more than {path_bytes} bytes")
                if isinstance(child, _Directory):
                    size = len(name) if name.isascii() else len(name.encode(errors="surrogateescape"))
                    todo.append((name, length + 1 + size, depth + 1, child))

    def fill(self, entries: Mapping[str, Entry]) -> None:
        """Place them all, as `put` does; in the order of the paths it is quicker, while each lies in a directory of
        theirs.
        """
        known = {"": self._root}
        quick = True
        for path, entry in entries.items():
            above, _, name = path.rpartition("/")
            parent = known.get(above) if quick and name else None
            if parent is None or name in parent:
                # What goes through a symbolic link may take away a directory that is known here.
                quick = quick and not name
                self.put(path, entry)
            elif not S_ISDIR(entry.mode):
                parent[name] = entry
            else:
                parent[name] = known[path] = _Directory(entry)

    def put(self, path: str, entry: Entry) -> None:
        """Place an inode. A directory over a directory keeps what lies in it; anything else is replaced whole."""
        above, _, name = path.rpartition("/")
        self.put_into(above, name, entry)

    def put_into(self, above: str, name: str, entry: Entry) -> None:
        """The same for a path in two parts; both empty for the root."""
        if not name:
            if not entry.is_dir:
                raise InputError("'/': the root must be a directory")
            self._root.entry = entry
            return
        parent = self._known.get(above)
        if parent is None:
            parent = self._parent(above, name, create=True)
        here = parent.get(name)
        if not entry.is_dir:
            if here is not None:
                self._forget(here)
            parent[name] = entry
        elif isinstance(here, _Directory):
            here.entry = entry
        else:
            if here is not None:
                self._forget(here)
            parent[name] = _Directory(entry)

    def link(self, path: str, target: str) -> None:
        """Make `path` another name of the inode at `target`, which must exist and be no directory."""
        here = f"{quote(path)}: hard link to {quote(target)}"
        place = self._place(target)
        entry = place[0].get(place[1]) if place else None
        if target == "/" or isinstance(entry, _Directory):
            raise InputError(f"{here}, which is a directory")
        if place is None or entry is None:
            raise InputError(f"{here}, which does not exist")
        found = self._place(path)
        if found is not None and found[0] is place[0] and found[1] == place[1]:
            raise InputError(f"{here}, which is itself")
        self.put(path, entry)
        if self.get(target) is not entry:
            raise InputError(f"{here}, which it replaces")

    def remove(self, path: str) -> bool:
        """Take away what is at a path, with everything in it; says whether there was anything."""
        place = self._place(path)
        return place is not None and self._drop(*place)

    def clear(self, path: str) -> None:
        """Empty a directory and keep it; nothing happens where there is none."""
        here = self._find(path)
        if isinstance(here, _Directory):
            here.clear()
            self._known.clear()

    def hide(self, whiteouts: Iterable[tuple[str, str]], made: Container[str]) -> None:
        """Take away what stands at each (directory, name); for an empty name, all that lies in the directory.

        Every directory is found before anything goes, so the order says nothing. Directories in `made` are there
        under this very name: a symbolic link that stands in their place does not lead anywhere.
        """
        found: dict[str, _Directory | None] = {}
        places = []
        for above, name in whiteouts:
            if above not in found:
                found[above] = self._hidden(above, made)
            parent = found[above]
            if parent is not None:
                places.append((parent, name))
        for parent, name in places:
            if name:
                self._drop(parent, name)
            else:
                parent.clear()
        self._known.clear()

    def get(self, path: str) -> Entry | None:
        """The inode at a path (a symbolic link itself, not where it leads), or None."""
        here = self._find(path)
        return here.entry if isinstance(here, _Directory) else here

    def resolve(self, path: str) -> str:
        """Where a path leads when every symbolic link is followed, the last one too; it need not exist.

        InputError after 40 hops.
        """
        done: list[str] = []
        todo = _parts(path)
        hops = 0
        here: _Directory | Entry | None = self._root
        while todo:
            part = todo.pop()
            if part == "..":
                if done:
                    done.pop()
                here = self._find("/" + "/".join(done))
                continue
            child = here.get(part) if isinstance(here, _Directory) else None
            if isinstance(child, Entry) and child.is_symlink:
                hops += 1
                self._check_hops(hops, path)
                if child.target.startswith("/"):
                    done, here = [], self._root
                todo.extend(_parts(child.target))
                continue
            done.append(part)
            here = child
        return "/" + "/".join(done)

    def _place(self, path: str) -> tuple[_Directory, str] | None:
        """The directory that a path's last name is looked up in, and that name."""
        above, _, name = path.rpartition("/")
        try:
            return self._parent(above, name, create=False), name
        except _MissingError:
            return None

    def _find(self, path: str) -> _Directory | Entry | None:
        if path == "/":
            return self._root
        place = self._place(path)
        return place[0].get(place[1]) if place else None

    def _hidden(self, above: str, made: Container[str]) -> _Directory | None:
        try:
            return self._walk(above, "", create=False, made=made)
        except _LoopError:
            raise
        except _MissingError:
            return None

    def _drop(self, parent: _Directory, name: str) -> bool:
        here = parent.pop(name, None)
        if here is None:
            return False
        self._forget(here)
        return True

    def _parent(self, above: str, name: str, *, create: bool) -> _Directory:
        """The directory that `above` leads to, remembered; `name` is for messages."""
        found = self._known.get(above)
        if found is None:
            found = self._walk(above, name, create=create)
            if len(self._known) >= _KNOWN_MAX:
                self._known.clear()
            self._known[above] = found
        return found

    def _walk(self, above: str, name: str, *, create: bool, made: Container[str] = ()) -> _Directory:
        """The directory that `above` leads to, made on the way when `create`; see `hide` for `made`."""
        path = f"{above}/{name}"
        trail = [self._root]
        # Names below the trail's end that are not there: as umoci and containerd do it, a `..` takes them back.
        missing: list[str] = []
        blocked = ""  # the first of them, when there is something else of that name
        todo = _parts(above)
        written = len(todo)  # of the names still to come, those that the path itself has
        parts = todo[::-1]
        hops = 0
        self._step(written, path)
        while todo:
            part = todo.pop()
            own = len(todo) < written
            written = min(written, len(todo))
            if part == "..":  # only from a link's target: names in layers have none
                if missing:
                    missing.pop()
                elif len(trail) > 1:
                    trail.pop()
                continue
            child = None if missing else trail[-1].get(part)
            if child is None or isinstance(child, _Directory) or not child.is_symlink:
                if isinstance(child, _Directory):
                    trail.append(child)
                else:
                    blocked = blocked if missing else part * (child is not None)
                    missing.append(part)
                if len(trail) + len(missing) > self._depth + 1:
                    raise InputError(f"{quote(path)}: more than {self._depth} directories above each other")
                continue
            if own and "/" + "/".join(parts[: len(parts) - written]) in made:
                raise _MissingError(f"{quote(path)}: {quote(part)} is a new directory")
            hops += 1
            self._check_hops(hops, path)
            if child.target.startswith("/"):
                trail = [self._root]
            more = _parts(child.target)
            self._step(len(more), path)
            todo.extend(more)
        if missing and blocked:
            raise _MissingError(f"{quote(path)}: {quote(blocked)} on the way is not a directory")
        if missing and not create:
            raise _MissingError(f"{quote(path)}: no such directory")
        return self._make(trail[-1], missing, path)

    def _make(self, here: _Directory, names: list[str], path: str) -> _Directory:
        """Directories inside each other; `path` is what they are made for."""
        for name in names:
            inner = here[name] = self._new_directory(path)
            here = inner
        return here

    def _new_directory(self, path: str) -> _Directory:
        self.room -= 1
        if self.room < 0:
            raise InputError(f"{quote(path)}: too many directories that no entry of their own describes")
        return _Directory(directory())

    def _step(self, count: int, path: str) -> None:
        self._steps -= count
        if self._steps < 0:
            raise InputError(
                f"{quote(path)}: the ways to all entries are too long to follow",
                hint="--limit steps=NUMBER allows more",
            )

    def _check_hops(self, hops: int, path: str) -> None:
        if hops > self._link_hops:
            raise _LoopError(f"{quote(path)}: more than {self._link_hops} symbolic links on the way")

    def _forget(self, gone: _Directory | Entry) -> None:
        # Only a directory or a symbolic link can have been part of a remembered way.
        if isinstance(gone, _Directory) or gone.is_symlink:
            self._known.clear()


def _parts(path: str) -> list[str]:
    """The names in a path, the last one first."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]
