"""Kernel source: a tree of our own that never changes; kernel_patches gives patches a copy of their own.

<cache>/kernel-source/<sha256>/                      as kernel_sources made it: of a tarball, a git tree, a directory
                      <sha256>-<digest of patches>/  hard links to it, patched files replaced
                      <digest of a path>.json        what the sha256 of a tarball or directory was, and when
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from osbuild.cache import Cache
from osbuild.errors import InputError

# git reads no configuration but ours.
GIT: Final = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_NOSYSTEM": "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSource:
    """A kernel tree that nothing may write into, unpacked when somebody needs it: a finished kernel needs none."""

    unpack: Callable[[], Path] = field(compare=False)
    sha256: str  # of the tarball, or what stands for the content
    series: str  # 6.12: which patches belong to it
    origin: str = ""  # for people: whose it is, and which

    @property
    def tree(self) -> Path:
        """Where it is; unpacked now if it is not."""
        return self.unpack()


def make_tree(cache: Cache, name: str, make: Callable[[Path], Path]) -> Path:
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


def series_of(tree: Path) -> str:
    """Which kernels a tree belongs to, from its Makefile: 6.12."""
    text = (tree / "Makefile").read_text(errors="replace") if (tree / "Makefile").is_file() else ""
    found = [re.search(rf"^{name} = (\d+)$", text, re.MULTILINE) for name in ("VERSION", "PATCHLEVEL")]
    numbers = [match[1] for match in found if match is not None]
    if len(numbers) != len(found):
        raise InputError(f"{tree}/Makefile names no kernel version")
    return ".".join(numbers)
