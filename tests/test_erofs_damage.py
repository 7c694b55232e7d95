"""The erofs reader, and what nobody should have written: damage is told, and nothing worse comes of it."""

from __future__ import annotations

import contextlib
import os
import random
import struct
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild.errors import InputError
from osbuild.filesystem import Volume
from osbuild.filesystem import erofs_format as disk
from osbuild.tree import Sparse, Spool, Tree, regular, symlink
from tests.test_erofs_reader import EPOCH, MIB, assert_same, draft, image_of, mkfs, read


def use(volume: Volume) -> None:
    """Everything that others do with a volume."""
    volume.tree.digest()
    assert "/" in volume.tree
    assert set(volume.places) == set(volume.tree)
    assert all(problem.isprintable() for problem in volume.problems)


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Images with everything in them, small enough for hits to be felt."""
    home = tmp_path_factory.mktemp("victims")
    spool = Spool()
    spool.append(b"data" * 1000)
    xattrs = {"user.a": b"b" * 40, "security.c": b"d"}
    files = {f"d{n % 3}__f{n}": replace(regular(b"x" * n * 90), xattrs=xattrs, uid=n) for n in range(60)}
    files |= {f"many__{n:x}".ljust(40, "~"): regular(b"") for n in range(150)}
    files["sparse"] = regular(Sparse(spool, 9 * MIB, ((0, 0, 4000), (8 * MIB, 0, 4000))))
    files |= {"link": symlink("target"), "long": symlink("t" * 4090)}
    for way in (True, False):
        image_of(draft(**files), home / f"{way}", dax=way)
    small = home / "small"
    (small / "below").mkdir(parents=True)
    os.mkfifo(small / "pipe")
    (small / "small").write_bytes(b"s" * 100)
    (small / "file").write_bytes(bytes(range(1, 242)) * 17)
    mkfs(home / "theirs", small, "--chunksize=4096")
    return [(home / name).read_bytes() for name in ("True", "False", "theirs")]


@pytest.mark.slow
@settings(
    max_examples=400, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
@given(chance=st.randoms(use_true_random=False), which=st.integers(0, 2))
def test_damage_is_told_and_nothing_worse(
    chance: random.Random, which: int, victims: list[bytes], tmp_path: Path
) -> None:
    data = bytearray(victims[which])
    metadata = min(len(data), 24 * 4096)
    for _ in range(chance.choice((1, 1, 2, 5, 50))):
        at = chance.choice((chance.randrange(1024, 1152), chance.randrange(metadata), chance.randrange(1152, 8192)))
        kind = chance.randrange(4)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            data[at : at + 4] = chance.choice((bytes(4), b"\xff" * 4, b"\x80\0\0\0", b"\0\0\0\x80"))
        elif kind == 2:
            data[at] = chance.randrange(256)
        else:
            here = chance.randrange(metadata)
            data[at : at + 32] = data[here : here + 32]
    data[1024:1028] = disk.MAGIC.to_bytes(4, "little")
    if chance.random() < 0.1:
        del data[chance.randrange(len(data)) :]
    (tmp_path / "fs").write_bytes(data)
    with contextlib.suppress(InputError):
        use(read(tmp_path / "fs"))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_image_that_is_cut_off_anywhere_is_told(which: int, victims: list[bytes], tmp_path: Path) -> None:
    data = victims[which]
    for size in (0, 1, 1023, 1024, 1151, 1152, 4095, 4096, 4097, 8192, len(data) // 2, len(data) - 4096):
        (tmp_path / "fs").write_bytes(data[:size])
        try:
            assert read(tmp_path / "fs").problems
        except InputError:
            continue


class Patched:
    """An image of ours, to be damaged on purpose."""

    def __init__(self, path: Path, tree: Tree, *, dax: bool = True) -> None:
        self.path = path
        image_of(tree, path, dax=dax)
        self.before = read(path)
        self.before.tree.digest()  # while the file is still what it was
        self.data = bytearray(path.read_bytes())

    def inode(self, path: str) -> int:
        return self.before.places[path].inode * 32

    def put(self, at: int, form: str, *values: int) -> None:
        struct.pack_into(form, self.data, at, *values)

    def replace(self, old: bytes, new: bytes) -> None:
        assert self.data.count(old) == 1
        self.data[:] = self.data.replace(old, new)

    def read(self) -> Volume:
        self.path.write_bytes(self.data)
        return read(self.path)


@pytest.fixture
def patched(tmp_path: Path) -> Patched:
    xattrs = {"user.a": b"1", "user.name": b"value"}
    tree = draft(
        aa=regular(b"x" * 5000, mtime_ns=1), bb=replace(regular(b"", mtime_ns=1), xattrs=xattrs), cc=symlink("there"),
        dir__sub__file=regular(b"y"), dir__other=regular(b"z", mtime_ns=1),
    )  # fmt: skip
    return Patched(tmp_path / "fs", tree)


def dirent(patched: Patched, path: str) -> int:
    """Where the entry of a path in `/` is: its block begins behind the root's inode."""
    at = patched.inode("/") + (32 if patched.before.tree["/"].mtime_ns == EPOCH * 10**9 else 64)
    names = sorted([".", "..", *(name[1:] for name in patched.before.tree if name.count("/") == 1 and name != "/")])
    return at + 12 * names.index(path[1:])


def test_a_wrong_checksum_is_a_problem_only(patched: Patched) -> None:
    patched.data[2000] ^= 1
    volume = patched.read()
    assert len(volume.problems) == 1
    assert "checksum" in volume.problems[0]
    assert_same(volume.tree, patched.before.tree)


@pytest.mark.parametrize(
    ("at", "form", "value", "rule"),
    [
        (12, "<B", 16, "2^16"),
        (90, "<B", 1, "blocks of"),
        (80, "<I", 0x80, "does not know: 0x80"),
        (86, "<H", 2, "2 other devices"),
        (14, "<H", 0xFFFF, "root of this erofs"),
        (0, "<I", 1, "no erofs"),
    ],
)
def test_an_erofs_that_cannot_be_read_at_all_is_refused(
    at: int, form: str, value: int, rule: str, patched: Patched
) -> None:
    patched.put(1024 + at, form, value)
    with pytest.raises(InputError) as caught:
        patched.read()
    assert rule in str(caught.value)


@pytest.mark.parametrize(
    ("path", "at", "form", "value", "rule"),
    [
        ("/aa", 0, "<H", 0x11, "unknown format 0x11"),
        ("/aa", 0, "<H", 1 | 1 << 1, "compressed"),
        ("/aa", 0, "<H", 1 | 7 << 1, "unknown layout 7"),
        ("/aa", 4, "<H", 0o644, "no kind of file"),
        ("/aa", 8, "<Q", 1 << 60, "more than a file may have"),
        ("/aa", 8, "<Q", 1 << 35, "not in the filesystem"),
        ("/aa", 16, "<I", 1 << 31, "not in the filesystem"),
        ("/aa", 24, "<I", 0xFFFFFFFF, "nobody's number"),
        ("/aa", 40, "<I", 10**9, "1000000000 ns"),
        ("/aa", 2, "<H", 0xFFFF, "not in the filesystem"),
        ("/bb", 64 + 4, "<B", 200, "200 shared attributes"),
        ("/bb", 64 + 12, "<B", 255, "cut off"),
        ("/bb", 64 + 13, "<B", 5, "unknown prefix 5"),
        ("/bb", 64 + 13, "<B", 2, "cannot be called"),
        ("/bb", 2, "<H", 1, ""),
        ("/cc", 8, "<Q", 0, "a path of 0 bytes"),
        ("/cc", 8, "<Q", 5000, "a path of 5000 bytes"),
        ("/cc", 64, "<H", 0, "NUL"),
        ("/dir/other", 0, "<H", 1 | 2 << 1, ""),
    ],
)
def test_a_damaged_inode_is_left_out_and_named(
    path: str, at: int, form: str, value: int, rule: str, patched: Patched
) -> None:
    patched.put(patched.inode(path) + at, form, value)
    volume = patched.read()
    if not rule:  # another way to say something
        use(volume)
        return
    assert any(quoted(path) in problem and rule in problem for problem in volume.problems), volume.problems
    assert list(volume.tree) == [name for name in patched.before.tree if name != path]


def quoted(path: str) -> str:
    return f"'{path}'"


def test_a_wrong_number_of_links_is_named(patched: Patched) -> None:
    patched.put(patched.inode("/aa") + 44, "<I", 9)
    assert any("9 links, but 1 names" in problem for problem in patched.read().problems)


def test_a_directory_in_itself_is_no_endless_way(patched: Patched) -> None:
    patched.put(dirent(patched, "/dir"), "<Q", patched.before.places["/"].inode)
    volume = patched.read()
    assert "'/dir': a directory with two names" in volume.problems
    assert list(volume.tree) == ["/", "/aa", "/bb", "/cc"]


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        (b"aabbccdir", b"aabbc/dir", "a name that no file can have"),
        (b"aabbccdir", b"aabb\0cdir", "a name that no file can have"),
        (b"aabbccdir", b"bbaaccdir", "where nobody finds it"),
        (b"aabbccdir", b"aaaaccdir", "twice in its directory"),
        (b"...aabbcc", b".xxaabbcc", "no '..' in it"),
    ],
)
def test_names_that_cannot_be_are_problems(old: bytes, new: bytes, rule: str, patched: Patched) -> None:
    patched.replace(old, new)
    volume = patched.read()
    assert any(rule in problem for problem in volume.problems), volume.problems
    use(volume)


@pytest.mark.parametrize("start", [0, 11, 13, 4096 - 4, 0xFFFF])
def test_names_that_begin_nowhere_are_a_problem_of_their_directory(start: int, patched: Patched) -> None:
    patched.put(dirent(patched, "/.") + 8, "<H", start)
    volume = patched.read()
    assert any(problem.startswith("'/': a block whose names begin at") for problem in volume.problems)
    assert list(volume.tree) == ["/"]


def test_directories_that_share_their_blocks_are_refused_before_they_multiply(tmp_path: Path) -> None:
    files = {f"d{n:04}__x": regular(b"") for n in range(2000)} | {
        f"big__{n:05}".ljust(200, "~"): regular(b"") for n in range(5000)
    }
    image = Patched(tmp_path / "fs", draft(**files))
    big = image.inode("/big")
    for number in range(2000):
        at = image.inode(f"/d{number:04}")
        image.data[at : at + 32] = image.data[big : big + 32]
    with pytest.raises(InputError, match="directories of this erofs are larger than itself"):
        image.read()


@pytest.mark.slow
def test_shared_attributes_cannot_take_all_memory(tmp_path: Path) -> None:
    own = {f"user.{n:03}": b"v" * 60_000 for n in range(4)}
    image_of(draft(**{f"f{n:05}": replace(regular(b""), xattrs=own) for n in range(3000)}), tmp_path / "fs")
    assert (tmp_path / "fs").stat().st_size < MIB
    with pytest.raises(InputError, match="bytes of memory"):
        read(tmp_path / "fs")


def test_chunk_maps_in_one_place_are_refused_before_they_multiply(tmp_path: Path) -> None:
    spool = Spool()
    hole = Sparse(spool, 60 << 30, ())
    tree = draft(**{f"f{n:03}": regular(hole) for n in range(20)})
    tree._digest = "00" * 32  # of a terabyte, otherwise
    image_of(tree, tmp_path / "fs")
    assert read(tmp_path / "fs").problems == ()
    data = bytearray((tmp_path / "fs").read_bytes())
    for path, place in read(tmp_path / "fs").places.items():
        if path != "/":  # four times as many chunks: each map lies over those that follow it
            assert struct.unpack_from("<H", data, place.inode * 32 + 16) == (9,)
            struct.pack_into("<H", data, place.inode * 32 + 16, 7)
    (tmp_path / "fs").write_bytes(data)
    problems = read(tmp_path / "fs").problems
    assert any("maps of all chunks" in problem or "not in the filesystem" in problem for problem in problems)
