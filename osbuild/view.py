"""Reading a tree as a program in the guest would: through symbolic links, by directory, from the middle of a file."""

from __future__ import annotations

import bisect
import fnmatch
from typing import Final

from osbuild.errors import InputError
from osbuild.tree import Bytes, Content, Draft, Entry, Slice, Tree, quote

TEXT_MAX: Final = 1 << 20  # bytes of a configuration file that we read
_MATCHES_MAX: Final = 1000


def read_at(content: Content, offset: int, length: int) -> bytes:
    """`length` bytes at `offset`, fewer where the content ends; nothing else of it is read."""
    length = max(0, min(length, content.size - offset))
    if isinstance(content, Bytes):
        return content.data[offset : offset + length]
    if isinstance(content, Slice):
        return content.spool.read(content.offset + offset, length)
    return _skim(content, offset, length)


def _skim(content: Content, offset: int, length: int) -> bytes:
    found = bytearray()
    at = 0
    for chunk in content.chunks():
        if at >= offset + length:
            break
        if at + len(chunk) > offset:
            found += chunk[max(0, offset - at) : offset + length - at]
        at += len(chunk)
    return bytes(found)


def lookup(draft: Draft, path: str) -> Entry | None:
    """The inode that a path leads to, through every symbolic link; None where there is none."""
    try:
        return draft.get(draft.resolve(path))
    except InputError:  # a loop
        return None


def read_text(draft: Draft, path: str) -> str | None:
    """A small text file; None when there is no regular file. What is not UTF-8 in it survives being written back."""
    entry = lookup(draft, path)
    if entry is None or not entry.is_file:
        return None
    if entry.content.size > TEXT_MAX:
        raise InputError(f"{quote(path)}: {entry.content.size} bytes; no configuration file is so large")
    return b"".join(entry.content.chunks()).decode(errors="surrogateescape")


class View:
    """Lookups in one tree that does not change meanwhile. What an image makes impossible is simply not there."""

    def __init__(self, tree: Tree) -> None:
        self._draft = tree.edit()
        self._paths = list(tree)

    def real(self, path: str) -> str:
        """Where a path leads through every symbolic link; InputError after 40 of them."""
        return self._draft.resolve(path)

    def get(self, path: str) -> Entry | None:
        """The inode that a path leads to, or None."""
        return lookup(self._draft, path)

    def link(self, path: str) -> Entry | None:
        """The inode at a path itself: a symbolic link at its end is not followed."""
        return self._draft.get(path)

    def names(self, path: str) -> list[str]:
        """What lies in a directory, in order; nothing where there is none."""
        found = self.get(path)
        if found is None or not found.is_dir:
            return []
        start = self.real(path).rstrip("/") + "/"
        names = []
        index = bisect.bisect_right(self._paths, start)  # past "/" itself, in the root
        while index < len(self._paths) and self._paths[index].startswith(start):
            path = self._paths[index]
            name = path[len(start) :]
            if "/" in name:  # something deeper: on to what follows the directory, whose own path has gone by
                above = start + name.partition("/")[0]
                index = bisect.bisect_left(self._paths, f"{above}0", index)  # "0" is what follows "/"
            else:
                names.append(name)
                index += 1
        return names

    def matches(self, pattern: str) -> list[str]:
        """Paths that a shell's pattern matches, component by component, in order; the first thousand."""
        found = ["/"]
        for part in (part for part in pattern.split("/") if part):
            if not any(sign in part for sign in "*?["):
                found = [f"{above.rstrip('/')}/{part}" for above in found]
                continue
            found = [
                f"{above.rstrip('/')}/{name}"
                for above in found
                for name in self.names(above)
                if fnmatch.fnmatchcase(name, part) and (part.startswith(".") or not name.startswith("."))
            ][:_MATCHES_MAX]
        return [path for path in found if self.get(path) is not None]

    def text(self, path: str) -> str | None:
        """A small text file; None where no regular file is. InputError when it is too large to be one."""
        return read_text(self._draft, path)
