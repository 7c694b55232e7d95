"""Networks for a guest: a module with `opened`, and a row. Who asks for none has none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from osbuild.errors import HostError
from osbuild.network import bridge
from osbuild.network.base import MOST_QUEUES, GuestNetwork, Network, Tap, User
from osbuild.network.namespace import CAP_MKNOD, missing_capabilities
from osbuild.networks import NETWORKS, split

__all__ = ["DEFAULT", "NETWORKS", "GuestNetwork", "Network", "Tap", "User", "check", "opened"]

DEFAULT: Final = "user"  # when a check wants one and nobody says which


def check(wish: str) -> None:
    """SpecError for a network that there is not, HostError for one that this user may not have, or nobody can join."""
    kind, name = split(wish)
    missing = missing_capabilities(*NETWORKS[kind].CAPABILITIES)
    if missing:
        raise HostError(
            f"--network {kind} needs {' and '.join(missing)}, which this user does not have",
            hint=f"--network user needs nothing; or {_other_way(kind, name)}",
        )
    if name:
        bridge.check(name)


def _other_way(kind: str, name: str) -> str:
    """Devices, and links of the host's own network, are made by root only; all the rest a user namespace allows."""
    of_the_host = kind == "nat" or name or CAP_MKNOD in NETWORKS[kind].CAPABILITIES
    return "become root" if of_the_host else "unshare --map-root-user osbuilder …"


@contextlib.contextmanager
def opened(wish: str, *, cpus: int = 1) -> Iterator[GuestNetwork | None]:
    """A network of this kind for the length of the block; none for an empty wish."""
    if not wish:
        yield None
        return
    check(wish)
    kind, name = split(wish)
    queues = min(cpus, MOST_QUEUES)
    with bridge.joined(queues, name) if name else NETWORKS[kind].opened(queues) as network:
        yield network
