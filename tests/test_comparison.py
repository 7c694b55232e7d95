"""`osbuilder diff`: the same is the same, and every difference has a name."""

from __future__ import annotations

import gzip
import json
import os
import random
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild import command, initrd
from osbuild.comparison import Comparison, compare, first_difference, lines
from osbuild.content import Content
from osbuild.errors import InputError
from osbuild.filesystem import erofs, ext4
from osbuild.nvdimm_image import build_nvdimm_image
from osbuild.subject import open_subject
from osbuild.tree import Bytes, Draft, Entry, Sparse, Spool, Tree, device, directory, regular, symlink
from tests.random_trees import random_tree

MIB = 1 << 20
WRITERS = {"ext4": ext4, "erofs": erofs}
SECOND = 10**9


def tree(**changes: Entry | None) -> Tree:
    """A small root; a change of None takes a path away."""
    files: dict[str, Entry | None] = {
        "etc": directory(mtime_ns=0),
        "etc__passwd": regular(b"root:x:0:0\n", mtime_ns=5 * SECOND),
        "bin": directory(mtime_ns=0),
        "bin__sh": regular(random.Random(1).randbytes(9000), 0o755),
        "link": symlink("etc/passwd"),
        "null": device(stat.S_IFCHR, 0o666, 1, 3),
        "init": regular(b"#!/bin/sh\n", 0o755),
    }
    draft = Draft()
    draft.put("/", directory(mtime_ns=0))
    for name, entry in (files | changes).items():
        if entry is not None:
            draft.put("/" + name.replace("__", "/"), entry)
    return draft.tree()


def image(path: Path, source: Tree, kind: str = "ext4", *, hashed: bool = False, header: bool = True) -> Path:
    plan = WRITERS[kind].plan(source, start=MIB, epoch=0)
    build_nvdimm_image(WRITERS[kind], plan, path, name=kind, hashed=hashed, header=header)
    return path


def archive(path: Path, source: Tree, pack: Callable[[bytes], bytes] = gzip.compress) -> Path:
    path.write_bytes(pack(b"".join(initrd.archive(source))))
    return path


def told(found: Comparison) -> list[str]:
    return [str(each) for each in found.differences]


CHANGES: dict[str, tuple[str, Entry | None, str]] = {
    "mtime": ("etc__passwd", regular(b"root:x:0:0\n", mtime_ns=6 * SECOND), "'/etc/passwd': mtime: 5 and 6"),
    "nanoseconds": ("etc__passwd", regular(b"root:x:0:0\n", mtime_ns=5 * SECOND + 7), "mtime: 5 and 5.000000007"),
    "mode": ("bin__sh", regular(random.Random(1).randbytes(9000), 0o4755), "'/bin/sh': mode: 0755 and 4755"),
    "owner": ("null", Entry(mode=stat.S_IFCHR | 0o666, uid=9, mtime_ns=0, major=1, minor=3), "'/null': uid: 0 and 9"),
    "group": ("etc", Entry(mode=stat.S_IFDIR | 0o755, gid=7, mtime_ns=0), "'/etc': gid: 0 and 7"),
    "device number": ("null", device(stat.S_IFCHR, 0o666, 1, 5), "'/null': minor: 3 and 5"),
    "target": ("link", symlink("etc/shadow"), "'/link': target: 'etc/passwd' and 'etc/shadow'"),
    "type": ("link", regular(b"", 0o777), "'/link': type: l and -"),
    "size": ("etc__passwd", regular(b"root:x:0:0\nx", mtime_ns=5 * SECOND), "'/etc/passwd': size: 11 and 12"),
    "content": (
        "etc__passwd", regular(b"root:x:1:0\n", mtime_ns=5 * SECOND),
        "'/etc/passwd': bytes differ first at offset 7 of the file",
    ),
    "new path": ("etc__new", regular(b"1"), "'/etc/new': only in the second"),
    "lost path": ("null", None, "'/null': only in the first"),
    "attribute": (
        "bin__sh",
        replace(regular(random.Random(1).randbytes(9000), 0o755), xattrs={"user.a": b"\x01"}),
        "'/bin/sh': attribute 'user.a': none and 01",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(("name", "entry", "sentence"), CHANGES.values(), ids=CHANGES)
def test_the_first_difference_names_inode_path_and_field(
    kind: str, name: str, entry: Entry | None, sentence: str, tmp_path: Path
) -> None:
    found = compare(image(tmp_path / "a", tree(), kind), image(tmp_path / "b", tree(**{name: entry}), kind))
    assert not found.same
    named = [line for line in told(found) if line.startswith(f"partition 1 {kind}: inode ")]
    assert named[0].endswith(sentence), told(found)


@pytest.mark.parametrize(("name", "entry", "sentence"), CHANGES.values(), ids=CHANGES)
def test_initramfs_are_compared_by_their_trees(name: str, entry: Entry | None, sentence: str, tmp_path: Path) -> None:
    found = compare(archive(tmp_path / "a", tree()), archive(tmp_path / "b", tree(**{name: entry})))
    if (name == "bin__sh" and entry is not None and entry.xattrs) or "nanoseconds" in sentence or ".000" in sentence:
        assert found.same, "newc holds neither attributes nor fractions of a second"
    else:
        assert told(found)[0] == sentence


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_image_is_the_same(kind: str, tmp_path: Path) -> None:
    found = compare(image(tmp_path / "a", tree(), kind), image(tmp_path / "b", tree(), kind))
    assert found.same
    assert list(lines(found)) == ["the same"]


def test_an_image_and_its_initramfs_have_the_same_tree(tmp_path: Path) -> None:
    assert compare(image(tmp_path / "a", tree()), archive(tmp_path / "b", tree())).same
    other = tree(etc__passwd=regular(b"root:x:0:0\n", mtime_ns=5 * SECOND + 7))  # newc has whole seconds only
    assert compare(image(tmp_path / "a", other), archive(tmp_path / "b", tree())).same
    found = compare(image(tmp_path / "a", tree()), archive(tmp_path / "c", tree(null=None)))
    assert told(found) == ["'/null': only in the first"]


def test_an_image_and_a_filesystem_alone_are_compared_by_their_trees(tmp_path: Path) -> None:
    plan = ext4.plan(tree(null=None), start=0, epoch=0)
    with (tmp_path / "fs").open("wb") as file:
        file.truncate(plan.size)
        plan.write(file.fileno(), 0)
    found = compare(image(tmp_path / "a", tree()), tmp_path / "fs")
    assert told(found) == ["'/null': only in the first"]


def test_two_filesystems_of_different_kinds_are_compared_by_their_trees(tmp_path: Path) -> None:
    found = compare(image(tmp_path / "a", tree()), image(tmp_path / "b", tree(link=symlink("x")), "erofs"))
    assert any("target: 'etc/passwd' and 'x'" in line for line in told(found))
    assert not any("lies at" in line for line in told(found))


@pytest.mark.parametrize("compress", [gzip.compress, bytes], ids=["gzip", "none"])
def test_compressions_that_differ_are_said(compress: Callable[[bytes], bytes], tmp_path: Path) -> None:
    first = archive(tmp_path / "a", tree(), compress)
    packed = subprocess.run(
        [command.find("lz4"), "-l", "-c"], input=b"".join(initrd.archive(tree())), capture_output=True, check=True
    ).stdout
    (tmp_path / "b").write_bytes(packed)
    assert told(compare(first, tmp_path / "b"))[0].startswith("archive 1: compression: ")


def test_hard_links_that_are_none_are_said(tmp_path: Path) -> None:
    draft = tree().edit()
    draft.link("/etc/also", "/etc/passwd")
    apart = tree(etc__also=regular(b"root:x:0:0\n", mtime_ns=5 * SECOND))
    found = compare(image(tmp_path / "a", draft.tree()), image(tmp_path / "b", apart))
    assert any("'/etc/passwd': same inode as: '/etc/also' and none" in line for line in told(found)), told(found)


def test_a_hash_tree_and_its_partition_are_said(tmp_path: Path) -> None:
    found = compare(image(tmp_path / "a", tree()), image(tmp_path / "b", tree(), hashed=True))
    assert "MBR 1: partition 2: only in the second" in told(found)


@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_the_same_filesystem_at_another_place_is_the_same(kind: str, tmp_path: Path) -> None:
    found = compare(image(tmp_path / "a", tree(), kind), image(tmp_path / "b", tree(), kind, header=False))
    assert [line.partition(":")[0] for line in told(found)] == ["size", "MBR 1", "nd_pfn superblock", "MBR 2"]
    assert any("3145728 and 1048576" in line for line in told(found))


@pytest.mark.parametrize("hashed", [False, True])
def test_one_byte_is_named_wherever_its_partition_begins(tmp_path: Path, *, hashed: bool) -> None:
    first = image(tmp_path / "a", tree(), hashed=hashed)
    second = image(tmp_path / "b", tree(), header=False, hashed=hashed)
    for file, shift in ((first, 0), (second, -2 * MIB)):
        before = file.read_bytes()
        found = told(
            compare(first, changed(second, MIB + 1024 + 52, b"\7"))
            if file is second
            else compare(changed(first, 3 * MIB + 1024 + 52, b"\7"), second)
        )
        assert found[-1] == f"partition 1 ext4: superblock: mnt_count: {'0 and 7' if shift else '7 and 0'}", found
        file.write_bytes(before)
    (at, size), *_ = open_subject(first).filesystems[0].volume.places["/bin/sh"].extents
    found = told(compare(first, changed(second, MIB + at + size + 3, b"x")))
    assert (
        f"differ at offset {3 * MIB + at + size + 3} of the first file, {MIB + at + size + 3} of the second"
        in found[-1]
    )


def test_filesystems_of_different_kinds_in_images_differ_by_their_trees(tmp_path: Path) -> None:
    found = told(compare(image(tmp_path / "a", tree()), image(tmp_path / "b", tree(), "erofs")))
    assert "partition 1: holds: ext4 and erofs" in found
    assert not [line for line in found if "bytes differ" in line or "superblock" in line.removeprefix("nd_pfn")]


@pytest.mark.parametrize("other", ["a disk", "another qcow2"])
def test_of_a_qcow2_image_it_is_said_that_nobody_looked_inside(other: str, tmp_path: Path) -> None:
    disk = image(tmp_path / "a", tree(), header=False)
    command.run("qemu-img", "convert", "-O", "qcow2", str(disk), str(tmp_path / "b"))
    first = disk
    if other != "a disk":
        first = tmp_path / "c"
        command.run("qemu-img", "create", "-q", "-f", "qcow2", str(first), "1G")
    found = compare(first, tmp_path / "b")
    assert any("qemu-img convert -O raw" in note for note in found.notes)
    assert any("kind: disk image and qcow2 image" in line or "size of the disk" in line for line in told(found))


def changed(path: Path, at: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    return path


@pytest.mark.parametrize(
    ("at", "data", "sentence"),
    [
        (440, b"\xaa\xbb\xcc\xdd", "MBR 1: disk signature: "),
        (2 * MIB + 450, b"\x82", "MBR 2: partition 1: type: 131 and 130"),
        (4096 + 72, b"\2", "nd_pfn superblock: mode: 1 (RAM) and 2 (PMEM)"),
        (4096 + 2000, b"\2", "nd_pfn superblock: bytes differ at offset 6096 of the file"),
        (1000, b"x", "outside the partitions: bytes differ at offset 1000 of the file"),
        (3 * MIB + 1024 + 52, b"\7", "partition 1 ext4: superblock: mnt_count: 0 and 7"),
        (10, b"x", "MBR 1: bytes differ at offset 10 of the file"),
    ],
    ids=["signature", "type", "mode", "padding of the header", "a gap", "a count", "boot code"],
)
def test_one_changed_byte_is_the_one_difference(at: int, data: bytes, sentence: str, tmp_path: Path) -> None:
    first = image(tmp_path / "a", tree())
    second = tmp_path / "b"
    second.write_bytes(first.read_bytes())
    found = told(compare(first, changed(second, at, data)))
    assert len(found) == 1
    assert found[0].startswith(sentence), found


def test_bytes_behind_a_file_s_end_are_said_to_be_there(tmp_path: Path) -> None:
    first, second = image(tmp_path / "a", tree()), tmp_path / "b"
    second.write_bytes(first.read_bytes())
    (at, size), *_ = open_subject(first).filesystems[0].volume.places["/etc/passwd"].extents
    found = told(compare(first, changed(second, 3 * MIB + at + size + 9, b"x")))
    assert len(found) == 1
    assert "the rest of the last block of inode" in found[0]
    assert "'/etc/passwd': bytes differ at offset" in found[0]


def test_times_that_no_tree_has_are_named_by_their_field(tmp_path: Path) -> None:
    first, second = image(tmp_path / "a", tree()), tmp_path / "b"
    second.write_bytes(first.read_bytes())
    at = changed_inode(second, "set_inode_field /etc/passwd atime 77")
    assert at
    found = told(compare(first, second))
    assert len(found) == 1
    assert "'/etc/passwd': atime: " in found[0]
    assert found[0].endswith(" and 77")


def changed_inode(path: Path, request: str) -> bool:
    """Let debugfs change the filesystem in an image."""
    argv = [command.find("debugfs"), "-w", "-R", request, f"{path}?offset={3 * MIB}"]
    return subprocess.run(argv, check=True, capture_output=True).returncode == 0


def test_two_filesystems_of_mke2fs_differ_in_what_it_made_up(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "etc").mkdir(parents=True)
    (source / "etc/hosts").write_bytes(b"x")
    for name, uuid in (("a", "1" * 8), ("b", "2" * 8)):
        subprocess.run(
            [command.find("mke2fs"), "-q", "-t", "ext4", "-U", f"{uuid}-1111-1111-1111-111111111111", "-d", str(source),
             str(tmp_path / name), "16M"],
            check=True, env=os.environ | {"E2FSPROGS_FAKE_TIME": "1700000000"},
        )  # fmt: skip
    found = told(compare(tmp_path / "a", tmp_path / "b"))
    assert found[0].startswith("ext4: superblock: uuid: 11111111-")
    assert not any("checksum" in line or "csum" in line for line in found), found


def test_no_more_than_asked_for_is_said(tmp_path: Path) -> None:
    changes = {f"new{number}": regular(b"") for number in range(30)}
    found = compare(image(tmp_path / "a", tree()), image(tmp_path / "b", tree(**changes)), most=5)
    assert (len(found.differences), found.more) == (5, True)


def test_what_nobody_knows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text")
    with pytest.raises(InputError):
        compare(tmp_path / "a", tmp_path / "a")


def osbuilder(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "osbuild", *words], capture_output=True, text=True, check=False)


def test_the_exit_code_says_whether_they_are_the_same(tmp_path: Path) -> None:
    first, second = image(tmp_path / "a", tree()), image(tmp_path / "b", tree(null=None))
    same = osbuilder("diff", str(first), str(first))
    assert (same.returncode, same.stdout, same.stderr) == (0, "the same\n", "")
    other = osbuilder("diff", str(first), str(second), "--json", "--most", "3")
    assert other.returncode == 3
    document = json.loads(other.stdout)
    assert document["same"] is False
    assert len(document["differences"]) == 3
    missing = osbuilder("diff", str(first), str(tmp_path / "none"), "--json")
    assert missing.returncode == 3
    assert "error" in json.loads(missing.stdout)


# Contents


def plain(content: Content) -> bytes:
    return b"".join(content.chunks())


def spooled(data: bytes, pieces: list[tuple[int, int]]) -> Sparse:
    """The content that has only these pieces of some data, and holes between."""
    spool = Spool()
    found = []
    for start, size in pieces:
        found.append((start, spool.size, size))
        spool.append(data[start : start + size])
    return Sparse(spool, len(data), tuple(found))


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_first_differing_byte_is_the_first(seed: int) -> None:
    chance = random.Random(seed)
    size = chance.choice((1, 100, 5000, 3 * MIB))
    data = chance.randbytes(100) * (size // 100 + 1)
    contents: list[Content] = []
    for _ in range(2):
        cuts = sorted(chance.sample(range(size + 1), k=min(size + 1, 2 * chance.randrange(5))))
        if len(cuts) % 2:
            cuts.pop()
        if chance.random() < 0.3:
            other = bytearray(data[:size])
            other[chance.randrange(size)] ^= 1
            contents.append(Bytes(bytes(other)))
        else:
            contents.append(spooled(data[:size], [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=True)]))
    first, second = map(plain, contents)
    wanted = next((at for at in range(size) if first[at] != second[at]), -1) if first != second else -1
    assert first_difference(*contents) == wanted


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), flips=st.integers(1, 5), kind=st.sampled_from(sorted(WRITERS)))
def test_whatever_bytes_differ_something_is_said_and_nothing_crashes(
    seed: int, flips: int, kind: str, tmp_path: Path
) -> None:
    first = image(tmp_path / "a", random_tree(seed), kind)
    data = bytearray(first.read_bytes())
    chance = random.Random(seed)
    for _ in range(flips):
        start = chance.choice((0, 4096, 2 * MIB, 3 * MIB, 3 * MIB + 4096))
        data[min(start + chance.randrange(8192), len(data) - 1)] ^= chance.randrange(1, 256)
    (tmp_path / "b").write_bytes(data)
    try:
        found = compare(first, tmp_path / "b")
    except InputError:
        return
    assert found.same == (first.read_bytes() == bytes(data))
    json.dumps(found.to_dict())
    assert all("\n" not in line for line in lines(found))
