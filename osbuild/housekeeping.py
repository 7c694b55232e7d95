"""What lies in the cache: listed, verified, pruned; nothing is touched that no row of the table below knows by name.

OSBUILDER_CACHE may name a directory with other things in it, so a name has to be one that only we give.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from osbuild.blobs import BLOBS, PARTIAL, TAGS, check_blob, read_tag
from osbuild.cache import LOCKS, STAGING, VERSION, Cache, NoLocksError, flock, intact, is_at, open_shared, set_aside
from osbuild.cache_names import blobs_of_images, describe
from osbuild.errors import HostError, SpecError
from osbuild.tree import quote

ENTRIES: Final = ("agent", "kernel", "probe", "tree")  # the kinds that Cache.get makes
IMAGES: Final = "images"  # beside the version's directory: scripts/base-image keeps there what it has made
UNKNOWN: Final = "unknown"

_HEX: Final = r"[0-9a-f]{64}"
_DAY: Final = 86400.0
_PARTIAL_DAYS: Final = 1.0  # longer than this nobody waits to go on with a transfer


@dataclass(frozen=True, slots=True)
class _Row:
    directory: str  # below the version's; IMAGES is beside it
    names: str
    kind: str
    lock: str = ""  # who makes or fetches it holds this; {key} is the first group of `names`, or all of it
    shared: bool = False  # users hold the directory that it lies in


def _entry(kind: str) -> tuple[_Row, ...]:
    lock = kind + "-{key}"
    return (
        _Row(kind, _HEX, kind, lock=lock),
        _Row(kind, rf"{STAGING}({_HEX})-\w+", "leftover", lock=lock),
    )


_STRANGE: Final = _Row("", "", UNKNOWN)
_CCACHE: Final = _Row("", r"ccache", "scratch")
_IMAGE: Final = _Row(IMAGES, r"(?:debian|busybox)-\d+", "base-image")
_ROWS: Final = (
    *(row for kind in ENTRIES for row in _entry(kind)),
    _Row(BLOBS, _HEX, "blob", lock="blob-{key}"),
    _Row(PARTIAL, rf"({_HEX})(?:-[0-9a-f]{{8}})?", "partial", lock="blob-{key}"),
    _Row(TAGS, _HEX, "tag"),
    _Row(TAGS, rf"\.{_HEX}\.[\w-]+", "partial"),
    _Row(LOCKS, rf"(?:{'|'.join(ENTRIES)}|blob|kernel-source)-{_HEX}(?:-[0-9a-f]{{16}})?", "lock"),
    _Row(LOCKS, r"kernel-(?:seconds-\w+|build-\w+-[0-9a-f]{16})", "lock"),
    _Row("logs", r"kernel-config-\d+\.log", "leftover", shared=True),  # of earlier versions: one for each process
    _Row("logs", r"kernel-[\w-]+\.log", "log", shared=True),
    _Row("accel", r"[0-9a-f]{32}\.json", "log", shared=True),
    _Row("accel", r"new-\w+", "leftover", shared=True),
    _Row("kernel-build", rf"{_HEX}", "leftover", lock="kernel-{key}", shared=True),
    _Row("kernel-build", r"config-\d+", "leftover", shared=True),
    _Row("kernel-build", r"\w+-[0-9a-f]{16}", "scratch", lock="kernel-build-{key}", shared=True),
    _Row("kernel-build", r"(?:others|seconds|steps)-\w+", "scratch", shared=True),
    _Row("kernel-build", r"tmp\w+seconds-\w+", "leftover", shared=True),
    _Row("kernel-source", rf"{_HEX}(?:-[0-9a-f]{{16}})?", "scratch", lock="kernel-source-{key}", shared=True),
    _Row("kernel-source", r"[0-9a-f]{16}\.json", "scratch", shared=True),
    _Row("kernel-source", r"tmp\w+\.json", "leftover", shared=True),
    _Row(
        "kernel-source", rf"{STAGING}({_HEX}(?:-[0-9a-f]{{16}})?)", "leftover", lock="kernel-source-{key}", shared=True
    ),
    _Row("kconfig", r"(?:model|files|answers|config)-[0-9a-f]{16}\.json", "scratch", shared=True),
    _Row("zig", r"[a-z]{1,8}", "scratch", shared=True),  # its own cache: a libc, compiled once
    _CCACHE,
    _IMAGE,
    _Row(IMAGES, r"\.making-\w{6}", "leftover"),
)
_DIRECTORIES: Final = frozenset(row.directory for row in _ROWS)
_IN_CCACHE: Final = re.compile(r"[0-9a-f]|tmp|lock|stats|ccache\.conf|CACHEDIR\.TAG")
_ASIDE: Final = re.compile(r"(?P<name>.+?)\.(?P<why>bad|gone)-[0-9a-z_]{8}")
_KIND_ASIDE: Final = {"bad": "damaged", "gone": "leftover"}

_WORTHLESS: Final = frozenset(("leftover", "lock", "damaged"))  # unless in use
KINDS: Final = frozenset(row.kind for row in _ROWS) | {"damaged"}  # of what may be pruned


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheItem:
    """One thing in the cache."""

    kind: str  # one of KINDS, or unknown
    key: str
    path: Path
    size: int  # bytes on disk, which another item may share
    used: float  # when last, in seconds since 1970
    in_use: bool  # now, by a process; also said when nobody can tell
    about: str  # what it is to people; may be nothing

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "kind": self.kind, "key": self.key, "path": str(self.path), "size": self.size, "used": round(self.used),
            "in_use": self.in_use, "about": self.about,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a blob, entry or tag turned out to be."""

    kind: str
    key: str
    problem: str  # empty if it is what it should be
    moved_to: Path | None = None  # where a bad one was set aside, if that was possible

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        moved = None if self.moved_to is None else str(self.moved_to)
        return {"kind": self.kind, "key": self.key, "problem": self.problem, "moved_to": moved}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pruned:
    """What went, and what had to go but could not."""

    removed: tuple[CacheItem, ...]
    in_use: tuple[CacheItem, ...]
    failed: tuple[tuple[CacheItem, str], ...]  # and why
    size: int  # bytes on disk that went
    dry_run: bool  # nothing went: this is what would

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "removed": [item.to_dict() for item in self.removed],
            "in_use": [item.to_dict() for item in self.in_use],
            "failed": [item.to_dict() | {"reason": reason} for item, reason in self.failed],
            "size": self.size,
            "dry_run": self.dry_run,
        }


@dataclass(frozen=True, slots=True)
class _Found:
    """An item, and what has to be locked before it may go."""

    item: CacheItem
    lock: str
    guards: tuple[Path, ...]


def survey(cache: Cache) -> list[CacheItem]:
    """Everything in the cache; of what is not ours, only what lies where ours would."""
    return [found.item for found in _survey(cache, KINDS | {UNKNOWN})]


def verify(cache: Cache) -> list[Checked]:
    """Read every blob, entry and tag again; what is bad is set aside, so that it will be made again."""
    return [_check(found.item) for found in _survey(cache, frozenset(_CHECKS))]


def prune(
    cache: Cache,
    *,
    keep_days: float | None = 30,
    most_bytes: int | None = None,
    everything: bool = False,
    dry_run: bool = False,
    kinds: frozenset[str] | None = None,
) -> Pruned:
    """Remove what killed runs left, what was not used for `keep_days`, then the longest unused beyond `most_bytes`.

    Never what a process uses. Scratch (ccache, unpacked kernels) only with `everything`, or when `kinds` names it;
    `most_bytes` counts the same kinds that may go.
    """
    _refuse_nonsense(keep_days, most_bytes, kinds)
    if not _is_ours(cache.root):
        return Pruned(removed=(), in_use=(), failed=(), size=0, dry_run=dry_run)
    allowed = kinds if kinds is not None else KINDS if everything else KINDS - {"scratch"}
    found = _survey(cache, allowed)
    chosen = found if everything else _choose(found, keep_days, most_bytes)
    removed: list[CacheItem] = []
    in_use: list[CacheItem] = []
    failed: list[tuple[CacheItem, str]] = []
    for each in chosen:
        try:
            gone = not each.item.in_use if dry_run else _remove(cache, each)
        except (OSError, HostError) as problem:
            reason = problem.strerror if isinstance(problem, OSError) else str(problem)
            failed.append((each.item, reason or str(problem)))
            continue
        (removed if gone else in_use).append(each.item)
    return Pruned(
        removed=tuple(removed),
        in_use=tuple(in_use),
        failed=tuple(failed),
        size=sum(item.size for item in removed),
        dry_run=dry_run,
    )


def _refuse_nonsense(keep_days: float | None, most_bytes: int | None, kinds: frozenset[str] | None) -> None:
    if keep_days is not None and not keep_days >= 0:
        raise SpecError(f"no cache keeps things for {keep_days} days", hint="a number of days from 0")
    if most_bytes is not None and most_bytes < 0:
        raise SpecError(f"no cache holds {most_bytes} bytes", hint="a number of bytes from 0")
    for kind in sorted((kinds or frozenset()) - KINDS):
        raise SpecError(f"nothing of kind {quote(kind)} is pruned", hint=f"one of {', '.join(sorted(KINDS))}")


def _is_ours(root: Path) -> bool:
    """Whether there is a cache; SpecError if there is something else, HostError if it cannot be locked."""
    home = root / VERSION
    try:
        ours = _is_directory(home) and any(_is_directory(home / name) for name in _DIRECTORIES if name)
        if not os.path.lexists(home) and any(
            _recognise(IMAGES, path)[0] is not _STRANGE for path in _children(home, IMAGES)
        ):
            ours, home = True, root / IMAGES
        if not ours and (root.is_symlink() or root.exists()) and os.listdir(root):
            raise SpecError(
                f"{quote(str(root))} is no cache of osbuilder's", hint="see what --cache-dir or OSBUILDER_CACHE names"
            )
        if not ours:
            return False
        descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError as problem:
        raise HostError(f"cannot use the cache {quote(str(root))}: {problem.strerror}") from problem
    try:
        if not flock(descriptor, fcntl.LOCK_SH):
            raise NoLocksError(
                f"the file system of the cache {quote(str(root))} cannot lock files, so nobody knows what is in use",
                hint=f"when nothing of osbuilder runs, remove what is in {quote(str(home))} yourself",
            )
    finally:
        os.close(descriptor)
    return True


def _choose(found: list[_Found], keep_days: float | None, most_bytes: int | None) -> list[_Found]:
    now = time.time()
    chosen: list[_Found] = []
    kept: list[_Found] = []
    for each in sorted(found, key=lambda each: each.item.used):
        limit = keep_days
        if each.item.kind == "partial" and keep_days is not None:
            limit = min(keep_days, _PARTIAL_DAYS)
        old = limit is not None and now - each.item.used >= limit * _DAY
        (chosen if old or each.item.kind in _WORTHLESS else kept).append(each)
    total = sum(each.item.size for each in kept)
    for each in kept:
        if most_bytes is None or total <= most_bytes:
            break
        chosen.append(each)
        total -= 0 if each.item.in_use else each.item.size
    return chosen


def _remove(cache: Cache, found: _Found) -> bool:
    """Remove it while nobody can begin to use it; False if somebody does already."""
    with contextlib.ExitStack() as stack:
        try:
            if found.lock:
                stack.enter_context(cache.lock(found.lock, wait=False))
            for guard in found.guards:
                stack.enter_context(_exclusive(guard))
            _delete(found.item.path)
        except BlockingIOError:
            return False
        except FileNotFoundError:
            return True  # somebody else was faster
    return True


def _delete(path: Path) -> None:
    before = path.parent.lstat()
    if not stat.S_ISDIR(path.lstat().st_mode):
        path.unlink()
    elif _ASIDE.fullmatch(path.name):
        shutil.rmtree(path)
    else:  # half of an entry must not have its name
        shutil.rmtree(path.rename(path.with_name(f"{path.name}.gone-{secrets.token_hex(4)}")))
    os.utime(path.parent, ns=(before.st_atime_ns, before.st_mtime_ns))  # removing from scratch is not using it


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """BlockingIOError if somebody uses it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB):
            raise BlockingIOError  # nobody can tell
        if not is_at(descriptor, path):
            raise FileNotFoundError(path)
        yield
    finally:
        os.close(descriptor)


def _busy(path: Path) -> bool:
    try:
        with _exclusive(path):
            return False
    except FileNotFoundError:
        return False
    except OSError:
        return True


def _check(item: CacheItem) -> Checked:
    try:
        seen = item.path.lstat()
        problem = _CHECKS[item.kind](item.path)
    except FileNotFoundError:
        return Checked(kind=item.kind, key=item.key, problem="")  # pruned or set aside since it was listed
    except OSError as trouble:
        return Checked(kind=item.kind, key=item.key, problem=f"cannot be read: {trouble.strerror}")
    moved = set_aside(item.path, seen) if problem else None
    return Checked(kind=item.kind, key=item.key, problem=problem, moved_to=moved)


def _check_entry(path: Path) -> str:
    if not stat.S_ISDIR(path.lstat().st_mode):
        return "not a directory"
    descriptor = open_shared(path)
    if descriptor is None:
        raise FileNotFoundError(path)
    try:
        return "" if intact(path) else "not the files that were made"
    finally:
        os.close(descriptor)


def _check_tag(path: Path) -> str:
    return "" if read_tag(path) is not None else "not a record of a name and a digest"


_CHECKS: Final[Mapping[str, Callable[[Path], str]]] = {
    **dict.fromkeys(ENTRIES, _check_entry), "blob": check_blob, "tag": _check_tag,
}  # fmt: skip


def _survey(cache: Cache, kinds: frozenset[str]) -> list[_Found]:
    home = cache.root / VERSION
    counted: set[tuple[int, int]] = set()
    images = blobs_of_images(home)
    found = []
    try:
        for directory in sorted(_DIRECTORIES | {str(Path(BLOBS).parent)}):
            for path in _children(home, directory):
                row, key = _recognise(directory, path)
                if row.kind in kinds:
                    with contextlib.suppress(FileNotFoundError):  # somebody else was faster
                        found.append(_describe(home, path, row, key, counted, images))
        if UNKNOWN in kinds:
            others = [path for path in cache.root.glob("v[0-9]*") if re.fullmatch(r"v\d+", path.name)]
            strange = [path for path in sorted(others) if path != home]
            found += [_describe(home, path, _STRANGE, path.name, counted, images) for path in strange]
    except OSError as problem:
        raise HostError(f"cannot use the cache {quote(str(cache.root))}: {problem.strerror}") from problem
    return found


def _children(home: Path, directory: str) -> Iterator[Path]:
    """What lies in a directory of ours, without those that have rows of their own; links are not followed."""
    home = home.parent if directory == IMAGES else home
    parts = Path(directory).parts
    if not all(_is_directory(home.joinpath(*parts[:depth])) for depth in range(len(parts) + 1)):
        return
    for name in sorted(os.listdir(home / directory)):
        below = str(Path(directory) / name)
        known = any(f"{each}/".startswith(f"{below}/") for each in _DIRECTORIES)
        if not (known and _is_directory(home / below)):
            yield home / below


def _recognise(directory: str, path: Path) -> tuple[_Row, str]:
    """The row that knows this name, and the key in it."""
    aside = _ASIDE.fullmatch(path.name)
    name = path.name if aside is None else aside["name"]
    for row in _ROWS:
        match = re.fullmatch(row.names, name) if row.directory == directory else None
        if match is None or (row is _CCACHE and not _is_ccache(path)):
            continue
        if row is _IMAGE and aside is None and not _is_base_image(path):
            continue
        key = match[1] if match.re.groups else name
        if aside is not None:  # whoever set it aside is done with it
            return replace(row, kind=_KIND_ASIDE[aside["why"]], lock=""), key
        return replace(row, lock=row.lock.format(key=key)), key
    return _STRANGE, path.name


def _describe(
    home: Path, path: Path, row: _Row, key: str, counted: set[tuple[int, int]], images: Mapping[str, str]
) -> _Found:
    status = path.lstat()
    guards = (path.parent,) if row.shared else ()
    if stat.S_ISDIR(status.st_mode) or stat.S_ISREG(status.st_mode):
        guards = (*guards, path)
    watched = (*guards, home / LOCKS / row.lock) if row.lock else guards
    # Of scratch it is known only when its directory was last asked for.
    used = path.parent.lstat().st_mtime if row.shared and row.kind == "scratch" else status.st_mtime
    item = CacheItem(
        kind=row.kind, key=key, path=path, size=_disk_usage(path, counted), used=used,
        in_use=any(map(_busy, watched)), about=describe(row.kind, path, images),
    )  # fmt: skip
    return _Found(item, row.lock, guards)


def _disk_usage(path: Path, counted: set[tuple[int, int]]) -> int:
    """Bytes on disk, as far as we may look; what several names share counts once."""
    total = 0
    left = [str(path)]
    while left:
        here = left.pop()
        with contextlib.suppress(FileNotFoundError, PermissionError):
            status = os.lstat(here)
            if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
                if (status.st_dev, status.st_ino) in counted:
                    continue
                counted.add((status.st_dev, status.st_ino))
            total += status.st_blocks * 512
            if stat.S_ISDIR(status.st_mode):
                left += [os.path.join(here, name) for name in os.listdir(here)]  # noqa: PTH118
    return total


def _is_directory(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _is_ccache(path: Path) -> bool:
    return _is_directory(path) and all(_IN_CCACHE.fullmatch(name) for name in os.listdir(path))


def _is_base_image(path: Path) -> bool:
    """An OCI layout with the name that scripts/base-image gives; nobody else's images are ours to remove."""
    try:
        return _is_directory(path) and b'"osbuilder-demo/' in (path / "manifest.json").read_bytes()[:65536]
    except OSError:
        return False
