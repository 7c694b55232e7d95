"""A strict reader of tar streams (ustar, PAX, GNU long names) for image layers: what is odd is refused, by name.

    block 512: name 100 | mode 8 | uid 8 | gid 8 | size 12 | mtime 12 | checksum 8 | type 1 | linkname 100
               | magic 6 | version 2 | uname 32 | gname 32 | devmajor 8 | devminor 8 | prefix 155 | 12 unused
    then the member's bytes, padded to 512; two zero blocks end it

Sources: POSIX.1-2017 pax(1), the GNU tar manual ("Basic Tar Format"), OCI image-spec layer.md. CPython's tarfile is
not used on layers: a wrong checksum in the middle silently ends an archive there, and more (see docs).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Final

from osbuild.errors import InputError
from osbuild.tree import ID_MAX, NAME_MAX, PATH_MAX, Backing, quote

BLOCK: Final = 512
PAX_MAX: Final = 1 << 20  # bytes of one extended header
PAX_RECORDS: Final = 64
GNU_NAME_MAX: Final = 4096
SIZE_MAX: Final = (1 << 63) - 1
XATTR_VALUE_MAX: Final = 1 << 16  # as the kernel: XATTR_SIZE_MAX
XATTR_NAME_MAX: Final = 255

_HEADER: Final = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_ZERO: Final = bytes(BLOCK)
_AHEAD: Final = frozenset((b"x", b"g", b"L", b"K"))  # members that speak of the one after them
_TYPES: Final[Mapping[bytes, int]] = {
    b"0": stat.S_IFREG, b"\0": stat.S_IFREG, b"7": stat.S_IFREG, b"2": stat.S_IFLNK, b"3": stat.S_IFCHR,
    b"4": stat.S_IFBLK, b"5": stat.S_IFDIR, b"6": stat.S_IFIFO,
}  # fmt: skip
_MAJOR_MAX: Final = (1 << 12) - 1
_MINOR_MAX: Final = (1 << 20) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much of what a layer may hold; generous, and settable for those who need more."""

    entries: int = 2_000_000
    file_bytes: int = 1 << 40
    trailing_bytes: int = 1 << 24  # after the end of the archive: padding of blocking factors, nothing else


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
    size: int
    xattrs: dict[str, bytes] = field(default_factory=dict)


def read(spool: Backing, start: int, length: int, limits: Limits | None = None) -> Iterator[Member]:
    """The members of the archive that lies in a spool, in order. InputError at the first thing that breaks a rule."""
    limits = limits or Limits()
    at, end, count = start, start + length, 0
    ahead = _Ahead()
    while at < end:
        block = spool.read(at, BLOCK)
        where = f"at byte {at - start}"
        if len(block) < BLOCK or at + BLOCK > end:
            raise InputError(f"tar: cut off in the middle of a header {where}")
        if block == _ZERO:
            _check_end(spool, at, end, where, limits)
            break
        header = _parse(block, where)
        body = at + BLOCK
        count += 1
        if count > limits.entries:
            raise InputError(f"tar: more than {limits.entries} members in a layer")
        if header.kind in _AHEAD:
            at = body + header.size + -header.size % BLOCK
            if at > end:
                raise InputError(f"tar: an extended header {where} is longer than the archive")
            _limit(header.size, PAX_MAX if header.kind in b"xg" else GNU_NAME_MAX + 1, where)
            ahead.take(header.kind, spool.read(body, header.size), where)
            continue
        member = _member(header, ahead, body, where)
        _check_member(member, end, limits)
        at = body + member.size + -member.size % BLOCK
        ahead = _Ahead()
        yield member
    if ahead.names or ahead.records:
        raise InputError("tar: the archive ends after an extended header")


class _Ahead:
    """What extended headers said of the member that follows them."""

    __slots__ = ("names", "records")

    def __init__(self) -> None:
        self.records: dict[str, bytes] = {}
        self.names: dict[bytes, bytes] = {}

    def take(self, kind: bytes, data: bytes, where: str) -> None:
        if kind in b"LK":
            if kind in self.names:
                raise InputError(f"tar: two long names for one member {where}")
            self.names[kind] = data.rstrip(b"\0")
            return
        records = _pax_records(data, where)
        if kind == b"g":
            if set(records) - {"comment"}:
                raise InputError(f"tar: a global header sets {quote(min(set(records) - {'comment'}))} {where}")
        elif self.records:
            raise InputError(f"tar: two extended headers for one member {where}")
        else:
            self.records = records


@dataclass(slots=True, kw_only=True)
class _Header:
    name: bytes
    kind: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    link: bytes
    major: bytes
    minor: bytes


def _parse(block: bytes, where: str) -> _Header:
    (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, _version, _uname, _gname, major, minor, prefix) = (
        _HEADER.unpack(block)
    )
    said = _number(checksum, "checksum", where)
    unsigned = sum(block) - sum(checksum) + 8 * 32
    # Some old writers added the bytes up as signed ones.
    if said != unsigned and said != unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:]):
        raise InputError(f"tar: wrong header checksum {where}")
    name = name.partition(b"\0")[0]
    # In GNU's own format (magic "ustar " and a space) the prefix field holds times, not a name.
    if magic == b"ustar\0" and prefix[0]:
        name = prefix.partition(b"\0")[0] + b"/" + name
    return _Header(
        name=name, kind=kind, mode=_number(mode, "mode", where), uid=_number(uid, "uid", where),
        gid=_number(gid, "gid", where), size=_number(size, "size", where),
        mtime=_number(mtime, "mtime", where, signed=True), link=link.partition(b"\0")[0], major=major, minor=minor,
    )  # fmt: skip


def _number(text: bytes, what: str, where: str, *, signed: bool = False) -> int:
    """An octal field, or GNU's base 256 when its first bit is set."""
    if text[0] & 0x80:
        value = int.from_bytes(text, "big")
        bits = 8 * len(text)
        value -= 1 << (bits - 1)  # the marking bit
        if value >> (bits - 2):
            value -= 1 << (bits - 1)  # the sign
        if (value < 0 and not signed) or value > SIZE_MAX or value < -SIZE_MAX:
            raise InputError(f"tar: {what} out of range {where}")
        return value
    digits = text.strip(b" \0")
    if not digits:
        return 0
    # int() would also take signs and underscores.
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise InputError(f"tar: {what} {quote(digits.decode('latin-1'))} is not octal {where}")
    return int(digits, 8)


def _pax_records(data: bytes, where: str) -> dict[str, bytes]:
    """The records `length key=value newline` of an extended header; every length must be exact."""
    records: dict[str, bytes] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        digits = data[at:space] if space > 0 else b""
        if not digits.isdigit():
            raise InputError(f"tar: an extended header record has no length {where}")
        end = at + int(digits)
        record = data[space + 1 : end]
        if end > len(data) or not record.endswith(b"\n") or b"=" not in record:
            raise InputError(f"tar: an extended header record has a wrong length {where}")
        key, _, value = record[:-1].partition(b"=")
        name = _text(key, where)
        if name in records:
            raise InputError(f"tar: {quote(name)} stands twice in an extended header {where}")
        records[name] = value
        if len(records) > PAX_RECORDS:
            raise InputError(f"tar: more than {PAX_RECORDS} records in an extended header {where}")
        at = end
    return records


def _member(header: _Header, ahead: _Ahead, body: int, where: str) -> Member:
    extended = ahead.records
    link = extended.get("linkpath") or ahead.names.get(b"K", header.link)
    text = _text(extended.get("path") or ahead.names.get(b"L", header.name), where)
    here = quote(text)
    kind = header.kind
    if kind == b"\0" and text.endswith("/"):
        kind = b"5"  # before POSIX, that was how a directory was written
    if kind == b"S" or any(key.startswith("GNU.sparse.") for key in extended):
        raise InputError(f"{here}: sparse members are not allowed in image layers")
    if kind not in _TYPES and kind != b"1":
        raise InputError(f"{here}: unknown tar member type {quote(kind.decode('latin-1'))}")
    member = Member(
        name=_path(text, here),
        kind=_TYPES.get(kind, 0),
        mode=header.mode & 0o7777,
        uid=_decimal(extended, "uid", header.uid, here),
        gid=_decimal(extended, "gid", header.gid, here),
        mtime_ns=_mtime(extended, header.mtime, here),
        link=_text(link, where),
        major=_number(header.major, "device number", where) if kind in b"34" else 0,
        minor=_number(header.minor, "device number", where) if kind in b"34" else 0,
        offset=body,
        size=_decimal(extended, "size", header.size, here),
        xattrs=_xattrs(extended, here) if extended else {},
    )
    if kind == b"1":
        member.link = _path(member.link, f"{here}: hard link to {quote(member.link)}")
    return member


def _check_member(member: Member, end: int, limits: Limits) -> None:
    here = quote(member.name)
    if member.size and not stat.S_ISREG(member.kind):
        raise InputError(f"{here}: only regular files have bytes, but its size is {member.size}")
    if member.size > limits.file_bytes:
        raise InputError(f"{here}: {member.size} bytes are more than the {limits.file_bytes} a file may have")
    if member.offset + member.size > end:
        raise InputError(f"{here}: its {member.size} bytes end after the archive does")
    if not (0 <= member.uid <= ID_MAX and 0 <= member.gid <= ID_MAX):
        raise InputError(f"{here}: owner {member.uid}:{member.gid} is out of range")
    if member.major > _MAJOR_MAX or member.minor > _MINOR_MAX:
        raise InputError(f"{here}: device {member.major}:{member.minor} is out of range")
    if stat.S_ISLNK(member.kind):
        size = len(member.link.encode(errors="surrogateescape"))
        if not 0 < size <= PATH_MAX:
            raise InputError(f"{here}: a symbolic link's target of {size} bytes")


def _path(text: str, here: str) -> str:
    """A member's name as an absolute path, checked component by component."""
    parts = [part for part in text.split("/") if part not in ("", ".")]
    if not text:
        raise InputError(f"{here}: a member without a name")
    for part in parts:
        if part == "..":
            raise InputError(f"{here}: '..' in a member's name")
        if len(part) > NAME_MAX // 4 and len(part.encode(errors="surrogateescape")) > NAME_MAX:
            raise InputError(f"{here}: a component of more than {NAME_MAX} bytes")
    path = "/" + "/".join(parts)
    if len(path) > PATH_MAX // 4 and len(path.encode(errors="surrogateescape")) > PATH_MAX:
        raise InputError(f"{here}: a path of more than {PATH_MAX} bytes")
    return path


def _decimal(extended: Mapping[str, bytes], key: str, otherwise: int, here: str) -> int:
    text = extended.get(key)
    if not text:
        return otherwise
    if not text.isdigit() or len(text) > 19 or int(text) > SIZE_MAX:
        raise InputError(f"{here}: {key} {quote(text.decode('latin-1'))} in an extended header")
    return int(text)


def _mtime(extended: Mapping[str, bytes], seconds: int, here: str) -> int:
    text = extended.get("mtime")
    if not text:
        return seconds * 1_000_000_000
    try:
        value = Decimal(text.decode("ascii")) if len(text) <= 40 else Decimal("NaN")
    except (InvalidOperation, UnicodeDecodeError):
        value = Decimal("NaN")
    if not value.is_finite() or abs(value) > SIZE_MAX:
        raise InputError(f"{here}: mtime {quote(text[:40].decode('latin-1'))} in an extended header")
    return int((value * 1_000_000_000).to_integral_value(rounding="ROUND_FLOOR"))


def _xattrs(extended: Mapping[str, bytes], here: str) -> dict[str, bytes]:
    found = {}
    for key, value in extended.items():
        if not key.startswith("SCHILY.xattr."):
            continue
        name = key.removeprefix("SCHILY.xattr.")
        if "." not in name or len(name.encode(errors="surrogateescape")) > XATTR_NAME_MAX or "\0" in name:
            raise InputError(f"{here}: extended attribute name {quote(name)}")
        if len(value) > XATTR_VALUE_MAX:
            raise InputError(f"{here}: extended attribute {quote(name)} of {len(value)} bytes")
        found[name] = value
    return found


def _check_end(spool: Backing, at: int, end: int, where: str, limits: Limits) -> None:
    """Two zero blocks end an archive (one will do at the very end); what follows is padding, and bounded."""
    if at + BLOCK < end and spool.read(at + BLOCK, BLOCK).strip(b"\0"):
        raise InputError(f"tar: data after a single zero block {where}")
    if end - at > limits.trailing_bytes:
        raise InputError(f"tar: {end - at} bytes after the end of the archive")


def _limit(size: int, most: int, where: str) -> None:
    if size > most:
        raise InputError(f"tar: an extended header of {size} bytes {where}")


def _text(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise InputError(f"tar: a NUL inside a name {where}")
    return data.decode(errors="surrogateescape")
