"""What filesystem writers and readers give and take, whichever filesystem it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from osbuild.tree import Tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Space that a filesystem has beyond its contents."""

    writable: bool = False  # a guest may write: a journal of a working size, inodes to spare
    size: int = 0  # bytes that the whole filesystem takes, a multiple of 4096; 0: as few as it needs
    free: int = 0  # bytes that are free at least


NO_ROOM: Final = Room()


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

    def write(self, descriptor: int, offset: int) -> None:
        """Write it at `offset` of an open file that reads as zeros there."""


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
