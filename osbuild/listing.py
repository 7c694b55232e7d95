"""A tree as a document for programs, and as lines for people.

{"/etc/passwd": {"type": "file", "mode": "0644", "uid": 0, "gid": 0, "mtime": 1700000000, "size": 5, "sha256": "…"}, …}
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Iterator
from typing import Any, Final

from osbuild.tree import Content, Entry, Tree

_TYPES: Final = {
    stat.S_IFREG: "file", stat.S_IFDIR: "dir", stat.S_IFLNK: "symlink", stat.S_IFCHR: "char", stat.S_IFBLK: "block",
    stat.S_IFIFO: "fifo", stat.S_IFSOCK: "socket",
}  # fmt: skip


def entries(tree: Tree) -> dict[str, dict[str, Any]]:
    """Every path with its inode, as JSON: fields that its type does not have are left out.

    `mtime` is in seconds, with a fraction where the image has one, and null for a directory that exists only because
    something lies in it.
    """
    names = tree.names()
    digests: dict[Entry, str] = {}
    return {spell(path): _entry(entry, names[entry], digests) for path, entry in tree.items()}


def lines(tree: Tree) -> Iterator[str]:
    """Every path as `ls -l` would say it, on one line whatever its name holds."""
    for path, entry in tree.items():
        size = f"{entry.major},{entry.minor}" if entry.is_device else str(entry.content.size)
        arrow = f" -> {spell(entry.target)}" if entry.is_symlink else ""
        yield f"{stat.filemode(entry.mode)} {entry.uid:>5} {entry.gid:>5} {size:>10} {spell(path)}{arrow}"


def spell(name: str) -> str:
    """A name that is printable UTF-8 as it is; any other as `hex:` and the hex of its bytes."""
    if name.isprintable() and not name.startswith("hex:"):  # a lone surrogate is not printable either
        return name
    return "hex:" + name.encode(errors="surrogateescape").hex()


def _entry(entry: Entry, paths: list[str], digests: dict[Entry, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"type": _TYPES[stat.S_IFMT(entry.mode)]}
    if not entry.is_symlink:
        found["mode"] = f"{stat.S_IMODE(entry.mode):04o}"
    found |= {"uid": entry.uid, "gid": entry.gid, "mtime": _seconds(entry.mtime_ns)}
    if entry.is_file:
        if entry not in digests:
            digests[entry] = _sha256(entry.content)
        found |= {"size": entry.content.size, "sha256": digests[entry]}
    if entry.is_symlink:
        found["target"] = spell(entry.target)
    if entry.is_device:
        found |= {"major": entry.major, "minor": entry.minor}
    if entry.xattrs:
        found["xattrs_hex"] = {spell(name): value.hex() for name, value in sorted(entry.xattrs.items())}
    if len(paths) > 1:
        found["same_inode_as"] = sorted(map(spell, paths))
    return found


def _seconds(nanoseconds: int | None) -> float | int | None:
    if nanoseconds is None:
        return None
    whole, rest = divmod(nanoseconds, 1_000_000_000)
    return nanoseconds / 1_000_000_000 if rest else whole


def _sha256(content: Content) -> str:
    digest = hashlib.sha256()
    for chunk in content.chunks():
        digest.update(chunk)
    return digest.hexdigest()
