"""Where images come from: one module and one row each, all ending in one SourceImage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Final, Protocol

from osbuild import oci
from osbuild.errors import HostError, InputError
from osbuild.sources import archive, daemon, directory, layout, registry
from osbuild.sources.image import SourceImage, Want
from osbuild.tree import quote


class Source(Protocol):
    """What a module must have to be a row."""

    def open_image(self, reference: oci.Reference, want: Want) -> SourceImage:
        """The image, every layer checked against its digests; InputError or HostError if it is not to be had."""


SOURCES: Final[Mapping[str, Source]] = {
    "docker-daemon": daemon,
    "docker": registry,
    "docker-archive": archive,
    "oci": layout,
    "dir": directory,
}


def open_image(text: str, want: Want) -> SourceImage:
    """The image that the user's words name, checked, and for the platform that was asked for."""
    reference = oci.parse_reference(text, frozenset(SOURCES))
    if not reference.transport:
        reference = dataclasses.replace(reference, transport=_transport())
    image = SOURCES[reference.transport].open_image(reference, want)
    found = image.config.platform
    if found.os not in (want.platform.os, "") or found.architecture not in (want.platform.architecture, ""):
        raise InputError(
            f"{reference}: this image is for {quote(str(found))}, not {want.platform}",
            hint=f"--platform {found} takes it as it is" if found.os == "linux" else "",
        )
    return image


def _transport() -> str:
    """Where a bare name is looked for: in the Docker daemon if one answers, else in a registry."""
    try:
        daemon.connect().close()
    except HostError:
        return "docker"
    return "docker-daemon"
