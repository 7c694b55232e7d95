"""The walk over every call in guests: the agent is PID 1, and the ways to it are those of the host."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from osbuild import smoke
from osbuild.agent_walk import STEPS
from osbuild.artifacts import DiskImage, File, Initrd, Kernel
from osbuild.filesystem import ext4
from osbuild.initrd import build_initrd
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.report import SmokeReport, Verdict
from osbuild.runtime.base import Machine
from osbuild.runtime.channel import DAEMON
from osbuild.tree import Tree, symlink
from tests.agent_program import BUSYBOX, busybox_root
from tests.boot_fixtures import boot_kernel, boot_rootfs, good_initrd

__all__ = ["boot_kernel", "boot_rootfs", "good_initrd"]  # fixtures

pytestmark = pytest.mark.boot

SECONDS = 60.0

Boot = Callable[..., SmokeReport]


@pytest.fixture(scope="module")
def tree(agent: File) -> Tree:
    """A busybox with the agent, and the link below which it keeps its namespaces (kata-contract 4.3)."""
    if not BUSYBOX.exists():
        pytest.skip("there is no static busybox (apt-get install busybox-static)")
    draft = busybox_root(agent).tree.edit()
    draft.put("/var/run", symlink("../run"))
    return draft.tree()


@pytest.fixture(scope="module")
def image(tree: Tree, tmp_path_factory: pytest.TempPathFactory) -> DiskImage:
    plan = ext4.plan(tree, start=FILESYSTEM_START, epoch=0)
    return build_nvdimm_image(ext4, plan, tmp_path_factory.mktemp("walk") / "rootfs.img", name="ext4")


@pytest.fixture
def boot(boot_kernel: Kernel, tmp_path: Path) -> Boot:
    def run(root: DiskImage | Initrd, *checks: str, transport: str = "serial") -> SmokeReport:
        machine = Machine(kernel=boot_kernel, root=root, accel="tcg", transport=transport)
        return smoke.run(machine, tmp_path / "work", seconds=SECONDS, checks=checks)

    return run


def not_passed(report: SmokeReport) -> list[str]:
    return [f"{call.call}, {call.about}: {call.detail}" for call in report.calls if call.verdict != "passed"]


@pytest.mark.slow
def test_every_call_is_right_in_a_guest_on_a_read_only_dax_image(boot: Boot, image: DiskImage) -> None:
    report = boot(image, "agent")
    assert not_passed(report) == []
    assert report.verdict is Verdict.passed, report.reason
    assert len(report.calls) == sum("no shell" not in step.needs for step in STEPS)


@pytest.mark.slow
def test_every_call_is_right_in_an_initramfs_where_nothing_can_be_pivoted(
    boot: Boot, tree: Tree, tmp_path: Path, agent: File
) -> None:
    root = build_initrd(dataclasses.replace(busybox_root(agent), tree=tree), tmp_path / "initrd.img")
    report = boot(root, "agent")
    assert not_passed(report) == []
    assert report.verdict is Verdict.passed, report.reason


def test_without_a_shell_the_agent_itself_is_the_container(boot: Boot, good_initrd: Initrd) -> None:
    report = boot(good_initrd, "agent")
    assert report.verdict is Verdict.passed, report.reason
    verdicts = {call.about: call.verdict for call in report.calls}
    assert verdicts["the agent as a container"] == "passed"
    assert verdicts["SIGKILL of the agent as a container"] == "passed"
    reasons = {call.detail for call in report.calls if call.verdict == "skipped"}
    assert reasons == {"there is no /bin/sh to look with"}


@pytest.mark.skipif(shutil.which(DAEMON) is None, reason=f"{DAEMON} is not on PATH (cargo install {DAEMON})")
@pytest.mark.parametrize("kind", ["DAX image on q35", "initramfs on microvm"])
def test_the_agent_answers_on_vsock_port_1024(kind: str, boot: Boot, image: DiskImage, good_initrd: Initrd) -> None:
    report = boot(image if "image" in kind else good_initrd, transport="vhost-user-vsock")
    assert report.verdict is Verdict.passed, report.reason
    assert report.machine["transport"] == "vhost-user-vsock"
