"""The hash tree: veritysetup agrees with every byte of it, and the kernel refuses every other."""

from __future__ import annotations

import os
import subprocess
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild import command, smoke, verity
from osbuild.artifacts import DiskImage, File, Kernel, Rootfs
from osbuild.errors import InputError, SpecError
from osbuild.filesystem import FILESYSTEMS
from osbuild.nvdimm_image import FILESYSTEM_START, MIB, build_nvdimm_image
from osbuild.report import SmokeReport, Verdict
from osbuild.runtime.base import Machine
from osbuild.verity import BLOCK, hash_tree, tree_size
from tests.boot_fixtures import boot_kernel, boot_rootfs

__all__ = ["boot_kernel", "boot_rootfs"]  # fixtures

SALT = bytes(range(32))


def veritysetup(
    action: str, data: Path, tree: Path, *words: str, salt: bytes = SALT
) -> subprocess.CompletedProcess[str]:
    argv = [
        command.find("veritysetup"),
        action,
        "--no-superblock",
        f"--salt={salt.hex()}",
        str(data),
        str(tree),
        *words,
    ]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


def hashed(data: Path, tree: Path, *, salt: bytes = SALT) -> str:
    """The tree of a whole file in a file of its own; gives the root hash."""
    with data.open("rb") as source, tree.open("w+b") as target:
        size = data.stat().st_size
        target.truncate(tree_size(size))
        return hash_tree(source.fileno(), 0, size, salt, target.fileno(), 0).hex()


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (was,) = file.read(1)
        file.seek(offset)
        file.write(bytes([was ^ 1]))


# --- digests that are known already ---


RUNS = st.lists(st.tuples(st.integers(0, 1100), st.integers(1, 700)), max_size=6)


@given(blocks=st.integers(1, 1100), runs=RUNS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tree_with_digests_of_another_is_the_same_tree(
    blocks: int, runs: list[tuple[int, int]], tmp_path: Path
) -> None:
    data, other, mixed = (tmp_path / name for name in ("data", "other", "mixed"))
    data.write_bytes(b"".join(number.to_bytes(4, "little") * (BLOCK // 4) for number in range(blocks)))
    expected = hashed(data, other)
    level = verity.first_level(blocks * BLOCK)
    kept, at = [], 0
    for start, length in sorted(runs):
        begin, end = max(start, at), min(start + length, blocks)
        if begin < end and level is not None:
            kept.append((begin * BLOCK, (end - begin) * BLOCK, level + begin * verity.DIGEST))
            at = end
    damaged = bytearray(data.read_bytes())  # nobody reads what is known
    for offset, size, _ in kept:
        damaged[offset : offset + size] = bytes(size)
    data.write_bytes(damaged)
    with data.open("rb") as source, other.open("rb") as old, mixed.open("w+b") as target:
        target.truncate(tree_size(blocks * BLOCK))
        known = verity.Known(old.fileno(), kept)
        root = hash_tree(source.fileno(), 0, blocks * BLOCK, SALT, target.fileno(), 0, known)
    assert root.hex() == expected
    assert mixed.read_bytes() == other.read_bytes()


# --- veritysetup ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [2, 127, 128, 129, 255, 256, 257, 300, 128 * 128, 128 * 128 + 1, 40_000])
def test_the_tree_and_the_root_hash_are_those_of_veritysetup(blocks: int, tmp_path: Path) -> None:
    data, ours, theirs = tmp_path / "data", tmp_path / "ours", tmp_path / "theirs"
    data.write_bytes(os.urandom(min(blocks, 700) * BLOCK))
    os.truncate(data, blocks * BLOCK)
    root = hashed(data, ours)
    told = veritysetup("format", data, theirs)
    assert f"Root hash:      \t{root}" in told.stdout
    assert ours.read_bytes() == theirs.read_bytes()
    assert veritysetup("verify", data, ours, root).returncode == 0


def test_a_single_block_is_its_own_tree(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(os.urandom(BLOCK))
    root = hashed(data, tmp_path / "ours")
    assert tree_size(BLOCK) == 0
    assert root in veritysetup("format", data, tmp_path / "theirs").stdout


@pytest.mark.parametrize("salt", [b"\0", b"ab" * 8, bytes(verity.SALT_MAX)], ids=lambda salt: f"{len(salt)} bytes")
def test_salts_of_other_lengths_give_veritysetups_root_hash(salt: bytes, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.write_bytes(os.urandom(300 * BLOCK))
    assert hashed(data, tmp_path / "tree", salt=salt) in veritysetup("format", data, tmp_path / "x", salt=salt).stdout


def test_veritysetup_finds_a_changed_byte_in_the_data_and_in_the_tree(tmp_path: Path) -> None:
    data, tree = tmp_path / "data", tmp_path / "tree"
    data.write_bytes(os.urandom(300 * BLOCK))
    root = hashed(data, tree)
    for path in (data, tree):
        flip(path, path.stat().st_size // 2)
        assert veritysetup("verify", data, tree, root).returncode != 0
        flip(path, path.stat().st_size // 2)
    assert veritysetup("verify", data, tree, root).returncode == 0


# --- Holes and memory -----------------------------------------------------------------------------------------------


def bytes_read() -> int:
    (line,) = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
    return int(line.split()[1])


def test_holes_have_the_hash_of_zeros_and_are_not_read(tmp_path: Path) -> None:
    data, tree = tmp_path / "data", tmp_path / "tree"
    with data.open("wb") as file:
        file.truncate(256 * MIB)
        os.pwrite(file.fileno(), os.urandom(3 * MIB), 100 * MIB + 12345)
        os.pwrite(file.fileno(), b"end", 256 * MIB - 3)
    before = bytes_read()
    root = hashed(data, tree)
    assert bytes_read() - before < 16 * MIB
    assert veritysetup("verify", data, tree, root).returncode == 0


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    peaks = []
    for size in (8 * MIB, 64 * MIB):
        (tmp_path / "data").write_bytes(os.urandom(MIB) * (size // MIB))
        tracemalloc.start()
        hashed(tmp_path / "data", tmp_path / "tree")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 4 * MIB
    assert peaks[1] < peaks[0] * 1.1


# --- What is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 100, BLOCK + 1])
def test_what_is_no_whole_block_is_refused(size: int, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(size))
    with pytest.raises(InputError, match="blocks of 4096 bytes"):
        hashed(tmp_path / "data", tmp_path / "tree")


def test_data_that_ends_too_early_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(bytes(3 * BLOCK))
    with (tmp_path / "data").open("r+b") as file, pytest.raises(InputError, match="became shorter"):
        hash_tree(file.fileno(), 0, 9 * BLOCK, SALT, file.fileno(), MIB)


@pytest.mark.parametrize("text", ["", "abc", "zz", "0x12", "ab cd", "ab" * (verity.SALT_MAX + 1), "é1"])
def test_a_salt_that_is_no_hex_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="no salt"):
        verity.parse_salt(text)


def test_salts_are_read_in_capitals_too() -> None:
    assert verity.parse_salt("00FFab") == b"\0\xff\xab"


# --- Real boots -----------------------------------------------------------------------------------------------------

Boot = Callable[[DiskImage], SmokeReport]


@pytest.fixture
def boot(boot_kernel: Kernel, tmp_path: Path) -> Boot:
    def run(root: DiskImage) -> SmokeReport:
        machine = Machine(kernel=boot_kernel, root=root, accel="tcg")
        return smoke.run(machine, tmp_path / "work", seconds=60)

    return run


def image(
    rootfs: Rootfs, path: Path, *, kind: str = "ext4", header: bool = True, file_format: str = "raw"
) -> DiskImage:
    filesystem = FILESYSTEMS[kind]
    plan = filesystem.plan(rootfs.tree, start=FILESYSTEM_START, epoch=0, dax=header)
    return build_nvdimm_image(filesystem, plan, path, name=kind, hashed=True, header=header, file_format=file_format)


def root_of(report: SmokeReport) -> str:
    return next(check.detail for check in report.checks if check.name == "root")


@pytest.mark.boot
@pytest.mark.parametrize("kind", ["ext4", "erofs"])
@pytest.mark.parametrize("pmem", [False, True], ids=["disk", "nvdimm"])
def test_a_root_behind_verity_boots(kind: str, pmem: bool, boot: Boot, boot_rootfs: Rootfs, tmp_path: Path) -> None:
    made = image(boot_rootfs, tmp_path / "img", kind=kind)
    report = boot(made.through_verity(pmem=pmem))
    assert report.verdict is Verdict.passed, report
    assert root_of(report).startswith(f"{kind} on /dev/dm-0 (")
    assert ("-device nvdimm" in " ".join(report.command)) is pmem
    assert File.of(made.file.path) == made.file


@pytest.mark.boot
@pytest.mark.parametrize("file_format", ["raw", pytest.param("qcow2", marks=pytest.mark.slow)])
def test_a_plain_disk_boots_with_and_without_verity(
    file_format: str, boot: Boot, boot_rootfs: Rootfs, tmp_path: Path
) -> None:
    made = image(boot_rootfs, tmp_path / "img", header=False, file_format=file_format)
    assert root_of(boot(made)).startswith("ext4 on /dev/vda1 (ro,")
    assert root_of(boot(made.through_verity())).startswith("ext4 on /dev/dm-0 (ro,")


@pytest.mark.boot
@pytest.mark.parametrize("what", ["the filesystem", "the agent", "the tree", "the root hash"])
def test_one_changed_bit_fails_the_boot_through_verity_and_is_named(
    what: str, boot: Boot, boot_rootfs: Rootfs, tmp_path: Path
) -> None:
    made = image(boot_rootfs, tmp_path / "img")
    path, root = made.file.path, made.through_verity()
    if what == "the root hash":
        assert made.verity is not None
        wrong = f"{int(made.verity.root_hash[0], 16) ^ 1:x}{made.verity.root_hash[1:]}"
        words = tuple(word.replace(made.verity.root_hash, wrong) for word in root.words)
        root = DiskImage(file=made.file, filesystem="ext4", dax=False, words=words)
    elif what == "the agent":
        flip(path, path.read_bytes().index(b"\x7fELF", 3 * MIB) + 0x1000)
    else:
        flip(path, 3 * MIB + 1024 + 0x400 - 1 if what == "the filesystem" else tree_start(path))
    report = boot(root)
    assert report.verdict is Verdict.failed
    assert report.cause is not None
    assert report.cause.name == "verity", report.cause
    assert "dm-verity" in report.reason


def tree_start(path: Path) -> int:
    """Where the second partition starts."""
    return int.from_bytes(path.read_bytes()[446 + 16 + 8 : 446 + 16 + 12], "little") * 512


@pytest.mark.boot
def test_a_writable_disk_is_mounted_so_and_the_file_stays_what_it_is(
    boot: Boot, boot_rootfs: Rootfs, tmp_path: Path
) -> None:
    filesystem = FILESYSTEMS["ext4"]
    plan = filesystem.plan(boot_rootfs.tree, start=FILESYSTEM_START, epoch=0, dax=False)
    made = build_nvdimm_image(filesystem, plan, tmp_path / "img", name="ext4", header=False, writable=True)
    report = boot(made)
    assert report.verdict is Verdict.passed, report
    assert root_of(report).startswith("ext4 on /dev/vda1 (rw,")
    assert File.of(made.file.path) == made.file
