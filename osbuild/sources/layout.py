"""`oci:PATH[:TAG]`: an OCI image layout (image-spec image-layout.md), as a directory or packed by tar.

No blob is believed unchecked: size and sha256 are those of its descriptor, or the image is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Protocol

from osbuild import oci
from osbuild.errors import InputError
from osbuild.limits import Limits
from osbuild.sources.image import SourceImage, Stack, Want, add_layer, finished, match_layers, unreadable
from osbuild.sources.members import Members, open_archive
from osbuild.tree import Spool, quote
from osbuild.uncompress import CHUNK

_REF_NAME: Final = "org.opencontainers.image.ref.name"
_FULL_NAME: Final = "io.containerd.image.name"  # what `docker save` and `ctr image export` put beside it
_NESTING_MAX: Final = 4  # indexes inside indexes
MARK: Final = "oci-layout"  # the file that every layout has
_HINT: Final = "oci:PATH[:TAG] names an OCI image layout"
_ROOT_NAMES: Final = frozenset(("bin", "etc", "usr", "sbin", "lib"))


class _Files(Protocol):
    """Where a layout's files are."""

    limits: Limits  # for its layers

    def check_kind(self) -> None:
        """InputError, with what it may be instead, when this is no layout at all."""

    def document(self, name: str) -> bytes:
        """A small file."""

    def open(self, name: str) -> contextlib.AbstractContextManager[tuple[int, Iterator[bytes]]]:
        """A file's size, and its bytes."""


def open_image(reference: oci.Reference, want: Want) -> SourceImage:
    """The image of that tag and platform in a layout."""
    where = str(reference)
    files = _open(reference.name, where, want)
    _check_layout(files, where)
    descriptor = _choose(files, reference.tag, want.platform, where)
    manifest = oci.parse_manifest(_document(files, descriptor, where), where)
    config = oci.parse_config(_document(files, manifest.config, where), where)
    match_layers(manifest.layers, config, where)
    spool = Spool()
    stack = Stack(where=where, limits=files.limits)
    for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True):
        if not stack.again(layer.blob, diff_id):
            data, compression = _stream(files, layer, where), oci.LAYER_TYPES[layer.media_type]
            stack.add(layer.blob, add_layer(spool, data, compression, diff_id, where, files.limits))
    return finished(where, descriptor.digest, config, stack.layers, want, manifest)


def _open(name: str, where: str, want: Want) -> _Files:
    path = Path(name)
    try:
        directory = name != "-" and stat.S_ISDIR(path.stat().st_mode)
    except FileNotFoundError:
        raise InputError(f"{quote(name)} does not exist", hint=_HINT) from None
    except OSError as problem:
        raise unreadable(quote(name), problem, hint=_HINT) from None
    if directory:
        return _Directory(path, where, want.limits)
    return _Packed(Members(open_archive(name, want.limits), where, want.limits), name)


def _check_layout(files: _Files, where: str) -> None:
    files.check_kind()
    version = oci.parse_json(files.document(MARK), where).get("imageLayoutVersion")
    if version != "1.0.0":
        raise InputError(f"{where}: image layout version {quote(str(version)[:40])}, not 1.0.0")


def _choose(files: _Files, tag: str, platform: oci.Platform, where: str) -> oci.Descriptor:
    """The one manifest that tag and platform leave; more or fewer than one is refused with what there is."""
    found = list(oci.parse_index(files.document("index.json"), where))
    if tag:
        names = sorted({name for item in found for name in _names(item)})
        found = [item for item in found if tag in _names(item)]
        if not found:
            raise InputError(
                f"{where}: no image has the tag {quote(tag)}",
                hint=f"there are: {', '.join(map(quote, names)) or 'none'}",
            )
    for _ in range(_NESTING_MAX):
        descriptor = _one(found, platform, where)
        if descriptor.media_type in oci.MANIFEST_TYPES:
            return descriptor
        if descriptor.media_type not in oci.INDEX_TYPES:
            raise InputError(f"{where}: {quote(descriptor.media_type)} is no image")
        found = list(oci.parse_index(_document(files, descriptor, where), where))
    raise InputError(f"{where}: indexes nested more than {_NESTING_MAX} deep")


def _one(found: list[oci.Descriptor], platform: oci.Platform, where: str) -> oci.Descriptor:
    if not found:
        raise InputError(f"{where}: the layout holds no image")
    if len(found) == 1:
        return found[0]
    wanted = [item.platform for item in found if item.platform is not None and item.platform.matches(platform)]
    if len(set(wanted)) < len(wanted):
        raise InputError(
            f"{where}: {len(wanted)} of {len(found)} images are for {platform}",
            hint="name one by its tag: oci:PATH:TAG",
        )
    return oci.choose_platform(found, platform, where)


def _names(item: oci.Descriptor) -> list[str]:
    return [item.annotations[key] for key in (_REF_NAME, _FULL_NAME) if item.annotations.get(key)]


def _document(files: _Files, descriptor: oci.Descriptor, where: str) -> bytes:
    if descriptor.size > oci.JSON_MAX:
        raise InputError(f"{where}: {descriptor.digest} has {descriptor.size} bytes, more than {oci.JSON_MAX}")
    return b"".join(_stream(files, descriptor, where))


def _stream(files: _Files, descriptor: oci.Descriptor, where: str) -> Iterator[bytes]:
    """A blob's bytes; InputError at their end when they are not what the descriptor says."""
    digest = hashlib.sha256()
    with files.open(f"blobs/sha256/{descriptor.digest.removeprefix('sha256:')}") as (size, chunks):
        if size != descriptor.size:
            raise InputError(f"{where}: {descriptor.digest} has {size} bytes, its descriptor says {descriptor.size}")
        for data in chunks:
            digest.update(data)
            yield data
    if f"sha256:{digest.hexdigest()}" != descriptor.digest:
        raise InputError(f"{where}: {descriptor.digest} has the content of sha256:{digest.hexdigest()}")


class _Directory:
    """A layout that is a directory."""

    def __init__(self, root: Path, where: str, limits: Limits) -> None:
        self.limits = limits
        self._root = root
        self._where = where

    def check_kind(self) -> None:
        try:
            names = set(os.listdir(self._root))
        except OSError as problem:
            raise unreadable(quote(str(self._root)), problem) from None
        if MARK not in names:
            hint = _HINT
            if names & _ROOT_NAMES:
                hint = f"an unpacked root filesystem is dir:{oci.shown(str(self._root))}"
            raise InputError(f"{quote(str(self._root))} is no OCI layout (no file {MARK})", hint=hint)

    def document(self, name: str) -> bytes:
        with self._opened(name) as number:
            return os.read(number, oci.JSON_MAX + 1)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[tuple[int, Iterator[bytes]]]:
        with self._opened(name) as number:
            size = os.fstat(number).st_size
            yield size, self._chunks(number, size, name)

    def _chunks(self, number: int, left: int, name: str) -> Iterator[bytes]:
        while left > 0:
            data = os.read(number, min(CHUNK, left))
            if not data:
                raise InputError(f"{self._where}: {quote(name)} was cut short while it was read")
            left -= len(data)
            yield data

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        """The descriptor of a regular file, opened without following a symbolic link at its end."""
        try:
            number = os.open(self._root / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as problem:
            raise unreadable(f"{self._where}: {quote(name)}", problem) from None
        try:
            if not stat.S_ISREG(os.fstat(number).st_mode):
                raise InputError(f"{self._where}: {quote(name)} is not a regular file")
            yield number
        finally:
            os.close(number)


class _Packed:
    """A layout that is in an archive."""

    def __init__(self, members: Members, name: str) -> None:
        self.limits = members.limits
        self._members = members
        self._name = name

    def check_kind(self) -> None:
        if not self._members.has(MARK):
            saved = self._members.has("manifest.json")
            hint = f"docker save makes such a file: docker-archive:{oci.shown(self._name)}" if saved else ""
            raise InputError(f"{quote(self._name)} holds no OCI layout (no file {MARK})", hint=hint)

    def document(self, name: str) -> bytes:
        return self._members.document(name)

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[tuple[int, Iterator[bytes]]]:
        content = self._members.content(name)
        yield content.size, content.chunks()
