"""Real guests: the right ones pass, the wrong ones are named, and none outlives what started it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from osbuild import smoke, ttrpc
from osbuild.agent_client import AgentClient
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.report import SmokeReport, Verdict
from osbuild.runtime import qemu
from osbuild.runtime.base import Machine
from osbuild.tree import regular
from tests.boot_fixtures import (
    boot_kernel,
    boot_rootfs,
    compile_init,
    good_image,
    good_initrd,
    guests_alive,
    image_of,
    initrd_of,
    initrd_of_bytes,
    tree_with_init,
)

__all__ = ["boot_kernel", "boot_rootfs", "compile_init", "good_image", "good_initrd"]  # fixtures

pytestmark = pytest.mark.boot

REPOSITORY = Path(__file__).parents[1]
SECONDS = 60.0  # a busy machine's TCG is slow, and what fails must not fail by this

Boot = Callable[..., SmokeReport]


@pytest.fixture
def boot(boot_kernel: Kernel, tmp_path: Path) -> Boot:
    def run(root: DiskImage | Initrd, *, seconds: float = SECONDS, memory_mib: int = 256) -> SmokeReport:
        machine = Machine(kernel=boot_kernel, root=root, memory_mib=memory_mib, accel="tcg")
        report = smoke.run(machine, tmp_path / "work", seconds=seconds)
        assert guests_alive(tmp_path) == []
        return report

    return run


def with_word(image: DiskImage, word: str) -> DiskImage:
    """The image, with another value for one of its words."""
    name = word.partition("=")[0]
    words = tuple(word if old.partition("=")[0] == name else old for old in image.words)
    return dataclasses.replace(image, words=words)


def with_bytes(image: DiskImage, path: Path, change: Callable[[bytes], bytes]) -> DiskImage:
    path.write_bytes(change(image.file.path.read_bytes()))
    return dataclasses.replace(image, file=File.of(path))


def name_of(report: SmokeReport) -> tuple[str, str]:
    return report.verdict, report.cause.name if report.cause else ""


def test_a_dax_image_boots_and_its_root_is_mapped(boot: Boot, good_image: DiskImage) -> None:
    before = File.of(good_image.file.path)
    report = boot(good_image)
    assert report.verdict is Verdict.passed, report
    (root,) = [check for check in report.checks if check.name == "root"]
    assert "/dev/pmem0p1" in root.detail
    assert "dax=always" in root.detail
    assert File.of(good_image.file.path) == before


def test_an_initramfs_boots(boot: Boot, good_initrd: Initrd) -> None:
    report = boot(good_initrd)
    assert report.verdict is Verdict.passed, report
    order = [event.name for event in report.timeline]
    assert order[:4] == ["vmm started", "first output", "kernel", "init"]
    assert {"agent started", "agent answered", "halted"} <= set(order) or "powered off" in order


def test_a_plain_disk_image_boots(boot: Boot, boot_rootfs: Rootfs, tmp_path: Path) -> None:
    assert boot(image_of(boot_rootfs.tree, tmp_path / "disk.img", header=False)).verdict is Verdict.passed


def test_two_processors_boot_too(boot_kernel: Kernel, good_initrd: Initrd, tmp_path: Path) -> None:
    machine = Machine(kernel=boot_kernel, root=good_initrd, cpus=2, accel="tcg")
    assert smoke.run(machine, tmp_path).verdict is Verdict.passed


def test_paths_with_commas_blanks_and_newlines_boot(boot_kernel: Kernel, boot_rootfs: Rootfs, tmp_path: Path) -> None:
    home = tmp_path / "a, b\nc=d"
    home.mkdir()
    machine = Machine(kernel=boot_kernel, root=image_of(boot_rootfs.tree, home / "x,y.img"), accel="tcg")
    assert smoke.run(machine, home / "work").verdict is Verdict.passed


@pytest.mark.parametrize(
    ("word", "cause"),
    [
        ("root=/dev/pmem7p1", "root-missing"),
        ("root=/dev/pmem0p3", "root-missing"),
        ("rootfstype=xfs", "filesystem-unsupported"),
        ("rootflags=nosuchflag", "mount-options"),
    ],
)
def test_a_wrong_kernel_word_is_named_within_a_second_of_the_panic(
    word: str, cause: str, boot: Boot, good_image: DiskImage
) -> None:
    report = boot(with_word(good_image, word))
    assert name_of(report) == ("failed", cause)
    (panic,) = [event for event in report.timeline if event.name == "panic"]
    assert report.seconds - panic.seconds < 1.0


def test_dax_on_a_device_that_has_none_is_named(boot: Boot, boot_rootfs: Rootfs, tmp_path: Path) -> None:
    disk = image_of(boot_rootfs.tree, tmp_path / "disk.img", header=False)
    assert name_of(boot(with_word(disk, "rootflags=dax"))) == ("failed", "dax-unsupported")


@pytest.mark.parametrize(
    "change", [lambda data: data[: -(1 << 20)], lambda data: data + bytes(1 << 20)], ids=["short", "long"]
)
def test_an_image_that_is_not_a_multiple_of_2_mib_is_named(
    change: Callable[[bytes], bytes], boot: Boot, good_image: DiskImage, tmp_path: Path
) -> None:
    report = boot(with_bytes(good_image, tmp_path / "odd.img", change))
    assert name_of(report) == ("failed", "pmem-alignment")


def test_a_damaged_dax_header_is_named(boot: Boot, good_image: DiskImage, tmp_path: Path) -> None:
    def flip(data: bytes) -> bytes:
        return data[:8184] + bytes([data[8184] ^ 1]) + data[8185:]

    assert name_of(boot(with_bytes(good_image, tmp_path / "bad.img", flip))) == ("failed", "dax-unsupported")


@pytest.mark.parametrize(("body", "cause"), [("exits", "init-exited"), ("faults", "init-crashed")])
def test_an_init_that_ends_is_named(
    body: str, cause: str, boot: Boot, compile_init: Callable[[str], bytes], tmp_path: Path
) -> None:
    report = boot(initrd_of(tree_with_init(compile_init(body)), tmp_path / "initrd"))
    assert name_of(report) == ("failed", cause)


def test_a_missing_init_is_named(boot: Boot, boot_rootfs: Rootfs, tmp_path: Path) -> None:
    draft = boot_rootfs.tree.edit()
    draft.remove("/init")
    draft.remove("/sbin/init")
    tree = draft.tree()
    assert name_of(boot(initrd_of(tree, tmp_path / "initrd"))) == ("failed", "init-missing")
    assert name_of(boot(image_of(tree, tmp_path / "img"))) == ("failed", "init-missing")


@pytest.mark.parametrize(
    ("fault", "cause"),
    [("mode", "init-not-executable"), ("architecture", "init-architecture"), ("interpreter", "init-interpreter")],
)
def test_an_init_that_cannot_run_is_named(
    fault: str, cause: str, boot: Boot, compile_init: Callable[[str], bytes], tmp_path: Path
) -> None:
    program = bytearray(compile_init("sleeps"))
    if fault == "architecture":
        program[18] = 183  # e_machine
    if fault == "interpreter":
        program = bytearray(b"#!/nowhere\n")
    tree = tree_with_init(bytes(program), 0o644 if fault == "mode" else 0o755)
    assert name_of(boot(initrd_of(tree, tmp_path / "initrd"))) == ("failed", cause)


def test_a_file_that_is_no_initramfs_is_named(boot: Boot, tmp_path: Path) -> None:
    report = boot(initrd_of_bytes(bytes(range(1, 256)) * 1000, tmp_path / "initrd"))
    assert name_of(report) == ("failed", "initrd-damaged")


def test_a_guest_that_restarts_is_named(boot: Boot, compile_init: Callable[[str], bytes], tmp_path: Path) -> None:
    report = boot(initrd_of(tree_with_init(compile_init("restarts")), tmp_path / "initrd"))
    assert name_of(report) == ("failed", "restarted")


def test_a_file_that_is_no_kernel_is_named(boot_kernel: Kernel, good_initrd: Initrd, tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(bytes(range(256)) * 400)
    kernel = dataclasses.replace(boot_kernel, vmlinux=File.of(tmp_path / "vmlinux"))
    report = smoke.run(Machine(kernel=kernel, root=good_initrd, accel="tcg"), tmp_path / "work")
    assert name_of(report) == ("failed", "vmm-kernel")


def test_too_little_memory_for_an_initramfs_that_hid_its_size_fails(
    boot: Boot, boot_rootfs: Rootfs, tmp_path: Path
) -> None:
    draft = boot_rootfs.tree.edit()
    draft.put("/big", regular(os.urandom(80 << 20)))
    report = boot(initrd_of(draft.tree(), tmp_path / "initrd"), memory_mib=140)  # which says nothing of memory
    assert name_of(report) == ("failed", "initrd-memory")


def test_an_init_that_is_no_agent_is_unknown_at_the_deadline(
    boot: Boot, compile_init: Callable[[str], bytes], tmp_path: Path
) -> None:
    report = boot(initrd_of(tree_with_init(compile_init("sleeps")), tmp_path / "initrd"), seconds=5)
    assert name_of(report) == ("unknown", "agent-absent")
    assert 5 <= report.seconds < 9


def test_escape_codes_of_a_guest_reach_no_report(
    boot: Boot, compile_init: Callable[[str], bytes], tmp_path: Path
) -> None:
    report = boot(initrd_of(tree_with_init(compile_init("says")), tmp_path / "initrd"), seconds=5)
    assert b"\x1b" in report.console.read_bytes()
    assert "\x1b" not in str(report.to_dict())


# --- Nothing is left ------------------------------------------------------------------------------------------------

_RUNNER = """
import pickle, signal, sys
from pathlib import Path
from osbuild import smoke, ttrpc
from osbuild.agent_client import AgentClient
from osbuild.errors import Interrupted
def interrupt(number, frame):
    raise Interrupted(number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, interrupt)
machine = pickle.loads(Path(sys.argv[1]).read_bytes())
smoke.run(machine, Path(sys.argv[2]), seconds=60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_guest_outlives_the_program_that_started_it(
    number: signal.Signals,
    boot_kernel: Kernel,
    compile_init: Callable[[str], bytes],
    tmp_path: Path,
) -> None:
    root = initrd_of(tree_with_init(compile_init("sleeps")), tmp_path / "initrd")
    (tmp_path / "machine").write_bytes(pickle.dumps(Machine(kernel=boot_kernel, root=root, accel="tcg")))
    argv = [sys.executable, "-c", _RUNNER, str(tmp_path / "machine"), str(tmp_path / "work")]
    runs = tempfile.TemporaryDirectory(prefix="t-", dir="/tmp")  # short enough for a socket
    environment = {**os.environ, "XDG_RUNTIME_DIR": runs.name}
    runner = subprocess.Popen(argv, cwd=REPOSITORY, env=environment, stderr=subprocess.DEVNULL)
    console = tmp_path / "work" / "console.log"
    try:
        _wait_for(lambda: console.exists() and console.stat().st_size > 0, 30)
        assert len(guests_alive(tmp_path)) == 1
        runner.send_signal(number)
        began = time.monotonic()
        runner.wait(timeout=10)
        _wait_for(lambda: not guests_alive(tmp_path), 5)
        assert time.monotonic() - began < 5
    finally:
        runner.kill()
        runner.wait()
    with runs:
        left = os.listdir(runs.name)
    assert len(left) == (number is signal.SIGKILL)  # which the next run takes away


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_host_that_pauses_in_mid_frame_is_answered_and_its_payload_never_run(
    boot_kernel: Kernel, good_initrd: Initrd, tmp_path: Path
) -> None:
    """What a suspended host leaves on the serial port; the payload looks like requests to power off."""
    call = ttrpc.Request(service="grpc.AgentService", method="DestroySandbox", payload=b"").encode()
    trap = ttrpc.Frame(stream=1, kind=ttrpc.REQUEST, payload=call).encode() * 20
    # No field of CheckRequest, so it does not decode: any answer will do, as long as it is one.
    question = ttrpc.Request(service="grpc.Health", method="Check", payload=trap).encode()
    frame = ttrpc.Frame(stream=1, kind=ttrpc.REQUEST, payload=question).encode()
    machine = Machine(kernel=boot_kernel, root=good_initrd, accel="tcg")
    with qemu.start(machine, tmp_path / "work") as guest:
        _wait_for(guest.agent.exists, 10)
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as host:
            host.settimeout(SECONDS)
            host.connect(str(guest.agent))
            _wait_for(lambda: b'"listening"' in guest.console.read_bytes(), SECONDS)
            host.sendall(frame[:100])
            time.sleep(1.6)
            host.sendall(frame[100:])
            assert host.recv(4096)[8:9] == b"\x02", "a response"
        assert guest.process.poll() is None
        time.sleep(0.05)
        with ttrpc.connect_unix(guest.agent, 10) as connection:
            assert AgentClient(connection).check()
