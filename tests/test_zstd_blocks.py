"""zstd's blocks: where they end, and that a change in an initramfs leaves most of them, and their parts, the same."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

from osbuild import parts, publication, zstd
from osbuild.artifacts import Rootfs
from osbuild.borrowed import Borrowed
from osbuild.initrd import LEVEL, build_initrd
from osbuild.tree import Draft, regular, symlink
from osbuild.zstd_blocks import block_ends

MIB = 1 << 20
LETTERS = bytes(b"abcdefghijklmnop"[number % 16] for number in range(256))


def text(size: int, seed: int) -> bytes:
    """What packs to half of it."""
    return random.Random(seed).randbytes(size).translate(LETTERS)


def ends(path: Path) -> list[int]:
    return list(block_ends(Borrowed(path)))


@pytest.mark.parametrize(
    "words",
    [(), ("-19",), ("--no-check",), ("--no-content-size",), ("--stream-size=400000",), ("--long=27",)],
    ids=lambda words: " ".join(words) or "as it is",
)
def test_the_last_block_of_what_zstd_writes_ends_where_the_file_ends(words: tuple[str, ...], tmp_path: Path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("zstd is not installed")
    data = text(400_000, 1)
    packed = subprocess.run(["zstd", "-qc", *words], input=data, capture_output=True, check=True).stdout
    (tmp_path / "one").write_bytes(packed)
    (tmp_path / "two").write_bytes(packed + packed)
    found = ends(tmp_path / "one")
    assert found[-1] == len(packed)
    assert len(found) >= 400_000 // (128 << 10)
    assert ends(tmp_path / "two") == found + [end + len(packed) for end in found]


def test_zeros_and_noise_end_where_they_end(tmp_path: Path) -> None:
    for data in (b"", b"x", bytes(3 * MIB), random.Random(1).randbytes(300_000)):
        (tmp_path / "i").write_bytes(zstd.frame(data, 3))
        assert ends(tmp_path / "i")[-1] == (tmp_path / "i").stat().st_size


def test_what_is_cut_off_or_no_zstd_is_a_file_of_plain_blocks(tmp_path: Path) -> None:
    packed = zstd.frame(text(9 * MIB, 1), 3)
    for number, data in enumerate((packed[:-1], packed[:3_000_001], packed + b"more", packed[:4] + text(99_999, 2))):
        path = tmp_path / str(number)
        path.write_bytes(data)
        assert all(end <= len(data) for end in ends(path))
        at = 0
        for cut in parts.cuts(Borrowed(path), "i"):
            assert cut.offset == at
            at += cut.size
        assert at == len(data)


def test_its_bytes_do_not_depend_on_how_they_come() -> None:
    data = text(20 * MIB, 3)
    found = set()
    for seed in range(3):
        choose = random.Random(seed)
        packer, made, at = zstd.compressor(LEVEL), [], 0
        while at < len(data):
            size = choose.choice((1, 31, 32, 4096, 131_072, MIB, 5 * MIB, 20 * MIB))
            made.append(packer.compress(data[at : at + size]))
            at += size
        found.add(b"".join((*made, packer.flush())))
    assert len(found) == 1


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return initramfs(tmp_path_factory.mktemp("initramfs") / "first", agent=text(300_000, 98), other=text(99, 99))


def initramfs(path: Path, *, agent: bytes, other: bytes) -> Path:
    """48 MiB, in the midst of which lie an agent and another file."""
    draft = Draft()
    draft.put("/init", symlink("/sbin/init"))
    draft.put("/sbin/init", regular(agent, 0o755, mtime_ns=0))
    draft.put("/m/10-other", regular(other, mtime_ns=0))
    for number in range(48):
        draft.put(f"/{'az'[number % 2]}/{number:02}", regular(text(MIB, number), mtime_ns=0))
    return build_initrd(Rootfs(tree=draft.tree(), init="/init", epoch=0), path).file.path


def new_share(first: Path, second: Path) -> float:
    """How much of the second is in no part of the first."""
    before, after = (parts.known(Borrowed(path), "i") for path in (first, second))
    return sum(cut.size for sha256, cut in after.items() if sha256 not in before) / second.stat().st_size


def test_parts_of_an_initramfs_are_neither_too_short_nor_too_long(first: Path) -> None:
    size = first.stat().st_size
    found = list(parts.cuts(Borrowed(first), "i"))
    part = publication.part_size(size)
    assert sum(cut.size for cut in found) == size
    assert all(part / 4 <= cut.size < 4 * part + (128 << 10) + 3 for cut in found[:-1])
    assert size / part / 2 < len(found) < 2 * size / part


@pytest.mark.parametrize("change", [-200_000, 0, 777_777], ids=["smaller", "of the same size", "larger"])
def test_another_agent_leaves_nine_tenths_of_an_initramfs_as_they_were(
    change: int, first: Path, tmp_path: Path
) -> None:
    second = initramfs(tmp_path / "second", agent=text(300_000 + change, 97), other=text(99, 99))
    assert 0 < new_share(first, second) < 0.1


def test_another_file_leaves_two_thirds_of_an_initramfs_as_they_were(first: Path, tmp_path: Path) -> None:
    second = initramfs(tmp_path / "second", agent=text(300_000, 98), other=text(98, 99))
    assert 0 < new_share(first, second) < 0.33
