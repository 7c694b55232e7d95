"""Filesystem writers and readers: one module and one row each. A tree is planned (its exact size), then written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from osbuild.filesystem.base import NO_ROOM, Plan, Room, Volume
from osbuild.modules import Modules
from osbuild.tree import Tree


class Filesystem(Protocol):
    """What a module must have to be a row of FILESYSTEMS."""

    def plan(
        self, tree: Tree, *, start: int, epoch: int, dax: bool = True, room: Room = NO_ROOM, digest: str = ""
    ) -> Plan:
        """Lay a tree out. InputError for what it cannot hold, SpecError for a wish it cannot fulfil.

        start: where the filesystem begins in the namespace that DAX maps (bytes), so that large files can be aligned.
        epoch: seconds since 1970 that stand wherever a filesystem wants to know when it was made.
        dax: files are to be mapped where they lie; without it their tails may be packed.
        digest: stands for the tree's own, for which every byte is read. With another one everything lies where it
        would, nearly always: in ext4 the digest sorts the names of large directories into blocks.
        """

    def mount_words(self, *, dax: bool) -> tuple[str, ...]:
        """The kernel words that mount it read-only as root (contract: Kata's root parameters)."""


class Reader(Protocol):
    """What a module must have to be a row of READERS."""

    def read(self, descriptor: int, offset: int, size: int) -> Volume:
        """Everything in the filesystem at `offset` of an open file, of which `size` bytes are there.

        InputError when nothing can be made of it; smaller damage stands in Volume.problems.
        """


FILESYSTEMS: Final[Mapping[str, Filesystem]] = Modules({
    "ext4": "osbuild.filesystem.ext4", "erofs": "osbuild.filesystem.erofs", "xfs": "osbuild.filesystem.xfs",
})  # fmt: skip
READERS: Final[Mapping[str, Reader]] = Modules({
    "ext4": "osbuild.filesystem.ext4_reader", "erofs": "osbuild.filesystem.erofs_reader",
})  # fmt: skip
# Where in a filesystem its magic number is, and which: ext2 and ext3 share ext4's.
_MAGICS: Final[Mapping[str, tuple[int, bytes]]] = {
    "ext4": (1024 + 56, b"\x53\xef"), "erofs": (1024, b"\xe2\xe1\xf5\xe0"),
}  # fmt: skip


def recognise(head: bytes) -> str:
    """Which row of READERS a filesystem is for that begins so; empty when it is none of them."""
    return next((name for name, (at, magic) in _MAGICS.items() if head[at : at + len(magic)] == magic), "")


__all__ = ["FILESYSTEMS", "NO_ROOM", "READERS", "Filesystem", "Plan", "Reader", "Room", "Volume", "recognise"]
