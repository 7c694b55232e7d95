"""The initramfs as others read it: cpio (under fakeroot, for owners and devices), bsdtar, lsinitramfs, lz4, zstd."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild import initrd
from osbuild.artifacts import Rootfs
from osbuild.initrd import build_initrd
from osbuild.tree import Draft, Entry, Sparse, Spool, Tree, directory, regular, symlink

SECOND: Final = 10**9
LAST: Final = (1 << 32) - 1

# Prints what lies below here: path in hex, kind and permissions, owner, seconds, size, target, device, digest, inode.
LOOK: Final = """
import hashlib, json, os, stat
def look(path):
    found = os.lstat(path)
    row = {"path": path.hex(), "mode": found.st_mode, "uid": found.st_uid, "gid": found.st_gid,
           "seconds": int(found.st_mtime), "inode": found.st_ino, "target": "", "device": 0, "sha256": ""}
    if stat.S_ISLNK(found.st_mode):
        row["target"] = os.readlink(path).hex()
    if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        row["device"] = found.st_rdev
    if stat.S_ISREG(found.st_mode):
        with open(path, "rb") as file:
            row["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    print(json.dumps(row))
    if stat.S_ISDIR(found.st_mode):
        for name in os.listdir(path):
            look(name if path == b"." else path + b"/" + name)
look(b".")
"""
PROGRAMS: Final = {"zstd": ["zstd", "-dcq"], "gzip": ["gzip", "-dc"], "lz4": ["lz4", "-dcq"], "none": ["cat"]}


def rootfs_of(tree: Tree) -> Rootfs:
    return Rootfs(tree=tree, init="/init", epoch=0)


def unpacked(archive: Path) -> list[dict[str, Any]]:
    """What GNU cpio makes of it, a row for each path. Extracted beside everything else: paths may be long."""
    home = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))
    try:
        script = 'cpio -idmu --quiet < "$1" && exec "$2" -I -c "$3"'
        done = subprocess.run(
            ["fakeroot", "sh", "-c", script, "sh", str(archive), sys.executable, LOOK],
            cwd=home, capture_output=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        return [json.loads(line) for line in done.stdout.splitlines()]
    finally:
        subprocess.run(["chmod", "-R", "u+rwx", str(home)], check=True)
        subprocess.run(["rm", "-rf", str(home)], check=True)


def expected(tree: Tree) -> dict[bytes, dict[str, Any]]:
    """The same rows, from the tree."""
    rows = {}
    for path, entry in tree.items():
        if stat.S_ISSOCK(entry.mode):
            continue
        rows[os.fsencode(path[1:] or ".")] = {
            "mode": entry.mode, "uid": entry.uid, "gid": entry.gid,
            "seconds": min(max((entry.mtime_ns or 0) // SECOND, 0), LAST),
            "target": os.fsencode(entry.target).hex(),
            "device": os.makedev(entry.major, entry.minor) if entry.is_device else 0,
            "sha256": hashlib.sha256(b"".join(entry.content.chunks())).hexdigest() if entry.is_file else "",
        }  # fmt: skip
    return rows


def compare(tree: Tree, archive: Path) -> None:
    rows = {bytes.fromhex(row.pop("path")): row for row in unpacked(archive)}
    wanted_rows = expected(tree)
    for path, row in rows.items():
        # cpio leaves the time to symbolic links and directories, and all to the directory that it starts in: those
        # are bsdtar's part.
        if stat.S_IFMT(row["mode"]) in (stat.S_IFLNK, stat.S_IFDIR):
            row["seconds"] = wanted_rows[path]["seconds"]
        if path == b".":
            row |= {name: wanted_rows[path][name] for name in ("mode", "uid", "gid")}
    inodes: dict[int, set[str]] = {}
    for path, row in rows.items():
        inodes.setdefault(row.pop("inode"), set()).add(os.fsdecode(path))
    assert rows == wanted_rows
    wanted = {frozenset(name[1:] or "." for name in names) for entry, names in tree.names().items() if _linkable(entry)}
    assert {frozenset(names) for names in inodes.values() if _linkable(tree[_path(min(names))])} == wanted


def _path(name: str) -> str:
    return "/" if name == "." else f"/{name}"


def _linkable(entry: Entry) -> bool:
    """cpio, like the kernel, makes a new symbolic link for each name."""
    return entry.is_file or entry.is_device or stat.S_ISFIFO(entry.mode)


# Trees

NAMES = st.binary(min_size=1, max_size=12).map(lambda raw: raw.translate(None, b"/\0")).filter(
    lambda raw: raw not in (b"", b".", b"..", b"TRAILER!!!")
) | st.sampled_from([b"-rf", b"\n", b" ", b"\xff\xfe", "ä".encode(), b"n" * 255, b"TRAILER!!", b"070701"])
IDS = st.sampled_from([0, 1, 65535, 65536, (1 << 31), (1 << 32) - 2])
TIMES = st.sampled_from([0, 1, SECOND + 999_999_999, (1 << 31) * SECOND, LAST * SECOND]) | st.integers(
    -(1 << 70), 1 << 70
)
PERMISSIONS = st.sampled_from([0o644, 0o755, 0, 0o7777, 0o4711, 0o1777])
CONTENTS = st.binary(max_size=9) | st.sampled_from([4095, 4096, 4097, 70_000]).map(bytes)


@st.composite
def entries(draw: st.DrawFn) -> Entry:
    kind = draw(
        st.sampled_from(
            [stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK]
        )
    )
    device = kind in (stat.S_IFCHR, stat.S_IFBLK)
    return Entry(
        mode=kind | (0o777 if kind == stat.S_IFLNK else draw(PERMISSIONS)),
        uid=draw(IDS), gid=draw(IDS), mtime_ns=draw(TIMES | st.none()),
        target=os.fsdecode(draw(NAMES)) * draw(st.sampled_from([1, 16])) if kind == stat.S_IFLNK else "",
        major=draw(st.sampled_from([0, 8, 255, 4095])) if device else 0,
        minor=draw(st.sampled_from([0, 255, 256, (1 << 20) - 1])) if device else 0,
        content=regular(draw(CONTENTS)).content,
    )  # fmt: skip


@st.composite
def trees(draw: st.DrawFn) -> Tree:
    draft = Draft()
    draft.put("/init", regular(b"#!", 0o755))
    above = [""]
    for name, entry, where, again in draw(
        st.lists(st.tuples(NAMES, entries(), st.integers(0, 99), st.integers(0, 3)), max_size=12)
    ):
        path = f"{above[where % len(above)]}/{os.fsdecode(name)}"
        if draft.get(path) is not None:
            continue
        draft.put(path, entry)
        if entry.is_dir:
            above.append(path)
        else:
            for number in range(again):
                draft.put(f"{path[:200]}~{number}", entry)
    return draft.tree()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tree=trees())
def test_cpio_unpacks_every_field_of_any_tree(tree: Tree, home: Path) -> None:
    made = build_initrd(rootfs_of(tree), home / "any", compress="none")
    compare(tree, home / "any")
    sockets = sum(stat.S_ISSOCK(entry.mode) for entry in tree.values())
    assert (made.skipped, made.entries) == (sockets, len(tree) - sockets)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(tree=trees())
def test_bsdtar_lists_every_field_of_any_tree(tree: Tree, home: Path) -> None:
    build_initrd(rootfs_of(tree), home / "listed", compress="none")
    keys = ("type", "mode", "uid", "gid", "time", "size", "link", "device", "nlink")
    options = ",".join(["mtree:!all", *(f"mtree:{key}" for key in keys)])
    mtree = subprocess.run(
        ["bsdtar", "--format=mtree", f"--options={options}", "-cf", "-", f"@{home}/listed"],
        capture_output=True, check=True, env=os.environ | {"LC_ALL": "C", "TZ": "UTC"},
    ).stdout  # fmt: skip
    rows = [line.split(b" ") for line in mtree.splitlines()[1:]]
    found = {_unescaped(row[0]): dict(word.split(b"=", 1) for word in row[1:]) for row in rows}
    assert set(found) == {os.fsencode("." + path.rstrip("/")) for path in _held(tree)}
    names = tree.names()
    for path in _held(tree):
        entry, row = tree[path], found[os.fsencode("." + path.rstrip("/"))]
        assert int(row[b"mode"], 8) == stat.S_IMODE(entry.mode)
        assert (int(row[b"uid"]), int(row[b"gid"])) == (entry.uid, entry.gid)
        assert row[b"time"] == b"%d.0" % min(max((entry.mtime_ns or 0) // SECOND, 0), LAST)
        if not entry.is_dir:
            assert int(row.get(b"nlink", b"1")) == len(names[entry])
        if entry.is_file:
            last = names[entry][-1] == path
            assert int(row[b"size"]) == (entry.content.size if last else 0)
        if entry.is_symlink:
            assert _unescaped(row[b"link"]) == os.fsencode(entry.target)
        if entry.is_device:
            assert row[b"device"] == b"native,%d,%d" % (entry.major, entry.minor)


def _held(tree: Tree) -> list[str]:
    return [path for path, entry in tree.items() if not stat.S_ISSOCK(entry.mode)]


def _unescaped(text: bytes) -> bytes:
    return text.decode("unicode_escape", errors="strict").encode("latin-1")


# Compression


@pytest.fixture(scope="module")
def mixed() -> Tree:
    draft = Draft()
    draft.put("/init", symlink("usr/bin/../sbin/init"))
    draft.put("/usr/bin", directory(mtime_ns=0))
    draft.put("/usr/sbin/init", regular(b"#!", 0o755))
    draft.put("/large", regular(os.urandom(9 << 20) + bytes(9 << 20)))
    draft.put("/linked", regular(b"shared"))
    draft.link("/usr/linked", "/linked")
    spool = Spool()
    spool.append(b"first" + b"last")
    draft.put("/sparse", regular(Sparse(spool, 3_000_000, ((0, 0, 5), (2_999_996, 5, 4)))))
    return draft.tree()


@pytest.mark.parametrize("kind", initrd.COMPRESSIONS)
def test_its_own_program_unpacks_the_same_archive(kind: str, mixed: Tree, tmp_path: Path) -> None:
    plain = build_initrd(rootfs_of(mixed), tmp_path / "plain", compress="none")
    packed = build_initrd(rootfs_of(mixed), tmp_path / "packed", compress=kind)
    with (tmp_path / "unpacked").open("wb") as file:
        subprocess.run([*PROGRAMS[kind], str(packed.file.path)], stdout=file, check=True)
    assert (tmp_path / "unpacked").read_bytes() == plain.file.path.read_bytes()
    assert packed.unpacked == plain.file.size
    compare(mixed, tmp_path / "unpacked")


@pytest.mark.parametrize("kind", initrd.COMPRESSIONS)
def test_debians_programs_know_it(kind: str, mixed: Tree, tmp_path: Path) -> None:
    build_initrd(rootfs_of(mixed), tmp_path / "i", compress=kind)
    # Of what is not compressed Debian 12's say "premature end of archive", also when GNU cpio has made it.
    well = kind != "none"
    listing = subprocess.run(["lsinitramfs", str(tmp_path / "i")], capture_output=True, text=True, check=well).stdout
    assert sorted(listing.splitlines()) == sorted(path[1:] or "." for path in mixed)
    subprocess.run(["unmkinitramfs", str(tmp_path / "i"), str(tmp_path / "out")], capture_output=True, check=well)
    out = tmp_path / "out" if well else tmp_path / "out/early"
    assert (out / "init").resolve() == out / "usr/sbin/init"
    assert (out / "large").read_bytes() == b"".join(mixed["/large"].content.chunks())
    assert (out / "sparse").read_bytes() == b"first" + bytes(2_999_991) + b"last"
    assert (out / "linked").samefile(out / "usr/linked")


@pytest.mark.parametrize("kind", initrd.COMPRESSIONS)
def test_each_compression_gives_the_same_bytes_twice(kind: str, mixed: Tree, tmp_path: Path) -> None:
    first, second = (build_initrd(rootfs_of(mixed), tmp_path / name, compress=kind) for name in "ab")
    assert first.file.sha256 == second.file.sha256


def test_lz4_writes_what_the_program_writes(mixed: Tree, tmp_path: Path) -> None:
    """The legacy frame, which is the one that the kernel reads: nothing of it depends on how we feed the program."""
    plain = build_initrd(rootfs_of(mixed), tmp_path / "plain", compress="none")
    made = build_initrd(rootfs_of(mixed), tmp_path / "lz4", compress="lz4")
    subprocess.run(["lz4", "-l", "-q", str(plain.file.path), str(tmp_path / "theirs")], check=True)
    assert made.file.path.read_bytes() == (tmp_path / "theirs").read_bytes()
    assert made.file.path.read_bytes()[:4] == b"\x02\x21\x4c\x18"


def test_the_oracles_are_there() -> None:
    for program in ("cpio", "bsdtar", "fakeroot", "lz4", "zstd", "gzip", "lsinitramfs", "unmkinitramfs"):
        assert shutil.which(program), program
