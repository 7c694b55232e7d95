"""The whole line, on real images: from a layout to guests that boot and answer, as root and as nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from osbuild import smoke
from osbuild.artifacts import File, Initrd, Kernel
from osbuild.cache import default_cache
from osbuild.report import Verdict
from osbuild.runtime.base import Machine
from tests.elsewhere import Elsewhere, give_to_nobody, need_root
from tests.layer_tools import archive, member, write_layout
from tests.test_cli import OSBUILDER, one_line, run

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.boot


@pytest.fixture(scope="session")
def busybox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny image that scripts/base-image makes."""
    if not Path("/usr/bin/busybox").exists():
        pytest.skip("busybox-static is not installed")
    out = tmp_path_factory.mktemp("images") / "busybox"
    environment = os.environ | {"DOCKER_HOST": "unix:///nonexistent"}
    subprocess.run([str(ROOT / "scripts/base-image"), "busybox", str(out)], check=True, env=environment)
    return out


@pytest.fixture(scope="session")
def built(busybox: Path, kernel: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One build of it, with both boots: the directory, and what --json said."""
    out = tmp_path_factory.mktemp("build") / "out"
    done = run("build", f"oci:{busybox}", "-o", str(out), "--json", "--quiet")
    assert done.returncode == 0, done.stderr + done.stdout
    return out, json.loads(done.stdout)


def test_both_guests_boot_and_their_agents_answer(built: tuple[Path, dict[str, Any]]) -> None:
    _, told = built
    assert told["smoke"]["verdict"] == "passed"
    assert {boot["name"]: boot["verdict"] for boot in told["smoke"]["boots"]} == {"image": "passed", "initrd": "passed"}


def test_the_report_says_that_the_root_was_mounted_with_dax(built: tuple[Path, dict[str, Any]]) -> None:
    report = json.loads((built[0] / "smoke/report.json").read_text())
    image = next(boot for boot in report["boots"] if boot["name"] == "image")
    root = next(check for check in image["checks"] if check["name"] == "root")
    assert "dax" in root["detail"]
    assert root["verdict"] == "passed"
    assert (built[0] / "smoke/console.log").stat().st_size > 1000
    assert (built[0] / "smoke/junit.xml").exists()


def test_the_manifest_measures_every_output(built: tuple[Path, dict[str, Any]]) -> None:
    import hashlib

    manifest = json.loads((built[0] / "manifest.json").read_text())
    assert set(manifest["outputs"]) == {"vmlinux", "vmlinuz", "config", "rootfs.img", "initrd.img"}
    for name, said in manifest["outputs"].items():
        data = (built[0] / name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (said["size"], said["sha256"])
    assert json.loads((built[0] / "lock.json").read_text())["image"]["layers"]


def test_compilers_that_the_kernel_does_not_need_leave_no_trace_in_it(built: tuple[Path, dict[str, Any]]) -> None:
    config = (built[0] / "config").read_text()
    assert "CONFIG_RUSTC_VERSION=0\n" in config
    assert "CONFIG_PAHOLE_VERSION=0\n" in config


def test_a_directory_with_a_name_like_ours_is_not_swept(busybox: Path, tmp_path: Path) -> None:
    out = tmp_path / "project"
    (out / "config").mkdir(parents=True)
    (out / "config/app.toml").write_text("precious")
    done = run("build", f"oci:{busybox}", "-o", str(out), "--no-smoke", "--quiet")
    assert done.returncode == 2
    assert "'config'" in one_line(done.stderr)
    assert (out / "config/app.toml").read_text() == "precious"


def test_a_typo_does_not_cost_the_last_build(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(built[0], out)
    assert run("build", "oci:/no/such/layout", "-o", str(out), "--quiet").returncode == 3
    assert run("smoke", str(out), "--quiet").returncode == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [(("--accel", "kvm"), 4), (("--memory", "64", "--make", "initrd"), 2)],
    ids=["no KVM", "too little memory"],
)
def test_a_guest_that_cannot_be_does_not_cost_the_last_build(
    words: tuple[str, ...], code: int, built: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(built[0], out)
    before = sorted(path.name for path in out.iterdir())
    write_layout(tmp_path / "large", [archive(member("noise", os.urandom(40 << 20)))])
    done = run("build", f"oci:{tmp_path}/large", "-o", str(out), "--quiet", *words)
    if "kvm" in words and done.returncode == 0:
        pytest.skip("KVM is of use here")
    assert done.returncode == code, done.stderr
    assert sorted(path.name for path in out.iterdir()) == before
    assert run("smoke", str(out), "--quiet").returncode == 0


def test_a_build_that_never_began_leaves_no_directory(tmp_path: Path) -> None:
    assert run("build", "oci:/no/such/layout", "-o", str(tmp_path / "out"), "--quiet").returncode == 3
    assert not (tmp_path / "out").exists()


def test_cache_and_output_may_be_on_different_file_systems(busybox: Path, kernel: object) -> None:
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK) or shared.stat().st_dev == default_cache().root.stat().st_dev:
        pytest.skip("/dev/shm is no file system of its own here")
    with tempfile.TemporaryDirectory(dir=shared) as name:
        done = run("build", f"oci:{busybox}", "-o", f"{name}/out", "--no-smoke", "--quiet")
        assert done.returncode == 0, done.stderr


def test_an_initramfs_of_60000_files_is_unpacked_whole(kernel: object, tmp_path: Path) -> None:
    files = [member(f"f/{number % 100}/{number}", b"x") for number in range(60_000)]
    write_layout(tmp_path / "many", [archive(*files)])
    words = ("build", f"oci:{tmp_path}/many", "-o", str(tmp_path / "out"), "--make", "initrd", "--json", "--quiet")
    done = run(*words)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "unpacking failed" not in (tmp_path / "out/smoke/console.log").read_text()


def test_an_initramfs_that_lost_its_end_does_not_pass(
    built: tuple[Path, dict[str, Any]], kernel: Kernel, tmp_path: Path
) -> None:
    whole = (built[0] / "initrd.img").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) - 4096])
    root = Initrd(file=File.of(tmp_path / "cut"), compression="zstd", unpacked=8 << 20)
    report = smoke.run(Machine(kernel=kernel, root=root), tmp_path / "work", seconds=30)
    assert report.verdict is Verdict.failed, report


def test_what_was_built_boots_again(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "a dir, with commas"
    shutil.copytree(built[0], out)
    done = run("smoke", str(out), "--json", "--quiet")
    assert done.returncode == 0, done.stderr + done.stdout
    assert json.loads(done.stdout)["verdict"] == "passed"


def test_a_file_that_changed_since_is_not_booted(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(built[0], out)
    with (out / "rootfs.img").open("r+b") as file:
        file.seek(5 << 20)
        was = file.read(1)
        file.seek(5 << 20)
        file.write(bytes([was[0] ^ 1]))
    done = run("smoke", str(out), "--quiet")
    assert done.returncode == 3
    assert "rootfs.img" in one_line(done.stderr)


def test_building_again_gives_the_same_bytes_and_compiles_nothing(
    built: tuple[Path, dict[str, Any]], busybox: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run("build", f"oci:{busybox}", "-o", str(out), "--no-smoke", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["manifest"] == built[1]["manifest"]
    assert told["seconds"]["kernel"] < 60


def test_a_guest_that_answers_nothing_is_exit_code_7(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(built[0], out)
    began = time.monotonic()
    done = run("smoke", str(out), "--timeout", "0.05", "--json", "--quiet")
    assert done.returncode == 7, done.stdout
    assert json.loads(done.stdout)["verdict"] == "unknown"
    assert time.monotonic() - began < 60


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_build_leaves_no_guest_and_no_proof_behind(
    number: signal.Signals, built: tuple[Path, dict[str, Any]], busybox: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [*OSBUILDER, "build", f"oci:{busybox}", "-o", str(out)], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not _guests_of(out) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert _guests_of(out), "the guest was never started"
    process.send_signal(number)
    status = process.wait(20)
    assert status == (-number if number == signal.SIGKILL else 128 + number)
    deadline = time.monotonic() + 5
    while _guests_of(out) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _guests_of(out)
    assert not (out / "manifest.json").exists()
    again = run("build", f"oci:{busybox}", "-o", str(out), "--json", "--quiet")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["manifest"] == built[1]["manifest"]


def test_nobody_without_docker_and_kvm_can_do_it_too(
    built: tuple[Path, dict[str, Any]], busybox: Path, tmp_path: Path
) -> None:
    need_root()
    work = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        there = Elsewhere.at(work)
        # What a shared, read-only cache holds: the finished kernel and agent.
        for kind in ("kernel", "agent"):
            source = default_cache().root / "v1" / kind
            shutil.copytree(source, work / "cache/v1" / kind, ignore=shutil.ignore_patterns("staging-*", "*.bad-*"))
        shutil.copytree(busybox, work / "image")
        give_to_nobody(work)
        words = ("build", f"oci:{work}/image", "-o", f"{work}/out", "--json", "--quiet")
        done = subprocess.run(there.command(*words, work=work), capture_output=True, text=True, check=False, cwd=work)
        assert done.returncode == 0, done.stderr + done.stdout
        told = json.loads(done.stdout)
        assert {boot["verdict"] for boot in told["smoke"]["boots"]} == {"passed"}
        assert told["manifest"] == built[1]["manifest"], "the same bytes, whoever builds"
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _guests_of(out: Path) -> list[str]:
    """Command lines of QEMUs that boot what lies in this directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if line.startswith(("/usr/bin/qemu", "qemu")) and str(out) in line:
                found.append(line)
    return found
