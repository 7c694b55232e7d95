"""A finished build where Kata's runtimes look for it, switched by one rename.

    PREFIX/share/kata-containers/
      kata-containers.img         -> osbuilder/current/kata-containers.img          Kata's names, made once; they
      kata-containers-initrd.img  -> osbuilder/current/kata-containers-initrd.img   lead through `current`
      vmlinux.container, vmlinuz.container                                          the same
      osbuilder/
        current -> 0002-5d41402abc4b      the only thing that is ever replaced
        0001-7d793037a076/                what --rollback goes back to
        0002-5d41402abc4b/                a version: the number counts, the rest is a digest
          installed.json                  what is in it, and which version was there before
          …                               see kata: what is in a version

Source of names: kata-contract 5.5.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild.artifacts import File
from osbuild.content import write_all
from osbuild.errors import HostError, InputError, SpecError
from osbuild.kata import CURRENT, NAMES, RUNTIMES, Link, Part, contents, digest, read_bases, read_build, sha256
from osbuild.oci import Json, parse_json
from osbuild.output import sync, write_whole, writing
from osbuild.tree import quote

SHARE: Final = Path("share/kata-containers")
HOME: Final = "osbuilder"  # below SHARE: all that is ours, but for Kata's names
RECORD: Final = "installed.json"

_VERSION: Final = re.compile(r"(\d{4,})-[0-9a-f]{12}")
_STAGING: Final = ".staging-"
_GONE: Final = ".gone-"
_CHUNK: Final = 1 << 16  # also the smallest hole that is kept
_ZEROS: Final = bytes(_CHUNK)


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """What is in use now."""

    home: Path  # PREFIX/share/kata-containers/osbuilder
    version: str
    before: str  # what --rollback would go back to; empty when there is nothing
    changed: bool  # something else was in use a moment ago
    root: str  # what the configurations boot: image or initrd

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        here = self.home / CURRENT
        homes = {
            name: [vmm.name for vmm in vmms if (here / name / vmm.name).is_dir()] for name, vmms in RUNTIMES.items()
        }
        return {
            "path": str(self.home / self.version), "version": self.version, "before": self.before or None,
            "changed": self.changed, "root": self.root,
            "configurations": {
                name: {vmm: str(here / name / vmm / "configuration.toml") for vmm in vmms}
                for name, vmms in homes.items()
            },
            "containerd": {name: str(here / name / "containerd.toml") for name in RUNTIMES},
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        word = "now in use" if self.changed else "in use already"
        back = f"--rollback goes back to {self.before}" if self.before else "there is nothing to go back to"
        here = self.home / CURRENT
        return [f"{self.version} is {word}; {back}", *(f"{here / name}/containerd.toml" for name in RUNTIMES)]


def command(out: Path | None, prefix: Path, *, root: str, kata: Path | None, rollback: bool) -> Installed:
    """What the words on the command line ask for."""
    if rollback:
        if out is not None or root or kata is not None:
            raise SpecError(
                "--rollback installs nothing: no build and no other option beside it", hint="run it by itself"
            )
        return roll_back(prefix)
    if out is None:
        raise SpecError("no build is named", hint="osbuilder install OUT --prefix DIR")
    return install(out, prefix, root=root, kata=kata)


def install(out: Path, prefix: Path, *, root: str = "", kata: Path | None = None) -> Installed:
    """Put a build below `prefix` and use it; the same build again changes nothing.

    root: what the configurations boot where the build has both: the image unless told otherwise.
    kata: the prefix of Kata's own release, whose configurations say what a build does not.
    """
    build = read_build(out, root)
    bases = read_bases(kata) if kata else {}
    share = _share(prefix)
    home = share / HOME
    key = digest(contents(build, bases, home / "VERSION"))  # the prefix counts: the configurations name it
    with _guarded(share), _locked(home):
        _check_names(share)
        _sweep(home)
        now = _current(home)
        good = bool(now) and _whole(home / now)
        if good and now.endswith(f"-{key}"):
            _make_names(share)
            return _installed(home, now, changed=False)
        before = now if good else _before(home, now)
        version = f"{_next_number(home, now):04d}-{key}"
        with _staging(home) as staging:
            parts = contents(build, bases, home / version)
            _fill(staging, parts)
            write_whole(staging / RECORD, _encode(_describe(parts, before, build.booted)))
            sync(staging)
            staging.rename(home / version)
        sync(home)
        _make_names(share)  # before the first switch they lead nowhere, and all of them lead somewhere with it
        _switch(home, version)
        _remove_all_but(home, version, before)
        return _installed(home, version, changed=True)


def roll_back(prefix: Path) -> Installed:
    """Use what was in use before; what is in use now stays where it is until the next installation."""
    share = _share(prefix)
    home = share / HOME
    if not home.is_dir():
        raise InputError(f"nothing of ours is installed below {quote(str(prefix))}", hint="osbuilder install OUT")
    with _guarded(share), _locked(home):
        before = _before(home, _current(home))
        if not before:
            raise InputError(f"nothing is left to go back to below {quote(str(prefix))}", hint="install it again")
        if not _whole(home / before):
            raise InputError(f"{quote(str(home / before))} is damaged", hint="install that build again")
        _switch(home, before)
        return _installed(home, before, changed=True)


# --- what goes into a version ---------------------------------------------------------------------------------------


def _fill(staging: Path, parts: Mapping[str, Part]) -> None:
    for name, part in parts.items():
        path = staging / name
        _make_directories(path.parent, staging)
        match part:
            case File():
                _copy(part, path)
            case Link(target=target):
                path.symlink_to(target)
            case bytes():
                write_whole(path, part)


def _make_directories(path: Path, top: Path) -> None:
    """Whatever the umask: a runtime of another user's may read it."""
    if path != top and not path.is_dir():
        _make_directories(path.parent, top)
        path.mkdir()
        path.chmod(0o755)
        sync(path.parent)


def _describe(parts: Mapping[str, Part], before: str, root: str) -> Json:
    return {
        "schema": "osbuilder.installed", "version": 1, "before": before, "root": root,
        "files": {name: sha256(part) for name, part in parts.items() if not isinstance(part, Link)},
        "links": {name: part.target for name, part in parts.items() if isinstance(part, Link)},
    }  # fmt: skip


def _copy(file: File, target: Path) -> None:
    """A file of the build, with its holes; refused when it is no longer what its manifest says."""
    total = hashlib.sha256()
    with file.path.open("rb") as source, writing(target, needs=file.path.stat().st_blocks * 512) as descriptor:
        size = 0
        while data := source.read(_CHUNK):
            total.update(data)
            if data != _ZEROS[: len(data)]:
                write_all(descriptor, data, size)
            size += len(data)
        os.ftruncate(descriptor, size)
        if (size, total.hexdigest()) != (file.size, file.sha256):
            raise InputError(f"{quote(str(file.path))} changed while it was read", hint="wait until its build is done")


# --- where it goes --------------------------------------------------------------------------------------------------


def _share(prefix: Path) -> Path:
    if not str(prefix).isprintable():  # TOML holds UTF-8, and no control characters
        raise SpecError(f"{quote(str(prefix))} cannot stand in a configuration", hint="name another directory")
    return Path(os.path.abspath(prefix)) / SHARE  # noqa: PTH100 - a link on the way stays one


@contextlib.contextmanager
def _guarded(share: Path) -> Iterator[None]:
    """What the machine refuses, in one line."""
    try:
        yield
    except OSError as problem:
        where = quote(str(problem.filename or share))
        raise HostError(f"cannot install: {where}: {problem.strerror}", hint="choose another --prefix") from problem


@contextlib.contextmanager
def _locked(home: Path) -> Iterator[None]:
    """One installation at a time; who is killed lets go."""
    if home.is_symlink() or (home.exists() and not home.is_dir()):
        raise SpecError(f"{quote(str(home))} is not a directory of ours", hint="choose another --prefix")
    missing = [path for path in (home, *home.parents) if not path.exists()]
    home.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        path.chmod(0o755)  # whatever the umask: a runtime of another user's may read it
        sync(path.parent)
    descriptor = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _check_names(share: Path) -> None:
    """Kata's names are ours, or free: what its own release has put there is not replaced."""
    for name in NAMES:
        path = share / name
        taken = os.path.lexists(path)
        if taken and not (path.is_symlink() and str(path.readlink()) == _link(name)):
            raise SpecError(
                f"{quote(str(path))} is there, and not ours", hint="move it away, or choose another --prefix"
            )


def _make_names(share: Path) -> None:
    for name in NAMES:
        if not os.path.lexists(share / name):
            (share / name).symlink_to(_link(name))
    sync(share)


def _link(name: str) -> str:
    return f"{HOME}/{CURRENT}/{name}"


def _switch(home: Path, version: str) -> None:
    """The one step that counts."""
    temporary = home / f"{_STAGING}{CURRENT}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(version)
    temporary.rename(home / CURRENT)
    sync(home)


def _current(home: Path) -> str:
    """The version in use; empty before the first."""
    try:
        version = str((home / CURRENT).readlink())
    except FileNotFoundError:
        return ""
    except OSError:
        version = ""
    if not _VERSION.fullmatch(version):
        raise InputError(f"{quote(str(home / CURRENT))} is not a link of ours", hint="move it away")
    return version


def _before(home: Path, version: str) -> str:
    """What was in use before a version, when both are still there."""
    try:
        before = str(_record(home / version).get("before", "")) if version else ""
    except InputError:
        return ""
    return before if _VERSION.fullmatch(before) and before != version and (home / before).is_dir() else ""


def _record(version: Path) -> Json:
    try:
        record = parse_json((version / RECORD).read_bytes(), quote(str(version / RECORD)))
    except FileNotFoundError:
        record = None
    if not isinstance(record, dict) or record.get("schema") != "osbuilder.installed":
        raise InputError(f"{quote(str(version / RECORD))} is not one of ours", hint="install a build again")
    return record


def _whole(version: Path) -> bool:
    """Whether every file and link of a version is what it was when it was installed."""
    try:
        record = _record(version)
        return all(File.of(version / name).sha256 == said for name, said in record["files"].items()) and all(
            str((version / name).readlink()) == said for name, said in record["links"].items()
        )
    except (OSError, InputError, KeyError, AttributeError):
        return False


def _installed(home: Path, version: str, *, changed: bool) -> Installed:
    root = str(_record(home / version).get("root", ""))
    return Installed(home=home, version=version, before=_before(home, version), changed=changed, root=root)


def _next_number(home: Path, now: str) -> int:
    """`now` may be the name of what somebody took away."""
    numbers = [int(match[1]) for name in (*os.listdir(home), now) if (match := _VERSION.fullmatch(name))]
    return max(numbers, default=0) + 1


@contextlib.contextmanager
def _staging(home: Path) -> Iterator[Path]:
    staging = Path(tempfile.mkdtemp(prefix=_STAGING, dir=home))
    try:
        staging.chmod(0o755)
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _sweep(home: Path) -> None:
    """What killed runs left; whoever holds the lock is alone."""
    for name in os.listdir(home):
        if name.startswith((_STAGING, _GONE)):
            path = home / name
            path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


def _remove_all_but(home: Path, *kept: str) -> None:
    """Older versions. Renamed first: what has a version's name is whole. A running guest keeps what it has open."""
    for name in os.listdir(home):
        if _VERSION.fullmatch(name) and name not in kept:
            (home / name).rename(home / f"{_GONE}{name}")
    _sweep(home)


def _encode(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
