"""`dir:`: a directory of this machine as a root filesystem."""

from __future__ import annotations

import os
import random
import socket
import stat
import subprocess
from pathlib import Path

import pytest

from osbuild.content import HOLE, Content
from osbuild.errors import HostError, InputError
from osbuild.limits import Limits
from osbuild.tree import Sparse, Spool
from tests.layer_tools import opened

ROOT = os.geteuid() == 0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    top = tmp_path / "root"
    (top / "etc/deep").mkdir(parents=True)
    (top / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    (top / "etc/passwd").chmod(0o4755)
    os.utime(top / "etc/passwd", ns=(5, 1_700_000_000_123_456_789))
    os.link(top / "etc/passwd", top / "etc/deep/same")
    (top / "dangling").symlink_to("/no/where")
    os.mkfifo(top / "pipe", 0o600)
    return top


def test_every_field_is_what_the_directory_has(root: Path) -> None:
    image = opened(f"dir:{root}")
    tree = image.tree
    assert list(tree) == ["/", "/dangling", "/etc", "/etc/deep", "/etc/deep/same", "/etc/passwd", "/pipe"]
    assert tree["/etc/passwd"] is tree["/etc/deep/same"]
    assert stat.S_IMODE(tree["/etc/passwd"].mode) == 0o4755
    assert tree["/etc/passwd"].mtime_ns == 1_700_000_000_123_456_789
    assert (tree["/etc/passwd"].uid, tree["/etc/passwd"].gid) == (os.geteuid(), os.getegid())
    assert tree["/dangling"].target == "/no/where"
    assert stat.S_ISFIFO(tree["/pipe"].mode)
    assert image.digest == f"sha256:{tree.digest()}"
    assert image.config.diff_ids == ()


def test_what_changes_later_changes_nothing_here(root: Path) -> None:
    tree = opened(f"dir:{root}").tree
    (root / "etc/passwd").write_text("evil")
    assert b"".join(tree["/etc/passwd"].content.chunks()) == b"root:x:0:0::/:/bin/sh\n"


def test_names_of_any_bytes_are_kept(root: Path) -> None:
    odd = b"new\nline-\xff"
    (root / os.fsdecode(odd)).write_bytes(b"1")
    assert os.fsdecode(b"/" + odd) in opened(f"dir:{root}").tree


def test_a_socket_is_left_out(root: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "s"))
        assert "/s" not in opened(f"dir:{root}").tree


@pytest.mark.skipif(not ROOT, reason="making device nodes and attributes needs root")
def test_devices_and_attributes_are_kept(root: Path) -> None:
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.setxattr(root / "etc/passwd", "user.note", b"\0x")
    os.setxattr(root / "dangling", "trusted.t", b"1", follow_symlinks=False)
    tree = opened(f"dir:{root}").tree
    assert (tree["/null"].major, tree["/null"].minor) == (1, 3)
    assert tree["/etc/passwd"].xattrs == {"user.note": b"\0x"}
    assert tree["/dangling"].xattrs == {"trusted.t": b"1"}


@pytest.mark.skipif(not ROOT, reason="mounting needs root")
def test_a_mount_in_it_is_refused_by_name(root: Path) -> None:
    (root / "proc").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(root / "proc")], check=False, capture_output=True)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(InputError, match="'/proc': another file system"):
            opened(f"dir:{root}")
    finally:
        subprocess.run(["umount", str(root / "proc")], check=True)


@pytest.mark.skipif(not ROOT, reason="becoming somebody else needs root")
def test_what_may_not_be_read_is_the_hosts_fault(root: Path) -> None:
    (root / "etc/secret").write_text("x")
    (root / "etc/secret").chmod(0)
    for path in (root, *root.parents):
        if path.stat().st_uid == os.geteuid() and not path.stat().st_mode & 0o001:
            path.chmod(0o755)
    child = os.fork()
    if child == 0:
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)
        try:
            opened(f"dir:{root}")
        except HostError as problem:
            os._exit(0 if "'/etc/secret': Permission denied" in str(problem) else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_file_that_grows_while_it_is_read_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Spool.take

    def take_and_grow(self: Spool, source: int, size: int, start: int = 0) -> None:
        take(self, source, size, start)
        with (root / "etc/passwd").open("a") as file:
            file.write("more")

    monkeypatch.setattr(Spool, "take", take_and_grow)
    with pytest.raises(InputError, match="changed while it was read"):
        opened(f"dir:{root}")


def test_holes_stay_holes(root: Path) -> None:
    bodies = {
        "holes": [(1 << 20, b"a"), (5 << 20, b"b" * 9000)],
        "only a hole": [],
        "tail": [(0, b"x")],
        "none": [(0, b"y")],
    }
    sizes = {"holes": 1 << 30, "only a hole": 3 << 20, "tail": 1 << 20, "none": 1}
    for name, pieces in bodies.items():
        with (root / name).open("wb") as file:
            file.truncate(sizes[name])
            for at, data in pieces:
                os.pwrite(file.fileno(), data, at)
    if (root / "holes").stat().st_blocks > 1000:
        pytest.skip("no holes in this file system")
    tree = opened(f"dir:{root}").tree
    stored = tree["/holes"].content
    assert isinstance(stored, Sparse)
    assert sum(size for _, _, size in stored.pieces) < 64 << 10
    assert isinstance(tree["/only a hole"].content, Sparse)
    for name in ("only a hole", "tail", "none"):
        assert b"".join(tree[f"/{name}"].content.chunks()) == (root / name).read_bytes()
    at = 0
    with (root / "holes").open("rb") as file:
        for data in stored.chunks():
            assert file.read(len(data)) == data
            at += len(data)
    assert at == 1 << 30


@pytest.mark.parametrize("way", ["never", "always"])
def test_a_copy_with_other_holes_is_the_same_tree_with_the_same_pieces(way: str, root: Path, tmp_path: Path) -> None:
    """One file system has a hole where another has zeros; what is made of the directory must not tell."""
    chance = random.Random(way)
    for number in range(40):
        with (root / f"file{number}").open("wb") as file:
            size = chance.choice((0, 1, 4096, HOLE - 1, HOLE, HOLE + 1, 300_000, 3 << 20))
            file.truncate(size)
            for _ in range(chance.choice((0, 1, 3))):
                at = chance.randrange(size + 1)
                file.seek(chance.choice((at, at // 4096 * 4096)))
                file.write(chance.choice((b"x", bytes(5000), b"y" * 5000))[: size - file.tell()])
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", f"--sparse={way}", str(root), str(copy)], check=True)
    used = [sum(path.lstat().st_blocks for path in home.rglob("*")) for home in (root, copy)]
    assert used[0] != used[1], "the copy has other holes"
    first, second = opened(f"dir:{root}").tree, opened(f"dir:{copy}").tree
    assert first.digest() == second.digest()
    assert [pieces_of(entry.content) for entry in first.values()] == [
        pieces_of(entry.content) for entry in second.values()
    ]
    for number in range(40):
        data = (root / f"file{number}").read_bytes()
        content = first[f"/file{number}"].content
        assert b"".join(content.chunks()) == data
        edges = [0, *(edge for piece in pieces_of(content) for edge in piece), len(data)]
        gaps = [end - begin for begin, end in zip(edges[::2], edges[1::2], strict=True)]
        assert all(gap == 0 or gap >= HOLE for gap in gaps)


def pieces_of(content: Content) -> list[tuple[int, int]]:
    """Where each begins in the file, and ends."""
    if isinstance(content, Sparse):
        return [(at, at + size) for at, _, size in content.pieces]
    return [(0, content.size)]


def test_more_pieces_than_the_limit_are_refused(root: Path) -> None:
    with (root / "holes").open("wb") as file:
        for at in range(3):
            os.pwrite(file.fileno(), b"x", (2 * at + 1) << 20)
    with pytest.raises(InputError, match="more than 2 pieces") as caught:
        opened(f"dir:{root}", limits=Limits(sparse_pieces=2))
    assert "--limit" in caught.value.hint


@pytest.mark.parametrize("name", ["no", "file"])
def test_what_is_no_directory_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=f"{name}'"):
        opened(f"dir:{tmp_path}/{name}")
