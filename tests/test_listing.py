"""A tree as JSON, and as a tar that other programs read."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from osbuild import listing
from osbuild.layers import flatten
from osbuild.tar_writer import archive
from osbuild.tree import Entry, Tree, device, directory, regular, symlink
from tests.layer_tools import archive as tar_of
from tests.layer_tools import folder, hardlink, layer, link, member, write_layout

BAD = "/not-utf8-\udcff"
LONG = "/" + "d" * 120 + "/" + "f" * 200


def sample() -> Tree:
    shared = regular(b"shared", 0o4755, mtime_ns=1_700_000_000_500_000_000)
    return Tree(
        {
            "/": directory(),
            "/a": shared,
            "/b\n": shared,
            "/dev": directory(0o700, mtime_ns=0),
            "/dev/null": device(stat.S_IFCHR, 0o666, 1, 3),
            "/dev/sda": device(stat.S_IFBLK, 0o660, 259, 1_000_000),
            "/link": symlink("hex:ff"),
            "/link2": Entry(mode=stat.S_IFLNK | 0o777, mtime_ns=-5, target="x" * 300),
            "/pipe": Entry(mode=stat.S_IFIFO | 0o600, mtime_ns=1),
            "/rich": Entry(
                mode=stat.S_IFREG | 0o644, uid=(1 << 32) - 2, gid=70_000_000, mtime_ns=1 << 62,
                xattrs={"user.b": b"\xff\0\n", "security.capability": b"\1" * 20},
            ),
            "/" + "d" * 120: directory(mtime_ns=7_000_000_000),
            LONG: regular(b"long", mtime_ns=1),
            BAD: regular(b""),
            "/ünïcode": regular(b"u"),
        }
    )  # fmt: skip


def test_the_listing_says_what_the_issue_promises() -> None:
    found = listing.entries(sample())
    assert found["/"] == {"type": "dir", "mode": "0755", "uid": 0, "gid": 0, "mtime": None}
    assert found["/a"] == {
        "type": "file", "mode": "4755", "uid": 0, "gid": 0, "mtime": 1_700_000_000.5, "size": 6,
        "sha256": hashlib.sha256(b"shared").hexdigest(),
        "same_inode_as": ["/a", "hex:2f620a"],
    }  # fmt: skip
    assert found["hex:2f620a"] == found["/a"]
    assert found["/dev/sda"]["type"] == "block"
    assert (found["/dev/sda"]["major"], found["/dev/sda"]["minor"]) == (259, 1_000_000)
    assert "mode" not in found["/link"]
    assert found["/link"]["target"] == "hex:" + b"hex:ff".hex()
    assert found["/pipe"]["type"] == "fifo"
    assert found["/rich"]["xattrs_hex"] == {"security.capability": "01" * 20, "user.b": "ff000a"}
    assert "hex:" + os.fsencode(BAD).hex() in found
    assert "/ünïcode" in found
    assert isinstance(found["/dev"]["mtime"], int)
    json.dumps(found)


def test_every_line_is_one_line() -> None:
    told = list(listing.lines(sample()))
    assert len(told) == len(sample())
    assert all(line.isprintable() for line in told)
    assert "-> x" in next(line for line in told if "/link2" in line)


def test_our_reader_gets_the_same_tree_back_from_the_tar() -> None:
    tree = sample()
    again = flatten([layer(b"".join(archive(tree)))])
    assert listing.entries(again) == listing.entries(tree)


def test_only_a_directory_that_its_contents_imply_has_no_member() -> None:
    socket = Entry(mode=stat.S_IFSOCK | 0o600, mtime_ns=0)
    tree = Tree(
        {
            "/": directory(),
            "/implied": directory(),
            "/implied/deeper": directory(),
            "/implied/deeper/f": regular(b""),
            "/closed": directory(0o700),
            "/closed/f": regular(b""),
            "/empty": directory(),
            "/silent": directory(),
            "/silent/socket": socket,
        }
    )
    with tarfile.open(fileobj=io.BytesIO(b"".join(archive(tree)))) as tar:
        assert tar.getnames() == ["closed", "closed/f", "empty", "implied/deeper/f", "silent"]


def test_cpythons_reader_agrees() -> None:
    with tarfile.open(fileobj=io.BytesIO(b"".join(archive(sample())))) as tar:
        members = {info.name: info for info in tar}
    assert members["a"].mode == 0o4755
    assert members["b\n"].islnk()
    assert members["b\n"].linkname == "a"
    assert members["rich"].uid == (1 << 32) - 2
    assert members["rich"].gid == 70_000_000
    assert members["dev/sda"].devminor == 1_000_000
    assert members["link2"].linkname == "x" * 300
    assert members[LONG[1:]].size == 4


@pytest.mark.parametrize("program", ["tar", "bsdtar"])
def test_a_real_tar_unpacks_it(program: str, tmp_path: Path) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    tree = Tree({path: entry for path, entry in sample().items() if not entry.is_device and path != "/rich"})
    (tmp_path / "t.tar").write_bytes(b"".join(archive(tree)))
    (tmp_path / "out").mkdir()
    command = [program, "-xpf", str(tmp_path / "t.tar"), "-C", str(tmp_path / "out")]
    subprocess.run(command, check=True, env={"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]})
    out = tmp_path / "out"
    assert (out / "a").read_bytes() == b"shared"
    assert (out / "a").stat().st_ino == (out / "b\n").stat().st_ino
    assert (out / "a").stat().st_mtime_ns == 1_700_000_000_500_000_000
    assert (out / LONG[1:]).read_bytes() == b"long"
    assert str((out / "link2").readlink()) == "x" * 300
    assert b"not-utf8-\xff" in os.listdir(os.fsencode(out))


@pytest.mark.parametrize("length", range(86, 103))
def test_the_length_of_a_record_counts_its_own_digits(length: int) -> None:
    tree = Tree({"/": directory(), "/f": Entry(mode=stat.S_IFREG, mtime_ns=0, xattrs={"user.x": b"v" * (length - 25)})})
    with tarfile.open(fileobj=io.BytesIO(b"".join(archive(tree)))) as tar:
        assert tar.getmember("f").pax_headers["SCHILY.xattr.user.x"] == "v" * (length - 25)


def awkward() -> bytes:
    """A layer with something in every field: hard links, devices, attributes, names of any bytes."""
    xattrs = {"SCHILY.xattr.user.k": "v\x01\n", "SCHILY.xattr.security.capability": "\1\0\0\2\1" + "\0" * 15}
    return tar_of(
        folder("d", mode=0o1777, uid=5, gid=6),
        member("d/a", b"hello", mode=0o4755, uid=1000, gid=100, pax_headers=xattrs),
        hardlink("h1", "d/a"), hardlink("a0", "d/a"), member("n\udcff\udcfe", b"x"), member("nl\n\x1b"),
        hardlink("z\udc80", "nl\n\x1b"), link("l", "../d/a"), member("old", mtime=-5), member("implied/x", b"1"),
        member("c", type=tarfile.CHRTYPE, devmajor=10, devminor=200, mode=0o640), member("p", type=tarfile.FIFOTYPE),
        member("b", type=tarfile.BLKTYPE, devmajor=259, devminor=70_000),
    )  # fmt: skip


def on_disk(path: bytes, root: bytes) -> dict[str, Any]:
    """What `--json` should say of a file that somebody else unpacked; hard links are counted only."""
    status = os.lstat(path)
    kind = {"d": "dir", "l": "symlink", "c": "char", "b": "block", "p": "fifo"}.get(
        stat.filemode(status.st_mode)[0], "file"
    )
    found: dict[str, Any] = {"type": kind, "uid": status.st_uid, "gid": status.st_gid}
    if kind == "symlink":
        found["target"] = os.fsdecode(os.readlink(path))  # noqa: PTH115 - pathlib would tidy it up
    else:
        found["mode"] = f"{stat.S_IMODE(status.st_mode):04o}"
    if kind == "file":
        data = Path(os.fsdecode(path)).read_bytes()
        found |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if kind in ("char", "block"):
        found |= {"major": os.major(status.st_rdev), "minor": os.minor(status.st_rdev)}
    names = os.listxattr(path, follow_symlinks=False)
    if names:
        found["xattrs_hex"] = {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in names}
    if kind != "dir" and status.st_nlink > 1:
        found["same_inode_as"] = status.st_nlink
    implied = path == root or path.endswith(b"/implied")
    return found | {"mtime": None if implied else status.st_mtime_ns // 10**9}


@pytest.mark.skipif(shutil.which("umoci") is None or os.geteuid() != 0, reason="needs umoci, and root for its devices")
def test_umoci_unpacks_what_the_listing_says_field_by_field(tmp_path: Path) -> None:
    probe = tmp_path / "probe"
    probe.touch()
    try:
        os.setxattr(probe, "user.k", b"v")
    except OSError:
        pytest.skip("no extended attributes on this file system")
    write_layout(tmp_path / "l", [awkward()])
    words = ["umoci", "unpack", "--image", f"{tmp_path}/l:latest", str(tmp_path / "bundle")]
    subprocess.run(words, check=True, capture_output=True)
    root = os.fsencode(tmp_path / "bundle/rootfs")
    unpacked = {}
    for here, directories, files in os.walk(root):
        for path in [here] * (here == root) + [here + b"/" + name for name in directories + files]:
            unpacked[listing.spell(os.fsdecode(path[len(root) :]) or "/")] = on_disk(path, root)
    ours = listing.entries(flatten([layer(awkward())]))
    for entry in ours.values():
        if "same_inode_as" in entry:
            entry["same_inode_as"] = len(entry["same_inode_as"])
    assert ours == unpacked
    assert ours["/a0"]["same_inode_as"] == 3
