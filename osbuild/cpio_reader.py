"""Reads an initramfs as the kernel does: cpio archives in "newc" format, each compressed or not, one after another.

    zeros                    between archives: skipped
    "070701" …               an archive: its files are slices of where it lies (see initrd.py for the header)
    gzip, zstd, lz4, xz, …   a stream that unpacks to archives: kept in an unlinked file

Later archives lie over earlier ones. What the kernel would leave out is left out here, and said.

Source: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel; lz4's legacy frame:
doc/lz4_Frame_format.md of lz4.
"""

from __future__ import annotations

import bz2
import lzma
import re
import stat
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from osbuild import command, zstd
from osbuild.errors import HostError, InputError
from osbuild.limits import Limits
from osbuild.tree import EMPTY, NAME_MAX, PATH_MAX, Backing, Content, Draft, Entry, Slice, Spool, Tree, quote

_CHUNK: Final = 1 << 16
_OUT: Final = 1 << 20
_PROBLEMS_MAX: Final = 100
_RATIO_FLOOR: Final = 512 << 20
_HEADER: Final = 110
_FIELDS: Final = re.compile(rb"[0-9a-fA-F]{104}")
_TRAILER: Final = b"TRAILER!!!"
_MAGICS: Final = (b"070701", b"070702")
_LZ4_LEGACY: Final = b"\x02\x21\x4c\x18"
_LZ4_BLOCK_MAX: Final = (8 << 20) + (8 << 20) // 255 + 16  # what 8 MiB may become when they do not compress
_TYPES: Final = frozenset(
    (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK)
)
_STREAMS: Final[Mapping[bytes, str]] = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", _LZ4_LEGACY: "lz4", b"\xfd7zXZ\0": "xz", b"BZh": "bzip2",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One stretch of the file: an archive as it is, or a compressed stream of archives."""

    offset: int
    size: int
    compression: str  # "none", or how
    unpacked: int  # bytes
    entries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """An initramfs that was read."""

    tree: Tree
    parts: tuple[Part, ...]
    problems: tuple[str, ...]

    @property
    def unpacked(self) -> int:
        """Bytes of all archives before compression."""
        return sum(part.unpacked for part in self.parts)


@dataclass(frozen=True, slots=True)
class _Member:
    path: str
    where: str  # for messages
    number: int
    mode: int
    uid: int
    gid: int
    links: int
    mtime: int
    device: tuple[int, int]
    special: tuple[int, int]
    content: Content
    target: str


class _OddError(Exception):
    """What follows cannot be read; the message says why."""


def compression(head: bytes) -> str:
    """How a file that begins so is compressed; "none" for a plain archive, empty for what is no initramfs."""
    if head.startswith(_MAGICS):
        return "none"
    return next((name for magic, name in _STREAMS.items() if head.startswith(magic)), "")


def read(backing: Backing, limits: Limits | None = None) -> Archive:
    """Every archive in a file, one over the other. InputError when there is none at all."""
    reader = _Reader(backing, limits or Limits())
    parts = tuple(reader.parts())
    if not parts or not sum(part.entries for part in parts):
        reason = reader.problems[0] if reader.problems else "no cpio archive in it"
        raise InputError(f"not an initramfs: {reason}")
    problems = reader.problems
    if len(problems) > _PROBLEMS_MAX:
        problems[_PROBLEMS_MAX:] = [f"… and {len(problems) - _PROBLEMS_MAX} more problems"]
    return Archive(tree=reader.draft.tree(), parts=parts, problems=tuple(problems))


class _Reader:
    def __init__(self, backing: Backing, limits: Limits) -> None:
        self.problems: list[str] = []
        self.draft = Draft(steps=limits.steps)
        self._backing = backing
        self._limits = limits
        self._room = limits.image_bytes  # bytes that may still be unpacked
        self._entries = 0
        self._names = 0  # bytes of all of them

    def parts(self) -> Iterator[Part]:
        """Read part after part into the draft."""
        at = 0
        try:
            while (at := _skip_zeros(self._backing, at)) < self._backing.size:
                part = self._part(at)
                yield part
                at += part.size
        except _OddError as odd:
            self.problems.append(f"at {at}: {odd}")

    def _part(self, at: int) -> Part:
        before = self._entries
        kind = compression(self._backing.read(at, 8))
        if kind == "none":
            if at % 4:
                raise _OddError("an archive that does not begin on a multiple of 4 bytes, where the kernel stops")
            end = self._noted(at, lambda: self._archive(self._backing, at))
            unpacked = end - at
        elif kind:
            spool = Spool()
            end = self._noted(at, lambda: self._unpack(kind, at, spool))
            self._all(spool, kind)
            unpacked = spool.size
        else:
            head = self._backing.read(at, 8).decode("latin-1")
            raise _OddError(f"{quote(head)} begins neither an archive nor a compressed one")
        return Part(
            offset=at, size=end - at, compression=kind, unpacked=unpacked, entries=self._entries - before
        )  # fmt: skip

    def _noted(self, at: int, act: Callable[[], int]) -> int:
        """Where a part ends; at the file's end when it is damaged."""
        try:
            return act()
        except _OddError as odd:
            self.problems.append(f"at {at}: {odd}")
            return self._backing.size

    def _all(self, spool: Spool, kind: str) -> None:
        """Every archive of an unpacked stream."""
        at = 0
        try:
            while (at := _skip_zeros(spool, at)) < spool.size:
                if not spool.read(at, 6).startswith(_MAGICS):
                    head = quote(spool.read(at, 8).decode("latin-1"))
                    raise _OddError(f"the {kind} stream unpacks to {head} where an archive should begin")
                at = self._archive(spool, at)
        except _OddError as odd:
            self.problems.append(f"at {at} of what is unpacked: {odd}" if at else str(odd))

    # Compression

    def _unpack(self, kind: str, at: int, spool: Spool) -> int:
        """Unpack the stream at `at`; returns where it ends. _OddError after what could be unpacked is in the spool."""
        if kind == "lz4":
            return self._unpack_lz4(at, spool)
        stream = _stream(kind, self._limits)
        start = at
        try:
            while not stream.eof:
                data = self._backing.read(at, _CHUNK)
                if not data:
                    raise _OddError(f"{kind} data is cut off")
                at += len(data)
                self._keep(stream.decompress(data), spool, at - start)
                while not stream.eof and not stream.needs_input:
                    self._keep(stream.decompress(b""), spool, at - start)
        except zstd.ZstdError as problem:
            if zstd.wants_memory(problem):
                most = self._limits.zstd_window_log
                raise _OddError(f"to read this zstd stream takes a window of more than 2^{most} bytes") from None
            raise _OddError(f"damaged zstd data: {problem}") from None
        except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError) as problem:
            raise _OddError(f"damaged {kind} data: {problem}") from None
        return at - len(stream.unused_data)

    def _keep(self, data: bytes, spool: Spool, taken: int) -> None:
        self._room -= len(data)
        if self._room < 0:
            raise InputError(f"an initramfs of more than {self._limits.image_bytes} bytes when unpacked")
        if spool.size > _RATIO_FLOOR and spool.size > self._limits.ratio * taken:
            raise InputError(f"{taken} compressed bytes become more than {spool.size}: a decompression bomb")
        spool.append(data)

    def _unpack_lz4(self, at: int, spool: Spool) -> int:
        """By the program lz4: Python has no module for it, and pure Python would need minutes."""
        end = self._lz4_end(at)
        try:
            program = command.find("lz4", package="lz4")
        except HostError as problem:
            raise _OddError(f"an lz4 stream, and {problem}") from None
        with tempfile.TemporaryFile() as packed:
            for start in range(at, end, _OUT):
                packed.write(self._backing.read(start, min(_OUT, end - start)))
            packed.seek(0)
            with command.start(program, "-dc", "-q", pipe=True, merge=False, stdin=packed) as process:
                assert process.stdout is not None
                while data := process.stdout.read(_OUT):
                    self._keep(data, spool, end - at)
                if process.wait():
                    raise _OddError("damaged lz4 data")
        return end

    def _lz4_end(self, at: int) -> int:
        """Where a legacy lz4 stream ends: blocks say their sizes; what can be none of one begins something else."""
        at += 4
        while len(head := self._backing.read(at, 4)) == 4:
            size = int.from_bytes(head, "little")
            if not size or size > _LZ4_BLOCK_MAX:
                break
            at += 4 + size
        if at > self._backing.size:
            raise _OddError("lz4 data is cut off")
        return at

    # Archives

    def _archive(self, backing: Backing, start: int) -> int:
        """Read one archive into the draft; returns where it ends, after its trailer."""
        members: list[_Member] = []
        at = start
        try:
            while True:
                member, at = self._member(backing, at)
                if member is None:
                    return at
                members.append(member)
        finally:
            self._place(members)

    def _member(self, backing: Backing, at: int) -> tuple[_Member | None, int]:
        """One member and where the next begins; None for the trailer."""
        header = backing.read(at, _HEADER)
        if not header:
            raise _OddError("an archive that ends without its trailer")
        if not header.startswith(_MAGICS) or not _FIELDS.fullmatch(header, 6):
            raise _OddError("no header of a member where one should be")
        (
            number, mode, uid, gid, links, mtime, size, device_major, device_minor, major, minor, length, check,
        ) = struct.unpack(">13I", bytes.fromhex(header[6:].decode()))  # fmt: skip
        if not 0 < length <= PATH_MAX + 1:
            raise _OddError(f"a name of {length} bytes")
        name = backing.read(at + _HEADER, length)
        body = at + _HEADER + length
        body += -body % 4
        following = body + size + -(body + size) % 4
        if name[-1:] != b"\0" or body + size > backing.size:
            raise _OddError(f"the member {quote(name.rstrip(bytes(1)).decode(errors='surrogateescape'))} is cut off")
        name = name[:-1]
        if name == _TRAILER:
            return None, following
        self._count(name)
        here = quote(name.decode(errors="surrogateescape"))
        content: Content = Slice(backing, body, size) if size else EMPTY
        if header.startswith(b"070702") and stat.S_ISREG(mode):
            self._check_sum(content, check, here)
        target = ""
        if stat.S_ISLNK(mode):
            target = backing.read(body, min(size, PATH_MAX + 1)).decode(errors="surrogateescape")
        return _Member(
            name.decode(errors="surrogateescape"), here, number, mode, uid, gid, links, mtime,
            (device_major, device_minor), (major, minor), content, target,
        ), following  # fmt: skip

    def _count(self, name: bytes) -> None:
        self._entries += 1
        self._names += len(name)
        if self._entries > self._limits.entries or self._names > self._limits.memory_bytes:
            raise InputError(f"an initramfs of more than {self._entries - 1} entries")

    def _check_sum(self, content: Content, check: int, here: str) -> None:
        total = sum(sum(chunk) for chunk in content.chunks()) & 0xFFFFFFFF
        if total != check:
            self.problems.append(f"{here}: its bytes add up to {total:#x}, its header says {check:#x}")

    def _place(self, members: list[_Member]) -> None:
        """Put members into the tree in their order; of several with one number the last with bytes brings them."""
        bodies = {_key(member): member.content for member in members if member.links > 1 and member.content.size}
        known: dict[tuple[int, ...], Entry] = {}
        for member in members:
            try:
                self._put(member, bodies, known)
            except InputError as problem:
                self.problems.append(str(problem))
            except _OddError as odd:
                self.problems.append(f"{member.where}: {odd}")

    def _put(
        self, member: _Member, bodies: Mapping[tuple[int, ...], Content], known: dict[tuple[int, ...], Entry]
    ) -> None:
        path = _path(member.path)
        _check(member)
        above = path.rpartition("/")[0]
        parent = self.draft.get(self.draft.resolve(above or "/"))
        if path != "/" and (parent is None or not parent.is_dir):
            raise _OddError("the directory that it lies in does not come before it: the kernel leaves it out")
        linked = member.links > 1 and not stat.S_ISDIR(member.mode)
        key = _key(member)
        entry = known.get(key) if linked else None
        if entry is None:
            entry = _entry(member, bodies.get(key, member.content) if linked else member.content)
            if linked:
                known[key] = entry
        here = self.draft.get(path)
        if here is not None and here.is_dir and not entry.is_dir:
            raise _OddError("a directory of this name is there already: the kernel leaves it out")
        self.draft.put(path, entry)


def _key(member: _Member) -> tuple[int, ...]:
    """What makes two members one inode, for the kernel."""
    return (member.number, *member.device, stat.S_IFMT(member.mode))


def _path(name: str) -> str:
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise _OddError("a path with ..")
    if any(len(part.encode(errors="surrogateescape")) > NAME_MAX for part in parts):
        raise _OddError(f"a name of more than {NAME_MAX} bytes")
    if "\0" in name:
        raise _OddError("a zero byte in its name")
    return "/" + "/".join(parts)


def _check(member: _Member) -> None:
    if stat.S_IFMT(member.mode) not in _TYPES or member.mode > 0xFFFF:
        raise _OddError(f"its mode is {member.mode:#o}, which is no type of file")
    if stat.S_ISLNK(member.mode):
        size = member.content.size
        if not 0 < size <= PATH_MAX or "\0" in member.target:
            raise _OddError(f"a symbolic link with a target of {size} bytes, or with zeros in it")
    elif not stat.S_ISREG(member.mode) and member.content.size:
        raise _OddError(f"it has {member.content.size} bytes and is no regular file")


def _entry(member: _Member, content: Content) -> Entry:
    is_device = stat.S_IFMT(member.mode) in (stat.S_IFCHR, stat.S_IFBLK)
    return Entry(
        mode=member.mode, uid=member.uid, gid=member.gid, mtime_ns=member.mtime * 1_000_000_000, target=member.target,
        major=member.special[0] if is_device else 0, minor=member.special[1] if is_device else 0,
        content=content if stat.S_ISREG(member.mode) else EMPTY,
    )  # fmt: skip


def _skip_zeros(backing: Backing, at: int) -> int:
    while at < backing.size:
        data = backing.read(at, _CHUNK)
        rest = data.lstrip(b"\0")
        if rest:
            return at + len(data) - len(rest)
        if not data:
            break
        at += len(data)
    return backing.size


class _Gzip:
    """zlib's decompressor with the manners of the others: pieces of bounded size, and a word when it wants more."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj(wbits=31)
        self._waiting = b""

    @property
    def eof(self) -> bool:
        return self._stream.eof

    @property
    def needs_input(self) -> bool:
        return not self._waiting

    @property
    def unused_data(self) -> bytes:
        return self._stream.unused_data

    def decompress(self, data: bytes) -> bytes:
        made = self._stream.decompress(self._waiting + data, _OUT)
        self._waiting = self._stream.unconsumed_tail
        return made


class _Bounded:
    """A decompressor of the standard library's kind that gives pieces of bounded size."""

    # Any: bz2, lzma and zstd share these names, and no type.
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    @property
    def eof(self) -> bool:
        return bool(self._stream.eof)

    @property
    def needs_input(self) -> bool:
        return bool(self._stream.needs_input)

    @property
    def unused_data(self) -> bytes:
        return bytes(self._stream.unused_data)

    def decompress(self, data: bytes) -> bytes:
        return bytes(self._stream.decompress(data, _OUT))


def _stream(kind: str, limits: Limits) -> _Gzip | _Bounded:
    makers: Mapping[str, Callable[[], _Gzip | _Bounded]] = {
        "gzip": _Gzip,
        "zstd": lambda: _Bounded(zstd.decompressor(limits.zstd_window_log)),
        "xz": lambda: _Bounded(lzma.LZMADecompressor(memlimit=1 << limits.zstd_window_log)),
        "bzip2": lambda: _Bounded(bz2.BZ2Decompressor()),
    }
    return makers[kind]()
