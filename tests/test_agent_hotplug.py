"""What is plugged in while the guest runs: by files that stand for /sys, and by QEMU's monitor in a real guest."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import ttrpc
from osbuild.agent_client import AGENT, AgentClient
from osbuild.arch import X86_64, host_arch
from osbuild.artifacts import Initrd, Kernel
from tests.agent_guest import booted, contained, inside
from tests.qmp import Pluggable, pluggable

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(host_arch() is not X86_64, reason="the agent is compiled for x86_64 only"),
]

INTERNAL: Final = 13
MIB: Final = 1 << 20
SYSTEM: Final = "/sys/devices/system"


class Plugged:
    """An agent whose /sys/devices/system/{cpu,memory} are directories of ours."""

    def __init__(self, client: AgentClient, process: subprocess.Popen[bytes], home: Path) -> None:
        self.client, self.process, self.home = client, process, home

    def call(self, method: str, /, **fields: Any) -> Any:  # Any: as AgentClient.call
        return self.client.call(AGENT, method, **fields)

    def read(self, name: str) -> str:
        return (self.home / name).read_text()

    def write(self, name: str, text: str) -> None:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def plugged(sanitized_agent: Path, tmp_path: Path) -> Iterator[Plugged]:
    home = tmp_path / "system"
    for kind in ("cpu", "memory"):
        (home / kind).mkdir(parents=True)
    with contained(sanitized_agent, tmp_path / "log") as (client, process):
        for kind in ("cpu", "memory"):
            inside(process, "mount", "--bind", str(home / kind), f"{SYSTEM}/{kind}")
        yield Plugged(client, process, home)


def once(condition: Callable[[], bool], what: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_processors_come_online_as_they_appear(plugged: Plugged) -> None:
    """Of three that are wanted one is offline, and one is not there yet when the call comes."""
    plugged.write("cpu/online", "0\n")
    plugged.write("cpu/cpu1/online", "0\n")
    (plugged.home / "cpu/cpu0").mkdir()  # which cannot be switched

    def kernel() -> None:
        once(lambda: plugged.read("cpu/cpu1/online") == "1\n", "cpu1 did not come online")
        plugged.write("cpu/online", "0-1\n")
        time.sleep(0.2)
        plugged.write("cpu/cpu2/online", "0\n")
        once(lambda: plugged.read("cpu/cpu2/online") == "1\n", "cpu2 did not come online")
        plugged.write("cpu/online", "0,1-2\n")

    thread = threading.Thread(target=kernel)
    thread.start()
    plugged.call("OnlineCPUMem", nb_cpus=3, cpu_only=True)
    thread.join()
    assert plugged.read("cpu/online") == "0,1-2\n"


def test_no_more_processors_come_online_than_are_wanted(plugged: Plugged) -> None:
    plugged.write("cpu/online", "0-1\n")
    plugged.write("cpu/cpu2/online", "0\n")
    plugged.call("OnlineCPUMem", nb_cpus=2, cpu_only=True)
    assert plugged.read("cpu/cpu2/online") == "0\n"


def test_processors_that_do_not_come_are_missed_after_five_seconds(plugged: Plugged) -> None:
    plugged.write("cpu/online", "0-1\n")
    began = time.monotonic()
    with pytest.raises(ttrpc.StatusError, match="2 of 3 processors are online") as refused:
        plugged.call("OnlineCPUMem", nb_cpus=3)
    assert refused.value.code == INTERNAL
    assert 4.5 < time.monotonic() - began < 15


def test_others_are_answered_while_one_waits_for_processors(plugged: Plugged) -> None:
    plugged.write("cpu/online", "0\n")
    failures: list[ttrpc.StatusError] = []

    def wait() -> None:
        try:
            plugged.call("OnlineCPUMem", nb_cpus=2)
        except ttrpc.StatusError as failure:
            failures.append(failure)

    thread = threading.Thread(target=wait)
    thread.start()
    began = time.monotonic()
    for _ in range(20):
        assert plugged.client.check()
    assert time.monotonic() - began < 4
    assert thread.is_alive()
    thread.join()
    assert len(failures) == 1


@pytest.mark.parametrize(("cpu_only", "expected"), [(False, "1\n"), (True, "0\n")], ids=["all", "processors only"])
def test_memory_comes_online_unless_only_processors_are_meant(plugged: Plugged, cpu_only: bool, expected: str) -> None:
    plugged.write("memory/memory33/online", "0\n")
    plugged.write("memory/memory34/online", "1\n")
    plugged.write("memory/power/online", "0\n")
    plugged.call("OnlineCPUMem", cpu_only=cpu_only)
    assert plugged.read("memory/memory33/online") == expected
    assert plugged.read("memory/power/online") == "0\n", "which is no memory block"


def test_memory_is_announced_at_addresses_in_capital_hexadecimal(plugged: Plugged) -> None:
    probe = plugged.home / "memory/probe"
    os.mkfifo(probe)
    reader = os.open(probe, os.O_RDWR | os.O_NONBLOCK)
    try:
        plugged.call("MemHotplugByProbe", memHotplugProbeAddr=[0x1ABCDEF000, 0, 2**64 - 1])
        assert os.read(reader, 4096) == b"0x1ABCDEF0000x00xFFFFFFFFFFFFFFFF"
    finally:
        os.close(reader)


def test_memory_cannot_be_announced_where_there_is_no_probe(plugged: Plugged) -> None:
    with pytest.raises(ttrpc.StatusError, match=r"memory at 0x8000000 in .*probe: No such file") as refused:
        plugged.call("MemHotplugByProbe", memHotplugProbeAddr=[0x8000000])
    assert refused.value.code == INTERNAL


@pytest.mark.parametrize(
    ("words", "least", "most", "warned"),
    # The clock of an emulated guest runs as it likes on a busy host.
    [(("agent.hotplug_timeout=1",), 0.2, 2.0, False), (("agent.hotplug_timeout=0",), 2.0, 20, True)],
    ids=["one second", "no number"],
)
def test_a_device_is_waited_for_as_long_as_the_kernel_was_told(
    kernel: Kernel,
    busybox_initrd: Initrd,
    tmp_path: Path,
    words: tuple[str, ...],
    least: float,
    most: float,
    warned: bool,
) -> None:
    interface = {"name": "eth0", "hwAddr": "02:00:5e:10:00:01", "mtu": 1500, "devicePath": "1e"}
    with booted(kernel, busybox_initrd, tmp_path / "guest", words=words) as client:
        began = time.monotonic()
        with pytest.raises(ttrpc.StatusError, match="waited in vain"):
            client.call(AGENT, "UpdateInterface", interface=interface)
        assert least < time.monotonic() - began < most
    said = "agent.hotplug_timeout is no number" in (tmp_path / "guest" / "console.log").read_text()
    assert said == warned


# --- a real guest, and QEMU's monitor ---


@pytest.fixture(scope="module")
def guest(kernel: Kernel, busybox_initrd: Initrd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pluggable]:
    """Our kernels bring memory online themselves. This one is told not to, as those of others are built."""
    with pluggable(kernel, busybox_initrd, tmp_path_factory.mktemp("plug"), "memhp_default_state=offline") as guest:
        yield guest


def test_memory_that_is_plugged_in_comes_online_by_itself(guest: Pluggable) -> None:
    block = guest.client.guest_details().memory_block_bytes
    assert block > 0, "this kernel cannot plug memory"
    guest.qmp.execute("object-add", {"qom-type": "memory-backend-ram", "id": "m0", "size": 256 * MIB})
    guest.qmp.execute("device_add", {"driver": "pc-dimm", "id": "d0", "memdev": "m0"})

    def online() -> int:
        return len([line for line in guest.log() if line["msg"] == "brought online" and "memory" in line["what"]])

    once(lambda: online() == 256 * MIB // block, "the memory did not come online")


def test_a_processor_that_is_plugged_in_comes_online_when_it_is_wanted(guest: Pluggable) -> None:
    free = [slot for slot in guest.qmp.execute("query-hotpluggable-cpus") if "qom-path" not in slot]
    assert len(free) == 2
    guest.qmp.execute("device_add", {"driver": free[0]["type"], "id": "cpu", **free[0]["props"]})
    guest.client.call(AGENT, "OnlineCPUMem", nb_cpus=2, cpu_only=True)
    with pytest.raises(ttrpc.StatusError, match="2 of 3 processors"):
        guest.client.call(AGENT, "OnlineCPUMem", nb_cpus=3, cpu_only=True)


def test_a_network_device_that_is_plugged_in_is_waited_for_at_its_place_on_pci(guest: Pluggable) -> None:
    """The request comes first, the device half a second later, behind a bridge, as Kata's runtime plugs it."""
    mac = "02:00:5e:10:00:07"
    interface = {
        "name": "pod0",
        "hwAddr": mac,
        "mtu": 1400,
        "devicePath": "08/01",
        "IPAddresses": [{"address": "192.0.2.7", "mask": "24"}],
    }
    guest.qmp.execute("netdev_add", {"type": "user", "id": "n0", "restrict": True})

    def plug() -> None:
        time.sleep(0.5)
        device = {"driver": "virtio-net-pci", "id": "v0", "netdev": "n0", "mac": mac, "bus": "bridge", "addr": "1"}
        guest.qmp.execute("device_add", device)

    thread = threading.Thread(target=plug)
    thread.start()
    guest.client.call(AGENT, "UpdateInterface", interface=interface)
    thread.join()
    listed = {row.name: row for row in guest.client.call(AGENT, "ListInterfaces").Interfaces}
    assert (listed["pod0"].mtu, listed["pod0"].hwAddr.lower()) == (1400, mac)
    assert [row.address for row in listed["pod0"].IPAddresses][:1] == ["192.0.2.7"]
    route = {"dest": "", "gateway": "192.0.2.1", "device": "pod0"}
    routes = guest.client.call(AGENT, "UpdateRoutes", routes={"Routes": [route]}).Routes
    assert ("0.0.0.0", "192.0.2.1") in {(row.dest, row.gateway) for row in routes}
