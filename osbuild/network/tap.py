"""A tap with the gateway's address, in a namespace that holds nothing else.

guest eth0 192.0.2.2 = QEMU = [ tap0 192.0.2.1 ]
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from osbuild.network import links
from osbuild.network.base import GUEST, MTU, OUTSIDE, GuestNetwork, Tap, make_mac
from osbuild.network.namespace import CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN, namespace

CAPABILITIES: Final = (CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN)
_LINK: Final = "tap0"


@contextlib.contextmanager
def opened(queues: int) -> Iterator[GuestNetwork]:
    """The tap, its address, and the guest's card."""
    with namespace() as outside, contextlib.ExitStack() as stack:
        files = outside.do(links.open_tap, _LINK, queues)
        stack.callback(links.close, files)
        outside.do(links.set_up, _LINK, mtu=MTU, addresses=OUTSIDE)
        vhost = links.open_vhost(queues)
        stack.callback(links.close, vhost)
        yield GuestNetwork(
            kind="tap", mac=make_mac(), mtu=MTU, addresses=GUEST, gateways=tuple(one.ip for one in OUTSIDE),
            card=Tap(queues=files, vhost=vhost), outside=outside, namespaces=(outside.number,),
        )  # fmt: skip
