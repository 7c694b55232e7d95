"""`dir:PATH`: a root filesystem that lies unpacked on this machine: provisioned by hand, by debootstrap, by dracut.

Owners, modes, times, attributes and device numbers are what the directory has. Holes are where its files have zeros,
64 KiB of them or more: a copy of the directory on another file system, with other holes or none, is the same image.
File bodies are copied before anything else happens, so that what changes afterwards changes nothing here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from osbuild import oci
from osbuild.content import HOLE, Content, solid
from osbuild.errors import HostError, InputError
from osbuild.limits import more
from osbuild.sources.image import SourceImage, Want, unreadable
from osbuild.tree import DEPTH_MAX, Entry, Slice, Sparse, Spool, Tree, quote

_MAJOR_MAX: Final = (1 << 12) - 1
_MINOR_MAX: Final = (1 << 20) - 1


def open_image(reference: oci.Reference, want: Want) -> SourceImage:
    """The directory's tree. InputError for what cannot be part of an image, HostError for what we may not read."""
    root = Path(reference.name)
    where = quote(reference.name)
    try:
        top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as problem:
        raise unreadable(where, problem, hint="dir:PATH names a directory") from None
    try:
        tree = _Reader(top, want).tree()
    finally:
        os.close(top)
    return SourceImage(
        reference=str(reference),
        digest=f"sha256:{tree.digest()}",
        config=oci.ImageConfig(platform=want.platform, diff_ids=(), document={}),
        tree=tree,
    )


class _Reader:
    """Walks a directory below an open descriptor; nothing is named from the machine's root."""

    def __init__(self, top: int, want: Want) -> None:
        self._top = top
        self._want = want
        self._spool = Spool()
        self._device = os.fstat(top).st_dev
        self._inodes: dict[int, Entry] = {}

    def tree(self) -> Tree:
        entries = {"/": self._entry(".", os.fstat(self._top))}
        for name, found in self._walk():
            if stat.S_ISSOCK(found.st_mode):
                continue  # a running program's; nobody listens in an image
            entries[f"/{name}"] = self._inode(name, found)
            if len(entries) > self._want.limits.entries:
                raise InputError(f"more than {self._want.limits.entries} entries in a directory")
        return Tree(entries)

    def _walk(self) -> Iterator[tuple[str, os.stat_result]]:
        todo = ["."]
        while todo:
            above = todo.pop()
            with _said(above):
                handle = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._top)
            try:
                with os.scandir(handle) as children:
                    names = [child.name for child in children]
            finally:
                os.close(handle)
            for name in names:
                path = name if above == "." else f"{above}/{name}"
                with _said(path):
                    found = os.stat(path, dir_fd=self._top, follow_symlinks=False)
                if found.st_dev != self._device:
                    raise InputError(f"{quote('/' + path)}: another file system is mounted there", hint="unmount it")
                if stat.S_ISDIR(found.st_mode):
                    if path.count("/") + 1 > DEPTH_MAX:
                        raise InputError(f"{quote('/' + path[:100])}…: more than {DEPTH_MAX} directories deep")
                    todo.append(path)
                yield path, found

    def _inode(self, path: str, found: os.stat_result) -> Entry:
        if found.st_nlink == 1 or stat.S_ISDIR(found.st_mode):
            return self._entry(path, found)
        if found.st_ino not in self._inodes:
            self._inodes[found.st_ino] = self._entry(path, found)
        return self._inodes[found.st_ino]

    def _entry(self, path: str, found: os.stat_result) -> Entry:
        common: dict[str, Any] = {
            "mode": found.st_mode, "uid": found.st_uid, "gid": found.st_gid, "mtime_ns": found.st_mtime_ns,
            "xattrs": self._xattrs(path),
        }  # fmt: skip
        if stat.S_ISREG(found.st_mode):
            return Entry(**common, content=self._content(path, found))
        if stat.S_ISLNK(found.st_mode):
            with _said(path):
                return Entry(**common, target=os.readlink(path, dir_fd=self._top))
        if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
            major, minor = os.major(found.st_rdev), os.minor(found.st_rdev)
            if major > _MAJOR_MAX or minor > _MINOR_MAX:
                raise InputError(f"{quote('/' + path)}: device {major}:{minor} is out of range")
            return Entry(**common, major=major, minor=minor)
        return Entry(**common)

    def _content(self, path: str, found: os.stat_result) -> Content:
        with _said(path):
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._top)
        try:
            content = self._copied(handle, found)
            if _mark(os.fstat(handle)) != _mark(found):
                raise InputError(f"{quote('/' + path)} changed while it was read", hint="run again when it is at rest")
            return content
        finally:
            os.close(handle)

    def _copied(self, handle: int, found: os.stat_result) -> Content:
        size = found.st_size
        most = self._want.limits.sparse_pieces
        pieces: list[tuple[int, int, int]] = []
        for at, length in solid(handle, size) if size >= HOLE else [(0, size)]:
            if len(pieces) == most:
                raise InputError(f"more than {most} pieces in a sparse file", hint=more("sparse_pieces"))
            pieces.append((at, self._spool.size, length))
            self._spool.take(handle, length, at)
        if len(pieces) == 1 and pieces[0][2] == size:
            return Slice(self._spool, pieces[0][1], size)
        return Sparse(self._spool, size, tuple(pieces))

    def _xattrs(self, path: str) -> dict[str, bytes]:
        # The calls for attributes take no directory descriptor; /proc gives its children a path.
        full = f"/proc/self/fd/{self._top}/{path}"
        try:
            names = os.listxattr(full, follow_symlinks=False)
            return {name: os.getxattr(full, name, follow_symlinks=False) for name in sorted(names)}
        except OSError as problem:
            if problem.errno == errno.ENOTSUP:
                return {}
            raise _refused(path, problem) from None


@contextmanager
def _said(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise _refused(path, problem) from None


def _refused(path: str, problem: OSError) -> HostError | InputError:
    here = quote("/" + path)
    if isinstance(problem, FileNotFoundError):
        return InputError(f"{here} vanished while the directory was read", hint="run again when it is at rest")
    return unreadable(here, problem)


def _mark(found: os.stat_result) -> tuple[int, ...]:
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
