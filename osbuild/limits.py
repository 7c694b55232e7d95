"""How much an image may ask of us: generous, each settable (`--limit NAME=VALUE`), all of them for a whole image."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
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
_XATTR_MAX: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every field is a number that `--limit NAME=VALUE` sets; ABOUT says of what."""

    image_bytes: int = 64 << 30
    file_bytes: int = 64 << 30
    entries: int = 1_000_000
    # Names, inodes and attributes of all layers in memory, by our estimate: with it a refusal stays below 400 MB.
    memory_bytes: int = 320 << 20
    steps: int = 20_000_000
    path_bytes: int = PATH_MAX
    name_bytes: int = NAME_MAX
    target_bytes: int = PATH_MAX
    depth: int = DEPTH_MAX
    link_hops: int = LINK_HOPS
    header_bytes: int = 1 << 20
    header_records: int = 64
    xattr_bytes: int = _XATTR_MAX
    sparse_pieces: int = 1 << 16
    trailing_bytes: int = 1 << 24
    ratio: int = 200
    zstd_window_log: int = 27


# field -> its unit, and what there may be so much of
ABOUT: Final[Mapping[str, tuple[str, str]]] = {
    "image_bytes": ("bytes", "all layers uncompressed; all files, holes too"),
    "file_bytes": ("bytes", "one file"),
    "entries": ("entries", "all layers, with directories only implied"),
    "memory_bytes": ("bytes", "memory for names, inodes, attributes"),
    "steps": ("steps", "names and links looked up for all entries"),
    "path_bytes": ("bytes", "one path, also where links lengthen it"),
    "name_bytes": ("bytes", "one component of a path"),
    "target_bytes": ("bytes", "one symbolic link's target"),
    "depth": ("levels", "directories inside each other"),
    "link_hops": ("links", "followed on the way to one entry"),
    "header_bytes": ("bytes", "one extended (PAX) header of a tar"),
    "header_records": ("records", "in one extended header"),
    "xattr_bytes": ("bytes", "one extended attribute's value"),
    "sparse_pieces": ("pieces", "between the holes of one sparse file"),
    "trailing_bytes": ("bytes", "after the end of an archive"),
    "ratio": ("times", "uncompressed to compressed, past 512 MiB"),
    "zstd_window_log": ("log2 bytes", "memory to read a zstd stream: 27 is 128 MiB"),
}

# field -> the least and the most that it may be set to: beyond that it is nothing to Linux, or to libzstd
_RANGES: Final[Mapping[str, tuple[int, int]]] = {
    "path_bytes": (1, PATH_MAX),
    "name_bytes": (1, NAME_MAX),
    "target_bytes": (1, PATH_MAX),
    "link_hops": (1, 255),  # as many as containerd and docker follow; Linux itself LINK_HOPS
    "xattr_bytes": (1, _XATTR_MAX),
    "zstd_window_log": (10, 31),
}


def allowed(field: str) -> tuple[int, int]:
    """The least and the most that a limit may be set to."""
    return _RANGES.get(field, (1, sys.maxsize))


def option_name(field: str) -> str:
    """As `--limit` spells it."""
    return field.replace("_", "-")


def more(field: str) -> str:
    """The hint of whoever refuses something because of a limit."""
    return f"--limit {option_name(field)}=NUMBER allows more"


def rows() -> list[tuple[str, str, str, str]]:
    """Every limit: its name, what it is when nobody sets it, the unit, and what it limits."""
    return [(option_name(field.name), str(field.default), *ABOUT[field.name]) for field in fields(Limits)]


def text_cost(text: str) -> int:
    """What a string takes in memory: CPython keeps one, two or four bytes for each character."""
    size = len(text) if text.isascii() else 4 * len(text)
    # Up to 512 bytes come from CPython's own pools; what is longer leaves gaps in the C library's heap.
    return STRING_COST + (size if size < 512 else size + size // 4)
