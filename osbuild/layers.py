"""Layers laid over each other by the OCI rules (image-spec layer.md): a stack of tar archives becomes one Tree.

Whiteouts (`.wh.NAME`) and opaque markers (`.wh..wh..opq`) act on the layers below only, whatever their place in the
archive. A directory over a directory changes its attributes and keeps what lies in it; everything else replaces.

Where the specification is silent, in the order of an archive's members and with the symbolic links of the tree so
far, as containerd, umoci and docker do. Names that start with `.wh..wh.` and are no opaque marker are what aufs kept
for itself: ignored, as they do.
"""

from __future__ import annotations

import array
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from osbuild import tar
from osbuild.errors import InputError
from osbuild.limits import BODY_COST, DIRECTORY_COST, INODE_COST, PIECE_COST, XATTR_COST, Limits, more, text_cost
from osbuild.tree import Backing, Draft, Entry, Tree, quote

WHITEOUT: Final = ".wh."
RESERVED: Final = ".wh..wh."
OPAQUE: Final = ".wh..wh..opq"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One uncompressed layer archive in a spool, already checked against its diff_id."""

    spool: Backing
    offset: int
    size: int
    diff_id: str


def flatten(layers: Iterable[Layer], limits: Limits | None = None) -> Tree:
    """What the layers, lowest first, come to. InputError names the entry and the rule it breaks."""
    limits = limits or Limits()
    draft = Draft(link_hops=limits.link_hops, depth=limits.depth, steps=limits.steps)
    account = _Account(limits)
    for layer in layers:
        account.layer(layer)
        read = _read(layer, account)
        draft.hide(read.whiteouts, read.made())
        _put(draft, read, account)
    draft.check(path_bytes=limits.path_bytes, total_bytes=limits.memory_bytes // 2)
    return draft.tree()


@dataclass(slots=True)
class _Account:
    """What the layers of one image have used up, all together."""

    limits: Limits
    entries: int = 0
    layer_bytes: int = 0
    file_bytes: int = 0
    memory: int = 0

    def layer(self, layer: Layer) -> None:
        self.layer_bytes += layer.size
        if self.layer_bytes > self.limits.image_bytes:
            raise InputError(
                f"layer {layer.diff_id}: all layers have more than {self.limits.image_bytes} bytes",
                hint=more("image_bytes"),
            )

    def member(self, member: tar.Member) -> None:
        """Count one more; InputError when that is one too many."""
        limits = self.limits
        self.entries += 1
        self.file_bytes += member.size
        self.memory += INODE_COST + text_cost(member.name.rpartition("/")[2])
        if stat.S_ISDIR(member.kind):
            self.memory += DIRECTORY_COST
        elif member.size:
            self.memory += BODY_COST + (PIECE_COST * len(member.pieces) if member.pieces else 0)
        if member.link:
            self.memory += text_cost(member.link)
        if member.xattrs:
            self.memory += sum(XATTR_COST + len(name) + len(value) for name, value in member.xattrs.items())
        if self.entries > limits.entries:
            raise InputError(
                f"{quote(member.name)}: more than {limits.entries} entries in the layers of an image",
                hint=more("entries"),
            )
        if self.file_bytes > limits.image_bytes:
            raise InputError(
                f"{quote(member.name)}: all files together have more than {limits.image_bytes} bytes",
                hint=more("image_bytes"),
            )
        if self.memory > limits.memory_bytes:
            raise InputError(
                f"{quote(member.name)}: names, inodes and attributes take more than {limits.memory_bytes} bytes",
                hint=more("memory_bytes"),
            )

    def text(self, text: str) -> None:
        self.memory += text_cost(text)

    def room(self) -> int:
        """Directories that may still be made on the way to something."""
        by_memory = (self.limits.memory_bytes - self.memory) // (INODE_COST + DIRECTORY_COST)
        return min(self.limits.entries - self.entries, by_memory)

    def made(self, directories: int) -> None:
        self.entries += directories
        self.memory += directories * (INODE_COST + DIRECTORY_COST)


class _Read:
    """A layer as it was read: what it hides, and what it puts where, in order. A hard link is its target's path.

    Paths are kept as directory and name: members of one directory share the first, and the tree keeps the second.
    """

    __slots__ = ("directories", "hashes", "names", "things", "whiteouts")

    def __init__(self) -> None:
        self.whiteouts: list[tuple[str, str]] = []  # directory, name; no name: an opaque directory
        self.directories: list[str] = []
        self.names: list[str] = []
        self.things: list[Entry | str] = []
        self.hashes = array.array("q")  # of the paths

    def add(self, path: str, thing: Entry | str) -> bool:
        """Take in one more; says whether its directory had to be kept, too."""
        directory, _, name = path.rpartition("/")
        new = not self.directories or directory != self.directories[-1]
        self.directories.append(directory if new else self.directories[-1])
        self.names.append(name)
        self.things.append(thing)
        self.hashes.append(hash(path))
        return new

    def made(self) -> set[str]:
        """The directories that this layer itself describes; only whiteouts want to know."""
        return {path for path, thing in self._paths() if _is_directory(thing)} if self.whiteouts else set()

    def check(self) -> None:
        """InputError for a path that stands twice, unless as a directory each time."""
        suspects = _repeated(self.hashes)
        self.hashes = array.array("q")
        if not suspects:
            return
        found: dict[str, bool] = {}
        for path, thing in self._paths():
            if hash(path) in suspects:
                if path in found and not (found[path] and _is_directory(thing)):
                    raise InputError(f"{quote(path)}: stands twice in one layer")
                found[path] = _is_directory(thing)

    def _paths(self) -> Iterator[tuple[str, Entry | str]]:
        for directory, name, thing in zip(self.directories, self.names, self.things, strict=True):
            yield f"{directory}/{name}", thing


def _is_directory(thing: Entry | str) -> bool:
    return isinstance(thing, Entry) and thing.is_dir


def _repeated(hashes: array.array[int]) -> set[int]:
    """Those that are there more than once. A share of them at a time: as objects they take five times the memory."""
    shares = 1 + len(hashes) // 65536
    repeated: set[int] = set()
    for share in range(shares):
        seen: set[int] = set()
        for number in hashes:
            if number % shares == share:
                (repeated if number in seen else seen).add(number)
    return repeated


def _read(layer: Layer, account: _Account) -> _Read:
    found = _Read()
    for member in tar.read(layer.spool, layer.offset, layer.size, account.limits):
        account.member(member)
        if "/.wh." in member.name:
            account.text(member.name)
            _read_whiteout(member, found)
        elif found.add(member.name, _entry(member, layer.spool) if member.kind else member.link):
            account.text(member.name)
    found.check()
    return found


def _read_whiteout(member: tar.Member, found: _Read) -> None:
    """Names with the whiteout prefix somewhere: none of them gets into a tree."""
    here = quote(member.name)
    above, _, name = member.name.rpartition("/")
    hidden = name.removeprefix(WHITEOUT)
    if name != OPAQUE and f"/{RESERVED}" in member.name:
        return
    if f"/{WHITEOUT}" in above:
        raise InputError(f"{here}: lies below a whiteout")
    if name != OPAQUE and hidden in ("", ".", ".."):
        raise InputError(f"{here}: a whiteout of nothing")
    # Hard links to each other are how old docker wrote the whiteouts of aufs.
    if member.size or not (stat.S_ISREG(member.kind) or member.kind == 0):
        raise InputError(f"{here}: a whiteout that is no empty regular file")
    found.whiteouts.append((above, "" if name == OPAQUE else hidden))


def _put(draft: Draft, read: _Read, account: _Account) -> None:
    """Place everything, in the order of the archive; what has been placed is let go of."""
    draft.room = room = account.room()
    directories, names, things = read.directories, read.names, read.things
    for part in (directories, names, things):
        part.reverse()
    while names:
        directory, name, thing = directories.pop(), names.pop(), things.pop()
        if isinstance(thing, Entry):
            draft.put_into(directory, name, thing)
        else:
            draft.link(f"{directory}/{name}", thing)
    account.made(room - draft.room)


def _entry(member: tar.Member, spool: Backing) -> Entry:
    if stat.S_ISREG(member.kind):
        return Entry(
            mode=member.kind | member.mode, uid=member.uid, gid=member.gid, mtime_ns=member.mtime_ns,
            xattrs=member.xattrs, content=tar.content(member, spool),
        )  # fmt: skip
    return Entry(
        mode=member.kind | (0o777 if stat.S_ISLNK(member.kind) else member.mode),
        uid=member.uid, gid=member.gid, mtime_ns=member.mtime_ns, xattrs=member.xattrs,
        target=member.link if stat.S_ISLNK(member.kind) else "", major=member.major, minor=member.minor,
    )  # fmt: skip
