"""ext4 with room: exact sizes, free space, and a kernel that writes to it and leaves it clean."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from osbuild import command
from osbuild.errors import SpecError
from osbuild.filesystem import ext4
from osbuild.filesystem.base import NO_ROOM, Room
from osbuild.tree import Draft, Tree, regular
from tests.test_ext4 import EPOCH, START, check

MIB = 1 << 20


def tree() -> Tree:
    made = Draft()
    for number in range(300):
        made.put(f"/d/name-{number}", regular(b"x" * (number * 50)))
    made.put("/large", regular(b"y" * (3 * MIB)))
    return made.tree()


def made(room: Room, path: Path) -> dict[str, str]:
    """Write it; what dumpe2fs says of it."""
    plan = ext4.plan(tree(), start=START, epoch=EPOCH, room=room)
    with path.open("wb") as file:
        file.truncate(plan.size)
        plan.write(file.fileno(), 0)
    check(path)
    told = subprocess.run([command.find("dumpe2fs"), "-h", str(path)], capture_output=True, text=True, check=True)
    return dict(re.findall(r"^([A-Z][^:]+): +(.*)$", told.stdout, re.MULTILINE)) | {"size": str(plan.size)}


def test_for_reading_nothing_is_free(tmp_path: Path) -> None:
    told = made(NO_ROOM, tmp_path / "fs")
    assert int(told["Free inodes"]) < 16
    assert int(told["Free blocks"]) < 512, "only what alignment leaves"


@pytest.mark.parametrize("free", [4096, 5 * MIB, 200 * MIB, 3 << 30])
def test_at_least_as_much_is_free_as_was_asked_for(free: int, tmp_path: Path) -> None:
    told = made(Room(free=free), tmp_path / "fs")
    found = int(told["Free blocks"]) * 4096
    assert free <= found < free + 8 * MIB
    assert int(told["Free inodes"]) >= free // 16384
    assert (tmp_path / "fs").stat().st_blocks * 512 < 16 * MIB, "free space is a hole"


@pytest.mark.parametrize("size", [16 * MIB, 128 * MIB, 128 * MIB + 4096, 2 << 30, 20 << 30])
def test_the_size_is_the_one_asked_for(size: int, tmp_path: Path) -> None:
    told = made(Room(size=size), tmp_path / "fs")
    assert int(told["size"]) == size
    assert int(told["Block count"]) == size // 4096


def test_too_small_a_size_is_refused_with_both_numbers() -> None:
    with pytest.raises(SpecError, match=r"ext4 needs \d+ bytes for this tree; 4194304 are given"):
        ext4.plan(tree(), start=START, epoch=EPOCH, room=Room(size=4 * MIB))


def test_free_space_counts_in_a_size_that_was_asked_for() -> None:
    with pytest.raises(SpecError, match="ext4 needs"):
        ext4.plan(tree(), start=START, epoch=EPOCH, room=Room(size=64 * MIB, free=64 * MIB))


@pytest.mark.parametrize(
    ("size", "journal"),
    [(64 * MIB, "4096k"), (512 * MIB, "16M"), (3 << 29, "32M"), (2 << 30, "64M"), (8 << 30, "64M"), (20 << 30, "128M")],
)
def test_what_is_written_to_has_a_journal_as_mke2fs_makes_it(size: int, journal: str, tmp_path: Path) -> None:
    told = made(Room(writable=True, size=size), tmp_path / "fs")
    theirs = tmp_path / "theirs"
    with theirs.open("wb") as file:
        file.truncate(size)
    subprocess.run([command.find("mke2fs"), "-q", "-t", "ext4", "-b", "4096", str(theirs)], check=True)
    said = subprocess.run([command.find("dumpe2fs"), "-h", str(theirs)], capture_output=True, text=True, check=True)
    assert told["Total journal size"] == journal
    assert f"Total journal size:       {journal}" in said.stdout
    assert int(told["Free inodes"]) >= size // 16384


def many(files: int, size: int) -> Tree:
    made = Draft()
    for number in range(files):
        made.put(f"/{number % 100}/{number}", regular(b"x" * size))
    return made.tree()


@pytest.mark.parametrize("writable", [False, True], ids=["for reading", "to write"])
@pytest.mark.parametrize(
    ("files", "size"), [pytest.param(60_000, 0, marks=pytest.mark.slow), (3000, 30_000), (26_000, 0)]
)
def test_the_size_that_a_refusal_names_suffices(files: int, size: int, writable: bool, tmp_path: Path) -> None:
    full = many(files, size)
    with pytest.raises(SpecError) as caught:
        ext4.plan(full, start=START, epoch=EPOCH, room=Room(size=8 * MIB, writable=writable))
    needed = int(re.findall(r"needs (\d+) bytes", str(caught.value))[0])
    with pytest.raises(SpecError, match=f"needs {needed} bytes"):
        ext4.plan(full, start=START, epoch=EPOCH, room=Room(size=needed - 4096, writable=writable))
    plan = ext4.plan(full, start=START, epoch=EPOCH, room=Room(size=needed, writable=writable))
    assert plan.size == needed
    with (tmp_path / "fs").open("wb") as file:
        file.truncate(plan.size)
        plan.write(file.fileno(), 0)
    check(tmp_path / "fs")


@pytest.mark.parametrize("files", [26_000, 32_640])
def test_inodes_to_spare_are_as_many_as_a_group_still_has(files: int, tmp_path: Path) -> None:
    plan = ext4.plan(many(files, 0), start=START, epoch=EPOCH, room=Room(size=128 * MIB, writable=True))
    with (tmp_path / "fs").open("wb") as file:
        file.truncate(plan.size)
        plan.write(file.fileno(), 0)
    check(tmp_path / "fs")
    told = subprocess.run(
        [command.find("dumpe2fs"), "-h", str(tmp_path / "fs")], capture_output=True, text=True, check=True
    )
    assert re.findall(r"Inode count: +(\d+)", told.stdout) == ["32768"]


def test_metadata_of_much_free_space_takes_little_memory() -> None:
    plan = ext4.plan(tree(), start=START, epoch=EPOCH, room=Room(size=1 << 40, writable=True))
    distinct = {id(data): len(data) for _, data in plan.metadata}
    assert sum(distinct.values()) < 4 * MIB, "8192 groups share the bitmaps that are alike"
