"""What lies where in an image, on what we write, on what others write, and on damaged ones."""

from __future__ import annotations

import random
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osbuild import command
from osbuild.borrowed import Borrowed
from osbuild.disk_layout import DiskLayout, read_layout
from osbuild.filesystem import erofs, ext4
from osbuild.nvdimm_image import build_nvdimm_image, fletcher64
from osbuild.tree import Tree, directory, regular

MIB = 1 << 20
TREE = Tree({"/": directory(mtime_ns=0), "/init": regular(b"#!/bin/sh\n", 0o755)})


def image(path: Path, *, header: bool = True, hashed: bool = False, kind: str = "ext4") -> Path:
    filesystem = ext4 if kind == "ext4" else erofs
    plan = filesystem.plan(TREE, start=MIB, epoch=0)
    build_nvdimm_image(filesystem, plan, path, name=kind, header=header, hashed=hashed)
    return path


def layout(path: Path) -> DiskLayout:
    found = read_layout(Borrowed(path))
    assert found is not None
    return found


def changed(path: Path, at: int, data: bytes) -> Path:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)
    return path


@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_everything_is_where_we_put_it(kind: str, tmp_path: Path) -> None:
    found = layout(image(tmp_path / "i", hashed=True, kind=kind))
    assert found.problems == ()
    assert found.outer is not None
    assert found.inner is not None
    assert found.pfn is not None
    assert found.pfn.problems == ()
    assert dict(found.pfn.fields)["checksum"] == "0x685b032be3943830"
    assert (found.outer.at, found.inner.at) == (0, 2 * MIB)
    assert [(part.number, part.kind) for part in found.partitions] == [(1, kind), (2, "hash tree")]
    assert found.partitions[0].start == 3 * MIB
    assert found.partitions[1].start + found.partitions[1].size == found.size


def test_partitions_are_those_that_sfdisk_sees(tmp_path: Path) -> None:
    path = image(tmp_path / "i", hashed=True)
    told = subprocess.run(
        [command.find("sfdisk"), "--dump", str(path)], capture_output=True, text=True, check=True
    ).stdout
    seen = [
        tuple(int(part.partition("=")[2]) * 512 for part in line.split(":")[1].split(",")[:2])
        for line in told.splitlines()
        if "start=" in line
    ]
    assert seen == [(part.start, part.size) for part in layout(path).partitions]


def test_a_plain_disk_has_no_second_view(tmp_path: Path) -> None:
    found = layout(image(tmp_path / "i", header=False))
    assert (found.pfn, found.inner, found.problems) == (None, None, ())
    assert found.partitions[0].start == MIB


def test_a_disk_that_sfdisk_made_is_read(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
        plan = ext4.plan(TREE, start=MIB, epoch=0)
        plan.write(file.fileno(), MIB)
    subprocess.run(
        [command.find("sfdisk"), "-q", str(path)], input=b"label: dos\nstart=2048, size=20480, type=83\n", check=True
    )
    found = layout(path)
    assert found.problems == ()
    assert [(part.start, part.size, part.kind) for part in found.partitions] == [(MIB, 10 * MIB, "ext4")]


def test_a_filesystem_alone_is_one_partition_without_a_number(tmp_path: Path) -> None:
    plan = ext4.plan(TREE, start=0, epoch=0)
    with (tmp_path / "fs").open("wb") as file:
        file.truncate(plan.size)
        plan.write(file.fileno(), 0)
    found = layout(tmp_path / "fs")
    assert found.outer is None
    assert [(part.number, part.start, part.kind) for part in found.partitions] == [(0, 0, "ext4")]


DAMAGE = {
    "no first MBR": (510, b"\0", "there is no MBR at 0"),
    "no second MBR": (2 * MIB + 510, b"\0", "there is no MBR at 2097152"),
    "no header": (4096, b"X", "are no nd_pfn superblock"),
    "another checksum": (4096 + 4088, b"\0", "its checksum is"),
    "a mode": (4096 + 72, b"\7", "its mode is 7"),
    "a data offset": (4096 + 56, struct.pack("<Q", 3 * MIB), "no multiple of its align"),
    "a data offset beyond the end": (4096 + 56, struct.pack("<Q", 1 << 60), "beyond the end"),
    "an align": (4096 + 84, struct.pack("<I", 12345), "no power of two"),
    "a later version": (4096 + 54, b"\x09", "its version is 0.9"),
    "a cut at its end": (4096 + 80, b"\1", "1 from the end"),
    "a shifted partition": (2 * MIB + 454, struct.pack("<I", 4096), "the MBRs disagree on partition 1"),
    "a longer partition": (458, struct.pack("<I", 1 << 30), "and the file at"),
    "a boot flag": (446, b"\x13", "the kernel takes it for no MBR"),
    "a type": (450, b"\x07", "not 0x83"),
    "a signature": (440, b"\xaa\xbb\xcc\xdd", "different disk signatures"),
    "a filesystem": (3 * MIB + 1080, b"\0\0", "no partition holds a filesystem"),
}


@pytest.mark.parametrize(("at", "data", "sentence"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_said_in_a_sentence(at: int, data: bytes, sentence: str, tmp_path: Path) -> None:
    found = layout(changed(image(tmp_path / "i"), at, data))
    assert any(sentence in problem for problem in found.problems), found.problems


def test_every_flipped_bit_of_the_header_is_noticed(tmp_path: Path) -> None:
    path = image(tmp_path / "i")
    chance = random.Random(3)
    clean = path.read_bytes()[4096:8192]
    for _ in range(60):
        block = bytearray(clean)
        block[chance.randrange(4096)] ^= 1 << chance.randrange(8)
        assert layout(changed(path, 4096, bytes(block))).problems


def test_a_header_with_other_values_and_a_right_checksum_is_judged_by_its_values(tmp_path: Path) -> None:
    path = image(tmp_path / "i")
    block = bytearray(path.read_bytes()[4096:8192])
    struct.pack_into("<I", block, 72, 2)  # PMEM: as good for the kernel
    struct.pack_into("<Q", block, 4088, 0)
    struct.pack_into("<Q", block, 4088, fletcher64(bytes(block)))
    found = layout(changed(path, 4096, bytes(block)))
    assert found.problems == ()
    assert found.pfn is not None
    assert dict(found.pfn.fields)["mode"] == "2 (PMEM)"


def test_bytes_behind_the_last_partition_are_said(tmp_path: Path) -> None:
    path = image(tmp_path / "i")
    end = path.stat().st_size
    with path.open("r+b") as file:
        file.truncate(end + 4 * MIB)
    assert layout(path).problems == (), "room behind it is nothing to speak of"
    found = layout(changed(path, end + 3 * MIB + 5, b"x"))
    assert found.problems == (
        f"no partition reaches to the bytes from {end + 3 * MIB + 5} on: the last one ends at {end}",
    )


def test_overlapping_partitions_are_said(tmp_path: Path) -> None:
    path = image(tmp_path / "i", hashed=True)
    changed(path, 470, struct.pack("<I", 6144 + 8))
    assert any("before the one in front of it ends" in problem for problem in layout(path).problems)


def test_a_size_that_no_nvdimm_can_have_is_said(tmp_path: Path) -> None:
    path = image(tmp_path / "i")
    with path.open("ab") as file:
        file.write(bytes(512))
    assert any("no multiple of 2 MiB" in problem for problem in layout(path).problems)


@pytest.mark.parametrize("data", [b"", b"x", bytes(100_000), b"\x7fELF" + bytes(5000), b"text\n" * 3000], ids=len)
def test_what_is_no_image_is_none(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(data)
    assert read_layout(Borrowed(tmp_path / "file")) is None


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(head=st.binary(max_size=64), places=st.lists(st.tuples(st.integers(0, 9000), st.binary(max_size=20))))
def test_no_bytes_make_it_crash(head: bytes, places: list[tuple[int, bytes]], tmp_path: Path) -> None:
    data = bytearray(2 * MIB + 4096)
    data[446 : 446 + len(head)] = head
    data[510:512] = data[2 * MIB + 510 : 2 * MIB + 512] = b"\x55\xaa"
    data[4096:4112] = b"NVDIMM_PFN_INFO\0"
    for at, piece in places:
        data[at : at + len(piece)] = piece
    (tmp_path / "file").write_bytes(data)
    read_layout(Borrowed(tmp_path / "file"))
