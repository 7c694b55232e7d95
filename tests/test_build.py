"""The whole line, on real images: from a layout to guests that boot and answer, as root and as nobody."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from osbuild import manifest, smoke
from osbuild.artifacts import DiskImage, File, Initrd, Kernel
from osbuild.cache import default_cache
from osbuild.report import Verdict
from osbuild.runtime.base import Machine
from osbuild.tree import Draft, Sparse, Spool, regular
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
    assert "partition 1 ext4" in (built[0] / "smoke/report.html").read_text()


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


@pytest.mark.slow
def test_a_typo_does_not_cost_the_last_build(built: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(built[0], out)
    assert run("build", "oci:/no/such/layout", "-o", str(out), "--quiet").returncode == 3
    assert run("smoke", str(out), "--quiet").returncode == 0


@pytest.mark.slow
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


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("--machine", "virt"), 2), (("--network", "bridge=nosuch0"), 4), (("--check", "wings"), 2),
        (("--check", "hotplug", "--machine", "microvm"), 2),
    ],
)  # fmt: skip
def test_a_guest_that_cannot_be_does_not_cost_the_last_report(
    words: tuple[str, ...], code: int, built: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(built[0], out)
    before = (out / "smoke/report.json").read_bytes()
    done = run("smoke", str(out), "--quiet", *words)
    assert done.returncode == code, done.stderr
    assert (out / "smoke/report.json").read_bytes() == before


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


@pytest.mark.slow
def test_an_initramfs_of_60000_files_is_unpacked_whole(kernel: object, tmp_path: Path) -> None:
    files = [member(f"f/{number % 100}/{number}", b"x") for number in range(60_000)]
    write_layout(tmp_path / "many", [archive(*files)])
    words = ("build", f"oci:{tmp_path}/many", "-o", str(tmp_path / "out"), "--make", "initrd", "--json", "--quiet")
    done = run(*words)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "unpacking failed" not in (tmp_path / "out/smoke/console.log").read_text()


@pytest.mark.slow
def test_an_initramfs_that_lost_its_end_does_not_pass(
    built: tuple[Path, dict[str, Any]], kernel: Kernel, tmp_path: Path
) -> None:
    whole = (built[0] / "initrd.img").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) - 4096])
    root = Initrd(file=File.of(tmp_path / "cut"), compression="zstd", unpacked=8 << 20)
    report = smoke.run(Machine(kernel=kernel, root=root), tmp_path / "work", seconds=30)
    # What is cut off is the agent: the kernel then finds busybox's init, which is silent; but the kernel has said it.
    assert report.verdict is Verdict.failed, report
    assert report.cause is not None
    assert report.cause.name == "initrd-damaged"


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


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(each, marks=pytest.mark.slow) for each in (signal.SIGINT, signal.SIGKILL))],
)
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


@pytest.mark.slow
def test_nobody_without_docker_and_kvm_can_do_it_too(
    built: tuple[Path, dict[str, Any]], busybox: Path, tmp_path: Path
) -> None:
    need_root()
    work = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        there = Elsewhere.at(work)
        # What a shared, read-only cache holds: the finished kernel, agent and probe.
        for kind in ("kernel", "agent", "probe"):
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


# --- With a hash tree -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verified(busybox: Path, kernel: object, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One build with verity, and both its boots."""
    out = tmp_path_factory.mktemp("verified") / "out"
    done = run("build", f"oci:{busybox}", "-o", str(out), "--make", "image", "--verity", "--json", "--quiet")
    assert done.returncode == 0, done.stderr + done.stdout
    return out, json.loads(done.stdout)


def test_with_verity_the_image_is_booted_through_it_too(verified: tuple[Path, dict[str, Any]]) -> None:
    out, told = verified
    assert {boot["name"]: boot["verdict"] for boot in told["smoke"]["boots"]} == {
        "image": "passed",
        "image-verity": "passed",
    }
    report = json.loads((out / "smoke/report.json").read_text())
    roots = {
        boot["name"]: next(check["detail"] for check in boot["checks"] if check["name"] == "root")
        for boot in report["boots"]
    }
    assert "/dev/pmem0p1" in roots["image"]
    assert "dax" in roots["image"]
    assert "/dev/dm-0" in roots["image-verity"]


@pytest.mark.slow
def test_what_was_built_with_verity_boots_again_in_both_ways(verified: tuple[Path, dict[str, Any]]) -> None:
    done = run("smoke", str(verified[0]), "--json", "--quiet")
    assert done.returncode == 0, done.stderr + done.stdout
    assert [boot["name"] for boot in json.loads(done.stdout)["boots"]] == ["image", "image-verity"]


def test_the_manifest_says_what_a_kernel_and_kata_must_be_told(verified: tuple[Path, dict[str, Any]]) -> None:
    out, told = verified
    image = told["manifest"]["outputs"]["rootfs.img"]
    about = image["verity"]
    assert about["params"].startswith(f"root_hash={about['root_hash']},salt={about['salt']},data_blocks=")
    assert about["words"][1] == "root=/dev/dm-0"
    assert about["root_hash"] in about["words"][0]
    assert image["words"][0] == "root=/dev/pmem0p1"
    _, roots, _ = manifest.read(out)
    root = roots["image"]
    assert isinstance(root, DiskImage)
    assert root.verity is not None
    assert root.verity.params == about["params"]


def test_one_changed_bit_fails_the_boot_through_verity_and_no_other(
    verified: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(verified[0], out)
    path = out / "rootfs.img"
    data = bytearray(path.read_bytes())
    data[(3 << 20) + 100] ^= 1  # before the superblock, in its block: nobody but verity cares
    path.write_bytes(data)
    document = json.loads((out / "manifest.json").read_text())
    document["outputs"]["rootfs.img"]["sha256"] = hashlib.sha256(data).hexdigest()
    (out / "manifest.json").write_text(json.dumps(document))
    done = run("smoke", str(out), "--json", "--quiet")
    boots = {boot["name"]: boot for boot in json.loads(done.stdout)["boots"]}
    assert boots["image-verity"]["verdict"] == "failed", boots
    assert "dm-verity" in boots["image-verity"]["reason"]
    assert boots["image"]["verdict"] == "passed", boots
    assert done.returncode == 6


@pytest.mark.slow
def test_a_writable_image_is_booted_as_a_disk_too_and_is_not_changed(
    busybox: Path, kernel: object, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = run("build", f"oci:{busybox}", "-o", str(out), "--make", "image", "--writable", "--json", "--quiet")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads((out / "smoke/report.json").read_text())
    roots = {
        boot["name"]: next(check["detail"] for check in boot["checks"] if check["name"] == "root")
        for boot in report["boots"]
    }
    assert set(roots) == {"image", "image-disk"}
    assert "on /dev/pmem0p1 (ro," in roots["image"]
    assert "on /dev/vda1 (rw," in roots["image-disk"]
    image = json.loads(done.stdout)["manifest"]["outputs"]["rootfs.img"]
    assert image["sha256"] == hashlib.sha256((out / "rootfs.img").read_bytes()).hexdigest()
    assert image["disk_words"][0] == "root=/dev/vda1"
    assert "rw" in image["disk_words"]
    assert "rw" not in image["words"]


# --- Only the image -------------------------------------------------------------------------------------------------


def test_the_image_alone_says_its_verity_parameters(busybox: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.img"
    done = run("image", f"oci:{busybox}", "-o", str(path), "--verity", "--salt", "C0FFEE", "--quiet")
    assert done.returncode == 0, done.stderr
    first, params = done.stdout.splitlines()
    assert first.startswith(f"{path}  ")
    assert re.fullmatch(
        r"root_hash=[0-9a-f]{64},salt=c0ffee,data_blocks=\d+,data_block_size=4096,hash_block_size=4096", params
    )
    done = run("image", f"oci:{busybox}", "-o", str(path), "--verity", "--salt", "c0ffee", "--json", "--quiet")
    assert json.loads(done.stdout)["verity"]["params"] == params
    assert os.listdir(tmp_path) == ["x.img"]


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--verity", "--writable"), 2, "hash tree"),
        (("--salt", "00"), 2, "--salt"),
        (("--size", "4M"), 2, "ext4"),
        (("-o", "/nonexistent/x.img"), 4, "/nonexistent"),
        (("-o", "/dev/full"), 2, "not a regular file"),
    ],
)
def test_an_image_that_cannot_be_is_one_line_and_no_file(
    words: tuple[str, ...], code: int, says: str, busybox: Path, tmp_path: Path
) -> None:
    done = run("image", f"oci:{busybox}", "-o", str(tmp_path / "x.img"), *words, "--quiet")
    assert done.returncode == code, done.stderr
    assert says in one_line(done.stderr)
    assert os.listdir(tmp_path) == []


def test_an_output_that_cannot_be_is_refused_before_the_image_is_opened(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("elsewhere")
    done = run("image", "oci:/no/such/layout", "-o", str(tmp_path / "link"))
    assert done.returncode == 2
    assert "not a regular file" in one_line(done.stderr)


def test_the_help_explains_alignment() -> None:
    text = " ".join(run("image", "--help").stdout.split())
    for word in ("2M", "128M", "1G", "arm64"):
        assert word in text


def test_what_an_image_takes_is_counted_once_and_without_holes() -> None:
    spool = Spool()
    spool.append(b"x" * 5000)
    draft = Draft()
    draft.put("/a", regular(b"y" * 300))
    draft.link("/b", "/a")
    draft.put("/sparse", regular(Sparse(spool, 1 << 40, ((4096, 0, 1000), (1 << 30, 1000, 4000)))))
    assert draft.tree().stored_size() == 5300
