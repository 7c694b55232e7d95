"""The erofs reader: what we wrote, and what mkfs.erofs wrote."""

from __future__ import annotations

import contextlib
import os
import random
import stat
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild import command
from osbuild.errors import InputError
from osbuild.filesystem import Volume, erofs, erofs_reader, recognise
from osbuild.tree import Bytes, Draft, Entry, Slice, Sparse, Spool, Tree, directory, regular, symlink
from tests.random_trees import random_tree

EPOCH = 1_700_000_000
MIB = 1 << 20
BEFORE = 3 * MIB  # where the filesystem is in the image


def image_of(tree: Tree, path: Path, *, dax: bool = True, before: int = 0) -> erofs.Plan:
    plan = erofs.plan(tree, start=MIB, epoch=EPOCH, dax=dax)
    with path.open("wb") as file:
        file.truncate(before + plan.size + before)
        plan.write(file.fileno(), before)
    return plan


def read(path: Path, *, before: int = 0) -> Volume:
    with path.open("rb") as file:
        return erofs_reader.read(file.fileno(), before, path.stat().st_size - 2 * before)


def kept(tree: Tree) -> Tree:
    """What erofs keeps of a tree: all but sockets, and everything has a time."""
    timed = {entry: replace(entry, mtime_ns=EPOCH * 10**9) for entry in tree.values() if entry.mtime_ns is None}
    return Tree({path: timed.get(entry, entry) for path, entry in tree.items() if not stat.S_ISSOCK(entry.mode)})


def assert_same(found: Tree, wanted: Tree) -> None:
    """The same digest; where not, the first path that differs."""
    if found.digest() == wanted.digest():
        return
    assert list(found) == list(wanted)
    for path, entry in wanted.items():
        assert told(found[path]) == told(entry), path
    raise AssertionError("hard links differ")


def told(entry: Entry) -> tuple[object, ...]:
    return (
        entry.mode, entry.uid, entry.gid, entry.mtime_ns, dict(entry.xattrs), entry.target, entry.major, entry.minor,
        b"".join(entry.content.chunks()),
    )  # fmt: skip


def draft(**files: Entry) -> Tree:
    made = Draft()
    made.put("/", directory(mtime_ns=0))
    for name, entry in files.items():
        made.put("/" + name.replace("__", "/"), entry)
    return made.tree()


# What we wrote


@pytest.mark.parametrize("dax", [True, False])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_a_tree_is_read_as_it_was_written(dax: bool, seed: int, tmp_path: Path) -> None:
    tree = random_tree(seed)
    plan = image_of(tree, tmp_path / "fs", dax=dax, before=BEFORE)
    volume = read(tmp_path / "fs", before=BEFORE)
    assert volume.problems == ()
    assert_same(volume.tree, kept(tree))
    assert (volume.uuid, volume.size) == (plan.uuid, plan.size)
    assert set(volume.places) == set(volume.tree)


@pytest.mark.parametrize("dax", [True, False])
def test_holes_are_read_as_holes(dax: bool, tmp_path: Path) -> None:
    spool = Spool()
    spool.append(os.urandom(5 * MIB))
    pieces = ((0, 0, 100), (3 * MIB, 100, 3 * MIB), (50 * MIB + 5, 3 * MIB + 100, MIB), ((100 * MIB) - 10, 0, 10))
    tree = draft(f=regular(Sparse(spool, 100 * MIB, pieces)), hole=regular(Sparse(spool, 9 * MIB, ())))
    image_of(tree, tmp_path / "fs", dax=dax)
    volume = read(tmp_path / "fs")
    assert_same(volume.tree, tree)
    found = volume.tree["/f"].content
    assert isinstance(found, Sparse)
    assert [(at, size) for at, _, size in found.pieces] == [
        (0, 8 * MIB - 2 * MIB), (50 * MIB, 2 * MIB), (98 * MIB, 2 * MIB),
    ]  # fmt: skip
    assert volume.tree["/hole"].content == Sparse(found.spool, 9 * MIB, ())


def test_a_place_is_where_a_files_bytes_are(tmp_path: Path) -> None:
    tree = draft(big=regular(os.urandom(3 * MIB)), small=regular(b"small"), link=symlink("x"))
    image_of(tree, tmp_path / "fs", before=BEFORE)
    volume = read(tmp_path / "fs", before=BEFORE)
    data = (tmp_path / "fs").read_bytes()[BEFORE:]
    for path in ("/big", "/small"):
        ((at, size),) = volume.places[path].extents
        assert data[at : at + size] == b"".join(tree[path].content.chunks())
    assert volume.places["/link"].extents == ()
    assert volume.places["/"].inode == 128


def test_hard_links_are_one_entry_and_one_place(tmp_path: Path) -> None:
    made = draft(a=regular(b"x")).edit()
    made.link("/b", "/a")
    image_of(made.tree(), tmp_path / "fs")
    volume = read(tmp_path / "fs")
    assert volume.tree["/a"] is volume.tree["/b"]
    assert volume.places["/a"] == volume.places["/b"]


def test_regions_name_what_no_path_does(tmp_path: Path) -> None:
    xattrs = {"user.shared": b"x" * 100}
    tree = draft(**{f"f{n}": replace(regular(b"y" * 5000), xattrs=xattrs) for n in range(50)})
    image_of(tree, tmp_path / "fs")
    volume = read(tmp_path / "fs")
    data = (tmp_path / "fs").read_bytes()
    superblock, inodes, shared = volume.regions
    fields = {name: data[superblock.offset + at :][:size] for name, at, size in superblock.fields}
    assert fields["uuid"].hex() == volume.uuid.replace("-", "")
    assert sum(size for _, _, size in superblock.fields) == superblock.size == 128
    place = volume.places["/f7"].inode
    assert inodes.offset + (place - inodes.first) * inodes.record == place * 32
    assert inodes.offset + inodes.size <= shared.offset
    assert data[shared.offset :].startswith(struct.pack("<BBH", 6, 1, 100) + b"shared")
    extents = [extent for found in volume.places.values() for extent in found.extents]
    assert min(at for at, _ in extents) >= shared.offset + shared.size


def test_contents_are_not_copied_and_outlive_the_descriptor(tmp_path: Path) -> None:
    image_of(draft(f=regular(b"y" * 5000)), tmp_path / "fs")
    open_before = len(os.listdir("/proc/self/fd"))
    volume = read(tmp_path / "fs")
    content = volume.tree["/f"].content
    assert isinstance(content, Slice)
    assert b"".join(content.chunks()) == b"y" * 5000
    (tmp_path / "fs").write_bytes(b"something else")
    with pytest.raises(InputError, match="changed"):
        b"".join(content.chunks())
    del volume, content
    assert len(os.listdir("/proc/self/fd")) == open_before


def test_facts_are_those_of_the_superblock(tmp_path: Path) -> None:
    plan = image_of(draft(f=regular(b"")), tmp_path / "fs")
    facts = read(tmp_path / "fs").facts
    assert facts["blocks"] == str(plan.size // 4096)
    assert facts["inodes"] == "2"
    assert facts["built"] == f"{EPOCH}.000000000"
    assert facts["features"] == "sb_csum mtime"


def test_only_an_erofs_is_recognised(tmp_path: Path) -> None:
    image_of(draft(), tmp_path / "fs")
    head = (tmp_path / "fs").read_bytes()[:4096]
    assert recognise(head) == "erofs"
    assert not recognise(head[1:] + b"\0")
    assert not recognise(bytes(4096))
    assert not recognise(b"")


# What mkfs.erofs wrote


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with everything in it that somebody without privileges can make, and where files lie unlike ours."""
    root = tmp_path_factory.mktemp("unpacked")
    source = random.Random(5)
    for size in (0, 1, 100, 4000, 4095, 4096, 4097, 8191, 65_537, 3 * MIB + 5):
        (root / f"file{size}").write_bytes(source.randbytes(size))
    (root / "sub/below").mkdir(parents=True)
    for number in range(600):
        (root / f"sub/{number:x}".ljust(30, "-")).write_bytes(b"x" * number)
    (root / "sub/below/link").symlink_to("../" * 20 + "file")
    (root / "sub/long").symlink_to("x" * 4000)
    os.link(root / "file1", root / "sub/one")
    os.mkfifo(root / "pipe")
    (root / "mode").touch(0o4711)
    with (root / "sparse").open("wb") as file:
        file.truncate(5 * MIB)
        file.seek(3 * MIB)
        file.write(b"x" * 5000)
    with contextlib.suppress(OSError):  # where there are none, the rest is still compared
        for number in range(20):
            os.setxattr(root / f"sub/{number:x}".ljust(30, "-"), "user.shared", b"v" * 200)
            os.setxattr(root / f"sub/{number:x}".ljust(30, "-"), "user.own", b"%d" % number)
    for number, path in enumerate(sorted(root.rglob("*"))):
        os.utime(path, ns=(0, 10**18 + number * 1_234_567_891), follow_symlinks=False)
    os.utime(root, ns=(0, 5))
    return root


def tree_of(root: Path) -> Tree:
    entries: dict[str, Entry] = {}
    known: dict[int, Entry] = {}
    for path in (root, *root.rglob("*")):
        found = path.lstat()
        names = os.listxattr(path, follow_symlinks=False)
        entry = Entry(
            mode=found.st_mode,
            uid=found.st_uid,
            gid=found.st_gid,
            mtime_ns=found.st_mtime_ns,
            xattrs={name: os.getxattr(path, name, follow_symlinks=False) for name in names},
            target=os.readlink(path) if path.is_symlink() else "",  # noqa: PTH115
            content=Bytes(path.read_bytes() if stat.S_ISREG(found.st_mode) else b""),
        )
        entries["/" + str(path.relative_to(root)).removeprefix(".")] = known.setdefault(found.st_ino, entry)
    return Tree(entries)


def mkfs(out: Path, root: Path, *options: str) -> None:
    subprocess.run([command.find("mkfs.erofs"), "--quiet", *options, out, root], check=True, capture_output=True)


@pytest.mark.parametrize(
    "options", [(), ("-Enoinline_data",), ("-Eforce-inode-extended",), ("--chunksize=4096",), ("--chunksize=65536",)]
)
def test_what_mkfs_wrote_is_read(options: Sequence[str], unpacked: Path, tmp_path: Path) -> None:
    mkfs(tmp_path / "fs", unpacked, *options)
    volume = read(tmp_path / "fs")
    assert volume.problems == ()
    assert_same(volume.tree, tree_of(unpacked))


def test_one_time_for_all_is_read_from_the_superblock(unpacked: Path, tmp_path: Path) -> None:
    mkfs(tmp_path / "fs", unpacked, "-T123456", "-Eforce-inode-compact")
    assert {entry.mtime_ns for entry in read(tmp_path / "fs").tree.values()} == {123456 * 10**9}


def test_compressed_files_are_named_and_the_others_read(unpacked: Path, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "root/text").write_bytes(b"the same again and again\n" * 10_000)
    (tmp_path / "root/small").write_bytes(b"small")
    mkfs(tmp_path / "fs", tmp_path / "root", "-zlz4")
    volume = read(tmp_path / "fs")
    assert [problem for problem in volume.problems if "compressed" in problem] == [
        "'/text': it is compressed, and only what is not can be read"
    ]
    assert list(volume.tree) == ["/", "/small"]
    assert b"".join(volume.tree["/small"].content.chunks()) == b"small"
