"""`docker-archive:FILE`: what `docker save` writes, in both of its shapes: layer.tar files, or an OCI layout in a tar.

Source: Docker image specification v1.2 ("Combined Image JSON + Filesystem Changeset Format"): manifest.json names the
config and the layers, by path inside the archive; a path may be a symbolic link to another layer.
"""

from __future__ import annotations

import hashlib
import posixpath
import stat
from pathlib import Path
from typing import Final

from osbuild import oci, tar
from osbuild.errors import InputError
from osbuild.layers import Layer
from osbuild.sources.image import SourceImage, Want, add_layer, checked_layer, finished, match_layers
from osbuild.tree import Slice, Spool, quote
from osbuild.uncompress import CHUNK, sniff, uncompressed

_HINT: Final = "docker save -o FILE IMAGE makes an archive; it may be compressed with gzip or zstd"


def open_image(reference: oci.Reference, want: Want) -> SourceImage:
    """The only image of an archive file, which may itself be compressed."""
    path = Path(reference.name)
    spool = Spool()
    try:
        kind = path.stat().st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
            raise InputError(f"{quote(str(path))} is not a file", hint=_HINT)
        with path.open("rb") as file:
            head = file.read(4)
            file.seek(0)
            for data in uncompressed(iter(lambda: file.read(CHUNK), b""), sniff(head), quote(str(path))):
                spool.append(data)
    except OSError as problem:
        raise InputError(f"cannot read {quote(str(path))}: {problem.strerror or problem}") from None
    try:
        return read_archive(spool, str(reference), want)
    except InputError as problem:
        problem.hint = problem.hint or _HINT
        raise


def read_archive(spool: Spool, where: str, want: Want) -> SourceImage:
    """The only image of an archive that lies in a spool; its layers stay where they are unless compressed."""
    archive = _Archive(spool, where)
    document = _image_record(archive.document("manifest.json"), where)
    config_bytes = archive.document(_name(document.get("Config"), where))
    config = oci.parse_config(config_bytes, where)
    names = document.get("Layers")
    if not isinstance(names, list) or not names:
        raise InputError(f"{where}: an image without layers")
    match_layers(names, config, where)
    layers = [
        _layer(archive.content(_name(name, where)), diff_id, where)
        for name, diff_id in zip(names, config.diff_ids, strict=True)
    ]
    return finished(where, f"sha256:{hashlib.sha256(config_bytes).hexdigest()}", config, layers, want)


class _Archive:
    """The files of an archive, by name."""

    def __init__(self, spool: Spool, where: str) -> None:
        self._spool = spool
        self._where = where
        self._members: dict[str, tar.Member] = {}
        for member in tar.read(spool, 0, spool.size):
            if member.name in self._members and not stat.S_ISDIR(member.kind):
                raise InputError(f"{where}: {quote(member.name)} stands twice in the archive")
            self._members[member.name] = member

    def content(self, name: str) -> Slice:
        path = posixpath.normpath("/" + name)
        for _ in range(2):  # one link is what docker writes for a layer that stands twice
            member = self._members.get(path)
            if member is None:
                raise InputError(f"{self._where}: {quote(name)} is not in the archive")
            if stat.S_ISREG(member.kind):
                return Slice(self._spool, member.offset, member.size)
            if stat.S_ISLNK(member.kind):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.link))
        raise InputError(f"{self._where}: {quote(name)} is not a regular file in the archive")

    def document(self, name: str) -> bytes:
        content = self.content(name)
        if content.size > oci.JSON_MAX:
            raise InputError(f"{self._where}: {quote(name)} has {content.size} bytes, more than {oci.JSON_MAX}")
        return b"".join(content.chunks())


def _layer(content: Slice, diff_id: str, where: str) -> Layer:
    compression = sniff(content.spool.read(content.offset, min(4, content.size)))
    if compression != "none":
        return add_layer(content.spool, content.chunks(), compression, diff_id, where)
    digest = hashlib.sha256()
    for data in content.chunks():
        digest.update(data)
    return checked_layer(content.spool, content.offset, content.size, digest.hexdigest(), diff_id, where)


def _image_record(data: bytes, where: str) -> oci.Json:
    # manifest.json is a list; as an object's member it gets the same size and depth checks as all other JSON.
    images = oci.parse_json(b'{"images":' + data + b"}", where).get("images")
    if not isinstance(images, list) or not all(isinstance(image, dict) for image in images):
        raise InputError(f"{where}: manifest.json is no list of images")
    if len(images) != 1:
        raise InputError(f"{where}: {len(images)} images in one archive", hint="save one image at a time")
    record: oci.Json = images[0]
    return record


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: manifest.json names a file with {quote(str(value)[:60])}")
    return value
