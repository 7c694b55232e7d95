"""The only user of netlink (pyroute2, under its Apache-2.0 licence): links, addresses and filters in a namespace.

Every function here works in the network namespace of the thread that calls it. pyroute2 takes half a second to import,
so it is, by those who ask for such a network only.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import socket
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild.errors import HostError
from osbuild.network.base import Interface
from osbuild.network.namespace import mount_privately, open_by_number
from osbuild.tree import quote

TUN: Final = "/dev/net/tun"
VHOST: Final = "/dev/vhost-net"

_TUNSETIFF: Final = 0x400454CA  # linux/if_tun.h, as are the flags
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR, _IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
_IFA_F_NODAD: Final = 0x02  # linux/if_addr.h: usable at once, for nobody else is there to have it
_INGRESS: Final = 0xFFFF0000
_INGRESS_PARENT: Final = 0xFFFFFFF1
_ETH_P_ALL: Final = 0x0003
# As Kata's runtime does: /dev/tapN is named by the link's number, of which every namespace begins its own.
_FIRST_INDEX: Final = 8192
_TRIES: Final = 128
_MACVTAP_BRIDGE: Final = "bridge"
_QUEUE_LENGTH: Final = 1500
_IFF_UP: Final = 1  # linux/if.h
_BR_STATE_FORWARDING: Final = 3  # linux/if_bridge.h
_USER_HZ: Final = 100  # in which the kernel gives a bridge's times


def add_veth(name: str, mac: str, mtu: int, *, peer: str, peer_namespace: int) -> None:
    """Two ends of a cable: one here, one in another namespace. Both are up once `set_up` was there, too."""
    with netlink("a veth", module="veth") as route:
        route.link(
            "add", ifname=name, kind="veth", address=mac, mtu=mtu,
            peer={"ifname": peer, "mtu": mtu, "net_ns_fd": peer_namespace},
        )  # fmt: skip


def set_up(
    name: str, *, mac: str = "", mtu: int = 0, bridge: str = "", addresses: Iterable[Interface] = ()
) -> None:  # fmt: skip
    """Give a link what is named, make it a port of a bridge, and switch it on, the loopback with it."""
    with netlink(f"the link {name}") as route:
        index = _index(route, name)
        more = ({"address": mac} if mac else {}) | ({"mtu": mtu} if mtu else {})
        if more:  # before the bridge looks at it
            route.link("set", index=index, **more)
        if bridge:
            route.link("set", index=index, master=_index(route, bridge))
        route.link("set", index=index, state="up")
        for address in addresses:
            flags = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
            route.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen, **flags)
        route.link("set", index=_index(route, "lo"), state="up")


def remove(name: str) -> None:
    """Take a link away at once, unless it has gone: with its namespace it would go a moment later."""
    with contextlib.suppress(HostError), netlink(f"the link {name}") as route:
        route.link("del", index=_index(route, name))


def remove_addresses(name: str) -> None:
    with netlink(f"the link {name}") as route:
        route.flush_addr(index=_index(route, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Bridge:
    """What is to be known of one before it is joined."""

    mtu: int
    ports: bool  # whether it has any
    delay: float  # seconds that a new port waits in each of two states; 0 where nobody looks for loops


def add_bridge(name: str, mtu: int) -> None:
    with netlink("a bridge", module="bridge") as route:
        route.link("add", ifname=name, kind="bridge", mtu=mtu)


def read_bridge(name: str) -> Bridge:
    """HostError for a name that is no bridge's, and for a bridge that is down."""
    with netlink(f"the bridge {name}") as route:
        rows = [row for row in route.link("dump") if row.get("ifname") == name]
        if not rows or _info(rows[0], "IFLA_INFO_KIND") != "bridge":
            there = ", ".join(sorted(row.get("ifname") for row in route.link("dump", kind="bridge")))
            raise HostError(
                f"{quote(name)} is not a bridge of this host", hint=f"there is {there}" if there else "there is none"
            )
        if not rows[0]["flags"] & _IFF_UP:
            raise HostError(f"the bridge {name} is down", hint=f"ip link set {name} up")
        data = _info(rows[0], "IFLA_INFO_DATA")
        return Bridge(
            mtu=rows[0].get("mtu"),
            ports=any(row.get("master") == rows[0]["index"] for row in route.link("dump")),
            delay=data.get_attr("IFLA_BR_FORWARD_DELAY") / _USER_HZ if data.get_attr("IFLA_BR_STP_STATE") else 0.0,
        )


def bridge_calls(name: str) -> frozenset[str]:
    """Which firewalls this bridge hands its frames to by a switch of its own, by the names of the switches for all."""
    with netlink(f"the bridge {name}") as route:
        (row,) = route.link("get", index=_index(route, name))
        data = _info(row, "IFLA_INFO_DATA")
        names = {"iptables": "IFLA_BR_NF_CALL_IPTABLES", "ip6tables": "IFLA_BR_NF_CALL_IP6TABLES"}
        return frozenset(f"bridge-nf-call-{key}" for key, attribute in names.items() if data.get_attr(attribute))


def pin_address(name: str) -> None:
    """A bridge keeps the hardware address that it has: one without ports would take its first one's, and lose it."""
    with netlink(f"the bridge {name}") as route:
        index = _index(route, name)
        (row,) = route.link("get", index=index)
        route.link("set", index=index, address=row.get("address"))


def forwards(port: str) -> bool:
    """Whether a bridge carries what comes from this port of its."""
    with netlink(f"the port {port}") as route:
        (row,) = route.link("get", index=_index(route, port))
        data = _info(row, "IFLA_INFO_SLAVE_DATA")
        return data is not None and data.get_attr("IFLA_BRPORT_STATE") == _BR_STATE_FORWARDING


def without_ipv6(name: str) -> None:
    """A port of a bridge that has no address of its own, and asks nobody on the bridge for one."""
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")


def open_tap(name: str, queues: int) -> tuple[int, ...]:
    """A tap with so many queues, which lives as long as these open files do: it is made persistent for nobody."""
    flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if queues > 1 else 0)
    request = struct.pack("16sH22x", name.encode(), flags)

    def queue() -> int:
        descriptor = os.open(TUN, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _TUNSETIFF, request)
        except OSError:
            os.close(descriptor)
            raise
        return descriptor

    try:
        return _several(queue, queues)
    except OSError as problem:
        raise HostError(f"no tap can be made with {TUN}: {problem.strerror}", hint=_tun_hint(problem)) from problem


def add_macvtap(name: str, below: str, mac: str, mtu: int) -> int:
    """A macvtap on a link, in bridge mode; its number, which nobody else's is likely to be."""
    with netlink("a macvtap", module="macvtap") as route:
        parent = _index(route, below)
        for _ in range(_TRIES):
            index = _FIRST_INDEX + secrets.randbelow(0x10000)
            with contextlib.suppress(FileExistsError), _existing():
                route.link(
                    "add", ifname=name, kind="macvtap", macvtap_mode=_MACVTAP_BRIDGE, link=parent, index=index,
                    address=mac, mtu=mtu, txqlen=_QUEUE_LENGTH,
                )  # fmt: skip
                return index
    raise HostError(f"no macvtap can be made: {_TRIES} random numbers, and every one is taken")


def open_macvtap(name: str, index: int, queues: int) -> tuple[int, ...]:
    """Its device, once for each queue. Which one it is the kernel says in a sysfs of this namespace."""
    system = mount_privately("sysfs")
    try:
        path = f"class/net/{name}/macvtap/tap{index}/dev"
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=system), encoding="ascii") as file:  # noqa: PTH123
            device = file.read().strip()
    except OSError as problem:
        raise HostError(f"the kernel does not say which device {name} is: {problem.strerror}") from problem
    finally:
        os.close(system)
    return _several(lambda: open_by_number(device), queues)


def redirect(here: str, there: str) -> None:
    """Every frame that comes in on one link goes out on the other, both ways, and nobody between sees it."""
    with netlink("traffic control", module="sch_ingress, cls_u32 and act_mirred") as route:
        indexes = [_index(route, name) for name in (here, there)]
        for index, other in (indexes, reversed(indexes)):
            route.tc("add", "ingress", index, handle=_INGRESS, parent=_INGRESS_PARENT)
            route.tc("add-filter", "u32", index, **every_frame_to(other))


def every_frame_to(index: int) -> dict[str, Any]:  # Any: what pyroute2 takes
    """A filter that matches all there is (a key whose mask is 0), and what becomes of it."""
    return {
        "parent": _INGRESS,
        "protocol": _ETH_P_ALL,
        "target": 0,
        "keys": ["0x0/0x0+0"],
        "action": {"kind": "mirred", "direction": "egress", "action": "redirect", "ifindex": index},
    }


def uplinks() -> tuple[str, ...]:
    """The links that IPv4's default routes lead through."""
    with netlink("the routes") as route:
        ways = [way for row in route.get_default_routes(family=socket.AF_INET) for way in _ways(row)]
        numbers = {way.get("oif") for way in ways} - {None}
        return tuple(sorted(row.get("ifname") for number in numbers for row in route.link("get", index=number)))


def _ways(row: Any) -> list[Any]:  # Any: pyroute2's
    """A route itself, or each of the hops that share its traffic (RTA_MULTIPATH)."""
    return list(row.get("multipath") or ()) or [row]


def open_vhost(queues: int) -> tuple[int, ...]:
    """The host kernel's own virtio-net, once for each queue; nothing where the host has none."""
    try:
        return _several(lambda: os.open(VHOST, os.O_RDWR | os.O_CLOEXEC), queues)
    except OSError:
        return ()


def close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _several(open_one: Callable[[], int], count: int) -> tuple[int, ...]:
    """So many, or none at all."""
    opened: list[int] = []
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            descriptor = open_one()
            stack.callback(os.close, descriptor)
            opened.append(descriptor)
        stack.pop_all()
    return tuple(opened)


@contextlib.contextmanager
def netlink(what: str, *, module: str = "") -> Iterator[Any]:  # Any: pyroute2's class, imported late
    """A netlink socket in this thread's namespace; what the kernel refuses becomes one line about `what`."""
    from pyroute2.iproute.linux import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as problem:
        lacking = module and problem.code in (errno.EOPNOTSUPP, errno.ENOENT, errno.ENODEV)
        raise HostError(
            f"{what} cannot be had: {os.strerror(problem.code)}",
            hint=f"this kernel lacks {module}" if lacking else "",
        ) from problem


@contextlib.contextmanager
def _existing() -> Iterator[None]:
    """A number that is taken, as the exception that says so."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        yield
    except NetlinkError as problem:
        if problem.code in (errno.EEXIST, errno.EBUSY):
            raise FileExistsError(problem.code, os.strerror(problem.code)) from problem
        raise


def _info(row: Any, name: str) -> Any:  # Any: as netlink
    about = row.get_attr("IFLA_LINKINFO")
    return about.get_attr(name) if about is not None else None


def _index(route: Any, name: str) -> int:  # Any: as netlink
    found = route.link_lookup(ifname=name)
    if not found:
        raise HostError(f"there is no link {quote(name)} any more")
    return int(found[0])


def _tun_hint(problem: OSError) -> str:
    if problem.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return "modprobe tun; or --network user, which needs none"
    return "--network user needs none"
