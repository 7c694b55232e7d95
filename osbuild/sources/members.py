"""The files inside an archive that holds an image, by name: plain tar where it lies, anything else in a spool."""

from __future__ import annotations

import dataclasses
import os
import posixpath
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

from osbuild import oci, tar
from osbuild.borrowed import Borrowed
from osbuild.errors import InputError
from osbuild.sources.image import unreadable
from osbuild.tree import Backing, Slice, Spool, quote
from osbuild.uncompress import CHUNK, sniff, uncompressed

_PIPE: Final = "a pipe: docker save IMAGE | osbuilder … docker-archive:-"
_STDIN: Final = "/dev/stdin"
_LINKS: Final = 3  # looked at for one name: docker writes one link for a layer that stands twice, tar(1) hard links


def open_archive(name: str, limits: tar.Limits) -> Backing:
    """The archive's bytes, uncompressed: the file itself where possible, else a copy. `-` is standard input."""
    path = Path(name)
    if name == "-" or (name == _STDIN and not path.is_file()):
        return _from_standard_input(limits)
    where = quote(name)
    try:
        kind = path.stat().st_mode
        if stat.S_ISREG(kind):
            archive = Borrowed(path)
            if sniff(archive.read(0, 4)) == "none":
                return archive
        elif not stat.S_ISFIFO(kind):
            raise InputError(f"{where} is not a file")
        with path.open("rb") as file:
            return _copied(file, where, limits)
    except OSError as problem:
        raise unreadable(where, problem) from None


def _from_standard_input(limits: tar.Limits) -> Spool:
    where = "standard input"
    if sys.stdin is None:  # closed before we began: its number may be another file's by now
        raise InputError(f"{where} is closed", hint=_PIPE)
    try:
        kind = os.fstat(sys.stdin.fileno()).st_mode
        if not (stat.S_ISREG(kind) or stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
            raise InputError(f"{where} is not an archive", hint=_PIPE)
        archive = _copied(sys.stdin.buffer, where, limits)
    except OSError as problem:
        raise unreadable(where, problem, hint=_PIPE) from None
    if archive.size == 0:
        raise InputError(f"{where} is empty", hint=_PIPE)
    return archive


def _copied(file: IO[bytes], where: str, limits: tar.Limits) -> Spool:
    spool = Spool()
    head = file.read(CHUNK)
    for data in uncompressed(_pieces(head, file, spool), sniff(head), where, limits):
        spool.append(data)
    return spool


def _pieces(head: bytes, file: IO[bytes], spool: Spool) -> Iterator[bytes]:
    data = head
    while data:
        spool.taken += len(data)
        yield data
        data = file.read(CHUNK)


class Members:
    """The files of an archive, by name."""

    def __init__(self, backing: Backing, where: str, limits: tar.Limits) -> None:
        self._backing = backing
        self._where = where
        self.limits = limits  # for what is compressed in it: in two steps no more than in one
        if isinstance(backing, Spool) and 0 < backing.taken < backing.size:
            self.limits = dataclasses.replace(limits, ratio=max(1, limits.ratio * backing.taken // backing.size))
        self._members: dict[str, tar.Member] = {}
        for member in tar.read(backing, 0, backing.size, limits):
            if member.name in self._members and not stat.S_ISDIR(member.kind):
                raise InputError(f"{where}: {quote(member.name)} stands twice in the archive")
            self._members[member.name] = member

    def has(self, name: str) -> bool:
        """Whether anything in the archive is called that."""
        return posixpath.normpath("/" + name.lstrip("/")) in self._members

    def content(self, name: str) -> Slice:
        """The bytes of a file; InputError when there is none of that name."""
        path = posixpath.normpath("/" + name.lstrip("/"))
        for _ in range(_LINKS):
            member = self._members.get(path)
            if member is None:
                raise InputError(f"{self._where}: {quote(name)} is not in the archive")
            if stat.S_ISREG(member.kind):
                if member.pieces is not None:
                    raise InputError(f"{self._where}: {quote(name)} is stored as a sparse file, which nobody writes so")
                return Slice(self._backing, member.offset, member.size)
            if member.kind == 0:  # a hard link; the file that it is another name of
                path = member.link
            elif stat.S_ISLNK(member.kind):
                path = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.link))
        raise InputError(f"{self._where}: {quote(name)} is not a regular file in the archive")

    def document(self, name: str) -> bytes:
        """The bytes of a small file."""
        content = self.content(name)
        if content.size > oci.JSON_MAX:
            raise InputError(f"{self._where}: {quote(name)} has {content.size} bytes, more than {oci.JSON_MAX}")
        return b"".join(content.chunks())
