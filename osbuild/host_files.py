"""Reads files and directories of this machine into inodes, at once: what changes on the disk later does not matter."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from osbuild.errors import InputError
from osbuild.tree import Entry, Slice, Spool, directory, quote, regular, symlink

_CHUNK: Final = 1 << 20


def read_host(source: Path, spool: Spool, *, newest: int) -> Iterator[tuple[str, Entry]]:
    """What is at a path of this machine, and below it: "" and then "/name", "/name/below" … in order.

    Everything is root's; modes stay, and times, but none later than `newest` (nanoseconds). A symbolic link is what
    it is, and leads nowhere here. Extended attributes belong to this machine, and stay behind.
    """
    with _readable(source):
        info = os.lstat(source)
        yield "", _entry(source, source.name, None, info, spool, newest)
        if not stat.S_ISDIR(info.st_mode):
            return
        for above, directories, files, handle in os.fwalk(source, onerror=_raise):
            directories.sort()
            relative = os.path.relpath(above, source)
            inside = "" if relative == "." else f"/{relative}"
            for name in sorted(directories + files):
                info = os.stat(name, dir_fd=handle, follow_symlinks=False)
                where = Path(above, name)
                yield f"{inside}/{name}", _entry(where, name, handle, info, spool, newest)


def _entry(where: Path, name: str, above: int | None, info: os.stat_result, spool: Spool, newest: int) -> Entry:
    mtime, permissions = min(info.st_mtime_ns, newest), stat.S_IMODE(info.st_mode)
    match stat.S_IFMT(info.st_mode):
        case stat.S_IFDIR:
            return directory(permissions, mtime_ns=mtime)
        case stat.S_IFLNK:
            target = os.readlink(where if above is None else name, dir_fd=above)
            return symlink(target, mtime_ns=mtime)
        case stat.S_IFREG:
            content = _read(where if above is None else name, above, spool)
            return regular(content, permissions, mtime_ns=mtime)
    raise InputError(f"{quote(str(where))} is no file, directory or symbolic link", hint="leave it out")


def _read(name: str | Path, above: int | None, spool: Spool) -> Slice:
    # NONBLOCK: what was a file a moment ago might be a pipe by now.
    handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=above)
    start = spool.size
    try:
        while data := os.read(handle, _CHUNK):
            spool.append(data)
    finally:
        os.close(handle)
    return Slice(spool, start, spool.size - start)


def _raise(problem: OSError) -> None:
    raise problem


@contextlib.contextmanager
def _readable(source: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        where = problem.filename or source
        raise InputError(f"cannot read {quote(os.fsdecode(where))}: {problem.strerror}") from problem
