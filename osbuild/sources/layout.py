"""`oci:DIR[:TAG]`: an OCI image layout on disk (image-spec image-layout.md); no blob is believed unchecked."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from osbuild import oci
from osbuild.errors import InputError
from osbuild.sources.image import SourceImage, Want, add_layer, finished, match_layers
from osbuild.tree import Spool, quote
from osbuild.uncompress import CHUNK

_REF_NAME: Final = "org.opencontainers.image.ref.name"
_NESTING_MAX: Final = 4  # indexes inside indexes


def open_image(reference: oci.Reference, want: Want) -> SourceImage:
    """The image of that tag and platform in a layout directory."""
    root = Path(reference.name)
    where = str(reference)
    _check_layout(root, where)
    descriptor = _choose(root, reference.tag, want.platform, where)
    manifest = oci.parse_manifest(_blob(root, descriptor, where), where)
    config = oci.parse_config(_blob(root, manifest.config, where), where)
    match_layers(manifest.layers, config, where)
    spool = Spool()
    layers = [
        add_layer(spool, _stream(root, layer, where), oci.LAYER_TYPES[layer.media_type], diff_id, where)
        for layer, diff_id in zip(manifest.layers, config.diff_ids, strict=True)
    ]
    return finished(where, descriptor.digest, config, layers, want)


def _check_layout(root: Path, where: str) -> None:
    if not root.is_dir():
        raise InputError(f"{quote(str(root))} is no directory", hint="oci:DIR[:TAG] names an OCI image layout")
    version = oci.parse_json(_file(root / "oci-layout", where), where).get("imageLayoutVersion")
    if version != "1.0.0":
        raise InputError(f"{where}: image layout version {quote(str(version)[:40])}, not 1.0.0")


def _choose(root: Path, tag: str, platform: oci.Platform, where: str) -> oci.Descriptor:
    """The one manifest that tag and platform leave; more or fewer than one is refused with what there is."""
    found = list(oci.parse_index(_file(root / "index.json", where), where))
    if tag:
        names = sorted({item.annotations.get(_REF_NAME, "") for item in found} - {""})
        found = [item for item in found if item.annotations.get(_REF_NAME) == tag]
        if not found:
            raise InputError(
                f"{where}: no image has the tag {quote(tag)}",
                hint=f"there are: {', '.join(map(quote, names)) or 'none'}",
            )
    for _ in range(_NESTING_MAX):
        if len(found) > 1:
            wanted = [item for item in found if item.platform is not None and item.platform.matches(platform)]
            if len(wanted) != 1:
                raise InputError(f"{where}: {len(wanted)} of {len(found)} images are for {platform}",
                                 hint="name one by its tag: oci:DIR:TAG")  # fmt: skip
            found = wanted
        if not found:
            raise InputError(f"{where}: the layout holds no image")
        if found[0].media_type in oci.MANIFEST_TYPES:
            return found[0]
        if found[0].media_type not in oci.INDEX_TYPES:
            raise InputError(f"{where}: {quote(found[0].media_type)} is no image")
        found = list(oci.parse_index(_blob(root, found[0], where), where))
    raise InputError(f"{where}: indexes nested more than {_NESTING_MAX} deep")


def _blob(root: Path, descriptor: oci.Descriptor, where: str) -> bytes:
    if descriptor.size > oci.JSON_MAX:
        raise InputError(f"{where}: {descriptor.digest} has {descriptor.size} bytes, more than {oci.JSON_MAX}")
    return b"".join(_stream(root, descriptor, where))


def _stream(root: Path, descriptor: oci.Descriptor, where: str) -> Iterator[bytes]:
    """A blob's bytes; InputError at their end when they are not what the descriptor says."""
    path = root / "blobs" / "sha256" / descriptor.digest.removeprefix("sha256:")
    digest = hashlib.sha256()
    left = descriptor.size
    with _opened(path, where) as number:
        size = os.fstat(number).st_size
        if size != descriptor.size:
            raise InputError(f"{where}: {descriptor.digest} has {size} bytes, its descriptor says {descriptor.size}")
        while left > 0:
            data = os.read(number, min(CHUNK, left))
            if not data:
                raise InputError(f"{where}: {descriptor.digest} was cut short while it was read")
            left -= len(data)
            digest.update(data)
            yield data
        if f"sha256:{digest.hexdigest()}" != descriptor.digest:
            raise InputError(f"{where}: {descriptor.digest} has the content of sha256:{digest.hexdigest()}")


def _file(path: Path, where: str) -> bytes:
    with _opened(path, where) as number:
        return os.read(number, oci.JSON_MAX + 1)


@contextlib.contextmanager
def _opened(path: Path, where: str) -> Iterator[int]:
    """The descriptor of a regular file, opened without following a symbolic link at its end."""
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as problem:
        raise InputError(f"{where}: cannot read {quote(path.name)}: {problem.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise InputError(f"{where}: {quote(path.name)} is not a regular file")
        yield number
    finally:
        os.close(number)
