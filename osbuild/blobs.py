"""Blobs by digest: fetched once, resumed after an interruption, verified on every use.

~/.cache/osbuilder/v1/blobs/sha256/<hex>    whole, and once found to be what its name says
                      partial/<hex>         the first bytes of one, for the next run to go on from
                      tags/<hex>            sha256 of a name: what it meant when last asked, {"name", "digest", "sum"}
                      locks/blob-<hex>      held by the one who fetches it

Whoever reads a blob holds a shared flock on it; a partial file carries that lock already when it gets its name.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import oci
from osbuild.cache import (
    MORE_ROOM,
    VERSION,
    Cache,
    NoLocksError,
    flock,
    make_directory,
    reading,
    set_aside,
    touch,
    writing,
)
from osbuild.errors import HostError, InputError
from osbuild.oci import Descriptor, check_digest
from osbuild.output import sync, write_whole
from osbuild.tree import quote

BLOBS: Final = "blobs/sha256"
PARTIAL: Final = "partial"
TAGS: Final = "tags"

_CHUNK: Final = 1 << 20
_TAG_MAX: Final = 16 << 10  # bytes of a record; names of images are shorter
_GOES: Final = 3  # how often a body that ends early is asked for its rest
# Without O_NONBLOCK a fifo would wait for a writer; O_NOFOLLOW because a link is nothing that we put there.
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE: Final = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK

# fetch(offset) -> (where the bytes really start: offset, or 0 if the server ignored the range; the bytes from there on)
Fetch = Callable[[int], tuple[int, Iterator[bytes]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """An open file whose bytes have been verified."""

    size: int
    descriptor: int

    def chunks(self) -> Iterator[bytes]:
        """All bytes, in pieces of a megabyte at most."""
        offset = 0
        while offset < self.size:
            data = os.pread(self.descriptor, min(_CHUNK, self.size - offset), offset)
            if not data:
                raise HostError(f"a blob in the cache lost its end at byte {offset} of {self.size} while it was read")
            offset += len(data)
            yield data

    def read(self) -> bytes:
        """All bytes at once."""
        return b"".join(self.chunks())


@dataclass(frozen=True, slots=True, kw_only=True)
class Blobs:
    """The blobs of a cache, and what names meant when they were last asked for."""

    cache: Cache

    @contextlib.contextmanager
    def open(self, descriptor: Descriptor, fetch: Fetch | None, where: str) -> Iterator[Blob]:
        """A verified blob from the cache, or else from `fetch`; nobody prunes it while it is open."""
        check_digest(descriptor.digest, where)
        found, problem = self._find(descriptor, where)
        if found is None:
            if fetch is None:
                raise InputError(
                    f"{where}: {descriptor.digest} {problem} {quote(str(self.cache.root))}",
                    hint="run it once without --offline, or use the cache it was fetched into (--cache-dir)",
                )
            found = self._fetch(descriptor, fetch, where)
        try:
            yield Blob(size=descriptor.size, descriptor=found)
        finally:
            os.close(found)

    def remember(self, name: str, digest: str) -> None:
        """Keep what a name means now, for runs without a network."""
        check_digest(digest, name)
        if self.recall(name) == digest:
            return
        path = self._tag(name)
        # A record that cannot be kept costs nothing today: others own this cache, or it is full.
        with contextlib.suppress(HostError, OSError):
            make_directory(path.parent)
            _clear(path)
            record = {"name": name, "digest": digest, "sum": _sum(name, digest)}
            write_whole(path, json.dumps(record).encode() + b"\n")

    def recall(self, name: str) -> str | None:
        """The digest that a name meant when it was last asked for; None if nobody knows, or the record is damaged."""
        path = self._tag(name)
        found = read_tag(path)
        if found is None or found[0] != name:
            return None
        touch(path)
        return found[1]

    def _find(self, wanted: Descriptor, where: str) -> tuple[int | None, str]:
        """An open, verified, shared-locked blob, or why there is none."""
        path = self.cache.root / VERSION / BLOBS / _hex(wanted)
        with reading(self.cache.root), contextlib.ExitStack() as stack:
            try:
                seen = path.lstat()
                if stat.S_ISREG(seen.st_mode):
                    descriptor = os.open(path, _READ)
                    stack.callback(os.close, descriptor)
                    flock(descriptor, fcntl.LOCK_SH)
                    if _is(descriptor, wanted.digest):
                        _check_size(descriptor, wanted, where)
                        touch(descriptor)
                        stack.pop_all()
                        return descriptor, ""
            except FileNotFoundError:
                return None, "is not in the cache"
        set_aside(path, seen)
        return None, "was damaged, and is set aside, in the cache"

    def _fetch(self, wanted: Descriptor, fetch: Fetch, where: str) -> int:
        """The same, once the blob has been fetched: by us, or by somebody who was faster."""
        with contextlib.ExitStack() as stack:
            name = _hex(wanted)
            try:
                stack.enter_context(self.cache.lock(f"blob-{name}"))
            except NoLocksError:
                name = f"{name}-{secrets.token_hex(4)}"  # nobody else's, so nobody's to go on from
            found, _ = self._find(wanted, where)
            if found is not None:
                return found
            return self._complete(self.cache.root / VERSION / PARTIAL / name, wanted, fetch, where)

    def _complete(self, partial: Path, wanted: Descriptor, fetch: Fetch, where: str) -> int:
        home = self.cache.root / VERSION / BLOBS / _hex(wanted)
        for directory in (partial.parent, home.parent):
            make_directory(directory)
        work = _open_partial(self.cache, partial, wanted.size)
        try:
            _receive(work, wanted, fetch, where)
            with work.writing():
                flock(work.descriptor, fcntl.LOCK_SH)  # before it has its name: from then on it may be pruned
                os.fchmod(work.descriptor, 0o644)
                os.fsync(work.descriptor)
                partial.rename(home)
                sync(home.parent)
        except BaseException:
            if partial.name != home.name or os.fstat(work.descriptor).st_size == 0:
                partial.unlink(missing_ok=True)  # there is nothing to go on from
            os.close(work.descriptor)
            raise
        return work.descriptor

    def _tag(self, name: str) -> Path:
        return self.cache.root / VERSION / TAGS / _sum(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Partial:
    """The file that a blob arrives in."""

    cache: Cache
    path: Path
    descriptor: int

    @property
    def size(self) -> int:
        return os.fstat(self.descriptor).st_size

    def add(self, data: bytes) -> None:
        view = memoryview(data)
        with self.writing():
            while view:
                view = view[os.write(self.descriptor, view) :]

    def restart(self) -> None:
        with self.writing():
            os.ftruncate(self.descriptor, 0)
            os.lseek(self.descriptor, 0, os.SEEK_SET)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """After a failure to write, what was written is not to be trusted, and only takes room."""
        try:
            with writing(self.cache.root):
                yield
        except HostError:
            self.path.unlink(missing_ok=True)
            raise


def read_tag(path: Path) -> tuple[str, str] | None:
    """The name and the digest in a record; None if there is none to be believed."""
    try:
        descriptor = os.open(path, _READ)
    except OSError:
        return None
    try:
        record = oci.parse_json(os.read(descriptor, _TAG_MAX), "a tag")
        name, digest = str(record.get("name")), check_digest(record.get("digest"), "a tag")
        return (name, digest) if (_sum(name), _sum(name, digest)) == (path.name, record.get("sum")) else None
    except (OSError, InputError, UnicodeError):
        return None
    finally:
        os.close(descriptor)


def check_blob(path: Path) -> str:
    """What is wrong with the blob of that name, or nothing."""
    if not stat.S_ISREG(path.lstat().st_mode):
        return "not a regular file"
    descriptor = os.open(path, _READ)
    try:
        flock(descriptor, fcntl.LOCK_SH)
        return "" if _is(descriptor, f"sha256:{path.name}") else "not the bytes that its name says"
    finally:
        os.close(descriptor)


def _open_partial(cache: Cache, path: Path, size: int) -> _Partial:
    """What came so far of a blob, if that may be the beginning of one of this size; else an empty file."""
    with writing(cache.root):
        _clear(path)
        descriptor = os.open(path, _WRITE, 0o644)
        work = _Partial(cache=cache, path=path, descriptor=descriptor)
        try:
            if work.size > size:
                work.restart()
            os.lseek(descriptor, 0, os.SEEK_END)
            _check_room(cache, descriptor, size - work.size)
        except BaseException:
            os.close(descriptor)
            raise
        return work


def _receive(work: _Partial, wanted: Descriptor, fetch: Fetch, where: str) -> None:
    """Fill the file until its bytes are the blob's; a second time from the start if they come to something else."""
    problem = ""
    for _ in range(2):
        if not _fill(work, wanted, fetch, where):
            problem = f"more came than the {wanted.size} bytes of its descriptor"
        elif not _is(work.descriptor, wanted.digest):
            problem = f"the {wanted.size} bytes that came have another digest"
        else:
            return
        work.restart()
    raise InputError(f"{where}: {wanted.digest}: {problem}", hint="the server, or something between, changes bytes")


def _fill(work: _Partial, wanted: Descriptor, fetch: Fetch, where: str) -> bool:
    """Fetch what is missing; False if there is more of it than there should be."""
    for _ in range(_GOES):
        done = work.size
        if done == wanted.size:
            return True
        start, chunks = fetch(done)
        with contextlib.ExitStack() as stack:
            close = getattr(chunks, "close", None)
            if close is not None:  # a generator: what it holds is let go now, not when it is collected
                stack.callback(close)
            if start != done:
                if start != 0:
                    raise InputError(f"{where}: {wanted.digest}: asked from byte {done}, it came from byte {start}")
                work.restart()
            for data in chunks:
                if work.size + len(data) > wanted.size:
                    return False
                work.add(data)
    if work.size == wanted.size:
        return True
    raise InputError(
        f"{where}: {wanted.digest}: {work.size} bytes of {wanted.size} came", hint="run it again: it goes on from there"
    )


def _check_room(cache: Cache, descriptor: int, missing: int) -> None:
    """Better before a long transfer than near its end; a file system that counts no blocks is believed to have some."""
    room = os.fstatvfs(descriptor)
    free = room.f_bfree * room.f_frsize
    if room.f_blocks and free < missing:
        raise HostError(
            f"no room in the cache {quote(str(cache.root))}: {missing} bytes are needed, {free} are free",
            hint=MORE_ROOM,
        )


def _clear(path: Path) -> None:
    """Make way for a plain file that only this name leads to."""
    try:
        seen = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1:
        set_aside(path, seen)


def _is(descriptor: int, digest: str) -> bool:
    found = hashlib.sha256()
    offset = 0
    while data := os.pread(descriptor, _CHUNK, offset):
        found.update(data)
        offset += len(data)
    return f"sha256:{found.hexdigest()}" == digest


def _check_size(descriptor: int, wanted: Descriptor, where: str) -> None:
    size = os.fstat(descriptor).st_size
    if size != wanted.size:  # the digest is right, so it is the descriptor that is wrong
        raise InputError(f"{where}: {wanted.digest} has {size} bytes, but its descriptor says {wanted.size}")


def _sum(*words: str) -> str:
    return hashlib.sha256("\0".join(words).encode("utf-8", "surrogateescape")).hexdigest()


def _hex(wanted: Descriptor) -> str:
    return wanted.digest.removeprefix("sha256:")
