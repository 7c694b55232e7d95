"""A tap as one port of a bridge, and a neighbour on another: a bridge of its own, or one of the host's that is named.

    guest eth0 192.0.2.2 = QEMU = [ tap0 - bridge0 - port0 ] ======= [ neighbour: peer0 192.0.2.1 ]
    guest eth0 198.18.x.2 = QEMU = osb… - NAME - osb…p ============= [ neighbour: peer0 198.18.x.1 ]

The host's bridge keeps its addresses, of every kind, and its MTU, which the guest is given. Both ports end with their
open files, whatever ends us. Neither guest nor neighbour has an address of the bridge's own network: who is there
already never hears of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import time
from collections.abc import Iterator
from functools import partial
from typing import Final

from osbuild.errors import HostError
from osbuild.network import firewall, links
from osbuild.network.base import GUEST, MTU, OUTSIDE, GuestNetwork, Interface, Tap, make_mac, pick_addresses
from osbuild.network.namespace import CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN, Here, Namespace, namespace

CAPABILITIES: Final = (CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN)
BRIDGE: Final = "bridge0"
PEER: Final = "peer0"
_TAP, _PORT = "tap0", "port0"
_POLL_SECONDS: Final = 0.05
_SPARE_SECONDS: Final = 2.0  # beyond what the bridge's own delay explains

Pair = tuple[Interface, Interface]  # the neighbour's and the guest's


@contextlib.contextmanager
def opened(queues: int) -> Iterator[GuestNetwork]:
    """A bridge in a namespace that holds nothing else."""
    with namespace() as inside:
        inside.do(links.add_bridge, BRIDGE, MTU)
        inside.do(links.set_up, BRIDGE)
        pairs = tuple(zip(OUTSIDE, GUEST, strict=True))
        with _ports(inside, BRIDGE, _TAP, _PORT, pairs, queues) as network:
            yield dataclasses.replace(network, namespaces=(inside.number, *network.namespaces))


def check(bridge: str) -> None:
    """HostError for a name that no guest can join."""
    links.read_bridge(bridge)


@contextlib.contextmanager
def joined(queues: int, bridge: str) -> Iterator[GuestNetwork]:
    """A bridge of the namespace that this is called in, as a rule the host's."""
    name = f"osb{secrets.token_hex(4)}"
    port = f"{name}p"
    with _ports(Here(), bridge, name, port, pick_addresses(), queues) as network:
        yield dataclasses.replace(network, links=(name, port))


@contextlib.contextmanager
def _ports(
    place: Namespace | Here, bridge: str, tap: str, port: str, pairs: tuple[Pair, ...], queues: int
) -> Iterator[GuestNetwork]:
    """Both ports of a bridge in `place`, the neighbour behind one, and the guest's card on the other."""
    found = place.do(links.read_bridge, bridge)
    with namespace() as neighbour, contextlib.ExitStack() as stack:
        if not found.ports:
            place.do(links.pin_address, bridge)
        files = place.do(links.open_tap, tap, queues)
        stack.callback(links.close, files)
        place.do(links.add_veth, port, make_port_mac(), found.mtu, peer=PEER, peer_namespace=neighbour.descriptor)
        stack.callback(place.do, links.remove, port)
        neighbour.do(links.set_up, PEER, addresses=[ours for ours, _ in pairs])
        for name, mac in ((tap, make_port_mac()), (port, "")):
            place.do(links.without_ipv6, name)
            place.do(links.set_up, name, mac=mac, mtu=found.mtu, bridge=bridge)
        _wait(place, (tap, port), 2 * found.delay + _SPARE_SECONDS)
        vhost = links.open_vhost(queues)
        stack.callback(links.close, vhost)
        yield GuestNetwork(
            kind="bridge", mac=make_mac(), mtu=found.mtu, addresses=tuple(theirs for _, theirs in pairs),
            gateways=tuple(ours.ip for ours, _ in pairs), card=Tap(queues=files, vhost=vhost), outside=neighbour,
            namespaces=(neighbour.number,), obstacles=partial(place.do, firewall.bridge_obstacles, bridge),
        )  # fmt: skip


def make_port_mac() -> str:
    """A port's, higher than every card's: a bridge that was given no address has the lowest of its ports'."""
    return "fe:ff:ff:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(3))


def _wait(place: Namespace | Here, ports: tuple[str, ...], seconds: float) -> None:
    """Until the bridge carries frames of these, which takes a while where it looks for loops first (STP)."""
    deadline = time.monotonic() + seconds
    while deaf := [port for port in ports if not place.do(links.forwards, port)]:
        if time.monotonic() > deadline:
            raise HostError(
                f"the bridge carries no frames of its new port {deaf[0]} after {seconds:g} s",
                hint="bridge -d link shows its state; the spanning tree protocol may keep it closed",
            )
        time.sleep(_POLL_SECONDS)
