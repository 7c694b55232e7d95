"""What a byte of an image is called: a header's, a file's, a field's of the filesystem, or nobody's."""

from __future__ import annotations

import bisect
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from osbuild.disk_layout import PFN_AT, DiskLayout
from osbuild.filesystem.base import Region
from osbuild.nvdimm_image import SECTOR
from osbuild.subject import Filesystem, Subject, called
from osbuild.tree import quote

_BLOCK: Final = 4096  # of a filesystem, at most
DERIVED: Final = ("checksum", "csum")  # in the names of fields that follow from others


@dataclass(frozen=True, slots=True, kw_only=True)
class Spot:
    """What some bytes of an image are called."""

    start: int
    end: int
    where: str
    subject: str = ""
    field: str = ""
    follows: bool = False  # they differ because something else does
    vague: bool = False  # in this file nobody uses them


class Landmarks:
    """Finds what a byte of an image is called."""

    def __init__(self, subject: Subject) -> None:
        assert subject.layout is not None
        self._spans = list(_fixed(subject.layout))  # headers, and the bytes of files
        self._regions: list[tuple[Spot, Region]] = []
        self._paths: dict[str, dict[int, str]] = {}
        self._numbers: dict[str, list[int]] = {}
        self._directories: set[str] = set()
        for filesystem in subject.filesystems:
            self._add(filesystem)
        self._spans.sort(key=lambda spot: spot.start)
        self._regions.sort(key=lambda pair: pair[0].start)
        self._partitions = [
            Spot(start=part.start, end=part.start + part.size, where=called(part)) for part in subject.layout.partitions
        ]  # fmt: skip

    def _add(self, filesystem: Filesystem) -> None:
        where, start, volume = called(filesystem.partition), filesystem.partition.start, filesystem.volume
        numbers: dict[int, str] = {}
        self._paths[where] = numbers
        for path, place in volume.places.items():
            if place.inode in numbers:
                continue
            numbers[place.inode] = path
            is_dir = volume.tree[path].is_dir
            if is_dir:
                self._directories.add(path)
            for offset, size in place.extents:
                spot = Spot(
                    start=start + offset, end=start + offset + size, where=where,
                    subject=f"inode {place.inode} {quote(path)}", follows=is_dir,
                )  # fmt: skip
                self._spans.append(spot)
        self._numbers[where] = sorted(numbers)
        for region in volume.regions:
            at = start + region.offset
            spot = Spot(
                start=at,
                end=at + region.size,
                where=where,
                subject=region.name,
                follows="bitmap" in region.name or region.name == "journal",
            )
            self._regions.append((spot, region))

    def name(self, at: int) -> Spot:
        """What the byte at an offset is called."""
        # Small files may lie among the inodes: what is in a file goes first.
        index = bisect.bisect_right(self._spans, at, key=lambda spot: spot.start)
        if index and self._spans[index - 1].end > at:
            return self._spans[index - 1]
        end = self._spans[index].start if index < len(self._spans) else sys.maxsize
        index = bisect.bisect_right(self._regions, at, key=lambda pair: pair[0].start)
        if index and self._regions[index - 1][0].end > at:
            return self._in_region(*self._regions[index - 1], at, end)
        end = min(end, self._regions[index][0].start if index < len(self._regions) else end)
        home = next((part for part in self._partitions if part.start <= at < part.end), None)
        if home is None:
            return Spot(start=at, end=end, where="outside the partitions")
        end = min(end, home.end)
        last = bisect.bisect_right(self._spans, at, key=lambda spot: spot.start) - 1
        before = self._spans[last] if last >= 0 else None
        if before is not None and at // _BLOCK == (before.end - 1) // _BLOCK:
            end = min(end, at - at % _BLOCK + _BLOCK)
            subject = f"the rest of the last block of {before.subject}"
            return Spot(start=before.end, end=end, where=home.where, subject=subject)
        return Spot(start=at, end=end, where=home.where, subject="what nothing uses", vague=True)

    def _in_region(self, spot: Spot, region: Region, at: int, end: int) -> Spot:
        start, subject, follows, path = spot.start, spot.subject, spot.follows, "?"
        end = min(end, spot.end)
        if region.of and region.record:
            number = region.first + (at - start) // region.record
            start += (number - region.first) * region.record
            end = min(end, start + region.record)
            is_inode = region.of == "inode"
            subject = f"{region.of} {number}"
            if is_inode:
                path, subject = self._inode(spot.where, number)
            follows = not is_inode
        for name, offset, size in region.fields:
            if start + offset <= at < start + offset + size:
                derived = any(word in name for word in DERIVED)
                return Spot(
                    start=start + offset, end=min(start + offset + size, end), where=spot.where, subject=subject,
                    field=name, follows=follows or derived, vague=not path,
                )  # fmt: skip
        follows = follows or path in self._directories
        return Spot(start=start, end=end, where=spot.where, subject=subject, follows=follows, vague=not path)

    def _inode(self, where: str, number: int) -> tuple[str, str]:
        """An inode's path, empty for one without, and its name; erofs counts in slots, of which it may take several."""
        numbers = self._numbers[where]
        index = bisect.bisect_right(numbers, number) - 1
        if index >= 0 and (numbers[index] == number or where.endswith("erofs")):
            path = self._paths[where][numbers[index]]
            return path, f"inode {numbers[index]} {quote(path)}"
        return "", f"inode {number}"


def _fixed(layout: DiskLayout) -> Iterator[Spot]:
    """What is no part of a filesystem."""
    for number, mbr in enumerate((layout.outer, layout.inner), start=1):
        if mbr is not None:
            yield Spot(start=mbr.at, end=mbr.at + SECTOR, where=f"MBR {number}")
    if layout.pfn is not None:
        yield Spot(start=PFN_AT, end=PFN_AT + 4096, where="nd_pfn superblock")
    for part in layout.partitions:
        if part.kind == "hash tree":
            yield Spot(start=part.start, end=part.start + part.size, where=called(part), follows=True)
