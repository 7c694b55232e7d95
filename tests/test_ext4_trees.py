"""Trees of every kind through the ext4 writer: e2fsck finds nothing, debugfs finds each field of each path."""

from __future__ import annotations

import re
import stat
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osbuild import command
from osbuild.filesystem import ext4
from osbuild.filesystem.base import NO_ROOM, Room
from osbuild.tree import Entry, Tree
from tests.random_trees import forest, random_tree
from tests.test_ext4 import EPOCH, check

MIB: Final = 1 << 20
TREES: Final = 1000
_SECONDS: Final = (-(1 << 31), (1 << 34) - (1 << 31) - 1)
ROOMS: Final = (
    NO_ROOM, Room(writable=True), Room(free=MIB), Room(writable=True, free=200 * MIB), Room(size=64 * MIB),
    Room(writable=True, size=300 * MIB + 4096),
)  # fmt: skip
_TYPES: Final = {
    "regular": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK, "FIFO": stat.S_IFIFO,
    "character special": stat.S_IFCHR, "block special": stat.S_IFBLK,
}  # fmt: skip
_STAT: Final = re.compile(
    rb"Inode: (\d+) +Type: (.+?) +Mode: +(\d+) .*?User: +(-?\d+) +Group: +(-?\d+) .*?Size: (\d+)\n.*?Links: (\d+) "
    rb".*? mtime: 0x([0-9a-f]+):([0-9a-f]+)",
    re.DOTALL,
)


def write(tree: Tree, path: Path, start: int, room: Room = NO_ROOM, *, dax: bool = True) -> None:
    plan = ext4.plan(tree, start=start, epoch=EPOCH, dax=dax, room=room)
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(plan.size)
        plan.write(file.fileno(), 0)


def kept(tree: Tree) -> dict[str, Entry]:
    return {path: entry for path, entry in tree.items() if not stat.S_ISSOCK(entry.mode)}


def asked(image: Path, work: Path, requests: list[bytes]) -> list[bytes]:
    """What debugfs says to each of many requests."""
    (work / "requests").write_bytes(b"".join(request + b"\n" for request in requests))
    done = subprocess.run(
        [command.find("debugfs"), "-f", str(work / "requests"), str(image)], capture_output=True, check=True
    )
    parts = done.stdout.split(b"debugfs: ")
    assert len(parts) == len(requests) + 1, done.stderr
    return [part.partition(b"\n")[2] for part in parts[1:]]


def numbers_of(tree: Tree) -> dict[str, int]:
    """Inode numbers, in the order of first paths: how the writer gives them, whatever bytes names have."""
    known: dict[Entry, int] = {}
    following = 11
    found = {}
    for path, entry in kept(tree).items():
        if entry not in known:
            known[entry] = 2 if path == "/" else following
            following += path != "/"
        found[path] = known[entry]
    return found


def fields(entry: Entry, links: int) -> tuple[int, ...]:
    seconds, rest = divmod(EPOCH * 10**9 if entry.mtime_ns is None else entry.mtime_ns, 10**9)
    low, high = _SECONDS
    if not low <= seconds <= high:
        seconds, rest = min(max(seconds, low), high), 0
    return entry.mode, entry.uid, entry.gid, links, seconds, rest


def fields_seen(said: bytes) -> tuple[int, ...]:
    match = _STAT.search(said)
    assert match is not None, said
    _, kind, mode, uid, gid, _, links, low, extra = match.groups()
    seconds = struct.unpack("<i", struct.pack("<I", int(low, 16)))[0] + ((int(extra, 16) & 3) << 32)
    return (
        _TYPES[kind.decode()] | int(mode, 8), int(uid) & 0xFFFFFFFF, int(gid) & 0xFFFFFFFF, int(links), seconds,
        int(extra, 16) >> 2,
    )  # fmt: skip


def differences(tree: Tree, image: Path, work: Path) -> Iterator[str]:
    """Every path that debugfs sees in another way than the tree has it, asked for by inode."""
    paths, numbers = kept(tree), numbers_of(tree)
    names: dict[int, int] = {}
    for path, entry in paths.items():
        above = path.rpartition("/")[0] or "/"
        names[numbers[path]] = names.get(numbers[path], 0) + (2 if entry.is_dir else 1)
        if entry.is_dir and path != "/":
            names[numbers[above]] += 1
    first = {number: path for path, number in reversed(numbers.items())}
    numbered = sorted(first)
    for number, said in zip(numbered, asked(image, work, [b"stat <%d>" % one for one in numbered]), strict=True):
        entry = paths[first[number]]
        wanted, seen = fields(entry, names[number]), fields_seen(said)
        if wanted != seen:
            yield f"{first[number]!a}: {seen} instead of {wanted}"
        size = re.search(rb"Size: (\d+)", said)
        if entry.is_file and size is not None and int(size[1]) != entry.content.size:
            yield f"{first[number]!a}: size {size[1]!r}"
        if b"Device major/minor" in said and b"%02d:%02d" % (entry.major, entry.minor) not in said:
            yield f"{first[number]!a}: another device"
    yield from _contents(paths, first, image, work)
    yield from _names(paths, numbers, image, work)


def _contents(paths: dict[str, Entry], first: dict[int, str], image: Path, work: Path) -> Iterator[str]:
    files = [number for number, path in sorted(first.items()) if paths[path].is_file]
    requests = [b"dump <%d> %s/%d" % (number, bytes(work), number) for number in files]
    asked(image, work, requests)
    for number in files:
        copy = work / str(number)
        if copy.read_bytes() != b"".join(paths[first[number]].content.chunks()):
            yield f"{first[number]!a}: other bytes"
        copy.unlink()


def _names(paths: dict[str, Entry], numbers: dict[str, int], image: Path, work: Path) -> Iterator[str]:
    """What each directory lists: the numbers of what is in it."""
    children: dict[str, list[int]] = {path: [] for path, entry in paths.items() if entry.is_dir}
    for path, number in numbers.items():
        if path != "/":
            children[path.rpartition("/")[0] or "/"].append(number)
    said = asked(image, work, [b"ls -p <%d>" % numbers[path] for path in children])
    for (path, inside), told in zip(children.items(), said, strict=True):
        seen = [int(number) for number in re.findall(rb"^/(\d+)/\d{6}/", told, re.MULTILINE)]
        above = numbers[path.rpartition("/")[0] or "/"]
        if sorted(seen) != sorted([*inside, numbers[path], above]):
            yield f"{path!a}: lists {len(seen) - 2} entries of {len(inside)}"


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(1 << 20, 1 << 40), start=st.integers(0, 1024), room=st.sampled_from(ROOMS), dax=st.booleans(),
)  # fmt: skip
def test_any_tree_in_any_room_is_clean(
    seed: int, start: int, room: Room, dax: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    image = tmp_path_factory.getbasetemp() / "any.fs"
    write(random_tree(seed), image, start * 4096, room, dax=dax)
    check(image)
    image.unlink()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1 << 40), room=st.sampled_from(ROOMS))
def test_debugfs_sees_the_tree_that_was_written(
    seed: int, room: Room, tmp_path_factory: pytest.TempPathFactory
) -> None:
    work = tmp_path_factory.mktemp("seen")
    tree = random_tree(seed)
    write(tree, work / "fs", MIB, room)
    assert list(differences(tree, work / "fs", work)) == []
    (work / "fs").unlink()


def test_debugfs_sees_a_forest(tmp_path: Path) -> None:
    tree = forest(range(12))
    write(tree, tmp_path / "fs", MIB)
    check(tmp_path / "fs")
    assert list(differences(tree, tmp_path / "fs", tmp_path)) == []


def test_the_comparison_notices_another_tree(tmp_path: Path) -> None:
    write(forest([3]), tmp_path / "fs", MIB)
    other = Tree({
        path: Entry(
            mode=entry.mode, uid=7, gid=entry.gid, mtime_ns=entry.mtime_ns, target=entry.target, major=entry.major,
            minor=entry.minor, content=entry.content,
        ) if path == "/init" else entry
        for path, entry in forest([3]).items()
    })  # fmt: skip
    told = list(differences(other, tmp_path / "fs", tmp_path))
    assert len(told) == 1
    assert told[0].startswith("'/init': ")


@pytest.mark.slow
def test_a_thousand_trees_are_clean(tmp_path: Path) -> None:
    for seed in range(TREES):
        write(random_tree(seed), tmp_path / "fs", seed * 4096, ROOMS[seed % len(ROOMS)])
        check(tmp_path / "fs")
