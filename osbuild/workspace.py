"""The directory that a build fills: ours alone while we work, and emptied only of what an earlier build left.

OUT/.new    everything is made here first
OUT         gets it, in place of the earlier build, when all of it is there: a build that cannot be costs nothing
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from osbuild.artifacts import File
from osbuild.errors import BuildError, HostError, SpecError
from osbuild.manifest import LOCK, MANIFEST, NAMES, PROVENANCE, SBOM
from osbuild.output import sync, write_whole, writing
from osbuild.tree import copy_range, quote

MARK: Final = ".osbuilder"  # made before the first output, so that what a killed build left is known for what it is
_FILES: Final = frozenset((*NAMES.values(), "vmlinux", "vmlinuz", "config", MANIFEST, LOCK, SBOM, PROVENANCE, MARK))
_NEW: Final = ".new"
_DIRECTORIES: Final = frozenset(("smoke", _NEW))


@contextlib.contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """The output directory, locked; refused when it holds anything that no build of ours put there."""
    with directory(out), locked(out, hint="name another directory with -o"):
        refuse_what_is_not_ours(out)
        with _marked(out):
            yield out.absolute()


@contextlib.contextmanager
def directory(out: Path) -> Iterator[None]:
    """A directory named with -o, made if there is none; afterwards it goes again if nothing came of it."""
    made = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise SpecError(f"{quote(str(out))} exists and is not a directory", hint="name another with -o") from None
    except OSError as problem:
        raise HostError(f"cannot make {quote(str(out))}: {problem.strerror}", hint="name another with -o") from problem
    try:
        yield
    finally:
        if made:
            with contextlib.suppress(OSError):
                out.rmdir()


@contextlib.contextmanager
def locked(out: Path, *, hint: str = "copy the build to a directory of your own, and boot that") -> Iterator[None]:
    """Nobody else builds or boots in this directory meanwhile; the lock dies with its process."""
    if not os.access(out, os.W_OK | os.X_OK):
        raise HostError(f"{quote(str(out))} cannot be written to", hint=hint)
    handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another osbuilder is at work in {quote(str(out))}"
            raise HostError(message, hint=f"wait until it has ended, or {hint}") from None
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _marked(out: Path) -> Iterator[None]:
    """The mark while we work, and for as long as anything of ours is there; nothing unfinished afterwards."""
    if not (out / MARK).exists():
        write_whole(out / MARK, b"osbuilder writes here; the next build removes what this one made\n")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(out / _NEW, ignore_errors=True)
            if os.listdir(out) == [MARK]:
                (out / MARK).unlink()


def make_room(out: Path) -> Path:
    """An empty directory beside the outputs of the last build, for those of this one."""
    new = out / _NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    return new


@contextlib.contextmanager
def room_for(out: Path) -> Iterator[Path]:
    """The same for as long as the block lasts."""
    try:
        yield make_room(out)
    finally:
        shutil.rmtree(out / _NEW, ignore_errors=True)


def replace_outputs(out: Path) -> None:
    """Put what was made in place of what an earlier build left.

    Its manifest goes first: from then on nothing here is proof of anything.
    """
    (out / MANIFEST).unlink(missing_ok=True)
    for name in os.listdir(out):
        if name in (_NEW, MARK):
            continue
        if name in _DIRECTORIES:
            shutil.rmtree(out / name)
        else:
            (out / name).unlink()
    for path in sorted((out / _NEW).iterdir()):
        path.rename(out / path.name)
    (out / _NEW).rmdir()
    sync(out)


def put_in_place(out: Path) -> None:
    """Put what was made over what is there under the same names; the rest of the build stays, but for its proof.

    The manifest and the smoke test's report are about files that are no more.
    """
    (out / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(out / "smoke", ignore_errors=True)
    for path in sorted((out / _NEW).iterdir()):
        path.rename(out / path.name)
    (out / _NEW).rmdir()
    sync(out)


def copy_file(file: File, out: Path) -> File:
    """A copy of a finished file, compared with what it should be."""
    with writing(out) as descriptor, file.path.open("rb") as source:
        copy_range(source.fileno(), 0, file.size, descriptor, 0)
    copied = File.of(out)
    if copied.sha256 != file.sha256:
        raise BuildError(f"{quote(str(out))} did not become what {quote(str(file.path))} is")
    return copied


def refuse_what_is_not_ours(out: Path) -> None:
    """SpecError when a directory holds anything that no build of ours put there."""
    names = sorted(os.listdir(out))
    known = {MARK, MANIFEST} & set(names)
    for name in names:
        directory = stat.S_ISDIR((out / name).lstat().st_mode)
        expected = name in _DIRECTORIES if directory else name in _FILES or _is_temporary(name)
        if not (known and expected):
            raise SpecError(
                f"{quote(str(out))} holds {quote(name)}, which is no output of ours",
                hint="name an empty directory, or one of an earlier build, with -o",
            )


def _is_temporary(name: str) -> bool:
    return any(name.startswith(f".{ours}.") for ours in _FILES)
