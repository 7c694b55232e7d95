"""Indexed directories: debugfs hashes names as we do, and finds by the index what lies in the leaves."""

from __future__ import annotations

import hashlib
import random
import re
import struct
import subprocess
import uuid
from pathlib import Path

import pytest

from osbuild import command
from osbuild.filesystem import ext4
from osbuild.filesystem.ext4_directory import half_md4, pack
from osbuild.tree import Draft, Tree, directory, regular
from tests.test_ext4 import check, debugfs, write

SEED = uuid.UUID("01234567-89ab-cdef-0123-456789abcdef")
LENGTHS = (*range(1, 36), 40, 63, 64, 65, 96, 97, 127, 128, 200, 254, 255)


def test_a_names_hash_is_what_debugfs_says() -> None:
    source = random.Random(1)
    words = struct.unpack("<4I", SEED.bytes)
    for length in LENGTHS:
        name = "".join(source.choices("abcdefghijklmnopqrstuvwxyz0123456789_", k=length))
        said = subprocess.run(
            [command.find("debugfs"), "-R", f"dx_hash -h half_md4 -s {SEED} {name}"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert int(re.findall(r"is 0x([0-9a-f]+)", said.stdout)[0], 16) == half_md4(name.encode(), words), name


def tree(count: int, name: str = "name-{}") -> Tree:
    made = Draft()
    for number in range(count):
        made.put(f"/d/{name.format(number)}", regular(b""))
    return made.tree()


@pytest.mark.parametrize("count", [1, 90, 110, 5_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_any_number_of_names_is_found(count: int, tmp_path: Path) -> None:
    image = tmp_path / "fs"
    name = "a-name-of-some-length-{}-"
    write(tree(count, name), image)
    check(image)
    indexed = count > 200
    told = debugfs(image, "htree_dump /d") if indexed else debugfs(image, "stat /d")
    if indexed:
        assert "Hash Version: 1" in told
        assert f"Indirect levels: {int(count == 100_000)}" in told
        assert len(re.findall(r"length-\d+-", told)) == count
    assert debugfs(image, f"stat /d/{name.format(count - 1)}").startswith("Inode:")


def test_names_of_every_length_share_leaves(tmp_path: Path) -> None:
    made = Draft()
    source = random.Random(2)
    for length in (*range(1, 256), *range(200, 256)):
        for _ in range(6):
            name = bytes(source.choice(b"abcXYZ\xff\x80\xe4\n ") for _ in range(length))
            made.put("/d/" + name.decode(errors="surrogateescape"), regular(b""))
    image = tmp_path / "fs"
    write(made.tree(), image)
    check(image)


def test_a_hash_that_goes_on_in_the_next_leaf_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osbuild.filesystem.ext4_directory.half_md4", lambda name, seed: 0x1000)
    children = [(b"name-%06d" % number, 20 + number, 1) for number in range(600)]
    data, indexed = pack("/d", 12, 2, children, 7, (1, 2, 3, 4))
    assert indexed
    _, count, first = struct.unpack_from("<HHI", data, 32)
    hashes = [struct.unpack_from("<II", data, 40 + 8 * number) for number in range(count - 1)]
    assert count > 2
    assert first == 1
    assert all(found == 0x1001 for found, _ in hashes)


def test_leaves_are_in_the_order_of_hashes(tmp_path: Path) -> None:
    image = tmp_path / "fs"
    write(tree(3000), image)
    hashes = [
        int(text, 16) for text in re.findall(r"\d+ 0x([0-9a-f]{8})-[0-9a-f]{8} \(\d+\)", debugfs(image, "htree /d"))
    ]
    assert len(hashes) == 3000
    assert hashes == sorted(hashes)


def test_the_hash_seed_is_made_from_the_content(tmp_path: Path) -> None:
    def seed(image: Tree) -> str:
        write(image, tmp_path / "fs")
        told = subprocess.run(
            [command.find("dumpe2fs"), "-h", str(tmp_path / "fs")], capture_output=True, text=True, check=True
        )
        return str(re.findall(r"Directory Hash Seed: +(\S+)", told.stdout)[0])

    assert seed(tree(2)) == seed(tree(2)) != seed(tree(3))
    assert ext4.plan(tree(2), start=0, epoch=0).uuid != ext4.plan(tree(3), start=0, epoch=0).uuid


@pytest.mark.parametrize("names", [3, 300, 3000])
def test_a_plan_with_another_digest_is_the_one_that_was_made_with_it(names: int, tmp_path: Path) -> None:
    entries = {
        f"/d/{number:0{1 + number % 50}}": regular(bytes([number % 7]) * (number % 3)) for number in range(names)
    }
    tree = Tree({"/": directory(), "/d": directory(), "/e": regular(b"e" * 5000)} | entries)
    foreseen = ext4.plan(tree, start=1 << 20, epoch=0, digest="00" * 32)
    for number in range(1, 4):
        digest = f"{number:02}" * 32
        written = []
        for made in (foreseen.with_digest(digest), ext4.plan(tree, start=1 << 20, epoch=0, digest=digest)):
            with (tmp_path / "a").open("w+b") as file:
                file.truncate(made.size)
                made.write(file.fileno(), 0)
                file.seek(0)
                written.append((made.size, made.uuid, hashlib.sha256(file.read()).hexdigest()))
        assert written[0] == written[1]
