"""Guests of aarch64 on QEMU's virt, emulated: the kernel that kernel-configs/aarch64 gives, and our agent in it."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path
from typing import Any

import pytest

from osbuild import inspection, smoke
from osbuild.agent import INIT, build_agent, install_init, read_agent
from osbuild.arch import AARCH64
from osbuild.artifacts import DiskImage, Initrd, Kernel, Rootfs
from osbuild.cache import default_cache
from osbuild.checks import HOTPLUG, NETWORK
from osbuild.initrd import build_initrd
from osbuild.report import Check, SmokeReport, Verdict
from osbuild.runtime import qemu
from osbuild.runtime.base import Machine
from osbuild.tree import regular
from tests.boot_fixtures import image_of, other_kernel, skeleton
from tests.test_network import able

pytestmark = pytest.mark.boot


@pytest.fixture(scope="module")
def kernel() -> Kernel:
    return other_kernel(AARCH64)


@pytest.fixture(scope="module")
def rootfs() -> Rootfs:
    draft = skeleton()
    found = read_agent(build_agent(AARCH64, default_cache()))
    install_init(draft, found, now=0)
    return Rootfs(tree=draft.tree(), init=INIT, epoch=0, agent=str(found), agent_sha256=found.sha256)


@pytest.fixture(scope="module")
def image(rootfs: Rootfs, tmp_path_factory: pytest.TempPathFactory) -> DiskImage:
    return image_of(rootfs.tree, tmp_path_factory.mktemp("image") / "rootfs.img")


def boot(kernel: Kernel, root: DiskImage | Initrd, work: Path, *, cpus: int = 1) -> SmokeReport:
    machine = Machine(kernel=kernel, root=root, accel="tcg", cpus=cpus)
    return smoke.run(machine, work, seconds=120)


def passed(report: SmokeReport) -> bool:
    if report.verdict is not Verdict.passed:
        pytest.fail(f"{report.reason}\n{report.console.read_text(errors='replace')[-3000:]}")
    return True


def test_an_initramfs_boots_and_its_agent_answers(kernel: Kernel, rootfs: Rootfs, tmp_path: Path) -> None:
    draft = rootfs.tree.edit()
    draft.put("/ballast", regular(random.Random(1).randbytes(20 << 20)))  # so that zstd has several jobs
    initrd = build_initrd(dataclasses.replace(rootfs, tree=draft.tree()), tmp_path / "initrd.img")
    assert passed(boot(kernel, initrd, tmp_path / "work"))


@pytest.mark.slow
def test_two_processors_boot_too(kernel: Kernel, rootfs: Rootfs, tmp_path: Path) -> None:
    initrd = build_initrd(rootfs, tmp_path / "initrd.img")
    assert passed(boot(kernel, initrd, tmp_path / "work", cpus=2))


def test_an_image_boots_as_a_disk(kernel: Kernel, image: DiskImage, tmp_path: Path) -> None:
    assert passed(boot(kernel, image.as_disk(), tmp_path))


def test_an_image_boots_as_an_nvdimm_with_firmware_and_is_mapped(
    kernel: Kernel, image: DiskImage, tmp_path: Path
) -> None:
    if package := qemu.missing_for_nvdimm(AARCH64):
        pytest.skip(f"no firmware: apt-get install {package}")
    report = boot(kernel, image, tmp_path)
    assert passed(report)
    (root,) = [check for check in report.checks if check.name == "root"]
    assert "dax" in root.detail


def looked_at(kernel: Kernel, root: Initrd, work: Path, name: str, **more: Any) -> Check:
    machine = Machine(kernel=kernel, root=root, accel="tcg", **more)
    report = smoke.run(machine, work, checks=(name,), seconds=240)
    assert passed(report)
    (found,) = [check for check in report.checks if check.name == name]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["user", "tap"])
def test_a_guest_speaks_over_its_network_both_ways(kind: str, kernel: Kernel, rootfs: Rootfs, tmp_path: Path) -> None:
    able(kind)
    initrd = build_initrd(rootfs, tmp_path / "initrd.img")
    found = looked_at(kernel, initrd, tmp_path / "work", NETWORK, network=kind)
    assert found.detail.startswith(f"{kind}: eth0 has ")
    assert found.detail.count("by TCP") == (2 if kind == "user" else 4)
    assert found.detail.count("3 of 3 pings") == (1 if kind == "user" else 4)


@pytest.mark.slow
def test_memory_is_plugged_and_taken_away_and_of_processors_it_is_said_why_not(
    kernel: Kernel, rootfs: Rootfs, tmp_path: Path
) -> None:
    """What QEMU 7.2's virt can do: DIMMs through the firmware's ACPI, virtio-mem over PCI, and no processors."""
    if package := qemu.missing_for_nvdimm(AARCH64):
        pytest.skip(f"no firmware: apt-get install {package}")
    initrd = build_initrd(rootfs, tmp_path / "initrd.img")
    found = looked_at(kernel, initrd, tmp_path / "work", HOTPLUG, memory_mib=512)
    dimm, virtio_mem, processors = found.detail.split("; ")
    assert re.match(r"pc-dimm: MemTotal \d+ to \d+ MiB in .*, taken away again in ", dimm)
    assert re.match(r"virtio-mem: MemTotal \d+ to \d+ MiB in ", virtio_mem)
    assert processors == "processors: QEMU's machine for this architecture takes none while it runs"


def test_both_forms_of_the_kernel_say_what_they_are(kernel: Kernel) -> None:
    found = inspection.inspect(kernel.vmlinux.path)
    assert found.whole
    facts = found.facts["kernel"]
    assert (facts["format"], facts["architecture"], facts["release"]) == ("arm64 Image", "aarch64", kernel.release)
    assert kernel.vmlinuz.path.read_bytes()[:2] == b"\x1f\x8b"
    assert kernel.vmlinuz.size < kernel.vmlinux.size // 2
