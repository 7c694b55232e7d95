"""Where make works on a kernel: in a directory of hard links to its tree, with what the last such build left.

<cache>/kernel-build/<arch>-<digest of the tree's name>/linux        hard links
                                                        linux/out    make's O=
                                                        of           who compiled what lies in `out`, if it is whole
                     <key of a kernel>/linux, linux/out              the same, when another build works in the former

In a directory of its tree make has relative paths, so ccache knows every file again wherever the cache lies. What lies
in `out` from the last kernel of this tree is made anew only where an option changed that the file names: kbuild's own
rule, for which ccache, that sees a changed autoconf.h in every file, has to run the preprocessor. The place never
moves, as objtool's dependencies have it in them.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.cache import Cache
from osbuild.errors import HostError
from osbuild.kernel_source import fresh_directory

HOME: Final = "kernel-build"
_OF: Final = "of"


@contextlib.contextmanager
def place(cache: Cache, key: str, arch: str, tree: Path, compilers: str) -> Iterator[Path]:
    """The `out` of a build, in hard links to `tree`, and nobody else's meanwhile.

    What is left in it was compiled by the same `compilers` from the same tree, in a build that came to its end.
    """
    with contextlib.ExitStack() as stack:
        name = f"{arch}-{hashlib.sha256(tree.name.encode()).hexdigest()[:16]}"
        try:
            stack.enter_context(cache.lock(f"{HOME}-{name}", wait=False))
        except BlockingIOError:
            home = stack.enter_context(directory(cache, key))
            yield _linked(tree, home)
            return
        home = usable(cache, name)
        of = home / _OF
        good = _is(of, compilers)
        of.unlink(missing_ok=True)  # before anything of it changes or goes
        if not good and home.exists():
            shutil.rmtree(home)  # of other compilers, or of a run that failed or was killed
        home.mkdir(exist_ok=True)
        yield home / "linux/out" if (home / "linux/out").is_dir() else _linked(tree, home)
        of.write_text(compilers)
        _forget_others(cache, home, arch)


@contextlib.contextmanager
def directory(cache: Cache, name: str) -> Iterator[Path]:
    """An empty one, gone afterwards; nobody else builds under this name (the cache's lock, our pid)."""
    with fresh_directory(usable(cache, name)) as path:
        yield path


def usable(cache: Cache, name: str) -> Path:
    """A name that make can work with."""
    path = cache.scratch(HOME) / name
    if re.search(r"[\s:]", str(path)):
        raise HostError(
            f"the kernel's makefiles cannot build in {path}: no blanks or colons in paths",
            hint="name another directory with --cache-dir DIR or OSBUILDER_CACHE",
        )
    return path


def _linked(tree: Path, home: Path) -> Path:
    command.run("cp", "-al", str(tree), str(home / "linux"))
    out = home / "linux/out"
    out.mkdir()
    return out


def _is(path: Path, text: str) -> bool:
    try:
        return path.read_text() == text
    except OSError:
        return False


def _forget_others(cache: Cache, home: Path, arch: str) -> None:
    """Places of other trees: one tree is compiled again and again, until its patches change, and then never more."""
    for other in home.parent.glob(f"{arch}-*"):
        if other != home:
            with contextlib.suppress(OSError, HostError), cache.lock(f"{HOME}-{other.name}", wait=False):
                (other / _OF).unlink(missing_ok=True)
                shutil.rmtree(other)
