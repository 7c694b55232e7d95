"""A tap in this host's own network. What the guest sends farther, the host forwards under an address of its own.

guest eth0 198.18.x.2 = QEMU = [ osb… 198.18.x.1, forwarding, masquerade ] === what lies beyond this host

This is the one network that touches the host's: a link, a table of nftables and, where it is off, the forwarding of the
links with a default route. The first ends with its open file, whatever ends us; the rest a helper puts back
when we have ended, killed or not. What is forwarded meanwhile is the guest's and its answers, nobody else's. IPv6 stays
out: a host that forwards it no longer believes its router.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from osbuild.errors import HostError
from osbuild.network import firewall, links
from osbuild.network.base import MTU, GuestNetwork, Tap, make_mac, pick_addresses
from osbuild.network.forwarding import forwarding
from osbuild.network.namespace import CAP_NET_ADMIN, CAP_NET_RAW
from osbuild.network.probe import Loopback

CAPABILITIES: Final = (CAP_NET_ADMIN, CAP_NET_RAW)
_PREFIX: Final = "osb"  # of every such link's name


@contextlib.contextmanager
def opened(queues: int) -> Iterator[GuestNetwork]:
    """The tap, its address, the way on, and the guest's card."""
    uplinks = links.uplinks()
    if not uplinks:
        raise HostError("this host has no default route, so nothing lies beyond it", hint="--network tap needs none")
    (gateway, guest), _ = pick_addresses()
    name = f"{_PREFIX}{secrets.token_hex(4)}"
    with contextlib.ExitStack() as stack:
        files = links.open_tap(name, queues)
        stack.callback(links.close, files)
        links.set_up(name, mtu=MTU, addresses=(gateway,))
        Path(f"/proc/sys/net/ipv4/conf/{name}/forwarding").write_text("1")  # which goes with it
        table = stack.enter_context(firewall.table(name))
        table.masquerade(str(guest.ip))
        table.guard(name, str(guest.ip))
        switches = stack.enter_context(forwarding(uplinks, table.descriptor))
        for link in sorted(switches.borrowed):
            table.shut_out(link, _PREFIX)
        switches.turn_on()
        vhost = links.open_vhost(queues)
        stack.callback(links.close, vhost)
        yield GuestNetwork(
            kind="nat", mac=make_mac(), mtu=MTU, addresses=(guest,), gateways=(gateway.ip,),
            card=Tap(queues=files, vhost=vhost), outside=Loopback(), links=(name,),
            borrowed=tuple(sorted(switches.borrowed)),
        )  # fmt: skip
