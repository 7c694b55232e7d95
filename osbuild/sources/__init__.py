"""Where images come from: one module and one row each, all ending in one SourceImage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Protocol

from osbuild import oci
from osbuild.errors import HostError, InputError, SpecError
from osbuild.modules import Modules
from osbuild.sources.image import SourceImage, Want
from osbuild.tree import quote


class Source(Protocol):
    """What a module must have to be a row."""

    def open_image(self, reference: oci.Reference, want: Want) -> SourceImage:
        """The image, every layer checked against its digests; InputError or HostError if it is not to be had."""


SOURCES: Final[Mapping[str, Source]] = Modules({
    "docker-daemon": "osbuild.sources.daemon",
    "docker": "osbuild.sources.registry",
    "docker-archive": "osbuild.sources.archive",
    "oci": "osbuild.sources.layout",
    "dir": "osbuild.sources.directory",
})  # fmt: skip


def find_source(text: str) -> oci.Reference:
    """What the user's words name. SpecError for what cannot be an image, with none of it that may be a password."""
    try:
        return oci.parse_reference(text, frozenset(SOURCES))
    except SpecError as problem:
        problem.hint = _beside(text) or problem.hint
        raise


def check_apart(text: str, out: Path) -> None:
    """SpecError when writing there would destroy what is read, or become part of what is read the next time."""
    reference = find_source(text)
    if reference.transport not in ("docker-archive", "oci", "dir") or reference.name == "-":
        return
    try:
        source, target = Path(reference.name).resolve(), out.resolve()
        inside = target.is_relative_to(source)
    except (OSError, RuntimeError, ValueError):  # whoever opens it will say what is wrong with it
        return
    if inside:
        where = "is" if target == source else "is in"
        raise SpecError(f"{quote(str(out))} {where} what is read, {quote(reference.name)}", hint="name another place")


def open_image(text: str, want: Want) -> SourceImage:
    """The image that the user's words name, checked, and for the platform that was asked for."""
    reference = find_source(text)
    if reference.transport:
        image = SOURCES[reference.transport].open_image(reference, want)
    else:
        image = _open_bare(text, reference, want)
    found = image.config.platform
    if found.os not in (want.platform.os, "") or found.architecture not in (want.platform.architecture, ""):
        raise InputError(
            f"{image.reference}: this image is for {quote(str(found))}, not {want.platform}",
            hint=f"--platform {found} takes it as it is" if found.os == "linux" else "",
        )
    return image


def _open_bare(text: str, reference: oci.Reference, want: Want) -> SourceImage:
    """A name without a source: the Docker daemon's if one answers, else a registry's; errors say which was asked."""
    from osbuild.sources import daemon, registry

    before = ""
    try:
        try:
            daemon.connect(offline=want.registry.offline).close()
        except HostError as lacking:
            before = f"{lacking}; "
            reference = oci.parse_reference(f"docker://{text}", frozenset(("docker",)))
            before = f"{lacking}, so {oci.registry_of(reference.name)[0]} was asked: "
            return registry.open_image(reference, want)
        return daemon.open_image(dataclasses.replace(reference, transport="docker-daemon"), want)
    except (SpecError, InputError, HostError) as problem:
        hint = "; ".join(filter(None, (_beside(text), problem.hint)))
        raise type(problem)(f"{before}{problem}", hint=hint) from None


def _beside(text: str) -> str:
    """A hint when the words are also the path of something here."""
    from osbuild.sources import layout

    path, name = Path(text), oci.shown(text)
    if not text:
        return ""
    try:
        if path.is_dir():
            return f"the directory: {'oci' if (path / layout.MARK).exists() else 'dir'}:{name}"
        return f"the file: docker-archive:{name} or oci:{name}" if path.is_file() else ""
    except (OSError, ValueError):  # no path at all
        return ""
