"""Every board boots every root that it can have, and its QEMU is shut in; real guests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import smoke
from osbuild.arch import X86_64
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.checks import poweroff
from osbuild.checks.base import Session
from osbuild.filesystem import ext4
from osbuild.filesystem.base import Room
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.report import Report, SmokeReport, Verdict
from osbuild.runtime import bounds, qemu
from osbuild.runtime.base import Machine
from osbuild.tree import directory, regular
from tests.agent_program import BUSYBOX
from tests.boot_fixtures import (
    boot_kernel,
    boot_rootfs,
    compile_init,
    good_image,
    good_initrd,
    guests_alive,
    image_of,
    initrd_of,
    tree_with_init,
)
from tests.layer_tools import archive, folder, write_layout

__all__ = ["boot_kernel", "boot_rootfs", "compile_init", "good_image", "good_initrd"]  # fixtures

pytestmark = pytest.mark.boot

MIB: Final = 1 << 20
PMEM: Final[dict[str, Any]] = {"attach": "virtio-pmem"}


@pytest.fixture(scope="module")
def large_image(boot_rootfs: Rootfs, tmp_path_factory: pytest.TempPathFactory) -> DiskImage:
    """With a file that huge pages can map."""
    draft = boot_rootfs.tree.edit()
    draft.put("/large", regular(os.urandom(8 * MIB)))
    return image_of(draft.tree(), tmp_path_factory.mktemp("large") / "rootfs.img")


def roots(image: DiskImage, initrd: Initrd) -> dict[str, tuple[DiskImage | Initrd, dict[str, Any], tuple[str, str]]]:
    """Each way that x86_64 has: root, machine, and what the report says."""
    return {
        "nvdimm": (image, {}, ("q35", "nvdimm")),
        "virtio-pmem": (image, PMEM, ("q35", "virtio-pmem")),
        "virtio-blk": (image.as_disk(), {"board": "q35"}, ("q35", "virtio-blk")),
        "initrd on q35": (initrd, {"board": "q35"}, ("q35", "initrd")),
        "virtio-blk on microvm": (image.as_disk(), {"board": "microvm"}, ("microvm", "virtio-blk")),
        "initrd": (initrd, {}, ("microvm", "initrd")),
    }


WAYS: Final = ("nvdimm", "virtio-pmem", "virtio-blk", "initrd on q35", "virtio-blk on microvm", "initrd")
AT_ONCE: Final = ("virtio-pmem", "virtio-blk on microvm")  # the others boot in other tests, too


@pytest.mark.parametrize("way", [pytest.param(way, marks=[] if way in AT_ONCE else [pytest.mark.slow]) for way in WAYS])
def test_a_root_boots_the_way_it_was_attached_and_so_it_does_again(
    way: str, boot_kernel: Kernel, good_image: DiskImage, good_initrd: Initrd, tmp_path: Path
) -> None:
    root, more, said = roots(good_image, good_initrd)[way]
    report = smoke.run(Machine(kernel=boot_kernel, root=root, accel="tcg", **more), tmp_path / "work")
    assert report.verdict is Verdict.passed, report
    assert (report.machine["board"], report.machine["attached"]) == said
    again(report, tmp_path)


@pytest.mark.slow
def test_shares_are_left_out_of_what_repeats_a_boot(boot_kernel: Kernel, good_initrd: Initrd, tmp_path: Path) -> None:
    machine = Machine(kernel=boot_kernel, root=good_initrd, accel="tcg")
    report = smoke.run(machine, tmp_path / "work", checks=("shares",))
    assert any("virtio-9p" in word for word in report.command)
    again(report, tmp_path)


def again(report: SmokeReport, home: Path) -> None:
    """command.txt boots the same kernel and agent, after everything of the run has gone."""
    Report(boots=(report,)).write(home / "report")
    script = home / "report" / report.name / "command.txt"
    with subprocess.Popen(
        ["bash", script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout is not None
            seen = []
            for line in process.stdout:  # to the end of a QEMU that refuses, else the test's own time limit
                seen.append(line)
                if '"msg":"agent started"' in line:
                    break
            assert any("Linux version" in line for line in seen), "".join(seen)
            assert '"msg":"agent started"' in seen[-1], "".join(seen)
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_an_image_through_virtio_pmem_is_mapped_with_dax_to_some_effect(
    boot_kernel: Kernel, large_image: DiskImage, tmp_path: Path
) -> None:
    machine = Machine(kernel=boot_kernel, root=large_image, accel="tcg", **PMEM)
    report = smoke.run(machine, tmp_path, checks=("dax", "root"))
    (dax,) = [check for check in report.checks if check.name == "dax"]
    assert dax.verdict is Verdict.passed, dax
    assert "mapped by huge pages" in dax.detail
    assert "its sha256 is what it was" in dax.detail


def test_a_running_qemu_is_shut_in(
    boot_kernel: Kernel, good_image: DiskImage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the process itself, while its guest runs: no core file, few files, short ones, a filter on every thread."""
    seen: dict[str, Any] = {}

    def look(session: Session, usual: Any = poweroff.look) -> str:
        process = Path(f"/proc/{session.guest.process.pid}")
        seen["limits"] = dict(re.findall(r"^Max (.+?)  +(\S+) ", (process / "limits").read_text(), re.MULTILINE))
        tasks = [(task / "status").read_text() for task in (process / "task").iterdir()]
        seen["seccomp"] = [re.search(r"^Seccomp:\t(\d)$", text, re.MULTILINE)[1] for text in tasks]  # type: ignore[index]
        return str(usual(session))

    monkeypatch.setattr(poweroff, "look", look)
    report = smoke.run(Machine(kernel=boot_kernel, root=good_image, accel="tcg"), tmp_path)
    assert report.verdict is Verdict.passed, report
    assert seen["limits"]["core file size"] == "0"
    assert int(seen["limits"]["open files"]) <= bounds.FILES
    assert seen["limits"]["file size"] == str(bounds.LONGEST)
    assert set(seen["seccomp"]) == {"2"}
    assert report.machine["sandbox"] == "on"


def test_a_guest_that_writes_to_its_disk_without_end_is_ended_and_the_log_says_by_what(
    boot_kernel: Kernel, boot_rootfs: Rootfs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "SNAPSHOT", 24 * MIB)
    if not BUSYBOX.exists():
        pytest.skip("busybox-static is not installed")
    script = b"#!/bin/busybox sh\nwhile :; do busybox dd if=/dev/zero bs=1M count=48 of=/x conv=fsync; done\n"
    draft = tree_with_init(script).edit()
    draft.put("/bin", directory())
    draft.put("/bin/busybox", regular(BUSYBOX.read_bytes(), 0o755))
    plan = ext4.plan(draft.tree(), start=FILESYSTEM_START, epoch=0, room=Room(writable=True, free=64 * MIB), dax=False)
    image = build_nvdimm_image(ext4, plan, tmp_path / "disk.img", name="ext4", header=False, writable=True)
    before = File.of(image.file.path)
    report = smoke.run(Machine(kernel=boot_kernel, root=image, accel="tcg"), tmp_path / "work")
    assert report.cause is not None
    assert (report.verdict, report.cause.name, report.cause.certain) == (Verdict.failed, "disk-flood", True)
    told = r"osbuilder: the guest was ended, for it had written \d+ MiB to its disk: more than 24 MiB"
    assert re.fullmatch(told, report.cause.line)
    assert File.of(image.file.path) == before
    assert guests_alive(tmp_path) == []


@pytest.mark.slow
def test_a_console_that_nobody_watches_has_an_end_too(
    boot_kernel: Kernel, compile_init: Callable[[str], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "LONGEST", MIB)
    root = initrd_of(tree_with_init(compile_init("floods")), tmp_path / "initrd")
    with qemu.start(Machine(kernel=boot_kernel, root=root, accel="tcg"), tmp_path / "work") as guest:
        while guest.console.stat().st_size < MIB:  # the test's own time limit ends it
            assert guest.process.poll() is None
            time.sleep(0.01)
        time.sleep(0.2)
        assert guest.process.poll() is None
        assert guest.console.stat().st_size == MIB


@pytest.mark.slow
def test_the_report_tells_a_restart_from_a_power_off(
    boot_kernel: Kernel, compile_init: Callable[[str], bytes], good_image: DiskImage, tmp_path: Path
) -> None:
    said = {}
    again = initrd_of(tree_with_init(compile_init("restarts")), tmp_path / "initrd")
    guests: dict[str, DiskImage | Initrd] = {"restarts": again, "powers off": good_image}
    for name, root in guests.items():
        report = smoke.run(Machine(kernel=boot_kernel, root=root, accel="tcg"), tmp_path / name)
        events = report.to_dict()["events"]
        said[name] = [event["data"]["reason"] for event in events if event["name"] == "SHUTDOWN"]
    assert said == {"restarts": ["guest-reset"], "powers off": ["guest-shutdown"]}


@pytest.mark.slow
def test_a_qemu_without_seccomp_boots_unconfined_and_that_is_said_where_people_look(
    boot_kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_layout(tmp_path / "layout", [archive(folder("etc"))])
    wrapper = tmp_path / "bin" / X86_64.qemu
    wrapper.parent.mkdir()
    said = f"{X86_64.qemu}: -sandbox on: -sandbox support is not enabled in this QEMU binary"
    wrapper.write_text(
        f'#!/bin/sh\ncase " $* " in *" -sandbox "*) echo "{said}" >&2; exit 1;; esac\n'
        f'exec {shutil.which(X86_64.qemu)} "$@"\n'
    )
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    out = tmp_path / "out"
    argv = ["build", f"oci:{tmp_path}/layout", "-o", str(out), "--make", "initrd", "--accel", "tcg"]
    ended = subprocess.run([sys.executable, "-m", "osbuild", *argv], check=True, capture_output=True, text=True)
    assert "note: this QEMU was built without seccomp: it ran these guests without a sandbox" in ended.stderr
    (boot,) = json.loads((out / "smoke" / "report.json").read_bytes())["boots"]
    assert boot["machine"]["sandbox"] == "off"
    assert "-sandbox" not in boot["command"]
