"""The DAX image: what the kernel's pmem driver and any disk driver find in it."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
from pathlib import Path

import pytest

from osbuild import command, nvdimm_image
from osbuild.artifacts import DiskImage
from osbuild.errors import InputError, SpecError
from osbuild.filesystem import FILESYSTEMS
from osbuild.nvdimm_image import FILESYSTEM_START, MIB, build_nvdimm_image
from osbuild.tree import Draft, regular


def build(out: Path, *, size: int = 100_000, align: int = 2 * MIB, header: bool = True) -> DiskImage:
    draft = Draft()
    draft.put("/etc/file", regular(b"x" * size))
    filesystem = FILESYSTEMS["ext4"]
    plan = filesystem.plan(draft.tree(), start=FILESYSTEM_START, epoch=0)
    return build_nvdimm_image(filesystem, plan, out, name="ext4", align=align, header=header)


def partitions(path: Path) -> list[dict[str, int]]:
    told = subprocess.run(
        [command.find("sfdisk"), "--json", str(path)], capture_output=True, text=True, check=True
    ).stdout
    table: dict[str, list[dict[str, int]]] = json.loads(told)["partitiontable"]
    return table["partitions"]


def test_the_pfn_superblock_has_the_golden_checksum_and_digest() -> None:
    block = nvdimm_image.pfn_superblock()
    assert block[4088:].hex() == "303894e32b035b68"
    assert hashlib.sha256(block).hexdigest() == "b502df4b37a7b6ba1f3c93416b77768a9f6df41ce2ec7fe46804180ca2191553"


def test_both_views_show_the_same_partition_to_sfdisk(tmp_path: Path) -> None:
    image = build(tmp_path / "img")
    (whole,) = partitions(image.file.path)
    view = tmp_path / "view"
    view.write_bytes(image.file.path.read_bytes()[2 * MIB :])
    (inner,) = partitions(view)
    assert (whole["start"], inner["start"]) == (6144, 2048)
    assert whole["size"] == inner["size"] == (image.file.size - 3 * MIB) // 512
    verdict = subprocess.run(
        [command.find("sfdisk"), "--verify", str(image.file.path)], capture_output=True, text=True, check=True
    )
    assert "No errors detected" in verdict.stdout


def test_the_filesystem_in_the_partition_is_clean(tmp_path: Path) -> None:
    image = build(tmp_path / "img", size=9 * MIB)
    (tmp_path / "fs").write_bytes(image.file.path.read_bytes()[3 * MIB :])
    subprocess.run([command.find("e2fsck"), "-fn", str(tmp_path / "fs")], check=True, capture_output=True)


def test_the_superblock_lies_at_4_kib(tmp_path: Path) -> None:
    data = build(tmp_path / "img").file.path.read_bytes()
    assert data[4096:8192] == nvdimm_image.pfn_superblock()
    (offset,) = struct.unpack_from("<Q", data, 4096 + 56)
    assert data[offset + 510 : offset + 512] == b"\x55\xaa"


@pytest.mark.parametrize("align", [2 * MIB, 16 * MIB, 128 * MIB])
def test_the_size_is_a_multiple_of_what_was_asked_and_no_larger(align: int, tmp_path: Path) -> None:
    image = build(tmp_path / "img", align=align)
    assert image.file.size % align == 0
    assert image.file.size == align * -(-(3 * MIB + 4 * MIB + 200_000) // align)


def test_without_a_header_it_is_a_plain_disk(tmp_path: Path) -> None:
    image = build(tmp_path / "img", header=False)
    (partition,) = partitions(image.file.path)
    assert partition["start"] == 2048
    assert image.file.path.read_bytes()[4096:4112] == bytes(16)
    assert image.words[0] == "root=/dev/vda1"
    assert not any("dax" in word for word in image.words)


def test_the_words_are_those_of_kata(tmp_path: Path) -> None:
    assert " ".join(build(tmp_path / "img").words) == (
        "root=/dev/pmem0p1 rootflags=dax,data=ordered,errors=remount-ro ro rootfstype=ext4"
    )


@pytest.mark.parametrize("align", [0, -2 * MIB, MIB, 3 * MIB])
def test_an_alignment_that_dax_cannot_use_is_refused(align: int, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="multiple of 2 MiB"):
        build(tmp_path / "img", align=align)


def test_a_disk_too_large_for_an_mbr_is_refused() -> None:
    with pytest.raises(InputError, match="2 TiB"):
        nvdimm_image.mbr(3 * MIB, 3 << 40, b"1234")


def test_two_builds_give_the_same_bytes_whatever_the_umask(tmp_path: Path) -> None:
    first = build(tmp_path / "a")
    before = os.umask(0o077)
    try:
        second = build(tmp_path / "b")
    finally:
        os.umask(before)
    assert first.file.sha256 == second.file.sha256
    assert second.file.path.stat().st_mode & 0o777 == 0o644


def test_an_image_takes_only_the_room_its_content_needs(tmp_path: Path) -> None:
    image = build(tmp_path / "img", align=128 * MIB)
    assert image.file.path.stat().st_blocks * 512 < 2 * MIB
