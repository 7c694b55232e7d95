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
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as problem:
        raise HostError(f"cannot write in {quote(str(path.parent))}: {problem.strerror}") from problem
    try:
        yield descriptor
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
        os.rename(temporary, path)  # noqa: PTH104
        temporary = ""
        sync_directory(path.parent)
    except OSError as problem:
        if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise HostError(f"cannot write {quote(str(path))}: {problem.strerror}") from problem
        raise
    finally:
        os.close(descriptor)
        if temporary:
            os.unlink(temporary)  # noqa: PTH108


def write_whole(path: Path, data: bytes) -> None:
    """A small file, whole or absent."""
    with writing(path) as descriptor:
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
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
