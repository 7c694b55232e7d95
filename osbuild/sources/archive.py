"""`docker-archive:FILE`: what `docker save` writes, in both of its shapes: layer.tar files, or an OCI layout in a tar.

Source: Docker image specification v1.2 ("Combined Image JSON + Filesystem Changeset Format"): manifest.json names the
config and the layers, by path inside the archive; a path may be a symbolic link to another layer.

A plain archive is read where it lies. What it came to is kept, and used again for as long as the file is the same one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Final

from osbuild import oci, tree_index
from osbuild.borrowed import Borrowed
from osbuild.errors import HostError, InputError
from osbuild.layers import Layer
from osbuild.output import write_whole
from osbuild.sources.image import SourceImage, Stack, Want, add_layer, checked_layer, finished, match_layers
from osbuild.sources.members import Members, open_archive
from osbuild.tree import Backing, Slice, Spool, quote
from osbuild.uncompress import sniff

_HINT: Final = "docker save -o FILE IMAGE makes an archive; it may be compressed with gzip or zstd"
_KEPT: Final = 1  # changes whenever the same archive may come to another tree
_SETTLED_SECONDS: Final = 2.0  # a file written later than this ago may change again within one tick of its clock


def open_image(reference: oci.Reference, want: Want) -> SourceImage:
    """The only image of an archive file (`-`: of standard input), which may itself be compressed."""
    try:
        backing = open_archive(reference.name, want.limits)
        where = str(reference)
        if isinstance(backing, Borrowed):
            return _kept(backing, where, want)
        return read_archive(backing, where, want)
    except InputError as problem:
        problem.hint = problem.hint or _HINT
        raise


def read_archive(backing: Backing, where: str, want: Want) -> SourceImage:
    """The only image of an open archive; its layers stay where they are unless compressed."""
    return _read(backing, where, want)[0]


def _read(backing: Backing, where: str, want: Want) -> tuple[SourceImage, bytes]:
    archive = Members(backing, where, want.limits)
    document = _image_record(archive.document("manifest.json"), where)
    config_bytes = archive.document(_name(document.get("Config"), where))
    config = oci.parse_config(config_bytes, where)
    names = document.get("Layers")
    if not isinstance(names, list) or not names:
        raise InputError(f"{where}: an image without layers")
    match_layers(names, config, where)
    spool = Spool()
    stack = Stack(where=where, limits=archive.limits)
    for name, diff_id in zip(names, config.diff_ids, strict=True):
        content = archive.content(_name(name, where))
        if not stack.again(content.offset, diff_id):
            stack.add(content.offset, _layer(content, spool, diff_id, stack))
    return finished(where, oci.digest(config_bytes), config, stack.layers, want), config_bytes


def _kept(archive: Borrowed, where: str, want: Want) -> SourceImage:
    """The image as it was read last time if the file is the same one; else read now, and kept if that is safe."""
    about = json.dumps([_KEPT, archive.mark, repr(want.limits)])
    key = hashlib.sha256(about.encode()).hexdigest()
    found = None
    with contextlib.suppress(HostError):
        found = want.cache.have("tree", key)
    if found is not None:
        config_bytes = (found / "config.json").read_bytes()
        tree = tree_index.load((found / "tree.json").read_bytes(), archive)
        config = oci.parse_config(config_bytes, where)
        digest = oci.digest(config_bytes)
        return SourceImage(reference=where, digest=digest, config=config, tree=tree, config_digest=digest)
    image, config_bytes = _read(archive, where, want)
    archive.check()
    index = tree_index.dump(image.tree, archive)
    *_, changed = archive.mark
    if index is not None and time.time() - changed / 1e9 > _SETTLED_SECONDS:

        def make(out: Path) -> None:
            write_whole(out / "config.json", config_bytes)
            write_whole(out / "tree.json", index)

        with contextlib.suppress(HostError, OSError):  # a full or read-only cache costs time, and nothing else
            want.cache.get("tree", key, make)
    return image


def _layer(content: Slice, spool: Spool, diff_id: str, stack: Stack) -> Layer:
    compression = sniff(content.spool.read(content.offset, min(4, content.size)))
    if compression != "none":
        return add_layer(spool, content.chunks(), compression, diff_id, stack.where, stack.limits)
    stack.check_room(content.size)
    digest = hashlib.sha256()
    for data in content.chunks():
        digest.update(data)
    return checked_layer(content.spool, content.offset, content.size, digest.hexdigest(), diff_id, stack.where)


def _image_record(data: bytes, where: str) -> oci.Json:
    images = oci.parse_json_objects(data, f"{where}: manifest.json")
    if len(images) != 1:
        raise InputError(f"{where}: {len(images)} images in one archive", hint="save one image at a time")
    return images[0]


def _name(value: object, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise InputError(f"{where}: manifest.json names a file with {quote(str(value)[:60])}")
    return value
