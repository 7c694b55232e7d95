"""The erofs writer, read by erofs-utils: fsck.erofs must find nothing, and find what the tree holds.

What the kernel sees of it stands in test_walker.py.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild import command, smoke
from osbuild.artifacts import Kernel, Rootfs
from osbuild.errors import InputError, OsbuilderError, SpecError
from osbuild.filesystem import Room, erofs
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.report import Verdict
from osbuild.runtime.base import Machine
from osbuild.tree import Bytes, Content, Draft, Entry, Slice, Sparse, Spool, Tree, device, directory, regular, symlink
from tests.boot_fixtures import boot_kernel, boot_rootfs
from tests.measured import run_measured
from tests.random_trees import random_tree

__all__ = ["boot_kernel", "boot_rootfs"]  # fixtures

START = 1 << 20
EPOCH = 1_700_000_000
MIB = 1 << 20


def write(tree: Tree, path: Path, *, start: int = START, dax: bool = True) -> erofs.Plan:
    plan = erofs.plan(tree, start=start, epoch=EPOCH, dax=dax)
    with path.open("wb") as file:
        file.truncate(plan.size)
        plan.write(file.fileno(), 0)
    return plan


def fsck(path: Path, *more: str) -> None:
    # It calls itself for every directory, and one on top of 1,900 others is more than 8 MiB of stack.
    argv = [command.find("prlimit"), "--stack=unlimited", command.find("fsck.erofs"), *more, str(path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert "<E>" not in told
    assert "<W>" not in told


def dump(path: Path, name: str) -> dict[str, str]:
    """What dump.erofs says of a path: NID, Links, Layout, Inode size and so on."""
    argv = [command.find("dump.erofs"), f"--path={name}", "-e", str(path)]
    told = subprocess.run(argv, capture_output=True, text=True, check=True, env=os.environ | {"TZ": "UTC"}).stdout
    found = dict(re.findall(r"(NID|Links|Layout|Inode size|Xattr size|Size|Uid|Gid|Access|Timestamp): +(\S+)", told))
    found["time"] = told.partition("Timestamp: ")[2].partition("\n")[0]
    found["extents"] = " ".join(re.findall(r": +(\d+)\.\. *\d+ \|", told)[1::2])
    return found


def draft(**files: Entry) -> Tree:
    made = Draft()
    made.put("/", directory(mtime_ns=0))
    for name, entry in files.items():
        made.put("/" + name.replace("__", "/"), entry)
    return made.tree()


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


# Oracles


@pytest.mark.parametrize("dax", [True, False])
def test_an_empty_tree_is_a_clean_filesystem(dax: bool, tmp_path: Path) -> None:
    assert write(draft(), tmp_path / "fs", dax=dax).size == 2 * 4096
    fsck(tmp_path / "fs")


@pytest.mark.parametrize("dax", [True, False])
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 1 << 32))
def test_no_tree_makes_fsck_complain(dax: bool, seed: int, tmp_path: Path) -> None:
    write(random_tree(seed), tmp_path / "fs", dax=dax)
    fsck(tmp_path / "fs")


@pytest.mark.slow
@pytest.mark.parametrize("dax", [True, False])
def test_a_thousand_trees_are_clean(dax: bool, tmp_path: Path) -> None:
    for seed in range(1000):
        write(random_tree(seed), tmp_path / "fs", start=seed * 4096, dax=dax)
        fsck(tmp_path / "fs")


@pytest.mark.parametrize("dax", [True, False])
def test_what_fsck_extracts_is_what_the_tree_holds(dax: bool, tmp_path: Path) -> None:
    sizes = [0, 1, 4000, 4031, 4032, 4033, 4064, 4095, 4096, 4097, 8191, 8192, 10_000, 65_536, 65_537, 3 * MIB + 1]
    files = {f"f{size}": regular(os.urandom(size), mtime_ns=size) for size in sizes}
    files |= {f"many__{number:x}": regular(b"x" * number) for number in range(3000)}
    files |= {f"link{size}": symlink("t" * size) for size in (1, 59, 4031, 4032, 4033, 4064, 4065, 4095)}
    tree = draft(**files)
    write(tree, tmp_path / "fs", dax=dax)
    out = tmp_path / "out"
    fsck(tmp_path / "fs", f"--extract={out}")
    found = {"/" + str(path.relative_to(out)) for path in out.rglob("*")}
    assert found | {"/"} == set(tree)
    for path, entry in tree.items():
        here = out / path[1:]
        if entry.is_file:
            assert here.read_bytes() == b"".join(entry.content.chunks()), path
        elif entry.is_symlink:
            assert os.readlink(here) == entry.target  # noqa: PTH115


def test_every_kind_of_inode_is_what_it_was(tmp_path: Path) -> None:
    tree = draft(
        file=Entry(mode=stat.S_IFREG | 0o4755, uid=100_000, gid=2**32 - 2, mtime_ns=-1, content=Bytes(b"hello")),
        null=device(stat.S_IFCHR, 0o666, 0, 0),
        pipe=Entry(mode=stat.S_IFIFO | 0o600, mtime_ns=0),
        sub__dir=directory(0o1777, mtime_ns=(1 << 33) * 10**9 + 123_456_789),
    )
    image = tmp_path / "fs"
    write(tree, image)
    fsck(image)
    file = dump(image, "/file")
    assert (file["Size"], file["Uid"], file["Gid"]) == ("5", "100000", "4294967294")
    assert file["time"] == "1969-12-31 23:59:59.999999999"
    assert file["Access"].startswith("0755/"), "dump.erofs knows no more of it"
    assert dump(image, "/null")["Access"].startswith("0666/")
    assert dump(image, "/pipe")["Access"].startswith("0600/")
    assert dump(image, "/sub/dir")["time"] == "2242-03-16 12:56:32.123456789"


def test_a_socket_is_left_out_and_named(tmp_path: Path) -> None:
    socket = Entry(mode=stat.S_IFSOCK | 0o755, mtime_ns=0)
    plan = write(draft(run__sock=socket, other=socket), tmp_path / "fs")
    fsck(tmp_path / "fs")
    assert plan.skipped == ("/other", "/run/sock")
    assert dump(tmp_path / "fs", "/run")["Links"] == "2"


def test_hard_links_are_one_inode(tmp_path: Path) -> None:
    made = draft(a=regular(b"x"), l=symlink("a")).edit()
    made.link("/b", "/a")
    made.link("/m", "/l")
    write(made.tree(), tmp_path / "fs")
    fsck(tmp_path / "fs")
    assert dump(tmp_path / "fs", "/a")["NID"] == dump(tmp_path / "fs", "/b")["NID"]
    assert dump(tmp_path / "fs", "/m")["Links"] == "2"


def test_an_inode_is_compact_where_that_loses_nothing(tmp_path: Path) -> None:
    now = EPOCH * 10**9
    tree = draft(
        small=regular(b"", mtime_ns=now),
        later=regular(b"", mtime_ns=now + 1),
        owned=replace(regular(b"", mtime_ns=now), uid=1 << 16),
        most=replace(regular(b"", mtime_ns=now), gid=(1 << 16) - 1),
        untimed=directory(),
    )
    write(tree, tmp_path / "fs")
    fsck(tmp_path / "fs")
    sizes = {path: dump(tmp_path / "fs", path)["Inode size"] for path in tree if path != "/"}
    assert sizes == {"/small": "32", "/later": "64", "/owned": "64", "/most": "32", "/untimed": "32"}
    for path in ("/small", "/untimed"):
        assert dump(tmp_path / "fs", path)["time"] == "2023-11-14 22:13:20.000000000"


# Where files lie


def test_dax_can_map_every_file_and_the_large_ones_with_huge_pages(tmp_path: Path) -> None:
    files = {f"big{n}": regular(bytes([n]) * (2 * MIB + n * 12345)) for n in range(1, 5)}
    files |= {f"small{n:03}": regular(bytes([n]) * (n * 1000 + 1)) for n in range(200)}
    image = tmp_path / "fs"
    plan = write(draft(**files), image, start=START + 4096)
    fsck(image)
    for name in files:
        told = dump(image, f"/{name}")
        at = int(told["extents"].split()[-1])
        assert told["Layout"] == "0", "flat and plain"
        assert at % 4096 == 0
        if name.startswith("big"):
            assert (START + 4096 + at) % (2 * MIB) == 0
    used = sum(-(-entry.content.size // 4096) for entry in files.values())
    assert plan.size // 4096 < used * 1.1, "small files fill what alignment leaves"


def test_without_dax_small_files_lie_with_their_inodes(tmp_path: Path) -> None:
    tree = draft(**{f"small{n:03}": regular(bytes([n]) * 500) for n in range(200)})
    assert write(tree, tmp_path / "packed", dax=False).size < 200 * 650
    assert write(tree, tmp_path / "mapped").size > 200 * 4096
    fsck(tmp_path / "packed")
    assert dump(tmp_path / "packed", "/small007")["Layout"] == "2"


def test_without_dax_metadata_has_no_gaps_to_speak_of(tmp_path: Path) -> None:
    tree = draft(**{f"f{n:04}": regular(b"x" * (n * 37 % 4000)) for n in range(2000)})
    used = sum(entry.content.size + 64 + 18 for entry in tree.values())
    assert write(tree, tmp_path / "fs", dax=False).size < used * 1.15
    fsck(tmp_path / "fs")


def spooled(size: int) -> Spool:
    spool = Spool()
    spool.append(os.urandom(size))
    return spool


@pytest.mark.parametrize("dax", [True, False])
def test_a_sparse_file_takes_the_room_of_its_pieces(dax: bool, tmp_path: Path) -> None:
    spool = spooled(6 * MIB)
    pieces = ((0, 0, 100), (3 * MIB, 100, 3 * MIB), (50 * MIB + 5, 3 * MIB + 100, 2 * MIB), ((60 << 30) - 10, 0, 10))
    tree = draft(sparse=regular(Sparse(spool, 60 << 30, pieces)), hole=regular(Sparse(spool, 9 * MIB, ())))
    tree._digest = "00" * 32  # of 60 GiB, otherwise
    image = tmp_path / "fs"
    plan = write(tree, image, dax=dax)
    assert plan.size < 20 * MIB
    assert allocated(image) < 6 * MIB
    with image.open("rb") as file:
        for at, source, size in pieces:
            assert os.pread(file.fileno(), size, where(image, "/sparse", at)) == spool.read(source, size)
    assert dump(image, "/sparse")["Layout"] == "4"


def where(image: Path, name: str, offset: int) -> int:
    """Where byte `offset` of a file in chunks of 2 MiB is, by dump.erofs, which says 0 of a hole."""
    starts = dump(image, name)["extents"].split()
    return int(starts[offset // (2 * MIB)]) + offset % (2 * MIB)


def test_a_small_hole_is_one_of_the_image(tmp_path: Path) -> None:
    spool = spooled(4096)
    write(draft(f=regular(Sparse(spool, MIB, ((8192, 0, 4096),)))), tmp_path / "fs")
    fsck(tmp_path / "fs", f"--extract={tmp_path / 'out'}")
    assert (tmp_path / "out/f").read_bytes() == bytes(8192) + spool.read(0, 4096) + bytes(MIB - 12288)
    assert allocated(tmp_path / "fs") <= 5 * 4096


@pytest.mark.parametrize("dax", [True, False])
def test_what_is_written_takes_two_percent_more_than_its_contents_at_most(dax: bool, tmp_path: Path) -> None:
    spool = spooled(8 * MIB)
    files = {f"d{n % 20}__f{n}": regular(Slice(spool, n * 4096, 20 * 4096 + n)) for n in range(1000)}
    write(draft(**files), tmp_path / "fs", dax=dax)
    content = sum(-(-entry.content.size // 4096) * 4096 for entry in files.values())
    assert allocated(tmp_path / "fs") < content * 1.02


# Attributes


def test_attributes_that_many_have_are_stored_once(tmp_path: Path) -> None:
    label = {"security.selinux": b"system_u:object_r:usr_t:s0\0" * 4}
    tree = draft(**{f"f{n}": replace(regular(b""), xattrs=label) for n in range(1000)})
    plan = write(tree, tmp_path / "fs")
    fsck(tmp_path / "fs")
    assert plan.size < 1000 * (96 + 12 + 4) * 1.1
    assert dump(tmp_path / "fs", "/f7")["Xattr size"] == "16"


def test_an_inode_may_have_more_attributes_than_can_be_shared(tmp_path: Path) -> None:
    many = {f"user.{number:03}": b"v" * 60 for number in range(300)}
    write(draft(a=replace(regular(b""), xattrs=many), b=replace(regular(b""), xattrs=many)), tmp_path / "fs")
    fsck(tmp_path / "fs")
    assert dump(tmp_path / "fs", "/a")["Xattr size"] == str(12 + 255 * 4 + 45 * 68)


@pytest.mark.parametrize(
    ("entry", "rule"),
    [
        (replace(regular(b""), xattrs={"weird.name": b""}), "weird.name"),
        (replace(regular(b""), xattrs={"system.other": b""}), "system.other"),
        (replace(regular(b""), xattrs={"user.v": b"x" * 65536}), "65535"),
        (replace(regular(b""), xattrs={f"user.{n}": b"x" * 60000 for n in range(5)}), "262148"),
        (device(stat.S_IFCHR, 0o600, 4096, 0), "4095"),
        (device(stat.S_IFBLK, 0o600, 0, 1 << 20), "1048575"),
        (symlink("x" * 4096), "4096"),
        (symlink(""), "0 bytes"),
        (symlink("a\0b"), "NUL"),
        (regular(b"", mtime_ns=(1 << 63) * 10**9), "64 bits"),
    ],
)  # fmt: skip
def test_what_erofs_cannot_hold_is_refused_by_path(entry: Entry, rule: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^'/f': .*{re.escape(rule)}"):
        write(draft(f=entry), tmp_path / "fs")


@dataclass(frozen=True)
class Enormous:
    """Says it has many bytes; nobody asks for them."""

    size: int = 1 << 44

    def chunks(self) -> Iterator[bytes]:
        return iter(())

    def copy_to(self, descriptor: int, offset: int) -> None:
        raise AssertionError("copied")


def test_more_blocks_than_32_bits_can_count_are_refused(tmp_path: Path) -> None:
    content: Content = Enormous()
    with pytest.raises(InputError, match=r"2\^32 \(16 TiB\)"):
        erofs.plan(draft(f=regular(content)), start=START, epoch=EPOCH)


def test_a_file_of_5_gib_and_what_lies_behind_it_are_found(tmp_path: Path) -> None:
    made = draft(a__huge=regular(Enormous(5 << 30)), b__after=regular(b"after" * MIB))
    plan = erofs.plan(made, start=START, epoch=EPOCH)
    with (tmp_path / "fs").open("wb") as file:
        file.truncate(plan.size)
        erofs.Plan(
            size=plan.size, uuid=plan.uuid, skipped=(),
            pieces=[piece for piece in plan.pieces if not isinstance(piece[1], Enormous)],
        ).write(file.fileno(), 0)  # fmt: skip
    told = dump(tmp_path / "fs", "/a/huge")
    assert (told["Size"], told["Inode size"]) == (str(5 << 30), "64")
    with (tmp_path / "fs").open("rb") as file:
        at = int(dump(tmp_path / "fs", "/b/after")["extents"])
        assert at > 5 << 30
        assert os.pread(file.fileno(), 5000, at) == b"after" * 1000


@pytest.mark.parametrize("room", [Room(writable=True), Room(size=1 << 30), Room(free=4096)])
def test_room_is_refused_because_nobody_could_use_it(room: Room) -> None:
    with pytest.raises(SpecError, match="read-only"):
        erofs.plan(draft(), start=START, epoch=EPOCH, room=room)


# The same bytes


def test_the_same_tree_gives_the_same_bytes_whatever_order_it_was_made_in(tmp_path: Path) -> None:
    names = [f"d{n % 7}__f{n}" for n in range(300)]
    attributes = [("user.a", b"1" * 50), ("security.b", b"2"), ("trusted.c", b"3" * 50)]

    def made(step: int) -> Tree:
        return draft(**{
            name: replace(regular(name.encode() * 100), xattrs=dict(attributes[::step])) for name in names[::step]
        })  # fmt: skip

    first, second = write(made(1), tmp_path / "a"), write(made(-1), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert first.uuid == second.uuid


def test_another_byte_in_a_file_gives_another_uuid() -> None:
    plans = [erofs.plan(draft(f=regular(data)), start=START, epoch=EPOCH) for data in (b"a", b"b")]
    assert plans[0].uuid != plans[1].uuid
    assert plans[0].size == plans[1].size


def test_nothing_is_written_outside_of_what_was_planned(tmp_path: Path) -> None:
    plan = erofs.plan(random_tree(11), start=START, epoch=EPOCH, dax=False)
    before, behind = b"\xaa" * 8192, b"\xbb" * 8192
    with (tmp_path / "fs").open("wb+") as file:
        file.write(before)
        file.seek(len(before) + plan.size)
        file.write(behind)
        file.flush()
        plan.write(file.fileno(), len(before))
        file.seek(0)
        data = file.read()
    assert data[:8192] == before
    assert data[-8192:] == behind
    assert len(data) == plan.size + 16384


class Shrunk:
    """A backing file that has become shorter."""

    descriptor = -1
    size = 100

    def read(self, offset: int, length: int) -> bytes:
        return b"x" * (length // 2)

    def check(self) -> None:
        pass


def test_a_file_that_became_shorter_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OsbuilderError, match="shorter"):
        write(draft(f=regular(Slice(Shrunk(), 0, 100))), tmp_path / "fs")


_MEMORY = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from osbuild.filesystem import erofs
from osbuild.tree import Draft, Slice, Spool, regular
spool = Spool()
for _ in range(64):
    spool.append(os.urandom(1 << 20))
draft = Draft()
for number in range(100_000):
    content = Slice(spool, number * 600 % (60 << 20), 2000)
    draft.put(f"/usr/lib/p{{number // 50:05}}/file-{{number:06}}", regular(content, mtime_ns=number))
tree = draft.tree()
del draft
plan = erofs.plan(tree, start=1 << 20, epoch=0, dax=sys.argv[1] == "dax")
with open(sys.argv[2], "wb") as file:
    file.truncate(plan.size)
    plan.write(file.fileno(), 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["dax", "packed"])
def test_a_hundred_thousand_files_take_less_than_200_mb_of_memory(way: str, tmp_path: Path) -> None:
    done, kibibytes = run_measured([sys.executable, "-c", _MEMORY, way, str(tmp_path / "fs")])
    assert done.returncode == 0, done.stderr
    assert kibibytes < 200_000
    fsck(tmp_path / "fs")


# The guest


@pytest.mark.parametrize(
    ("dax", "words"),
    [(True, ("rootflags=dax", "ro", "rootfstype=erofs")), (False, ("rootflags=ro", "rootfstype=erofs"))],
)
def test_kernel_words_are_those_of_kata(dax: bool, words: tuple[str, ...]) -> None:
    assert erofs.mount_words(dax=dax) == words


@pytest.mark.boot
@pytest.mark.parametrize("header", [True, False], ids=["nvdimm", "virtio-blk"])
def test_a_guest_boots_from_it(header: bool, boot_kernel: Kernel, boot_rootfs: Rootfs, tmp_path: Path) -> None:
    plan = erofs.plan(boot_rootfs.tree, start=FILESYSTEM_START, epoch=0, dax=header)
    image = build_nvdimm_image(erofs, plan, tmp_path / "rootfs.img", name="erofs", header=header)
    report = smoke.run(Machine(kernel=boot_kernel, root=image, memory_mib=256), tmp_path / "work")
    assert report.verdict is Verdict.passed, report
    (root,) = [check for check in report.checks if check.name == "root"]
    assert "erofs" in root.detail
    assert ("dax=always" in root.detail) == header
