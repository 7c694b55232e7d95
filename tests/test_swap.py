"""Another agent in an image that was made before: the bytes of a clean build, or one line that says why not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from osbuild import lock, manifest, pipeline, records, smoke, swap, verity
from osbuild.agent import Agent
from osbuild.agents import BUILTIN, find_agent
from osbuild.arch import X86_64
from osbuild.artifacts import DiskImage, File, Kernel, Rootfs
from osbuild.begun import Begun
from osbuild.bootable import Problem
from osbuild.cache import default_cache
from osbuild.console import Show
from osbuild.errors import InputError, SpecError
from osbuild.kernel import KernelInputs
from osbuild.report import Verdict
from osbuild.rootfs import assemble_rootfs
from osbuild.runtime.base import Machine
from osbuild.sources.image import SourceImage
from osbuild.spec import BuildSpec, DiskSpec, RootfsSpec
from osbuild.subject import open_subject
from osbuild.tree import Content, Entry, Sparse, Spool, Tree, regular
from tests.agent_tools import FOREIGN, foreign_agent, rust_agent
from tests.boot_fixtures import boot_kernel
from tests.guest_trees import SYSTEMD, make_image
from tests.layer_tools import member

__all__ = ["boot_kernel"]  # a fixture

MIB = 1 << 20
ROOT = Path(__file__).parent.parent
DISKS = {
    "ext4": DiskSpec(),
    "ext4 with verity": DiskSpec(verity=True),
    "ext4 with a salt": DiskSpec(verity=True, salt=b"salt"),
    "ext4 as a disk": DiskSpec(header=False),
    "ext4 to write to": DiskSpec(header=False, writable=True, free=5 * MIB),
    "ext4 of a size": DiskSpec(size=64 * MIB),
    "ext4 aligned": DiskSpec(align=32 * MIB),
    "erofs": DiskSpec(filesystem="erofs"),
    "erofs with verity": DiskSpec(filesystem="erofs", verity=True),
    "erofs as a disk": DiskSpec(filesystem="erofs", header=False, verity=True),
}


ALIGNED = DiskSpec(align=8 * MIB)


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory, agent: File) -> dict[str, str]:
    """What `--agent` may be given: our own, the same with more bytes, and one in Kata's clothes."""
    work = tmp_path_factory.mktemp("agents")
    larger = work / "larger"
    larger.write_bytes(agent.path.read_bytes() + bytes(3 * MIB))
    return {"own": BUILTIN, "larger": str(larger), "kata": str(foreign_agent(work))}


def find(agents: dict[str, str], name: str) -> Agent:
    return find_agent(agents[name], X86_64, default_cache())


@pytest.fixture(scope="module", params=["agent", "systemd"])
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch_module: pytest.MonkeyPatch
) -> tuple[SourceImage, str]:
    """An image with what is hard to keep: holes, hard links, attributes, odd times, a socket, files of any size."""
    work = tmp_path_factory.mktemp(request.param)
    members = [member(f"srv/{size}", bytes([size % 251]) * size) for size in (1, 100, 4095, 4096, 4097, 70000, 3 * MIB)]
    image = make_image(work, *SYSTEMD, *members)
    # The image's systemd is five bytes long; whether it could boot is another test's business.
    monkeypatch_module.setattr(swap, "problems", lambda *args, **more: ())
    return dataclasses.replace(image, tree=odd(image.tree)), request.param


@pytest.fixture(scope="module")
def monkeypatch_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def odd(tree: Tree) -> Tree:
    draft = tree.edit()
    spool = Spool()
    spool.append(b"a" * 5000)
    for name, size, at in (("small hole", 9000, 4100), ("large hole", 9 * MIB, 5 * MIB), ("all hole", 3 * MIB, 0)):
        pieces = ((at, 0, size - at if size < MIB else 5000),) if at else ()
        draft.put(f"/srv/{name}", regular(Sparse(spool, size, pieces)))
    draft.link("/srv/again", "/srv/4097")
    draft.put("/srv/marked", dataclasses.replace(regular(b"x", mtime_ns=1_234_567_890_123_456_789), uid=70000,
              xattrs={"user.a": b"1", "security.capability": bytes(20)}))  # fmt: skip
    draft.put("/srv/socket", Entry(mode=stat.S_IFSOCK | 0o755, mtime_ns=0))
    return draft.tree()


def rootfs_of(source: tuple[SourceImage, str], agent: Agent) -> Rootfs:
    return assemble_rootfs(source[0], agent, epoch=1000, wishes=RootfsSpec(init=source[1]))


def build(source: tuple[SourceImage, str], agent: Agent, disk: DiskSpec, out: Path) -> DiskImage:
    spec = BuildSpec(image="", out=out.parent, arch=X86_64, disk=disk)
    return pipeline.make_image(spec, rootfs_of(source, agent), out, Show(quiet=True))


@pytest.mark.parametrize("disk", DISKS.values(), ids=DISKS)
def test_a_swapped_image_is_what_a_clean_build_gives(
    disk: DiskSpec, source: tuple[SourceImage, str], agents: dict[str, str], tmp_path: Path
) -> None:
    made = build(source, find(agents, "own"), disk, tmp_path / "a.img")
    before = made.file.path.read_bytes()
    for name in ("kata", "larger", "own"):  # there, on, and back
        clean = build(source, find(agents, name), disk, tmp_path / "b.img")
        done = swap.swap(tmp_path / "a.img", agents[name], default_cache(), disk=disk)
        assert (tmp_path / "a.img").read_bytes() == (tmp_path / "b.img").read_bytes()
        assert done.image == dataclasses.replace(
            clean, file=dataclasses.replace(clean.file, path=tmp_path / "a.img"), skipped=0
        )
        assert hashlib.sha256((tmp_path / "a.img").read_bytes()).hexdigest() == done.image.file.sha256
    assert (tmp_path / "a.img").read_bytes() == before


def test_the_files_are_written_while_the_image_is_being_proved(
    source: tuple[SourceImage, str], agents: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(source, find(agents, "own"), DiskSpec(), tmp_path / "a.img")
    found: list[int] = []
    there = Begun.there

    def seen(begun: Begun, contents: Iterable[tuple[int, Content]]) -> Mapping[int, Content]:
        result = there(begun, contents)
        found.append(sum(content.size for content in result.values()))
        return result

    monkeypatch.setattr(Begun, "there", seen)
    swap.swap(tmp_path / "a.img", agents["larger"], default_cache(), disk=DiskSpec())
    assert found[0] > 6 * MIB  # 3 MiB of the image's, and the agent


@pytest.mark.parametrize("disk", [DISKS["ext4 with verity"], DISKS["erofs"]], ids=["ext4", "erofs"])
def test_files_that_were_written_to_the_wrong_places_are_written_again(
    disk: DiskSpec,
    source: tuple[SourceImage, str],
    agents: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    build(source, find(agents, "own"), disk, tmp_path / "a.img")
    build(source, find(agents, "kata"), disk, tmp_path / "b.img")
    contents = swap._contents
    monkeypatch.setattr(swap, "_contents", lambda plan: [(at + MIB, content) for at, content in contents(plan)])
    swap.swap(tmp_path / "a.img", agents["kata"], default_cache(), disk=disk)
    assert (tmp_path / "a.img").read_bytes() == (tmp_path / "b.img").read_bytes()


@pytest.mark.parametrize("call", ["copy_file_range", "pwrite64", "fsync", "linkat", "rename"])
def test_a_swap_that_is_killed_leaves_the_old_image(call: str, agents: dict[str, str], tmp_path: Path) -> None:
    image = make_image(tmp_path / "i", member("etc/x", b"x" * 300_000))
    home = tmp_path / "home"
    home.mkdir()
    build((image, "agent"), find(agents, "own"), DiskSpec(), home / "a.img")
    before = (home / "a.img").read_bytes()
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    killed = [strace, "-f", "-qqq", "-o", "/dev/null", "-e", f"inject={call}:signal=KILL:when=1"]
    words = ["-m", "osbuild", "agent", "swap", str(home / "a.img"), agents["larger"]]
    done = subprocess.run([*killed, sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (home / "a.img").read_bytes() == before
    again = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, check=False)
    assert again.returncode == 0
    assert os.listdir(home) == ["a.img"]  # what was left under another name goes, too


def build_all(source: tuple[SourceImage, str], agent: Agent, disk: DiskSpec, out: Path, given: str = BUILTIN) -> None:
    """A build's directory, as `pipeline.build` leaves it, but for a kernel of a few bytes."""
    out.mkdir()
    for name in ("vmlinux", "vmlinuz", "config"):
        (out / name).write_bytes(name.encode())
    files = {name: File.of(out / name) for name in ("vmlinux", "vmlinuz", "config")}
    kernel = Kernel(
        vmlinux=files["vmlinux"],
        vmlinuz=files["vmlinuz"],
        config=files["config"],
        release="6.12",
        arch="x86_64",
        key="0",
        cached=True,
    )
    spec = BuildSpec(image="oci:x", out=out, arch=X86_64, disk=disk, rootfs=RootfsSpec(init=source[1], agent=given))
    rootfs, show = rootfs_of(source, agent), Show(quiet=True)
    image = pipeline.make_image(spec, rootfs, out / "rootfs.img", show)
    initrd = pipeline.make_initrd(spec, rootfs, out / "initrd.img", show)
    inputs = lock.describe(spec, source[0], rootfs, KernelInputs(key="0", inputs={}, fragments={}))
    document = manifest.describe(rootfs, kernel, {"image": image, "initrd": initrd}, source[0])
    records.write(out, document, inputs, source[0].tree, ())


def test_all_of_a_build_changes_with_its_agent(
    source: tuple[SourceImage, str], agents: dict[str, str], tmp_path: Path
) -> None:
    source = (dataclasses.replace(source[0], tree=without(source[0].tree, "/srv/socket")), source[1])
    disk = DiskSpec(verity=True, align=8 * MIB, free=MIB)
    build_all(source, find(agents, "own"), disk, tmp_path / "a")
    (tmp_path / "a" / "smoke").mkdir()
    build_all(source, find(agents, "kata"), disk, tmp_path / "b", agents["kata"])
    swap.swap(tmp_path / "a" / "rootfs.img", agents["kata"], default_cache())
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab")
    assert one == two
    assert manifest.read(tmp_path / "a")[2] == f"kata-agent {FOREIGN}"


def without(tree: Tree, path: str) -> Tree:
    draft = tree.edit()
    draft.remove(path)
    return draft.tree()


def test_another_file_leaves_the_image_and_its_build_alone(
    source: tuple[SourceImage, str], agents: dict[str, str], tmp_path: Path
) -> None:
    build_all(source, find(agents, "own"), DiskSpec(), tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    swap.swap(tmp_path / "a" / "rootfs.img", agents["kata"], default_cache(), out=tmp_path / "new.img")
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before
    assert (tmp_path / "new.img").read_bytes() != before["rootfs.img"]


# --- what is refused, and leaves everything as it was ---


@pytest.fixture
def plain(tmp_path: Path, agents: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(swap, "problems", lambda *args, **more: ())
    image = make_image(tmp_path / "i", member("etc/x", b"x" * 5000))
    build((image, "agent"), find(agents, "own"), DiskSpec(verity=True, align=8 * MIB), tmp_path / "a.img")
    return tmp_path / "a.img"


def refused(path: Path, agent: str, complaint: str, disk: DiskSpec | None = ALIGNED) -> None:
    before = path.read_bytes()
    names = sorted(path.parent.iterdir())
    with pytest.raises(InputError, match=complaint) as caught:
        swap.swap(path, agent, default_cache(), disk=disk)
    assert caught.value.hint
    assert path.read_bytes() == before
    assert sorted(path.parent.iterdir()) == names


def test_options_that_it_was_not_made_with_are_refused(plain: Path, agents: dict[str, str]) -> None:
    refused(plain, agents["kata"], "made with other options", None)
    refused(plain, agents["kata"], "made with other options", DiskSpec(align=8 * MIB, free=20 * MIB))
    refused(plain, agents["kata"], "another salt", DiskSpec(align=8 * MIB, verity=True, salt=b"other"))
    refused(plain, agents["kata"], "made with other options", DiskSpec(size=2 * MIB * 4))


@pytest.mark.parametrize(
    ("disk", "word"),
    [
        (DiskSpec(align=8 * MIB, filesystem="erofs"), "--fs"),
        (DiskSpec(align=8 * MIB, header=False), "--no-dax-header"),
        (DiskSpec(align=8 * MIB, format="qcow2"), "--format"),
    ],
)
def test_a_wish_for_another_image_is_refused_and_not_passed_over(
    plain: Path, agents: dict[str, str], disk: DiskSpec, word: str
) -> None:
    before = plain.read_bytes()
    with pytest.raises(SpecError, match=f"{word}: .* a swap changes nothing but the agent"):
        swap.swap(plain, agents["kata"], default_cache(), disk=disk)
    assert plain.read_bytes() == before


def test_an_image_that_somebody_changed_is_refused(plain: Path, agents: dict[str, str]) -> None:
    data = bytearray(plain.read_bytes())
    at = data.find(b"x" * 5000)
    data[at] = ord("y")
    plain.write_bytes(data)
    refused(plain, agents["kata"], "not what osbuilder")
    data[3 * MIB + 1024 + 0x78] ^= 1  # the UUID, in the superblock: its checksum is wrong
    plain.write_bytes(data)
    refused(plain, agents["kata"], "damaged")


@pytest.mark.parametrize("vouched", [True, False], ids=["root hash known", "root hash unknown"])
def test_blocks_that_stay_are_hashed_again_only_if_nobody_vouches_for_their_digests(
    vouched: bool,
    source: tuple[SourceImage, str],
    agents: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = (dataclasses.replace(source[0], tree=without(source[0].tree, "/srv/socket")), source[1])
    build_all(source, find(agents, "own"), DiskSpec(verity=True), tmp_path / "a")
    path, out = tmp_path / "a/rootfs.img", tmp_path / "b.img"
    if not vouched:
        path = path.rename(tmp_path / "alone.img")
    read: list[tuple[int, int]] = []
    real = verity._hashed

    def hashed(descriptor: int, start: int, length: int, salt: bytes, hole: bytes) -> bytes:
        read.append((start, start + length))
        return real(descriptor, start, length, salt, hole)

    monkeypatch.setattr(verity, "_hashed", hashed)
    swap.swap(path, agents["kata"], default_cache(), out=out)
    filesystem = open_subject(out).filesystems[0]

    def places(name: str) -> tuple[int, int]:
        ((offset, _),) = filesystem.volume.places[name].extents
        start = filesystem.partition.start + offset
        return start, start + int(name.rpartition("/")[2]) // verity.BLOCK * verity.BLOCK

    for name in ("/srv/70000", "/srv/3145728", "/srv/4097"):
        start, last = places(name)
        assert any(begin < last and start < end for begin, end in read) is not vouched, name
    start, _ = places("/srv/100")  # the rest of a block is nobody's
    assert any(begin <= start < end for begin, end in read)


def test_a_tree_of_digests_of_other_data_is_not_vouched_for_by_a_new_root_hash(
    source: tuple[SourceImage, str], agents: dict[str, str], tmp_path: Path
) -> None:
    """It agrees with itself, up to a root hash that nobody knows; the new one is the clean build's."""
    made = build(source, find(agents, "own"), DiskSpec(verity=True), tmp_path / "a.img")
    clean = build(source, find(agents, "kata"), DiskSpec(verity=True), tmp_path / "b.img")
    assert made.verity is not None
    size, tree = made.verity.blocks * verity.BLOCK, tree_of(made.file.path)
    evil = bytearray(made.file.path.read_bytes())
    filesystem = open_subject(made.file.path).filesystems[0]
    start = filesystem.partition.start
    block = start + filesystem.volume.places["/srv/3145728"].extents[0][0] + 5 * verity.BLOCK
    whole = bytes(evil[start : start + size])
    evil[block] ^= 1
    (tmp_path / "c.img").write_bytes(evil)
    with (tmp_path / "c.img").open("r+b") as file:
        other = verity.hash_tree(file.fileno(), start, size, verity.DEFAULT_SALT, file.fileno(), tree)
        file.seek(start)
        file.write(whole)  # as it was, under a tree that expects something else
    assert other.hex() != made.verity.root_hash
    done = swap.swap(tmp_path / "c.img", agents["kata"], default_cache(), disk=DiskSpec(verity=True))
    assert (tmp_path / "c.img").read_bytes() == clean.file.path.read_bytes()
    assert done.image.verity == clean.verity


@pytest.mark.parametrize("level", ["the digests of the data", "the level above"])
def test_an_image_whose_hash_tree_somebody_changed_is_refused(
    level: str, source: tuple[SourceImage, str], agents: dict[str, str], tmp_path: Path
) -> None:
    made = build(source, find(agents, "own"), DiskSpec(verity=True), tmp_path / "a.img")
    assert made.verity is not None
    data = bytearray(made.file.path.read_bytes())
    tree = tree_of(made.file.path)
    digests = verity.first_level(made.verity.blocks * verity.BLOCK)
    assert digests
    data[tree + (digests + 100 * verity.DIGEST if level == "the digests of the data" else verity.DIGEST)] ^= 1
    made.file.path.write_bytes(data)
    refused(made.file.path, agents["kata"], "hash tree that somebody changed", DiskSpec())


def test_a_hash_tree_that_agrees_with_itself_must_have_the_root_hash_of_the_manifest(
    source: tuple[SourceImage, str], agents: dict[str, str], tmp_path: Path
) -> None:
    source = (dataclasses.replace(source[0], tree=without(source[0].tree, "/srv/socket")), source[1])
    build_all(source, find(agents, "own"), DiskSpec(verity=True), tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    document = json.loads(path.read_text())
    document["outputs"]["rootfs.img"]["verity"]["root_hash"] = "0" * 64
    path.write_text(json.dumps(document))
    refused(tmp_path / "a" / "rootfs.img", agents["kata"], "hash tree that somebody changed")


def tree_of(path: Path) -> int:
    """Where the hash tree begins."""
    layout = open_subject(path).layout
    assert layout is not None
    return next(part.start for part in layout.partitions if part.kind == "hash tree")


def test_what_is_no_image_of_ours_is_refused(plain: Path, agents: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    for data, complaint in (
        (plain.read_bytes()[3 * MIB :], "no disk image of osbuilder's"),
        (b"QFI\xfb\0\0\0\3" + bytes(100), "qcow2"),
    ):
        other.write_bytes(data)
        refused(other, agents["kata"], complaint)
    with pytest.raises(InputError, match="is not a regular file") as caught:
        swap.swap(tmp_path, agents["kata"], default_cache())
    assert caught.value.hint == "name a file in it"
    draft = make_image(tmp_path / "j", member("sbin/init", b"x")).tree.edit()
    tree = Tree({path: dataclasses.replace(entry, mtime_ns=0) for path, entry in draft.tree().items()})
    rootfs = Rootfs(tree=tree, init="/sbin/init", epoch=0)
    spec = BuildSpec(image="", out=tmp_path, arch=X86_64)
    pipeline.make_image(spec, rootfs, other, Show(quiet=True))
    refused(other, agents["kata"], "names no agent")


def test_an_agent_that_could_not_run_there_is_refused(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = tmp_path / "aarch64"
    data = bytearray(rust_agent(tmp_path).read_bytes())
    data[18] = 183
    foreign.write_bytes(data)
    refused(plain, str(foreign), "is for aarch64, the guest is x86_64")
    monkeypatch.setattr(swap, "problems", lambda *args, **more: (Problem(path="/", text="No loader.", hint="add it"),))
    refused(plain, str(tmp_path / "kata-agent"), "would not boot with it: No loader")
    refused(plain, str(rust_agent(tmp_path, policy=True)), "obey a policy")


def test_an_agent_that_does_not_fit_into_the_size_is_refused(
    agents: dict[str, str], tmp_path: Path, plain: Path
) -> None:
    image = make_image(tmp_path / "k", member("etc/x", b"x"))
    disk = DiskSpec(size=10 * MIB)
    build((image, "agent"), find(agents, "own"), disk, tmp_path / "b.img")
    before = (tmp_path / "b.img").read_bytes()
    with pytest.raises(SpecError, match=r"needs .* bytes"):
        swap.swap(tmp_path / "b.img", agents["larger"], default_cache(), disk=disk)
    assert (tmp_path / "b.img").read_bytes() == before


@pytest.mark.boot
@pytest.mark.parametrize("name", ["ext4", "erofs with verity"])
def test_a_guest_with_a_swapped_agent_boots_and_names_it(
    name: str, agents: dict[str, str], boot_kernel: Kernel, tmp_path: Path
) -> None:
    image = make_image(tmp_path / "i", member("etc/hostname", b"guest\n"))
    build((image, "agent"), find(agents, "own"), DISKS[name], tmp_path / "a.img")
    done = swap.swap(tmp_path / "a.img", agents["kata"], default_cache())
    root = done.image.through_verity() if done.image.verity else done.image
    machine = Machine(kernel=boot_kernel, root=root, accel="tcg", agent=done.agent, transport="serial")
    report = smoke.run(machine, tmp_path / "work", seconds=60)
    assert report.verdict is Verdict.passed, report.reason
    assert {check.name: check.detail for check in report.checks}["agent.version"].startswith(FOREIGN)
