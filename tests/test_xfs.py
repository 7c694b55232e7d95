"""XFS by mkfs.xfs: xfs_repair and xfs_db read what should be there, and what cannot be exact is refused by name."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import time
from pathlib import Path

import pytest

from osbuild.errors import CommandError, InputError, SpecError
from osbuild.filesystem import xfs
from osbuild.filesystem.base import Room
from osbuild.tree import Bytes, Draft, Entry, Tree, device, directory, regular, symlink

pytestmark = pytest.mark.xdist_group("xfs")  # each filesystem has 300 MiB, mostly holes
LATE_NS = 4_102_444_800 * 1_000_000_000 + 7  # the year 2100


def tree(entries: dict[str, Entry]) -> Tree:
    draft = Draft()
    for path, entry in entries.items():
        draft.put(path, entry)
    return draft.tree()


def every_kind() -> Tree:
    entries: dict[str, Entry] = {"/": directory(0o1777, mtime_ns=5)}
    for number in range(9):
        home = f"/d{number}"
        entries[home] = directory(0o2750, uid=number, gid=(1 << 32) - 2, mtime_ns=number)
        for file in range(400 if number == 0 else 12):
            entries[f"{home}/f{file}"] = Entry(
                mode=stat.S_IFREG | 0o4751, uid=1000 + file, gid=number, mtime_ns=-1000 - file,
                content=Bytes(bytes([file % 256]) * (file * 37)),
            )  # fmt: skip
        entries[f"{home}/link"] = symlink("x" * 300, mtime_ns=LATE_NS)
        entries[f"{home}/tty"] = device(stat.S_IFCHR, 0o620, 5, 70000)
        entries[f"{home}/disk"] = device(stat.S_IFBLK, 0o660, 259, 3)
        entries[f"{home}/pipe"] = Entry(mode=stat.S_IFIFO | 0o600, uid=3)
        entries[f"{home}/socket"] = Entry(mode=stat.S_IFSOCK | 0o600)
        entries[f"{home}/empty"] = regular(b"")
        entries[f"{home}/sub/deep/a"] = regular(b"a" * 5000)
    entries["/name-\udcff-é"] = regular(b"bytes")
    return tree(entries)


def made(image: Tree, out: Path, *, epoch: int = 77) -> xfs.Plan:
    plan = xfs.plan(image, start=0, epoch=epoch)
    descriptor = os.open(out, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.ftruncate(descriptor, plan.size)
        plan.write(descriptor, 0)
    finally:
        os.close(descriptor)
    return plan


def xfs_db(image: Path, *commands: str) -> str:
    words = [word for command in commands for word in ("-c", command)]
    found = subprocess.run(
        ["/usr/sbin/xfs_db", "-r", *words, str(image)], check=True, capture_output=True, env={"TZ": "UTC"}
    )
    return found.stdout.decode(errors="surrogateescape")


def test_xfs_repair_finds_nothing_to_repair(tmp_path: Path) -> None:
    made(every_kind(), tmp_path / "fs")
    subprocess.run(["/usr/sbin/xfs_repair", "-n", "-f", str(tmp_path / "fs")], check=True, capture_output=True)


def test_xfs_db_reads_every_inode_as_it_should_be(tmp_path: Path) -> None:
    image = every_kind()
    plan = made(image, tmp_path / "fs")
    seen = 0
    for path, entry in image.items():
        if path in plan.skipped or "\udcff" in path:
            continue
        seen += 1
        fields = "print core.mode core.uid core.gid core.mtime.sec core.mtime.nsec core.size v3.crc"
        said = xfs_db(tmp_path / "fs", f"path {path}", fields, *(["print u3.dev"] if entry.is_device else []))
        found = dict(re.findall(r"^(\S+) = (.*)$", said, re.MULTILINE))
        mtime = 77_000_000_000 if entry.mtime_ns is None else entry.mtime_ns
        moment = time.strftime("%a %b %e %H:%M:%S %Y", time.gmtime(mtime // 1_000_000_000))
        assert int(found["core.mode"], 8) == entry.mode, path
        assert (found["core.uid"], found["core.gid"]) == (str(entry.uid), str(entry.gid)), path
        assert (found["core.mtime.sec"], found["core.mtime.nsec"]) == (moment, str(mtime % 1_000_000_000)), path
        assert found["v3.crc"].endswith("(correct)"), path
        if entry.is_file:
            assert int(found["core.size"]) == entry.content.size, path
        if entry.is_device:
            assert int(found["u3.dev"], 16) == entry.major << 18 | entry.minor, path
    assert seen > 500


def test_contents_are_where_xfs_db_finds_them(tmp_path: Path) -> None:
    image = every_kind()
    made(image, tmp_path / "fs")
    bytes_of = (tmp_path / "fs").read_bytes()
    blocks = int(re.findall(r"agblocks = (\d+)", xfs_db(tmp_path / "fs", "sb 0", "print agblocks"))[0])
    for path in ("/d0/f399", "/d3/f11", "/d8/sub/deep/a"):
        extents = re.findall(r"startblock \d+ \((\d+)/(\d+)\)", xfs_db(tmp_path / "fs", f"path {path}", "bmap"))
        assert len(extents) == 1
        start = (int(extents[0][0]) * blocks + int(extents[0][1])) * xfs.BLOCK
        data = b"".join(image[path].content.chunks())
        assert bytes_of[start : start + len(data)] == data


def test_two_runs_are_the_same_bytes_at_different_times(tmp_path: Path) -> None:
    made(every_kind(), tmp_path / "one")
    time.sleep(1.1)
    made(every_kind(), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.slow
def test_many_inodes_need_more_than_one_level(tmp_path: Path) -> None:
    entries = {f"/d{number % 7}/{number}": regular(b"", mtime_ns=number) for number in range(70_000)}
    made(tree(entries), tmp_path / "fs")
    said = xfs_db(tmp_path / "fs", "path /d6/69999", "print core.mtime.nsec")
    assert said == "core.mtime.nsec = 69999\n"
    levels = [xfs_db(tmp_path / "fs", f"agi {number}", "print level") for number in range(4)]
    assert "level = 2\n" in levels


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"/a b": regular(b"")}, "cannot be told this name"),
        ({"/a\nb": regular(b"")}, "cannot be told this name"),
        ({"/$": regular(b"")}, "cannot be told this name"),
        ({"/:x": directory()}, "cannot be told this name"),
        ({"/l": symlink("two words")}, "cannot be told the target"),
        ({"/l": symlink("t" * 1025)}, "1025 bytes, not 1 to 1024"),
        ({"/x": Entry(mode=stat.S_IFREG | 0o644, xattrs={"user.k": b"v"})}, "no extended attributes"),
        (dict.fromkeys(("/one", "/two"), regular(b"x")), "'/one' and '/two': mkfs.xfs makes no hard links"),
    ],
)
def test_what_a_protofile_cannot_say_is_refused_by_name(entries: dict[str, Entry], words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        xfs.plan(tree(entries), start=0, epoch=0)


def test_sizes_are_as_asked_for_or_refused(tmp_path: Path) -> None:
    image = tree({"/f": regular(b"x")})
    assert xfs.plan(image, start=0, epoch=0, room=Room(size=1 << 30)).size == 1 << 30
    free = xfs.plan(image, start=0, epoch=0, room=Room(free=1 << 30)).size
    assert free > 1 << 30
    with pytest.raises(SpecError, match="needs 314572800 bytes"):
        xfs.plan(image, start=0, epoch=0, room=Room(size=100 << 20))


def test_mkfs_that_fails_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = tmp_path / "mkfs.xfs"
    stub.write_text("#!/bin/sh\necho no space; exit 1\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(CommandError, match=r"mkfs\.xfs"):
        made(tree({"/f": regular(b"x")}), tmp_path / "fs")
