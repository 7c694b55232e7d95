"""A tree whose contents lie in one file, as bytes to keep and read back: what makes an unchanged archive quick.

{"inodes": [[mode, uid, gid, mtime_ns, {xattr: hex}, target, major, minor, offset, size], …],
 "paths": [[path, number of its inode], …]}

Everything is JSON; names that are not UTF-8 are kept as lone surrogates.
"""

from __future__ import annotations

import json
from typing import Any

from osbuild.tree import EMPTY, Backing, Content, Entry, Slice, Tree


def dump(tree: Tree, backing: Backing) -> bytes | None:
    """The tree as bytes; None when a content lies elsewhere."""
    inodes: list[list[Any]] = []
    numbers: dict[Entry, int] = {}
    paths = []
    for path, entry in tree.items():
        number = numbers.get(entry)
        if number is None:
            number = numbers[entry] = len(inodes)
            place = _place(entry.content, backing)
            if place is None:
                return None
            xattrs = {name: value.hex() for name, value in entry.xattrs.items()}
            inodes.append(
                [
                    entry.mode,
                    entry.uid,
                    entry.gid,
                    entry.mtime_ns,
                    xattrs,
                    entry.target,
                    entry.major,
                    entry.minor,
                    *place,
                ]
            )
        paths.append([path, number])
    return json.dumps({"inodes": inodes, "paths": paths}, separators=(",", ":")).encode()


def load(data: bytes, backing: Backing) -> Tree:
    """The tree again; `data` must be what `dump` gave."""
    document = json.loads(data)
    entries = [
        Entry(
            mode=mode, uid=uid, gid=gid, mtime_ns=mtime_ns, target=target, major=major, minor=minor,
            xattrs={name: bytes.fromhex(value) for name, value in xattrs.items()},
            content=Slice(backing, offset, size) if size else EMPTY,
        )
        for mode, uid, gid, mtime_ns, xattrs, target, major, minor, offset, size in document["inodes"]
    ]  # fmt: skip
    return Tree({path: entries[number] for path, number in document["paths"]})


def _place(content: Content, backing: Backing) -> tuple[int, int] | None:
    if content.size == 0:
        return 0, 0
    if isinstance(content, Slice) and content.spool is backing:
        return content.offset, content.size
    return None
