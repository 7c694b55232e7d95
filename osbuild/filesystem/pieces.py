"""Pieces of a filesystem on their way to the disk: small ones that lie beside each other take one call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from osbuild.content import Content, Sparse, write_all
from osbuild.errors import InputError

Piece = bytes | bytearray | Content

_NEAR: Final = 4096  # bytes between two pieces that are written as zeros: the rest of a block
_SMALL: Final = 64 << 10  # up to here a call costs more than a copy in memory
_BUFFER: Final = 1 << 20


def write_pieces(descriptor: int, offset: int, pieces: Iterable[tuple[int, Piece]]) -> None:
    """Write pieces, each at its place behind `offset`, into a file that reads as zeros there.

    They come in order, and apart: what is left between two in a block is written as zeros.
    """
    run = _Run(descriptor, offset)
    for at, piece in pieces:
        if isinstance(piece, bytes | bytearray):
            if len(piece) <= _SMALL:
                run.add(at, piece)
            else:
                write_all(descriptor, piece, offset + at)
        elif piece.size <= _SMALL and not isinstance(piece, Sparse):
            run.add(at, _whole(piece))
        else:
            piece.copy_to(descriptor, offset + at)
    run.flush()


class _Run:
    """Pieces that are to be written together."""

    def __init__(self, descriptor: int, offset: int) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._begin = 0
        self._end = 0
        self._parts: list[bytes | bytearray] = []

    def add(self, at: int, data: bytes | bytearray) -> None:
        if at - self._end >= _NEAR or self._end - self._begin >= _BUFFER:
            self.flush()
            self._begin = self._end = at
        if at > self._end:
            self._parts.append(bytes(at - self._end))
        self._parts.append(data)
        self._end = at + len(data)

    def flush(self) -> None:
        write_all(self._descriptor, b"".join(self._parts), self._offset + self._begin)
        self._parts = []


def _whole(content: Content) -> bytes:
    data = b"".join(content.chunks())
    if len(data) != content.size:
        raise InputError(f"a file became shorter while it was read: {content.size - len(data)} bytes are missing")
    return data
