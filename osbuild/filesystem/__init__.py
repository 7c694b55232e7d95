"""Filesystem writers and readers: one module and one row each. A tree is planned (its exact size), then written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from osbuild.filesystem import erofs, erofs_reader, ext4, ext4_reader, xfs
from osbuild.filesystem.base import NO_ROOM, Plan, Room, Volume
from osbuild.tree import Tree


class Filesystem(Protocol):
    """What a module must have to be a row of FILESYSTEMS."""

    def plan(self, tree: Tree, *, start: int, epoch: int, dax: bool = True, room: Room = NO_ROOM) -> Plan:
        """Lay a tree out. InputError for what it cannot hold, SpecError for a wish it cannot fulfil.

        start: where the filesystem begins in the namespace that DAX maps (bytes), so that large files can be aligned.
        epoch: seconds since 1970 that stand wherever a filesystem wants to know when it was made.
        dax: files are to be mapped where they lie; without it their tails may be packed.
        """

    def mount_words(self, *, dax: bool) -> tuple[str, ...]:
        """The kernel words that mount it read-only as root (contract: Kata's root parameters)."""


class Reader(Protocol):
    """What a module must have to be a row of READERS."""

    def recognises(self, head: bytes) -> bool:
        """Whether the first 4096 bytes look like this filesystem's."""

    def read(self, descriptor: int, offset: int, size: int) -> Volume:
        """Everything in the filesystem at `offset` of an open file, of which `size` bytes are there.

        InputError when nothing can be made of it; smaller damage stands in Volume.problems.
        """


FILESYSTEMS: Final[Mapping[str, Filesystem]] = {"ext4": ext4, "erofs": erofs, "xfs": xfs}
READERS: Final[Mapping[str, Reader]] = {"ext4": ext4_reader, "erofs": erofs_reader}
__all__ = ["FILESYSTEMS", "NO_ROOM", "READERS", "Filesystem", "Plan", "Reader", "Room", "Volume"]
