"""A macvtap beside a pod's veth, as Kata's runtime has it for internetworking_model=macvtap.

guest = QEMU = /dev/tapN = [ pod: tap0_kata on eth0 ] ======= [ outside: peer0 ]

The macvtap takes the veth's hardware address, the veth gets another one and loses its addresses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

from osbuild.network import links
from osbuild.network.base import MTU, GuestNetwork, Tap, make_mac
from osbuild.network.namespace import CAP_MKNOD, CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN
from osbuild.network.pod import ETH, network_of, pod

CAPABILITIES: Final = (CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN, CAP_MKNOD)
LINK: Final = "tap0_kata"


@contextlib.contextmanager
def opened(queues: int) -> Iterator[GuestNetwork]:
    """The pod, the macvtap, and the guest's card with the address that was the veth's."""
    with pod() as made, contextlib.ExitStack() as stack:
        made.inside.do(links.remove_addresses, ETH)
        made.inside.do(links.set_up, ETH, mac=make_mac())
        index = made.inside.do(links.add_macvtap, LINK, ETH, made.mac, MTU)
        made.inside.do(links.set_up, LINK)
        files = made.inside.do(links.open_macvtap, LINK, index, queues)
        stack.callback(links.close, files)
        vhost = links.open_vhost(queues)
        stack.callback(links.close, vhost)
        yield network_of(made, "macvtap", Tap(queues=files, vhost=vhost))
