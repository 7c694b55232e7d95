"""Things that are expensive to make and never change: made once, elsewhere, renamed when whole, verified on every use.

~/.cache/osbuilder/v1/<kind>/<key>/            the files
                                contents.json   {name: {"size": …, "sha256": …}}, written last
                             staging-<key>-…/   being made, or left by a run that was killed
                             <key>.bad-…/       was damaged, and is set aside
~/.cache/osbuilder/v1/locks/<kind>-<key>        one maker at a time: locked exclusively, gone with the lock

Whoever uses an entry or a scratch directory holds a shared flock on the directory itself until its process ends,
and whoever removes one locks it exclusively first; neither needs permission to write.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild.artifacts import File
from osbuild.errors import HostError
from osbuild.output import sync
from osbuild.tree import quote

VERSION: Final = "v1"  # of the layout above: another version never reads this one's entries
LOCKS: Final = "locks"
STAGING: Final = "staging-"
SETTING: Final = "OSBUILDER_CACHE"
OPTION: Final = "--cache-dir"
MOVE_IT: Final = f"name a directory with {OPTION} DIR or {SETTING}"
MORE_ROOM: Final = (
    f"remove what is old with: osbuilder cache prune; or name a directory with more room by {OPTION} DIR or {SETTING}"
)

_CONTENTS: Final = "contents.json"
# Answers of a file system that knows no flock, or not this one (NFS: exclusively, and opened for reading).
_NO_LOCKS: Final = frozenset((errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.EBADF))
_NO_ROOM: Final = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))
_NOT_OURS: Final = frozenset((errno.EACCES, errno.EPERM, errno.EROFS))
# What keeps us from reading says nothing about the bytes.
_CANNOT_READ: Final = _NOT_OURS | {errno.EMFILE, errno.ENFILE, errno.ENOMEM}

_kept: Final[dict[tuple[int, int], int]] = {}  # device and inode -> the descriptor that holds the shared lock


class NoLocksError(HostError):
    """The cache lies on a file system without flock."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A directory of finished things, each found by its kind and the digest of all that went into it."""

    root: Path

    def have(self, kind: str, key: str) -> Path | None:
        """The directory of a finished entry whose every byte is still what it was, or None.

        It stays until this process ends, whoever prunes. A damaged entry is set aside, so that it is made again and
        can still be looked at.
        """
        home = self._home(kind, key)
        with reading(self.root), contextlib.ExitStack() as stack:
            try:
                seen = home.lstat()
            except FileNotFoundError:
                return None
            descriptor = open_shared(home) if stat.S_ISDIR(seen.st_mode) else None
            if descriptor is not None:
                stack.callback(os.close, descriptor)
                if intact(home):
                    touch(descriptor)
                    stack.pop_all()
                    _keep(descriptor)
                    return home
        set_aside(home, seen)
        return None

    def get(self, kind: str, key: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
        """The directory of an entry, made by `make(empty directory)` if need be, and whether it was there already."""
        found = self.have(kind, key)
        if found is not None:
            return found, True
        with self.lock(f"{kind}-{key}"):
            found = self.have(kind, key)  # somebody else may have made it while we waited
            if found is not None:
                return found, True
            home = self._home(kind, key)
            with writing(self.root):
                self._make(home, make)
            return home, False

    def scratch(self, name: str) -> Path:
        """A directory kept between runs for a tool's own use (ccache, unpacked sources); nothing here is verified."""
        path = self.root / VERSION / name
        while True:  # until nobody removes it between the two
            make_directory(path)
            with reading(self.root):
                descriptor = open_shared(path, follow=True)
            if descriptor is not None:
                touch(descriptor)
                _keep(descriptor)
                return path

    @contextlib.contextmanager
    def lock(self, name: str, *, wait: bool = True) -> Iterator[None]:
        """Hold the named lock; waits for another process that holds it, or raises BlockingIOError.

        NoLocksError where the file system cannot lock.
        """
        path = self.root / VERSION / LOCKS / name
        make_directory(path.parent)
        descriptor = self._open_locked(path, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                path.unlink()  # those who wait find that out, and make a new one
            os.close(descriptor)

    def _open_locked(self, path: Path, operation: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            with contextlib.ExitStack() as stack:
                with writing(self.root):
                    descriptor = os.open(path, flags, 0o644)
                stack.callback(os.close, descriptor)
                if not flock(descriptor, operation):
                    path.unlink(missing_ok=True)
                    raise NoLocksError(
                        f"the file system of the cache {quote(str(self.root))} cannot lock files", hint=MOVE_IT
                    )
                if is_at(descriptor, path):
                    stack.pop_all()
                    return descriptor

    def _make(self, home: Path, make: Callable[[Path], None]) -> None:
        make_directory(home.parent)
        for leftover in home.parent.glob(f"{STAGING}{home.name}-*"):  # of a run that was killed: we hold its lock now
            shutil.rmtree(leftover, ignore_errors=True)
        staging = Path(tempfile.mkdtemp(prefix=f"{STAGING}{home.name}-", dir=home.parent))
        try:
            make(staging)
            _seal(staging)
            staging.chmod(0o755)  # another user may read the cache, though only its owner adds to it
            descriptor = open_shared(staging)  # before it has its name: from then on it may be pruned
            if descriptor is not None:
                _keep(descriptor)
            staging.rename(home)
            sync(home.parent)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def _home(self, kind: str, key: str) -> Path:
        return self.root / VERSION / kind / key


def choose(root: str) -> None:
    """Make this the default, here and in every process of ours that is started from here."""
    os.environ[SETTING] = str(Path(root).absolute())


def default_cache() -> Cache:
    """What --cache-dir says, or $OSBUILDER_CACHE, or osbuilder/ below $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get(SETTING)
    if named:
        return Cache(root=Path(named).absolute())
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Cache(root=Path(base) / "osbuilder")
    home = os.environ.get("HOME") or _home_of_user()
    return Cache(root=Path(home) / ".cache/osbuilder")


def intact(directory: Path) -> bool:
    """Whether an entry's files are the ones that were sealed, byte for byte."""
    try:
        contents = json.loads((directory / _CONTENTS).read_text())
        for name, said in contents.items():
            path = directory / name
            if not stat.S_ISREG(path.lstat().st_mode):
                return False
            measured = File.of(path)
            if (measured.size, measured.sha256) != (said["size"], said["sha256"]):
                return False
    except OSError as problem:
        if problem.errno in _CANNOT_READ:
            raise
        return False
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def set_aside(path: Path, seen: os.stat_result) -> Path | None:
    """Rename what is damaged to `<name>.bad-…`; None if it cannot be, or is no longer what was seen there."""
    aside = path.with_name(f"{path.name}.bad-{os.urandom(4).hex()}")
    with contextlib.suppress(OSError):
        if os.path.samestat(path.lstat(), seen):  # else somebody else has made it again meanwhile
            return path.rename(aside)
    return None


def make_directory(path: Path) -> None:
    """A directory of the cache, and those above it."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise HostError(
            f"cannot make the cache directory {quote(str(path))}: {problem.strerror}", hint=MOVE_IT
        ) from problem


@contextlib.contextmanager
def reading(root: Path) -> Iterator[None]:
    """HostError, naming the cache and what moves it, when the system does not let us read there."""
    try:
        yield
    except OSError as problem:
        message = f"cannot use the cache {quote(str(root))}: {problem.strerror}"
        raise HostError(message, hint=MOVE_IT) from problem


@contextlib.contextmanager
def writing(root: Path) -> Iterator[None]:
    """HostError, naming the cache and what moves it, when there is no room or no permission."""
    try:
        yield
    except OSError as problem:
        if problem.errno not in _NO_ROOM | _NOT_OURS:
            raise
        message = f"cannot write to the cache {quote(str(root))}: {problem.strerror}"
        raise HostError(message, hint=MORE_ROOM if problem.errno in _NO_ROOM else MOVE_IT) from problem


def flock(descriptor: int, operation: int) -> bool:
    """Lock, and say whether the file system can; BlockingIOError when LOCK_NB is asked for and it is held."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        raise
    except OSError as problem:
        if problem.errno in _NO_LOCKS:
            return False
        raise
    return True


def is_at(descriptor: int, path: Path, *, follow: bool = False) -> bool:
    """Whether an open file is still the one of that name: its lock is worth nothing if it was unlinked meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat(follow_symlinks=follow))
    except FileNotFoundError:
        return False


def open_shared(path: Path, *, follow: bool = False) -> int | None:
    """A directory, opened and locked against pruning where locks exist; None if it vanished meanwhile."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
    with contextlib.ExitStack() as stack:
        try:
            descriptor = os.open(path, flags)
        except FileNotFoundError:
            return None
        stack.callback(os.close, descriptor)
        flock(descriptor, fcntl.LOCK_SH)
        if not is_at(descriptor, path, follow=follow):
            return None
        stack.pop_all()
        return descriptor


def touch(what: int | Path) -> None:
    """Record in its mtime that it was used now; a cache that others own is used without a record."""
    with contextlib.suppress(OSError):
        os.utime(what)


def _keep(descriptor: int) -> None:
    status = os.fstat(descriptor)
    if _kept.setdefault((status.st_dev, status.st_ino), descriptor) != descriptor:
        os.close(descriptor)


def _home_of_user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise HostError("there is no home directory for the cache", hint=MOVE_IT) from None


def _seal(directory: Path) -> None:
    contents = {}
    for path in sorted(directory.iterdir()):
        measured = File.of(path)
        contents[path.name] = {"size": measured.size, "sha256": measured.sha256}
        sync(path)
    record = directory / _CONTENTS
    record.write_text(json.dumps(contents, indent=1, sort_keys=True) + "\n")
    sync(record)
    sync(directory)
