"""The bytes of files, wherever they are: in memory, in a slice of a file, or in pieces with holes between them."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

from osbuild.errors import HostError, InputError

_CHUNK: Final = 1 << 20
_ZEROS: Final = bytes(_CHUNK)
_BLOCK: Final = 4096
_ZERO_BLOCK: Final = bytes(_BLOCK)
HOLE: Final = 64 << 10  # bytes of zeros from which on they are a hole
_WORTH_A_THREAD: Final = 8 << 20
_TOGETHER: Final = 128 << 10  # up to here a read of its own costs more than its bytes


class Content(Protocol):
    """The bytes of a regular file, wherever they are."""

    @property
    def size(self) -> int:
        """How many bytes."""

    def chunks(self) -> Iterator[bytes]:
        """All of them, in order, a mebibyte or less at a time."""

    def copy_to(self, descriptor: int, offset: int) -> None:
        """Write all of them at `offset` of an open file that reads as zeros there: holes may stay holes."""


@dataclass(frozen=True, slots=True)
class Bytes:
    """Content in memory: small things that we add ourselves."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def chunks(self) -> Iterator[bytes]:
        for start in range(0, len(self.data), _CHUNK):
            yield self.data[start : start + _CHUNK]

    def copy_to(self, descriptor: int, offset: int) -> None:
        write_all(descriptor, self.data, offset)


class Backing(Protocol):
    """An open file in which contents lie."""

    descriptor: int
    size: int

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, fewer only at the end."""

    def check(self) -> None:
        """InputError when the file is not what it was when its contents were checked."""


class Spool:
    """An unlinked temporary file that grows at its end and goes away with its last slice."""

    def __init__(self, directory: str | None = None) -> None:
        # gettempdir() would pass over a TMPDIR that does not exist, and fill another disk.
        self._directory = directory or os.environ.get("TMPDIR") or tempfile.gettempdir()
        with self._room():
            handle, path = tempfile.mkstemp(prefix="osbuilder-", dir=self._directory)
            self.descriptor = handle
            os.unlink(path)  # noqa: PTH108
        self.size = 0
        self.taken = 0  # bytes that what lies here came from, before they were uncompressed

    def append(self, data: bytes) -> None:
        """Add to the end; HostError when the disk is full."""
        with self._room():
            write_all(self.descriptor, data, self.size)
        self.size += len(data)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes at `offset`, fewer only at the end."""
        parts = []
        while length > 0:
            data = os.pread(self.descriptor, length, offset)
            if not data:
                break
            parts.append(data)
            offset += len(data)
            length -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def take(self, source: int, size: int, start: int = 0) -> None:
        """Add so many bytes of another open file; InputError when it has fewer."""
        with self._room():
            copy_range(source, start, size, self.descriptor, self.size)
        self.size += size

    def check(self) -> None:
        """Nobody else can reach an unlinked file."""

    @contextlib.contextmanager
    def _room(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise HostError(
                f"cannot keep the image in {quote(self._directory)}: {problem.strerror}",
                hint="set TMPDIR to a directory with room for the uncompressed layers",
            ) from problem

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@dataclass(frozen=True, slots=True)
class Slice:
    """Content that lies in a spool, or in a file of the user's."""

    spool: Backing
    offset: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        end = self.offset + self.size
        for start in range(self.offset, end, _CHUNK):
            yield self.spool.read(start, min(_CHUNK, end - start))

    def copy_to(self, descriptor: int, offset: int) -> None:
        copy_range(self.spool.descriptor, self.offset, self.size, descriptor, offset)
        self.spool.check()


@dataclass(frozen=True, slots=True)
class Sparse:
    """Content of which only some pieces lie in a spool; the rest are holes and read as zeros."""

    spool: Backing
    size: int
    pieces: tuple[tuple[int, int, int], ...]  # offset in the content, offset in the spool, size; in order, apart

    def chunks(self) -> Iterator[bytes]:
        at = 0
        for offset, source, size in (*self.pieces, (self.size, 0, 0)):
            for start in range(at, offset, _CHUNK):
                yield _ZEROS[: offset - start]
            yield from Slice(self.spool, source, size).chunks()
            at = offset + size

    def copy_to(self, descriptor: int, offset: int) -> None:
        """Write the pieces only: where a writer puts contents, its file reads as zeros already."""
        for start, source, size in self.pieces:
            copy_range(self.spool.descriptor, source, size, descriptor, offset + start)
        self.spool.check()


def stored(content: Content) -> int:
    """How many of its bytes are no holes."""
    return sum(size for _, _, size in content.pieces) if isinstance(content, Sparse) else content.size


def pieces_of(content: Content) -> tuple[Backing | None, tuple[tuple[int, int, int], ...]]:
    """The file in which its bytes lie, if it is one, and where: offset in the content, in the file, size; in order."""
    if isinstance(content, Slice):
        return content.spool, ((0, content.offset, content.size),)
    if isinstance(content, Sparse):
        return content.spool, content.pieces
    return None, ()


EMPTY: Final[Content] = Bytes(b"")


def digests(contents: Iterable[Content], known: dict[Content, bytes]) -> None:
    """Put the sha256 of each into `known`, but for those that are there; large amounts are shared by two threads."""
    todo = {content: None for content in contents if content not in known}
    shares: tuple[list[list[Content]], list[list[Content]]] = ([], [])
    sizes = [0, 0]
    for batch in _batches(todo):
        lighter = sizes[1] < sizes[0]
        shares[lighter].append(batch)
        sizes[lighter] += sum(content.size for content in batch)
    problems: list[BaseException] = []

    def work(share: list[list[Content]]) -> None:
        try:
            for batch in share:
                _digest_batch(batch, known)
        except BaseException as problem:
            problems.append(problem)

    if sum(sizes) < _WORTH_A_THREAD:
        shares[0].extend(shares[1])
        work(shares[0])
    else:
        other = threading.Thread(target=work, args=(shares[1],), name="digest", daemon=True)
        other.start()
        work(shares[0])
        other.join()
    if problems:
        raise problems[0]


def _batches(contents: Iterable[Content]) -> Iterator[list[Content]]:
    """All of them: small ones that lie close together in one file are for one read."""
    slices = [content for content in contents if isinstance(content, Slice) and content.size <= _TOGETHER]
    slices.sort(key=lambda content: (content.spool.descriptor, content.offset))
    batch: list[Content] = []
    begin, end, spool = 0, 0, -1
    for content in slices:
        here, last = content.spool.descriptor, content.offset + content.size
        if here != spool or content.offset > end + _BLOCK or last - begin > _CHUNK:
            if batch:
                yield batch
            batch, begin, end, spool = [], content.offset, last, here
        batch.append(content)
        end = max(end, last)
    if batch:
        yield batch
    for other in contents:
        if not isinstance(other, Slice) or other.size > _TOGETHER:
            yield [other]


def _digest_batch(batch: list[Content], known: dict[Content, bytes]) -> None:
    first, last = batch[0], batch[-1]
    if len(batch) > 1 and isinstance(first, Slice) and isinstance(last, Slice):
        start = first.offset
        end = max(content.offset + content.size for content in batch if isinstance(content, Slice))
        view = memoryview(first.spool.read(start, end - start))
        for content in batch:
            assert isinstance(content, Slice)
            at = content.offset - start
            known[content] = hashlib.sha256(view[at : at + content.size]).digest()
        return
    for content in batch:
        total = hashlib.sha256()
        for chunk in content.chunks():
            total.update(chunk)
        known[content] = total.digest()


def copy_range(source: int, start: int, size: int, target: int, offset: int) -> None:
    """Copy bytes between two open files inside the kernel, or through memory where their file systems cannot."""
    while size > 0:
        try:
            done = os.copy_file_range(source, target, size, start, offset)
        except OSError as problem:
            if problem.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                raise
            done = 0
        if done == 0:
            data = os.pread(source, min(_CHUNK, size), start)
            if not data:
                raise InputError(f"a file became shorter while it was read: {size} bytes are missing")
            write_all(target, data, offset)
            done = len(data)
        start, offset, size = start + done, offset + done, size - done


def stretches(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Offset and bytes of what is no hole in the first `size` bytes of an open file, as its file system tells it."""
    at = 0
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
            end = os.lseek(descriptor, start, os.SEEK_HOLE)
        except OSError as problem:
            if problem.errno != errno.ENXIO:  # else there is nothing but a hole until the end
                yield at, size - at
            return
        if start < size:
            yield start, min(end, size) - start
        at = end


def solid(descriptor: int, size: int) -> Iterator[tuple[int, int]]:
    """Offset and bytes of what is not zeros, in whole blocks, in the first `size` bytes of an open file.

    Fewer than HOLE zeros count as data. So the answer depends on the bytes alone: what a file system says of holes is
    its own affair, and only spares us reading them.
    """
    begin, end = 0, 0
    for at in _blocks_with_data(descriptor, size):
        if at - end >= HOLE:
            if end:
                yield begin, end - begin
            begin = at
        end = min(at + _BLOCK, size)
    if size - end < HOLE:
        end = size
    if end:
        yield begin, end - begin


def _blocks_with_data(descriptor: int, size: int) -> Iterator[int]:
    for start, length in stretches(descriptor, size):
        first = start // _BLOCK * _BLOCK
        for chunk in range(first, start + length, _CHUNK):
            data = os.pread(descriptor, min(_CHUNK, start + length - chunk), chunk)
            for at in range(0, len(data), _BLOCK):
                block = data[at : at + _BLOCK]
                if block != _ZERO_BLOCK[: len(block)]:
                    yield chunk + at


def write_all(descriptor: int, data: bytes | bytearray, offset: int) -> None:
    """pwrite(2) until everything is written."""
    view = memoryview(data)
    while view:
        done = os.pwrite(descriptor, view, offset)
        view = view[done:]
        offset += done


def quote(name: str) -> str:
    """A name that came from outside, on one line and harmless in a terminal."""
    return ascii(name)
