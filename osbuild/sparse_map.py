"""The maps of GNU tar's sparse members: which parts of a file are stored; the rest are holes.

    old GNU ('S')   4 pieces at 386 of the header, "more follow" at 482, real size at 483;
                    then blocks of 21 pieces each, "more follow" at 504; a piece is offset 12, size 12
    PAX 0.0         records GNU.sparse.offset and GNU.sparse.numbytes, again and again
    PAX 0.1         one record GNU.sparse.map: offset,size,offset,size,…
    PAX 1.0         decimal lines in front of the bytes: how many, then offset and size of each; padded to 512

Source: the GNU tar manual, "Storing Sparse Files". Layers SHOULD NOT have them; readers have to cope.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from osbuild.limits import Limits, more

BLOCK: Final = 512
PREFIX: Final = "GNU.sparse."
_OLD_PIECES: Final = 386
_OLD_MORE: Final = 482
_OLD_REAL: Final = 483
_EXTENSION_MORE: Final = 504
_PIECE: Final = struct.Struct("12s12s")
_LINE_MAX: Final = 20  # digits and a newline: 2^63 has 19
_READ: Final = 1 << 12

Pairs = list[tuple[int, int]]  # offset in the file, size


class OddError(Exception):
    """A rule of the format is broken; the reader adds which member breaks it."""

    def __init__(self, message: str, *, limit: str = "") -> None:
        super().__init__(message)
        self.hint = more(limit) if limit else ""  # the field of Limits that was the rule


@dataclass(frozen=True, slots=True)
class Map:
    """What a sparse member's headers say."""

    size: int  # of the file, holes and all
    pieces: tuple[tuple[int, int, int], ...]  # offset in the file, offset in the spool, size
    name: bytes | None = None  # the file's own, where the header has a made-up one


def old(
    block: bytes, body: int, stored: int, read: Callable[[int], bytes], number: Callable[[bytes], int], limits: Limits
) -> tuple[Map, int]:
    """The map of a member of type 'S', and where its bytes begin; `read` gives the block at an offset."""
    pairs: Pairs = []
    more = _old_pieces(block[_OLD_PIECES:_OLD_MORE], block[_OLD_MORE], pairs, number)
    while more:
        extension = read(body)
        if len(extension) < BLOCK:
            raise OddError("its sparse map is cut off")
        body += BLOCK
        more = _old_pieces(extension[:_EXTENSION_MORE], extension[_EXTENSION_MORE], pairs, number)
        _limit(len(pairs), limits)
    return _checked(pairs, number(block[_OLD_REAL : _OLD_REAL + 12]), body, stored, limits), body


def _old_pieces(data: bytes, more: int, pairs: Pairs, number: Callable[[bytes], int]) -> bool:
    """Add the pieces of one table; an empty one ends it. Says whether another table follows."""
    for offset, size in _PIECE.iter_unpack(data):
        if not offset[0] or not size[0]:
            break
        pairs.append((number(offset), number(size)))
    return bool(more)


def pax(
    records: Mapping[str, bytes], listed: Sequence[tuple[str, bytes]], body: int, stored: int,
    read: Callable[[int, int], bytes], limits: Limits,
) -> Map:  # fmt: skip
    """The map that the records GNU.sparse.* of an extended header describe; `listed` are those that repeat."""
    version = records.get(PREFIX + "major"), records.get(PREFIX + "minor")
    name = records.get(PREFIX + "name")
    if PREFIX + "size" in records and PREFIX + "realsize" in records:
        raise OddError("a sparse map with two sizes")
    if version == (b"1", b"0"):
        if listed or PREFIX + "map" in records:
            raise OddError("two kinds of sparse maps")
        size = _decimal(records.get(PREFIX + "realsize", b""))
        pairs, used = _lines(body, stored, read, limits)
        return _checked(pairs, size, body + used, stored - used, limits, name)
    if version not in ((None, None), (b"0", b"0"), (b"0", b"1")):
        raise OddError("a sparse map of an unknown version")
    size = _decimal(records.get(PREFIX + "size", b""))
    if listed and PREFIX + "map" in records:
        raise OddError("two kinds of sparse maps")
    numbers = _listed(listed) if listed else _commas(records.get(PREFIX + "map", b""))
    blocks = records.get(PREFIX + "numblocks")
    if len(numbers) % 2 or (blocks is not None and _decimal(blocks) != len(numbers) // 2):
        raise OddError("a sparse map with another number of pieces than it says")
    if not numbers:  # GNU tar ends a map with an empty piece; readers differ about whether one without is a map
        raise OddError("a sparse map without pieces")
    _limit(len(numbers) // 2, limits)
    return _checked(list(zip(numbers[::2], numbers[1::2], strict=True)), size, body, stored, limits, name)


def _listed(listed: Sequence[tuple[str, bytes]]) -> list[int]:
    keys = (PREFIX + "offset", PREFIX + "numbytes")
    if any(key != keys[index % 2] for index, (key, _) in enumerate(listed)):
        raise OddError("offsets and sizes of a sparse map do not alternate")
    return [_decimal(value) for _, value in listed]


def _commas(text: bytes) -> list[int]:
    return [_decimal(part) for part in text.split(b",")] if text else []


def _lines(body: int, stored: int, read: Callable[[int, int], bytes], limits: Limits) -> tuple[Pairs, int]:
    """The pieces of a map of version 1.0, and how many bytes the map takes."""
    numbers: list[int] = []
    wanted, used, rest = 1, 0, b""
    while len(numbers) < wanted:
        data = read(body + used, min(_READ, stored - used))
        if not data or len(rest) > _LINE_MAX:
            raise OddError("its sparse map is cut off")
        used += len(data)
        rest += data
        while len(numbers) < wanted and b"\n" in rest:
            line, _, rest = rest.partition(b"\n")
            numbers.append(_decimal(line))
            if len(numbers) == 1:
                _limit(numbers[0], limits)
                wanted = 1 + 2 * numbers[0]
    used -= len(rest)
    used += -used % BLOCK
    if used > stored:
        raise OddError("its sparse map is cut off")
    return list(zip(numbers[1::2], numbers[2::2], strict=True)), used


def _checked(pairs: Pairs, size: int, body: int, stored: int, limits: Limits, name: bytes | None = None) -> Map:
    """Pieces in order, apart, inside the file, and together what is stored."""
    if size > limits.file_bytes:
        raise OddError(f"{size} bytes are more than the {limits.file_bytes} a file may have", limit="file_bytes")
    at, source = 0, body
    pieces = []
    for offset, length in pairs:
        if offset < at:
            raise OddError("the pieces of its sparse map overlap or are not in order")
        if offset + length > size:
            raise OddError(f"its sparse map reaches past the {size} bytes of the file")
        if length:
            pieces.append((offset, source, length))
        at, source = offset + length, source + length
    if source - body != stored:
        raise OddError(f"its sparse map speaks of {source - body} bytes, but {stored} are stored")
    return Map(size, tuple(pieces), name)


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > _LINE_MAX - 1:
        raise OddError("a sparse map with something that is no number")
    return int(text)


def _limit(count: int, limits: Limits) -> None:
    if count > limits.sparse_pieces:
        raise OddError(f"more than {limits.sparse_pieces} pieces in a sparse map", limit="sparse_pieces")
