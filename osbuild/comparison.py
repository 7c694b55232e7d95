"""Where two files differ, by names: partition, inode, path and field; offsets only for what nothing else explains.

First what can be said of the file and its headers, then superblocks, then the trees, then where things lie, then bytes
that are in no file. Checksums follow from what they are over, so they are named only when nothing else differs.
"""

from __future__ import annotations

import bisect
import itertools
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from osbuild import kernel_sections
from osbuild.content import Sparse
from osbuild.disk_layout import DiskLayout, Mbr, Partition
from osbuild.filesystem import Volume
from osbuild.filesystem.base import Place
from osbuild.landmarks import DERIVED, Landmarks, Spot
from osbuild.subject import QCOW2, Filesystem, Subject, called, open_subject
from osbuild.tree import Backing, Content, Entry, Slice, Tree, quote

MOST: Final = 20
_CHUNK: Final = 1 << 20
_BLOCK: Final = 4096
# Of an inode, what the tree or its place have said before: not to be said again as bytes.
_SAID_BEFORE: Final = frozenset(
    (
        "mode", "uid", "gid", "uid_high", "gid_high", "size", "size_high", "mtime", "mtime_extra", "links_count",
        "block", "blocks_lo", "blocks_high", "file_acl", "file_acl_high", "attributes inside", "",
    )
)  # fmt: skip
_ONLY: Final = ("only in the first", "only in the second")
_SECOND: Final = 1_000_000_000
_NUMBER: Final = 8  # bytes of the longest number
_TEXT: Final = 100  # characters of a value that are shown


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not the same."""

    where: str  # "partition 1 ext4", "MBR 1"; empty for the file
    subject: str = ""  # "inode 17 '/etc/passwd'", "superblock"
    field: str
    values: tuple[str, str] = ("", "")

    def __str__(self) -> str:
        front = ": ".join(part for part in (self.where, self.subject, self.field) if part)
        first, second = self.values
        return f"{front}: {first} and {second}" if first or second else front


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What came of comparing two files."""

    first: Path
    second: Path
    same: bool
    differences: tuple[Difference, ...]
    more: bool  # there are differences beyond those
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "first": str(self.first), "second": str(self.second), "same": self.same,
            "differences": [asdict(each) | {"text": str(each)} for each in self.differences],
            "more": self.more, "notes": list(self.notes),
        }  # fmt: skip


def compare(first: Path, second: Path, most: int = MOST) -> Comparison:
    """The first differences between two files, at most so many. InputError for what nothing here knows."""
    one, two = open_subject(first), open_subject(second)
    notes = [
        f"{name}: {problem}"
        for name, subject in (("the first", one), ("the second", two))
        for problem in _problems(subject)[:3]
    ]
    notes += [
        f"{name} is a qcow2 image, and nobody looked inside: qemu-img convert -O raw makes what can be read"
        for name, subject in (("the first", one), ("the second", two))
        if subject.kind == QCOW2
    ]
    if one.kind != two.kind and one.tree is not None and two.tree is not None:
        notes.append("files of different kinds: only their trees are compared, and what an initramfs holds of them")
        found = _trees("", one.tree, two.tree, {}, {}, plain="initramfs" in (one.kind, two.kind))
    elif _same_bytes(one.backing, two.backing):
        return Comparison(first=first, second=second, same=True, differences=(), more=False, notes=tuple(notes))
    else:
        found = _Pair(one, two).differences()
    listed = tuple(itertools.islice(found, most + 1))
    return Comparison(
        first=first, second=second, same=not listed, differences=listed[:most], more=len(listed) > most,
        notes=tuple(notes),
    )  # fmt: skip


def _problems(subject: Subject) -> Sequence[str]:
    found = list(subject.problems)
    for filesystem in subject.filesystems:
        found += filesystem.volume.problems
    return found + list(subject.archive.problems if subject.archive else ())


def _same_bytes(one: Backing, two: Backing) -> bool:
    return one.size == two.size and next(_chunks(one, two, 0, one.size), None) is None


def _chunks(one: Backing, two: Backing, start: int, end: int, shift: int = 0) -> Iterator[tuple[int, bytes, bytes]]:
    """Offset and bytes of every block in which two files differ; what they have in common lies `shift` further on."""
    for at in range(start, end, _CHUNK):
        length = min(_CHUNK, end - at)
        first, second = one.read(at, length), two.read(at + shift, length)
        if first == second:
            continue
        for inner in range(0, length, _BLOCK):
            left, right = first[inner : inner + _BLOCK], second[inner : inner + _BLOCK]
            if left != right:
                yield at + inner, left, right


class _Pair:
    """Two files of one kind that are not the same."""

    def __init__(self, one: Subject, two: Subject) -> None:
        self._one = one
        self._two = two
        self._said: dict[tuple[str, str], set[str]] = {}  # (where, subject) of what was told -> fields
        self._count = 0

    def differences(self) -> Iterator[Difference]:
        """All of them, the telling ones first."""
        for found in self._named():
            self._said.setdefault((found.where, found.subject), set()).add(found.field)
            self._count += 1
            yield found
        for found in self._rest():
            self._count += 1
            yield found
        if not self._count:  # everything that differs follows from something else: then that is it
            yield from self._first_byte()

    def _named(self) -> Iterator[Difference]:
        one, two = self._one, self._two
        if one.kind != two.kind:
            yield Difference(where="", field="kind", values=(one.kind, two.kind))
        if one.virtual_size != two.virtual_size and one.kind == two.kind:
            values = (str(one.virtual_size), str(two.virtual_size))
            yield Difference(where="", field="size of the disk", values=values)
        if one.backing.size != two.backing.size and one.archive is None:
            yield Difference(where="", field="size", values=(str(one.backing.size), str(two.backing.size)))
        if one.layout is not None and two.layout is not None:
            yield from _headers(one.layout, two.layout)
        if one.kernel is not None and two.kernel is not None:
            for field in ("format", "arch", "release"):
                yield from _unequal("", "kernel", field, getattr(one.kernel, field), getattr(two.kernel, field))
            for name, *sizes in kernel_sections.unequal(one.backing, two.backing):
                yield from _unequal("", "kernel", f"section {quote(name)}", *sizes)
        if one.archive is not None and two.archive is not None:
            yield from _parts(one, two)
            yield from _trees("", one.archive.tree, two.archive.tree, {}, {}, plain=False)
        for first, second in zip(one.filesystems, two.filesystems, strict=False):
            yield from _volumes(first, second)
        if one.layout is not None and two.layout is not None:
            yield from _signatures(one.layout, two.layout)

    def _rest(self) -> Iterator[Difference]:
        """Bytes that differ and belong to nothing that was named."""
        one, two = self._one, self._two
        if one.layout is None or two.layout is None:
            return
        names = Landmarks(one), Landmarks(two)
        told: set[tuple[str, str, str]] = set()
        waiting: list[Difference] = []  # what follows from something else
        for start, end, shift in _counterparts(one.layout, two.layout):
            for at, first, second in _chunks(one.backing, two.backing, start, end, shift):
                for offset, spot in _spots(names, at, first, second, shift):
                    key = (spot.where, spot.subject, spot.field)
                    if key in told or self._is_explained(spot):
                        continue
                    told.add(key)
                    if spot.follows:
                        waiting.append(self._told(spot, offset, shift))
                        continue
                    self._count += 1
                    yield self._told(spot, offset, shift)
        if not self._count:
            yield from waiting
            self._count += len(waiting)

    def _is_explained(self, spot: Spot) -> bool:
        fields = self._said.get((spot.where, spot.subject))
        if fields is None:
            return not spot.subject and any(where == spot.where for where, _ in self._said)
        if spot.subject == "superblock":
            return spot.field in fields
        return spot.field in _SAID_BEFORE or not fields.isdisjoint(_ONLY)

    def _told(self, spot: Spot, offset: int, shift: int) -> Difference:
        size = spot.end - spot.start
        if not spot.field or size > 2 * _NUMBER:
            place = f"offset {offset} of the file"
            if shift:
                place = f"offset {offset} of the first file, {offset + shift} of the second"
            words = f"{spot.field or 'bytes'} differ{'s' * bool(spot.field)} at {place}"
            return Difference(where=spot.where, subject=spot.subject, field=words)
        first, second = self._one.backing.read(spot.start, size), self._two.backing.read(spot.start + shift, size)
        values = (_spelled(first), _spelled(second))
        return Difference(where=spot.where, subject=spot.subject, field=spot.field, values=values)

    def _first_byte(self) -> Iterator[Difference]:
        one, two = self._one.backing, self._two.backing
        at, first, second = next(_chunks(one, two, 0, min(one.size, two.size)), (0, b"", b""))
        place = next((index for index, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]), 0)
        yield Difference(where="", field=f"bytes differ first at offset {at + place} of the file")


def _counterparts(one: DiskLayout, two: DiskLayout) -> Iterator[tuple[int, int, int]]:
    """(start, end, shift): bytes of the first file, and how much further on in the second their counterparts lie.

    Partitions are held against each other wherever each begins, unless what is in them is of different kinds; what is
    between two partitions, against the same gap in the other file.
    """
    ends = 0, 0
    for first, second in _paired(one, two):
        # Headers in a gap have been compared by their fields already; here it is about the bytes around them.
        yield ends[0], min(first.start, ends[0] + second.start - ends[1]), ends[1] - ends[0]
        if first.kind == second.kind:
            yield first.start, first.start + min(first.size, second.size), second.start - first.start
        ends = first.start + first.size, second.start + second.size
    yield ends[0], min(one.size, ends[0] + two.size - ends[1]), ends[1] - ends[0]


def _paired(one: DiskLayout, two: DiskLayout) -> Iterator[tuple[Partition, Partition]]:
    """The partitions that both have, in the order in which they lie."""
    others = {part.number: part for part in two.partitions}
    ends = 0, 0
    for part in sorted(one.partitions, key=lambda part: part.start):
        other = others.get(part.number)
        if other is not None and part.start >= ends[0] and other.start >= ends[1]:
            yield part, other
            ends = part.start + part.size, other.start + other.size


def _spelled(data: bytes) -> str:
    """A field of the filesystem's own: a number, or the hex of what is too long for one."""
    return str(int.from_bytes(data, "little")) if len(data) <= _NUMBER else data.hex()


def _unequal(where: str, subject: str, field: str, first: object, second: object) -> Iterator[Difference]:
    if first != second:
        values = (_short(str(first)), _short(str(second)))
        yield Difference(where=where, subject=subject, field=field, values=values)


# Headers


def _headers(one: DiskLayout, two: DiskLayout) -> Iterator[Difference]:
    yield from _mbrs("MBR 1", one.outer, two.outer)
    first, second = dict(one.pfn.fields if one.pfn else ()), dict(two.pfn.fields if two.pfn else ())
    if bool(first) != bool(second):
        yield _only("nd_pfn superblock", "", bool(first))
    else:
        fields = [name for name in first if first[name] != second[name]]
        for name in fields:
            if name != "checksum" or fields == ["checksum"]:
                yield from _unequal("nd_pfn superblock", "", name, first[name], second[name])
    yield from _mbrs("MBR 2", one.inner, two.inner)
    kinds = [{part.number: part.kind or "nothing known" for part in layout.partitions} for layout in (one, two)]
    for number in sorted(kinds[0].keys() & kinds[1].keys()):
        yield from _unequal(f"partition {number}", "", "holds", kinds[0][number], kinds[1][number])


def _mbrs(where: str, one: Mbr | None, two: Mbr | None) -> Iterator[Difference]:
    if one is None or two is None:
        if one is not two:
            yield _only(where, "", one is not None)
        return
    first = {slot.number: slot for slot in one.slots}
    second = {slot.number: slot for slot in two.slots}
    for number in sorted(first.keys() | second.keys()):
        subject = f"partition {number}"
        if number not in first or number not in second:
            yield _only(where, subject, number in first)
            continue
        for field in ("boot", "type", "start", "size"):
            yield from _unequal(where, subject, field, getattr(first[number], field), getattr(second[number], field))


def _signatures(one: DiskLayout, two: DiskLayout) -> Iterator[Difference]:
    """They come from the filesystem's UUID, so they say nothing new: last."""
    for where, first, second in (("MBR 1", one.outer, two.outer), ("MBR 2", one.inner, two.inner)):
        if first is not None and second is not None:
            yield from _unequal(where, "", "disk signature", first.signature, second.signature)


def _only(where: str, subject: str, first: bool) -> Difference:
    return Difference(where=where, subject=subject, field=_ONLY[not first])


def _parts(one: Subject, two: Subject) -> Iterator[Difference]:
    assert one.archive is not None
    assert two.archive is not None
    first, second = one.archive.parts, two.archive.parts
    yield from _unequal("", "", "archives in a row", len(first), len(second))
    for number, (left, right) in enumerate(zip(first, second, strict=False), start=1):
        yield from _unequal(f"archive {number}", "", "compression", left.compression, right.compression)


# Trees


def _volumes(one: Filesystem, two: Filesystem) -> Iterator[Difference]:
    where = called(one.partition)
    first, second = one.volume, two.volume
    same_kind = one.partition.kind == two.partition.kind
    yield from _trees(where, first.tree, second.tree, first.places, second.places, plain=False)
    if same_kind:
        yield from _unequal(where, "superblock", "uuid", first.uuid, second.uuid)
        for name in dict.fromkeys([*first.facts, *second.facts]):
            if name != "uuid" and not any(word in name for word in DERIVED):
                values = [volume.facts.get(name, "none") for volume in (first, second)]
                yield from _unequal(where, "superblock", name, *values)
        yield from _places(where, first, second)


def _trees(
    where: str, one: Tree, two: Tree, places: Mapping[str, Place], others: Mapping[str, Place], *, plain: bool
) -> Iterator[Difference]:
    """Paths in their order; the fields of an inode under the first of its names. `plain`: as far as newc goes."""
    names = [_first_names(one), _first_names(two)]
    for path in sorted(one.keys() | two.keys()):
        subject = _inode(path, places, others)
        if path not in one or path not in two:
            entry = one.get(path) or two.get(path)
            if not (plain and entry is not None and stat.S_ISSOCK(entry.mode)):
                yield _only(where, subject, path in one)
            continue
        first, second = names[0][path], names[1][path]
        if first != second:
            yield from _unequal(where, subject, "same inode as", _other(first, path), _other(second, path))
        if first == path or second == path:
            yield from _entries(where, subject, one[path], two[path], plain=plain)


def _first_names(tree: Tree) -> dict[str, str]:
    first: dict[Entry, str] = {}
    return {path: first.setdefault(entry, path) for path, entry in tree.items()}


def _other(first: str, path: str) -> str:
    return "none" if first == path else quote(first)


def _inode(path: str, places: Mapping[str, Place], others: Mapping[str, Place]) -> str:
    place = places.get(path) or others.get(path)
    return f"inode {place.inode} {quote(path)}" if place else quote(path)


def _entries(where: str, subject: str, one: Entry, two: Entry, *, plain: bool) -> Iterator[Difference]:
    if stat.S_IFMT(one.mode) != stat.S_IFMT(two.mode):
        yield from _unequal(where, subject, "type", stat.filemode(one.mode)[0], stat.filemode(two.mode)[0])
        return
    yield from _unequal(where, subject, "mode", f"{one.mode & 0o7777:04o}", f"{two.mode & 0o7777:04o}")
    for field in ("uid", "gid", "major", "minor"):
        yield from _unequal(where, subject, field, getattr(one, field), getattr(two, field))
    yield from _unequal(where, subject, "target", quote(one.target), quote(two.target))
    yield from _unequal(where, subject, "mtime", *(_time(entry.mtime_ns, plain=plain) for entry in (one, two)))
    for name in sorted(() if plain else one.xattrs.keys() | two.xattrs.keys()):
        values = [entry.xattrs[name].hex() if name in entry.xattrs else "none" for entry in (one, two)]
        yield from _unequal(where, subject, f"attribute {quote(name)}", *values)
    if one.content.size != two.content.size:
        yield from _unequal(where, subject, "size", one.content.size, two.content.size)
    at = first_difference(one.content, two.content)
    if at >= 0:
        yield Difference(where=where, subject=subject, field=f"bytes differ first at offset {at} of the file")


def _time(nanoseconds: int | None, *, plain: bool) -> str:
    if nanoseconds is None:
        return "none"
    seconds, rest = divmod(nanoseconds, _SECOND)
    if plain:
        return str(min(max(seconds, 0), (1 << 32) - 1))
    return f"{seconds}.{rest:09}" if rest else str(seconds)


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}… ({len(text)} characters)"


def first_difference(one: Content, two: Content) -> int:
    """The first byte in which two contents differ as far as both go; -1 when there is none."""
    if one == two:
        return -1
    end = min(one.size, two.size)
    at = 0
    # Holes that both have need not be read: what is hole in both is the same.
    for start, stop in _stretches(one, two, end):
        for at in range(start, stop, _CHUNK):
            length = min(_CHUNK, stop - at)
            left, right = _read(one, at, length), _read(two, at, length)
            if left != right:
                return at + next(
                    index for index, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1]
                )
    return -1


def _stretches(one: Content, two: Content, end: int) -> Iterator[tuple[int, int]]:
    """Where at least one of them has bytes, in order and apart."""
    spans: list[tuple[int, int]] = []
    for content in (one, two):
        if isinstance(content, Sparse):
            spans += [(at, at + size) for at, _, size in content.pieces]
        else:
            spans.append((0, content.size))
    done = 0
    for start, stop in sorted(spans):
        start, stop = max(start, done), min(stop, end)
        if start < stop:
            yield start, stop
            done = stop


def _read(content: Content, at: int, length: int) -> bytes:
    """Bytes of a content, zeros for holes and for what is no longer there."""
    if isinstance(content, Slice):
        return content.spool.read(content.offset + at, length).ljust(length, b"\0")
    if isinstance(content, Sparse):
        made = bytearray(length)
        first = bisect.bisect_left(content.pieces, at, key=lambda piece: piece[0] + piece[2])
        for start, source, size in content.pieces[first:]:
            if start >= at + length:
                break
            low, high = max(start, at), min(start + size, at + length)
            if low < high:
                data = content.spool.read(source + low - start, high - low)
                made[low - at : low - at + len(data)] = data
        return bytes(made)
    return b"".join(content.chunks())[at : at + length].ljust(length, b"\0")


def _places(where: str, one: Volume, two: Volume) -> Iterator[Difference]:
    for path, place in one.places.items():
        other = two.places.get(path)
        if other is None or other == place:
            continue
        subject = _inode(path, one.places, two.places)
        yield from _unequal(where, subject, "inode", place.inode, other.inode)
        if place.extents != other.extents:
            yield from _unequal(where, subject, "lies at", _extents(place), _extents(other))


def _extents(place: Place) -> str:
    shown = ", ".join(f"{at}+{size}" for at, size in place.extents[:3])
    return (shown + (", …" if len(place.extents) > 3 else "")) or "nowhere"


def _spots(
    names: tuple[Landmarks, Landmarks], at: int, first: bytes, second: bytes, shift: int
) -> Iterator[tuple[int, Spot]]:
    """Offset and name of everything that has a differing byte in one block; offsets are those of the first file."""
    index, end = 0, min(len(first), len(second))
    while index < end:
        if first[index] == second[index]:
            index += 1
            continue
        spot = names[0].name(at + index)
        if spot.vague:
            other = names[1].name(at + index + shift)
            if not other.vague:
                spot = replace(other, start=other.start - shift, end=min(spot.end, other.end - shift))
        yield at + index, spot
        index = max(index + 1, spot.end - at)


def lines(found: Comparison) -> Iterator[str]:
    """For people."""
    yield from found.notes
    if found.same:
        yield "the same"
    yield from map(str, found.differences)
    if found.more:
        yield f"… and more: --most {2 * len(found.differences)} names more of them"
