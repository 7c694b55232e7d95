"""Pieces of a filesystem, written together: each lies where it belongs, and nothing else is written."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from osbuild.content import Bytes, Slice, Sparse, Spool
from osbuild.errors import InputError
from osbuild.filesystem.pieces import Piece, write_pieces

MIB = 1 << 20


def written(pieces: list[tuple[int, Piece]], path: Path, size: int) -> bytes:
    with path.open("wb") as file:
        file.truncate(size)
        write_pieces(file.fileno(), 5000, iter(pieces))
    return path.read_bytes()


def test_every_piece_lies_at_its_place(tmp_path: Path) -> None:
    chance = random.Random(1)
    spool = Spool()
    spool.append(chance.randbytes(MIB))
    pieces: list[tuple[int, Piece]] = []
    wanted = bytearray(12 * MIB)
    at = 0
    for _ in range(400):
        size = chance.choice((0, 1, 100, 4095, 4096, 65535, 65536, 65537, 100_000))
        data = spool.read(start := chance.randrange(MIB - size), size)
        pieces.append((at, chance.choice((data, bytearray(data), Bytes(data), Slice(spool, start, size)))))
        wanted[5000 + at : 5000 + at + size] = data
        at += size + chance.choice((0, 1, 4095, 4096, 9000))
        if at > 11 * MIB:
            break
    assert len(pieces) > 200
    assert written(pieces, tmp_path / "out", len(wanted)) == wanted


def test_holes_are_not_written(tmp_path: Path) -> None:
    spool = Spool()
    spool.append(b"x" * 4096)
    sparse = Sparse(spool, 8 * MIB, ((0, 0, 4096), (4 * MIB, 0, 4096)))
    pieces: list[tuple[int, Piece]] = [(0, b"a"), (MIB, sparse), (40 * MIB, b"z")]
    written(pieces, tmp_path / "out", 64 * MIB)
    assert (tmp_path / "out").stat().st_blocks * 512 < 64 << 10


class _Shorter:
    """A file that somebody cut off."""

    size = 100

    def chunks(self) -> Iterator[bytes]:
        yield b"x" * 60

    def copy_to(self, descriptor: int, offset: int) -> None:
        raise AssertionError("it is small")


def test_a_file_that_became_shorter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="40 bytes are missing"):
        written([(0, _Shorter())], tmp_path / "out", MIB)
