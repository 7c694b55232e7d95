"""What filesystem writers and readers give and take, whichever filesystem it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, Protocol, runtime_checkable

from osbuild.errors import InputError
from osbuild.tree import NAME_MAX, PATH_MAX, Content, Entry, Tree, quote


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Space that a filesystem has beyond its contents."""

    writable: bool = False  # a guest may write: a journal of a working size, inodes to spare
    size: int = 0  # bytes that the whole filesystem takes, a multiple of 4096; 0: as few as it needs
    free: int = 0  # bytes that are free at least


NO_ROOM: Final = Room()
NOTHING: Final[Mapping[int, Content]] = MappingProxyType({})


def encode_name(name: str, path: str) -> bytes:
    """The last name of a path as a directory holds it; InputError when Linux has no such names."""
    encoded = name.encode(errors="surrogateescape")
    if len(encoded) > NAME_MAX:
        raise InputError(f"{quote(path[:200])}…: a name of {len(encoded)} bytes; Linux has names of up to {NAME_MAX}")
    return encoded


def encode_target(entry: Entry, path: str, most: int = PATH_MAX) -> bytes:
    """Where a symbolic link leads; InputError when nobody could follow it."""
    target = entry.target.encode(errors="surrogateescape")
    if not 0 < len(target) <= most:
        raise InputError(f"{quote(path)}: a symbolic link to a path of {len(target)} bytes, not 1 to {most}")
    if b"\0" in target:
        raise InputError(f"{quote(path)}: a symbolic link to a path with a NUL byte")
    return target


class Plan(Protocol):
    """A filesystem laid out in full, not written yet."""

    @property
    def size(self) -> int:
        """Bytes that the filesystem takes, a multiple of 4096."""

    @property
    def uuid(self) -> str:
        """The filesystem's UUID, made from `Tree.digest()`: from everything in it, the files' bytes too."""

    @property
    def skipped(self) -> tuple[str, ...]:
        """Paths that are not in it: sockets, on which nothing listens in an image."""

    @property
    def contents(self) -> Iterable[tuple[int, Content]]:
        """Contents that lie in blocks of their own, each with its byte offset, in order; none where nobody can say."""

    def write(
        self,
        descriptor: int,
        offset: int,
        done: Callable[[int], None] | None = None,
        there: Mapping[int, Content] = NOTHING,
    ) -> None:
        """Write it at `offset` of an open file that reads as zeros there.

        done: may be told now and then, by an offset in the file, up to where its bytes are final; it never goes back.
        there: those of `contents` that the file has already, by their offsets: all of them, or none.
        """


@runtime_checkable
class Foreseen(Plan, Protocol):
    """A plan whose tree need not be gone through again when its digest is known."""

    def with_digest(self, digest: str) -> Plan:
        """The plan of the same tree with this digest; the other one must not be written any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where an inode is, as its filesystem sees it."""

    inode: int
    extents: tuple[tuple[int, int], ...] = ()  # of a file's data: byte offset in the filesystem, bytes; holes left out


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A part of a filesystem that no path names, and what its bytes are called: so that a difference has a name."""

    offset: int  # in the filesystem
    size: int
    name: str
    of: str = ""  # what each of the records is that it consists of: "inode", "group"; empty: it is one record
    record: int = 0  # bytes of one
    first: int = 0  # number of the first
    fields: tuple[tuple[str, int, int], ...] = ()  # of a record: name, offset in it, bytes; in order


@dataclass(frozen=True, slots=True, kw_only=True)
class Volume:
    """A filesystem that was read: what is in it, where, and what is wrong with it."""

    tree: Tree  # contents lie in the file that was read, and are not copied
    uuid: str
    size: int  # bytes, by its own word
    facts: Mapping[str, str]  # everything else that its superblock says, for people and for comparison: field -> value
    places: Mapping[str, Place]  # path -> where
    problems: tuple[str, ...] = field(default=())  # a sentence each
    regions: tuple[Region, ...] = ()  # in order, apart
