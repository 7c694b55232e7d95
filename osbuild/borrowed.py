"""A file of the user's in which contents lie: read where it is, not copied, and refused once it has changed."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from osbuild.errors import InputError
from osbuild.tree import quote


class Borrowed:
    """An open regular file that must stay what it was when it was opened (a tree.Backing)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # Without O_NONBLOCK a fifo would keep us waiting for its writer.
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(self.descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(self.descriptor)
            del self.descriptor
            hint = "name a file in it" if stat.S_ISDIR(found.st_mode) else ""
            raise InputError(f"{quote(str(path))} is not a regular file", hint=hint)
        self.size = found.st_size
        self.mark = _mark(found)

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
        self.check()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def check(self) -> None:
        """InputError when somebody has written to the file since it was opened."""
        if _mark(os.fstat(self.descriptor)) != self.mark:
            raise InputError(
                f"{quote(str(self._path))} changed while it was read", hint="wait until nothing writes to it, run again"
            )

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _mark(found: os.stat_result) -> tuple[int, ...]:
    """What tells two states of a file apart; the time of change cannot be set by its owner."""
    return (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
