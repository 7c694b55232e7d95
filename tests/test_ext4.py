"""The ext4 writer, read by e2fsprogs: e2fsck must find nothing, debugfs must find what the tree holds."""

from __future__ import annotations

import os
import re
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild import command
from osbuild.errors import InputError
from osbuild.filesystem import Plan, erofs, ext4, xfs
from osbuild.tree import Bytes, Draft, Entry, Sparse, Spool, Tree, device, directory, regular, symlink

START = 1 << 20
EPOCH = 1_700_000_000
JOURNAL = 4 << 20  # bytes, of which 4096 are no hole


def write(tree: Tree, path: Path, start: int = START) -> ext4.Plan:
    plan = ext4.plan(tree, start=start, epoch=EPOCH)
    with path.open("wb") as file:
        file.truncate(plan.size)
        plan.write(file.fileno(), 0)
    return plan


def check(path: Path) -> None:
    done = subprocess.run([command.find("e2fsck"), "-fn", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def debugfs(path: Path, request: str) -> str:
    done = subprocess.run(
        [command.find("debugfs"), "-R", request, str(path)], capture_output=True, text=True, check=True
    )
    return done.stdout


def draft(**files: Entry) -> Tree:
    made = Draft()
    made.put("/", directory(mtime_ns=0))
    for name, entry in files.items():
        made.put("/" + name.replace("__", "/"), entry)
    return made.tree()


def extents(path: Path, name: str) -> list[int]:
    """First blocks of a file's extents, as debugfs names all its blocks."""
    return [int(word) for word in debugfs(path, f"blocks {name}").split()]


def test_an_empty_tree_is_a_clean_filesystem(tmp_path: Path) -> None:
    write(draft(), tmp_path / "fs")
    check(tmp_path / "fs")


def test_there_is_a_journal_because_kata_mounts_with_data_ordered(tmp_path: Path) -> None:
    image = tmp_path / "fs"
    write(draft(), image)
    told = subprocess.run([command.find("dumpe2fs"), "-h", str(image)], capture_output=True, text=True, check=True)
    assert "has_journal" in told.stdout
    assert "Total journal size:       4096k" in told.stdout
    assert "needs_recovery" not in told.stdout
    assert image.stat().st_blocks * 512 < 64 << 10, "an empty journal is a hole"


def test_every_kind_of_inode_is_what_it_was(tmp_path: Path) -> None:
    tree = draft(
        file=Entry(mode=stat.S_IFREG | 0o4755, uid=100_000, gid=2**32 - 2, mtime_ns=0, content=Bytes(b"hello")),
        null=device(stat.S_IFCHR, 0o666, 1, 3),
        wide=device(stat.S_IFBLK, 0o600, 259, 70000),
        pipe=Entry(mode=stat.S_IFIFO | 0o600, mtime_ns=0),
        fast=symlink("x" * 59),
        slow=symlink("y" * 60),
        long=symlink("z" * 4095),
        sub__dir=directory(0o1777, mtime_ns=0),
    )
    image = tmp_path / "fs"
    write(tree, image)
    check(image)
    assert debugfs(image, "cat /file") == "hello"
    told = " ".join(debugfs(image, "stat /file").split())
    assert "Mode: 04755" in told
    assert "User: 100000 Group: 4294967294" in told or "User: 100000 Group: -2" in told
    assert "Device major/minor number: 01:03" in debugfs(image, "stat /null")
    assert "Device major/minor number: 259:70000" in debugfs(image, "stat /wide")
    assert "Type: FIFO" in debugfs(image, "stat /pipe")
    assert f'Fast link dest: "{"x" * 59}"' in debugfs(image, "stat /fast")
    assert "Mode:  01777" in debugfs(image, "stat /sub/dir")
    out = tmp_path / "out"
    out.mkdir()
    debugfs(image, f"rdump / {out}")
    assert str((out / "slow").readlink()) == "y" * 60
    assert str((out / "long").readlink()) == "z" * 4095


def test_a_socket_is_left_out(tmp_path: Path) -> None:
    plan = write(draft(sock=Entry(mode=stat.S_IFSOCK | 0o755, mtime_ns=0)), tmp_path / "fs")
    assert plan.skipped == ("/sock",)
    check(tmp_path / "fs")
    assert "sock" not in debugfs(tmp_path / "fs", "ls /")


def test_hard_links_are_one_inode(tmp_path: Path) -> None:
    made = draft(a=regular(b"x"), l=symlink("a")).edit()
    made.link("/b", "/a")
    made.link("/m", "/l")
    write(made.tree(), tmp_path / "fs")
    check(tmp_path / "fs")
    assert "Links: 2" in debugfs(tmp_path / "fs", "stat /b")
    assert "Links: 2" in debugfs(tmp_path / "fs", "stat /m")


def test_times_have_nanoseconds_and_reach_from_1901_to_2446(tmp_path: Path) -> None:
    wanted = {
        "old": -(1 << 31) * 10**9, "before": -1, "now": EPOCH * 10**9 + 123_456_789, "after2038": (1 << 32) * 10**9 + 5,
        "late": ((1 << 34) - (1 << 31) - 1) * 10**9,
    }  # fmt: skip
    write(draft(**{name: regular(b"", mtime_ns=time) for name, time in wanted.items()}), tmp_path / "fs")
    check(tmp_path / "fs")
    for name, time in wanted.items():
        line = next(line for line in debugfs(tmp_path / "fs", f"stat /{name}").splitlines() if " mtime:" in line)
        low, extra = (int(part, 16) for part in line.split()[1].split(":"))
        seconds = (low - (1 << 32) if low & 1 << 31 else low) + ((extra & 3) << 32)
        assert seconds * 10**9 + (extra >> 2) == time, name


def test_a_directory_without_a_time_gets_the_epoch(tmp_path: Path) -> None:
    made = Draft()
    made.put("/a/b", regular(b""))
    write(made.tree(), tmp_path / "fs")
    assert f"mtime: 0x{EPOCH:08x}" in debugfs(tmp_path / "fs", "stat /a")


def test_attributes_lie_in_the_inode_or_in_a_block(tmp_path: Path) -> None:
    capability = struct.pack("<IIIII", 0x02000001, 0x400, 0, 0, 0)
    tree = draft(
        small=Entry(mode=stat.S_IFREG | 0o755, mtime_ns=0, xattrs={"security.capability": capability, "user.a": b"b"}),
        large=Entry(
            mode=stat.S_IFREG | 0o644, mtime_ns=0, xattrs={"user.big": b"v" * 3000, "user.a": b"", "user.bb": b"2"}
        ),
        linked=Entry(mode=stat.S_IFLNK | 0o777, mtime_ns=0, target="t" * 80, xattrs={"trusted.x": b"y" * 200}),
    )
    image = tmp_path / "fs"
    write(tree, image)
    check(image)
    assert "user.a (1)" in debugfs(image, "ea_list /small")
    assert "user.big (3000)" in debugfs(image, "ea_list /large")
    assert "user.bb (1)" in debugfs(image, "ea_list /large")
    assert "trusted.x (200)" in debugfs(image, "ea_list /linked")
    written = tmp_path / "value"
    debugfs(image, f"ea_get -f {written} /small security.capability")
    assert written.read_bytes() == capability


def test_an_acl_is_read_as_the_one_it_was(tmp_path: Path) -> None:
    none = 0xFFFFFFFF
    entries = [(1, 6, none), (2, 6, 1000), (4, 4, none), (8, 5, 50), (16, 6, none), (32, 4, none)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    image = tmp_path / "fs"
    write(draft(f=Entry(mode=stat.S_IFREG | 0o664, mtime_ns=0, xattrs={"system.posix_acl_access": acl})), image)
    check(image)
    written = tmp_path / "value"
    debugfs(image, f"ea_get -f {written} /f system.posix_acl_access")
    read = list(struct.iter_unpack("<HHI", written.read_bytes()[4:]))
    # e2fsprogs gives an id of 0 to the entries that have none.
    assert read == [(tag, permissions, 0 if identity == none else identity) for tag, permissions, identity in entries]


@pytest.mark.parametrize(
    "xattrs",
    [
        {"user.v": b"x" * 5000}, {"weird.name": b""}, {"system.posix_acl_access": b"no"}, {"system.foo": b"x"},
        {"system.data": b"x"},
    ],
)  # fmt: skip
def test_attributes_that_ext4_cannot_hold_are_refused_by_path(xattrs: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"'/f'"):
        write(draft(f=Entry(mode=stat.S_IFREG, mtime_ns=0, xattrs=xattrs)), tmp_path / "fs")


@pytest.mark.parametrize("plan", [ext4.plan, erofs.plan, xfs.plan])
@pytest.mark.parametrize(
    ("name", "entry", "says"),
    [
        ("n" * 256, regular(b""), "a name of 256 bytes"),
        ("\u00e9" * 128, regular(b""), "a name of 256 bytes"),
        ("l", symlink("t" * 4096), "4096 bytes"),
        ("l", symlink(""), "0 bytes"),
        ("l", symlink("a\0b"), "NUL"),
    ],
)
def test_what_no_linux_could_read_is_refused(plan: Callable[..., Plan], name: str, entry: Entry, says: str) -> None:
    with pytest.raises(InputError, match=says):
        plan(draft(**{name: entry}), start=START, epoch=EPOCH)


def test_the_longest_name_and_the_longest_target_are_clean(tmp_path: Path) -> None:
    write(draft(**{"n" * 255: regular(b"x"), "l": symlink("t" * 4095)}), tmp_path / "fs")
    check(tmp_path / "fs")
    assert "Size: 4095" in debugfs(tmp_path / "fs", "stat /l")


def test_large_files_start_where_dax_can_map_huge_pages(tmp_path: Path) -> None:
    files = {f"big{n}": regular(bytes([n]) * ((2 << 20) + n * 12345)) for n in range(1, 5)}
    files |= {f"small{n:03}": regular(bytes([n]) * (n * 1000)) for n in range(200)}
    image = tmp_path / "fs"
    plan = write(draft(**files), image)
    check(image)
    for name, entry in files.items():
        blocks = extents(image, name)
        assert len(blocks) == -(-entry.content.size // 4096)
        if name.startswith("big"):
            assert (START + blocks[0] * 4096) % (2 << 20) == 0
    used = JOURNAL // 4096 + sum(-(-entry.content.size // 4096) for entry in files.values())
    assert plan.size // 4096 < used * 1.1, "small files fill what alignment leaves"


def test_a_large_file_is_read_back(tmp_path: Path) -> None:
    data = os.urandom(5 << 20)
    image = tmp_path / "fs"
    write(draft(f=regular(data), g=regular(b"after")), image)
    out = tmp_path / "out"
    debugfs(image, f"dump /f {out}")
    assert out.read_bytes() == data


class _Zeros:
    """Content of any size that takes no room: what a hole would be, and the writer takes for data."""

    def __init__(self, size: int) -> None:
        self.size = size

    def chunks(self) -> Iterator[bytes]:
        yield b"zeros"  # for the tree's digest

    def copy_to(self, descriptor: int, offset: int) -> None:
        pass


def test_a_file_of_5_gib_has_an_extent_tree(tmp_path: Path) -> None:
    image = tmp_path / "fs"
    tree = draft(huge=Entry(mode=stat.S_IFREG, mtime_ns=0, content=_Zeros(5 << 30)), after=regular(b"x"))
    plan = write(tree, image)
    check(image)
    assert plan.size > 5 << 30
    assert image.stat().st_blocks * 512 < 4 << 20
    assert "Size: 5368709120" in debugfs(image, "stat /huge")


def sparse(size: int, *offsets: int) -> Sparse:
    """A byte at each offset, and holes."""
    spool = Spool()
    spool.append(bytes(range(1, 256)) * (len(offsets) // 255 + 1))
    return Sparse(spool, size, tuple((offset, number, 1) for number, offset in enumerate(offsets)))


def test_holes_stay_holes(tmp_path: Path) -> None:
    image = tmp_path / "fs"
    content = sparse((6 << 30) + 7, 0, 5, 4096, 1 << 20, (2 << 20) - 1, 3 << 30, 6 << 30)
    write(draft(f=Entry(mode=stat.S_IFREG, mtime_ns=0, content=content), empty=regular(sparse(1 << 20))), image)
    check(image)
    assert image.stat().st_blocks * 512 < 200_000
    told = " ".join(debugfs(image, "stat /f").split())
    assert f"Size: {(6 << 30) + 7}" in told
    assert "Blockcount: 56" in told, "six blocks of data and one of extents, in sectors"
    assert "Blockcount: 0" in debugfs(image, "stat /empty").replace("  ", " ")
    assert debugfs(image, "bmap /f 256").strip() != "0"
    assert debugfs(image, "bmap /f 257").strip() == "0"


def test_a_file_of_thousands_of_pieces_has_a_deep_extent_tree(tmp_path: Path) -> None:
    offsets = [number * 8192 for number in range(3000)]
    data = bytearray(3000 * 8192)
    for number, offset in enumerate(offsets):
        data[offset] = number % 255 + 1
    image = tmp_path / "fs"
    write(draft(f=regular(sparse(len(data), *offsets))), image)
    check(image)
    out = tmp_path / "out"
    debugfs(image, f"dump /f {out}")
    assert out.read_bytes() == data
    assert "Blockcount: 24080" in debugfs(image, "stat /f"), "3000 blocks, nine of extents and one above those"


def test_a_run_of_a_sparse_file_is_aligned_as_its_place_in_the_file_is(tmp_path: Path) -> None:
    spool = Spool()
    spool.append(b"x" * (5 << 20))
    content = Sparse(spool, 20 << 20, (((7 << 20) + 4096, 0, 5 << 20),))
    image = tmp_path / "fs"
    write(draft(a=regular(b"1" * 5000), f=regular(content)), image)
    check(image)
    first = int(debugfs(image, f"bmap /f {((7 << 20) + 4096) // 4096}"))
    assert (START + first * 4096 - (7 << 20) - 4096) % (2 << 20) == 0


def test_all_metadata_has_checksums(tmp_path: Path) -> None:
    made = Draft()
    for number in range(1000):
        made.put(f"/d/name-{number}", regular(b"x"))
    made.put("/x", Entry(mode=stat.S_IFREG, mtime_ns=0, xattrs={"user.v": b"x" * 3000}))
    made.put("/s", regular(sparse(1 << 20, *range(0, 1 << 20, 8192))))
    image = tmp_path / "fs"
    write(made.tree(), image)
    told = subprocess.run([command.find("dumpe2fs"), "-h", str(image)], capture_output=True, text=True, check=True)
    assert "metadata_csum" in told.stdout
    assert "dir_index" in told.stdout
    places = {
        "superblock": 1024 + 200, "a group's descriptor": 4096 + 14, "an inode": _inode_at(image, "/x") + 16,
        "a leaf": int(debugfs(image, "bmap /d 1")) * 4096 + 9, "an index": int(debugfs(image, "bmap /d 0")) * 4096 + 44,
        "attributes": int(re.findall(r"File ACL: (\d+)", debugfs(image, "stat /x"))[0]) * 4096 + 4000,
        "extents": int(re.findall(r"\(ETB0\):(\d+)", debugfs(image, "stat /s"))[0]) * 4096 + 50,
        "the journal": int(debugfs(image, "bmap <8> 0")) * 4096 + 200,
    }  # fmt: skip
    whole = image.read_bytes()
    for what, at in places.items():
        image.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        done = subprocess.run([command.find("e2fsck"), "-fn", str(image)], capture_output=True, text=True, check=False)
        assert "checksum" in done.stdout + done.stderr, (what, done.stdout)


def _inode_at(image: Path, path: str) -> int:
    found = re.findall(r"located at block (\d+), offset 0x([0-9a-f]+)", debugfs(image, f"imap {path}"))
    return int(found[0][0]) * 4096 + int(found[0][1], 16)


def test_attributes_are_split_between_inode_and_block(tmp_path: Path) -> None:
    xattrs = {"user.large": b"v" * 2000, "user.small": b"s", "security.capability": b"c" * 20}
    image = tmp_path / "fs"
    write(draft(f=Entry(mode=stat.S_IFREG, mtime_ns=0, xattrs=xattrs)), image)
    check(image)
    told = debugfs(image, "stat /f")
    inside = told.partition("Extended attributes:")[2]
    assert "File ACL: 0 " not in told
    assert all(name in inside for name in xattrs)
    behind = image.read_bytes()[_inode_at(image, "/f") + 160 :][:96]
    assert b"small" in behind
    assert b"capability" in behind
    assert b"large" not in behind


def test_ten_thousand_names_in_one_directory(tmp_path: Path) -> None:
    made = Draft()
    for number in range(10_000):
        made.put(f"/d/name-{number}-{'x' * (number % 200)}", regular(b""))
    image = tmp_path / "fs"
    write(made.tree(), image)
    check(image)
    assert len(debugfs(image, "ls -p /d").split()) >= 10_000


@pytest.mark.parametrize(
    ("files", "links"), [(33_000, 0), (0, 40_000), (31_000, 1_900), pytest.param(66_000, 0, marks=pytest.mark.slow)]
)
def test_more_inodes_than_a_group_can_have(files: int, links: int, tmp_path: Path) -> None:
    made = Draft()
    for number in range(files):
        made.put(f"/f/{number % 100}/{number}", regular(b"x" if links else b""))
    for number in range(links):
        made.put(f"/l/{number % 100}/{number}", symlink("x"))
    image = tmp_path / "fs"
    write(made.tree(), image)
    check(image)
    # Two inodes a group's worth of blocks apart are both there.
    assert debugfs(image, "stat /f/0/0" if files else "stat /l/99/39999").startswith("Inode:")


@pytest.mark.slow
def test_66000_directories_in_one_are_too_many_to_count(tmp_path: Path) -> None:
    made = Draft()
    for number in range(66_000):
        made.put(f"/d/{number}", directory(mtime_ns=0))
    image = tmp_path / "fs"
    write(made.tree(), image)
    check(image)
    assert "Links: 1 " in debugfs(image, "stat /d")


def test_the_same_tree_gives_the_same_bytes(tmp_path: Path) -> None:
    def tree() -> Tree:
        return draft(a=regular(b"x" * 5000), b=symlink("a"), c__d=regular(b"", mtime_ns=7))

    first, second = write(tree(), tmp_path / "a"), write(tree(), tmp_path / "b")
    assert first.uuid == second.uuid
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert write(draft(a=regular(b"x" * 5001)), tmp_path / "c").uuid != first.uuid


NAMES = st.one_of(
    st.text("abc", min_size=1, max_size=3).map(str.encode),  # often the same, and debugfs can be asked for them
    st.binary(min_size=1, max_size=30).filter(lambda b: b not in (b".", b"..") and not set(b) & {0, 0x2F}),
)
META = st.fixed_dictionaries(
    {
        "uid": st.integers(0, 2**32 - 2),
        "gid": st.integers(0, 2**32 - 2),
        "mtime_ns": st.integers(-(2**61), 2**63),
        "xattrs": st.dictionaries(
            st.text("abcdefgh", min_size=1, max_size=20).map(lambda s: "user." + s), st.binary(max_size=200), max_size=4
        ),
    }
)
ENTRIES = st.one_of(
    st.builds(
        lambda m, perm, data: Entry(mode=stat.S_IFREG | perm, content=Bytes(data), **m),
        META, st.integers(0, 0o7777), st.integers(0, 20000).map(lambda n: b"d" * n),
    ),
    st.builds(lambda m, perm: Entry(mode=stat.S_IFDIR | perm, **m), META, st.integers(0, 0o7777)),
    st.builds(
        lambda m, t: Entry(mode=stat.S_IFLNK | 0o777, target=t.decode(errors="surrogateescape"), **m),
        META, st.binary(min_size=1, max_size=4095).filter(lambda b: 0 not in b),
    ),
    st.builds(
        lambda m, a, b: Entry(mode=stat.S_IFBLK, major=a, minor=b, **m),
        META, st.integers(0, 4095), st.integers(0, 2**20 - 1),
    ),
)  # fmt: skip


@given(paths=st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=4), ENTRIES), max_size=30))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_tree_is_clean_to_e2fsck(
    paths: list[tuple[list[bytes], Entry]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    made = Draft()
    for parts, entry in paths:
        try:
            made.put("/" + "/".join(part.decode(errors="surrogateescape") for part in parts), entry)
        except InputError:
            continue  # a file or a circle of links on the way
    image = tmp_path_factory.mktemp("fs") / "fs"
    tree = made.tree()
    write(tree, image)
    check(image)
    for path, entry in tree.items():
        if entry.is_file and path.isascii() and path.replace("/", "").isalnum():
            told = " ".join(debugfs(image, f"stat {path}").split())
            assert f"Size: {entry.content.size}" in told
            assert debugfs(image, f"cat {path}").encode() == b"".join(entry.content.chunks())
