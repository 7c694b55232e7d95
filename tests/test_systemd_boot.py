"""Real guests that systemd starts: Debian's, with the agent as its service."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from osbuild import smoke
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.autopsy import console_text
from osbuild.initrd import build_initrd
from osbuild.report import SmokeReport, Verdict
from osbuild.rootfs import assemble_rootfs
from osbuild.runtime.base import Machine
from osbuild.sources.image import SourceImage
from osbuild.spec import RootfsSpec
from tests.agent_container import DEV, PROC, Containers, description, process
from tests.agent_guest import booted
from tests.boot_fixtures import boot_kernel, guests_alive, image_of
from tests.layer_tools import opened

__all__ = ["boot_kernel"]  # a fixture

pytestmark = pytest.mark.boot

DEBIAN = Path.home() / ".cache/osbuilder/images/debian-1"
SECONDS = 120.0  # a busy machine's TCG is slow
MIB = 512  # most of it for an initramfs of some 200

Boot = Callable[..., SmokeReport]


@pytest.fixture(scope="module")
def debian() -> SourceImage:
    if not DEBIAN.is_dir():
        pytest.skip(f"there is no {DEBIAN}: scripts/base-image debian makes it")
    return opened(f"oci:{DEBIAN}")


@pytest.fixture(scope="module")
def rootfs(debian: SourceImage, agent: File) -> Rootfs:
    return assemble_rootfs(debian, agent, epoch=0, wishes=RootfsSpec(init="systemd"))


@pytest.fixture
def boot(boot_kernel: Kernel, tmp_path: Path) -> Boot:
    def run(root: DiskImage | Initrd, rootfs: Rootfs) -> SmokeReport:
        machine = Machine(kernel=boot_kernel, root=root, memory_mib=MIB, accel="tcg", agent=rootfs.agent)
        report = smoke.run(machine, tmp_path / "work", seconds=SECONDS)
        assert guests_alive(tmp_path) == []
        return report

    return run


def dax_image(rootfs: Rootfs, path: Path) -> DiskImage:
    image = image_of(rootfs.tree, path)
    return dataclasses.replace(image, words=(*image.words, *rootfs.words))


def details(report: SmokeReport) -> dict[str, str]:
    return {check.name: check.detail for check in report.checks}


def console_of(report: SmokeReport) -> str:
    return re.sub(r"\\x1b\[[0-9;]*m", "", console_text(report.console))


def complaints(console: str) -> list[str]:
    return re.findall(
        r"^.*(?:\[FAILED\]|\[DEPEND\]|Dependency failed|Failed to start|Main process exited).*$", console, re.M
    )


@pytest.mark.parametrize("slim", [pytest.param(False, marks=pytest.mark.slow), True], ids=["whole", "slim"])
def test_systemd_starts_the_agent_from_a_dax_image(
    slim: bool, debian: SourceImage, agent: File, boot: Boot, tmp_path: Path
) -> None:
    rootfs = assemble_rootfs(debian, agent, epoch=0, wishes=RootfsSpec(init="systemd", slim=slim))
    report = boot(dax_image(rootfs, tmp_path / "rootfs.img"), rootfs)
    assert report.verdict is Verdict.passed, report.reason
    assert details(report)["agent.details"].startswith("a service"), "GetGuestDetails says init_daemon=false"
    assert "dax=always" in details(report)["root"]
    console = console_of(report)
    assert re.search(r"systemd\[1\]: systemd \d+.* running in system mode", console)
    assert re.search(r"Reached target .*A guest that runs containers", console)
    assert "Reached target graphical" not in console
    assert complaints(console) == []
    journal = re.search(r"Started .*Journal Service", console)
    assert (journal is None) == slim


@pytest.mark.slow
def test_systemd_starts_the_agent_from_an_initramfs(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    report = boot(build_initrd(rootfs, tmp_path / "initrd"), rootfs)
    assert report.verdict is Verdict.passed, report.reason
    assert details(report)["agent.details"].startswith("a service")
    assert complaints(console_of(report)) == []


@pytest.mark.slow
def test_the_agent_is_started_when_nobody_names_its_target(rootfs: Rootfs, boot: Boot, tmp_path: Path) -> None:
    # Kata's Go runtime gives an initramfs no systemd.unit=.
    initrd = dataclasses.replace(build_initrd(rootfs, tmp_path / "initrd"), words=())
    report = boot(initrd, rootfs)
    checks = {check.name: check for check in report.checks}
    assert checks["agent.check"].verdict is Verdict.passed, report
    assert checks["agent.details"].detail == "the agent says that it is not PID 1", "the smoke test expected it to be"
    assert re.search(r"Reached target .*A guest that runs containers", console_of(report))


@pytest.mark.slow
def test_a_container_of_the_service_has_limits_and_takes_nobody_with_it_when_it_meets_them(
    debian: SourceImage, agent: File, boot_kernel: Kernel, tmp_path: Path
) -> None:
    rootfs = assemble_rootfs(debian, agent, epoch=0, wishes=RootfsSpec(init="systemd", slim=True))
    image = dax_image(rootfs, tmp_path / "rootfs.img")
    limits = {
        "CPU": {"Shares": 512, "Quota": 50000, "Period": 100000},
        "Memory": {"Limit": 16 << 20, "Swap": 16 << 20},
        "Pids": {"Limit": 20},
    }
    # Controllers that systemd did not hand down have no files to write to; what it takes for its own it kills.
    greedy = process("dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1", Env=["PATH=/bin:/usr/bin"])
    linux = {"Resources": limits, "CgroupsPath": "kubepods-pod1.slice:cri-containerd:greedy"}
    oci = description(Path("/"), greedy, mounts=(PROC, DEV), linux=linux)
    with booted(boot_kernel, image, tmp_path / "work", memory_mib=MIB) as client:
        containers = Containers(client)
        assert containers.run(oci, name="greedy")[0] == 128 + 9
        assert client.call("grpc.AgentService", "GetOOMEvent").container_id == "greedy"
        assert containers.run(description(Path("/"), process("true"), mounts=(PROC, DEV)))[0] == 0
        client.destroy_sandbox()
