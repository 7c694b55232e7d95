"""Compressed streams: damage, cuts, bombs, and what may and may not follow their ends."""

from __future__ import annotations

import gzip
import time
import zlib
from typing import Any

import pytest

from osbuild import zstd
from osbuild.errors import InputError
from osbuild.limits import Limits
from osbuild.uncompress import sniff, uncompressed

SKIPPED = b"\x50\x2a\x4d\x18\x04\0\0\0skip"  # a frame that readers pass over (RFC 8878, 3.1.2)


def _zstd(data: bytes) -> bytes:
    compressor = zstd.compressor(3)
    packed: bytes = compressor.compress(data) + compressor.flush()
    return packed


def _expand(data: bytes, kind: str, size: int = 1000, limits: Limits | None = None) -> bytes:
    pieces = (data[at : at + size] for at in range(0, len(data), size))
    return b"".join(uncompressed(pieces, kind, "here", limits))


@pytest.mark.parametrize(("kind", "pack"), [("gzip", gzip.compress), ("zstd", _zstd)])
class TestCompressedStreams:
    def test_any_cutting_into_pieces_gives_the_same(self, kind: str, pack: Any) -> None:
        data = bytes(range(256)) * 20_000
        for size in (1, 7, 100_000):
            assert _expand(pack(data[:50_000]), kind, size) == data[:50_000]
        assert _expand(pack(data), kind) == data
        assert _expand(pack(data), kind, 1 << 30) == data

    def test_several_members_are_one_stream(self, kind: str, pack: Any) -> None:
        for size in (1, 1000):
            assert _expand(pack(b"one") + pack(b"") + pack(b"two"), kind, size) == b"onetwo"

    def test_a_cut_is_noticed(self, kind: str, pack: Any) -> None:
        with pytest.raises(InputError, match="cut off"):
            _expand(pack(b"x" * 1000)[:-3], kind)

    def test_a_cut_in_a_later_member_is_noticed(self, kind: str, pack: Any) -> None:
        with pytest.raises(InputError, match="cut off"):
            _expand(pack(b"one") + pack(b"x" * 1000)[:-3], kind)

    def test_nothing_at_all_is_a_cut(self, kind: str, pack: Any) -> None:
        with pytest.raises(InputError, match="cut off"):
            _expand(b"", kind)

    def test_damage_is_noticed(self, kind: str, pack: Any) -> None:
        data = bytearray(pack(bytes(range(256)) * 100))
        data[len(data) // 2] ^= 0xFF
        with pytest.raises(InputError, match=r"damaged|cut off"):
            _expand(bytes(data), kind)

    def test_something_else_after_the_end_is_refused(self, kind: str, pack: Any) -> None:
        for size in (1, 1000):
            with pytest.raises(InputError, match="what follows"):
                _expand(pack(b"x") + b"garbage", kind, size)

    def test_more_bytes_than_an_image_may_have_are_refused(self, kind: str, pack: Any) -> None:
        data = pack(bytes(1001))
        assert len(_expand(data, kind, limits=Limits(image_bytes=1001))) == 1001
        with pytest.raises(InputError, match="more than 1000 bytes"):
            _expand(data, kind, limits=Limits(image_bytes=1000))

    def test_endless_empty_members_are_refused(self, kind: str, pack: Any) -> None:
        assert _expand(pack(b"") * 10, kind, limits=Limits(entries=10)) == b""
        with pytest.raises(InputError, match="more than 9 compressed streams"):
            _expand(pack(b"") * 10, kind, limits=Limits(entries=9))

    def test_a_hundred_thousand_empty_members_are_no_work(self, kind: str, pack: Any) -> None:
        # Each used to cost a copy of all that follows: 10 s for each MiB.
        began = time.monotonic()
        assert _expand(pack(b"") * 100_000, kind, 1 << 20) == b""
        assert time.monotonic() - began < 10

    def test_the_kind_is_known_by_the_first_bytes(self, kind: str, pack: Any) -> None:
        assert sniff(pack(b"")[:4]) == kind


def test_zeros_may_follow_gzip_data_and_nothing_after_them() -> None:
    packed = gzip.compress(b"x") + bytes(600)
    for size in (1, 19, 1000):
        assert _expand(packed, "gzip", size) == b"x"
        with pytest.raises(InputError, match="bytes after the end"):
            _expand(packed + gzip.compress(b"y"), "gzip", size)


def test_frames_to_be_skipped_are() -> None:
    assert _expand(SKIPPED + _zstd(b"one") + SKIPPED + _zstd(b"two") + SKIPPED, "zstd", 5) == b"onetwo"
    assert sniff(SKIPPED[:4]) == "zstd"


@pytest.mark.parametrize(
    "frame",
    [b"\x00" + bytes([(30 - 10) << 3]), b"\xe0" + (1 << 34).to_bytes(8, "little")],
    ids=["window of 1 GiB", "one segment of 16 GiB"],
)
def test_a_window_of_more_than_128_mib_is_refused(frame: bytes) -> None:
    with pytest.raises(InputError, match=r"takes a window of more than 2\^27 bytes") as caught:
        _expand(b"\x28\xb5\x2f\xfd" + frame + b"\x01\0\0", "zstd")
    assert caught.value.hint == "--limit zstd-window-log=NUMBER allows more"


def test_the_window_limit_can_be_set() -> None:
    frame = b"\x28\xb5\x2f\xfd\x00" + bytes([(28 - 10) << 3]) + b"\x01\0\0"
    assert _expand(frame, "zstd", limits=Limits(zstd_window_log=28)) == b""
    with pytest.raises(InputError, match=r"more than 2\^27 bytes"):
        _expand(frame, "zstd")


def test_a_bomb_is_stopped_long_before_it_is_through() -> None:
    bomb = _zstd(bytes(1 << 30))
    sizes: list[int] = []
    with pytest.raises(InputError, match="bomb"):
        sizes.extend(len(piece) for piece in uncompressed([bomb], "zstd", "here"))
    assert sum(sizes) < 768 << 20


def test_the_ratio_can_be_set() -> None:
    bomb = _zstd(bytes(600 << 20))
    with pytest.raises(InputError, match="bomb") as caught:
        _expand(bomb, "zstd")
    assert "ratio=" in caught.value.hint
    assert sum(map(len, uncompressed([bomb], "zstd", "here", Limits(ratio=100_000)))) == 600 << 20


def test_the_worst_honest_gzip_is_no_bomb() -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = packer.compress(bytes(100 << 20)) + packer.flush()
    assert sum(len(piece) for piece in uncompressed([data], "gzip", "here")) == 100 << 20
