"""The files of this machine that went into a build, for make to include.

    OUT/manifest.json OUT/rootfs.img …: \\
      /home/me/osbuild.toml \\
      /home/me/guest/motd

    /home/me/osbuild.toml /home/me/guest/motd:

The last line, a rule without a recipe, keeps make going when a file is gone: it builds, and learns what is needed now.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

import osbuild
from osbuild.agents import AGENTS
from osbuild.errors import InputError
from osbuild.kernel_pins import read_pins
from osbuild.kernel_sources import KINDS
from osbuild.manifest import MANIFEST
from osbuild.output import write_whole
from osbuild.resources import resource
from osbuild.sources import find_source
from osbuild.spec import BuildSpec
from osbuild.tree import quote

_OURS: Final = ("agent", "kernel-configs", "patches", "templates")
_ESCAPED: Final = re.compile(r"([ #:*?[])")
# What make 4.3 has no way to write: these characters, and what looks like a member of an archive, LIB(MEMBER).
_NEVER: Final = re.compile(r"[%=;|\\\t\n]|.\(.+\)\Z")


def check(spec: BuildSpec, config: Path | None) -> None:
    """Before a build: InputError when make could not be told of what it names."""
    for path in (spec.out / MANIFEST, *_given(spec, config)):
        _writable(path)


def write(path: Path, spec: BuildSpec, outputs: Iterable[Path], config: Path | None) -> None:
    """For a build that is done. What it read has absolute paths: a makefile may have a target of such a name, `image`.

    Its outputs are called as they were given, for make knows them by that.
    """
    targets = [_for_make(_writable(output)) for output in outputs]
    files = [_for_make(file) for file in sorted(set(_files(spec, config)))]
    text = f"{' '.join(targets)}: \\\n  " + " \\\n  ".join(files) + f"\n\n{' '.join(files)}:\n"
    write_whole(path, os.fsencode(text))


def _files(spec: BuildSpec, config: Path | None) -> Iterator[Path]:
    """What was read, and the directories that it was found in: they are newer when a file is added or gone."""
    for path in _given(spec, config):
        yield _writable(path)
        yield from _below(path)


def _given(spec: BuildSpec, config: Path | None) -> Iterator[Path]:
    wishes = spec.rootfs
    lock = spec.lock if spec.lock and spec.lock.absolute().parent != spec.out.absolute() else None  # that is written
    agent = None if wishes.agent in AGENTS else Path(wishes.agent)
    given = (
        config, lock, spec.keyring, wishes.modules, wishes.hooks, wishes.policy, agent, _image(spec.image),
        _kernel_source(spec.kernel_source), *(addition.source for addition in wishes.add),
        *map(resource, _OURS), Path(osbuild.__file__),
    )  # fmt: skip
    yield from (path.absolute() for path in given if path is not None)


def _writable(path: Path) -> Path:
    if _NEVER.search(str(path)):
        raise InputError(f"make has no way to write {quote(str(path))}", hint="another name, or no --depfile")
    return path


def _below(path: Path) -> Iterator[Path]:
    for home, folders, files in os.walk(path):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found = (Path(home, name) for name in (*folders, *files))
        yield from (each for each in found if not _NEVER.search(str(each)) and each.exists())


def _image(image: str) -> Path | None:
    reference = find_source(image)
    at_hand = reference.transport in ("docker-archive", "oci", "dir") and reference.name != "-"
    return Path(reference.name) if at_hand else None


def _kernel_source(source: str | None) -> Path | None:
    """A tarball or a directory. Not a repository: that changes when nothing of a commit does."""
    if source is None or source in read_pins().kernels:
        return None
    kind, colon, rest = source.partition(":")
    path = rest if colon and kind in KINDS else source
    return Path(path) if kind != "git" else None


def _for_make(path: Path) -> str:
    return _ESCAPED.sub(r"\\\1", str(path)).replace("$", "$$")
