"""Where images come from: one module and one row each, all ending in one SourceImage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from osbuild import oci
from osbuild.arch import Arch
from osbuild.errors import InputError
from osbuild.sources import archive, daemon, layout
from osbuild.sources.image import SourceImage


class Source(Protocol):
    """What a module must have to be a row."""

    def open_image(self, reference: oci.Reference, arch: Arch) -> SourceImage:
        """The image, every layer checked against its digests; InputError or HostError if it is not to be had."""


SOURCES: Final[Mapping[str, Source]] = {
    "docker-daemon": daemon,
    "docker-archive": archive,
    "oci": layout,
}


def open_image(text: str, arch: Arch) -> SourceImage:
    """The image that the user's words name, checked, and for the architecture that was asked for."""
    reference = oci.parse_reference(text, frozenset(SOURCES))
    image = SOURCES[reference.transport].open_image(reference, arch)
    if image.config.os not in ("linux", "") or image.config.architecture not in (arch.oci, ""):
        raise InputError(
            f"{reference}: this image is for {image.config.os}/{image.config.architecture}, not linux/{arch.oci}"
        )
    return image
