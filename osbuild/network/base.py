"""What a guest's network is: the card, where its other end is, and what the guest must be told."""

from __future__ import annotations

import ipaddress
import secrets
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final, Protocol

Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# RFC 5737 and RFC 3849: nobody's, and no packet to them ever leaves the namespaces that know them.
GUEST: Final[tuple[Interface, ...]] = (ipaddress.ip_interface("192.0.2.2/24"), ipaddress.ip_interface("2001:db8::2/64"))
OUTSIDE: Final[tuple[Interface, ...]] = (
    ipaddress.ip_interface("192.0.2.1/24"), ipaddress.ip_interface("2001:db8::1/64"),
)  # fmt: skip
PLACES: Final = ipaddress.ip_network("198.18.0.0/15")  # RFC 2544: in use on no network but a laboratory's
_PLACES_V6: Final = ipaddress.ip_network("2001:db8::/32")
_PREFIX, _PREFIX_V6 = 30, 64
MTU: Final = 1400  # not what a guest would have by itself, and so seen to be told
ECHO: Final = 7  # RFC 862: the port where whoever listens gives back what it gets
MOST_QUEUES: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Tap:
    """Open files that carry frames, one for each queue; and as many of /dev/vhost-net, where the host has it."""

    queues: tuple[int, ...]
    vhost: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A network that the VMM plays, without privilege."""

    port: int  # of the guest, which a port of the host's loopback leads to
    service: tuple[str, int]  # an address and a port that in the guest lead to …
    descriptor: int  # … this end of a socket


class Outside(Protocol):
    """Where the other end of the guest's cable is."""

    def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestNetwork:
    """One card and its network, as long as it lasts."""

    kind: str  # a row of NETWORKS
    mac: str  # in small letters
    mtu: int
    addresses: tuple[Interface, ...]  # the guest's
    gateways: tuple[Address, ...]  # one of each family: the other end
    card: Tap | User
    outside: Outside | None = None  # None: only the VMM can reach the guest
    service: socket.socket | None = None  # of a User card: what the guest says to its service
    namespaces: tuple[int, ...] = ()  # numbers of those that were made for it
    links: tuple[str, ...] = ()  # names of those that were made in the host's own namespace
    borrowed: tuple[str, ...] = ()  # links of the host's that forward for it, and did not before
    obstacles: Callable[[], tuple[str, ...]] | None = None  # what on the host may have dropped its frames, in sentences

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a VMM inherits."""
        if isinstance(self.card, User):
            return (self.card.descriptor,)
        return (*self.card.queues, *self.card.vhost)


class Network(Protocol):
    """A way to connect a guest. A module with these and a row in NETWORKS is one."""

    @property
    def CAPABILITIES(self) -> tuple[int, ...]:  # noqa: N802 - a constant of the module
        """Without which there is nothing to be done."""
        ...

    def opened(self, queues: int) -> AbstractContextManager[GuestNetwork]:
        """Make it for the length of the block; HostError when this host cannot."""
        ...


def make_mac() -> str:
    """An address that is nobody's: locally administered, for one card."""
    return "02:" + ":".join(f"{byte:02x}" for byte in secrets.token_bytes(5))


def pick_addresses() -> tuple[tuple[Interface, Interface], ...]:
    """The gateway's and the guest's, of IPv4 and of IPv6, in one of many networks: guests may be beside each other."""
    return _pick(PLACES, _PREFIX), _pick(_PLACES_V6, _PREFIX_V6)


def _pick(places: ipaddress.IPv4Network | ipaddress.IPv6Network, prefix: int) -> tuple[Interface, Interface]:
    room = places.max_prefixlen - prefix
    base = places.network_address + (secrets.randbelow(places.num_addresses >> room) << room)
    return ipaddress.ip_interface(f"{base + 1}/{prefix}"), ipaddress.ip_interface(f"{base + 2}/{prefix}")
