"""patches/6.12: a guest of arm64 is told through the probe file of memory that nothing else tells it of."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from osbuild import ttrpc
from osbuild.agent import build_agent, install_init, read_agent
from osbuild.agent_client import AGENT, AgentClient
from osbuild.arch import AARCH64, MIB
from osbuild.artifacts import Rootfs
from osbuild.cache import default_cache
from osbuild.errors import HostError
from osbuild.initrd import build_initrd
from tests.agent_guest import booted
from tests.boot_fixtures import other_kernel, skeleton

pytestmark = [
    pytest.mark.boot,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(AARCH64.qemu) is None, reason=f"{AARCH64.qemu} is not installed"),
]

RAM: Final = 0x4000_0000  # where the memory of QEMU's virt begins
BLOCK: Final = 128 * MIB  # arm64's sections with pages of 4 KiB
HIDDEN: Final = RAM + 768 * MIB


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentClient]:
    """A guest whose board has 1024 MiB, and which believes in 256: the rest is as good as plugged in later."""
    home = tmp_path_factory.mktemp("probe")
    kernel = other_kernel(AARCH64)
    try:
        agent = build_agent(AARCH64, default_cache())
    except HostError as problem:
        pytest.skip(f"{problem}: {problem.hint}")
    draft, found = skeleton(), read_agent(agent)
    install_init(draft, found, now=0)
    rootfs = Rootfs(tree=draft.tree(), init="/sbin/init", epoch=0, agent=str(found), agent_sha256=found.sha256)
    initrd = build_initrd(rootfs, home / "initrd.img")
    with booted(kernel, initrd, home / "work", memory_mib=1024, words=("mem=256M",)) as client:
        yield client


def memory(client: AgentClient) -> int:
    for found in text_string_to_metric_families(client.call(AGENT, "GetMetrics").metrics):
        for sample in found.samples:
            if (sample.name, sample.labels) == ("kata_guest_meminfo", {"item": "mem_total"}):
                return int(sample.value)
    raise AssertionError("the agent does not say how much memory there is")


def probe(client: AgentClient, *addresses: int) -> None:
    client.call(AGENT, "MemHotplugByProbe", memHotplugProbeAddr=addresses)


def test_memory_is_there_once_the_agent_has_announced_it(client: AgentClient) -> None:
    before = memory(client)
    assert before < 256 * MIB
    assert client.call(AGENT, "GetGuestDetails", mem_hotplug_probe=True).support_mem_hotplug_probe
    probe(client, HIDDEN)
    assert BLOCK * 0.95 < memory(client) - before <= BLOCK
    probe(client, HIDDEN + 2 * BLOCK)
    assert 2 * BLOCK * 0.95 < memory(client) - before <= 2 * BLOCK, "not next to the other"


@pytest.mark.parametrize(
    ("address", "said"),
    [
        pytest.param(RAM, "File exists", id="there already"),
        pytest.param(HIDDEN + BLOCK + 4096, "Invalid argument", id="no block begins there"),
        pytest.param(0x0800_0000, "too long", id="devices, which the linear map does not reach"),
    ],
)
def test_what_is_no_new_block_is_refused(client: AgentClient, address: int, said: str) -> None:
    before = memory(client)
    with pytest.raises(ttrpc.StatusError, match=said):
        probe(client, address)
    assert memory(client) == before
