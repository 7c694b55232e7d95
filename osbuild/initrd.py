"""An initramfs: the tree as a cpio archive in "newc" format, then compressed. The kernel unpacks it into its root.

    "070701" | ino | mode | uid | gid | nlink | mtime | filesize | devmajor | devminor | rdevmajor | rdevminor
             | namesize | check           13 fields of 8 hex digits
    name NUL, padded to 4; bytes, padded to 4; ends with a member called TRAILER!!!

Sources: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel, and its reader, init/initramfs.c,
which leaves out without a word what it does not like: so that is refused here.
"""

from __future__ import annotations

import contextlib
import os
import stat
import subprocess
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Final

from osbuild import command, summary, zstd
from osbuild.agent import INIT
from osbuild.agents import AGENTS
from osbuild.artifacts import File, Initrd, Rootfs
from osbuild.errors import HostError, InputError, SpecError
from osbuild.initrd_memory import measure
from osbuild.output import writing
from osbuild.systemd import SERVICE, UNITS
from osbuild.tree import ID_MAX, LINK_HOPS, NAME_MAX, PATH_MAX, Entry, Tree, quote

LEVEL: Final = 3
_BATCH: Final = 1 << 20
_FIELD_MAX: Final = (1 << 32) - 1
_MAJOR_MAX: Final = (1 << 12) - 1  # linux/kdev_t.h; the kernel would make another device of a larger number
_MINOR_MAX: Final = (1 << 20) - 1
_TRAILER: Final = "TRAILER!!!"
_TYPES: Final = frozenset({stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO})

Write = Callable[[bytes], object]  # of nothing: a seam
_SEAM: Final = b""  # what comes after it is packed as if nothing had come before, where that costs no reader anything


def build_initrd(rootfs: Rootfs, out: Path, *, compress: str = "zstd") -> Initrd:
    """Write the tree as an initramfs. InputError, before a byte is written, for what the format cannot hold."""
    if compress not in COMPRESSIONS:
        raise SpecError(f"no compression {quote(compress)}", hint=f"one of {', '.join(COMPRESSIONS)}")
    tree = rootfs.tree
    check(tree)
    unpacked = 0
    least = sum(entry.content.size for entry in set(tree.values())) if compress == "none" else 0
    with writing(out, needs=least) as descriptor, COMPRESSIONS[compress](descriptor) as write:
        for batch in _batches(archive(tree)):
            unpacked += len(batch)
            write(batch)
    file = File.of(out)
    held = [entry for entry in tree.values() if not stat.S_ISSOCK(entry.mode)]
    needs = measure(tree, packed=file.size, compress=compress)
    return Initrd(
        file=file,
        compression=compress,
        unpacked=unpacked,
        entries=len(held),
        resident=needs.resident,
        memory=needs.memory,
        skipped=len(tree) - len(held),
        lost_xattrs=sum(bool(entry.xattrs) for entry in set(held)),
        words=rootfs.words,
    )


def check(tree: Tree) -> None:
    """Everything in the tree that newc cannot express, or the kernel would misread or leave out."""
    for path, entry in tree.items():
        if not stat.S_ISSOCK(entry.mode):
            problem = _problem(path, entry)
            if problem:
                raise InputError(f"{quote(path if len(path) < 200 else path[:100] + '…')}: {problem}")
    init = _follow(tree, "/init")
    if init is None or not init.is_file or not init.mode & 0o111:
        raise InputError("/init: an initramfs needs an executable there")


def _problem(path: str, entry: Entry) -> str:
    """Why this inode cannot be there; empty when it can.

    Times that the format has no digits for are no reason: they are moved to its first or last second.
    """
    encoded = path.encode(errors="surrogateescape")
    if len(encoded) > PATH_MAX:
        return f"the kernel would skip a path of more than {PATH_MAX} bytes"
    if len(encoded) > NAME_MAX and max(map(len, encoded.split(b"/"))) > NAME_MAX:
        return f"the kernel would skip a name of more than {NAME_MAX} bytes"
    if path == f"/{_TRAILER}":
        return "an initramfs would end at a file of this name"
    if entry.mode & ~0o7777 not in _TYPES:
        return f"mode {entry.mode:o} is of no kind that an initramfs holds"
    if not (0 <= entry.uid <= ID_MAX and 0 <= entry.gid <= ID_MAX):
        return f"owner {entry.uid}:{entry.gid}; an initramfs holds numbers up to {ID_MAX}"
    if entry.is_file and entry.content.size > _FIELD_MAX:
        return f"{entry.content.size} bytes; an initramfs holds files below 4 GiB only"
    if entry.is_device and not (0 <= entry.major <= _MAJOR_MAX and 0 <= entry.minor <= _MINOR_MAX):
        return f"device {entry.major}:{entry.minor}; Linux has numbers up to {_MAJOR_MAX}:{_MINOR_MAX}"
    if entry.is_symlink and not 0 < len(entry.target.encode(errors="surrogateescape")) <= PATH_MAX:
        return f"the kernel would skip a symbolic link to nothing, or to more than {PATH_MAX} bytes"
    if b"\0" in encoded or "\0" in entry.target:
        return "a NUL ends a name"
    return ""


def _follow(tree: Tree, path: str) -> Entry | None:
    """What the kernel finds at a path. Not Draft.resolve: that needs a copy of the tree."""
    here: list[str] = []
    todo = path.split("/")[::-1]
    hops = 0
    while todo:
        name = todo.pop()
        if name in ("", "."):
            continue
        if name == "..":
            here = here[:-1]
            continue
        entry = tree.get("/" + "/".join([*here, name]))
        if entry is None or (todo and not entry.is_dir and not entry.is_symlink):
            return None
        if not entry.is_symlink:
            here.append(name)
            continue
        hops += 1
        if hops > LINK_HOPS:
            return None
        here = [] if entry.target.startswith("/") else here
        todo += entry.target.split("/")[::-1]
    return tree["/" + "/".join(here)]


# Archive


def archive(tree: Tree) -> Iterator[bytes]:
    """The archive in pieces. Inodes are numbered in the order of their first paths; sockets are left out.

    Before and after what another agent changes is a seam, so that nothing else changes with it.
    """
    swapped = _swapped(tree)
    links = Counter(tree.values())
    left = {entry: count for entry, count in links.items() if count > 1}
    numbers: dict[Entry, int] = {}
    last = 0
    for path, entry in tree.items():
        if stat.S_ISSOCK(entry.mode):
            continue
        number = numbers.get(entry, 0)
        if not number:
            number = last = last + 1
        if entry in left:
            numbers[entry] = number
            left[entry] -= 1
        count = 2 if entry.is_dir else links[entry]
        body = entry.target.encode(errors="surrogateescape") if entry.is_symlink else b""
        # Of a file with several names the last one brings the bytes: what GNU cpio and the kernel expect.
        size = entry.content.size if entry.is_file and not left.get(entry) else len(body)
        if entry in swapped:
            yield _SEAM
        yield _header(path[1:] or ".", number, entry, count, size)
        if body:
            yield body
        elif size:
            yield from entry.content.chunks()
        if size % 4:
            yield bytes(-size % 4)
        if entry in swapped:
            yield _SEAM
    yield _header(_TRAILER, 0, Entry(mode=0), 1, 0)


def _swapped(tree: Tree) -> set[Entry]:
    """What is another file when another agent is in it."""
    programs = (kind.PROGRAM for kind in AGENTS.values())
    paths = (INIT, *programs, *(f"{home}/{SERVICE}" for home in UNITS), summary.PATH)
    return {entry for path in paths if (entry := _follow(tree, path)) is not None and entry.is_file}


def _header(name: str, number: int, entry: Entry, links: int, size: int) -> bytes:
    encoded = name.encode(errors="surrogateescape") + b"\0"
    seconds = min(max((entry.mtime_ns or 0) // 1_000_000_000, 0), _FIELD_MAX)
    fields = (
        number, entry.mode, entry.uid, entry.gid, links, seconds, size, 0, 0, entry.major, entry.minor,
        len(encoded), 0,
    )  # fmt: skip
    header = b"070701" + b"%08x" * 13 % fields + encoded
    return header + bytes(-len(header) % 4)


def _batches(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Pieces joined to a mebibyte or two: thousands of small calls cost more than the compression. Seams stay."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= _BATCH or piece == _SEAM:
            yield b"".join(waiting)
            waiting, size = [], 0
            if piece == _SEAM:
                yield _SEAM
    yield b"".join(waiting)


# Compression


@contextlib.contextmanager
def _plain(descriptor: int) -> Iterator[Write]:
    with os.fdopen(descriptor, "wb", closefd=False) as file:
        yield file.write


def _streaming(
    make: Callable[[], Any], seam: Callable[[Any], bytes] = lambda _compressor: b""
) -> Callable[[int], AbstractContextManager[Write]]:
    """By what zlib and zstd have in common, compress() and flush(); Any: they share no type."""

    @contextlib.contextmanager
    def write_packed(descriptor: int) -> Iterator[Write]:
        compressor = make()
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            yield lambda data: file.write(compressor.compress(data) if data else seam(compressor))
            file.write(compressor.flush())

    return write_packed


@contextlib.contextmanager
def _lz4(descriptor: int) -> Iterator[Write]:
    """By the program lz4, in the legacy frame (-l), the only one that the kernel reads.

    Its blocks of 8 MiB depend on nothing but their bytes and liblz4's version.
    """
    program = command.find("lz4", package="lz4")
    file = Path(f"/proc/self/fd/{descriptor}")  # which has no name yet
    inlet, outlet = os.pipe()
    with contextlib.ExitStack() as stack:
        feed = stack.enter_context(os.fdopen(outlet, "wb", buffering=0))
        with os.fdopen(inlet, "rb", buffering=0) as end:
            process = stack.enter_context(
                command.start(program, "-l", "-1", "-q", "-c", "-", log=file, merge=False, stdin=end)
            )
        try:
            yield lambda data: _feed(feed.fileno(), data)
        except BrokenPipeError:
            _check_end(process, descriptor)
            raise
        feed.close()
        _check_end(process, descriptor)


def _feed(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _check_end(process: subprocess.Popen[bytes], descriptor: int) -> None:
    if process.wait():
        # Most of all when the disk is full: then this says so.
        os.posix_fallocate(descriptor, os.fstat(descriptor).st_size, 16 << 20)
        raise HostError(f"lz4 ended with {process.returncode}")


COMPRESSIONS: Final[Mapping[str, Callable[[int], AbstractContextManager[Write]]]] = {
    "zstd": _streaming(lambda: zstd.compressor(LEVEL), zstd.job_end),
    # No file name and no time in the header; still, the bytes depend on the zlib that Python was built with.
    "gzip": _streaming(lambda: zlib.compressobj(6, zlib.DEFLATED, 31)),
    "lz4": _lz4,
    "none": _plain,
}
