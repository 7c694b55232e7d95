"""The root is mapped with DAX: not by the word of its mount options, but by what that does.

A file that lies on a boundary of 2 MiB is mapped by entries of 2 MiB, a fault each; what is read of the root leaves
the guest's page cache as it was; and the device cannot be written, whatever a container is given.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from osbuild.artifacts import DiskImage
from osbuild.checks import mapped as is_mapped
from osbuild.checks.base import Session
from osbuild.container import MOUNTS
from osbuild.content import Content, Sparse
from osbuild.findings import NotHere, Unclear, Wrong
from osbuild.probe import Probe, Refused
from osbuild.report import tail
from osbuild.tree import Tree, quote

HUGE: Final = 2 << 20
_MOST: Final = 0.5  # of a file must be mapped by huge pages: the rest may be in use by small ones
_FILES: Final = 8  # that are tried until one is mapped by huge pages alone
_SHARE: Final = 0.02  # of what is read: the page cache may grow by so much, for whatever else happens meanwhile
_SLACK_KIB: Final = 64  # and by this: the kernel counts in batches for each processor
_ALL: Final = 1 << 62
_ENOUGH: Final = 64 << 20  # bytes, when no file is large and nobody asked for all
_STRAY: Final = 8  # faults that are not the file's; a huge page that is missing takes 32 at least, of 64 KiB
_READ_SECONDS: Final = 600.0
_CONSOLE_BYTES: Final = 1 << 20
_MOUNTED_OVER: Final = tuple(f"{mount.destination}/" for mount in MOUNTS)
_NODE: Final = "/dev/osbuilder-root"
_DENIED: Final = re.compile(
    r"(?:mknod|open|write): (?:Operation not permitted|Permission denied|Read-only file system)"
)
# What kernels say that were asked for DAX, cannot, and go on without: fs/erofs/super.c, fs/xfs/xfs_super.c, drivers/dax
_TURNED_OFF: Final = re.compile(r"\] (.*(?:Turning off DAX|unaligned partition for dax|blocksize for DAX).*)")
_READ_ONLY: Final = re.compile(r"\] .*nd_pmem .*read-only, marking (pmem\d+) read-only")


def look(session: Session) -> str:
    root = session.machine.root
    if not isinstance(root, DiskImage) or not is_mapped(session.machine):
        raise NotHere("this guest's root is not an NVDIMM that is mapped")
    thorough = session.by_name("dax")
    probe = session.probe
    options = mount_options(probe.file("/proc/self/mounts"))
    session.facts["mount"] = ",".join(options)
    console = tail(session.guest.console, _CONSOLE_BYTES).decode(errors="replace")
    judge_mount(options, console)
    if found := _READ_ONLY.search(console):
        session.facts["kernel"] = found[1]
    tree = session.tree()
    large = large_files(tree)
    told = [] if tree is None else [mapped(session, probe, large)]  # before they are read: see judge_map
    place, most = ("/", _ALL) if thorough else (large[0], _ALL) if large else ("/", _ENOUGH)
    read = probe.facts("drain", place, str(most), str(session.longest()), seconds=_READ_SECONDS)
    if tree is None:
        told = [mapped(session, probe, large_files_of(read))]
    told += [drained(session, read), denied(session, probe)]
    if thorough:
        told.append(same_bytes(root))
    return "; ".join(told)


def mount_options(mounts: str) -> list[str]:
    """Of the last thing mounted at /: a container's root is a bind of the guest's."""
    found = [line.split() for line in mounts.splitlines()]
    roots = [row[3].split(",") for row in found if len(row) > 3 and row[1] == "/"]
    if not roots:
        raise Unclear("/proc/self/mounts of the guest says nothing of its root")
    return roots[-1]


def judge_mount(options: list[str], console: str) -> None:
    """Wrong when the kernel says that there is no DAX."""
    if said := _TURNED_OFF.search(console):
        raise Wrong(f"the kernel has turned DAX off: {said[1].strip()}")
    if not {"dax", "dax=always"} & set(options):
        raise Wrong(f"the root is mounted without DAX: {','.join(options)}")


def large_files(tree: Tree | None) -> list[str]:
    """The paths of the largest files that have no hole and no mount over them, of those as large as a huge page."""
    found = [] if tree is None else [(one, seen_in_container(names)) for one, names in tree.names().items()]
    sizes = [(one.content.size, path) for one, path in found if path and one.is_file and is_whole(one.content)]
    return [path for size, path in sorted(sizes, reverse=True)[:_FILES] if size >= HUGE]


def seen_in_container(paths: Iterable[str]) -> str:
    """The first of a file's names over which a container mounts nothing; empty when there is none."""
    return next((path for path in paths if not path.startswith(_MOUNTED_OVER)), "")


def is_whole(content: Content) -> bool:
    """Whether all of it is stored, in one piece: no huge page has a hole in it, or two places."""
    return not isinstance(content, Sparse) or [size for _, _, size in content.pieces] == [content.size]


def large_files_of(read: Mapping[str, str]) -> list[str]:
    """The same, by the guest's word: one at most."""
    return [read["largest"]] if int(read.get("largest_bytes", 0)) >= HUGE else []


def mapped(session: Session, probe: Probe, paths: Sequence[str]) -> str:
    """Large files are mapped by entries of 2 MiB, if there are any."""
    if not paths:
        return "huge pages: not shown, for no file of 2 MiB without holes is there"
    found = []
    for path in paths:
        numbers = {name: int(value) for name, value in probe.facts("map", path).items() if name != "sum"}
        found.append({"path": path} | numbers)
        if numbers["huge_bytes"] == numbers["bytes"]:
            break
    session.facts["map"] = found
    return judge_map(found)


def judge_map(found: Sequence[Mapping[str, Any]]) -> str:
    """Wrong when no mapping of any of these files has huge pages, Unclear when the best has only a few.

    A kernel that cannot say so is judged by its faults. A stretch of a file that a program has mapped by small pages (a
    library in use) stays so for everybody.
    """
    best = max(found, key=_rank)
    size, huge, faults = best["bytes"], best["huge_bytes"], best["faults"]
    shown = best["path"] if best["path"].isprintable() else quote(best["path"])
    if huge < 0:
        if faults > size // HUGE + _STRAY:
            raise Wrong(f"{size >> 10} KiB of {shown} are mapped with {faults} faults: not by huge pages")
        return f"{size // HUGE} × 2 MiB of {shown} mapped with {faults} faults (PAGEMAP_SCAN not asked: not here)"
    if huge == 0:
        raise Wrong(f"0 of {size >> 10} KiB of {shown} are mapped by huge pages, with {faults} faults")
    if not _is_most(best):
        raise Unclear(f"only {huge // HUGE} of {size // HUGE} × 2 MiB of {shown} are mapped by huge pages")
    return f"{huge // HUGE} of {size // HUGE} × 2 MiB of {shown} mapped by huge pages, with {faults} faults"


def _is_most(one: Mapping[str, Any]) -> bool:
    return int(one["huge_bytes"]) >= int(one["bytes"]) // HUGE * HUGE * _MOST


def _rank(one: Mapping[str, Any]) -> tuple[bool, int, float]:
    return _is_most(one), int(one["huge_bytes"]), -int(one["faults"]) * HUGE / int(one["bytes"])


def drained(session: Session, read: Mapping[str, str]) -> str:
    """What was read of the root is not in the page cache."""
    names = ("bytes", "files", "unread", "over", "cached_before_kib", "cached_after_kib")
    numbers = {name: int(read[name]) for name in names}
    numbers["bytes"] = session.without_holes(numbers["bytes"])
    session.facts["read"] = numbers
    return judge_cache(numbers)


def judge_cache(found: Mapping[str, int]) -> str:
    """Wrong when the page cache has grown by what was read."""
    grown, size = found["cached_after_kib"] - found["cached_before_kib"], found["bytes"] >> 10
    if size == 0:
        raise Unclear("no file of the root could be read")
    if grown > size * _SHARE + _SLACK_KIB:
        raise Wrong(f"reading {size} KiB of the root has put {grown} KiB into the guest's page cache")
    over = f" ({found['over']} that are mostly holes passed over)" if found["over"] else ""
    return f"{size} KiB in {found['files']} files read{over}, the page cache grew by {max(grown, 0)} KiB"


def denied(session: Session, probe: Probe) -> str:
    """No container gets at the root's device, not even one that may make nodes."""
    words = []
    for name, major, minor in pmems(probe.file("/proc/partitions")):
        try:
            probe.ask("node", _NODE, major, minor)
        except Refused as problem:
            if not _DENIED.search(str(problem)):
                raise Unclear(f"whether {name} can be written to was not seen: {problem}") from None
            words.append(str(problem))
        else:
            raise Wrong(f"a container with CAP_MKNOD can write to {name}, the device of the guest's root")
    if not words:
        raise Unclear("the guest shows no pmem")
    session.facts["denied"] = words
    return f"its device is refused ({words[0]})"


def pmems(partitions: str) -> list[tuple[str, str, str]]:
    """Name and number of each NVDIMM and its partitions, out of /proc/partitions."""
    rows = [line.split() for line in partitions.splitlines()]
    return [(row[3], row[0], row[1]) for row in rows if len(row) == 4 and row[3].startswith("pmem")]


def same_bytes(root: DiskImage) -> str:
    """The image is what it was when it was made."""
    if not root.file.sha256:
        return "what the image's bytes should be is not known"
    with root.file.path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != root.file.sha256:
        raise Wrong(f"the image's sha256 was {root.file.sha256[:12]}…, and now is {found[:12]}…")
    return "its sha256 is what it was"
