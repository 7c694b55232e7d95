"""A directory of a build that is replaced whole, or not at all.

.NAME.pull-XXXX/   made beside it, and locked while somebody fills it; then the two change their names in one step
NAME/              what it was, or all of the new one, whenever we are killed
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from osbuild.errors import HostError, SpecError
from osbuild.output import sync, write_whole
from osbuild.tree import quote
from osbuild.workspace import MARK, locked, refuse_what_is_not_ours

_AT_FDCWD: Final = -100
_RENAME_NOREPLACE: Final = 1  # linux/fs.h
_RENAME_EXCHANGE: Final = 2
_CANNOT: Final = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """An empty directory that takes the place of `out` when the block ends well, and is gone otherwise."""
    out = Path(os.path.realpath(out))
    _put_back(out)
    there = out.exists()
    mode = stat.S_IMODE(out.stat().st_mode) if there else 0o755
    with contextlib.ExitStack() as stack:
        if there:
            if not out.is_dir():
                raise SpecError(f"{quote(str(out))} exists and is not a directory", hint="name another with -o")
            if out.is_mount():
                raise SpecError(
                    f"{quote(str(out))} is a mount point, which nothing can replace", hint="-o a directory in it"
                )
            stack.enter_context(locked(out, hint="name another directory with -o"))
            refuse_what_is_not_ours(out)
        new = stack.enter_context(_staging(out))
        yield new
        write_whole(new / MARK, b"osbuilder writes here; the next build removes what this one made\n")
        new.chmod(mode)
        sync(new)
        if there:
            refuse_what_is_not_ours(out)  # it took a while
            _change(new, out)
        else:
            _put(new, out)
        sync(out.parent)


@contextlib.contextmanager
def _staging(out: Path) -> Iterator[Path]:
    """A locked directory beside `out`; those that killed runs left are removed."""
    prefix = f".{out.name}.pull-"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for name in os.listdir(out.parent):
            if name.startswith(prefix):
                _sweep(out.parent / name)
        new = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    except OSError as problem:
        raise HostError(
            f"cannot write in {quote(str(out.parent))}: {problem.strerror}", hint="name another directory with -o"
        ) from problem
    handle = os.open(new, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):  # where there are no locks, nothing is swept
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield new
    finally:
        shutil.rmtree(new, ignore_errors=True)  # after the change of names, this is the old one
        os.close(handle)


def _sweep(left: Path) -> None:
    """Remove what a killed run left; what cannot be locked is in use, or is not ours to remove."""
    with contextlib.suppress(OSError):
        handle = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
        finally:
            os.close(handle)


def _put(new: Path, out: Path) -> None:
    """Let `out` be the new directory; what appeared there since we looked stays."""
    try:
        _rename(new, out, _RENAME_NOREPLACE)
    except OSError as problem:
        if problem.errno in _CANNOT and not out.exists():
            new.rename(out)  # which replaces nothing but an empty directory
            return
        if problem.errno not in (errno.EEXIST, *_CANNOT):
            raise HostError(f"cannot make {quote(str(out))}: {problem.strerror}") from problem
        raise HostError(
            f"{quote(str(out))} has appeared meanwhile", hint="run it again, or name another with -o"
        ) from None


def _change(new: Path, out: Path) -> None:
    """Let `out` be the new directory, and `new` what was there."""
    try:
        _rename(new, out, _RENAME_EXCHANGE)
    except OSError as problem:
        if problem.errno not in _CANNOT:
            raise HostError(f"cannot replace {quote(str(out))}: {problem.strerror}") from problem
        # The file system knows no exchange: after a kill between these two, the next run puts the old build back.
        aside = _aside(out)
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
        try:
            new.rename(out)
        except OSError as second:
            aside.rename(out)
            raise HostError(f"cannot replace {quote(str(out))}: {second.strerror}") from second
        shutil.rmtree(aside, ignore_errors=True)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.before-pull")


def _put_back(out: Path) -> None:
    """What was killed between two renames."""
    if not out.exists() and _aside(out).is_dir():
        with contextlib.suppress(OSError):
            _aside(out).rename(out)


def _rename(first: Path, second: Path, flags: int) -> None:
    """renameat2(2), which Python does not have."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
