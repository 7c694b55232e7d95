"""A tree as a tar archive: POSIX pax headers where ustar's fields are too small, and nothing that varies.

header 512 | bytes, padded to 512 | …                     sorted by path, "/" as "./", directories end in "/"
two zero blocks at the end

Source: POSIX.1-2017 pax(1), "pax Interchange Format"; extended attributes as star and GNU tar keep them (SCHILY.xattr).
"""

from __future__ import annotations

import stat
from collections.abc import Iterator
from typing import Final

from osbuild.errors import InputError
from osbuild.tree import Entry, Tree, directory, quote

_BLOCK: Final = 512
_NAME: Final = 100  # bytes
_ID_MAX: Final = (1 << 21) - 1  # seven octal digits
_SIZE_MAX: Final = (1 << 33) - 1  # eleven
_HARD_LINK: Final = b"1"
_IMPLIED: Final = directory()
_KINDS: Final = {
    stat.S_IFREG: b"0", stat.S_IFLNK: b"2", stat.S_IFCHR: b"3", stat.S_IFBLK: b"4", stat.S_IFDIR: b"5",
    stat.S_IFIFO: b"6",
}  # fmt: skip


def archive(tree: Tree) -> Iterator[bytes]:
    """The archive in pieces. Of an inode with several paths the first has the bytes, the others are links to it.

    A directory that exists only because something lies in it has no member: it had none, and no time to put there.
    """
    first: dict[Entry, str] = {}
    implied = _implied(tree)
    for path, entry in tree.items():
        if stat.S_ISSOCK(entry.mode) or path in implied:
            continue
        original = first.setdefault(entry, path)
        if original != path:
            yield _headers(path, entry, _HARD_LINK, _encode(original.lstrip("/")), 0)
            continue
        kind = _KINDS[stat.S_IFMT(entry.mode)]
        yield _headers(path, entry, kind, _encode(entry.target), entry.content.size)
        if entry.content.size:
            yield from entry.content.chunks()
            yield bytes(-entry.content.size % _BLOCK)
    yield bytes(2 * _BLOCK)


def _implied(tree: Tree) -> set[str]:
    """Directories that a reader makes just so when he finds what lies in them."""
    found = {path for path, entry in tree.items() if entry.mtime_ns is None and _is_plain(entry)}
    if found:
        found &= {_above(path) for path, entry in tree.items() if path != "/" and not stat.S_ISSOCK(entry.mode)}
    return found


def _is_plain(entry: Entry) -> bool:
    return (entry.mode, entry.uid, entry.gid, len(entry.xattrs)) == (_IMPLIED.mode, _IMPLIED.uid, _IMPLIED.gid, 0)


def _above(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _headers(path: str, entry: Entry, kind: bytes, link: bytes, size: int) -> bytes:
    """One member's header, with an extended one before it where that is needed."""
    name = _encode(path.lstrip("/") or "./") + (b"/" if entry.is_dir and path != "/" else b"")
    seconds, rest = divmod(entry.mtime_ns or 0, 1_000_000_000)
    records: list[tuple[bytes, bytes]] = []
    if len(name) > _NAME:
        records.append((b"path", name))
    if len(link) > _NAME:
        records.append((b"linkpath", link))
    if rest or not 0 <= seconds <= _SIZE_MAX:
        records.append((b"mtime", _time(entry.mtime_ns or 0)))
    for key, value, most in ((b"size", size, _SIZE_MAX), (b"uid", entry.uid, _ID_MAX), (b"gid", entry.gid, _ID_MAX)):
        if value > most:
            records.append((key, b"%d" % value))
    for xattr, data in sorted(entry.xattrs.items()):
        if "=" in xattr:
            raise InputError(f"{quote(path)}: no tar holds an extended attribute called {quote(xattr)}")
        records.append((b"SCHILY.xattr." + _encode(xattr), data))
    header = _header(
        name[:_NAME], kind, link[:_NAME], stat.S_IMODE(entry.mode), _fit(entry.uid, _ID_MAX), _fit(entry.gid, _ID_MAX),
        _fit(size, _SIZE_MAX), _fit(seconds, _SIZE_MAX), entry.major, entry.minor,
    )  # fmt: skip
    if not records:
        return header
    body = b"".join(_record(key, value) for key, value in records)
    about = _header(b"PaxHeaders/" + name[: _NAME - 11], b"x", b"", 0o644, 0, 0, len(body), 0, 0, 0)
    return about + body + bytes(-len(body) % _BLOCK) + header


def _header(
    name: bytes, kind: bytes, link: bytes, mode: int, uid: int, gid: int, size: int, mtime: int, major: int, minor: int
) -> bytes:
    fields = b"%s%07o\0%07o\0%07o\0%011o\0%011o\0" % (name.ljust(_NAME, b"\0"), mode, uid, gid, size, mtime)
    rest = kind + link.ljust(_NAME, b"\0") + b"ustar\x0000" + bytes(64) + b"%07o\0%07o\0" % (major, minor) + bytes(167)
    checksum = sum(fields) + sum(rest) + 8 * 32
    return fields + b"%06o\0 " % checksum + rest


def _record(key: bytes, value: bytes) -> bytes:
    """`length key=value newline`; the length counts its own digits."""
    bare = len(key) + len(value) + 3
    length = bare + len(str(bare))
    if bare + len(str(length)) != length:
        length = bare + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _time(nanoseconds: int) -> bytes:
    sign = b"-" if nanoseconds < 0 else b""
    seconds, rest = divmod(abs(nanoseconds), 1_000_000_000)
    return sign + b"%d.%09d" % (seconds, rest)


def _fit(value: int, most: int) -> int:
    """A number as the old field can hold it; what does not fit stands in a record."""
    return value if 0 <= value <= most else 0


def _encode(text: str) -> bytes:
    return text.encode(errors="surrogateescape")
