"""An initramfs: the tree as a cpio archive in "newc" format, then compressed. The kernel unpacks it into its root.

    "070701" | ino | mode | uid | gid | nlink | mtime | filesize | devmajor | devminor | rdevmajor | rdevminor
             | namesize | check           13 fields of 8 hex digits
    name NUL, padded to 4; bytes, padded to 4; ends with a member called TRAILER!!!

Source: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from osbuild import zstd
from osbuild.artifacts import File, Initrd, Rootfs
from osbuild.errors import InputError, SpecError
from osbuild.output import writing
from osbuild.tree import PATH_MAX, Entry, Tree, quote

LEVEL: Final = 3
_BATCH: Final = 4 << 20
_SIZE_MAX: Final = (1 << 32) - 1
_PAGE: Final = 4096
_TRAILER: Final = "TRAILER!!!"


class _Plain:
    """No compression, with the interface of a compressor."""

    def compress(self, data: bytes) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


# Any: the compressors of zlib and zstd share compress() and flush(), and no type.
COMPRESSIONS: Final[Mapping[str, Callable[[], Any]]] = {
    "zstd": lambda: zstd.compressor(LEVEL),
    # No file name and no time in the header; still, the bytes depend on the zlib that Python was built with.
    "gzip": lambda: zlib.compressobj(6, zlib.DEFLATED, 31),
    "none": _Plain,
}


def build_initrd(rootfs: Rootfs, out: Path, *, compress: str = "zstd") -> Initrd:
    """Write the tree as an initramfs. InputError, before a byte is written, for what the format cannot hold."""
    if compress not in COMPRESSIONS:
        raise SpecError(f"no compression {quote(compress)}", hint=f"one of {', '.join(COMPRESSIONS)}")
    check(rootfs.tree)
    compressor = COMPRESSIONS[compress]()
    unpacked = 0
    with writing(out) as descriptor, os.fdopen(descriptor, "wb", closefd=False) as file:
        for batch in _batches(archive(rootfs.tree)):
            unpacked += len(batch)
            file.write(compressor.compress(batch))
        file.write(compressor.flush())
    inodes = rootfs.tree.names()
    return Initrd(
        file=File.of(out),
        compression=compress,
        unpacked=unpacked,
        entries=len(rootfs.tree),
        resident=sum(entry.content.size + -entry.content.size % _PAGE for entry in inodes),
        lost_xattrs=sum(bool(entry.xattrs) for entry in inodes),
        words=rootfs.words,
    )


def check(tree: Tree) -> None:
    """Everything in the tree that newc cannot express, or the kernel would misread."""
    for path, entry in tree.items():
        if len(path.encode(errors="surrogateescape")) > PATH_MAX:
            raise InputError(f"{quote(path[:100])}…: the kernel would skip a path of more than {PATH_MAX} bytes")
        if path == f"/{_TRAILER}":
            raise InputError(f"{quote(path)}: an initramfs would end at a file of this name")
        if entry.content.size > _SIZE_MAX:
            raise InputError(f"{quote(path)}: {entry.content.size} bytes; an initramfs holds files below 4 GiB only")
    init = tree.edit().resolve("/init")
    if init not in tree or not tree[init].is_file or not tree[init].mode & 0o111:
        raise InputError("/init: an initramfs needs an executable there")


def archive(tree: Tree) -> Iterator[bytes]:
    """The archive in pieces. Inodes are numbered in the order of their first paths."""
    names = tree.names()
    left = {entry: len(paths) for entry, paths in names.items()}
    numbers = {entry: number for number, entry in enumerate(names, start=1)}
    for path, entry in tree.items():
        if stat.S_ISSOCK(entry.mode):
            continue
        left[entry] -= 1
        links = 2 if entry.is_dir else len(names[entry])
        body = entry.target.encode(errors="surrogateescape") if entry.is_symlink else b""
        # Of a file with several names the last one brings the bytes: what GNU cpio and the kernel expect.
        size = entry.content.size if entry.is_file and left[entry] == 0 else len(body)
        yield _header(path[1:] or ".", numbers[entry], entry, links, size)
        if body:
            yield body
        elif size:
            yield from entry.content.chunks()
        if size % 4:
            yield bytes(-size % 4)
    yield _header(_TRAILER, 0, Entry(mode=0), 1, 0)


def _header(name: str, number: int, entry: Entry, links: int, size: int) -> bytes:
    encoded = name.encode(errors="surrogateescape") + b"\0"
    seconds = min(max((entry.mtime_ns or 0) // 1_000_000_000, 0), _SIZE_MAX)
    fields = (
        number, entry.mode, entry.uid, entry.gid, links, seconds, size, 0, 0, entry.major, entry.minor,
        len(encoded), 0,
    )  # fmt: skip
    header = b"070701" + b"%08x" * 13 % fields + encoded
    return header + bytes(-len(header) % 4)


def _batches(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces joined to a few MiB: thousands of small calls cost more than the compression."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= _BATCH:
            yield b"".join(waiting)
            waiting, size = [], 0
    yield b"".join(waiting)
