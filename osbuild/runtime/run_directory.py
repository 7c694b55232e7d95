"""A private directory for a guest's sockets, and what is left of those of killed runs, taken away."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from osbuild.errors import HostError

_RUN_PREFIX: Final = "osbuilder-run-"
_RUN_LOCKED_SECONDS: Final = 60.0  # after which a run directory is locked, if anybody still has a use for it
_SUN_PATH: Final = 108  # bytes for a unix socket's path and its NUL: unix(7)


@contextlib.contextmanager
def opened() -> Iterator[Path]:
    """A directory for this run's sockets: nobody else's, and short, wherever the results go.

    A lock that dies with us tells it from one whose owner was killed; such are taken away here.
    """
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108
        if parent and os.access(parent, os.W_OK | os.X_OK) and len(os.fsencode(parent)) < _SUN_PATH - 40:
            break
    else:
        raise HostError("no directory can be written that is short enough for a socket", hint="set TMPDIR to one")
    _sweep(Path(parent))
    run = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX, dir=parent))
    with _locked(run):
        try:
            yield run
        finally:
            shutil.rmtree(run, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for left in parent.glob(f"{_RUN_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, locked, or just gone
            found = left.lstat()
            old = time.time() - found.st_mtime > _RUN_LOCKED_SECONDS
            if old and stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                with _locked(left):
                    shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
