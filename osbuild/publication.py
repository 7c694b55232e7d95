"""A published build as a registry has it: one manifest, and which layers come to which file. Pure; docs/publish.md.

The disk image and the initramfs are cut into parts, each a zstd frame of its own: a swap of the agent changes few of
them, and all of them, one behind the other, are the whole file as zstd knows it. Other files are one layer each.

Sources: OCI image-spec v1.1 (manifest.md, "Guidelines for Artifact Usage"; image-index.md; annotations.md).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from osbuild import oci
from osbuild.arch import ARCHES
from osbuild.errors import InputError, SpecError
from osbuild.manifest import LOCK, MANIFEST, PROVENANCE, SBOM
from osbuild.tree import quote

ARTIFACT: Final = "application/vnd.osbuilder.build.v1"
CONFIG: Final = "application/vnd.osbuilder.build.config.v1+json"
PART: Final = "application/vnd.osbuilder.part.v1+zstd"
IMAGE_MANIFEST: Final = "application/vnd.oci.image.manifest.v1+json"
IMAGE_INDEX: Final = "application/vnd.oci.image.index.v1+json"
PARTED: Final = ("initrd.img", "rootfs.img")  # those that are in parts
FILES: Final[Mapping[str, str]] = {  # those that are one layer -> its media type
    MANIFEST: "application/vnd.osbuilder.manifest.v1+json",
    LOCK: "application/vnd.osbuilder.lock.v1+json",
    SBOM: "application/vnd.cyclonedx+json",
    PROVENANCE: "application/vnd.in-toto+json",
    "config": "application/vnd.osbuilder.kernel.config.v1",
    "vmlinux": "application/vnd.osbuilder.kernel.v1",
    "vmlinuz": "application/vnd.osbuilder.kernel.compressed.v1",
}
CELL: Final = "vnd.osbuilder.cell"  # on an index's entry: which cell of a matrix it is
BOOTED: Final = "vnd.osbuilder.booted"  # on a cell's manifest: a digest of the wishes with which it booted well
REF_NAME: Final = "org.opencontainers.image.ref.name"  # there: the tag that names it alone
FILE_MAX: Final = 1 << 40  # bytes of a file: holes cost nothing to announce, but hours to hash

_TITLE: Final = "org.opencontainers.image.title"
_CREATED: Final = "org.opencontainers.image.created"
_FILE: Final = "vnd.osbuilder.file"
_OFFSET: Final = "vnd.osbuilder.offset"
_SIZE: Final = "vnd.osbuilder.size"
_SHA256: Final = "vnd.osbuilder.sha256"
_AGENT: Final = "vnd.osbuilder.agent"
_KERNEL: Final = "vnd.osbuilder.kernel"

_PART_MIN: Final = 512 << 10
_PARTS: Final = 4096  # of one file, about; some 400 bytes each in the manifest, which may have 4 MiB
_NUMBER: Final = re.compile(r"0|[1-9][0-9]{0,15}")
_HEX: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Some bytes of a file, and the layer that holds them."""

    file: str
    offset: int
    size: int
    sha256: str  # of the bytes
    layer: oci.Descriptor

    @property
    def packed(self) -> bool:
        """Whether the layer is a zstd frame, and not the bytes themselves."""
        return self.layer.media_type == PART


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """A published build."""

    config: oci.Descriptor
    pieces: tuple[Piece, ...]

    def files(self) -> dict[str, tuple[Piece, ...]]:
        """Its files, each with what it is made of."""
        found: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            found.setdefault(piece.file, []).append(piece)
        return {name: tuple(pieces) for name, pieces in found.items()}


def parse_target(name: str, *, hint: str) -> oci.Reference:
    """REGISTRY/REPO:TAG, where something is to be put; SpecError when it is something else."""
    found = oci.parse_reference(name, frozenset(("docker",)))
    if found.digest or not name.endswith(f":{found.tag}"):  # latest is nobody's wish here
        raise SpecError(f"{quote(name)} names no tag", hint=hint)
    return oci.Reference(transport="", name=found.name, tag=found.tag)


def part_size(size: int) -> int:
    """How large the parts of a file of `size` bytes are, about: a power of two, so that files of nearly the same size
    are cut alike."""
    part = _PART_MIN
    while size > part * _PARTS:
        part *= 2
    return part


def whole(name: str, sha256: str, size: int) -> Piece:
    """A file that is one layer."""
    layer = oci.Descriptor(
        media_type=FILES[name], digest=f"sha256:{sha256}", size=size, annotations={_TITLE: name}
    )  # fmt: skip
    return Piece(file=name, offset=0, size=size, sha256=sha256, layer=layer)


def part(name: str, number: int, offset: int, size: int, sha256: str, digest: str, packed: int) -> Piece:
    """A part of a file; its layer has `packed` bytes."""
    about = {
        _TITLE: f"{name}.zst.{number:05d}", _FILE: name, _OFFSET: str(offset), _SIZE: str(size), _SHA256: sha256,
    }  # fmt: skip
    layer = oci.Descriptor(media_type=PART, digest=digest, size=packed, annotations=about)
    return Piece(file=name, offset=offset, size=size, sha256=sha256, layer=layer)


def config_of(architecture: str) -> bytes:
    """What tools that know images only ask a config for."""
    return oci.encode({"architecture": architecture, "os": "linux"})


def manifest_of(document: oci.Json, config: oci.Descriptor, pieces: Sequence[Piece]) -> bytes:
    """The manifest of a build whose manifest.json is `document`: the same from the same build, whoever publishes it."""
    epoch = document.get("epoch")
    created = datetime.datetime.fromtimestamp(epoch if isinstance(epoch, int) else 0, tz=datetime.UTC)
    return oci.encode({
        "schemaVersion": 2, "mediaType": IMAGE_MANIFEST, "artifactType": ARTIFACT, "config": _described(config),
        "layers": [_described(piece.layer) for piece in pieces],
        "annotations": {
            _CREATED: f"{created:%Y-%m-%dT%H:%M:%SZ}", _AGENT: str(document["agent"]),
            _KERNEL: str(document["kernel"]["release"]),
        },
    })  # fmt: skip


def with_booted(data: bytes, wishes: str) -> bytes:
    """The same manifest, and that its build booted well with wishes of this digest."""
    document = json.loads(data)
    document["annotations"][BOOTED] = wishes
    return oci.encode(document)


def booted(data: bytes) -> str:
    """With which wishes a manifest's build booted well; empty when it does not say."""
    with contextlib.suppress(InputError):
        about = oci.parse_json(data, "a manifest").get("annotations")
        said = about.get(BOOTED) if isinstance(about, dict) else None
        return said if isinstance(said, str) and _HEX.fullmatch(said) else ""
    return ""


def index_of(manifests: Iterable[oci.Descriptor]) -> bytes:
    """One index of builds for several architectures, in their names' order."""
    ordered = sorted(manifests, key=lambda each: str(each.platform))
    described = [_described(each) | {"artifactType": ARTIFACT} for each in ordered]
    return oci.encode({
        "schemaVersion": 2, "mediaType": IMAGE_INDEX, "artifactType": ARTIFACT, "manifests": described,
    })  # fmt: skip


def platform_of(config: bytes, where: str) -> oci.Platform:
    """Which guest a build is for, by its config."""
    document = oci.parse_json(config, where)
    architecture = document.get("architecture")
    if document.get("os") != "linux" or architecture not in [arch.oci for arch in ARCHES.values()]:
        raise InputError(f"{where}: no guest for {quote(str(architecture)[:40])}")
    return oci.Platform(os="linux", architecture=str(architecture))


def parse(data: bytes, where: str) -> Publication:
    """What a manifest comes to. InputError when it is no build of ours, or its parts do not join."""
    document = oci.parse_json(data, where)
    config = oci.parse_descriptor(document.get("config"), where)
    if document.get("artifactType") != ARTIFACT or config.media_type != CONFIG:
        raise InputError(f"{where} is no build that osbuilder published", hint="an image is built: osbuilder build")
    layers = document.get("layers")
    if not isinstance(layers, list) or not layers:
        raise InputError(f"{where}: a build without files")
    found = Publication(
        config=config, pieces=tuple(_piece(oci.parse_descriptor(each, where), where) for each in layers)
    )
    for name, pieces in found.files().items():
        _check_joined(name, pieces, where)
    return found


def _piece(layer: oci.Descriptor, where: str) -> Piece:
    about = layer.annotations
    name = about.get(_FILE) or about.get(_TITLE, "")
    if layer.media_type == PART and name in PARTED:
        offset, size, sha256 = (about.get(key, "") for key in (_OFFSET, _SIZE, _SHA256))
        if not (_NUMBER.fullmatch(offset) and _NUMBER.fullmatch(size) and _HEX.fullmatch(sha256)):
            raise InputError(f"{where}: a part of {name} that does not say which")
        return Piece(file=name, offset=int(offset), size=int(size), sha256=sha256, layer=layer)
    if FILES.get(name) != layer.media_type:
        raise InputError(
            f"{where}: a file {quote(name[:60])} of type {quote(layer.media_type[:100])}, which is none we know",
            hint="a later osbuilder may know it",
        )
    return Piece(file=name, offset=0, size=layer.size, sha256=layer.digest.removeprefix("sha256:"), layer=layer)


def _check_joined(name: str, pieces: Sequence[Piece], where: str) -> None:
    end = 0
    for piece in pieces:
        if piece.offset != end or (len(pieces) > 1 and not (piece.packed and piece.size)):
            raise InputError(f"{where}: the parts of {name} do not join at byte {end}")
        end += piece.size
    if end > FILE_MAX:
        raise InputError(f"{where}: {name} has {end} bytes, more than {FILE_MAX}")


def _described(each: oci.Descriptor) -> dict[str, Any]:
    found: dict[str, Any] = dict(each.to_dict())
    if each.annotations:
        found["annotations"] = dict(each.annotations)
    if each.platform is not None:
        found["platform"] = {"os": each.platform.os, "architecture": each.platform.architecture}
    return found
