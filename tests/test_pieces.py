"""Pieces of a filesystem, written together: each lies where it belongs, and nothing else is written."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from osbuild.content import Bytes, Content, Slice, Sparse, Spool
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


def test_what_is_said_to_be_done_does_not_change_any_more(tmp_path: Path) -> None:
    chance = random.Random(2)
    spool = Spool()
    spool.append(chance.randbytes(MIB))
    pieces: list[tuple[int, Piece]] = []
    at = 0
    for _ in range(300):
        size = chance.choice((1, 4095, 60_000, 65_537, 300_000))
        pieces.append((at, chance.choice((spool.read(0, size), Slice(spool, 0, size)))))
        at += size + chance.choice((0, 1, 9000))
    said: list[tuple[int, bytes]] = []
    with (tmp_path / "out").open("w+b") as file:
        file.truncate(5000 + at)
        write_pieces(file.fileno(), 5000, pieces, lambda end: said.append((end, _bytes(file.fileno(), end))))
    whole = (tmp_path / "out").read_bytes()
    ends = [end for end, _ in said]
    assert len(ends) > 10
    assert ends == sorted(set(ends))
    assert all(whole.startswith(before) for _, before in said)


def _bytes(descriptor: int, size: int) -> bytes:
    return os.pread(descriptor, size, 0)


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


def test_what_is_there_already_is_passed_over_and_the_rest_lies_around_it(tmp_path: Path) -> None:
    chance = random.Random(3)
    spool = Spool()
    spool.append(chance.randbytes(MIB))
    pieces: list[tuple[int, Piece]] = []
    there: dict[int, Content] = {}
    at = 0
    for number in range(300):
        size = chance.choice((1, 100, 4095, 4096, 65536, 100_000))
        content = Slice(spool, chance.randrange(MIB - size), size)
        if number % 3:
            there[at] = content
        pieces.append((at, content if number % 2 else b"".join(content.chunks())))
        at += size + -size % 4096
    in_one_go = written(pieces, tmp_path / "a", at + MIB)
    with (tmp_path / "b").open("w+b") as file:
        file.truncate(at + MIB)
        write_pieces(file.fileno(), 5000, iter(there.items()))
        calls: list[int] = []
        write_pieces(file.fileno(), 5000, iter(pieces), calls.append, there)
    assert (tmp_path / "b").read_bytes() == in_one_go
    assert calls == sorted(calls)


def test_what_lies_between_two_files_is_not_taken_along(tmp_path: Path) -> None:
    spool = Spool()
    spool.append(b"a" * 5000 + b"!" * 3192 + b"b" * 100)
    with (tmp_path / "a").open("w+b") as file:
        write_pieces(file.fileno(), 4096, [(0, Slice(spool, 0, 5000)), (8192, Slice(spool, 8192, 100))])
        file.seek(4096)
        assert file.read() == b"a" * 5000 + bytes(3192) + b"b" * 100


def test_small_files_lie_where_they_belong_however_they_lay(tmp_path: Path) -> None:
    source = random.Random(1)
    spool = Spool()
    spool.append(source.randbytes(400 * 4096))
    wanted = bytearray(4000 * 4096)
    pieces: list[tuple[int, Piece]] = []
    at = shift = 0
    for block in range(0, 390, 2):
        size = source.choice((1, 100, 4095, 4096, 4097, 8192))
        shift += source.choice((0, 0, 0, 0, 1, 9, 30)) * 4096
        content = Slice(spool, block * 4096, size)
        at = block * 4096 + shift
        wanted[at : at + size] = spool.read(content.offset, size)
        pieces.append((at, content))
        if source.random() < 0.1:
            pieces[-1] = (at, Bytes(spool.read(content.offset, size)))
    with (tmp_path / "a").open("w+b") as file:
        file.truncate(len(wanted))
        write_pieces(file.fileno(), 0, pieces)
        assert file.read() == wanted


def test_a_file_that_ends_before_its_small_pieces_is_told(tmp_path: Path) -> None:
    spool = Spool()
    spool.append(b"a" * 4200)
    pieces: list[tuple[int, Piece]] = [(0, Slice(spool, 0, 100)), (4096, Slice(spool, 4096, 200))]
    with (tmp_path / "a").open("w+b") as file, pytest.raises(InputError, match="96 bytes are missing"):
        write_pieces(file.fileno(), 0, pieces)
