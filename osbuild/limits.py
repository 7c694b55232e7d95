"""How much an image may ask of us: generous, each settable (`--limit NAME=VALUE`), all of them for a whole image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from osbuild.tree import DEPTH_MAX, LINK_HOPS, NAME_MAX, PATH_MAX

# What one entry takes in CPython 3.11 on a 64-bit machine, names, targets and attributes not counted. Measured with a
# million of each kind: tests/test_bombs.py holds the sum of all estimates to what a process really takes.
INODE_COST: Final = 256
BODY_COST: Final = 112  # where the bytes of a file are
DIRECTORY_COST: Final = 112
STRING_COST: Final = 56
XATTR_COST: Final = 160
PIECE_COST: Final = 176


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every field is a number that `--limit NAME=VALUE` sets; each comment says of what."""

    image_bytes: int = 64 << 30  # all layers uncompressed; separately: all files, with the holes of sparse ones
    file_bytes: int = 64 << 30  # one file
    entries: int = 1_000_000  # members of all layers, and the directories that only their names ask for
    # Names, inodes and attributes of all layers in memory, by our estimate: with it a refusal stays below 400 MB.
    memory_bytes: int = 320 << 20
    steps: int = 20_000_000  # names and links looked up on the way to all entries
    path_bytes: int = PATH_MAX  # one path, also where links have lengthened it
    name_bytes: int = NAME_MAX  # one component of a path
    target_bytes: int = PATH_MAX  # one symbolic link's target
    depth: int = DEPTH_MAX  # directories above each other
    link_hops: int = LINK_HOPS  # symbolic links followed on the way to one entry
    header_bytes: int = 1 << 20  # one extended (PAX) header
    header_records: int = 64  # records in one extended header: extended attributes, mostly
    xattr_bytes: int = 1 << 16  # one extended attribute's value; the kernel's own limit
    sparse_pieces: int = 1 << 16  # pieces between the holes of one sparse file
    trailing_bytes: int = 1 << 24  # after the end of an archive: padding of blocking factors, nothing else
    ratio: int = 200  # uncompressed to compressed, beyond 512 MiB
    zstd_window_log: int = 27  # 128 MiB of memory while a zstd stream is read


def text_cost(text: str) -> int:
    """What a string takes in memory: CPython keeps one, two or four bytes for each character."""
    size = len(text) if text.isascii() else 4 * len(text)
    # Up to 512 bytes come from CPython's own pools; what is longer leaves gaps in the C library's heap.
    return STRING_COST + (size if size < 512 else size + size // 4)
