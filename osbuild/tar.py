"""A strict reader of tar streams (ustar, PAX, GNU long names) for image layers: what is odd is refused, by name.

    block 512: name 100 | mode 8 | uid 8 | gid 8 | size 12 | mtime 12 | checksum 8 | type 1 | linkname 100
               | magic 6 | version 2 | uname 32 | gname 32 | devmajor 8 | devminor 8 | prefix 155 | 12 unused
    then the member's bytes, padded to 512; two zero blocks end it

Sources: POSIX.1-2017 pax(1), the GNU tar manual ("Basic Tar Format"), OCI image-spec layer.md. CPython's tarfile is
not used on layers: a wrong checksum in the middle silently ends an archive there, and more.
"""

from __future__ import annotations

import stat
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, TypeVar

from osbuild import sparse_map
from osbuild.errors import InputError
from osbuild.limits import Limits as Limits
from osbuild.sparse_map import BLOCK, OddError
from osbuild.tree import EMPTY, ID_MAX, Backing, Content, Slice, Sparse, quote

GNU_NAME_MAX: Final = 4096
SIZE_MAX: Final = (1 << 63) - 1
XATTR_NAME_MAX: Final = 255

_WINDOW: Final = 8 << 10  # read at once: small members share one read, and large ones lose little by it
_KEPT: Final = 1024  # fields of headers remembered: in most archives few owners, modes and times come again and again
_NANO: Final = 1_000_000_000
_ZERO: Final = bytes(BLOCK)
_XATTR: Final = "SCHILY.xattr."
_REPEATED: Final = frozenset((sparse_map.PREFIX + "offset", sparse_map.PREFIX + "numbytes"))
_TYPES: Final[Mapping[bytes, int]] = {
    b"0": stat.S_IFREG, b"\0": stat.S_IFREG, b"7": stat.S_IFREG, b"S": stat.S_IFREG, b"2": stat.S_IFLNK,
    b"3": stat.S_IFCHR, b"4": stat.S_IFBLK, b"5": stat.S_IFDIR, b"6": stat.S_IFIFO, b"1": 0,
}  # fmt: skip
_MAJOR_MAX: Final = (1 << 12) - 1
_MINOR_MAX: Final = (1 << 20) - 1
_T = TypeVar("_T")
_NO_XATTRS: Final[Mapping[str, bytes]] = MappingProxyType({})


@dataclass(slots=True, kw_only=True)
class Member:
    """One member as the stream has it: names are checked, not yet resolved against any tree."""

    name: str  # absolute, no "." or ".." in it, "/" for the root
    kind: int  # stat.S_IF…, or 0 for a hard link
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    link: str  # of a symbolic link: as written; of a hard link: an absolute path like `name`
    major: int
    minor: int
    offset: int  # of the bytes, in the spool
    size: int  # of the file; what is stored of a sparse one is in its pieces
    xattrs: Mapping[str, bytes]
    pieces: tuple[tuple[int, int, int], ...] | None = None  # of a sparse file, as in tree.Sparse


def read(spool: Backing, start: int, length: int, limits: Limits | None = None) -> Iterator[Member]:
    """The members of the archive that lies in a spool, in order. InputError at the first thing that breaks a rule."""
    return _Reader(spool, start, length, limits or Limits()).members()


def content(member: Member, spool: Backing) -> Content:
    """The bytes of a regular file's member."""
    if member.pieces is not None:
        return Sparse(spool, member.size, member.pieces)
    return Slice(spool, member.offset, member.size) if member.size else EMPTY


class _Reader:
    """One archive on its way from the first header to the end."""

    def __init__(self, spool: Backing, start: int, length: int, limits: Limits) -> None:
        self._spool = spool
        self._start = start
        self._end = start + length
        self._limits = limits
        self._window = b""  # bytes of the archive …
        self._base = start  # … from here on
        self._ahead = _Ahead(limits)
        self._owners: dict[bytes, tuple[int, int, int]] = {}
        self._times: dict[bytes, int] = {}

    def members(self) -> Iterator[Member]:
        at, end, count = self._start, self._end, 0
        while at < end:
            block = b""
            try:
                block = self._block(at)
                if block == _ZERO:
                    self._check_end(at)
                    break
                _check_sum(block)
                kind = block[156:157]
                count += kind not in b"xLK"  # those come with a member
                if count > self._limits.entries:
                    raise OddError(f"more than {self._limits.entries} members in an archive", limit="entries")
                if kind in b"xgLK":
                    at = self._extended(kind, block, at + BLOCK)
                    continue
                member, at = self._member(kind, block, at + BLOCK)
            except OddError as odd:
                name = self._ahead.name(_name(block))
                raise InputError(
                    f"{_shown(name) if name else 'tar'}: {odd} (tar header at byte {at - self._start})", hint=odd.hint
                ) from None
            yield member
        if not self._ahead.empty:
            raise InputError(f"{_shown(self._ahead.name(b''))}: the archive ends after an extended header")

    def _block(self, at: int) -> bytes:
        """The block at an offset that is known to lie before the end."""
        offset = at - self._base
        if not 0 <= offset <= len(self._window) - BLOCK:
            self._window = self._spool.read(at, min(_WINDOW, self._end - at))
            self._base, offset = at, 0
            if len(self._window) < BLOCK:
                raise OddError("the archive is cut off in the middle of a header")
        return self._window[offset : offset + BLOCK]

    def _bytes(self, at: int, length: int) -> bytes:
        """Bytes at an offset, fewer at the end of the archive."""
        offset = at - self._base
        if offset >= 0 and offset + length <= len(self._window):
            return self._window[offset : offset + length]
        return self._spool.read(at, max(0, min(length, self._end - at)))

    def _extended(self, kind: bytes, block: bytes, body: int) -> int:
        """Take in a header that speaks of the next member; returns where that one's header is."""
        size = _number(block[124:136], "size")
        most = self._limits.header_bytes if kind in b"xg" else GNU_NAME_MAX + 1
        if size > most:
            limit = "header_bytes" if kind in b"xg" else ""
            raise OddError(f"an extended header of {size} bytes, more than {most}", limit=limit)
        after = body + size + -size % BLOCK
        if after > self._end:
            raise OddError("an extended header is longer than the archive")
        self._ahead.take(kind, self._bytes(body, size))
        return after

    def _member(self, kind: bytes, block: bytes, body: int) -> tuple[Member, int]:
        """The member of a header, and where the next header is."""
        if kind not in _TYPES:
            raise OddError(f"unknown tar member type {_shown(kind)}")
        ahead = self._ahead
        if block[345]:
            _check_prefix(block)
        raw = _name(block) if ahead.empty else ahead.name(_name(block))
        if raw.endswith(b"/") and kind in b"\x0007S":
            kind = _slashed(kind)
        owner = self._owners.get(block[100:124]) or self._owner(block[100:124])
        mtime_ns = self._times.get(block[136:148])
        if mtime_ns is None:
            mtime_ns = self._time(block[136:148])
        member = Member(
            name=_path(raw, self._limits), kind=_TYPES[kind], mode=owner[0], uid=owner[1], gid=owner[2],
            mtime_ns=mtime_ns, link="", major=0, minor=0, offset=body, size=_number(block[124:136], "size"),
            xattrs=_NO_XATTRS,
        )  # fmt: skip
        if kind not in b"05\0" or not ahead.empty:
            body = self._describe(member, kind, block, body)
        after = self._body(member, body)
        if not ahead.empty:
            ahead.forget()
        return member, after

    def _owner(self, fields: bytes) -> tuple[int, int, int]:
        """Mode, uid and gid, remembered."""
        uid, gid = _number(fields[8:16], "uid"), _number(fields[16:24], "gid")
        owner = _number(fields[:8], "mode") & 0o7777, uid, gid
        _keep(self._owners)[fields] = owner
        return owner

    def _time(self, text: bytes) -> int:
        value = _number(text, "mtime", signed=True) * _NANO
        _keep(self._times)[text] = value
        return value

    def _describe(self, member: Member, kind: bytes, block: bytes, body: int) -> int:
        """What only some members have: a link, a device number, extended headers, a sparse map. Where the bytes are."""
        link = self._ahead.link(block[157:257].partition(b"\0")[0])
        if kind == b"1":
            member.link = _path(link, self._limits, "the target of a hard link")
        elif kind == b"2":
            if not 0 < len(link) <= self._limits.target_bytes:
                raise OddError(f"a symbolic link's target of {len(link)} bytes, not 1 to {self._limits.target_bytes}")
            member.link = _text(link)
        elif kind in b"34":
            member.major, member.minor = _number(block[329:337], "major"), _number(block[337:345], "minor")
            if member.major > _MAJOR_MAX or member.minor > _MINOR_MAX:
                raise OddError(f"device {member.major}:{member.minor} is out of range")
        records = self._ahead.records
        if records:
            _apply(records, member, self._limits)
        if kind == b"S" or self._ahead.sparse:
            return self._map(member, kind, block, body)
        return body

    def _map(self, member: Member, kind: bytes, block: bytes, body: int) -> int:
        """Read the map of a sparse member; its size stays what is stored until the body has been found."""
        if not stat.S_ISREG(member.kind) or (kind == b"S" and self._ahead.sparse):
            raise OddError("a sparse map where none can be")
        if kind == b"S":
            found, body = sparse_map.old(block, body, member.size, self._old_block, _sparse_number, self._limits)
        else:
            found = sparse_map.pax(
                self._ahead.records, self._ahead.listed, body, member.size, self._bytes, self._limits
            )  # fmt: skip
        if found.name:
            if found.name.endswith(b"/"):
                raise OddError("a sparse file whose name ends in '/'")
            member.name = _path(found.name, self._limits)
        stored, member.size, member.pieces = member.size, found.size, found.pieces
        if body + stored > self._end:
            raise OddError(f"its {stored} stored bytes end after the archive does")
        member.offset = body
        return body + stored + -stored % BLOCK

    def _old_block(self, at: int) -> bytes:
        return self._bytes(at, BLOCK)

    def _body(self, member: Member, body: int) -> int:
        """Check a member's numbers; returns where the next header is."""
        size = member.size
        if member.uid > ID_MAX or member.gid > ID_MAX:
            raise OddError(f"owner {member.uid}:{member.gid} is out of range")
        if member.pieces is not None:
            return body  # already behind the bytes
        if not size:
            return body
        if not stat.S_ISREG(member.kind):
            raise OddError(f"only regular files have bytes, but its size is {size}")
        if size > self._limits.file_bytes:
            raise OddError(
                f"{size} bytes are more than the {self._limits.file_bytes} a file may have", limit="file_bytes"
            )
        if body + size > self._end:
            raise OddError(f"its {size} bytes end after the archive does")
        return body + size + -size % BLOCK

    def _check_end(self, at: int) -> None:
        """Two zero blocks end an archive (one will do at the very end); what follows is padding, and bounded."""
        if self._bytes(at + BLOCK, BLOCK).strip(b"\0"):
            raise OddError("data after a single zero block")
        if self._end - at > self._limits.trailing_bytes:
            most = self._limits.trailing_bytes
            raise OddError(
                f"{self._end - at} bytes after the end of the archive, more than {most}", limit="trailing_bytes"
            )


class _Ahead:
    """What extended headers said of the member that follows them."""

    __slots__ = ("_extended", "_limits", "_names", "empty", "listed", "records", "sparse")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._names: dict[bytes, bytes] = {}
        self.forget()

    def forget(self) -> None:
        """Begin anew, for the next member."""
        self._names.clear()
        self.records: dict[str, bytes] = {}
        self.listed: list[tuple[str, bytes]] = []  # records that may stand more than once
        self.empty = True
        self.sparse = False
        self._extended = False

    def name(self, otherwise: bytes) -> bytes:
        return self.records.get("path") or self._names.get(b"L", otherwise)

    def link(self, otherwise: bytes) -> bytes:
        return self.records.get("linkpath") or self._names.get(b"K", otherwise)

    def take(self, kind: bytes, data: bytes) -> None:
        self._take(kind, data)
        # CPython and we would go by the extended header, Go's reader (docker, containerd, scanners) by GNU's.
        if (b"L" in self._names and "path" in self.records) or (b"K" in self._names and "linkpath" in self.records):
            raise OddError("a long name of GNU's kind and another in an extended header")

    def _take(self, kind: bytes, data: bytes) -> None:
        if kind in b"LK":
            if kind in self._names:
                raise OddError("two long names for one member")
            self._names[kind] = data.rstrip(b"\0")
        elif kind == b"g":
            self._take_global(data)
            return
        elif self._extended:
            raise OddError("two extended headers for one member")
        else:
            self._extended = True
            self.records, self.listed = _pax_records(data, self._limits)
            self.sparse = sparse_map.PREFIX.encode() in data and _is_sparse(self.records, self.listed)
        self.empty = False

    def _take_global(self, data: bytes) -> None:
        records, listed = _pax_records(data, self._limits)
        keys = {*records, *(key for key, _ in listed)} - {"comment"}
        if keys:
            raise OddError(f"a global header sets {quote(min(keys))}; only a comment may be global")


def _name(block: bytes) -> bytes:
    """The name that a header itself has."""
    name = block[:100].partition(b"\0")[0]
    # In GNU's own format (magic "ustar " and a space) the prefix field holds times, not a name.
    if block[345:346] not in b"\0" and block[257:263] == b"ustar\0":
        return block[345:500].partition(b"\0")[0] + b"/" + name
    return name


def _check_prefix(block: bytes) -> None:
    """Refuse what readers take differently: where one sees a part of the name, another sees times."""
    if block[257:265] == b"ustar  \0":
        # Go before 1.8 wrote names there, and its readers still look for them where there are no times.
        _number(block[345:357], "access time", signed=True)
        _number(block[357:369], "change time", signed=True)
    elif block[257:263] == b"ustar\0" and block[508:512] == b"tar\0" and b"\0" not in block[345:476]:
        raise OddError("a name's prefix that runs into the times of a star header")


def _check_sum(block: bytes) -> None:
    text = block[148:156]
    said = _number(text, "checksum")
    # Adler-32's low half is one more than the sum of the bytes, and 256 bytes cannot make it wrap (255 * 256 < 65520).
    total = (zlib.adler32(block[:256]) & 0xFFFF) + (zlib.adler32(block[256:]) & 0xFFFF) - 2
    unsigned = total - sum(text) + 8 * 32
    # Some old writers added the bytes up as signed ones.
    if said != unsigned and said != unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise OddError("wrong header checksum")


def _is_sparse(records: Mapping[str, bytes], listed: list[tuple[str, bytes]]) -> bool:
    return bool(listed) or any(key.startswith(sparse_map.PREFIX) for key in records)


def _number(text: bytes, what: str, *, signed: bool = False) -> int:
    """An octal field, or GNU's base 256 when its first bit is set."""
    digits = text.strip(b" \0")
    if digits.isdigit():
        try:
            return int(digits, 8)
        except ValueError:  # 8 or 9
            raise OddError(f"{what} {_shown(digits)} is not octal") from None
    if not digits:
        return 0
    if not text[0] & 0x80:
        raise OddError(f"{what} {_shown(digits)} is not octal")
    value = int.from_bytes(text, "big")
    bits = 8 * len(text)
    value -= 1 << (bits - 1)  # the marking bit
    if value >> (bits - 2):
        value -= 1 << (bits - 1)  # the sign
    if (value < 0 and not signed) or value > SIZE_MAX or value < -SIZE_MAX:
        raise OddError(f"{what} out of range")
    return value


def _sparse_number(text: bytes) -> int:
    return _number(text, "a number of the sparse map")


def _slashed(kind: bytes) -> bytes:
    if kind != b"\0":
        raise OddError("a regular file whose name ends in '/': some tools make it a file, others a directory")
    return b"5"  # before POSIX, that was how a directory was written


def _pax_records(data: bytes, limits: Limits) -> tuple[dict[str, bytes], list[tuple[str, bytes]]]:
    """The records `length key=value newline` of an extended header; every length must be exact."""
    records: dict[str, bytes] = {}
    listed: list[tuple[str, bytes]] = []
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        digits = data[at:space] if space > 0 else b""
        if not digits.isdigit():
            raise OddError("an extended header record has no length")
        end = at + int(digits)
        record = data[space + 1 : end]
        if end > len(data) or not record.endswith(b"\n") or b"=" not in record:
            raise OddError("an extended header record has a wrong length")
        key, _, value = record[:-1].partition(b"=")
        name = _text(key)
        if not key:
            raise OddError("an extended header record without a name")
        if name in _REPEATED:
            listed.append((name, value))
        elif name in records:
            raise OddError(f"{quote(name)} stands twice in an extended header")
        else:
            records[name] = value
        if len(records) > limits.header_records or len(listed) > 2 * limits.sparse_pieces:
            raise OddError(f"more than {limits.header_records} records in an extended header", limit="header_records")
        at = end
    return records, listed


def _path(raw: bytes, limits: Limits, what: str = "a member") -> str:
    """A member's name as an absolute path, checked component by component."""
    parts = raw.split(b"/")
    if b".." in parts:
        raise OddError(f"'..' in the name of {what}")
    if b"" in parts or b"." in parts:
        if not raw:
            raise OddError(f"{what} without a name")
        parts = [part for part in parts if part not in (b"", b".")]
    if len(raw) > limits.name_bytes and max(map(len, parts), default=0) > limits.name_bytes:
        raise OddError(f"a component of more than {limits.name_bytes} bytes in the name of {what}")
    path = b"/" + b"/".join(parts)
    if len(path) > limits.path_bytes:
        raise OddError(f"a path of more than {limits.path_bytes} bytes as the name of {what}")
    return _text(path)


def _apply(records: Mapping[str, bytes], member: Member, limits: Limits) -> None:
    """Let an extended header's records change what the header says; names and links are read already."""
    mtime = records.get("mtime")
    if mtime:
        member.mtime_ns = _pax_time(mtime)
        if len(records) == 1:  # nothing is more frequent
            return
    member.uid = _decimal(records, "uid", member.uid)
    member.gid = _decimal(records, "gid", member.gid)
    member.size = _decimal(records, "size", member.size)
    member.xattrs = _xattrs(records, limits)


def _decimal(records: Mapping[str, bytes], key: str, otherwise: int) -> int:
    text = records.get(key)
    if not text:
        return otherwise
    if not text.isdigit() or len(text) > 19 or int(text) > SIZE_MAX:
        raise OddError(f"{key} {_shown(text)} in an extended header is no number from 0 to 2^63 - 1")
    return int(text)


def _pax_time(text: bytes) -> int:
    """Decimal seconds as nanoseconds, rounded down; parts of a nanosecond are dropped."""
    whole, _, part = text.removeprefix(b"-").partition(b".")
    if not whole.isdigit() or len(whole) > 19 or len(text) > 64 or not (part + b"0").isdigit() or int(whole) > SIZE_MAX:
        raise OddError(f"mtime {_shown(text)} in an extended header is no decimal number of seconds")
    value = int(whole) * _NANO + int(part[:9].ljust(9, b"0"))
    if not text.startswith(b"-"):
        return value
    return -value - bool(part[9:].strip(b"0"))


def _xattrs(records: Mapping[str, bytes], limits: Limits) -> Mapping[str, bytes]:
    found = {}
    for key, value in records.items():
        if not key.startswith(_XATTR):
            continue
        name = key.removeprefix(_XATTR)
        prefix, dot, rest = name.partition(".")
        if not (prefix and dot and rest) or len(name.encode(errors="surrogateescape")) > XATTR_NAME_MAX:
            raise OddError(f"extended attribute {quote(name)} is not NAMESPACE.NAME of at most {XATTR_NAME_MAX} bytes")
        if len(value) > limits.xattr_bytes:
            raise OddError(f"extended attribute {quote(name)} of {len(value)} bytes, more than {limits.xattr_bytes}")
        found[name] = value
    return found or _NO_XATTRS


def _keep(memory: dict[bytes, _T]) -> dict[bytes, _T]:
    if len(memory) >= _KEPT:
        memory.clear()
    return memory


def _shown(data: bytes) -> str:
    """Bytes from outside for a message: whole as a name, unless there is a novel of them."""
    text = quote(data[:256].decode(errors="surrogateescape"))
    return text if len(data) <= 256 else text + "..."


def _text(data: bytes) -> str:
    if b"\0" in data:
        raise OddError("a NUL inside a name")
    return data.decode(errors="surrogateescape")
