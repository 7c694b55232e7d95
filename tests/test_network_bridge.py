"""A guest as a port of a bridge that somebody else has: a namespace is the host, another a neighbour.

guest == QEMU == [ host: osb… - br0 203.0.113.1 - osb…p, up0 ] ==== [ world: out0 ]
"""

from __future__ import annotations

import contextlib
import ipaddress
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import network, smoke
from osbuild.artifacts import Initrd, Kernel
from osbuild.checks import NETWORK
from osbuild.errors import HostError, SpecError
from osbuild.network import GuestNetwork, firewall, links
from osbuild.network.base import PLACES, make_mac, pick_addresses
from osbuild.network.bridge import make_port_mac
from osbuild.network.namespace import Namespace, missing_capabilities, namespace
from osbuild.report import SmokeReport, Verdict
from osbuild.runtime.base import Machine
from osbuild.spec import GuestSpec
from tests.boot_fixtures import boot_kernel

__all__ = ["boot_kernel"]  # a fixture

pytestmark = pytest.mark.xdist_group("links")

BRIDGE: Final = "br0"
WISH: Final = f"bridge={BRIDGE}"
MTU: Final = 1380
OWN: Final = ipaddress.ip_interface("203.0.113.1/24")  # RFC 5737
OWN_V6: Final = ipaddress.ip_interface("2001:db8:ffff::1/64")


@pytest.fixture
def bare() -> Iterator[Namespace]:
    """A host with a bridge that has no port yet."""
    if missing := missing_capabilities(*network.NETWORKS["bridge"].CAPABILITIES):
        pytest.skip(f"this user lacks {', '.join(missing)}")
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed: apt-get install iproute2")
    with namespace() as host:
        run(host, "ip", "link", "add", BRIDGE, "type", "bridge")
        host.do(links.set_up, BRIDGE, addresses=(OWN, OWN_V6))
        yield host


@pytest.fixture
def host(bare: Namespace) -> Iterator[Namespace]:
    """One with a port that leads to a neighbour, and an MTU of its own."""
    with namespace() as world:
        run(bare, "ip", "link", "set", BRIDGE, "mtu", str(MTU))
        bare.do(links.add_veth, "up0", make_mac(), 1500, peer="out0", peer_namespace=world.descriptor)
        bare.do(links.set_up, "up0", bridge=BRIDGE)
        world.do(links.set_up, "out0")
        yield bare


def run(space: Namespace, *words: str) -> str:
    """A program that runs in a namespace."""
    return space.do(lambda: subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout)


@contextlib.contextmanager
def joined(host: Namespace, wish: str = WISH) -> Iterator[GuestNetwork]:
    manager = network.opened(wish, cpus=1)
    made = host.do(manager.__enter__)
    assert made is not None
    try:
        yield made
    finally:
        host.do(manager.__exit__, None, None, None)


def seen(host: Namespace) -> tuple[tuple[str, ...], list[str]]:
    """The bridge's addresses of every kind and its MTU, and every link's name."""
    said = run(host, "ip", "-br", "address", "show", "dev", BRIDGE) + run(host, "ip", "-d", "link", "show", BRIDGE)
    words = [word for word in said.split() if "/" in word or word.count(":") == 5]
    mtu = host.do(Path(f"/proc/sys/net/ipv6/conf/{BRIDGE}/mtu").read_text)
    return (*words, mtu), sorted(host.do(_names))


def _names() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


@pytest.mark.parametrize("kind", ["bare", "host"])
def test_a_bridge_that_was_joined_is_meanwhile_and_afterwards_as_it_was(
    kind: str, request: pytest.FixtureRequest
) -> None:
    space: Namespace = request.getfixturevalue(kind)
    before = seen(space)
    with joined(space) as made:
        during = seen(space)
        assert during[0] == before[0]
        assert set(made.links) <= set(during[1])
        assert len(made.links) == 2
    assert seen(space) == before


def test_the_guest_is_given_the_bridges_mtu_and_no_address_of_its_network(host: Namespace) -> None:
    with joined(host) as made:
        assert made.mtu == MTU
        assert {one.version for one in made.addresses} == {4, 6}
        assert not any(one.ip in own.network for one in made.addresses for own in (OWN, OWN_V6))
        for name in made.links:
            assert f"mtu {MTU}" in run(host, "ip", "link", "show", name)
            assert "inet" not in run(host, "ip", "address", "show", "dev", name)


def test_guests_join_a_bridge_beside_each_other(host: Namespace) -> None:
    with joined(host) as one, joined(host) as other:
        assert not {*one.addresses, *one.gateways, *one.links} & {*other.addresses, *other.gateways, *other.links}


def test_where_a_bridge_looks_for_loops_its_ports_are_waited_for(bare: Namespace) -> None:
    run(bare, "ip", "link", "set", BRIDGE, "type", "bridge", "stp_state", "1", "forward_delay", "200")
    with joined(bare) as made:
        assert all(bare.do(links.forwards, name) for name in made.links)


def test_a_port_that_no_bridge_carries_is_told(bare: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osbuild.network.bridge._SPARE_SECONDS", -3.9)  # of twice two that it takes
    run(bare, "ip", "link", "set", BRIDGE, "type", "bridge", "stp_state", "1", "forward_delay", "200")
    with (
        pytest.raises(HostError, match=r"the bridge carries no frames of its new port osb\w+ after 0.1 s"),
        joined(bare),
    ):
        pass
    assert bare.do(_names) == ["lo", BRIDGE]


@pytest.mark.parametrize(
    ("wish", "reason", "hint"),
    [
        ("bridge=br1", "'br1' is not a bridge of this host", "there is br0"),
        ("bridge=lo", "'lo' is not a bridge of this host", "there is br0"),
    ],
    ids=["no link", "no bridge"],
)
def test_what_is_no_bridge_is_not_joined(bare: Namespace, wish: str, reason: str, hint: str) -> None:
    with pytest.raises(HostError, match=reason) as refused, joined(bare, wish):
        pass
    assert refused.value.hint == hint


def test_a_bridge_that_is_down_is_not_joined(bare: Namespace) -> None:
    run(bare, "ip", "link", "set", BRIDGE, "down")
    with pytest.raises(HostError, match="the bridge br0 is down") as refused, joined(bare):
        pass
    assert refused.value.hint == "ip link set br0 up"


@pytest.mark.parametrize("wish", ["tap=br0", "bridge="])
def test_only_a_bridge_is_joined_by_a_name(wish: str) -> None:
    with pytest.raises(SpecError, match=f"no network '{wish}'") as refused:
        GuestSpec(network=wish)
    assert refused.value.hint == "bridge=NAME joins the host's bridge NAME"
    assert GuestSpec(network="bridge=br0").network == "bridge=br0"


def test_addresses_are_two_of_a_network_that_is_nobodys() -> None:
    for _ in range(200):
        (gateway, guest), (gateway_v6, guest_v6) = pick_addresses()
        assert gateway.network == guest.network
        assert gateway.ip + 1 == guest.ip
        assert guest.network.subnet_of(PLACES)  # type: ignore[arg-type]  # of one version, both
        assert gateway_v6.network == guest_v6.network
        assert str(guest_v6).startswith("2001:db8:")
    assert make_port_mac() > max(make_mac() for _ in range(100)), "a bridge takes its lowest port's"


KILLED: Final = """\
import os, signal
from osbuild import network
with network.opened("bridge=br0"):
    print("made", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_who_is_killed_leaves_no_port(host: Namespace) -> None:
    before = seen(host)

    def end() -> bytes:
        return subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, timeout=120).stdout

    assert host.do(end) == b"made\n"
    deadline = time.monotonic() + 10
    while seen(host) != before:
        assert time.monotonic() < deadline, seen(host)
        time.sleep(0.05)


# --- Who drops its frames -------------------------------------------------------------------------------------------


def drop(host: Namespace, tool: str) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed: apt-get install iptables")
    if "nf_tables" not in run(host, tool, "--version"):
        pytest.skip(f"{tool} is not the one of nf_tables")
    if not Path("/proc/sys/net/bridge").exists():
        pytest.skip("this kernel has no br_netfilter")
    run(host, tool, "-P", "FORWARD", "DROP")


@pytest.mark.parametrize(("tool", "family"), [("iptables", "ip"), ("ip6tables", "ip6")])
def test_a_firewall_that_drops_what_crosses_the_bridge_is_named(host: Namespace, tool: str, family: str) -> None:
    switch = Path(f"/proc/sys/net/bridge/bridge-nf-call-{tool}")
    with joined(host) as made:
        assert made.obstacles is not None
        assert host.do(made.obstacles) == (), "there is none yet"
        drop(host, tool)
        host.do(switch.write_text, "0")
        assert host.do(made.obstacles) == (), "and it is not asked"
        host.do(switch.write_text, "1")
        passed, dropped = host.do(made.obstacles)
    assert passed.startswith("what crosses br0 passes the host's firewall (bridge-nf-call-")
    assert f"bridge-nf-call-{tool}=1" in passed
    assert dropped == f"the chain FORWARD of the table {family} filter drops what no rule lets through"


def test_a_bridge_may_ask_a_firewall_by_a_switch_of_its_own(host: Namespace) -> None:
    drop(host, "iptables")
    for name in ("iptables", "ip6tables"):
        host.do(Path(f"/proc/sys/net/bridge/bridge-nf-call-{name}").write_text, "0")
    assert host.do(firewall.bridge_obstacles, BRIDGE) == ()
    run(host, "ip", "link", "set", BRIDGE, "type", "bridge", "nf_call_iptables", "1")
    assert "(bridge-nf-call-iptables=1)" in host.do(firewall.bridge_obstacles, BRIDGE)[0]


@pytest.mark.parametrize(
    ("through", "droppers", "older", "said"),
    [
        ([], [], False, ()),
        ([], [], True, ()),
        (["a"], [], False, ()),
        (["a"], [], True, ("firewall (a=1)", "iptables-legacy")),
        ([], ["the chain c of the table bridge t"], False, ("bridge t drops",)),
        (["a", "b"], ["x", "y"], True, ("firewall (a=1, b=1)", "x and y drop")),
    ],
    ids=["nothing", "legacy unasked", "no chain", "legacy", "frames", "both"],
)
def test_only_what_can_have_dropped_them_is_blamed(
    through: list[str], droppers: list[str], older: bool, said: tuple[str, ...]
) -> None:
    found = firewall.explain_drops("br0", through, droppers, older=older)
    assert len(found) == len(said)
    assert all(part in sentence for part, sentence in zip(said, found, strict=True))


# --- With a guest ---------------------------------------------------------------------------------------------------


def boot(host: Namespace, kernel: Kernel, root: Initrd, work: Path) -> tuple[SmokeReport, Any]:
    def start() -> SmokeReport:
        machine = Machine(kernel=kernel, root=root, accel="tcg", network=WISH)
        return smoke.run(machine, work, checks=(NETWORK,), seconds=120)

    report = host.do(start)
    (check,) = [one for one in report.checks if one.name == NETWORK]
    return report, check


@pytest.mark.boot
def test_a_guest_speaks_with_another_port_of_the_hosts_bridge(
    host: Namespace, boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path
) -> None:
    before = seen(host)
    report, check = boot(host, boot_kernel, busybox_initrd, tmp_path)
    assert report.verdict is Verdict.passed, [(one.name, one.detail) for one in report.checks]
    assert check.detail.count("by TCP") == 4
    assert check.detail.count(f"3 of 3 pings of {MTU} bytes") == 4
    assert report.machine["network"] == WISH
    assert seen(host) == before


@pytest.mark.boot
@pytest.mark.slow
def test_a_guest_whose_frames_the_hosts_firewall_drops_is_told_which(
    host: Namespace, boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path
) -> None:
    drop(host, "iptables")
    report, check = boot(host, boot_kernel, busybox_initrd, tmp_path)
    assert report.verdict is Verdict.failed
    assert "of the guest's 3 echo requests" in check.detail
    assert check.detail.endswith("; the chain FORWARD of the table ip filter drops what no rule lets through")
