"""A tap beside a pod's veth, each redirected to the other: Kata's default, internetworking_model=tcfilter.

guest = QEMU = [ pod: tap0_kata <-> eth0 ] ======= [ outside: peer0 ]

The veth keeps its addresses, of both kinds: what comes in goes to the guest before anybody else sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from osbuild.network import links
from osbuild.network.base import MTU, GuestNetwork, Tap
from osbuild.network.namespace import CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN
from osbuild.network.pod import ETH, network_of, pod

CAPABILITIES: Final = (CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN)
LINK: Final = "tap0_kata"


@contextlib.contextmanager
def opened(queues: int) -> Iterator[GuestNetwork]:
    """The pod, the tap, the filters, and the guest's card with the veth's hardware address."""
    with pod() as made, contextlib.ExitStack() as stack:
        files = made.inside.do(links.open_tap, LINK, queues)
        stack.callback(links.close, files)
        made.inside.do(links.set_up, LINK, mtu=MTU)
        made.inside.do(links.redirect, ETH, LINK)
        vhost = links.open_vhost(queues)
        stack.callback(links.close, vhost)
        yield network_of(made, "tcfilter", Tap(queues=files, vhost=vhost))
