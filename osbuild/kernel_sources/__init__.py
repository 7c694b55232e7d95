"""Where a kernel source comes from: a name that is pinned, or a kind and a place. Each kind is a module and a row.

(nothing)             the default of versions.toml, or what Debian's package of that name has by now
6.12                  a name of versions.toml: that file, and no other
kernel.org:FILE       a tarball with its PGP signature beside it
git:PATH[#REF]        a commit of a repository
dir:PATH              a directory, as it is now
PATH                  a directory, or any tarball
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from osbuild.cache import Cache
from osbuild.errors import SpecError
from osbuild.kernel_pins import Pins, read_pins
from osbuild.kernel_source import KernelSource
from osbuild.kernel_sources import directory, git, kernel_org, tarball
from osbuild.kernel_sources.base import Kind, Wish
from osbuild.tree import quote

KINDS: Final[Mapping[str, Kind]] = {
    "kernel.org": kernel_org, "git": git, "dir": directory, "tarball": tarball,
}  # fmt: skip


def open_source(
    source: str | Path | None, cache: Cache, *, keyring: Path | None = None, pins: Pins | None = None
) -> KernelSource:
    """The tree of a source, written as above; it is unpacked or copied the first time, and never changed."""
    text = "" if source is None else str(source)
    known = pins or read_pins()
    wish = Wish(text=text, cache=cache, pins=known, keyring=keyring)
    if not text or text in known.kernels:
        return tarball.fetch_pinned(text or known.default, wish)
    kind, colon, rest = text.partition(":")
    if colon and kind in KINDS:
        if not rest:
            raise SpecError(f"--source {quote(text)} names no place", hint=f"{kind}:PATH")
        return KINDS[kind].fetch(dataclasses.replace(wish, text=rest))
    return KINDS["dir" if Path(text).is_dir() else "tarball"].fetch(wish)


def below(source: str, home: Path) -> str:
    """The same source with its path, if it has one, relative to `home`."""
    if source in read_pins().kernels:
        return source
    kind, colon, rest = source.partition(":")
    return f"{kind}:{home / rest}" if colon and kind in KINDS else str(home / source)
