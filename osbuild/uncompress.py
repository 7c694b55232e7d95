"""Compressed streams in, pieces of bounded size out: gzip and zstd, with a limit on how much little may become."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from typing import Final

from osbuild import zstd
from osbuild.errors import InputError
from osbuild.limits import Limits, more

CHUNK: Final = 1 << 20
_SLICE: Final = 1 << 14  # taken at a time: what follows a stream's end is copied, and streams can be very short
_RATIO_FLOOR: Final = 512 << 20  # below this many bytes nobody minds


def sniff(head: bytes) -> str:
    """How a stream is compressed, by its first four bytes: for archives, which do not say."""
    if head.startswith(b"\x1f\x8b"):
        return "gzip"
    skippable = head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5  # what pzstd puts first
    return "zstd" if skippable or head.startswith(b"\x28\xb5\x2f\xfd") else "none"


def uncompressed(
    chunks: Iterable[bytes], compression: str, where: str, limits: Limits | None = None
) -> Iterator[bytes]:
    """The stream's bytes in pieces of bounded size; InputError for damage, a cut, an absurd ratio, or too many."""
    limits = limits or Limits()
    total = 0
    for taken, data in _pairs(chunks, compression, where, limits):
        total += len(data)
        if total > limits.image_bytes:
            raise InputError(
                f"{where}: more than {limits.image_bytes} bytes when uncompressed", hint=more("image_bytes")
            )
        if compression != "none":
            check_ratio(taken, total, where, limits)
        yield data


def check_ratio(taken: int, total: int, where: str, limits: Limits) -> None:
    """InputError when so few compressed bytes have become so many."""
    if total > _RATIO_FLOOR and total > limits.ratio * taken:
        raise InputError(
            f"{where}: {taken} compressed bytes become more than {total}: a decompression bomb",
            hint=f"more than {limits.ratio} times is refused; {more('ratio')}",
        )


def _pairs(chunks: Iterable[bytes], compression: str, where: str, limits: Limits) -> Iterator[tuple[int, bytes]]:
    """(compressed bytes taken so far, a piece of the content)."""
    if compression == "none":
        return _counted(chunks)
    if compression == "gzip":
        return _gunzip(_sliced(chunks), where, limits)
    return _unzstd(_sliced(chunks), where, limits)


def _counted(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    taken = 0
    for data in chunks:
        taken += len(data)
        yield taken, data


def _sliced(chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        for start in range(0, len(chunk), _SLICE):
            yield chunk[start : start + _SLICE]


def _gunzip(chunks: Iterable[bytes], where: str, limits: Limits) -> Iterator[tuple[int, bytes]]:
    """Several gzip members are one stream (RFC 1952); zeros may follow the last one, as gzip(1) allows."""
    taken, members = 0, 1
    member = zlib.decompressobj(wbits=31)
    padding = False
    try:
        for data in chunks:
            taken += len(data)
            while data:
                if member.eof:
                    padding = padding or data[0] == 0
                    if padding:
                        _check_padding(data, where)
                        break
                    members += 1
                    _check_parts(members, where, limits)
                    member = zlib.decompressobj(wbits=31)
                yield taken, member.decompress(data, CHUNK)
                data = member.unused_data if member.eof else member.unconsumed_tail
        while not member.eof:
            data = member.decompress(member.unconsumed_tail, CHUNK)
            if not data:
                break
            yield taken, data
    except zlib.error as problem:
        what = "what follows a gzip stream is none" if members > 1 else "damaged gzip data"
        raise InputError(f"{where}: {what}: {problem}") from None
    if not member.eof:
        raise InputError(f"{where}: gzip data is cut off")


def _check_padding(data: bytes, where: str) -> None:
    if data.strip(b"\0"):
        raise InputError(f"{where}: bytes after the end of gzip data")


def _check_parts(count: int, where: str, limits: Limits) -> None:
    # Lazily pulled images (eStargz) have a member for each file; more than that is a way to waste our time.
    if count > limits.entries:
        raise InputError(
            f"{where}: more than {limits.entries} compressed streams one after another", hint=more("entries")
        )


def _unzstd(chunks: Iterable[bytes], where: str, limits: Limits) -> Iterator[tuple[int, bytes]]:
    """The same for zstd: several frames, some of which are to be skipped, are one stream (RFC 8878)."""
    taken, frames = 0, 1
    frame = zstd.decompressor(limits.zstd_window_log)
    try:
        for data in chunks:
            taken += len(data)
            while data or not (frame.eof or frame.needs_input):
                if frame.eof:
                    frames += 1
                    _check_parts(frames, where, limits)
                    frame = zstd.decompressor(limits.zstd_window_log)
                yield taken, frame.decompress(data, CHUNK)
                data = frame.unused_data if frame.eof else b""
                if frame.eof and not data:
                    break
    except zstd.ZstdError as problem:
        if zstd.wants_memory(problem):
            raise InputError(
                f"{where}: to read this zstd stream takes a window of more than 2^{limits.zstd_window_log} bytes",
                hint=more("zstd_window_log"),
            ) from None
        what = "what follows a zstd frame is none" if frames > 1 else "damaged zstd data"
        raise InputError(f"{where}: {what}: {problem}") from None
    if not frame.eof:
        raise InputError(f"{where}: zstd data is cut off")
