"""The DAX image: what the kernel's pmem driver and any disk driver find in it."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osbuild import command, nvdimm_image, verity
from osbuild.artifacts import DiskImage, File
from osbuild.errors import HostError, InputError, SpecError
from osbuild.filesystem import FILESYSTEMS, Filesystem, ext4, xfs
from osbuild.nvdimm_image import DATA_OFFSET, FILESYSTEM_START, MIB, Layout, build_nvdimm_image
from osbuild.tree import Draft, Entry, Tree, regular


def tree_of(size: int = 100_000) -> Tree:
    draft = Draft()
    draft.put("/etc/file", regular(b"x" * size))
    return draft.tree()


def build(out: Path, *, size: int = 100_000, align: int = 2 * MIB, header: bool = True, **more: Any) -> DiskImage:
    filesystem = FILESYSTEMS["ext4"]
    plan = filesystem.plan(tree_of(size), start=FILESYSTEM_START, epoch=0)
    return build_nvdimm_image(filesystem, plan, out, name="ext4", align=align, header=header, **more)


def partitions(path: Path) -> list[dict[str, Any]]:
    told = subprocess.run(
        [command.find("sfdisk"), "--json", str(path)], capture_output=True, text=True, check=True
    ).stdout
    table: dict[str, list[dict[str, Any]]] = json.loads(told)["partitiontable"]
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
        nvdimm_image.mbr([(3 * MIB, 2 << 40)], b"1234")


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


# --- With a hash tree -----------------------------------------------------------------------------------------------


def cut(path: Path, partition: dict[str, Any], out: Path) -> Path:
    with path.open("rb") as file:
        file.seek(partition["start"] * 512)
        out.write_bytes(file.read(partition["size"] * 512))
    return out


@pytest.mark.parametrize("header", [True, False], ids=["nvdimm", "plain"])
@pytest.mark.parametrize("align", [2 * MIB, 128 * MIB])
@pytest.mark.parametrize("salt", [b"", b"\xab" * 16], ids=["our salt", "a given salt"])
def test_veritysetup_verifies_partition_1_by_partition_2(header: bool, align: int, salt: bytes, tmp_path: Path) -> None:
    image = build(tmp_path / "img", size=9 * MIB, align=align, header=header, hashed=True, salt=salt)
    data, tree = partitions(image.file.path)
    assert image.verity is not None
    assert data["size"] * 512 == image.verity.blocks * 4096
    assert image.verity.salt == salt.hex() or not salt
    argv = [
        command.find("veritysetup"), "verify", "--no-superblock", f"--salt={image.verity.salt}",
        str(cut(image.file.path, data, tmp_path / "1")), str(cut(image.file.path, tree, tmp_path / "2")),
        image.verity.root_hash,
    ]  # fmt: skip
    assert subprocess.run(argv, check=False).returncode == 0
    argv[-1] = "00" * 32
    assert subprocess.run(argv, check=False, capture_output=True).returncode != 0


def test_both_views_show_the_same_two_partitions_to_sfdisk(tmp_path: Path) -> None:
    image = build(tmp_path / "img", hashed=True)
    whole = partitions(image.file.path)
    view = tmp_path / "view"
    view.write_bytes(image.file.path.read_bytes()[DATA_OFFSET:])
    inner = partitions(view)
    assert [(row["start"] - DATA_OFFSET // 512, row["size"]) for row in whole] == [
        (row["start"], row["size"]) for row in inner
    ]
    assert [row.get("bootable", False) for row in whole] == [True, False]
    assert whole[1]["start"] * 512 % MIB == 0
    assert (whole[1]["start"] + whole[1]["size"]) * 512 == image.file.size
    verdict = subprocess.run(
        [command.find("sfdisk"), "--verify", str(view)], capture_output=True, text=True, check=True
    )
    assert "No errors detected" in verdict.stdout


def test_the_words_for_verity_are_those_of_kata(tmp_path: Path) -> None:
    image = build(tmp_path / "img", hashed=True, words=("systemd.unit=x",))
    about = image.verity
    assert about is not None
    blocks = (partitions(image.file.path)[0]["size"] * 512) // 4096
    for words, disk in ((about.words, "/dev/vda"), (about.pmem_words, "/dev/pmem0p")):
        assert " ".join(words) == (
            f'dm-mod.create="dm-verity,,,ro,0 {8 * blocks} verity 1 {disk}1 {disk}2 4096 4096 {blocks} 0 '
            f'sha256 {about.root_hash} {about.salt}" root=/dev/dm-0 '
            "rootflags=data=ordered,errors=remount-ro ro rootfstype=ext4 systemd.unit=x"
        )
    assert about.params == (
        f"root_hash={about.root_hash},salt={about.salt},data_blocks={blocks},data_block_size=4096,hash_block_size=4096"
    )
    assert " ".join(image.words).endswith("rootfstype=ext4 systemd.unit=x")


def test_all_images_have_one_salt_and_each_content_its_root_hash(tmp_path: Path) -> None:
    one, same, other = (build(tmp_path / name, size=size, hashed=True) for name, size in (("a", 5), ("b", 5), ("c", 6)))
    assert one.verity == same.verity
    assert one.verity is not None
    assert other.verity is not None
    assert one.verity.salt == other.verity.salt == verity.DEFAULT_SALT.hex()
    assert one.verity.root_hash != other.verity.root_hash


def test_an_image_with_a_hash_tree_begins_with_the_same_filesystem(tmp_path: Path) -> None:
    plain, hashed = build(tmp_path / "a"), build(tmp_path / "b", hashed=True)
    size = partitions(hashed.file.path)[0]["size"] * 512
    first, second = (path.read_bytes()[3 * MIB :][:size] for path in (plain.file.path, hashed.file.path))
    assert first == second


# --- Sizes ----------------------------------------------------------------------------------------------------------

BLOCKS = st.integers(min_value=1, max_value=1 << 28).map(lambda blocks: blocks * 4096)
ALIGNS = st.sampled_from([2 * MIB, 6 * MIB, 128 * MIB, 1 << 30])


@given(size=BLOCKS, align=ALIGNS, header=st.booleans(), hashed=st.booleans())
def test_a_layout_around_a_filesystem_is_the_smallest_there_is(
    size: int, align: int, header: bool, hashed: bool
) -> None:
    layout = Layout.around(size, align=align, header=header, hashed=hashed)
    assert layout.total % align == 0
    assert layout.data_size >= size
    used = layout.data + size
    if hashed:
        assert layout.data_size - size < MIB
        assert layout.tree % MIB == 0
        used = layout.tree + verity.tree_size(layout.data_size)
    assert used <= layout.total < used + align


@given(count=st.integers(min_value=1, max_value=2000), align=ALIGNS, header=st.booleans(), hashed=st.booleans())
def test_a_layout_within_a_size_leaves_a_mebibyte_and_a_little_unused_at_most(
    count: int, align: int, header: bool, hashed: bool
) -> None:
    total = 6 * MIB + count * align
    total -= total % align
    layout = Layout.within(total, align=align, header=header, hashed=hashed)
    assert layout.total == total
    assert sum(size for _, size in layout.partitions) == total - layout.data
    assert layout.data_size % 4096 == 0
    if hashed:
        unused = total - layout.tree - verity.tree_size(layout.data_size)
        assert 0 <= unused <= MIB + total // 16_000 + 3 * 4096


def test_a_size_is_kept_exactly(tmp_path: Path) -> None:
    assert build(tmp_path / "img", hashed=True, total=64 * MIB).file.size == 64 * MIB


@pytest.mark.parametrize("total", [2 * MIB, 4 * MIB, 63 * MIB])
def test_a_size_that_cannot_be_is_refused(total: int, tmp_path: Path) -> None:
    with pytest.raises(SpecError):
        build(tmp_path / "img", total=total)
    assert list(tmp_path.iterdir()) == []


# --- Other formats, other uses --------------------------------------------------------------------------------------


def test_a_qcow2_file_is_the_same_disk_and_the_same_bytes_twice(tmp_path: Path) -> None:
    raw = build(tmp_path / "raw", size=9 * MIB, hashed=True)
    first = build(tmp_path / "a", size=9 * MIB, hashed=True, file_format="qcow2")
    second = build(tmp_path / "b", size=9 * MIB, hashed=True, file_format="qcow2")
    assert first.file.sha256 == second.file.sha256
    assert File.of(first.file.path) == first.file
    argv = [command.find("qemu-img"), "convert", "-O", "raw", str(first.file.path), str(tmp_path / "back")]
    subprocess.run(argv, check=True)
    assert File.of(tmp_path / "back").sha256 == raw.file.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "back", "raw"]
    checked = subprocess.run(
        [command.find("qemu-img"), "check", str(first.file.path)], capture_output=True, check=False
    )
    assert checked.returncode == 0


def test_a_qcow2_file_is_no_nvdimm(tmp_path: Path) -> None:
    image = build(tmp_path / "img", hashed=True, file_format="qcow2")
    assert (image.dax, image.format, image.words[0]) == (False, "qcow2", "root=/dev/vda1")
    assert image.verity is not None
    assert image.verity.pmem_words == ()


def test_without_qemu_img_no_qcow2_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="qemu-img is not installed") as caught:
        build(tmp_path / "img", file_format="qcow2")
    assert "qemu-utils" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def test_a_qemu_img_without_room_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "qemu-img"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\necho 'qemu-img: error while writing: No space left on device'; exit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    with pytest.raises(HostError, match="No space left"):
        build(tmp_path / "img", file_format="qcow2")
    assert os.listdir(tmp_path) == ["bin"]


@pytest.mark.parametrize("filesystem", [ext4, xfs], ids=["ext4", "xfs"])
def test_a_writable_disk_is_mounted_rw_and_a_writable_nvdimm_is_not(filesystem: Filesystem) -> None:
    words = nvdimm_image.root_words(filesystem, dax=False, writable=True)
    assert words[0] == "root=/dev/vda1"
    assert "rw" in words
    assert not {"ro", "rootflags=ro"} & set(words)
    assert nvdimm_image.root_words(filesystem, dax=True, writable=True)[2] == "ro"


@pytest.mark.parametrize("kind", FILESYSTEMS)
def test_sockets_are_counted_and_left_out(kind: str, tmp_path: Path) -> None:
    draft = tree_of().edit()
    draft.put("/run/socket", Entry(mode=stat.S_IFSOCK | 0o755))
    filesystem = FILESYSTEMS[kind]
    plan = filesystem.plan(draft.tree(), start=FILESYSTEM_START, epoch=0)
    assert build_nvdimm_image(filesystem, plan, tmp_path / "img", name=kind).skipped == 1
