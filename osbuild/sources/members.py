"""The files inside an archive that holds an image, by name: plain tar where it lies, anything else in a spool."""

from __future__ import annotations

import contextlib
import itertools
import posixpath
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from osbuild import oci, tar
from osbuild.borrowed import Borrowed
from osbuild.errors import InputError
from osbuild.tree import Backing, Slice, Spool, quote
from osbuild.uncompress import CHUNK, sniff, uncompressed

_LINKS: Final = 2  # followed for one name: one is what docker writes for a layer that stands twice


def open_archive(name: str, limits: tar.Limits) -> Backing:
    """The archive's bytes, uncompressed: the file itself where possible, else a copy. `-` is standard input."""
    path = Path("/dev/stdin" if name == "-" else name)
    where = quote(name)
    try:
        kind = path.stat().st_mode
        if stat.S_ISREG(kind) and name != "-":
            archive = Borrowed(path)
            if sniff(archive.read(0, 4)) == "none":
                return archive
        elif not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind)):
            raise InputError(f"{where} is not a file")
        return _copied(path, where, limits)
    except OSError as problem:
        raise InputError(f"cannot read {where}: {problem.strerror or problem}") from None


def _copied(path: Path, where: str, limits: tar.Limits) -> Spool:
    spool = Spool()
    with _reading(path) as file:
        head = file.read(CHUNK)
        pieces = itertools.chain([head], iter(lambda: file.read(CHUNK), b""))
        for data in uncompressed(pieces, sniff(head), where, limits):
            spool.append(data)
    return spool


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[IO[bytes]]:
    if str(path) == "/dev/stdin":
        yield sys.stdin.buffer
        return
    with path.open("rb") as file:
        yield file


class Members:
    """The files of an archive, by name."""

    def __init__(self, backing: Backing, where: str, limits: tar.Limits) -> None:
        self._backing = backing
        self._where = where
        self._members: dict[str, tar.Member] = {}
        for member in tar.read(backing, 0, backing.size, limits):
            if member.name in self._members and not stat.S_ISDIR(member.kind):
                raise InputError(f"{where}: {quote(member.name)} stands twice in the archive")
            self._members[member.name] = member

    def content(self, name: str) -> Slice:
        """The bytes of a file; InputError when there is none of that name."""
        path = posixpath.normpath("/" + name.lstrip("/"))
        for _ in range(_LINKS):
            member = self._members.get(path)
            if member is None:
                raise InputError(f"{self._where}: {quote(name)} is not in the archive")
            if stat.S_ISREG(member.kind):
                return Slice(self._backing, member.offset, member.size)
            if stat.S_ISLNK(member.kind):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.link))
        raise InputError(f"{self._where}: {quote(name)} is not a regular file in the archive")

    def document(self, name: str) -> bytes:
        """The bytes of a small file."""
        content = self.content(name)
        if content.size > oci.JSON_MAX:
            raise InputError(f"{self._where}: {quote(name)} has {content.size} bytes, more than {oci.JSON_MAX}")
        return b"".join(content.chunks())
