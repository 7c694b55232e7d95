"""A directory with a kernel in it, as it is now. It is only read: what is built is a copy of our own.

Not an overlay of hard links: an editor that writes into a file would write into the copy, too.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.errors import CommandError, InputError
from osbuild.kernel_source import KernelSource
from osbuild.kernel_sources.base import Wish, check_tree, remembered, tree_named

_SETTLED_SECONDS: Final = 2.0  # a file changed later than this may change again without another time
_LEFT_OUT: Final = ".git"


def fetch(wish: Wish) -> KernelSource:
    """PATH: a copy of the tree there, under the digest of all its names, modes and bytes."""
    home = Path(wish.text).absolute()
    if not home.is_dir():
        raise InputError(f"no directory at {home}")
    check_tree(home, str(home))
    seen, newest = _look(home)
    if time.time() - newest < _SETTLED_SECONDS:
        digest = measure(home)
    else:
        digest = remembered(wish.cache, f"dir:{home}", seen, lambda: measure(home))
    return tree_named(digest, wish.cache, lambda staging: _copy(home, staging, digest), f"directory {home.name}")


def measure(home: Path) -> str:
    """sha256 over every path with its kind, whether it can be run, and its content."""
    total = hashlib.sha256()
    for path, status in _walk(home):
        name = os.fsencode(path.relative_to(home))
        if stat.S_ISLNK(status.st_mode):
            body = b"l" + hashlib.sha256(os.fsencode(path.readlink())).digest()
        else:
            with path.open("rb") as file:
                body = hashlib.file_digest(file, "sha256").digest()
            body = (b"x" if status.st_mode & stat.S_IXUSR else b"f") + body
        total.update(len(name).to_bytes(4, "little") + name + body)
    return total.hexdigest()


def _look(home: Path) -> tuple[str, float]:
    """What the tree looks like from outside, and when something in it changed last."""
    total, newest = hashlib.sha256(), 0.0
    for path, found in _walk(home):
        facts = (str(path), found.st_mode, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)
        total.update(repr(facts).encode(errors="surrogateescape"))
        newest = max(newest, found.st_ctime)
    return total.hexdigest(), newest


def _walk(home: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """Files and symbolic links, sorted; git's own are none of the kernel's."""
    for directory, names, files in os.walk(home):
        names[:] = sorted(name for name in names if name != _LEFT_OUT)
        here = Path(directory)
        linked = [name for name in names if (here / name).is_symlink()]
        for name in sorted([*files, *linked]):
            path = here / name
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode):
                raise InputError(f"{path} is neither a file nor a symbolic link")
            if name != _LEFT_OUT:
                yield path, status


def _copy(home: Path, staging: Path, digest: str) -> Path:
    copy = staging / "linux"
    try:
        command.run("cp", "-R", "--preserve=mode,links,timestamps", "--reflink=auto", str(home), str(copy))
        command.run("rm", "-rf", str(copy / _LEFT_OUT))
    except CommandError as problem:
        raise InputError(f"cannot copy {home}: {command.last_line(problem.tail)}") from problem
    if measure(copy) != digest:
        raise InputError(f"{home} changed while it was copied", hint="start again when nobody writes there")
    return copy
