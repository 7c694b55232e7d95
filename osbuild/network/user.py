"""QEMU's own network: no privilege, nothing on the host, and no way out of it but two.

    host 127.0.0.1:(a free port)  ->  guest 10.0.2.15:7
    guest -> 10.0.2.100:7         ->  a socket that we hold the other end of

Without `restrict` every guest could speak to every service on the host's loopback, as 10.0.2.2.
"""

from __future__ import annotations

import contextlib
import ipaddress
import socket
from collections.abc import Iterator
from typing import Final

from osbuild.network.base import ECHO, GuestNetwork, User, make_mac

CAPABILITIES: Final[tuple[int, ...]] = ()
ADDRESS: Final = "10.0.2.15"  # what QEMU's documentation calls the first guest's, as the others are its defaults, too
GATEWAY: Final = "10.0.2.2"
SERVICE: Final = ("10.0.2.100", ECHO)
_MTU: Final = 1500  # its own


@contextlib.contextmanager
def opened(queues: int) -> Iterator[GuestNetwork]:
    """A network of the VMM's, and our end of the way in. It has one queue, whatever was wished."""
    del queues
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield GuestNetwork(
            kind="user", mac=make_mac(), mtu=_MTU, addresses=(ipaddress.ip_interface(f"{ADDRESS}/24"),),
            gateways=(ipaddress.ip_address(GATEWAY),),
            card=User(port=ECHO, service=SERVICE, descriptor=theirs.fileno()), service=ours,
        )  # fmt: skip
