"""What every source ends in: an image whose layers lie in a spool and have been checked against its config."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from osbuild import oci, zstd
from osbuild.errors import InputError
from osbuild.layers import Layer
from osbuild.tree import Spool

CHUNK: Final = 1 << 20
LAYER_MAX: Final = 64 << 30  # bytes of one uncompressed layer
RATIO_MAX: Final = 1100  # deflate cannot do better than 1032:1; more is a lie of some other kind
_RATIO_FLOOR: Final = 64 << 20  # below this many bytes nobody minds


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceImage:
    """A checked image, not yet flattened."""

    reference: str  # as the user would write it
    digest: str  # of the manifest where the source has one, else of the config
    config: oci.ImageConfig
    layers: tuple[Layer, ...]


def add_layer(spool: Spool, chunks: Iterable[bytes], compression: str, diff_id: str, where: str) -> Layer:
    """Uncompress a layer into the spool, and believe it only if its sha256 is the diff_id."""
    start = spool.size
    digest = hashlib.sha256()
    for data in uncompressed(chunks, compression, where):
        digest.update(data)
        spool.append(data)
        if spool.size - start > LAYER_MAX:
            raise InputError(f"{where}: a layer of more than {LAYER_MAX} bytes")
    return checked_layer(spool, start, spool.size - start, digest.hexdigest(), diff_id, where)


def checked_layer(spool: Spool, offset: int, size: int, sha256: str, diff_id: str, where: str) -> Layer:
    """A layer that lies in the spool already, when its digest is what the config says."""
    if f"sha256:{sha256}" != diff_id:
        raise InputError(f"{where}: a layer's content is sha256:{sha256}, but the config says {diff_id}")
    return Layer(spool=spool, offset=offset, size=size, diff_id=diff_id)


def match_layers(found: Sequence[object], config: oci.ImageConfig, where: str) -> None:
    """Refuse a config that speaks of more or fewer layers than there are."""
    if len(found) != len(config.diff_ids):
        raise InputError(f"{where}: {len(found)} layers, but the config names {len(config.diff_ids)}")


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
