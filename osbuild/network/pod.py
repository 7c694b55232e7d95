"""A pod's network as Kata's runtime finds it: a veth in a namespace; its other end is the host's, or counts for it.

[ pod: eth0 192.0.2.2 ] ======= [ outside: peer0 192.0.2.1 ]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from osbuild.network import links
from osbuild.network.base import GUEST, MTU, OUTSIDE, GuestNetwork, Tap, make_mac
from osbuild.network.namespace import Namespace, namespace

ETH: Final = "eth0"
_PEER: Final = "peer0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """Both namespaces, and the address of the link in the first: it will be the guest's."""

    inside: Namespace
    outside: Namespace
    mac: str


@contextlib.contextmanager
def pod() -> Iterator[Pod]:
    """A pod without a guest, for the length of the block."""
    with namespace() as outside, namespace() as inside:
        mac = make_mac()
        inside.do(links.add_veth, ETH, mac, MTU, peer=_PEER, peer_namespace=outside.descriptor)
        outside.do(links.set_up, _PEER, addresses=OUTSIDE)
        inside.do(links.set_up, ETH, addresses=GUEST)
        yield Pod(inside=inside, outside=outside, mac=mac)


def network_of(pod: Pod, kind: str, card: Tap) -> GuestNetwork:
    """What the guest in a pod is told: it takes over the pod's own addresses."""
    return GuestNetwork(
        kind=kind, mac=pod.mac, mtu=MTU, addresses=GUEST, gateways=tuple(one.ip for one in OUTSIDE), card=card,
        outside=pod.outside, namespaces=(pod.inside.number, pod.outside.number),
    )  # fmt: skip
