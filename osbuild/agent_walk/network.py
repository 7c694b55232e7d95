"""Steps: a link gets its name and addresses, routes, neighbours; what was set is listed afterwards.

Addresses are those of RFC 5737 and RFC 3849, which are nobody's.
"""

from __future__ import annotations

from typing import Final

from osbuild.agent_client import AGENT
from osbuild.agent_values import Address, Interface, Neighbor, Route
from osbuild.agent_walk.base import CALL_SECONDS, Step, Walk, expect, refused
from osbuild.findings import Wrong
from osbuild.ttrpc import Code

LINK: Final = "walk0"  # what the link is called afterwards, whatever it was called before
MTU: Final = 1400
V4: Final = Address(address="192.0.2.2", prefix=24)
V6: Final = Address(address="2001:db8::2", prefix=64)
GATEWAY_V4: Final = "192.0.2.1"
GATEWAY_V6: Final = "2001:db8::1"
NEIGHBOR_MAC: Final = "02:00:00:00:00:99"
_NOBODY: Final = "02:ff:ff:ff:ff:fe"
_LINK_NOT_FOUND: Final = "Link not found"  # Kata's runtime looks for these words, and tries again
_DEFAULTS: Final = ("", "0.0.0.0", "0.0.0.0/0", "default")  # noqa: S104 - how a default route may be shown
_DEFAULTS_V6: Final = ("", "::", "::/0", "::1", "default")


def list_interfaces(walk: Walk) -> str:
    found = {link.name: link for link in walk.client.interfaces(seconds=CALL_SECONDS)}
    if "lo" not in found:
        raise Wrong(f"no loopback among {', '.join(found) or 'none'}")
    if walk.place.mac and walk.place.mac not in (link.mac.lower() for link in found.values()):
        raise Wrong(f"no link has the address {walk.place.mac}")
    return f"{', '.join(found)}"


def update_interface(walk: Walk) -> str:
    wanted = Interface(name=LINK, mac=walk.place.mac, mtu=MTU, addresses=(V4, V6))
    answer = walk.client.update_interface(wanted, seconds=CALL_SECONDS)
    expect("the name that comes back", answer.name, LINK)
    link = listed(walk)
    expect("its hardware address", link.mac.lower(), walk.place.mac)
    expect("its mtu", link.mtu, MTU)
    missing = {V4, V6} - set(link.addresses)
    if missing:
        raise Wrong(f"it does not have {', '.join(f'{a.address}/{a.prefix}' for a in missing)}: {link.addresses}")
    return f"{LINK}: {V4.address}/{V4.prefix}, {V6.address}/{V6.prefix}, mtu {MTU}"


def listed(walk: Walk) -> Interface:
    """The link as it is listed now, under the name it was given."""
    links = [link for link in walk.client.interfaces(seconds=CALL_SECONDS) if link.name == LINK]
    expect(f"the number of links called {LINK}", len(links), 1)
    return links[0]


def replace_addresses(walk: Walk) -> str:
    other = Address(address="192.0.2.3", prefix=25)
    walk.client.update_interface(
        Interface(name=LINK, mac=walk.place.mac, mtu=MTU, addresses=(other,)), seconds=CALL_SECONDS
    )
    found = listed(walk)
    if V4 in found.addresses or other not in found.addresses:
        raise Wrong(f"its addresses are {found.addresses}")
    update_interface(walk)
    return "old ones go"


def no_such_interface(walk: Walk) -> str:
    refused(lambda: walk.client.call(AGENT, "UpdateInterface", seconds=CALL_SECONDS), Code.INVALID_ARGUMENT)
    said = refused(
        lambda: walk.client.update_interface(Interface(name="nobody0", mac=_NOBODY), seconds=CALL_SECONDS)
    )  # fmt: skip
    if _LINK_NOT_FOUND not in said.message:
        raise Wrong(f"Kata's runtime would not know by this that it must try again: {said.message}")
    return said.message


def update_routes(walk: Walk) -> str:
    wanted = (
        Route(device=LINK, gateway=GATEWAY_V4),
        Route(device=LINK, dest="198.51.100.0/24", gateway=GATEWAY_V4),
        Route(device=LINK, gateway=GATEWAY_V6, v6=True),
        Route(device=LINK, dest="2001:db8:1::/48", gateway=GATEWAY_V6, v6=True),
    )
    check_routes(walk.client.update_routes(wanted, seconds=CALL_SECONDS))
    return "two default routes and two more, IPv4 and IPv6"


def list_routes(walk: Walk) -> str:
    found = walk.client.routes(seconds=CALL_SECONDS)
    check_routes(found)
    return f"{len(found)} routes"


def check_routes(routes: tuple[Route, ...]) -> None:
    """Wrong when one of those of `update_routes` is not there."""
    through = {(route.dest, route.gateway) for route in routes if route.device == LINK}
    for dests, gateway in (
        (_DEFAULTS, GATEWAY_V4), (("198.51.100.0/24",), GATEWAY_V4),
        (_DEFAULTS_V6, GATEWAY_V6), (("2001:db8:1::/48",), GATEWAY_V6),
    ):  # fmt: skip
        if not any((dest, gateway) in through for dest in dests):
            raise Wrong(f"no route to {dests[0] or 'everywhere'} through {gateway} among {sorted(through)}")


def no_such_route(walk: Walk) -> str:
    refused(lambda: walk.client.call(AGENT, "UpdateRoutes", seconds=CALL_SECONDS), Code.INVALID_ARGUMENT)
    said = refused(
        lambda: walk.client.update_routes([Route(device="nobody0", dest="203.0.113.0/24")], seconds=CALL_SECONDS)
    )
    return said.message


def add_neighbors(walk: Walk) -> str:
    wanted = [Neighbor(address=address, device=LINK, mac=NEIGHBOR_MAC) for address in (GATEWAY_V4, GATEWAY_V6)]
    walk.client.add_arp_neighbors(wanted, seconds=CALL_SECONDS)
    if not walk.place.shell:
        return "accepted; nobody there to look at them"
    table = walk.output(walk.script("cat /proc/net/arp"))
    row = next((line.split() for line in table.splitlines() if line.startswith(GATEWAY_V4)), [])
    # ATF_COM and ATF_PERM: complete, and permanent
    expect("the neighbour in /proc/net/arp", row[2:4] + row[5:], ["0x6", NEIGHBOR_MAC, LINK])
    return f"{GATEWAY_V4} and {GATEWAY_V6} are at {NEIGHBOR_MAC}, for good"


NETWORK: Final = (
    Step(call="ListInterfaces", about="links with their addresses", take=list_interfaces),
    Step(call="UpdateInterface", about="what was set is listed", take=update_interface, needs=("link",)),
    Step(call="UpdateInterface", about="addresses are replaced", take=replace_addresses, needs=("link",)),
    Step(call="UpdateInterface", about="a link that is not there", take=no_such_interface),
    Step(call="UpdateRoutes", about="routes of both families", take=update_routes, needs=("link",)),
    Step(call="UpdateRoutes", about="a link that is not there", take=no_such_route),
    Step(call="ListRoutes", about="what was set is listed", take=list_routes, needs=("link",)),
    Step(call="AddARPNeighbors", about="neighbours are known", take=add_neighbors, needs=("link",)),
)
