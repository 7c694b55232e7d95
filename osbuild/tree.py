"""A root filesystem as a value: sorted absolute paths, each with its inode.

Nothing here touches the host's filesystem by a path that an image chose. File bodies stay where they are (a slice of
an unlinked spool file, or bytes in memory) until a writer asks for them.

Two paths that map to the *same* Entry object are hard links of one inode; equal but separate entries are two inodes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Protocol

from osbuild.errors import HostError, InputError

PATH_MAX: Final = 4095  # bytes, as the kernel counts them without the NUL
NAME_MAX: Final = 255  # bytes of one component
DEPTH_MAX: Final = 2000  # directories above each other
LINK_HOPS: Final = 40  # symbolic links followed for one path, as in the kernel
ID_MAX: Final = (1 << 32) - 2  # 2^32-1 means "no id" to chown(2)

_CHUNK: Final = 1 << 20
_NO_XATTRS: Final[Mapping[str, bytes]] = MappingProxyType({})


class Content(Protocol):
    """The bytes of a regular file, wherever they are."""

    @property
    def size(self) -> int:
        """How many bytes."""

    def chunks(self) -> Iterator[bytes]:
        """All of them, in order, a mebibyte or less at a time."""

    def copy_to(self, descriptor: int, offset: int) -> None:
        """Write all of them at `offset` of an open file."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Content in memory: small things that we add ourselves."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), _CHUNK):
            yield self.data[start : start + _CHUNK]

    def copy_to(self, descriptor: int, offset: int) -> None:
        write_all(descriptor, self.data, offset)


class Backing(Protocol):
    """An open file in which contents lie."""

    descriptor: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, fewer only at the end."""

    def check(self) -> None:
        """InputError when the file is not what it was when its contents were checked."""


class Spool:
    """An unlinked temporary file that grows at its end and goes away with its last slice."""

    def __init__(self, directory: str | None = None) -> None:
        self._directory = directory or tempfile.gettempdir()
        with self._room():
            handle, path = tempfile.mkstemp(prefix="osbuilder-", dir=self._directory)
            self.descriptor = handle
            os.unlink(path)  # noqa: PTH108
        self.size = 0

    def append(self, data: bytes) -> None:
        """Add to the end; HostError when the disk is full."""
        with self._room():
            write_all(self.descriptor, data, self.size)
        self.size += len(data)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, fewer only at the end."""
        parts = []
        while length > 0:
            data = os.pread(self.descriptor, length, offset)
            if not data:
                break
            parts.append(data)
            offset += len(data)
            length -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def take(self, source: int, size: int) -> None:
        """Add the first bytes of another open file; InputError when it has fewer."""
        with self._room():
            copy_range(source, 0, size, self.descriptor, self.size)
        self.size += size

    def check(self) -> None:
        """Nobody else can reach an unlinked file."""

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise HostError(
                f"cannot keep the image in {quote(self._directory)}: {problem.strerror}",
                hint="set TMPDIR to a directory with room for the uncompressed layers",
            ) from problem

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass(frozen=True, slots=True)
class Slice:
    """Content that lies in a spool, or in a file of the user's."""

    spool: Backing
    offset: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        end = self.offset + self.size
        for start in range(self.offset, end, _CHUNK):
            yield self.spool.read(start, min(_CHUNK, end - start))

    def copy_to(self, descriptor: int, offset: int) -> None:
        copy_range(self.spool.descriptor, self.offset, self.size, descriptor, offset)
        self.spool.check()


EMPTY: Final[Content] = Bytes(b"")


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
        return stat.S_ISDIR(self.mode)

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

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

    __slots__ = ("_entries",)

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._entries = dict(sorted(entries.items()))

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
        for path, entry in self._entries.items():
            draft.put(path, entry)
        return draft

    def names(self) -> Mapping[Entry, list[str]]:
        """Each inode with all its paths, in the order of the first of them."""
        found: dict[Entry, list[str]] = {}
        for path, entry in self._entries.items():
            found.setdefault(entry, []).append(path)
        return found

    def digest(self) -> str:
        """sha256 in hex over everything that a guest could see: paths, inodes, hard links, bytes."""
        total = hashlib.sha256()
        numbers: dict[Entry, int] = {}
        for path, entry in self._entries.items():
            number = numbers.setdefault(entry, len(numbers))
            first = number == len(numbers) - 1
            fields = (
                path, number, entry.mode, entry.uid, entry.gid, entry.mtime_ns, entry.target,
                entry.major, entry.minor, sorted(entry.xattrs.items()), entry.content.size,
            )  # fmt: skip
            total.update(repr(fields).encode(errors="surrogateescape") + b"\n")
            if first and entry.is_file:
                for chunk in entry.content.chunks():
                    total.update(chunk)
        return total.hexdigest()


class _Directory:
    """A directory while it is being put together: its inode, and what lies in it."""

    __slots__ = ("children", "entry")

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.children: dict[str, _Directory | Entry] = {}


class Draft:
    """A tree being made or changed. Symbolic links in the middle of a path are followed inside the tree only."""

    def __init__(self) -> None:
        self._root = _Directory(directory())
        self._known: dict[str, _Directory] = {}  # parents found lately, by path as written

    def tree(self) -> Tree:
        """What it is now, as a value."""
        entries = {"/": self._root.entry}
        todo = [("", self._root)]
        while todo:
            above, parent = todo.pop()
            for name, child in parent.children.items():
                path = f"{above}/{name}"
                if isinstance(child, _Directory):
                    entries[path] = child.entry
                    todo.append((path, child))
                else:
                    entries[path] = child
        return Tree(entries)

    def put(self, path: str, entry: Entry) -> None:
        """Place an inode. A directory over a directory keeps what lies in it; anything else is replaced whole."""
        if path == "/":
            if not entry.is_dir:
                raise InputError(f"{quote(path)}: the root must be a directory")
            self._root.entry = entry
            return
        parent, name = self._parent(path, create=True)
        here = parent.children.get(name)
        if not entry.is_dir:
            if here is not None:
                self._forget(here)
            parent.children[name] = entry
        elif isinstance(here, _Directory):
            here.entry = entry
        else:
            if here is not None:
                self._forget(here)
            parent.children[name] = _Directory(entry)

    def link(self, path: str, target: str) -> None:
        """Make `path` another name of the inode at `target`, which must exist and be no directory."""
        entry = self.get(target)
        if entry is None:
            raise InputError(f"{quote(path)}: hard link to {quote(target)}, which does not exist")
        if entry.is_dir:
            raise InputError(f"{quote(path)}: hard link to {quote(target)}, which is a directory")
        self.put(path, entry)

    def remove(self, path: str) -> bool:
        """Take away what is at a path, with everything in it; says whether there was anything."""
        try:
            parent, name = self._parent(path, create=False)
        except InputError:
            return False
        here = parent.children.pop(name, None)
        if here is None:
            return False
        self._forget(here)
        return True

    def clear(self, path: str) -> None:
        """Empty a directory and keep it; nothing happens where there is none."""
        here = self._find(path)
        if isinstance(here, _Directory):
            here.children.clear()
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
        todo = [part for part in reversed(path.split("/")) if part not in ("", ".")]
        hops = 0
        here: _Directory | Entry | None = self._root
        while todo:
            part = todo.pop()
            if part == "..":
                if done:
                    done.pop()
                here = self._find("/" + "/".join(done))
                continue
            child = here.children.get(part) if isinstance(here, _Directory) else None
            if isinstance(child, Entry) and child.is_symlink:
                hops += 1
                if hops > LINK_HOPS:
                    raise InputError(f"{quote(path)}: more than {LINK_HOPS} symbolic links on the way")
                if child.target.startswith("/"):
                    done, here = [], self._root
                todo.extend(p for p in reversed(child.target.split("/")) if p not in ("", "."))
                continue
            done.append(part)
            here = child
        return "/" + "/".join(done)

    def _find(self, path: str) -> _Directory | Entry | None:
        if path == "/":
            return self._root
        try:
            parent, name = self._parent(path, create=False)
        except InputError:
            return None
        return parent.children.get(name)

    def _parent(self, path: str, *, create: bool) -> tuple[_Directory, str]:
        above, _, name = path.rpartition("/")
        found = self._known.get(above)
        if found is None:
            found = self._walk(above, path, create=create)
            self._known[above] = found
        return found, name

    def _walk(self, above: str, path: str, *, create: bool) -> _Directory:
        """The directory that `above` leads to, made on the way when `create`."""
        here = self._root
        trail = [here]
        todo = [part for part in reversed(above.split("/")) if part not in ("", ".")]
        hops = 0
        while todo:
            part = todo.pop()
            if part == "..":  # only from a link's target: names in layers have none
                if len(trail) > 1:
                    trail.pop()
                here = trail[-1]
                continue
            child = here.children.get(part)
            if isinstance(child, _Directory):
                here = child
                trail.append(here)
            elif child is None:
                if not create:
                    raise InputError(f"{quote(path)}: no such directory")
                here = here.children.setdefault(part, _Directory(directory()))  # type: ignore[assignment]
                trail.append(here)
            elif child.is_symlink:
                hops += 1
                if hops > LINK_HOPS:
                    raise InputError(f"{quote(path)}: more than {LINK_HOPS} symbolic links on the way")
                if child.target.startswith("/"):
                    here = self._root
                    trail = [here]
                todo.extend(p for p in reversed(child.target.split("/")) if p not in ("", "."))
            else:
                raise InputError(f"{quote(path)}: {quote(part)} on the way is not a directory")
            if len(trail) > DEPTH_MAX:
                raise InputError(f"{quote(path)}: more than {DEPTH_MAX} directories deep")
        return here

    def _forget(self, gone: _Directory | Entry) -> None:
        # Only a directory or a symbolic link can have been part of a remembered way.
        if isinstance(gone, _Directory) or gone.is_symlink:
            self._known.clear()


def copy_range(source: int, start: int, size: int, target: int, offset: int) -> None:
    """Copy bytes between two open files inside the kernel, or through memory where their file systems cannot."""
    while size > 0:
        try:
            done = os.copy_file_range(source, target, size, start, offset)
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            done = 0
        if done == 0:
            data = os.pread(source, min(_CHUNK, size), start)
            if not data:
                raise InputError(f"a file became shorter while it was read: {size} bytes are missing")
            write_all(target, data, offset)
            done = len(data)
        start, offset, size = start + done, offset + done, size - done


def write_all(descriptor: int, data: bytes, offset: int) -> None:
    """pwrite(2) until everything is written."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view = view[done:]
        offset += done


def quote(name: str) -> str:
    """A name that came from outside, on one line and harmless in a terminal."""
    return ascii(name)
