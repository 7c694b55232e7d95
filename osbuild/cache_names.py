"""What the things in the cache are, in the words of those who put them there; a digest says nothing to people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from osbuild.agent import NAME, agent_version
from osbuild.blobs import BLOBS, TAGS, read_tag
from osbuild.errors import InputError
from osbuild.tree import quote

_MANIFEST_MAX: Final = 4 << 20  # bytes; the registries' own limit
_STATIC: Final = {
    "base-image": "made by scripts/base-image",
    "damaged": "was not what its name says, and is set aside",
    "leftover": "left by a run that was killed",
    "log": "of a build",
    "partial": "the beginning of a blob",
    "probe": "the program that the smoke test asks in a guest",
    "scratch": "of kernel builds",
    "tree": "the list of an archive's files",
    "unknown": "not of this version",
}


def describe(kind: str, path: Path, images: Mapping[str, str]) -> str:
    """One thing; nothing when its bytes do not say. `images` is what `blobs_of_images` found."""
    try:
        if kind == "tag":
            found = read_tag(path)
            return quote(found[0]).strip("'") if found else "damaged"
        if kind == "blob":
            return images.get(path.name, "of no name that is known")
        if kind == "agent":
            return f"{NAME} {agent_version((path / NAME).read_bytes())}"
        if kind == "kernel":
            about = _document(path / "kernel.json")
            return f"Linux {about['release']}, {about['arch']}"
    except (OSError, InputError, KeyError):
        return ""
    return _STATIC.get(kind, "")


def blobs_of_images(home: Path) -> dict[str, str]:
    """The hex of each blob that an image with a name consists of, and which part of which image it is."""
    found: dict[str, str] = {}
    try:
        tags = sorted((home / TAGS).iterdir())
    except OSError:
        return found
    for path in tags:
        tag = read_tag(path)
        if tag is not None:
            _add(home, tag[1], quote(tag[0]).strip("'"), found)
    return found


def _add(home: Path, digest: str, image: str, found: dict[str, str], *, inside: bool = False) -> None:
    """A manifest and what it names; an index and its manifests."""
    name = digest.removeprefix("sha256:")
    document = _document(home / BLOBS / name) if len(name) == 64 and name.isalnum() else {}
    parts = document.get("manifests")
    found.setdefault(name, f"{'index' if isinstance(parts, list) else 'manifest'} of {image}")
    if isinstance(parts, list) and not inside:
        for part in parts:
            _add(home, _digest(part), image, found, inside=True)
    found.setdefault(_digest(document.get("config")).removeprefix("sha256:"), f"configuration of {image}")
    layers = document.get("layers")
    for number, layer in enumerate(layers if isinstance(layers, list) else (), 1):
        found.setdefault(_digest(layer).removeprefix("sha256:"), f"layer {number} of {image}")


def _digest(descriptor: Any) -> str:
    return str(descriptor.get("digest", "")) if isinstance(descriptor, dict) else ""


def _document(path: Path) -> dict[str, Any]:  # Any: JSON, that others may have written
    """A JSON object; an empty one for everything else."""
    try:
        if path.is_symlink() or not path.is_file() or path.stat().st_size > _MANIFEST_MAX:
            return {}
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}
