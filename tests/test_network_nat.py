"""A guest whose host lets it out: here a namespace is the host, and another the world behind it.

guest == QEMU == [ host: osb… 198.18.x.1 | up0 203.0.113.1 ] ==== [ world: out0 203.0.113.2 ]

The world has no route back to the guest: what comes back was sent under the host's address.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from osbuild import network, smoke
from osbuild.artifacts import Initrd, Kernel
from osbuild.checks import NETWORK
from osbuild.checks import network as check
from osbuild.checks.base import Session
from osbuild.errors import HostError
from osbuild.findings import Wrong
from osbuild.network import GuestNetwork, Tap, firewall, leftovers, links, probe
from osbuild.network.base import make_mac
from osbuild.network.forwarding import forwarding
from osbuild.network.namespace import Namespace, missing_capabilities, namespace
from osbuild.report import SmokeReport, Verdict
from osbuild.runtime.base import Machine
from tests.boot_fixtures import boot_kernel

__all__ = ["boot_kernel"]  # a fixture

HOST, WORLD = ipaddress.ip_interface("203.0.113.1/24"), ipaddress.ip_interface("203.0.113.2/24")  # RFC 5737


@dataclass(frozen=True, slots=True)
class Place:
    """Both namespaces."""

    host: Namespace
    world: Namespace

    def state(self) -> tuple[list[str], list[str], str]:
        """Of the host: links, tables, and whether it forwards."""
        return self.host.do(_links), self.host.do(_tables), self.host.do(_forwards)


def _links() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex())


def _tables() -> list[str]:
    from pyroute2.nftables.main import NFTables

    with contextlib.closing(NFTables(nfgen_family=socket.AF_INET)) as tables:
        return [table.get_attr("NFTA_TABLE_NAME") for table in tables.get_tables()]


def _forwards() -> str:
    return Path("/proc/sys/net/ipv4/conf/up0/forwarding").read_text().strip()


def _add_default_route() -> None:
    with links.netlink("a route") as route:
        route.route("add", dst="default", gateway=str(WORLD.ip))


@pytest.fixture
def bare() -> Iterator[Place]:
    """A host without a default route."""
    if missing := missing_capabilities(*network.NETWORKS["tap"].CAPABILITIES):
        pytest.skip(f"this user lacks {', '.join(missing)}")
    with namespace() as host, namespace() as world:
        host.do(links.add_veth, "up0", make_mac(), 1500, peer="out0", peer_namespace=world.descriptor)
        host.do(links.set_up, "up0", addresses=(HOST,))
        world.do(links.set_up, "out0", addresses=(WORLD,))
        yield Place(host, world)


@pytest.fixture
def place(bare: Place) -> Place:
    bare.host.do(_add_default_route)
    bare.host.do(Path("/proc/sys/net/ipv4/conf/up0/forwarding").write_text, "0")
    return bare


def in_host(place: Place, kind: str) -> tuple[Any, Any]:
    """A network that is made there, and how to end it."""
    manager = network.opened(kind)
    return place.host.do(manager.__enter__), lambda: place.host.do(manager.__exit__, None, None, None)


def test_a_host_that_lets_a_guest_out_is_afterwards_as_it_was(place: Place) -> None:
    before = place.state()
    assert before == (["lo", "up0"], [], "0")
    made, end = in_host(place, "nat")
    try:
        (name,) = made.links
        assert place.state() == (sorted(["lo", "up0", name]), [name], "1")
        left = place.host.do(leftovers.left_behind, made, frozenset())
        assert f"the link {name}" in left
        assert f"the table {name} of nftables" in left
        assert "the forwarding of up0" not in left, "somebody needs it"
    finally:
        end()
    assert place.state() == before
    assert place.host.do(leftovers.left_behind, made, frozenset()) == []


def test_a_link_that_goes_on_to_forward_is_left_behind_unless_somebody_wants_it(place: Place) -> None:
    place.host.do(_forward_on_all_links, "0")
    made, end = in_host(place, "nat")
    assert made.borrowed == ("up0",)
    end()
    place.host.do(Path("/proc/sys/net/ipv4/conf/up0/forwarding").write_text, "1")
    assert place.host.do(leftovers.left_behind, made, frozenset()) == ["the forwarding of up0"]
    place.host.do(_forward_on_all_links, "1")  # as dockerd does
    assert place.host.do(leftovers.left_behind, made, frozenset()) == []


def test_another_guest_beside_it_is_nothing_that_was_left(place: Place) -> None:
    place.host.do(_forward_on_all_links, "0")
    made, end = in_host(place, "nat")
    _, end_other = in_host(place, "nat")
    try:
        end()
        assert place.state()[2] == "1"
        assert place.host.do(leftovers.left_behind, made, frozenset()) == []
    finally:
        end_other()


def test_a_host_that_forwards_already_goes_on_to(place: Place) -> None:
    place.host.do(Path("/proc/sys/net/ipv4/conf/up0/forwarding").write_text, "1")
    _, end = in_host(place, "nat")
    end()
    assert place.state()[2] == "1"


def _forward_on_all_links(value: str) -> None:
    """As sysctl net.ipv4.ip_forward does: every link takes the value over."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text(value)


@pytest.mark.parametrize("guests", [1, 2])
def test_a_host_that_begins_to_forward_meanwhile_goes_on_to(guests: int, place: Place) -> None:
    place.host.do(_forward_on_all_links, "0")
    ends = [in_host(place, "nat")[1]]
    place.host.do(_forward_on_all_links, "1")  # as dockerd does when it starts
    ends += [in_host(place, "nat")[1] for _ in range(1, guests)]  # this one finds it switched on by both
    for end in ends:
        end()
    assert place.state() == (["lo", "up0"], [], "1")


def test_a_host_that_ends_its_forwarding_meanwhile_does_not_go_on_to(place: Place) -> None:
    place.host.do(_forward_on_all_links, "0")
    _, end = in_host(place, "nat")
    place.host.do(_forward_on_all_links, "1")
    place.host.do(_forward_on_all_links, "0")
    end()
    assert place.state() == (["lo", "up0"], [], "0")


@pytest.mark.parametrize("guests", [1, 2])
def test_one_link_that_does_not_forward_where_all_others_do_is_switched_off_again(guests: int, place: Place) -> None:
    place.host.do(_forward_on_all_links, "1")
    place.host.do(Path("/proc/sys/net/ipv4/conf/up0/forwarding").write_text, "0")
    ends = [in_host(place, "nat")[1] for _ in range(guests)]
    assert place.state()[2] == "1"
    for end in ends:
        end()
    assert place.state() == (["lo", "up0"], [], "0")


def test_a_default_route_over_several_links_is_one(bare: Place) -> None:
    """ECMP: the row itself names no link then."""
    other = ipaddress.ip_interface("198.51.100.1/24")
    bare.host.do(links.add_veth, "up1", make_mac(), 1500, peer="out1", peer_namespace=bare.world.descriptor)
    bare.host.do(links.set_up, "up1", addresses=(other,))
    bare.world.do(links.set_up, "out1")
    hops = f"nexthop via {WORLD.ip} nexthop via {other.ip + 1}"
    bare.host.do(lambda: subprocess.run(["ip", "route", "add", "default", *hops.split()], check=True))
    assert bare.host.do(links.uplinks) == ("up0", "up1")
    _, end = in_host(bare, "nat")
    end()
    assert bare.host.do(_tables) == []


def test_guests_are_let_out_beside_each_other(place: Place) -> None:
    one, end_one = in_host(place, "nat")
    other, end_other = in_host(place, "nat")
    try:
        assert not {*one.addresses, *one.gateways} & {*other.addresses, *other.gateways}
        assert len(place.state()[1]) == 2
    finally:
        end_other()
        end_one()


def test_a_host_with_nothing_behind_it_is_told(bare: Place) -> None:
    with pytest.raises(HostError, match="no default route"):
        in_host(bare, "nat")
    assert bare.state()[:2] == (["lo", "up0"], [])


KILLED = """\
import os, signal
from osbuild import network
with network.opened("nat"):
    print("made", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_is_killed_leaves_neither_link_nor_table_nor_forwarding(place: Place) -> None:
    def run() -> bytes:
        return subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, timeout=120).stdout

    before = place.state()
    assert before[2] == "0"
    assert place.host.do(run) == b"made\n"
    wait_for(place, before)


def wait_for(place: Place, state: tuple[list[str], list[str], str]) -> None:
    deadline = time.monotonic() + 10
    while place.state() != state:
        assert time.monotonic() < deadline, place.state()
        time.sleep(0.05)


def test_who_keeps_the_forwarding_ends_by_no_signal_before_its_work_is_done(place: Place) -> None:
    before = place.state()
    _, end = in_host(place, "nat")
    try:
        (keeper,) = keepers()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(keeper, number)
        time.sleep(0.2)
        assert keepers() == [keeper]
        assert place.state()[2] == "1"
    finally:
        end()
    assert place.state() == before
    assert keepers() == []


def keepers() -> list[int]:
    """Ours, by number."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            parent = int((path.parent / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"keeper.py" in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def test_of_two_guests_the_last_switches_the_forwarding_off(place: Place) -> None:
    before = place.state()
    _, end_one = in_host(place, "nat")
    _, end_other = in_host(place, "nat")
    end_one()
    assert place.state()[2] == "1"
    end_other()
    assert place.state() == before


def test_a_killed_one_leaves_the_forwarding_to_another(place: Place) -> None:
    before = place.state()
    _, end = in_host(place, "nat")
    try:
        during = place.state()

        def run() -> bytes:
            return subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, timeout=120).stdout

        assert place.host.do(run) == b"made\n"
        wait_for(place, during)
        assert during[2] == "1"
    finally:
        end()
    assert place.state() == before


def test_a_switch_that_cannot_be_set_is_told_in_one_line(place: Place) -> None:
    with pytest.raises(HostError, match=r"conf/nosuch/forwarding: No such file or directory: no forwarding"):
        place.host.do(switch_on, "nosuch")


def test_who_keeps_the_forwarding_and_dies_at_once_is_told_in_one_line(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("osbuild.network.keeper.__file__", os.devnull)  # a program that does nothing
    with pytest.raises(HostError, match="has ended before it began"):
        in_host(place, "nat")
    assert place.state() == (["lo", "up0"], [], "0")


def switch_on(link: str) -> None:
    with firewall.table("osbtest") as table, forwarding((link,), table.descriptor):
        pass


# --- What is forwarded, and what not --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Beside:
    """A second network behind the host, whose server a neighbour in the world would like to reach."""

    place: Place
    server: Namespace


INNER, SERVER = ipaddress.ip_interface("192.0.2.1/24"), ipaddress.ip_interface("192.0.2.2/24")


def _add_route(destination: str, gateway: str) -> None:
    with links.netlink("a route") as route:
        route.route("add", dst=destination, gateway=gateway)


@pytest.fixture
def beside(place: Place) -> Iterator[Beside]:
    with namespace() as server:
        place.host.do(links.add_veth, "in0", make_mac(), 1500, peer="srv0", peer_namespace=server.descriptor)
        place.host.do(links.set_up, "in0", addresses=(INNER,))
        server.do(links.set_up, "srv0", addresses=(SERVER,))
        server.do(_add_route, "default", str(INNER.ip))
        place.host.do(Path("/proc/sys/net/ipv4/conf/in0/forwarding").write_text, "1")
        place.world.do(_add_route, str(SERVER.network), str(HOST.ip))
        yield Beside(place, server)


def reaches(space: Namespace, address: str) -> bool:
    """Whether an echo request of this namespace is answered."""
    try:
        return probe.ping(space, ipaddress.ip_address(address), count=1, size=8) > 0
    except Wrong:
        return False


def test_a_neighbour_gets_nothing_forwarded_while_a_guest_is_let_out(
    beside: Beside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "SECONDS", 1.0)
    place = beside.place
    assert not reaches(place.world, str(SERVER.ip)), "the host does not forward"
    _, end = in_host(place, "nat")
    try:
        assert place.state()[2] == "1"
        assert not reaches(place.world, str(SERVER.ip))
        assert reaches(place.world, str(HOST.ip)), "what is for the host itself is not forwarded"
    finally:
        end()
    place.host.do(Path("/proc/sys/net/ipv4/conf/up0/forwarding").write_text, "1")
    assert reaches(place.world, str(SERVER.ip)), "it was the rule, and not the way"


def test_who_was_forwarded_before_is_forwarded_still(beside: Beside) -> None:
    place = beside.place
    place.host.do(Path("/proc/sys/net/ipv4/conf/up0/forwarding").write_text, "1")
    _, end = in_host(place, "nat")
    try:
        assert reaches(place.world, str(SERVER.ip))
    finally:
        end()


def test_from_behind_a_tap_only_the_guests_own_address_comes_out(place: Place) -> None:
    made, end = in_host(place, "nat")
    try:
        heard = heard_from(place, made, made.addresses[0].ip.packed)
        forged = heard_from(place, made, ipaddress.ip_address("192.0.2.77").packed)
    finally:
        end()
    assert heard == [str(HOST.ip)]
    assert forged == []


def heard_from(place: Place, made: GuestNetwork, sender: bytes) -> list[str]:
    """Who a server in the world hears, when a datagram of this sender's comes out of the tap."""
    assert isinstance(made.card, Tap)
    (name,) = made.links
    hardware = bytes.fromhex(place.host.do(_hardware_of, name).replace(":", ""))
    with place.world.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((str(WORLD.ip), 0))
        server.settimeout(1.0)
        port = server.getsockname()[1]
        udp = struct.pack(">HHHH", 7, port, 8, 0)
        head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 28, 1, 0, 64, 17, 0, sender, WORLD.ip.packed)
        head = head[:10] + struct.pack(">H", probe.checksum(head)) + head[12:]
        frame = hardware + bytes.fromhex(made.mac.replace(":", "")) + b"\x08\x00" + head + udp
        os.write(made.card.queues[0], bytes(10) + frame)
        with contextlib.suppress(TimeoutError):
            return [server.recvfrom(64)[1][0]]
    return []


def _hardware_of(name: str) -> str:
    with links.netlink("a link") as route:
        (row,) = route.link("dump", ifname=name)
        return str(row.get("address"))


def test_nobody_in_the_world_begins_to_speak_with_the_guest(place: Place) -> None:
    made, end = in_host(place, "nat")
    try:
        assert isinstance(made.card, Tap)
        guest = str(made.addresses[0].ip)
        place.world.do(_add_route, guest, str(HOST.ip))
        with place.world.socket(socket.AF_INET, socket.SOCK_DGRAM) as world:
            world.sendto(b"begin", (guest, 7))
        assert not asked_for(made.card.queues[0], made.addresses[0].ip.packed)
        with place.host.socket(socket.AF_INET, socket.SOCK_DGRAM) as host:  # the host itself may
            host.sendto(b"begin", (guest, 7))
        assert asked_for(made.card.queues[0], made.addresses[0].ip.packed)
    finally:
        end()


def asked_for(tap: int, address: bytes) -> bool:
    """Whether the host asks behind a tap who has this address (ARP), as it does before it forwards anything there."""
    deadline = time.monotonic() + 1.5
    while (left := deadline - time.monotonic()) > 0:
        if select.select([tap], [], [], left)[0]:
            frame = os.read(tap, 65536)[10:]
            if frame[12:14] == b"\x08\x06" and frame[38:42] == address:
                return True
    return False


@pytest.mark.boot
def test_a_guest_reaches_a_server_in_the_world_under_its_hosts_address(
    place: Place, boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    look = check.look

    def look_farther(session: Session) -> str:
        said = look(session)
        with listening(place.world, seen) as port:
            check.ask(session.probe, "talk", str(WORLD.ip), str(port), "65536")
        assert check.ask(session.probe, "ping", str(WORLD.ip), "2", "1000")["answered"] == "2"
        return said

    monkeypatch.setattr(check, "look", look_farther)

    def run() -> SmokeReport:
        machine = Machine(kernel=boot_kernel, root=busybox_initrd, accel="tcg", network="nat")
        return smoke.run(machine, tmp_path, checks=(NETWORK,), seconds=120)

    before = place.state()
    report = place.host.do(run)
    assert report.verdict is Verdict.passed, [(one.name, one.detail) for one in report.checks]
    assert seen == [str(HOST.ip)]
    assert place.state() == before


@contextlib.contextmanager
def listening(world: Namespace, seen: list[str]) -> Iterator[int]:
    """A server in the world that gives back what it gets, and remembers who it was from."""

    class Listener(socket.socket):
        def accept(self) -> tuple[socket.socket, Any]:
            connection, peer = super().accept()
            seen.append(peer[0])
            return connection, peer

    class World:
        def socket(self, family: int, kind: int, protocol: int = 0) -> socket.socket:
            return world.do(Listener, family, kind, protocol)

    with probe.echoing(World(), str(WORLD.ip)) as port:
        yield port
