"""Package headers out of an rpm database, in each of the three formats that rpm has had since 2000.

rpmdb.sqlite  table Packages, column blob                       (Fedora 33, RHEL 9 and later)
Packages.db   "RpmP" version:u32 generation:u32 pages:u32 …     (SUSE), little endian; `pages` of 4096 bytes of slots
              "Slot" index:u32 block:u32 blocks:u32             16 bytes; the first two slots are the header
              "BlbS" index:u32 generation:u32 size:u32 header …  at 16 * block
Packages      Berkeley DB hash, version 8-10, either byte order: pages of 512 B - 64 KiB, the first describes the rest
              12 magic  16 version  20 page size  32 last page   (all u32)
              page: 16 next:u32  20 entries:u16  22 used:u16  25 type:u8  26 offsets:u16 …; items lie from its end
              item: type:u8, then 1: the bytes themselves; 3: xxx page:u32 size:u32, bytes on a chain of pages
header        entries:u32 size:u32, entries (tag type offset count: 4 × u32), data; big endian

Sources: rpm's reference manual, "Format of the Header Structure"; SQLite's, Berkeley DB's and rpm's ndb formats as
their own tools read and write them. The files are hostile: no more bytes of headers are read than a file has.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from osbuild.errors import InputError
from osbuild.tree import Content, quote
from osbuild.view import read_at

# SQLite wants the whole file in memory, twice for a moment: we promise to stay below 400 MB. 4,000 packages take 100.
SIZE_MAX: Final = 128 << 20
NAME: Final = 1000
VERSION: Final = 1001
RELEASE: Final = 1002
EPOCH: Final = 1003
VENDOR: Final = 1011
LICENSE: Final = 1014
PACKAGER: Final = 1015
ARCH: Final = 1022
SOURCERPM: Final = 1044

_HEADERS_MAX: Final = 200_000
_TAGS_MAX: Final = 65_535  # rpm's own limit
_STRING_MAX: Final = 4096
_INT32: Final = 4
_STRINGS: Final = (6, 8, 9)  # one, an array, one per language: the first is what we want
_WANTED: Final = frozenset((NAME, VERSION, RELEASE, EPOCH, VENDOR, LICENSE, PACKAGER, ARCH, SOURCERPM))


def headers(content: Content, form: str) -> Iterator[bytes]:
    """Each package's header; InputError where the database is broken, after those before it."""
    if content.size > SIZE_MAX:
        raise InputError(f"has {content.size} bytes; at most {SIZE_MAX} are read")
    left, count = content.size, 0
    for header in FORMATS[form](content):
        left, count = left - len(header), count + 1
        # Two headers cannot share bytes: otherwise a small file could be read for hours.
        if left < 0 or count > _HEADERS_MAX:
            raise InputError("has more headers than fit into it")
        yield header


def read_header(header: bytes) -> Mapping[int, str]:
    """The tags that we know, as text. InputError when the header is broken."""
    if len(header) < 8:
        raise InputError("has a package whose header is cut short")
    count, size = struct.unpack_from(">II", header)
    start = 8 + 16 * count
    if count > _TAGS_MAX or start + size > len(header):
        raise InputError("has a package whose header is cut short")
    data = header[start : start + size]
    found = {}
    for tag, kind, offset, number in struct.iter_unpack(">IIII", header[8:start]):
        if tag not in _WANTED or number == 0:
            continue
        if kind in _STRINGS:
            end = data.find(0, offset, offset + _STRING_MAX) if offset < size else -1
            if end < 0:
                raise InputError("has a package with a text that does not end")
            found[tag] = data[offset:end].decode(errors="surrogateescape")
        elif kind == _INT32:
            if offset + 4 > size:
                raise InputError("has a package with a number outside its header")
            found[tag] = str(struct.unpack_from(">I", data, offset)[0])
    return found


def _sqlite(content: Content) -> Iterator[bytes]:
    data = bytearray()
    for chunk in content.chunks():
        data += chunk
    if not data.startswith(b"SQLite format 3\0") or len(data) < 100:
        raise InputError("is no SQLite database")
    data[18:20] = b"\1\1"  # not write-ahead logging: a database in memory cannot have a log
    try:
        with contextlib.closing(sqlite3.connect(":memory:")) as database:
            database.deserialize(data)
            data.clear()
            _restrict(database)
            _check_table(database)
            database.set_authorizer(_allowed)
            for (blob,) in database.execute("SELECT blob FROM Packages"):
                if not isinstance(blob, bytes):
                    raise InputError("has a package whose header is no blob")
                yield blob
    # SQLite's message may hold bytes of the file that are no UTF-8; what the file asks for may be too much memory.
    except (sqlite3.Error, UnicodeError, MemoryError, OverflowError) as problem:
        raise InputError(f"cannot be read: {quote(str(problem) or type(problem).__name__)}") from problem


def _restrict(database: sqlite3.Connection) -> None:
    """Nothing but reading one table: no view, trigger, function or virtual table of the image's is ever run."""
    for limit, value in (
        (sqlite3.SQLITE_LIMIT_LENGTH, SIZE_MAX), (sqlite3.SQLITE_LIMIT_SQL_LENGTH, 1 << 16),
        (sqlite3.SQLITE_LIMIT_COLUMN, 64), (sqlite3.SQLITE_LIMIT_EXPR_DEPTH, 20), (sqlite3.SQLITE_LIMIT_ATTACHED, 0),
        (sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 0), (sqlite3.SQLITE_LIMIT_WORKER_THREADS, 0),
    ):  # fmt: skip
        database.setlimit(limit, value)
    for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "query_only=ON", "cache_size=-2000"):
        database.execute(f"PRAGMA {pragma}")


def _check_table(database: sqlite3.Connection) -> None:
    """A table whose rows are what is stored: no view, no virtual table, no columns that are calculated."""
    query = "SELECT sql FROM sqlite_schema WHERE name = 'Packages' AND type = 'table' AND rootpage > 0"
    found = database.execute(query).fetchone()
    if found is None or re.match(r"CREATE TABLE '?Packages'? ?\((?!.*\bAS\b)", str(found[0]), re.I | re.S) is None:
        raise InputError("has no table of packages")


def _allowed(action: int, first: str | None, second: str | None, _database: str | None, inner: str | None) -> int:
    reading = action == sqlite3.SQLITE_READ and (first, second, inner) == ("Packages", "blob", None)
    return sqlite3.SQLITE_OK if action == sqlite3.SQLITE_SELECT or reading else sqlite3.SQLITE_DENY


def _ndb(content: Content) -> Iterator[bytes]:
    magic, version, _, pages = struct.unpack("<4sIII", read_at(content, 0, 16).ljust(16, b"\0"))
    if magic != b"RpmP" or version != 0:
        raise InputError("is no package database of rpm's")
    slots = read_at(content, 32, pages * 4096 - 32)
    if len(slots) != pages * 4096 - 32:
        raise InputError("is cut short")
    for mark, index, block, blocks in struct.iter_unpack("<4sIII", slots):
        if mark != b"Slot":
            raise InputError("has a broken slot")
        if block == 0:
            continue
        start, owner, _, size = struct.unpack("<4sIII", read_at(content, 16 * block, 16).ljust(16, b"\0"))
        header = read_at(content, 16 * block + 16, size)
        if start != b"BlbS" or owner != index or 28 + size > 16 * blocks or len(header) != size:
            raise InputError("has a slot that leads to no package")
        yield header


class _Pages:
    """A Berkeley DB file."""

    def __init__(self, content: Content) -> None:
        head = read_at(content, 0, 72)
        for self.order in "<>":
            if len(head) == 72 and struct.unpack_from(f"{self.order}I", head, 12)[0] == 0x061561:
                break
        else:
            raise InputError("is no hash of Berkeley DB's")
        self.version, self.size = struct.unpack_from(f"{self.order}II", head, 16)
        (last,) = struct.unpack_from(f"{self.order}I", head, 32)
        if not 8 <= self.version <= 10 or self.size not in (1 << bits for bits in range(9, 17)) or head[24]:
            raise InputError("is a hash of Berkeley DB's, but none that rpm writes")
        self.count = min(last + 1, content.size // self.size)
        self._content = content

    def read(self, number: int) -> bytes:
        return read_at(self._content, number * self.size, self.size)

    def word(self, page: bytes, at: int) -> int:
        return int(struct.unpack_from(f"{self.order}I", page, at)[0])

    def half(self, page: bytes, at: int) -> int:
        return int(struct.unpack_from(f"{self.order}H", page, at)[0])

    def items(self, page: bytes) -> Iterator[bytes]:
        """Keys and values by turns; each ends where the one before it starts."""
        count = self.half(page, 20)
        if 26 + 2 * count > self.size:
            raise InputError("has a page with more entries than fit")
        end = self.size
        for index in range(count):
            start = self.half(page, 26 + 2 * index)
            if not 26 + 2 * count <= start < end:
                raise InputError("has a page whose entries overlap")
            yield page[start:end]
            end = start

    def value(self, item: bytes) -> bytes:
        if item[0] == 1:
            return item[1:]
        if item[0] != 3 or len(item) != 12:
            raise InputError("has an entry of a kind that rpm does not write")
        number, size = self.word(item, 4), self.word(item, 8)
        if size > self._content.size:
            raise InputError("has a package that is larger than itself")
        found = bytearray()
        while len(found) < size:
            page = self.read(number) if 0 < number < self.count else b""
            used = self.half(page, 22) if page and page[25] == 7 else 0
            if not 0 < used <= self.size - 26:
                raise InputError("has a package on pages that are not there")
            found += page[26 : 26 + used]
            number = self.word(page, 16)
        return bytes(found[:size])


def _berkeley(content: Content) -> Iterator[bytes]:
    pages = _Pages(content)
    for number in range(1, pages.count):
        page = pages.read(number)
        if page[25] not in (2, 13):  # others hold what is too long for these, or nothing any more
            continue
        items = pages.items(page)
        for key, value in zip(items, items, strict=False):
            if key[1:] != b"\0\0\0\0":  # package 0 is the number of the next one
                yield pages.value(value)


FORMATS: Final[Mapping[str, Callable[[Content], Iterator[bytes]]]] = {
    "rpmdb.sqlite": _sqlite,
    "Packages.db": _ndb,
    "Packages": _berkeley,
}
