"""What all kinds of kernel sources share: a tree made once under the name of its content, and what a tree must have."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from osbuild.cache import Cache
from osbuild.errors import HostError, InputError
from osbuild.kernel_pins import Pins
from osbuild.kernel_source import KernelSource, make_tree, series_of
from osbuild.output import write_whole


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Which source: the words after its kind's prefix, and what else may be said about it."""

    text: str
    cache: Cache
    pins: Pins
    keyring: Path | None = None  # public keys, where the tree has none


class Kind(Protocol):
    """A kind of source. A module with this function and a row in KINDS is one."""

    def fetch(self, wish: Wish) -> KernelSource:
        """The tree, which nothing may write into; InputError when it is none, HostError when a tool is missing."""
        ...


def tree_named(
    digest: str, cache: Cache, make: Callable[[Path], Path], origin: str, series: str | None = None
) -> KernelSource:
    """The tree of that content, made in an empty directory unless it is there: on use, if `series` is known."""
    series = series or series_of(make_tree(cache, digest, make))
    return KernelSource(unpack=lambda: make_tree(cache, digest, make), sha256=digest, series=series, origin=origin)


def check_tree(tree: Path, name: str) -> Path:
    """The tree, when it is a kernel's and nobody has built in it."""
    if not (tree / "scripts/kconfig/merge_config.sh").is_file():
        raise InputError(f"{name} is not a kernel source: no scripts/kconfig/merge_config.sh in it")
    series_of(tree)
    if (tree / ".config").exists() or (tree / "include/config").exists():
        raise InputError(
            f"{name} has been built in: make refuses such a tree as a source",
            hint="make mrproper in it, or git:PATH to take what is committed",
        )
    return tree


def remembered(cache: Cache, what: str, seen: object, measure: Callable[[], str]) -> str:
    """What `measure` said of a thing that looked like this; a cache that cannot be written to remembers nothing."""
    record = cache.scratch("kernel-source") / f"{hashlib.sha256(os.fsencode(what)).hexdigest()[:16]}.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads(record.read_text())
        if known["seen"] == seen:
            return str(known["sha256"])
    found = measure()
    with contextlib.suppress(HostError):
        write_whole(record, json.dumps({"seen": seen, "sha256": found}).encode())
    return found
