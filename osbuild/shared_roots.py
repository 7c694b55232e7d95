"""Disk images and initramfs that several builds of one run have in common: the first makes them, the others copy.

They lie in a store of the run's own, like kernels in the cache: by the digest of all that went in, one maker at a time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from osbuild import manifest
from osbuild.artifacts import DiskImage, File, Initrd
from osbuild.cache import Cache
from osbuild.console import Show
from osbuild.workspace import copy_file

if TYPE_CHECKING:  # slow to import
    from osbuild.oci import Json

Root = DiskImage | Initrd

_ABOUT: Final = "about.json"
# Of a lock's options: those that decide nothing about this kind of root.
_NOT_OF: Final = {
    "image": frozenset(("kinds", "compress", "features")), "initrd": frozenset(("kinds", "disk", "features")),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedRoots:
    """What a build does about its roots: without a store, or for kinds that nobody shares, it makes its own."""

    store: Cache | None = None
    kinds: frozenset[str] = frozenset()

    def root(self, kind: str, lock: Json, out: Path, show: Show, make: Callable[[Path], Root]) -> Root:
        """The root at `out`: made there by `make`, or copied from what it made for another build."""
        if self.store is None or kind not in self.kinds:
            return make(out)

        def fill(home: Path) -> None:
            about = manifest.about_root(make(home / out.name))
            (home / _ABOUT).write_text(json.dumps(about))

        home, there = self.store.get(kind, key_of(kind, lock), fill)
        about: dict[str, Any] = json.loads((home / _ABOUT).read_text())
        with show.step(f"copying {out.name}", name=f"copy {kind}") as step:
            step.note = "made for another build" if there else "kept for other builds"
            file = File(path=home / out.name, size=about["size"], sha256=about["sha256"])
            return manifest.root_from(copy_file(file, out), about)


def key_of(kind: str, lock: Json) -> str:
    """The digest of everything that decides a root's bytes."""
    options = {name: value for name, value in lock["options"].items() if name not in _NOT_OF[kind]}
    inputs = {name: lock[name] for name in ("osbuilder", "image", "agent", "rootfs")} | {"options": options}
    return hashlib.sha256(json.dumps([kind, inputs], sort_keys=True).encode()).hexdigest()
