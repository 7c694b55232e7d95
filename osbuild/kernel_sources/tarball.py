"""A kernel source as a tarball: one that is pinned in versions.toml, or any file."""

from __future__ import annotations

import shutil
from pathlib import Path

from osbuild import command
from osbuild.artifacts import File
from osbuild.cache import Cache
from osbuild.errors import CommandError, HostError, InputError
from osbuild.kernel_pins import VERSIONS, Pin
from osbuild.kernel_source import KernelSource, series_of
from osbuild.kernel_sources import signature
from osbuild.kernel_sources.base import Wish, check_tree, remembered, tree_named


def fetch(wish: Wish) -> KernelSource:
    """Any tarball: its sha256 is all that is known of it, and goes into the kernel's key."""
    return unpacked(find(wish.text), wish.cache)


def fetch_pinned(name: str, wish: Wish) -> KernelSource:
    """The tarball that versions.toml knows by this name, when it is that one.

    Who named none gets what Debian's package has now if that is another version: its origin says so, and its digest
    goes into the kernel's key and into lock.json.
    """
    pin = wish.pins.kernels[name]
    if not pin.file.is_file():
        raise HostError(f"no kernel source: {pin.file} is missing", hint=_obtain(pin))
    found = digest(pin.file, wish.cache)
    if found != pin.sha256 and not wish.text:
        newer = _of_package(pin)
        if newer:
            return unpacked(pin.file, wish.cache, origin=f"{pin.source} {newer}, where {pin.version} is pinned")
    if found != pin.sha256:
        raise InputError(
            f"{pin.file} is not {pin.version}, which {VERSIONS} pins: its sha256 is {found}",
            hint=f"{_obtain(pin)}; or --source {pin.file} takes it as it is",
        )
    if pin.source == "kernel.org":
        signature.check(pin.file, wish.pins.keys, wish.keyring)
    return unpacked(pin.file, wish.cache, origin=f"{pin.source} {pin.version}", series=pin.series)


def _of_package(pin: Pin) -> str:
    """The version of the package that has the file, if it is whole: Debian moves on, and signs what it has."""
    if pin.source != "debian" or not pin.package or not _has_dpkg():
        return ""
    try:
        owner = command.run("dpkg-query", "-S", str(pin.file)).output.partition(":")[0]
        if owner != pin.package or command.run("dpkg", "--verify", pin.package).output.strip():
            return ""
        return command.run("dpkg-query", "-W", "-f", "${Version}", pin.package).output.strip()
    except CommandError:
        return ""


def _has_dpkg() -> bool:
    return shutil.which("dpkg-query") is not None


def find(text: str) -> Path:
    """The file, absolute."""
    path = Path(text).absolute()
    if path.is_file():
        return path
    raise InputError(f"no kernel source at {path}")


def unpacked(tarball: Path, cache: Cache, *, origin: str = "", series: str | None = None) -> KernelSource:
    """The tree in a tarball, unpacked once for its content; InputError when it is of another series than was said."""

    def make(staging: Path) -> Path:
        tree = _unpack(tarball, staging)
        if series and series_of(tree) != series:
            raise InputError(f"{tarball} holds Linux {series_of(tree)}, where {VERSIONS} says {series}")
        return tree

    return tree_named(digest(tarball, cache), cache, make, origin or tarball.name, series)


def digest(tarball: Path, cache: Cache) -> str:
    """The tarball's sha256, remembered for as long as the file looks the same: reading 150 MB takes 0.3 s."""
    status = tarball.stat()
    seen = [str(tarball), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return remembered(cache, str(tarball), seen, lambda: File.of(tarball).sha256)


def _unpack(tarball: Path, staging: Path) -> Path:
    try:
        command.run("tar", "-C", str(staging), "--no-same-owner", "-xf", str(tarball))
    except CommandError as problem:
        raise InputError(f"cannot unpack {tarball}: {command.last_line(problem.tail)}") from problem
    inside = list(staging.iterdir())
    if len(inside) != 1:
        raise InputError(f"{tarball} is not a kernel source: {len(inside)} things at its top, and not one directory")
    return check_tree(inside[0], str(tarball))


def _obtain(pin: Pin) -> str:
    return f"apt-get install {pin.package}={pin.version}" if pin.package else f"put {pin.version} there"
