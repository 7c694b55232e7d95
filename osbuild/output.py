"""Files that appear whole or not at all: made beside their place, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from osbuild.errors import HostError, SpecError
from osbuild.tree import quote


@contextlib.contextmanager
def writing(path: Path) -> Iterator[int]:
    """The descriptor of a new file that takes the place of `path` when the block ends well, and vanishes otherwise.

    Mode 0644 whatever the umask. SpecError when something other than a regular file is there; HostError with the
    directory's name when there is no room or no permission.
    """
    _refuse_strange(path)
    try:
        descriptor, temporary = _open_beside(path)
    except OSError as problem:
        raise HostError(f"cannot write in {quote(str(path.parent))}: {problem.strerror}") from problem
    try:
        yield descriptor
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
        if not temporary:
            temporary = _name_it(descriptor, path)
        os.rename(temporary, path)  # noqa: PTH104
        temporary = ""
        sync(path.parent)
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise HostError(f"cannot write {quote(str(path))}: {problem.strerror}") from problem
        raise
    finally:
        os.close(descriptor)
        if temporary:
            os.unlink(temporary)  # noqa: PTH108


def _open_beside(path: Path) -> tuple[int, str]:
    """A new file beside `path`: without a name where that is possible, so that a killed run leaves none."""
    try:
        return os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), ""
    except OSError as problem:
        if problem.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        return tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)


def _name_it(descriptor: int, path: Path) -> str:
    temporary = str(path.parent / f".{path.name}.{os.getpid()}-{descriptor}")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)  # noqa: PTH108
    # Without a directory descriptor Python calls link(2), which would link the symbolic link itself.
    here = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.link(str(descriptor), temporary, src_dir_fd=here, follow_symlinks=True)
    finally:
        os.close(here)
    return temporary


def write_whole(path: Path, data: bytes) -> None:
    """A small file, whole or absent."""
    with writing(path) as descriptor:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]


def sync(path: Path) -> None:
    """Make a file's bytes, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _refuse_strange(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as problem:
        raise HostError(f"cannot look at {quote(str(path))}: {problem.strerror}") from problem
    if not stat.S_ISREG(found.st_mode):
        raise SpecError(
            f"{quote(str(path))} exists and is not a regular file", hint="remove it, or choose another name"
        )
