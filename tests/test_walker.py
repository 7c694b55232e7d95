"""What the kernel sees of what our writers write, beside the tree it came from: every path, every field."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
from _pytest.mark import ParameterSet

from osbuild.arch import X86_64
from osbuild.artifacts import File, Initrd, Kernel, Rootfs
from osbuild.filesystem import FILESYSTEMS
from osbuild.initrd import COMPRESSIONS, build_initrd
from osbuild.nvdimm_image import DATA_OFFSET, FILESYSTEM_START, build_nvdimm_image, pfn_superblock
from osbuild.rootfs import assemble_rootfs
from osbuild.runtime.base import Machine
from osbuild.spec import RootfsSpec
from osbuild.tree import Bytes, Draft, Entry, Tree, regular
from tests.boot_fixtures import boot_kernel, other_kernel
from tests.layer_tools import opened
from tests.random_trees import forest, random_tree
from tests.test_xfs import every_kind
from tests.walker import _ALARM, _CALM, HOME, Job, Keeps, Walk, differences, machine_of, walk, walk_initrd, walker

__all__ = ["boot_kernel", "walker"]  # fixtures

pytestmark = pytest.mark.boot

EPOCH: Final = 1_700_000_000
DEBIAN: Final = Path.home() / ".cache/osbuilder/images/debian-1"
TREES: Final = 1000
LONG: Final = 1700  # seconds for all of them: where eleven processes shared two processors, 240 sufficed for 330

# What each filesystem cannot keep, by its own documentation; all else must come back as it went in.
KEEPS: Final = {
    "ext4": Keeps(first=-(1 << 31), last=(1 << 34) - (1 << 31) - 1, untimed=EPOCH),
    "erofs": Keeps(untimed=EPOCH, holes=2 << 20, seeks=False),  # Linux 6.12 calls all of an erofs file data
    "xfs": Keeps(first=-(1 << 31), untimed=EPOCH, holes=0),
}
MAGIC: Final = {"ext4": 0xEF53, "erofs": 0xE0F5E1E2, "xfs": 0x58465342}


@pytest.fixture(scope="module")
def woods() -> Tree:
    return forest(range(40))


@pytest.fixture(scope="module")
def debian(agent: File) -> Rootfs:
    if not DEBIAN.is_dir():
        pytest.skip(f"there is no {DEBIAN}: scripts/base-image debian makes it")
    return assemble_rootfs(opened(f"oci:{DEBIAN}"), agent, epoch=0, wishes=RootfsSpec(init="systemd"))


def options_of(kind: str, *, dax: bool) -> str:
    """What Kata mounts it with."""
    flags = [word for word in FILESYSTEMS[kind].mount_words(dax=dax) if word.startswith("rootflags=")]
    return flags[0].removeprefix("rootflags=") if flags else "-"


def walk_image(
    kernel: Kernel, program: bytes, tree: Tree, kind: str, view: str, work: Path, *, memory_mib: int = 256
) -> Walk:
    """An image of a tree, in a guest that has it as `view`."""
    image, dax = work / "image", view in ("nvdimm", "virtio-pmem")
    plan = FILESYSTEMS[kind].plan(tree, start=FILESYSTEM_START, epoch=EPOCH, dax=view != "plain")
    build_nvdimm_image(FILESYSTEMS[kind], plan, image, name=kind, header=view != "plain")
    job = Job(device="pmem0p1" if dax else "vda1", type=kind, options=options_of(kind, dax=dax))
    machine = machine_of(kernel, image, dax=dax, memory_mib=memory_mib)
    return walk(machine, [job], program, work, pmem=view)[0]


def complain(found: Sequence[str]) -> None:
    assert not found, f"{len(found)} differences:\n" + "\n".join(found[:20])


def _slow_but(quick: str, names: Iterable[str]) -> list[ParameterSet]:
    """Each of these guests takes some fifteen seconds."""
    return [pytest.param(name, marks=[] if name == quick else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("view", _slow_but("nvdimm", ["nvdimm", "virtio-pmem", "virtio-blk", "plain"]))
@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_the_kernel_sees_the_tree_that_was_written(
    kind: str, view: str, boot_kernel: Kernel, walker: bytes, woods: Tree, tmp_path: Path
) -> None:
    found = walk_image(boot_kernel, walker, woods, kind, view, tmp_path)
    dax = view in ("nvdimm", "virtio-pmem")
    complain(differences(woods, found, replace(KEEPS[kind], dax=dax)))
    assert " ro," in found.mounted
    assert found.facts["type"] == MAGIC[kind]
    assert found.facts["block"] == 4096
    assert found.facts["name"] == 255


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_the_kernel_sees_all_of_debian(
    kind: str, boot_kernel: Kernel, walker: bytes, debian: Rootfs, tmp_path: Path
) -> None:
    found = walk_image(boot_kernel, walker, debian.tree, kind, "nvdimm", tmp_path)
    assert len(found.paths) > 3000
    complain(differences(debian.tree, found, replace(KEEPS[kind], dax=True)))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # the first time it compiles a kernel
@pytest.mark.parametrize("view", ["nvdimm", "plain"])
def test_the_kernel_sees_the_tree_in_an_xfs(view: str, boot_kernel: Kernel, walker: bytes, tmp_path: Path) -> None:
    del boot_kernel  # it knows no XFS; but where it can be had, so can the other
    kernel = other_kernel(X86_64, "xfs")
    tree = every_kind()
    found = walk_image(kernel, walker, tree, "xfs", view, tmp_path)
    complain(differences(tree, found, replace(KEEPS["xfs"], dax=view == "nvdimm")))
    assert found.facts["type"] == MAGIC["xfs"]


# Initramfs


def unpacked(kernel: Kernel) -> Keeps:
    """What the kernel makes of a cpio archive: no attributes, no holes, whole seconds without a sign, links of its own.

    Times are there only if the kernel was told to keep them, and symbolic links never share an inode.
    """
    times = "CONFIG_INITRAMFS_PRESERVE_MTIME=y\n" in kernel.config.path.read_text()
    return Keeps(
        first=0, last=(1 << 32) - 1, times=times, nanoseconds=False, xattrs=False, holes=0, extents=False,
        linked_symlinks=False,
        given=("/dev", "/dev/console", "/root", HOME),  # the first three are in every kernel's own archive
    )  # fmt: skip


def guest_of(kernel: Kernel, rootfs: Rootfs, work: Path, compress: str, memory_mib: int) -> Machine:
    initrd: Initrd = build_initrd(rootfs, work / "initrd", compress=compress)
    return Machine(kernel=kernel, root=initrd, memory_mib=memory_mib)


@pytest.mark.slow
@pytest.mark.parametrize("compress", _slow_but("zstd", COMPRESSIONS))
def test_the_kernel_unpacks_the_tree_that_was_packed(
    compress: str, boot_kernel: Kernel, walker: bytes, woods: Tree, tmp_path: Path
) -> None:
    guest = guest_of(boot_kernel, Rootfs(tree=woods, init="/init", epoch=0), tmp_path, compress, 512)
    complain(differences(woods, walk_initrd(guest, woods, walker, tmp_path), unpacked(boot_kernel)))


@pytest.mark.slow
def test_the_kernel_unpacks_all_of_debian(boot_kernel: Kernel, walker: bytes, debian: Rootfs, tmp_path: Path) -> None:
    guest = guest_of(boot_kernel, debian, tmp_path, "zstd", 1024)
    complain(differences(debian.tree, walk_initrd(guest, debian.tree, walker, tmp_path), unpacked(boot_kernel)))


@pytest.mark.slow
@pytest.mark.timeout(LONG + 100)
def test_the_kernel_unpacks_a_thousand_trees(boot_kernel: Kernel, walker: bytes, tmp_path: Path) -> None:
    tree = forest(range(TREES))
    guest = guest_of(boot_kernel, Rootfs(tree=tree, init="/init", epoch=0), tmp_path, "zstd", 2048)
    complain(differences(tree, walk_initrd(guest, tree, walker, tmp_path, seconds=LONG), unpacked(boot_kernel)))


# A thousand filesystems


def pack(kind: str, trees: Sequence[Tree], path: Path) -> list[tuple[int, int]]:
    """All of them in one file that is a DAX namespace and a disk; where each begins in the namespace, and its size."""
    places = []
    at = FILESYSTEM_START
    with path.open("wb") as file:
        os.pwrite(file.fileno(), pfn_superblock(), 4096)
        for tree in trees:
            plan = FILESYSTEMS[kind].plan(tree, start=at, epoch=EPOCH)
            file.truncate(DATA_OFFSET + at + plan.size)
            plan.write(file.fileno(), DATA_OFFSET + at)
            places.append((at, plan.size))
            at += plan.size + 4096 * (len(places) % 3)  # not all on boundaries, not all next to each other
        file.truncate(DATA_OFFSET + at + -at % DATA_OFFSET)
    return places


@pytest.mark.timeout(LONG + 100)
@pytest.mark.parametrize(
    "dax",
    [
        pytest.param(True, id="nvdimm", marks=pytest.mark.slow),
        pytest.param(False, id="virtio-blk", marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_no_writers_bug_survives_a_thousand_trees(
    kind: str, dax: bool, boot_kernel: Kernel, walker: bytes, tmp_path: Path
) -> None:
    trees = [random_tree(seed) for seed in range(TREES)]
    image = tmp_path / "image"
    places = pack(kind, trees, image)
    device, shift = ("pmem0", 0) if dax else ("vda", DATA_OFFSET)
    options = options_of(kind, dax=dax)
    jobs = [Job(device=device, type=kind, options=options, start=shift + at, size=size) for at, size in places]
    walks = walk(machine_of(boot_kernel, image, dax=dax, memory_mib=512), jobs, walker, tmp_path, seconds=LONG)
    found = []
    for seed, (tree, seen, (at, size)) in enumerate(zip(trees, walks, places, strict=True)):
        different = differences(tree, seen, replace(KEEPS[kind], dax=dax))
        if different:
            kept = tmp_path / f"{kind}-{seed}.img"
            with image.open("rb") as file:
                kept.write_bytes(os.pread(file.fileno(), size, DATA_OFFSET + at))
            found += [(len(tree), f"random_tree({seed}), {kept}: {difference}") for difference in different]
    image.unlink()
    complain([told for _, told in sorted(found)])


# The walker itself


@pytest.fixture(scope="module")
def small() -> Tree:
    """A tree in which every field of a path has something to say."""
    draft = Draft()
    draft.put("/file", Entry(mode=stat.S_IFREG | 0o644, uid=7, gid=8, mtime_ns=9, content=Bytes(b"hello")))
    draft.put("/twin", regular(b"hello"))
    draft.put("/link", Entry(mode=stat.S_IFLNK | 0o777, mtime_ns=0, target="file"))
    draft.put("/node", Entry(mode=stat.S_IFCHR | 0o600, mtime_ns=0, major=5, minor=6))
    draft.put("/marked", replace(regular(b""), xattrs={"user.a": b"1", "user.empty": b""}))
    draft.put("/sub/within", regular(b""))
    draft.link("/again", "/file")
    return draft.tree()


@pytest.fixture(scope="module")
def small_walks(
    boot_kernel: Kernel, walker: bytes, small: Tree, tmp_path_factory: pytest.TempPathFactory
) -> list[Walk]:
    """What was seen of it; and of something that cannot be mounted."""
    work = tmp_path_factory.mktemp("small")
    plan = FILESYSTEMS["ext4"].plan(small, start=FILESYSTEM_START, epoch=EPOCH)
    build_nvdimm_image(FILESYSTEMS["ext4"], plan, work / "image", name="ext4", header=False)
    jobs = [Job(device="vda1", type="ext4"), Job(device="vda", type="erofs"), Job(device="vda1", type="ext4")]
    return walk(machine_of(boot_kernel, work / "image", dax=False), jobs, walker, work)


def changed(path: str, **fields: object) -> Callable[[Tree], Tree]:
    def change(tree: Tree) -> Tree:
        known = tree[path]
        made = replace(known, **fields)  # type: ignore[arg-type]
        return Tree({name: made if entry is known else entry for name, entry in tree.items()})

    return change


def without(gone: str) -> Callable[[Tree], Tree]:
    return lambda tree: Tree({path: entry for path, entry in tree.items() if path != gone})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (changed("/file", mode=stat.S_IFREG | 0o600), "'/file': mode"),
        (changed("/file", mode=stat.S_IFREG | 0o600), "'/again': mode"),
        (changed("/sub", mode=stat.S_IFDIR | 0o700), "'/sub': mode"),
        (changed("/file", uid=9), "'/file': uid"),
        (changed("/file", gid=9), "'/file': gid"),
        (changed("/file", mtime_ns=10), "'/file': mtime_ns"),
        (changed("/sub", mtime_ns=10), "'/sub': mtime_ns"),
        (changed("/file", content=Bytes(b"hellO")), "'/file': sha256"),
        (changed("/file", content=Bytes(b"hello!")), "'/file': size"),
        (changed("/link", target="life"), "'/link': target"),
        (changed("/node", major=6), "'/node': major"),
        (changed("/node", minor=5), "'/node': minor"),
        (changed("/node", mode=stat.S_IFBLK | 0o600), "'/node': mode"),
        (changed("/marked", xattrs={"user.a": b"2", "user.empty": b""}), "'/marked': xattrs"),
        (changed("/marked", xattrs={"user.a": b"1"}), "'/marked': xattrs"),
        (changed("/marked", xattrs={"user.a": b"1", "user.empty": b"", "user.b": b""}), "'/marked': xattrs"),
        (lambda tree: Tree({**tree, "/twin": tree["/file"]}), "'/twin': group"),
        (lambda tree: Tree({**tree, "/again": replace(tree["/file"])}), "'/file': group"),
        (without("/again"), "'/again': not in the tree"),
        (without("/again"), "'/file': links"),
        (lambda tree: Tree({**tree, "/new": regular(b"")}), "'/new': missing"),
    ],
)  # fmt: skip
def test_the_comparison_notices(
    change: Callable[[Tree], Tree], said: str, small: Tree, small_walks: list[Walk]
) -> None:
    keeps = KEEPS["ext4"]
    assert differences(small, small_walks[0], keeps) == []
    assert any(told.startswith(said) for told in differences(change(small), small_walks[0], keeps))


def test_a_filesystem_that_cannot_be_mounted_is_a_difference(small: Tree, small_walks: list[Walk]) -> None:
    told = differences(small, small_walks[1], KEEPS["erofs"])
    assert told[0] == "'vda': mount: Invalid argument"
    assert "cannot find valid erofs superblock" in told[1]


def test_the_walk_after_a_failed_one_is_whole(small: Tree, small_walks: list[Walk]) -> None:
    assert differences(small, small_walks[2], KEEPS["ext4"]) == []


@pytest.mark.parametrize(
    ("line", "alarming"),
    [
        ("EXT4-fs mount: 35 callbacks suppressed", False),  # of a guest that gets too little time: only such messages
        ("EXT4-fs unmount: 2 callbacks suppressed", False),
        ("EXT4-fs (pmem0p1): mounted filesystem ea7c6cac ro with ordered data mode. Quota mode: disabled.", False),
        ("EXT4-fs error: 3 callbacks suppressed", True),
        ("EXT4-fs error (device pmem0p1): ext4_lookup:1857: inode #2: comm init: iget: checksum invalid", True),
        ("erofs: (device vda1): cannot find valid erofs superblock", True),
    ],
)
def test_a_kernels_alarm_is_told_from_what_it_says_anyway(line: str, alarming: bool) -> None:
    assert bool(_ALARM.search(line) and not _CALM.search(line)) == alarming
