"""Layers laid over each other by the OCI rules (image-spec layer.md): a stack of tar archives becomes one Tree.

Whiteouts (`.wh.NAME`) and opaque markers (`.wh..wh..opq`) act on the layers below only, whatever their place in the
archive. A directory over a directory changes its attributes and keeps what lies in it; everything else replaces.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from osbuild import tar
from osbuild.errors import InputError
from osbuild.tree import Backing, Draft, Entry, Slice, Tree, quote

WHITEOUT: Final = ".wh."
OPAQUE: Final = ".wh..wh..opq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One uncompressed layer archive in a spool, already checked against its diff_id."""

    spool: Backing
    offset: int
    size: int
    diff_id: str


def flatten(layers: Iterable[Layer], limits: tar.Limits | None = None) -> Tree:
    """What the layers, lowest first, come to. InputError names the entry and the rule it breaks."""
    draft = Draft()
    for layer in layers:
        _apply(draft, layer, limits)
    return draft.tree()


def _apply(draft: Draft, layer: Layer, limits: tar.Limits | None) -> None:
    members: dict[str, tar.Member] = {}
    gone: list[str] = []
    cleared: list[str] = []
    for member in tar.read(layer.spool, layer.offset, layer.size, limits):
        parent, _, name = member.name.rpartition("/")
        if name.startswith(WHITEOUT):
            if name == OPAQUE:
                cleared.append(parent or "/")
            elif name == WHITEOUT:
                raise InputError(f"{quote(member.name)}: a whiteout of nothing")
            else:
                gone.append(f"{parent}/{name.removeprefix(WHITEOUT)}")
            continue
        if member.name.find("/" + WHITEOUT) >= 0:
            raise InputError(f"{quote(member.name)}: lies below a whiteout")
        seen = members.get(member.name)
        if seen is not None and not (stat.S_ISDIR(seen.kind) and stat.S_ISDIR(member.kind)):
            raise InputError(f"{quote(member.name)}: stands twice in one layer")
        members[member.name] = member
    for path in cleared:
        draft.clear(path)
    for path in gone:
        draft.remove(path)
    for member in members.values():
        if member.kind:
            draft.put(member.name, _entry(member, layer.spool))
        else:
            draft.link(member.name, member.link)


def _entry(member: tar.Member, spool: Backing) -> Entry:
    if stat.S_ISREG(member.kind):
        return Entry(
            mode=member.kind | member.mode, uid=member.uid, gid=member.gid, mtime_ns=member.mtime_ns,
            xattrs=member.xattrs, content=Slice(spool, member.offset, member.size),
        )  # fmt: skip
    return Entry(
        mode=member.kind | (0o777 if stat.S_ISLNK(member.kind) else member.mode),
        uid=member.uid, gid=member.gid, mtime_ns=member.mtime_ns, xattrs=member.xattrs,
        target=member.link if stat.S_ISLNK(member.kind) else "", major=member.major, minor=member.minor,
    )  # fmt: skip
