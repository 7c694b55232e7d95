"""The checks `network` and `hotplug` in real guests: right ones pass, and what is wrong is noticed."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from osbuild import network, smoke
from osbuild.agent import install_init, read_agent
from osbuild.agent_values import Address, Interface
from osbuild.artifacts import DiskImage, File, Initrd, Kernel
from osbuild.checks import HOTPLUG, NETWORK, hotplug, select
from osbuild.checks import network as check
from osbuild.errors import HostError
from osbuild.findings import Wrong
from osbuild.network import NETWORKS, GuestNetwork, Tap, tap
from osbuild.report import SmokeReport, Verdict
from osbuild.runtime.base import Machine
from osbuild.tree import symlink
from tests.boot_fixtures import boot_kernel, image_of, skeleton

# One test's /dev/tap* would be what another has left behind.
pytestmark = pytest.mark.xdist_group("links")

__all__ = ["boot_kernel"]  # fixtures

MIB = 1 << 20


@pytest.fixture(scope="module")
def plug_image(agent: File, tmp_path_factory: pytest.TempPathFactory) -> DiskImage:
    """Nothing but the agent, in an image that is no multiple of 128 MiB."""
    draft = skeleton()
    draft.put("/var/run", symlink("../run"))
    install_init(draft, read_agent(agent), now=0)
    return image_of(draft.tree(), tmp_path_factory.mktemp("plug") / "rootfs.img")


def boot(kernel: Kernel, root: Initrd | DiskImage, work: Path, *checks: str, **more: Any) -> SmokeReport:
    machine = Machine(kernel=kernel, root=root, accel="tcg", **more)
    return smoke.run(machine, work, checks=checks, seconds=120)


def said(report: SmokeReport, name: str) -> tuple[Verdict, str]:
    (found,) = [check for check in report.checks if check.name == name]
    return found.verdict, found.detail


def able(kind: str) -> None:
    try:
        with network.opened(kind):
            pass
    except HostError as problem:
        pytest.skip(f"{problem}: {problem.hint}")


# --- Which checks there are ---


def test_a_network_that_was_asked_for_is_looked_at(boot_kernel: Kernel, busybox_initrd: Initrd) -> None:
    machine = Machine(kernel=boot_kernel, root=busybox_initrd)
    assert NETWORK not in select((), machine)
    machine = dataclasses.replace(machine, network="tap")
    assert NETWORK in select((), machine)
    assert NETWORK in select(("root",), machine), "who asks for a network wants to see it, whatever else is named"
    assert NETWORK not in select((), dataclasses.replace(machine, network=""))
    assert NETWORK not in select(("agent",), machine), "a walk shares its guest with no container"


def test_who_looks_at_a_network_and_names_none_gets_qemus_own(boot_kernel: Kernel, busybox_initrd: Initrd) -> None:
    machine = Machine(kernel=boot_kernel, root=busybox_initrd)
    assert check.prepare(machine).network == "user"
    assert check.prepare(dataclasses.replace(machine, network="tap")).network == "tap"
    assert hotplug.prepare(machine).pluggable


# --- Networks in guests ---


@pytest.mark.boot
@pytest.mark.parametrize("kind", [name for name in NETWORKS if name != "nat"])
def test_a_guest_speaks_over_its_network_both_ways(
    kind: str, boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path
) -> None:
    able(kind)
    report = boot(boot_kernel, busybox_initrd, tmp_path, NETWORK, network=kind)
    verdict, detail = said(report, NETWORK)
    assert (report.verdict, verdict) == (Verdict.passed, Verdict.passed), detail
    assert said(report, "network.gone")[0] is Verdict.passed
    assert detail.startswith(f"{kind}: eth0 has ")
    assert ("no ping from outside" in detail) is (kind == "user")
    families = 1 if kind == "user" else 2
    assert detail.count("by TCP") == 2 * families
    assert detail.count("3 of 3 pings") == (1 if kind == "user" else 4)
    assert report.machine["network"] == kind


@pytest.mark.boot
def test_a_guest_with_two_processors_has_two_queues(
    boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path
) -> None:
    able("macvtap")
    report = boot(boot_kernel, busybox_initrd, tmp_path, NETWORK, network="macvtap", cpus=2)
    assert report.verdict is Verdict.passed, report.reason
    assert any(word.startswith("tap,id=network,fds=") for word in report.command)


def spoiled(monkeypatch: pytest.MonkeyPatch, **wrong: Any) -> None:
    """A tap of which the guest is told something that is not so."""

    @contextlib.contextmanager
    def opened(queues: int) -> Iterator[GuestNetwork]:
        with tap.opened(queues) as made:
            yield dataclasses.replace(made, **wrong)

    monkeypatch.setattr(network, "NETWORKS", {"tap": SimpleNamespace(CAPABILITIES=(), opened=opened)})


@pytest.mark.boot
@pytest.mark.slow
def test_a_gateway_that_is_not_there_fails_the_check(
    boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    able("tap")
    spoiled(monkeypatch, gateways=(ipaddress.ip_address("192.0.2.9"),))
    report = boot(boot_kernel, busybox_initrd, tmp_path, NETWORK, network="tap")
    verdict, detail = said(report, NETWORK)
    assert verdict is Verdict.failed
    assert "192.0.2.9" in detail
    assert report.verdict.code == 6


@pytest.mark.boot
def test_a_guest_that_sends_more_than_fits_fails_the_check(
    boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    able("tap")
    spoiled(monkeypatch, mtu=1500)  # which the link outside has not
    report = boot(boot_kernel, busybox_initrd, tmp_path, NETWORK, network="tap")
    assert said(report, NETWORK)[0] is Verdict.failed


NET = GuestNetwork(kind="tap", mac="02:00:00:00:00:01", mtu=1400, addresses=(), gateways=(), card=Tap(queues=()))
WANTED = (Address(address="192.0.2.2", prefix=24),)
RIGHT = Interface(name="eth0", mac=NET.mac, mtu=1400, addresses=WANTED)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (dataclasses.replace(RIGHT, name="eth1"), "the link is eth1 with an mtu of 1400, not eth0 with 1400"),
        (dataclasses.replace(RIGHT, mtu=1500), "the link is eth0 with an mtu of 1500, not eth0 with 1400"),
        (dataclasses.replace(RIGHT, addresses=()), "eth0 does not have 192.0.2.2/24"),
    ],
    ids=["name", "mtu", "address"],
)
def test_a_link_that_is_not_what_was_asked_for_is_wrong(found: Interface, reason: str) -> None:
    check.judge_link(RIGHT, NET, WANTED)
    with pytest.raises(Wrong, match=reason):
        check.judge_link(found, NET, WANTED)


class Monitor:
    """One that says the same to every question."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def execute(self, *_: object, **__: object) -> object:
        return self.answer


def test_the_port_into_the_guest_is_the_one_that_qemu_names() -> None:
    table = """Hub -1 (network):
  Protocol[State]    FD  Source Address  Port   Dest. Address  Port RecvQ SendQ
  TCP[HOST_FORWARD]  19       127.0.0.1 41973       10.0.2.15     7     0     0
"""
    assert check.forwarded_port(Monitor(table)) == 41973  # type: ignore[arg-type]
    with pytest.raises(Wrong, match="forwards no port"):
        check.forwarded_port(Monitor(table.replace("HOST_FORWARD", "SYN_SENT")))  # type: ignore[arg-type]


# --- Hot plug ---


@pytest.mark.boot
@pytest.mark.parametrize("kind", ["initrd", "image"])
def test_memory_and_a_processor_come_and_go(
    kind: str, boot_kernel: Kernel, busybox_initrd: Initrd, plug_image: DiskImage, tmp_path: Path
) -> None:
    root = busybox_initrd if kind == "initrd" else plug_image
    report = boot(boot_kernel, root, tmp_path, HOTPLUG, "poweroff")
    verdict, detail = said(report, HOTPLUG)
    assert (report.verdict, verdict) == (Verdict.passed, Verdict.passed), detail
    assert detail.count("taken away again") == 3, detail
    assert "processors: 1 to 2" in detail
    assert ("--align 128M" in detail) is (kind == "image")


@pytest.mark.boot
def test_memory_that_the_guest_does_not_take_fails_the_check(
    boot_kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hotplug, "_SECONDS", 2.0)
    report = boot(boot_kernel, busybox_initrd, tmp_path, HOTPLUG, words=("acpi_no_memhotplug",))
    verdict, detail = said(report, HOTPLUG)
    assert verdict is Verdict.failed
    assert detail.startswith("pc-dimm: 256 MiB were plugged, and after 2 s MemTotal is ")


ROOM = {"memaddr": 4096 * MIB, "size": 0, "max-size": 256 * MIB}  # virtio-mem that has given nothing


@pytest.mark.parametrize(
    ("devices", "place"),
    [
        ([], 0),
        ([{"memaddr": 4096 * MIB, "size": 0, "max-size": 256 * MIB}], 0),
        (
            [{"memaddr": 4096 * MIB, "size": 0, "max-size": 256 * MIB}, {"addr": 4352 * MIB, "size": 8 * MIB}],
            4480 * MIB,
        ),
        ([{"addr": 4096 * MIB, "size": 128 * MIB}], 0),
        ([{"addr": 4096 * MIB, "size": 130 * MIB}], 4352 * MIB),
    ],
    ids=["nothing", "virtio-mem", "and an image", "an aligned image", "an image of 130 MiB"],
)
def test_a_dimm_begins_with_a_block_of_linux(devices: list[dict[str, int]], place: int) -> None:
    rows = [{"type": "any", "data": device} for device in devices]
    found, remark = hotplug.place_for(rows, 128 * MIB)
    assert found == place
    assert bool(remark) is bool(place)
