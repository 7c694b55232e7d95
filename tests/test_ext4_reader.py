"""The ext4 reader on filesystems that mke2fs made, on our own, and on damaged ones."""

from __future__ import annotations

import contextlib
import os
import random
import re
import stat
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild import command
from osbuild.errors import InputError
from osbuild.filesystem import READERS, Volume, ext4, ext4_reader, recognise
from osbuild.tree import Bytes, Entry, Sparse, Tree, device, directory
from tests.random_trees import FAR_TIMES, random_tree

EPOCH = 1_700_000_000
KINDS = {
    "Debian's": "",
    "without checksums": "^metadata_csum",
    "with checksums of descriptors only": "^metadata_csum,uninit_bg",
    "with 32 bit block numbers": "^64bit",
    "with block maps": "^extents,^64bit",
    "with two copies of the superblock": "sparse_super2,^resize_inode",
    "with a seed of its own": "metadata_csum_seed",
    "without hash trees": "^dir_index",
    "with quotas": "quota,project",
    "without a journal": "^has_journal",
    "with an orphan file": "orphan_file",
}


def read(path: Path) -> Volume:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return ext4_reader.read(descriptor, 0, path.stat().st_size)
    finally:
        os.close(descriptor)


def write(tree: Tree, path: Path) -> Path:
    plan = ext4.plan(tree, start=1 << 20, epoch=EPOCH)
    with path.open("wb") as file:
        file.truncate(plan.size)
        plan.write(file.fileno(), 0)
    return path


def mke2fs(source: Path, image: Path, *words: str, size: str = "64M") -> Path:
    argv = [command.find("mke2fs"), "-q", "-F", "-t", "ext4", "-b", "4096", *words, "-d", str(source), str(image), size]
    subprocess.run(argv, check=True, capture_output=True)
    return image


def everything(tree: Tree) -> dict[str, tuple[object, ...]]:
    """A tree as something that compares by value; hard links by the first of their names."""
    first: dict[Entry, str] = {}
    return {
        path: (
            first.setdefault(entry, path), oct(entry.mode), entry.uid, entry.gid, entry.mtime_ns, dict(entry.xattrs),
            entry.target, entry.major, entry.minor, b"".join(entry.content.chunks()),
        )
        for path, entry in tree.items()
    }  # fmt: skip


def as_written(tree: Tree) -> dict[str, tuple[object, ...]]:
    """What ext4 makes of a tree: no sockets, a time for everything, and no time that it has no bits for."""
    low, high = -(1 << 31) * 10**9, ((1 << 34) - (1 << 31) - 1) * 10**9
    found = {}
    for path, row in everything(tree).items():
        if stat.S_ISSOCK(tree[path].mode):
            continue
        time = tree[path].mtime_ns
        time = EPOCH * 10**9 if time is None else time
        time = min(max(time, low), high) if time in FAR_TIMES else time
        found[path] = (*row[:4], time, *row[5:])
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one of everything that an ordinary user can make."""
    root = tmp_path_factory.mktemp("source")
    root.chmod(0o755)
    (root / "empty").touch()
    (root / "small").write_bytes(b"hello")
    (root / "large").write_bytes(random.Random(1).randbytes(3_000_000))
    (root / "fast").symlink_to("x" * 59)
    (root / "slow").symlink_to("y" * 60)
    (root / "long").symlink_to("z" * 1000)
    os.mkfifo(root / "pipe")
    (root / "many").mkdir()
    for number in range(1500):
        (root / "many" / f"a rather long name that fills blocks of directories {number}").write_bytes(b"%d" % number)
    (root / "linked").write_bytes(b"one inode")
    os.link(root / "linked", root / "many" / "linked")
    with (root / "sparse").open("wb") as file:
        for at in (0, 40_960, 8 << 20, 40 << 20):
            file.seek(at)
            file.write(b"data" * 1024)
        file.truncate(50_000_001)
    (root / "sub/dir").mkdir(parents=True, mode=0o1750)
    os.setxattr(root / "small", "user.one", b"1")
    os.setxattr(root / "small", "user.large", b"v" * 700)
    os.setxattr(root / "sub", "user.in", b"inside")
    os.utime(root / "small", ns=(1, 1_900_000_000_123_456_789))
    os.utime(root / "empty", ns=(1, -5_000_000_123))
    return root


def tree_of(source: Path) -> Tree:
    """The same directory through the kernel's eyes."""
    entries: dict[str, Entry] = {}
    known: dict[int, Entry] = {}
    for path in [source, *sorted(source.rglob("*"))]:
        found = path.lstat()
        if found.st_ino not in known:
            names = () if path.is_symlink() else os.listxattr(path)
            known[found.st_ino] = Entry(
                mode=found.st_mode, uid=found.st_uid, gid=found.st_gid, mtime_ns=found.st_mtime_ns,
                xattrs={name: os.getxattr(path, name) for name in names},
                target=str(path.readlink()) if path.is_symlink() else "",
                content=Bytes(path.read_bytes() if stat.S_ISREG(found.st_mode) else b""),
            )  # fmt: skip
        entries["/" + str(path.relative_to(source)).removeprefix(".")] = known[found.st_ino]
    return Tree(entries)


@pytest.mark.parametrize("features", KINDS.values(), ids=KINDS)
def test_what_mke2fs_wrote_is_what_lay_in_the_directory(features: str, source: Path, tmp_path: Path) -> None:
    image = mke2fs(source, tmp_path / "fs", *(["-O", features] if features else []))
    found = read(image)
    assert found.problems == ()
    wanted = everything(tree_of(source))
    there = everything(found.tree)
    del there["/lost+found"]
    # mke2fs gives the root the time of now, and times to the second where it copies them.
    for rows in (wanted, there):
        for path, row in rows.items():
            time = row[4]
            assert isinstance(time, int)
            rows[path] = (*row[:4], 0 if path == "/" else time // 10**9, *row[5:])
    assert there == wanted


@pytest.mark.parametrize(
    "words", [["-b", "1024"], ["-b", "2048"], ["-I", "128"], ["-I", "1024"], ["-g", "1024"]], ids=str
)
def test_other_sizes_of_blocks_inodes_and_groups_are_read(words: list[str], source: Path, tmp_path: Path) -> None:
    found = read(mke2fs(source, tmp_path / "fs", *words))
    assert found.problems == ()
    assert b"".join(found.tree["/large"].content.chunks()) == (source / "large").read_bytes()
    assert len(found.tree) == len(tree_of(source)) + 1


def test_a_sparse_file_is_read_as_pieces(source: Path, tmp_path: Path) -> None:
    content = read(mke2fs(source, tmp_path / "fs")).tree["/sparse"].content
    assert isinstance(content, Sparse)
    assert sum(size for _, _, size in content.pieces) < 100_000


def test_places_are_where_debugfs_says(source: Path, tmp_path: Path) -> None:
    image = mke2fs(source, tmp_path / "fs")
    found = read(image)
    for path in ("/large", "/small", "/many"):
        told = subprocess.run(
            [command.find("debugfs"), "-R", f"blocks {path}", str(image)], capture_output=True, text=True, check=True
        ).stdout
        blocks = [
            block for at, size in found.places[path].extents for block in range(at // 4096, -(-(at + size) // 4096))
        ]
        assert set(blocks) <= {int(word) for word in told.split()}
        assert blocks


@pytest.mark.parametrize("seed", range(60))
def test_reading_what_we_wrote_gives_the_tree(seed: int, tmp_path: Path) -> None:
    tree = random_tree(seed)
    found = read(write(tree, tmp_path / "fs"))
    assert found.problems == ()
    assert everything(found.tree) == as_written(tree)


def test_acls_come_back_as_getxattr_gives_them(tmp_path: Path) -> None:
    rows = [(0x01, 7, -1), (0x02, 5, 1000), (0x04, 5, -1), (0x08, 4, 100_000), (0x10, 7, -1), (0x20, 5, -1)]
    acl = b"\2\0\0\0" + b"".join(struct.pack("<HHi", *row) for row in rows)
    entry = Entry(mode=stat.S_IFREG | 0o644, mtime_ns=0, xattrs={"system.posix_acl_access": acl})
    tree = Tree({"/": directory(mtime_ns=0), "/a": entry})
    assert read(write(tree, tmp_path / "fs")).tree["/a"].xattrs == entry.xattrs


def test_device_numbers_of_both_kinds_come_back(tmp_path: Path) -> None:
    tree = Tree(
        {
            "/": directory(mtime_ns=0),
            "/old": device(stat.S_IFCHR, 0o666, 255, 255),
            "/new": device(stat.S_IFBLK, 0o660, 4095, (1 << 20) - 1),
        }
    )
    found = read(write(tree, tmp_path / "fs")).tree
    assert [(found[path].major, found[path].minor) for path in ("/old", "/new")] == [(255, 255), (4095, (1 << 20) - 1)]


def test_a_file_with_many_pieces_is_read_through_all_depths_of_extents(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "holes").open("wb") as file:
        for number in range(3000):
            file.seek(number * 8192)
            file.write(b"%d" % number)
    found = read(mke2fs(source, tmp_path / "fs"))
    assert found.problems == ()
    assert b"".join(found.tree["/holes"].content.chunks()) == (source / "holes").read_bytes()


@pytest.mark.parametrize(
    ("bit", "name"),
    [(0x1, "compression"), (0x8000, "inline_data"), (0x10000, "encrypt"), (0x80000000, "0x80000000")],
    ids=["compression", "inline data", "encryption", "one that nobody knows"],
)
def test_a_feature_that_is_not_known_is_named(bit: int, name: str, tmp_path: Path) -> None:
    image = write(Tree({"/": directory()}), tmp_path / "fs")
    data = bytearray(image.read_bytes())
    data[1024 + 0x60 : 1024 + 0x64] = struct.pack("<I", 0x42 | bit)
    image.write_bytes(data)
    with pytest.raises(InputError, match=name):
        read(image)


def debugfs(image: Path, request: str) -> None:
    subprocess.run([command.find("debugfs"), "-w", "-R", request, str(image)], check=True, capture_output=True)


DAMAGE = {
    "an inode's mode": ("sif small mode 0", "small': its mode is 0"),
    "a link count": ("sif small links_count 7", "7 links, and has 1"),
    "a size": ("sif large size 99999999999999", "large': its size"),
    "a free block": ("freeb 700 5", "in use and marked as free"),
    "a used block": ("setb 15000 9", "marked as used by nobody"),
    "a lost inode": ("unlink small", "have no name"),
    "an inode that is free": ("freei small", "in use and marked as free"),
    "a superblock's count": ("ssv free_blocks_count 1", "1 blocks are free"),
    "an unclean state": ("ssv state 0", "not unmounted cleanly"),
    "a descriptor's count": ("set_bg 0 free_inodes_count 3", "3 inodes are free"),
}


@pytest.mark.parametrize(("request_", "sentence"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_said_in_a_sentence(request_: str, sentence: str, source: Path, tmp_path: Path) -> None:
    image = mke2fs(source, tmp_path / "fs", "-E", "lazy_itable_init=0")
    debugfs(image, request_)
    problems = read(image).problems
    assert any(re.search(sentence, problem) for problem in problems), problems


JOURNAL_DAMAGE = {
    "its magic number": (0, b"\0", "does not begin with a journal's superblock"),
    "a bit that nobody reads": (1000, b"\1", "its checksum is"),
    "its checksum": (0xFC, b"\0\1\2\3", "its checksum is"),
    "its blocks": (12, struct.pack(">I", 1024), "its blocks have 1024 bytes"),
    "its length": (16, struct.pack(">I", 5000), "it says that it has 5000 blocks, and has 1024"),
    "a start": (28, struct.pack(">I", 5), "it is not empty"),
}


@pytest.mark.parametrize(("at", "data", "sentence"), JOURNAL_DAMAGE.values(), ids=JOURNAL_DAMAGE)
def test_a_journal_that_no_kernel_would_take_is_said(at: int, data: bytes, sentence: str, tmp_path: Path) -> None:
    """The kernel refuses to mount then, and e2fsck finds it, too."""
    image = write(random_tree(1), tmp_path / "fs")
    found = read(image)
    assert found.problems == ()
    journal = next(region.offset for region in found.regions if region.name == "journal")
    with image.open("r+b") as file:
        file.seek(journal + at)
        file.write(data)
    problems = read(image).problems
    assert any(problem.startswith("the journal (inode 8): ") and sentence in problem for problem in problems), problems
    assert subprocess.run([command.find("e2fsck"), "-fn", image], check=False, capture_output=True).returncode != 0


def test_a_block_of_two_inodes_is_said_with_both(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a").write_bytes(b"a")
    (tmp_path / "source/b").write_bytes(b"b")
    image = mke2fs(tmp_path / "source", tmp_path / "fs")
    places = read(image).places
    block = places["/a"].extents[0][0] // 4096
    debugfs(image, f"sif b block[5] {block}")
    owners = {places["/a"].inode, places["/b"].inode}
    said = f"block {block} belongs to inode {min(owners)} and to inode {max(owners)}"
    assert said in read(image).problems


@pytest.fixture(scope="module")
def small_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A filesystem with checksums and everything in it, in 400 KiB."""
    root = tmp_path_factory.mktemp("small")
    (root / "d").mkdir()
    for number in range(60):
        (root / "d" / f"name {number}").write_bytes(b"%d" % number * number)
    (root / "slow").symlink_to("y" * 100)
    os.setxattr(root / "d", "user.large", b"v" * 900)
    with (root / "holes").open("wb") as file:
        for number in range(20):
            file.seek(number * 8192)
            file.write(b"%d" % number)
    return mke2fs(root, root.parent / "small.img", "-O", "^has_journal", "-N", "96", "-b", "1024", size="600k")


def test_the_small_image_is_whole(small_image: Path) -> None:
    assert read(small_image).problems == ()


def use(volume: Volume) -> None:
    """Everything that somebody would do with what was read."""
    for path, entry in volume.tree.items():
        assert volume.places[path].inode
        if entry.content.size < 1 << 24:
            for chunk in entry.content.chunks():
                assert chunk


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.integers(0, 600 * 1024 - 1), st.integers(1, 255)), min_size=1, max_size=8),
    early=st.booleans(),
)
def test_no_flipped_byte_makes_it_crash(
    flips: list[tuple[int, int]], early: bool, small_image: Path, tmp_path: Path
) -> None:
    data = bytearray(small_image.read_bytes())
    for at, bits in flips:
        data[(1024 + at % 40_000) if early else at] ^= bits
    damaged = tmp_path / "damaged"
    damaged.write_bytes(data)
    try:
        volume = read(damaged)
    except InputError:
        return
    use(volume)


@pytest.mark.parametrize("size", [0, 1, 1023, 1024, 2047, 2048, 3000, 8192, 40_000, 100_000, 300_000, 599_000])
def test_a_cut_is_said_and_nothing_crashes(size: int, small_image: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(small_image.read_bytes()[:size])
    try:
        volume = read(cut)
    except InputError:
        assert size < 2048
        return
    assert any("are there" in problem for problem in volume.problems)
    use(volume)


def test_every_flipped_bit_of_checked_metadata_is_noticed(small_image: Path, tmp_path: Path) -> None:
    """metadata_csum covers the superblock, descriptors, bitmaps and inodes: no flip there may go by."""
    clean = small_image.read_bytes()
    volume = read(small_image)
    damaged = tmp_path / "damaged"
    chance = random.Random(7)
    used = {place.inode for place in volume.places.values()}
    for region in volume.regions:
        for _ in range(25):
            at = region.offset + chance.randrange(region.size)
            if region.of == "inode" and region.first + (at - region.offset) // region.record not in used:
                continue
            data = bytearray(clean)
            data[at] ^= 1 << chance.randrange(8)
            damaged.write_bytes(data)
            with contextlib.suppress(InputError):
                assert read(damaged).problems, f"{region.name} at {at}"


def test_a_directory_in_itself_ends(source: Path, tmp_path: Path) -> None:
    image = mke2fs(source, tmp_path / "fs")
    debugfs(image, "link sub sub/dir/again")
    problems = read(image).problems
    assert any("a directory with two names" in problem for problem in problems)


def test_it_is_a_row_of_readers_that_recognises_what_we_write(tmp_path: Path) -> None:
    image = write(Tree({"/": directory()}), tmp_path / "fs")
    first = image.read_bytes()[:4096]
    assert recognise(first) == "ext4"
    assert recognise(first) in READERS
