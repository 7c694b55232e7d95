"""Filesystem writers: one module and one row each. A tree is planned (its exact size), then written in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from osbuild.filesystem import ext4
from osbuild.tree import Tree


class Plan(Protocol):
    """A filesystem laid out in full, not written yet."""

    @property
    def size(self) -> int:
        """Bytes that the filesystem takes, a multiple of 4096."""

    @property
    def uuid(self) -> str:
        """The filesystem's UUID, made from all names, owners, times and sizes in it (not from the files' bytes)."""

    def write(self, descriptor: int, offset: int) -> None:
        """Write it at `offset` of an open file that reads as zeros there."""


class Filesystem(Protocol):
    """What a module must have to be a row."""

    def plan(self, tree: Tree, *, start: int, epoch: int) -> Plan:
        """Lay a tree out.

        start: where the filesystem begins in the namespace that DAX maps (bytes), so that large files can be aligned.
        epoch: seconds since 1970 that stand wherever a filesystem wants to know when it was made.
        """

    def mount_words(self, *, dax: bool) -> tuple[str, ...]:
        """The kernel words that mount it read-only as root (contract: Kata's root parameters)."""


FILESYSTEMS: Final[Mapping[str, Filesystem]] = {"ext4": ext4}
