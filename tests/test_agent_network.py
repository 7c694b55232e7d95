"""The network's calls, in a network of their own; what they did is asked of iproute2, somebody else's reader."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import ttrpc
from osbuild.agent_client import AGENT, AgentClient
from osbuild.arch import X86_64, host_arch
from tests.agent_guest import contained, inside

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(host_arch() is not X86_64, reason="the agent is compiled for x86_64 only"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="ip (iproute2) is not installed"),
    pytest.mark.skipif(not Path("/proc/sys/net/ipv6").exists(), reason="this host has no IPv6"),
]

INVALID_ARGUMENT, INTERNAL = 3, 13
V4, V6 = 0, 1
MAC: Final = "02:00:5e:10:00:01"
OTHER_MAC: Final = "02:00:5e:10:00:02"
Json = dict[str, Any]  # Any: what JSON may hold


class Network:
    def __init__(self, client: AgentClient, process: subprocess.Popen[bytes]) -> None:
        self.client, self.process = client, process

    def call(self, method: str, /, **fields: Any) -> Any:  # Any: as AgentClient.call
        return self.client.call(AGENT, method, **fields)

    def refused(self, method: str, /, **fields: Any) -> ttrpc.StatusError:
        with pytest.raises(ttrpc.StatusError) as refused:
            self.call(method, **fields)
        return refused.value

    def ip(self, *argv: str) -> str:
        return inside(self.process, "ip", *argv)

    def read(self, *argv: str) -> list[Json]:
        found: list[Json] = json.loads(self.ip("-json", *argv) or "[]")
        return found

    def link(self, name: str) -> Json:
        return self.read("address", "show", "dev", name)[0]

    def addresses(self, name: str) -> set[str]:
        return {f"{row['local']}/{row['prefixlen']}" for row in self.link(name)["addr_info"] if row["scope"] != "link"}

    def routes(self, family: str = "-4") -> list[Json]:
        return self.read(family, "route", "show")

    def plug(self, name: str, mac: str) -> None:
        """A network device, whose cable ends in a far end that is up."""
        self.ip("link", "add", name, "address", mac, "type", "veth", "peer", "name", f"far-{name}"[:15])
        self.ip("link", "set", f"far-{name}"[:15], "up")

    def update(self, **fields: Any) -> Any:
        usual = {"name": "eth0", "hwAddr": MAC, "mtu": 1500, "IPAddresses": [address("192.0.2.2", "24")]}
        return self.call("UpdateInterface", interface={**usual, **fields})


def address(text: str, mask: str) -> Json:
    return {"family": V6 if ":" in text else V4, "address": text, "mask": mask}


@pytest.fixture
def network(sanitized_agent: Path, tmp_path: Path) -> Iterator[Network]:
    with contained(sanitized_agent, tmp_path / "log") as (client, process):
        yield Network(client, process)


@pytest.fixture
def eth0(network: Network) -> Network:
    """One interface as a runtime sets it up."""
    network.plug("plugged", MAC)
    network.update(IPAddresses=[address("192.0.2.2", "24"), address("2001:db8::2", "64")])
    return network


# --- interfaces ---


def test_a_device_becomes_the_interface_it_was_in_the_pod(network: Network) -> None:
    network.plug("plugged", MAC)
    wanted = {
        "device": "eth0",
        "name": "eth0",
        "hwAddr": MAC,
        "mtu": 1400,
        "IPAddresses": [address("192.0.2.2", "24"), address("2001:db8::2", "64")],
        "type": "veth",
    }
    answer = network.call("UpdateInterface", interface=wanted)
    link = network.link("eth0")
    assert (link["mtu"], link["address"], "UP" in link["flags"]) == (1400, MAC, True)
    assert network.addresses("eth0") == {"192.0.2.2/24", "2001:db8::2/64"}
    ours = [row for row in link["addr_info"] if row["scope"] != "link"]
    assert not [row for row in ours if row.get("tentative")], "usable at once, without asking neighbours"
    broadcasts = [row.get("broadcast") for row in link["addr_info"] if row["family"] == "inet"]
    assert broadcasts == ["192.0.2.255"]
    assert (answer.name, answer.mtu, answer.hwAddr, answer.type) == ("eth0", 1400, MAC, "veth")
    assert [row.address for row in answer.IPAddresses] == ["192.0.2.2", "2001:db8::2"]


def test_the_same_request_twice_changes_nothing(eth0: Network) -> None:
    before = eth0.link("eth0")
    eth0.update(IPAddresses=[address("192.0.2.2", "24"), address("2001:db8::2", "64")])
    after = eth0.link("eth0")
    for link in (before, after):
        for row in link["addr_info"]:
            row.pop("protocol", None)
    assert after == before


def test_addresses_are_replaced_not_added(eth0: Network) -> None:
    eth0.ip("address", "add", "192.0.2.77/24", "dev", "eth0")
    eth0.ip("address", "add", "198.51.100.1", "peer", "198.51.100.2/32", "dev", "eth0")
    eth0.update(IPAddresses=[address("203.0.113.5", "32")])
    assert eth0.addresses("eth0") == {"203.0.113.5/32"}


def test_a_device_without_a_hardware_address_in_the_request_is_found_by_its_name(network: Network) -> None:
    network.plug("eth0", MAC)
    network.update(hwAddr="")
    assert network.addresses("eth0") == {"192.0.2.2/24"}
    assert network.link("eth0")["address"] == MAC


def test_a_device_found_by_its_name_gets_the_hardware_address(network: Network) -> None:
    network.plug("eth0", OTHER_MAC)
    network.update(hwAddr=MAC)
    assert network.link("eth0")["address"] == MAC


def test_two_interfaces_swap_their_names(network: Network) -> None:
    network.plug("eth0", MAC)
    network.plug("eth1", OTHER_MAC)
    network.ip("link", "set", "eth0", "up")
    network.update(name="eth1", hwAddr=MAC)
    assert (network.link("eth1")["address"], network.link("eth0")["address"]) == (MAC, OTHER_MAC)
    network.update(name="eth0", hwAddr=OTHER_MAC, IPAddresses=[address("192.0.2.9", "24")])
    assert network.addresses("eth1") == {"192.0.2.2/24"}
    assert network.addresses("eth0") == {"192.0.2.9/24"}
    assert "eth0_temp" not in network.ip("link")


def test_an_interface_that_cannot_take_a_name_gives_it_back(network: Network) -> None:
    """The second rename is refused for its MTU: the first link has its name again, and its addresses."""
    network.plug("eth0", MAC)
    network.plug("eth1", OTHER_MAC)
    network.update(name="eth1", hwAddr=OTHER_MAC)
    with pytest.raises(ttrpc.StatusError):
        network.update(name="eth1", hwAddr=MAC, mtu=10_000_000)
    assert network.link("eth1")["address"] == OTHER_MAC
    assert network.addresses("eth1") == {"192.0.2.2/24"}


def test_a_long_name_steps_aside_under_a_shorter_one(network: Network) -> None:
    network.plug("a-name-of-15-by", OTHER_MAC)
    network.plug("eth0", MAC)
    network.update(name="a-name-of-15-by", hwAddr=MAC)
    assert network.link("a-name-of-15-by")["address"] == MAC
    assert network.link("eth0")["address"] == OTHER_MAC


@pytest.mark.parametrize(("flags", "expected"), [(0, False), (0x80, True)], ids=["arp", "noarp"])
def test_only_noarp_of_the_flags_counts(network: Network, flags: int, expected: bool) -> None:
    network.plug("plugged", MAC)
    network.update(raw_flags=flags | 0x100)
    assert ("NOARP" in network.link("eth0")["flags"], "PROMISC" in network.link("eth0")["flags"]) == (expected, False)


def test_a_device_that_is_not_there_is_called_what_the_runtime_looks_for(network: Network) -> None:
    with pytest.raises(ttrpc.StatusError, match="Link not found") as refused:
        network.update()
    assert refused.value.code == INTERNAL


def test_without_ipv6_its_addresses_are_left_out(network: Network) -> None:
    network.plug("plugged", MAC)
    inside(network.process, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/all/disable_ipv6")
    network.update(IPAddresses=[address("192.0.2.2", "24"), address("2001:db8::2", "64")])
    assert network.addresses("eth0") == {"192.0.2.2/24"}
    route = {"dest": "2001:db8:1::/48", "device": "eth0", "family": V6}
    assert not [row for row in network.call("UpdateRoutes", routes={"Routes": [route]}).Routes if row.family == V6]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mtu": 0}, "0 is no MTU"),
        ({"mtu": 1 << 40}, "is no MTU"),
        ({"name": ""}, "cannot be the name"),
        ({"name": "sixteen-letters!"}, "cannot be the name"),
        ({"name": "a/b"}, "cannot be the name"),
        ({"name": "eth%d"}, "cannot be the name"),
        ({"name": ".."}, "cannot be the name"),
        ({"hwAddr": "02:00:5e:10:00"}, "no hardware address"),
        ({"hwAddr": "02:00:5e:10:00:0g"}, "no hardware address"),
        ({"hwAddr": "02-00-5e-10-00-01"}, "no hardware address"),
        ({"IPAddresses": [address("192.0.2", "24")]}, "no IP address"),
        ({"IPAddresses": [address("fe80::1%eth0", "64")]}, "no IP address"),
        ({"IPAddresses": [address("192.0.2.2", "33")]}, "no prefix length"),
        ({"IPAddresses": [address("192.0.2.2", "255.255.255.0")]}, "no prefix length"),
        ({"IPAddresses": [address("2001:db8::1", "129")]}, "no prefix length"),
        ({"IPAddresses": [address("192.0.2.2", "")]}, "no prefix length"),
        ({"devicePath": "no path"}, "no PCI path"),
    ],
)
def test_what_no_interface_can_be_is_refused_before_anything_is_touched(
    eth0: Network, fields: Json, words: str
) -> None:
    before = eth0.link("eth0")
    with pytest.raises(ttrpc.StatusError) as refused:
        eth0.update(**fields)
    assert (refused.value.code, words in str(refused.value)) == (INVALID_ARGUMENT, True)
    assert eth0.link("eth0") == before


def test_a_request_has_to_hold_what_it_is_about(network: Network) -> None:
    for method in ("UpdateInterface", "UpdateRoutes", "AddARPNeighbors"):
        assert network.refused(method).code == INVALID_ARGUMENT


def test_the_kernels_own_words_reach_the_host(network: Network) -> None:
    network.plug("plugged", MAC)
    with pytest.raises(ttrpc.StatusError, match="mtu greater than device maximum") as refused:
        network.update(mtu=10_000_000)
    assert refused.value.code == INTERNAL


def test_a_pci_device_that_does_not_come_is_named_when_the_time_is_over(network: Network) -> None:
    with pytest.raises(ttrpc.StatusError, match="waited in vain for a device on PCI at 1e/1f") as refused:
        network.update(devicePath="1e/1f")
    assert refused.value.code == INTERNAL


def test_every_interface_is_listed_as_iproute2_lists_it(eth0: Network) -> None:
    eth0.plug("second", OTHER_MAC)
    listed = {row.name: row for row in eth0.call("ListInterfaces").Interfaces}
    expected = {row["ifname"]: row for row in eth0.read("-details", "address", "show")}
    assert list(listed) == list(expected)
    for name, row in expected.items():
        assert listed[name].mtu == row["mtu"]
        assert listed[name].hwAddr.lower() == row["address"]
        assert listed[name].type == row.get("linkinfo", {}).get("info_kind", "")
        assert [(a.family, a.address, a.mask) for a in listed[name].IPAddresses] == [
            (V6 if a["family"] == "inet6" else V4, a["local"], str(a["prefixlen"])) for a in row["addr_info"]
        ]


def test_a_thousand_interfaces_are_listed_and_one_of_them_is_found(network: Network, tmp_path: Path) -> None:
    lines = "".join(f"link add l{i} address 02:00:00:00:{i >> 8:02x}:{i & 255:02x} type ifb\n" for i in range(1000))
    batch = tmp_path / "batch"
    batch.write_text(lines)
    network.ip("-batch", str(batch))
    assert len(network.call("ListInterfaces").Interfaces) == 1001
    network.update(hwAddr="02:00:00:00:03:e7")
    assert network.addresses("eth0") == {"192.0.2.2/24"}


# --- routes ---


def test_routes_are_set_those_with_a_gateway_last(eth0: Network) -> None:
    routes = [
        {"dest": "", "gateway": "198.51.100.1", "device": "eth0"},
        {"dest": "203.0.113.0/24", "gateway": "192.0.2.1", "device": "eth0", "mtu": 1300, "source": "192.0.2.2"},
        {"dest": "198.51.100.1/32", "device": "eth0", "scope": 253},
    ]
    listed = eth0.call("UpdateRoutes", routes={"Routes": routes}).Routes
    found = {row["dst"]: row for row in eth0.routes()}
    assert found["default"]["gateway"] == "198.51.100.1"
    assert found["203.0.113.0/24"]["gateway"] == "192.0.2.1"
    assert found["203.0.113.0/24"]["prefsrc"] == "192.0.2.2"
    assert found["203.0.113.0/24"]["metrics"] == [{"mtu": 1300}]
    assert found["198.51.100.1"]["scope"] == "link"
    assert {row["protocol"] for row in found.values() if "protocol" in row} <= {"kernel", "boot"}
    by_dest = {row.dest: row for row in listed}
    assert by_dest["0.0.0.0"].gateway == "198.51.100.1"
    assert (by_dest["203.0.113.0/24"].mtu, by_dest["203.0.113.0/24"].source) == (1300, "192.0.2.2")
    assert {row.device for row in listed if row.family == V4} == {"eth0"}


def test_routes_of_ipv6_are_set_as_well(eth0: Network) -> None:
    routes = [
        {"dest": "", "gateway": "2001:db8::1", "device": "eth0", "family": V6},
        {"dest": "2001:db8:1::/48", "gateway": "fe80::1", "device": "eth0", "family": V6},
        {"dest": "2001:db8:2::/48", "device": "eth0"},
        {"dest": "2001:db8:3::/48", "device": "eth0", "family": V6, "source": "2001:db8::2", "mtu": 1290},
    ]
    listed = {row.dest: row for row in eth0.call("UpdateRoutes", routes={"Routes": routes}).Routes if row.family == V6}
    found = {row["dst"]: row for row in eth0.routes("-6")}
    assert found["default"]["gateway"] == "2001:db8::1"
    assert found["2001:db8:1::/48"]["gateway"] == "fe80::1"
    assert "2001:db8:2::/48" in found
    assert found["2001:db8:3::/48"]["prefsrc"] == "2001:db8::2"
    assert listed["::1"].gateway == "2001:db8::1"
    assert listed["2001:db8:3::/48"].mtu == 1290


def test_a_source_with_a_prefix_selects_packets_where_the_kernel_can(eth0: Network) -> None:
    route = {"dest": "2001:db8:1::/48", "device": "eth0", "family": V6, "source": "2001:db8:9::/64"}
    listed = eth0.call("UpdateRoutes", routes={"Routes": [route]}).Routes
    assert [row.source for row in listed if row.dest == "2001:db8:1::/48"] == ["2001:db8:9::/64"]
    assert "from 2001:db8:9::/64" in eth0.ip("-6", "route", "show")
    refused = eth0.refused("UpdateRoutes", routes={"Routes": [{"dest": "", "device": "eth0", "source": "10.0.0.0/8"}]})
    assert refused.code == INVALID_ARGUMENT


def test_a_gateway_outside_its_network_needs_the_flag_that_says_so(eth0: Network) -> None:
    route = {"dest": "203.0.113.0/24", "gateway": "169.254.1.1", "device": "eth0"}
    refused = eth0.refused("UpdateRoutes", routes={"Routes": [route]})
    assert "invalid gateway" in str(refused), "the kernel's own words"
    listed = eth0.call("UpdateRoutes", routes={"Routes": [{**route, "flags": 4}]}).Routes
    assert [row.flags for row in listed if row.dest == "203.0.113.0/24"] == [4]
    assert [row["flags"] for row in eth0.routes() if row["dst"] == "203.0.113.0/24"] == [["onlink"]]


def test_a_route_that_is_there_is_replaced_and_others_stay(eth0: Network) -> None:
    eth0.ip("route", "add", "203.0.113.0/24", "via", "192.0.2.7")
    eth0.ip("route", "add", "198.51.100.0/24", "via", "192.0.2.7")
    route = {"dest": "203.0.113.0/24", "gateway": "192.0.2.1", "device": "eth0"}
    for _ in range(2):
        eth0.call("UpdateRoutes", routes={"Routes": [route]})
    found = {row["dst"]: row.get("gateway") for row in eth0.routes()}
    assert (found["203.0.113.0/24"], found["198.51.100.0/24"]) == ("192.0.2.1", "192.0.2.7")


@pytest.mark.parametrize(
    "fields",
    [
        {"dest": "everywhere"},
        {"dest": "10.0.0.0/33"},
        {"dest": "10.0.0.0/"},
        {"dest": "2001:db8::/129", "family": V6},
        {"dest": "10.0.0.0/8", "family": V6},
        {"gateway": "10.0.0.0/8"},
        {"gateway": "2001:db8::1", "dest": "10.0.0.0/8"},
        {"source": "nobody"},
        {"scope": 256},
    ],
    ids=str,
)
def test_what_is_no_route_is_refused_and_none_is_set(eth0: Network, fields: Json) -> None:
    good = {"dest": "203.0.113.0/24", "device": "eth0"}
    before = eth0.routes()
    refused = eth0.refused("UpdateRoutes", routes={"Routes": [good, {**good, **fields}]})
    assert (refused.code, eth0.routes()) == (INVALID_ARGUMENT, before)


def test_a_route_over_a_link_that_is_not_there_says_so(eth0: Network) -> None:
    refused = eth0.refused("UpdateRoutes", routes={"Routes": [{"dest": "203.0.113.0/24", "device": "eth7"}]})
    assert (refused.code, "Link not found" in str(refused)) == (INTERNAL, True)


def test_only_the_main_table_is_listed(eth0: Network) -> None:
    eth0.ip("route", "add", "198.51.100.0/24", "dev", "eth0", "table", "77")
    eth0.ip("route", "add", "blackhole", "203.0.113.0/24")
    listed = [row.dest for row in eth0.call("ListRoutes").Routes if row.family == V4]
    assert sorted(listed) == sorted(f"{row['dst']}" for row in eth0.routes())


def test_ten_thousand_routes_are_listed(eth0: Network, tmp_path: Path) -> None:
    lines = "".join(f"route add 10.{i >> 8}.{i & 255}.0/24 dev eth0\n" for i in range(10_000))
    batch = tmp_path / "batch"
    batch.write_text(lines)
    eth0.ip("-batch", str(batch))
    assert len([row for row in eth0.call("ListRoutes").Routes if row.dest.startswith("10.")]) == 10_000


def test_ten_thousand_routes_can_be_set_and_not_one_more(eth0: Network) -> None:
    routes = [{"dest": f"10.{i >> 8}.{i & 255}.0/24", "device": "eth0"} for i in range(10_000)]
    assert len(eth0.call("UpdateRoutes", routes={"Routes": routes}).Routes) >= 10_000
    refused = eth0.refused("UpdateRoutes", routes={"Routes": [*routes, *routes[:1]]})
    assert (refused.code, "10001 routes" in str(refused)) == (INVALID_ARGUMENT, True)


# --- neighbours ---


def test_neighbours_are_permanent_unless_they_say_otherwise(eth0: Network) -> None:
    neighbors = [
        {"toIPAddress": address("192.0.2.1", ""), "device": "eth0", "lladdr": OTHER_MAC},
        {"toIPAddress": address("2001:db8::1", ""), "device": "eth0", "lladdr": OTHER_MAC, "state": 0x02},
    ]
    for _ in range(2):
        eth0.call("AddARPNeighbors", neighbors={"ARPNeighbors": neighbors})
    found = {row["dst"]: row for row in eth0.read("neighbor", "show")}
    assert (found["192.0.2.1"]["lladdr"], found["192.0.2.1"]["state"]) == (OTHER_MAC, ["PERMANENT"])
    assert (found["2001:db8::1"]["lladdr"], found["2001:db8::1"]["state"]) == (OTHER_MAC, ["REACHABLE"])


def test_a_neighbour_is_replaced(eth0: Network) -> None:
    for mac in (OTHER_MAC, MAC):
        neighbor = {"toIPAddress": address("192.0.2.1", ""), "device": "eth0", "lladdr": mac}
        eth0.call("AddARPNeighbors", neighbors={"ARPNeighbors": [neighbor]})
    assert [row["lladdr"] for row in eth0.read("neighbor", "show") if row["dst"] == "192.0.2.1"] == [MAC]


@pytest.mark.parametrize(
    "fields",
    [
        {"toIPAddress": address("", "")},
        {"toIPAddress": address("192.0.2", "")},
        {"lladdr": "02:00"},
        {"state": -1},
        {"state": 65536},
        {"flags": 256},
    ],
    ids=str,
)
def test_what_is_no_neighbour_is_refused(eth0: Network, fields: Json) -> None:
    good = {"toIPAddress": address("192.0.2.1", ""), "device": "eth0", "lladdr": OTHER_MAC}
    refused = eth0.refused("AddARPNeighbors", neighbors={"ARPNeighbors": [good, {**good, **fields}]})
    assert refused.code == INVALID_ARGUMENT
    assert "192.0.2.1" not in {row["dst"] for row in eth0.read("neighbor", "show")}


def test_a_neighbour_on_a_link_that_is_not_there_says_so(network: Network) -> None:
    neighbor = {"toIPAddress": address("192.0.2.1", ""), "device": "eth7", "lladdr": OTHER_MAC}
    refused = network.refused("AddARPNeighbors", neighbors={"ARPNeighbors": [neighbor]})
    assert (refused.code, "Link not found" in str(refused)) == (INTERNAL, True)
