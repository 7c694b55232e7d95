"""Things that are expensive to make and never change: made once, elsewhere, renamed when whole, verified on every use.

~/.cache/osbuilder/v1/<kind>/<key>/        the files
                                contents.json   {name: {"size": …, "sha256": …}}, written last
~/.cache/osbuilder/v1/locks/<kind>-<key>   one builder at a time; the lock dies with its process
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild.artifacts import File
from osbuild.errors import HostError
from osbuild.output import sync

VERSION: Final = "v1"  # of the layout above: another version never reads this one's entries
_CONTENTS: Final = "contents.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A directory of finished things, each found by its kind and the digest of all that went into it."""

    root: Path

    def have(self, kind: str, key: str) -> Path | None:
        """The directory of a finished entry whose every byte is still what it was, or None.

        A damaged entry is set aside (`<key>.bad-…`), so that it is made again and can still be looked at.
        """
        home = self._home(kind, key)
        try:
            home.stat()
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise HostError(
                f"cannot use the cache {self.root}: {problem.strerror}", hint="set OSBUILDER_CACHE to a directory"
            ) from problem
        if _intact(home):
            return home
        with contextlib.suppress(OSError):
            home.rename(Path(tempfile.mkdtemp(prefix=f"{key}.bad-", dir=home.parent)))
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
            _make_directory(home.parent)
            for leftover in home.parent.glob(f"staging-{key}-*"):  # of a run that was killed: we hold its lock now
                shutil.rmtree(leftover, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=f"staging-{key}-", dir=home.parent))
            try:
                make(staging)
                _seal(staging)
                staging.chmod(0o755)  # another user may read the cache, though only its owner adds to it
                staging.rename(home)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return home, False

    def scratch(self, name: str) -> Path:
        """A directory kept between runs for a tool's own use (ccache, unpacked sources); nothing here is verified."""
        path = self.root / VERSION / name
        _make_directory(path)
        return path

    @contextlib.contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the named lock; waits for another process that holds it."""
        directory = self.root / VERSION / "locks"
        _make_directory(directory)
        descriptor = os.open(directory / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _home(self, kind: str, key: str) -> Path:
        return self.root / VERSION / kind / key


def default_cache() -> Cache:
    """$OSBUILDER_CACHE, or osbuilder/ below $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("OSBUILDER_CACHE")
    if named:
        return Cache(root=Path(named).absolute())
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Cache(root=Path(base) / "osbuilder")
    home = os.environ.get("HOME") or _home_of_user()
    return Cache(root=Path(home) / ".cache/osbuilder")


def _home_of_user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_dir
    except KeyError:
        raise HostError("there is no home directory for the cache", hint="set OSBUILDER_CACHE to a directory") from None


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise HostError(
            f"cannot make the cache directory {path}: {problem.strerror}", hint="set OSBUILDER_CACHE to a directory"
        ) from problem


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


def _intact(directory: Path) -> bool:
    try:
        contents = json.loads((directory / _CONTENTS).read_text())
        for name, said in contents.items():
            measured = File.of(directory / name)
            if (measured.size, measured.sha256) != (said["size"], said["sha256"]):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True
