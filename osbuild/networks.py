"""NETWORKS: a guest's networks by name, for who only asks which there are: what makes one is slow to import."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from osbuild.errors import SpecError
from osbuild.modules import Modules
from osbuild.tree import quote

if TYPE_CHECKING:
    from osbuild.network.base import Network

NETWORKS: Final[Mapping[str, Network]] = Modules(
    {name: f"osbuild.network.{name}" for name in ("user", "tap", "macvtap", "tcfilter", "bridge", "nat")}
)

JOINING: Final = "bridge"  # the one that may be of a name: bridge=NAME


def split(wish: str) -> tuple[str, str]:
    """A row and the name of the bridge that is to be joined; SpecError for what neither can be."""
    kind, equals, name = wish.partition("=")
    if kind not in NETWORKS:
        raise SpecError(f"no network {quote(kind)}", hint=f"one of {', '.join(NETWORKS)}")
    if equals and (kind != JOINING or not name):
        raise SpecError(f"no network {quote(wish)}", hint=f"{JOINING}=NAME joins the host's bridge NAME")
    return kind, name
