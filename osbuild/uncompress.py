"""Compressed streams in, pieces of bounded size out: gzip and zstd, with a limit on how much little may become."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from osbuild import zstd
from osbuild.errors import InputError

CHUNK: Final = 1 << 20
RATIO_MAX: Final = 1100  # deflate cannot do better than 1032:1; more is a lie of some other kind
_RATIO_FLOOR: Final = 64 << 20  # below this many bytes nobody minds


def sniff(head: bytes) -> str:
    """How a stream is compressed, by its first four bytes: for archives, which do not say."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    return "zstd" if head.startswith(b"\x28\xb5\x2f\xfd") else "none"


def uncompressed(chunks: Iterable[bytes], compression: str, where: str) -> Iterator[bytes]:
    """The stream's bytes in pieces of bounded size; InputError for damage, a cut, or an absurd ratio."""
    if compression == "none":
        yield from chunks
    elif compression == "gzip":
        yield from _bounded(_gunzip(chunks, where), where)
    else:
        yield from _bounded(_unzstd(chunks, where), where)


def _bounded(pairs: Iterator[tuple[int, bytes]], where: str) -> Iterator[bytes]:
    total = 0
    for taken, data in pairs:
        total += len(data)
        if total > _RATIO_FLOOR and total > RATIO_MAX * taken:
            raise InputError(f"{where}: {taken} compressed bytes become more than {total}: a decompression bomb")
        yield data


def _gunzip(chunks: Iterable[bytes], where: str) -> Iterator[tuple[int, bytes]]:
    """(compressed bytes taken so far, a piece of the content); several gzip members are one stream (RFC 1952)."""
    taken = 0
    member = zlib.decompressobj(wbits=31)
    try:
        for chunk in chunks:
            taken += len(chunk)
            data = chunk
            while data:
                if member.eof:
                    if not data.strip(b"\0"):  # padding
                        break
                    member = zlib.decompressobj(wbits=31)
                yield taken, member.decompress(data, CHUNK)
                data = member.unused_data if member.eof else member.unconsumed_tail
        while not member.eof:
            data = member.decompress(member.unconsumed_tail, CHUNK)
            if not data:
                break
            yield taken, data
    except zlib.error as problem:
        raise InputError(f"{where}: damaged gzip data: {problem}") from None
    if not member.eof:
        raise InputError(f"{where}: gzip data is cut off")


def _unzstd(chunks: Iterable[bytes], where: str) -> Iterator[tuple[int, bytes]]:
    """The same for zstd: several frames are one stream (RFC 8878)."""
    taken = 0
    frame = zstd.decompressor()
    try:
        for chunk in chunks:
            taken += len(chunk)
            data = chunk
            while data or not (frame.eof or frame.needs_input):
                if frame.eof:
                    frame = zstd.decompressor()
                yield taken, frame.decompress(data, CHUNK)
                data = frame.unused_data if frame.eof else b""
                if frame.eof and not data:
                    break
    except zstd.ZstdError as problem:
        raise InputError(f"{where}: damaged zstd data: {problem}") from None
    if not frame.eof:
        raise InputError(f"{where}: zstd data is cut off")
