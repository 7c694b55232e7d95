"""Pieces of a filesystem on their way to the disk: small ones that lie beside each other take one call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from osbuild.content import Content, Slice, Sparse, write_all
from osbuild.errors import InputError
from osbuild.filesystem.base import NOTHING

Piece = bytes | bytearray | Content

_NEAR: Final = 4096  # bytes between two pieces that are written as zeros: the rest of a block
_SMALL: Final = 64 << 10  # up to here a call costs more than a copy in memory
_BUFFER: Final = 1 << 20


def write_pieces(
    descriptor: int,
    offset: int,
    pieces: Iterable[tuple[int, Piece]],
    done: Callable[[int], None] | None = None,
    there: Mapping[int, Content] = NOTHING,
) -> None:
    """Write pieces, each at its place behind `offset`, into a file that reads as zeros there.

    They come in order, and apart: what is left between two in a block is written as zeros.
    done: is told now and then up to where the file will not change any more.
    there: contents that are in the file already, by their places; these, and no others, are passed over.
    """
    run = _Run(descriptor, offset)
    told = offset
    for at, piece in pieces:
        if isinstance(piece, bytes | bytearray):
            if len(piece) <= _SMALL:
                run.add(at, piece)
                continue
            run.flush()
            write_all(descriptor, piece, offset + at)
            end = offset + at + len(piece)
        elif (found := there.get(at)) is piece or found == piece:
            end = offset + at + piece.size
            run.pass_over(at + piece.size)
        elif isinstance(piece, Slice) and piece.size <= _SMALL:
            run.add_slice(at, piece)
            end = run.begin
        elif piece.size <= _SMALL and (piece.size < _NEAR or not isinstance(piece, Sparse)):
            run.add(at, _whole(piece))
            end = run.begin
        else:
            run.flush()
            piece.copy_to(descriptor, offset + at)
            end = offset + at + piece.size
        if done is not None and end - told >= _BUFFER:
            done(end)
            told = end
    run.flush()


class _Stretch:
    """Slices that lie in one file as they are to lie in another: one read gets them all, and what is between them."""

    def __init__(self, content: Slice, shift: int) -> None:
        self.shift = shift  # from where they are to where they will be
        self.spool = content.spool
        self._start = content.offset
        self._end = content.offset + content.size
        self._gaps: list[tuple[int, int]] = []  # what lies in them nobody has looked at

    def takes(self, content: Slice, shift: int) -> bool:
        """Whether this one can follow; then it does."""
        if content.spool is not self.spool or shift != self.shift:
            return False
        if content.offset > self._end:
            self._gaps.append((self._end - self._start, content.offset - self._start))
        self._end = content.offset + content.size
        return True

    def read(self) -> bytes | bytearray:
        size = self._end - self._start
        data = self.spool.read(self._start, size)
        if len(data) != size:
            raise InputError(f"a file became shorter while it was read: {size - len(data)} bytes are missing")
        if not self._gaps:
            return data
        clean = bytearray(data)
        for start, end in self._gaps:
            clean[start:end] = bytes(end - start)
        return clean


class _Run:
    """Pieces that are to be written together."""

    def __init__(self, descriptor: int, offset: int) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._begin = 0
        self._end = 0
        self._parts: list[bytes | bytearray | _Stretch] = []

    @property
    def begin(self) -> int:
        """Where in the file that begins which is not written yet."""
        return self._offset + self._begin

    def add(self, at: int, data: bytes | bytearray) -> None:
        self._reach(at)
        self._fill(at)
        self._parts.append(data)
        self._end = at + len(data)

    def _reach(self, at: int) -> None:
        """Begin anew where that is too far, or too much is waiting."""
        if at - self._end >= _NEAR or self._end - self._begin >= _BUFFER:
            self.flush()
            self._begin = self._end = at

    def _fill(self, at: int) -> None:
        """Zeros up to there."""
        if at > self._end:
            self._parts.append(bytes(at - self._end))

    def add_slice(self, at: int, content: Slice) -> None:
        shift = at - content.offset
        self._reach(at)
        last = self._parts[-1] if self._parts else None
        if not isinstance(last, _Stretch) or not last.takes(content, shift):
            self._fill(at)
            self._parts.append(_Stretch(content, shift))
        self._end = at + content.size

    def pass_over(self, end: int) -> None:
        """What lies before `end` is there, and what comes next begins behind it."""
        self.flush()
        self._begin = self._end = end

    def flush(self) -> None:
        parts = [part.read() if isinstance(part, _Stretch) else part for part in self._parts]
        write_all(self._descriptor, parts[0] if len(parts) == 1 else b"".join(parts), self._offset + self._begin)
        self._parts = []


def _whole(content: Content) -> bytes:
    data = b"".join(content.chunks())
    if len(data) != content.size:
        raise InputError(f"a file became shorter while it was read: {content.size - len(data)} bytes are missing")
    return data
