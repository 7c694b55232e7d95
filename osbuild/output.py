"""Files that appear whole or not at all: made beside their place without a name, synced, named, renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import stat
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from osbuild.errors import HostError, SpecError
from osbuild.tree import quote

_CHUNK: Final = 1 << 20
_ZEROS: Final = bytes(_CHUNK)
_SUFFIX: Final = ".osbuilder"  # of names that a file has for a moment
_PAUSE: Final = 0.02  # seconds between flushes of a file that is being written
_DISK: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)  # what a disk, or its owner, may answer


@contextlib.contextmanager
def writing(path: Path, *, needs: int = 0) -> Iterator[int]:
    """The descriptor of a new file that takes the place of `path` when the block ends well, and vanishes otherwise.

    Mode 0644 whatever the umask. SpecError when something other than a regular file is there; HostError with the
    directory's name when there is no room or no permission.
    needs: bytes that will be written at least; when they do not fit, it is said before the first.
    """
    check_output(path)
    _check_room(path.parent, needs)
    try:
        descriptor, temporary = _open_beside(path)
    except OSError as problem:
        message = f"cannot write in {quote(str(path.parent))}: {problem.strerror}"
        raise HostError(message, hint="name another directory") from problem
    try:
        yield descriptor
        os.fchmod(descriptor, 0o644)
        os.fsync(descriptor)
        if temporary:
            os.rename(temporary, path)  # noqa: PTH104
            temporary = ""
        else:
            _give_name(descriptor, path)
        sync(path.parent)
    except OSError as problem:
        if problem.errno in _DISK:
            raise HostError(f"cannot write {quote(str(path))}: {problem.strerror}") from problem
        raise
    finally:
        os.close(descriptor)
        if temporary:
            os.unlink(temporary)  # noqa: PTH108


def _open_beside(path: Path) -> tuple[int, str]:
    """A new file beside `path`: without a name where that is possible, so that a killed run leaves none."""
    try:
        descriptor = os.open(path.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        name = ""
    except OSError as problem:
        if problem.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
        _sweep(path)
        descriptor, name = tempfile.mkstemp(prefix=_prefix(path), suffix=_SUFFIX, dir=path.parent)
    with contextlib.suppress(OSError):  # some network file systems know no locks: then nothing is swept there
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor, name


def _give_name(descriptor: int, path: Path) -> None:
    """Name a nameless file: at once where the name is free, else by way of another name, which can take its place."""
    try:
        _link(descriptor, str(path))
    except FileExistsError:
        _sweep(path)
        temporary = str(path.parent / f"{_prefix(path)}{os.getpid()}-{descriptor}{_SUFFIX}")
        _link(descriptor, temporary)
        try:
            os.rename(temporary, path)  # noqa: PTH104
        except OSError:
            os.unlink(temporary)  # noqa: PTH108
            raise


def _link(descriptor: int, name: str) -> None:
    # Without a directory descriptor Python calls link(2), which would link the symbolic link itself.
    here = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.link(str(descriptor), name, src_dir_fd=here, follow_symlinks=True)
    finally:
        os.close(here)


def _prefix(path: Path) -> str:
    return f".{path.name[:50]}."


def _sweep(path: Path) -> None:
    """Remove what killed runs left of this output: what nobody locks any more."""
    for name in os.listdir(path.parent):
        if name.startswith(_prefix(path)) and name.endswith(_SUFFIX):
            with contextlib.suppress(OSError):  # in use, somebody else's, or just gone
                left = os.open(path.parent / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
                try:
                    fcntl.flock(left, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path.parent / name)  # noqa: PTH108
                finally:
                    os.close(left)


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


@contextlib.contextmanager
def nameless(directory: Path) -> Iterator[int]:
    """The descriptor of a new file that vanishes at the end of the block."""
    descriptor, temporary = _open_beside(directory / "scratch")
    try:
        if temporary:
            os.unlink(temporary)  # noqa: PTH108
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def flushing(descriptor: int) -> Iterator[threading.Event]:
    """What is written goes to the disk from now on, until the event is set that is given; at the block's end all that
    was written before that is there.

    OSError when the disk refuses. What is written later is flushed by `writing`; of a block that fails, nothing is.
    """
    problems: list[OSError] = []
    written = threading.Event()
    failed = False

    def flush() -> None:
        try:
            # The disk is the slowest of all: it should not have to wait for the last byte.
            while not written.wait(_PAUSE):
                os.fdatasync(descriptor)
            if not failed:
                os.fsync(descriptor)
        except OSError as problem:
            problems.append(problem)

    thread = threading.Thread(target=flush)
    thread.start()
    try:
        yield written
    except BaseException:
        failed = True
        raise
    finally:
        written.set()
        thread.join()
    if problems:
        raise problems[0]


def digest(descriptor: int) -> str:
    """sha256 in hex of a whole open file."""
    total = hashlib.sha256()
    _hash(total, descriptor, 0, os.fstat(descriptor).st_size)
    return total.hexdigest()


class Hashing:
    """sha256 of an open file while it is written from its start to its end: as far as it is final, it is hashed."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._total = hashlib.sha256()
        self._at = 0  # up to here it is hashed
        self._end = 0  # up to here it is final
        self._over = False
        self._told = threading.Condition()
        self._problems: list[OSError] = []
        self._thread = threading.Thread(target=self._begin, name="hashing")
        self._thread.start()

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        with self._told:
            self._end, self._over = self._at, True  # whatever is left, nobody asked for it
            self._told.notify()
        self._thread.join()

    def upto(self, end: int) -> None:
        """The first `end` bytes will not change any more."""
        with self._told:
            self._end = max(end, self._end)
            self._told.notify()

    def finish(self) -> str:
        """In hex, of the whole file as it is now."""
        self.upto(os.fstat(self._descriptor).st_size)
        with self._told:
            self._over = True
            self._told.notify()
        self._thread.join()
        if self._problems:
            raise self._problems[0]
        return self._total.hexdigest()

    def _begin(self) -> None:
        try:
            while True:
                with self._told:
                    self._told.wait_for(lambda: self._over or self._end > self._at)
                    end = self._end
                if end <= self._at:
                    return
                _hash(self._total, self._descriptor, self._at, end)
                self._at = end
        except OSError as problem:
            self._problems.append(problem)


def _hash(total: hashlib._Hash, descriptor: int, at: int, end: int) -> None:
    """Add a part of a file; its holes are hashed, but not read."""
    while at < end:
        following = next_data(descriptor, at, end)
        for start in range(at, following, _CHUNK):
            total.update(_ZEROS[: following - start])
        data = os.pread(descriptor, min(_CHUNK, end - following), following)
        total.update(data)
        at = following + len(data)


def check_output(path: Path) -> None:
    """What can be said before any work whether a file may be written there."""
    if str(path) == "-":
        raise SpecError("only a tar can go to standard output (rootfs --tar -)", hint="name a file")
    try:
        found = path.lstat()
    except FileNotFoundError:
        found = None
    except OSError as problem:
        raise HostError(f"cannot look at {quote(str(path))}: {problem.strerror}") from problem
    if found is not None and not stat.S_ISREG(found.st_mode):
        hint = "name a file in it" if stat.S_ISDIR(found.st_mode) else "choose another name"
        raise SpecError(f"{quote(str(path))} exists and is not a regular file", hint=hint)
    home = path.parent
    if not home.is_dir():
        why = os.strerror(errno.ENOTDIR if home.exists() else errno.ENOENT)
        raise HostError(f"cannot write in {quote(str(home))}: {why}", hint="make it a directory, or name another")
    if not os.access(home, os.W_OK | os.X_OK):
        raise HostError(f"cannot write in {quote(str(home))}: {os.strerror(errno.EACCES)}", hint="name another")


def free_blocks(filesystem: os.statvfs_result) -> int:
    """Those that we may write to: what a filesystem holds back for root is root's."""
    return filesystem.f_bfree if os.geteuid() == 0 else filesystem.f_bavail


def _check_room(home: Path, needs: int) -> None:
    if not needs:
        return
    there = os.statvfs(home)
    free = free_blocks(there) * there.f_frsize
    if free < needs:
        raise HostError(
            f"no space left on {quote(str(home))}: need {-(-needs >> 20)} MiB, have {free >> 20} MiB",
            hint="make room, or name another directory",
        )


def next_data(descriptor: int, at: int, size: int) -> int:
    """Where the first byte at or behind `at` lies that is in no hole; `size` when there is none."""
    try:
        return min(os.lseek(descriptor, at, os.SEEK_DATA), size)
    except OSError as problem:
        if problem.errno == errno.ENXIO:  # nothing but a hole until the end
            return size
        return at
