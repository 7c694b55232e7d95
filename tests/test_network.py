"""Networks for a guest, as iproute2, the kernel and frames on the wire show them; no guest is needed for that."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import network
from osbuild.errors import HostError, SpecError
from osbuild.findings import Wrong
from osbuild.network import NETWORKS, GuestNetwork, Tap, User, leftovers, links, macvtap, probe, tcfilter
from osbuild.network.base import GUEST, MTU, OUTSIDE
from osbuild.network.namespace import CAP_NET_RAW, Namespace, is_alive, missing_capabilities, namespace
from osbuild.network.pod import ETH, pod

# One test's /dev/tap* would be what another has left behind.
pytestmark = pytest.mark.xdist_group("links")

Json = dict[str, Any]  # Any: as iproute2 has it
ISOLATED: Final = tuple(name for name in NETWORKS if name != "nat")  # which has tests of its own
TAPS: Final = tuple(name for name in ISOLATED if name != "user")
_VNET_HEADER: Final = 10  # bytes before each frame: linux/virtio_net.h, as TUN has them unless told otherwise
_ARP: Final = 0x0806


@pytest.fixture(params=ISOLATED)
def kind(request: pytest.FixtureRequest) -> str:
    return able(request.param)


@pytest.fixture(params=TAPS)
def tap_kind(request: pytest.FixtureRequest) -> str:
    return able(request.param)


def able(kind: str) -> str:
    """A kind that can be had here; a skip that says what is missing otherwise."""
    try:
        with network.opened(kind):
            return kind
    except HostError as problem:
        pytest.skip(f"{problem}: {problem.hint}")


def ip(space: Namespace, *words: str, tool: str = "ip") -> Any:  # Any: as iproute2 has it
    """What iproute2 says of a namespace, which it enters by the descriptor that keeps it."""
    if shutil.which("nsenter") is None or shutil.which(tool) is None:
        pytest.skip(f"nsenter or {tool} is not installed: apt-get install util-linux iproute2")
    argv = ("nsenter", f"--net=/proc/{os.getpid()}/fd/{space.descriptor}", tool, "-j", "-d", *words)
    return json.loads(subprocess.run(argv, capture_output=True, text=True, timeout=30, check=True).stdout or "[]")


def link(space: Namespace, name: str) -> Json:
    (found,) = [row for row in ip(space, "address") if row["ifname"] == name]
    return dict(found)


def addresses(row: Json) -> set[str]:
    return {f"{one['local']}/{one['prefixlen']}" for one in row["addr_info"] if one["scope"] == "global"}


# --- What each row promises -----------------------------------------------------------------------------------------


def test_nothing_is_made_for_who_asks_for_nothing() -> None:
    with network.opened("") as made:
        assert made is None


def test_there_is_no_network_of_another_name() -> None:
    with pytest.raises(SpecError, match="no network 'token-ring'") as refused:
        network.check("token-ring")
    assert refused.value.hint == "one of user, tap, macvtap, tcfilter, bridge, nat"


def test_a_network_ends_with_its_block(kind: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with network.opened(kind) as made:
        assert made is not None
        assert made.kind == kind
        assert all(map(is_alive, made.namespaces))
        for descriptor in made.descriptors:
            os.fstat(descriptor)
    assert set(os.listdir("/proc/self/fd")) == before
    assert not any(map(is_alive, made.namespaces))


def test_a_network_ends_when_its_block_fails(kind: str) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ZeroDivisionError), network.opened(kind) as made:
        raise ZeroDivisionError
    assert made is not None
    assert set(os.listdir("/proc/self/fd")) == before
    assert not any(map(is_alive, made.namespaces))


def test_a_network_changes_nothing_in_the_hosts_own(kind: str) -> None:
    def seen() -> tuple[frozenset[str], list[str], str]:
        return leftovers.host_addresses(), sorted(os.listdir("/sys/class/net")), Path("/proc/net/route").read_text()

    before = seen()
    with network.opened(kind):
        assert seen() == before
    assert seen() == before


def test_every_card_has_an_address_of_its_own(kind: str) -> None:
    macs = set()
    for _ in range(3):
        with network.opened(kind) as made:
            assert made is not None
            macs.add(made.mac)
            assert int(made.mac[:2], 16) & 3 == 2, "locally administered, and no group"
    assert len(macs) == 3


@pytest.mark.parametrize("cpus", [1, 3, 100])
def test_there_is_a_queue_for_each_processor_up_to_eight(tap_kind: str, cpus: int) -> None:
    with network.opened(tap_kind, cpus=cpus) as made:
        assert made is not None
        assert isinstance(made.card, Tap)
        assert len(made.card.queues) == len(set(made.card.queues)) == min(cpus, 8)
        assert len(made.card.vhost) in (0, len(made.card.queues))


def test_two_of_a_kind_live_beside_each_other(kind: str) -> None:
    with network.opened(kind) as one, network.opened(kind) as other:
        assert one is not None
        assert other is not None
        assert not set(one.namespaces) & set(other.namespaces)
        assert not set(one.descriptors) & set(other.descriptors)


# --- What Kata's contract says of each ------------------------------------------------------------------------------


@contextlib.contextmanager
def watched_pod(monkeypatch: pytest.MonkeyPatch, module: Any) -> Iterator[list[Any]]:  # Any: a row, and its Pod
    """Keep the pod that a row makes, to look into it."""
    seen: list[Any] = []

    @contextlib.contextmanager
    def remembered() -> Iterator[Any]:
        with pod() as made:
            seen.append(made)
            yield made

    monkeypatch.setattr(module, "pod", remembered)
    yield seen


def test_the_macvtap_has_the_veths_hardware_address_and_the_veth_another_and_no_addresses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    able("macvtap")
    with watched_pod(monkeypatch, macvtap) as seen, network.opened("macvtap") as made:
        assert made is not None
        inside = seen[0].inside
        tap, veth = link(inside, macvtap.LINK), link(inside, ETH)
    assert tap["linkinfo"]["info_kind"] == "macvtap"
    assert tap["linkinfo"]["info_data"]["mode"] == "bridge"
    assert tap["address"] == made.mac == seen[0].mac
    assert veth["address"] != made.mac
    assert addresses(veth) == set()
    assert tap["ifindex"] >= 8192
    assert (tap["mtu"], tap["txqlen"]) == (MTU, 1500)
    assert "UP" in tap["flags"]
    assert "UP" in veth["flags"]


def test_the_veth_beside_a_filtered_tap_keeps_its_addresses_of_both_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    able("tcfilter")
    with watched_pod(monkeypatch, tcfilter) as seen, network.opened("tcfilter") as made:
        assert made is not None
        inside = seen[0].inside
        tap, veth = link(inside, tcfilter.LINK), link(inside, ETH)
    assert veth["address"] == made.mac
    assert addresses(veth) == {str(one) for one in GUEST}
    assert tap["linkinfo"]["info_data"]["type"] == "tap"
    assert not tap["linkinfo"]["info_data"]["persist"], "it dies with its last open file"
    assert tap["linkinfo"]["info_data"]["vnet_hdr"]
    assert tap["mtu"] == veth["mtu"] == MTU


def test_each_of_two_filters_sends_everything_to_the_other_link(monkeypatch: pytest.MonkeyPatch) -> None:
    able("tcfilter")
    with watched_pod(monkeypatch, tcfilter) as seen, network.opened("tcfilter"):
        inside = seen[0].inside
        found = {
            name: ip(inside, "filter", "show", "dev", name, "ingress", tool="tc") for name in (ETH, tcfilter.LINK)
        }  # fmt: skip
    for name, other in ((ETH, tcfilter.LINK), (tcfilter.LINK, ETH)):
        (row,) = [row for row in found[name] if "actions" in row.get("options", {})]
        assert (row["protocol"], row["kind"], row["parent"]) == ("all", "u32", "ffff:")
        (action,) = row["options"]["actions"]
        assert (action["kind"], action["mirred_action"], action["direction"]) == ("mirred", "redirect", "egress")
        assert action["to_dev"] == other
        assert action["control_action"]["type"] == "stolen"
        (key,) = [row["options"]["match"]]
        assert (key["value"], key["mask"]) == ("0", "0")


def test_a_tap_has_the_gateways_addresses_usable_at_once() -> None:
    able("tap")
    with network.opened("tap") as made:
        assert made is not None
        assert isinstance(made.outside, Namespace)
        row = link(made.outside, "tap0")
    assert addresses(row) == {str(one) for one in OUTSIDE}
    assert not [one for one in row["addr_info"] if one["scope"] == "global" and one.get("tentative")]
    assert row["mtu"] == MTU


def test_what_a_guest_is_told_fits_together(kind: str) -> None:
    with network.opened(kind) as made:
        assert made is not None
    for gateway in made.gateways:
        (one,) = [interface for interface in made.addresses if interface.version == gateway.version]
        assert gateway in one.network
        assert gateway != one.ip


# --- Frames: what a guest would send and get ------------------------------------------------------------------------


def test_a_frame_of_the_guests_reaches_the_other_end_and_its_answer_the_guest(tap_kind: str) -> None:
    with network.opened(tap_kind) as made:
        assert made is not None
        assert isinstance(made.card, Tap)
        (tap,) = made.card.queues
        guest, gateway = made.addresses[0].ip.packed, made.gateways[0].packed
        asked = arp(made.mac, 1, guest, gateway)
        answer = b""
        deadline = time.monotonic() + 10
        while not answer and time.monotonic() < deadline:
            os.write(tap, bytes(_VNET_HEADER) + asked)
            answer = next((frame for frame in frames(tap, 0.5) if is_arp_reply(frame, gateway)), b"")
    assert answer, "nobody answers"
    assert answer[:6] == mac_bytes(made.mac), "it is for the guest"
    assert answer[38:42] == guest


def test_a_frame_for_the_guest_reaches_it_and_nobody_before_it_answers(tap_kind: str) -> None:
    """The veth of tcfilter has the guest's own address: if its kernel answered, this would not need a guest."""
    with network.opened(tap_kind) as made:
        assert made is not None
        assert isinstance(made.card, Tap)
        assert made.outside is not None
        with made.outside.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            with pytest.raises(BlockingIOError):
                connection.connect((str(made.addresses[0].ip), 7))
            wanted = made.addresses[0].ip.packed
            assert any(is_arp_question(frame, wanted) for frame in frames(made.card.queues[0], 3.0))
            assert select.select([], [connection], [], 0)[1] == [], "somebody has answered"


def arp(mac: str, operation: int, sender: bytes, target: bytes) -> bytes:
    """A frame, padded as Ethernet has it: RFC 826."""
    own = mac_bytes(mac)
    frame = b"\xff" * 6 + own + struct.pack(">HHHBBH", _ARP, 1, 0x0800, 6, 4, operation)
    return (frame + own + sender + bytes(6) + target).ljust(60, b"\0")


def is_arp_question(frame: bytes, target: bytes) -> bool:
    return frame[12:14] == _ARP.to_bytes(2, "big") and frame[20:22] == b"\0\1" and frame[38:42] == target


def is_arp_reply(frame: bytes, sender: bytes) -> bool:
    return frame[12:14] == _ARP.to_bytes(2, "big") and frame[20:22] == b"\0\2" and frame[28:32] == sender


def mac_bytes(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def frames(tap: int, seconds: float) -> Iterator[bytes]:
    """What comes out of a tap for so long."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if select.select([tap], [], [], left)[0]:
            yield os.read(tap, 65536)[_VNET_HEADER:]


# --- Who may, and who may not ---------------------------------------------------------------------------------------

_TRY: Final = """
import sys
from osbuild import network
from osbuild.errors import OsbuilderError
try:
    with network.opened(sys.argv[1]) as made:
        print("made")
except OsbuilderError as problem:
    print(problem.code, problem, "|", problem.hint)
"""


def attempt(kind: str, *before: str) -> str:
    argv = (*before, sys.executable, "-c", _TRY, kind)
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def without(*capabilities: str) -> tuple[str, ...]:
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("taking away capabilities needs root and setpriv (util-linux)")
    return ("setpriv", "--bounding-set=" + ",".join(f"-{name}" for name in capabilities))


@pytest.mark.parametrize("kind", TAPS)
def test_who_may_not_is_told_what_is_missing_and_what_does_without(kind: str) -> None:
    said = attempt(kind, *without("net_admin", "sys_admin"))
    assert said.startswith(f"4 --network {kind} needs CAP_NET_ADMIN and CAP_SYS_ADMIN, which this user does not have |")
    assert "--network user needs nothing" in said


def test_one_that_is_missing_is_named_alone() -> None:
    said = attempt("macvtap", *without("mknod"))
    assert said.startswith("4 --network macvtap needs CAP_MKNOD, which this user does not have |")
    assert said.endswith("; or become root")


@pytest.mark.parametrize("wish", ["nat", "bridge=docker0"])
def test_what_is_made_in_the_hosts_own_network_no_user_namespace_allows(wish: str) -> None:
    said = attempt(wish, *without("net_admin", "sys_admin"))
    assert said.startswith(f"4 --network {wish.partition('=')[0]} needs CAP_NET_ADMIN")
    assert said.endswith("; or become root")


def test_user_needs_no_capability() -> None:
    assert attempt("user", *without("net_admin", "sys_admin", "net_raw", "mknod")) == "made"


@pytest.mark.parametrize("kind", ["tap", "tcfilter", "bridge"])
def test_in_a_user_namespace_the_taps_need_no_root(kind: str) -> None:
    able(kind)
    wrapped = (*without("net_admin", "sys_admin"), "unshare", "--map-root-user")
    if subprocess.run((*wrapped, "true"), capture_output=True, check=False).returncode != 0:
        pytest.skip("this host lets nobody make user namespaces")
    assert attempt(kind, *wrapped) == "made"


def test_that_a_macvtap_does_is_told_in_one_line() -> None:
    able("macvtap")
    wrapped = (*without("net_admin", "sys_admin", "mknod"), "unshare", "--map-root-user")
    if subprocess.run((*wrapped, "true"), capture_output=True, check=False).returncode != 0:
        pytest.skip("this host lets nobody make user namespaces")
    said = attempt("macvtap", *wrapped)
    assert said == "4 a private sysfs cannot be mounted: Operation not permitted | --network tcfilter needs none"


# --- A kill -9 ------------------------------------------------------------------------------------------------------

_HOLD: Final = """
import signal, sys, time
from osbuild import network
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
with network.opened(sys.argv[1]) as made:
    print(*made.namespaces, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_nothing_is_left_of_who_was_killed(tap_kind: str, number: signal.Signals) -> None:
    for _ in range(3):  # a namespace's number is given anew at once, perhaps to one that another test makes
        if not any(map(is_alive, killed(tap_kind, number))):
            return
    pytest.fail("its namespaces live on")


def killed(kind: str, number: signal.Signals) -> list[int]:
    """The namespaces of a process that had a network and was sent a signal; its links are gone from /dev."""
    devices = set(Path("/dev").glob("tap*"))
    argv = (sys.executable, "-c", _HOLD, kind)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        namespaces = [int(word) for word in process.stdout.readline().split()]
        assert namespaces
        assert all(map(is_alive, namespaces))
        process.send_signal(number)
        process.wait(30)
    # Where the host's /dev is the kernel's own, it shows when the link itself has gone, which takes a moment.
    deadline = time.monotonic() + 10
    while (left := set(Path("/dev").glob("tap*")) - devices) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left
    return namespaces


# --- What is left behind --------------------------------------------------------------------------------------------


def made_of(*addresses: str, mac: str = "02:00:00:00:00:01", namespaces: tuple[int, ...] = ()) -> GuestNetwork:
    return GuestNetwork(
        kind="tap", mac=mac, mtu=MTU, addresses=(), gateways=tuple(map(ipaddress.ip_address, addresses)),
        card=User(port=7, service=("10.0.2.100", 7), descriptor=0), namespaces=namespaces,
    )  # fmt: skip


def test_the_hosts_addresses_are_those_that_iproute2_lists() -> None:
    if shutil.which("ip") is None:
        pytest.skip("ip is not installed: apt-get install iproute2")
    rows = json.loads(subprocess.run(("ip", "-j", "address"), capture_output=True, check=True).stdout)
    listed = {one["local"] for row in rows for one in row["addr_info"]}
    assert leftovers.host_addresses() == listed


def test_an_address_that_stays_is_named_unless_it_was_there_before() -> None:
    made = made_of("127.0.0.1", "192.0.2.1")
    assert leftovers.left_behind(made, frozenset()) == ["the address 127.0.0.1"]
    assert leftovers.left_behind(made, frozenset({"127.0.0.1"})) == []


def test_a_link_and_a_namespace_that_stay_are_named() -> None:
    with namespace() as space:
        made = made_of(mac=next(iter(leftovers.hardware_addresses())), namespaces=(space.number,))
        left = leftovers.left_behind(made, frozenset())
        assert left == [f"a link with the address {made.mac}", f"the namespace net:[{space.number}]"]
    assert leftovers.left_behind(dataclasses.replace(made, mac="02:00:00:00:00:01"), frozenset()) == []


# --- The host's half of looking -------------------------------------------------------------------------------------


def test_the_checksum_is_that_of_rfc_1071() -> None:
    assert probe.checksum(bytes.fromhex("0001f203f4f5f6f7")) == ~0xDDF2 & 0xFFFF
    assert probe.checksum(b"\xff") == ~0xFF00 & 0xFFFF


@pytest.mark.parametrize("version", [4, 6])
def test_only_the_answer_to_a_request_is_one(version: int) -> None:
    request = probe.echo_request(version, 7, 1, b"data")
    header = b"\x45" + bytes(19) if version == 4 else b""
    kind = b"\x00" if version == 4 else b"\x81"
    answer = header + kind + request[1:]
    assert probe.is_reply(version, request, answer)
    assert not probe.is_reply(version, request, header + request)
    assert not probe.is_reply(version, request, answer[:-1])
    assert not probe.is_reply(version, request, header + kind + probe.echo_request(version, 7, 2, b"data")[1:])
    assert not probe.is_reply(version, request, b"")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_host_itself_answers_pings_and_gives_back_bytes(address: str) -> None:
    where = ipaddress.ip_address(address)
    with probe.echoing(probe.Loopback()) as port, probe.connect(probe.Loopback(), where, port) as connection:
        assert probe.talk(connection, 300_001) > 0
    if missing_capabilities(CAP_NET_RAW):
        pytest.skip("echo requests need CAP_NET_RAW")
    assert probe.ping(probe.Loopback(), where, count=2, size=1000) > 0


def test_who_hangs_up_in_the_middle_is_told() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(b"\0" * 10)
        theirs.close()
        with pytest.raises(Wrong, match=r"of (\d+) bytes over TCP|after \d+ of \d+ bytes over TCP"):
            probe.talk(ours, 5000)


def test_a_port_where_nobody_listens_is_told() -> None:
    with pytest.raises(Wrong, match=r"no TCP connection to 127\.0\.0\.1 port 1: Connection refused"):
        probe.connect(probe.Loopback(), ipaddress.ip_address("127.0.0.1"), 1)


def test_a_tap_of_a_name_that_is_taken_is_told_in_one_line() -> None:
    able("tap")
    with namespace() as space:
        (first,) = space.do(links.open_tap, "tap0", 1)
        try:
            with pytest.raises(HostError, match="no tap can be made with /dev/net/tun: Device or resource busy"):
                space.do(links.open_tap, "tap0", 1)
        finally:
            os.close(first)


def test_what_the_kernel_refuses_is_told_in_one_line() -> None:
    able("tap")
    with namespace() as space, pytest.raises(HostError, match="the link lo cannot be had: "):
        space.do(links.set_up, "lo", addresses=(ipaddress.ip_interface("127.0.0.1/8"),) * 2)
