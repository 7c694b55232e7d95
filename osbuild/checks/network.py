"""The guest's network: set up through the agent, then spoken over, both ways. A row that --network selects.

    UpdateInterface, UpdateRoutes      as Kata's runtime sets up a pod; ListInterfaces must show the same
    ping                               both ways, packets of exactly the MTU, and one byte more is refused
    TCP                                both ways, and every byte comes back

What speaks in the guest is the probe, copied in and run as a container: an image need have nothing for it. In a
network that QEMU plays, nobody outside can send an echo request; everything else is the same.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import ipaddress
import re
import threading
from collections.abc import Iterator
from typing import Final

from osbuild.agent_values import Address, Interface, Route
from osbuild.checks.base import CALL_SECONDS, Session
from osbuild.findings import NotHere, Wrong
from osbuild.network import DEFAULT, GuestNetwork, User, probe
from osbuild.network.base import ECHO, Outside
from osbuild.network.base import Address as IPAddress
from osbuild.probe import Probe, Refused
from osbuild.runtime.base import Machine
from osbuild.runtime.qmp import Qmp, QmpError

LINK: Final = "eth0"
LOOPBACK: Final = ipaddress.ip_address("127.0.0.1")
PINGS: Final = 3
BYTES: Final = 256 << 10  # over TCP, each way
_SECONDS: Final = 40.0  # for an answer of the probe's, which has patience of its own
_HEADERS: Final = {4: 20 + 8, 6: 40 + 8}  # IP's and ICMP's
_FORWARD: Final = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s")


def prepare(machine: Machine) -> Machine:
    return machine if machine.network else dataclasses.replace(machine, network=DEFAULT)


def look(session: Session) -> str:
    net = session.guest.network
    if net is None:
        raise NotHere("this guest has no network")
    link = set_up(session, net)
    session.facts |= {"network": net.kind, "mac": net.mac, "mtu": net.mtu, "addresses": list(map(str, net.addresses))}
    guest = session.probe
    ask(guest, "serve", str(ECHO))
    try:
        return "; ".join((f"{net.kind}: {link}", *_from_guest(guest, net), *_from_outside(session, net)))
    except Wrong as problem:
        obstacles = net.obstacles() if net.obstacles else ()
        raise Wrong("; ".join((str(problem), *obstacles))) from problem


def set_up(session: Session, net: GuestNetwork) -> str:
    """Tell the agent what the guest's link and routes are to be, and see that they are."""
    wanted = tuple(Address(address=str(one.ip), prefix=one.network.prefixlen) for one in net.addresses)
    session.client.update_interface(
        Interface(name=LINK, mac=net.mac, mtu=net.mtu, addresses=wanted), seconds=CALL_SECONDS
    )
    routes = [Route(device=LINK, gateway=str(gateway), v6=gateway.version == 6) for gateway in net.gateways]
    through = {route.gateway for route in session.client.update_routes(routes, seconds=CALL_SECONDS)}
    if missing := [str(gateway) for gateway in net.gateways if str(gateway) not in through]:
        raise Wrong(f"after UpdateRoutes there is no route through {', '.join(missing)}")
    found = [link for link in session.client.interfaces(seconds=CALL_SECONDS) if link.mac.lower() == net.mac]
    if len(found) != 1:
        raise Wrong(f"{len(found)} links of the guest have the address {net.mac} of its card")
    judge_link(found[0], net, wanted)
    return f"{LINK} has {', '.join(map(str, net.addresses))}, mtu {net.mtu} and the card's address {net.mac}"


def judge_link(found: Interface, net: GuestNetwork, wanted: tuple[Address, ...]) -> None:
    """Wrong when the link that ListInterfaces shows is not the one that UpdateInterface asked for."""
    if found.name != LINK or found.mtu != net.mtu:
        raise Wrong(f"the link is {found.name} with an mtu of {found.mtu}, not {LINK} with {net.mtu}")
    if missing := [f"{one.address}/{one.prefix}" for one in wanted if one not in found.addresses]:
        raise Wrong(f"{LINK} does not have {', '.join(missing)}")


# --- From the guest -------------------------------------------------------------------------------------------------


def _from_guest(guest: Probe, net: GuestNetwork) -> Iterator[str]:
    for gateway in net.gateways:
        size = net.mtu - _HEADERS[gateway.version]
        answered = ask(guest, "ping", str(gateway), str(PINGS), str(size))["answered"]
        if answered != str(PINGS):
            raise Wrong(f"{gateway} answers {answered} of the guest's {PINGS} echo requests")
        _too_much(guest, gateway, size + 1)
        yield f"guest to {gateway}: {PINGS} of {PINGS} pings of {net.mtu} bytes"
    with _listening(net) as places:
        for address, port in places:
            ask(guest, "talk", address, str(port), str(BYTES))
            yield f"guest to {address} by TCP: {BYTES >> 10} KiB there and back"


def ask(guest: Probe, *words: str) -> dict[str, str]:
    """What the probe saw; Wrong, in its words, when it could not."""
    try:
        return guest.facts(*words, seconds=_SECONDS)
    except Refused as problem:
        raise Wrong(f"in the guest, {' '.join(words)}: {problem}") from problem


def _too_much(guest: Probe, gateway: IPAddress, size: int) -> None:
    try:
        guest.facts("ping", str(gateway), "1", str(size), seconds=_SECONDS)
    except Refused as refusal:
        if any(words in str(refusal) for words in ("Message too long", "Message too large")):  # glibc's and musl's
            return
        raise Wrong(f"in the guest, a ping of {gateway}: {refusal}") from refusal
    raise Wrong("the guest sends packets that are larger than its mtu")


@contextlib.contextmanager
def _listening(net: GuestNetwork) -> Iterator[list[tuple[str, int]]]:
    """Where the guest finds us."""
    if isinstance(net.card, User) and net.service is not None:
        done = threading.Event()
        thread = threading.Thread(target=probe.give_back, args=(net.service, done), name="echo", daemon=True)
        thread.start()
        try:
            yield [net.card.service]
        finally:
            done.set()
            thread.join()
    elif net.outside is not None:
        # Of a network that is the host's own, nobody else is to find it.
        where = str(net.gateways[0]) if isinstance(net.outside, probe.Loopback) else "::"
        with probe.echoing(net.outside, where) as port:
            yield [(str(gateway), port) for gateway in net.gateways]


# --- From outside ---------------------------------------------------------------------------------------------------


def _from_outside(session: Session, net: GuestNetwork) -> Iterator[str]:
    outside: Outside = net.outside or probe.Loopback()
    for interface in net.addresses:
        address: IPAddress = interface.ip
        version, port = address.version, ECHO
        if net.outside is None:
            address, port = LOOPBACK, forwarded_port(session.guest.monitor)
        else:
            fastest = _ping(net.outside, address, net.mtu) * 1000
            session.facts[f"ping_from_outside_v{version}_ms"] = fastest
            yield f"outside to {address}: {PINGS} of {PINGS} pings of {net.mtu} bytes, fastest {fastest:.1f} ms"
        with probe.connect(outside, address, port) as connection:
            took = probe.talk(connection, BYTES)
        session.facts[f"tcp_from_outside_v{version}_s"] = took
        through = f" through port {port} of {address}" if net.outside is None else ""
        yield f"outside to {interface.ip} by TCP{through}: {BYTES >> 10} KiB there and back in {took:.2f} s"
    if net.outside is None:
        yield "no ping from outside: nothing but QEMU is there to send one"


def _ping(outside: Outside, address: IPAddress, mtu: int) -> float:
    size = mtu - _HEADERS[address.version]
    try:
        probe.ping(outside, address, count=1, size=size + 1)
    except OSError as problem:
        if problem.errno != errno.EMSGSIZE:
            raise Wrong(f"no echo request to {address} can be sent: {problem.strerror}") from problem
    else:
        raise Wrong(f"{address} answers packets that are larger than its mtu")
    try:
        return probe.ping(outside, address, count=PINGS, size=size)
    except OSError as problem:
        raise Wrong(f"no echo request to {address} can be sent: {problem.strerror}") from problem


def forwarded_port(monitor: Qmp) -> int:
    """Which port of the loopback leads into the guest: the kernel chose it, and only QEMU knows."""
    try:
        said = str(monitor.execute("human-monitor-command", {"command-line": "info usernet"}))
    except QmpError as problem:
        raise Wrong(str(problem)) from problem
    found = _FORWARD.search(said)
    if found is None:
        raise Wrong(f"QEMU forwards no port into the guest: {said!r}")
    return int(found[1])
