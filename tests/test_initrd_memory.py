"""What an initramfs says it needs is enough for the real kernel, and not much more than enough."""

from __future__ import annotations

import dataclasses
import random
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from osbuild import smoke
from osbuild.arch import MIB
from osbuild.artifacts import Initrd, Kernel, Rootfs
from osbuild.errors import SpecError
from osbuild.initrd import COMPRESSIONS, build_initrd
from osbuild.initrd_memory import measure
from osbuild.report import SmokeReport, Verdict
from osbuild.runtime import qemu
from osbuild.runtime.base import Machine
from osbuild.tree import Draft, Entry, Tree, directory, regular, symlink
from tests.boot_fixtures import boot_kernel, boot_rootfs

__all__ = ["boot_kernel", "boot_rootfs"]  # fixtures

SECONDS: Final = 120.0
SILENCE: Final = 20.0  # after which a guest that is too small will not answer any more
# This much of what is stated is too little: where the tmpfs's half of the memory decides, and where all of it does.
TIGHT: Final = 0.85  # it is stated in whole MiB, and 98 of the 106 stated for 10,000 long paths were seen to be enough
LOOSE: Final = 0.75

# Shapes. What fills an initramfs lies in /bulk, before the agent in /sbin: if not all of it fits, the agent is missing.


def one_file(draft: Draft, *, noise: bool, mib: int = 60) -> None:
    draft.put("/bulk", regular(random.Random(1).randbytes(mib * MIB) if noise else bytes(mib * MIB)))


def many_files(draft: Draft, *, count: int, size: int, names: int = 1) -> None:
    for number in range(count):
        entry = regular(number.to_bytes(4, "big") * (size // 4))
        for name in range(names):
            draft.put(f"/bulk/{number // 500}/{number}-{name}", entry)


def deep(draft: Draft, *, count: int) -> None:
    """Directories whose paths are as long as they may be, nearly; the kernel keeps all of these to set their times."""
    above = "/bulk/" + "/".join(["x" * 250] * 14)
    for number in range(count):
        draft.put(f"{above}/{number:0200}", directory(mtime_ns=0))


def a_chain(draft: Draft) -> None:
    draft.put("/bulk" + "/d" * 1900, directory(mtime_ns=0))


def long_links(draft: Draft) -> None:
    for number in range(20_000):
        draft.put(f"/bulk/{number}", symlink("t" * 200))


def like_a_distribution(draft: Draft) -> None:
    chance = random.Random(3)
    for number in range(8000):
        size = int(min(chance.paretovariate(1.0), 300) * 1500)
        name = f"/bulk/package-{number % 150}/a-name-longer-than-a-dentry-has-room-for-{number}"
        draft.put(name, regular(chance.randbytes(size // 2) + bytes(size // 2)))


SHAPES: Final[dict[str, Callable[[Draft], None]]] = {
    "the agent alone": lambda draft: None,
    "noise": lambda draft: one_file(draft, noise=True),
    "a little noise": lambda draft: one_file(draft, noise=True, mib=10),
    "zeros": lambda draft: one_file(draft, noise=False),
    "60,000 empty files": lambda draft: many_files(draft, count=60_000, size=0),
    "60,000 small files": lambda draft: many_files(draft, count=60_000, size=100),
    "20,000 files of two pages": lambda draft: many_files(draft, count=20_000, size=8192),
    "20,000 files with two names": lambda draft: many_files(draft, count=20_000, size=8192, names=2),
    "2,000 files with two names": lambda draft: many_files(draft, count=2000, size=8192, names=2),
    "2,000 long paths": lambda draft: deep(draft, count=2000),
    "10,000 long paths": lambda draft: deep(draft, count=10_000),
    "a chain of directories": a_chain,
    "long symbolic links": long_links,
    "a distribution": like_a_distribution,
}
SMALL: Final = {
    "the agent alone", "a little noise", "20,000 files with two names", "2,000 files with two names",
    "2,000 long paths", "a chain of directories",
}  # fmt: skip
CASES: Final = [
    *((shape, "zstd") for shape in SHAPES),
    *((shape, kind) for shape in ("noise", "zeros", "a distribution") for kind in COMPRESSIONS if kind != "zstd"),
]  # fmt: skip


# To unpack is what is looked at here: containers take more.
ANSWERS = ("agent.version", "agent.details", "root", "nonce", "poweroff")


def build(shape: str, compress: str, rootfs: Rootfs, path: Path) -> Initrd:
    draft = rootfs.tree.edit()
    SHAPES[shape](draft)
    return build_initrd(dataclasses.replace(rootfs, tree=draft.tree()), path, compress=compress)


def boot(kernel: Kernel, root: Initrd, mib: int, work: Path, seconds: float = SECONDS) -> SmokeReport:
    machine = Machine(kernel=kernel, root=root, memory_mib=mib, accel="tcg")
    return smoke.run(machine, work, seconds=seconds, checks=ANSWERS)


@pytest.mark.boot
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("shape", "compress"), CASES)
def test_what_is_stated_is_enough_and_little_less_is_not(
    shape: str, compress: str, boot_kernel: Kernel, boot_rootfs: Rootfs, tmp_path: Path
) -> None:
    root = build(shape, compress, boot_rootfs, tmp_path / "initrd")
    mib = root.memory // MIB
    report = boot(boot_kernel, root, mib, tmp_path / "enough")
    assert report.verdict is Verdict.passed, report.reason
    for share in (LOOSE if shape in SMALL else TIGHT, 0.6):
        with pytest.raises(SpecError, match=f"this initramfs needs {mib} MiB to be unpacked"):
            boot(boot_kernel, root, int(mib * share), tmp_path / "refused")
        liar = dataclasses.replace(root, memory=0)
        report = boot(boot_kernel, liar, int(mib * share), tmp_path / "less", SILENCE)
        assert report.verdict is not Verdict.passed, f"{mib} MiB are stated, and {int(mib * share)} are enough"


@pytest.mark.boot
@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_what_is_stated_is_enough_for_a_small_one(
    compress: str, boot_kernel: Kernel, boot_rootfs: Rootfs, tmp_path: Path
) -> None:
    root = build("a little noise", compress, boot_rootfs, tmp_path / "initrd")
    assert boot(boot_kernel, root, root.memory // MIB, tmp_path / "work").verdict is Verdict.passed


@pytest.mark.boot
def test_more_processors_take_no_more_than_there_is(boot_kernel: Kernel, boot_rootfs: Rootfs, tmp_path: Path) -> None:
    root = build("a little noise", "zstd", boot_rootfs, tmp_path / "initrd")
    machine = Machine(kernel=boot_kernel, root=root, memory_mib=root.memory // MIB, cpus=2, accel="tcg")
    assert smoke.run(machine, tmp_path / "work", seconds=SECONDS, checks=ANSWERS).verdict is Verdict.passed


# The formula


def needed(*entries: Entry, packed: int = 0) -> int:
    tree = Tree({"/": directory()} | {f"/{number}": entry for number, entry in enumerate(entries)})
    return measure(tree, packed=packed).memory


def test_it_is_whole_mebibytes() -> None:
    assert all(needed(regular(bytes(size))) % MIB == 0 for size in (0, 1, 10_000_000))


def test_files_count_twice_and_the_archive_once() -> None:
    none, some = needed(regular(bytes(100 * MIB))), needed(regular(bytes(200 * MIB)))
    assert some - none == pytest.approx(200 * MIB * 2048 / 2011, abs=MIB)
    packed = needed(regular(bytes(100 * MIB)), packed=50 * MIB)
    assert packed - none == pytest.approx(50 * MIB * 2048 / 2011, abs=MIB)


@pytest.mark.parametrize(
    "entry", [regular(b""), regular(b"1"), symlink("t"), symlink("t" * 127), Entry(mode=stat.S_IFIFO)]
)
def test_every_name_takes_an_inode_and_there_is_one_for_two_pages(entry: Entry) -> None:
    assert needed(*[entry] * 50_000) == pytest.approx(50_000 * 8192 * 2048 / 2011, rel=0.1)


def test_a_file_takes_its_pages_once_and_a_link_with_a_long_target_for_each_name() -> None:
    assert measure(Tree({"/": directory(), "/a": regular(b"1" * 4097)}), packed=0).resident == 8192
    file, short, long = regular(b"1"), symlink("t" * 127), symlink("t" * 128)
    for entry, pages in ((file, 1), (short, 0), (long, 2)):
        tree = Tree({"/": directory(), "/a": entry, "/b": entry})
        assert measure(tree, packed=0).resident == pages * 4096


def test_a_file_with_several_names_takes_more_than_files_with_one() -> None:
    files = [regular(bytes(8192)) for _ in range(20_000)]
    assert needed(*files, *files) > needed(*files, *[symlink("t")] * 20_000) + 40 * MIB


def test_the_decompressor_counts_where_the_files_are_few() -> None:
    tree = Tree({"/": directory(), "/a": regular(bytes(MIB))})
    by = {kind: measure(tree, packed=0, compress=kind).memory for kind in COMPRESSIONS}
    assert by["none"] <= by["gzip"] < by["zstd"] < by["lz4"]
    assert by["lz4"] - by["none"] == pytest.approx(17 * MIB, abs=MIB)


def test_sockets_take_nothing() -> None:
    assert needed(*[Entry(mode=stat.S_IFSOCK)] * 50_000) == needed()


def test_the_runtime_refuses_less_before_it_starts_anything(
    tmp_path: Path, boot_kernel: Kernel, boot_rootfs: Rootfs
) -> None:
    root = build("zeros", "zstd", boot_rootfs, tmp_path / "initrd")
    mib = root.memory // MIB
    qemu.refuse_what_cannot_boot(Machine(kernel=boot_kernel, root=root, memory_mib=mib))
    with pytest.raises(SpecError, match=f"needs {mib} MiB to be unpacked; the guest has {mib - 1} MiB") as caught:
        boot(boot_kernel, root, mib - 1, tmp_path / "work")
    assert caught.value.hint == f"--memory {mib}"
    assert not (tmp_path / "work").exists()
