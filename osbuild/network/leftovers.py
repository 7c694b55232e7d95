"""What a guest's network must not leave on the host: addresses, links, namespaces, which anybody may read.

Of one that goes out through the host (nat) also its table of nftables, and the forwarding that it borrowed; who made
those may read them.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import re
import socket
import struct
import time
from pathlib import Path
from typing import Final

from osbuild.network.base import GuestNetwork
from osbuild.network.namespace import is_alive

_PROC: Final = Path("/proc/net")
_SECONDS: Final = 0.5
_SYS: Final = Path("/sys/class/net")
_CONF: Final = Path("/proc/sys/net/ipv4/conf")
_ALL: Final = "all/forwarding"
_FLOCK: Final = "hhqqi"  # struct flock, where an off_t has 64 bits: fcntl_locking(2)
_THROUGH_HOST: Final = "nat"
_USE: Final = 1  # the byte of a switch that who needs it on has locked: keeper.py
_LOCAL: Final = re.compile(r"\|-- ([0-9.]+)\n(?:\s+/\d+ (?!host LOCAL).*\n)*\s+/32 host LOCAL")


def host_addresses(proc: Path = _PROC) -> frozenset[str]:
    """Every address that this host has now, of both families."""
    found: set[str] = set()
    with contextlib.suppress(OSError):
        found |= set(_LOCAL.findall((proc / "fib_trie").read_text()))
    with contextlib.suppress(OSError):
        for line in (proc / "if_inet6").read_text().splitlines():
            found.add(str(ipaddress.IPv6Address(int(line.split()[0], 16))))
    return frozenset(found)


def hardware_addresses(sys: Path = _SYS) -> frozenset[str]:
    """Of the host's links."""
    found = set()
    for path in sys.glob("*/address"):
        with contextlib.suppress(OSError):
            found.add(path.read_text().strip())
    return frozenset(found)


def _still_forwards(link: str) -> bool:
    """Whether it does, and nobody wants that: neither another guest's network, nor who let all links forward since."""
    try:
        switch = os.open(_CONF / link / "forwarding", os.O_RDONLY | os.O_CLOEXEC)
        try:
            on = os.read(switch, 9).strip() != b"0"
            asked = fcntl.fcntl(switch, fcntl.F_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, _USE, 1, 0))
        finally:
            os.close(switch)
        return on and struct.unpack(_FLOCK, asked)[0] == fcntl.F_UNLCK and (_CONF / _ALL).read_bytes().strip() == b"0"
    except OSError:  # the link has gone
        return False


def tables() -> frozenset[str]:
    """The names of nftables' tables for IPv4; none where they cannot be read."""
    from pyroute2.netlink.exceptions import NetlinkError
    from pyroute2.nftables.main import NFTables

    try:
        with contextlib.closing(NFTables(nfgen_family=socket.AF_INET)) as rules:
            return frozenset(str(one.get_attr("NFTA_TABLE_NAME")) for one in rules.get_tables())
    except (OSError, NetlinkError):
        return frozenset()


def _through_host(net: GuestNetwork) -> list[str]:
    if net.kind != _THROUGH_HOST:
        return []
    return [
        *(f"the table {name} of nftables" for name in sorted(tables() & set(net.links))),
        *(f"the forwarding of {link}" for link in net.borrowed if _still_forwards(link)),
    ]


def _stays(number: int) -> bool:
    """Whether it is there, and not only for as long as the kernel takes to see a thread off."""
    deadline = time.monotonic() + _SECONDS
    while is_alive(number):
        if time.monotonic() > deadline:
            return True
        time.sleep(0.01)
    return False


def left_behind(net: GuestNetwork, before: frozenset[str]) -> list[str]:
    """What is there of it, though it should have ended; addresses that the host had before are its own."""
    ours = {str(interface.ip) for interface in net.addresses} | {str(gateway) for gateway in net.gateways}
    return [
        *(f"the address {address}" for address in sorted((ours & host_addresses()) - before)),
        *(f"a link with the address {mac}" for mac in sorted({net.mac} & hardware_addresses())),
        *(f"the link {name}" for name in sorted({name for _, name in socket.if_nameindex()} & set(net.links))),
        *(f"the namespace net:[{number}]" for number in net.namespaces if _stays(number)),
        *_through_host(net),
    ]
