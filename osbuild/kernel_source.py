"""Kernel source: a tarball found, unpacked once and never changed; patches go into a copy of their own.

<cache>/kernel-source/<sha256 of the tarball>/                      as unpacked
                      <sha256 of the tarball>-<digest of patches>/  hard links to it, patched files replaced
                      <digest of a path>.json                       what that tarball's sha256 was, and when
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.artifacts import File
from osbuild.cache import Cache
from osbuild.errors import BuildError, CommandError, HostError, InputError
from osbuild.output import write_whole

DEFAULT: Final = Path("/usr/src/linux-source-6.12.tar.xz")
_PACKAGE: Final = "linux-source-6.12"
_PATCH: Final = re.compile(r"(\d{4})-.+\.patch")

# git reads no configuration but ours, and does not look for a repository around the tree: inside one, `git apply`
# takes the patch's names as relative to the repository, skips them all and exits 0.
_GIT: Final = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSource:
    """An unpacked kernel tree that nothing may write into."""

    tree: Path
    sha256: str  # of the tarball
    series: str  # 6.12: which patches belong to it


def open_source(tarball: Path | None, cache: Cache) -> KernelSource:
    """The unpacked tree of a tarball (Debian's kernel source when None); unpacks it the first time."""
    tarball = _find(tarball)
    sha256 = _digest(tarball, cache)
    tree = _once(cache, sha256, lambda staging: _unpack(tarball, staging))
    return KernelSource(tree=tree, sha256=sha256, series=_series(tree))


def find_patches(directory: Path | None, series: str) -> tuple[Path, ...]:
    """The patches of one kernel series, in the order of their numbers."""
    found = sorted((directory / series).glob("*.patch")) if directory is not None else []
    for path in found:
        if not _PATCH.fullmatch(path.name):
            raise InputError(f"{path}: patches are applied by number", hint="call it NNNN-what-it-does.patch")
    return tuple(found)


def patch_source(source: KernelSource, patches: Sequence[Path], cache: Cache) -> Path:
    """A tree with the patches applied in order: all of them, or none and no tree."""
    if not patches:
        return source.tree
    digest = hashlib.sha256(b"".join(File.of(path).sha256.encode() for path in patches)).hexdigest()

    def make(staging: Path) -> Path:
        copy = staging / "linux"
        command.run("cp", "-al", str(source.tree), str(copy))
        for path in patches:
            _apply(path.absolute(), copy)
        return copy

    return _once(cache, f"{source.sha256}-{digest[:16]}", make)


def _find(tarball: Path | None) -> Path:
    path = DEFAULT if tarball is None else tarball.absolute()
    if path.is_dir():
        raise InputError(f"{path} is a directory", hint="the kernel source is given as a tarball: its digest names it")
    if path.is_file():
        return path
    if tarball is None:
        raise HostError(f"no kernel source: {path} is missing", hint=f"apt-get install {_PACKAGE}")
    raise InputError(f"no kernel source at {path}")


def _digest(tarball: Path, cache: Cache) -> str:
    """The tarball's sha256, remembered for as long as the file looks the same: reading 150 MB takes 0.3 s."""
    status = tarball.stat()
    seen = [str(tarball), status.st_size, status.st_mtime_ns, status.st_ino]
    record = cache.scratch("kernel-source") / f"{hashlib.sha256(os.fsencode(tarball)).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(record.read_text())
        if known["seen"] == seen:
            return str(known["sha256"])
    sha256 = File.of(tarball).sha256
    with contextlib.suppress(HostError):  # a cache that cannot be written to: measured again next time
        write_whole(record, json.dumps({"seen": seen, "sha256": sha256}).encode())
    return sha256


def _once(cache: Cache, name: str, make: Callable[[Path], Path]) -> Path:
    """A tree of that name, made in a staging directory and moved when `make` says where it is."""
    home = cache.scratch("kernel-source") / name
    if home.is_dir():
        return home
    with cache.lock(f"kernel-source-{name}"):
        if home.is_dir():  # somebody else made it while we waited
            return home
        with fresh_directory(home.with_name(f"staging-{name}")) as staging:
            make(staging).rename(home)
    return home


@contextlib.contextmanager
def fresh_directory(path: Path) -> Iterator[Path]:
    """An empty directory that is gone afterwards; the caller makes sure that nobody else uses this name."""
    shutil.rmtree(path, ignore_errors=True)  # of a run that was killed
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _unpack(tarball: Path, staging: Path) -> Path:
    try:
        command.run("tar", "-C", str(staging), "--no-same-owner", "-xf", str(tarball))
    except CommandError as problem:
        raise InputError(f"cannot unpack {tarball}: {_last_line(problem.tail)}") from problem
    inside = list(staging.iterdir())
    if len(inside) != 1 or not (inside[0] / "scripts/kconfig/merge_config.sh").is_file():
        raise InputError(f"{tarball} is not a kernel source: no scripts/kconfig/merge_config.sh in its one directory")
    _series(inside[0])
    return inside[0]


def _series(tree: Path) -> str:
    text = (tree / "Makefile").read_text(errors="replace") if (tree / "Makefile").is_file() else ""
    found = [re.search(rf"^{name} = (\d+)$", text, re.MULTILINE) for name in ("VERSION", "PATCHLEVEL")]
    numbers = [match[1] for match in found if match is not None]
    if len(numbers) != len(found):
        raise InputError(f"{tree}/Makefile names no kernel version")
    return ".".join(numbers)


def _apply(patch: Path, tree: Path) -> None:
    """Apply one patch to a tree of our own, and see for ourselves that it changed what it names."""
    environment = _GIT | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    try:
        command.run("git", "apply", "--check", str(patch), cwd=tree, env=environment)
        listed = command.run("git", "apply", "--numstat", "-z", str(patch), cwd=tree, env=environment).output
        names = [record.split("\t", 2)[2] for record in listed.split("\0") if record]
        before = [_fingerprint(tree / name) for name in names]
        # git replaces a file it changes rather than writing into it, so the links to the clean tree stay clean.
        command.run("git", "apply", str(patch), cwd=tree, env=environment)
    except CommandError as problem:
        raise BuildError(f"{patch} does not apply: {_last_line(problem.tail)}", hint="nothing was changed") from problem
    for name, old in zip(names, before, strict=True):
        if _fingerprint(tree / name) == old:
            raise BuildError(f"{patch} was applied, but {name} is what it was")
    if not names:
        raise BuildError(f"{patch} changes no file")


def _fingerprint(path: Path) -> tuple[int, bytes] | None:
    return (path.stat().st_mode, path.read_bytes()) if path.is_file() else None


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it gave no reason"
