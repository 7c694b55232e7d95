"""What a file is, drawn: what lies where, whether it agrees with itself, and what a guest would see of it."""

from __future__ import annotations

import os
import stat
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from osbuild import hash_check, output, verity
from osbuild.console import size_text
from osbuild.disk_layout import PFN_AT, DiskLayout, Mbr
from osbuild.errors import InputError, SpecError
from osbuild.hash_check import Claim, HashTree
from osbuild.manifest import MANIFEST
from osbuild.nvdimm_image import ALIGN, MIB, SECTOR
from osbuild.oci import Json, parse_json
from osbuild.subject import Filesystem, Subject, called, open_subject
from osbuild.tree import Tree, quote
from osbuild.view import View

_PAGE: Final = 4096
_WIDTH: Final = 80
_KINDS: Final = {
    stat.S_IFREG: "files", stat.S_IFDIR: "directories", stat.S_IFLNK: "symbolic links", stat.S_IFCHR: "devices",
    stat.S_IFBLK: "devices", stat.S_IFIFO: "fifos", stat.S_IFSOCK: "sockets",
}  # fmt: skip
# Facts of a superblock that people look for; --json has all of them.
_TOLD: Final = (
    "volume_name", "feature_compat", "feature_incompat", "feature_ro_compat", "inodes_count", "free_blocks_count_lo",
    "label", "built", "features", "blocks", "inodes", "block size",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """One line of the drawing."""

    offset: int
    size: int
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """What a guest sees when the file is given to it in one way."""

    device: str  # "NVDIMM", "virtio-pmem", "virtio-blk"
    sees: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """Everything that was found out about a file."""

    path: Path
    kind: str
    size: int
    layout: tuple[Stretch, ...] = ()
    facts: Mapping[str, Mapping[str, str]]  # heading -> name -> value
    sights: tuple[Sight, ...] = ()
    hash_tree: HashTree | None = None
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong with it."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "path": str(self.path), "kind": self.kind, "size": self.size, "whole": self.whole,
            "layout": [asdict(stretch) for stretch in self.layout],
            "facts": {heading: dict(facts) for heading, facts in self.facts.items()},
            "seen_as": {sight.device: sight.sees for sight in self.sights},
            "verity": asdict(self.hash_tree) if self.hash_tree else None,
            "notes": list(self.notes), "problems": list(self.problems),
        }  # fmt: skip


def inspect(path: Path, claim: Claim | None = None) -> Inspection:
    """Look at a file. `claim` is what somebody says of its hash tree; else a manifest beside it may."""
    subject = open_subject(path)
    found = _inspected(subject, claim)
    other = _other_bytes(subject)
    return replace(found, problems=(*found.problems, other)) if other else found


def _other_bytes(subject: Subject) -> str:
    """What is wrong with a file that a manifest.json beside it is about: not all that it holds checks itself."""
    about = _said_by_manifest(subject.path)
    said = about.get("size"), about.get("sha256")
    if not all(said):
        return ""
    size, digest = os.fstat(subject.backing.descriptor).st_size, output.digest(subject.backing.descriptor)
    if said == (size, digest):
        return ""
    return f"it is not what the {MANIFEST} beside it is about: {size} bytes with sha256 {digest}"


def _said_by_manifest(path: Path) -> Json:
    """What a manifest.json beside a file says of it; nothing when there is none, or it is somebody else's."""
    try:
        about = parse_json((path.parent / MANIFEST).read_bytes(), MANIFEST)["outputs"][path.name]
    except (OSError, InputError, KeyError, TypeError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _inspected(subject: Subject, claim: Claim | None) -> Inspection:
    path = subject.path
    if subject.kind == "initramfs":
        return _initramfs(subject)
    if subject.kernel is not None:
        kernel = subject.kernel
        facts = {"format": kernel.format, "architecture": kernel.arch, "release": kernel.release or "not to be found"}
        return Inspection(
            path=path, kind="kernel", size=subject.backing.size, facts={"kernel": facts}, problems=kernel.problems
        )  # fmt: skip
    if subject.layout is None:
        return _qcow2(subject)
    return _disk(subject, subject.layout, claim)


def _initramfs(subject: Subject) -> Inspection:
    archive = subject.archive
    assert archive is not None
    layout = [
        Stretch(
            offset=part.offset, size=part.size,
            what=f"{part.compression if part.compression != 'none' else 'not compressed'}: {part.entries} entries, "
            f"{size_text(part.unpacked)} unpacked",
        )
        for part in archive.parts
    ]  # fmt: skip
    facts = {
        "compression": ", ".join(part.compression for part in archive.parts),
        "unpacked": f"{archive.unpacked} bytes",
        **_counts(archive.tree),
    }
    init, problem = _init(archive.tree)
    facts["/init"] = init
    problems = (*archive.problems, *([problem] if problem else []))
    return Inspection(
        path=subject.path, kind=subject.kind, size=subject.backing.size, layout=tuple(layout),
        facts={"initramfs": facts}, problems=problems,
    )  # fmt: skip


def _init(tree: Tree) -> tuple[str, str]:
    """What the kernel would start, and what is wrong with that."""
    view = View(tree)
    try:
        real = view.real("/init")
    except InputError as problem:
        return "a loop of links", f"/init leads nowhere: {problem}"
    entry = view.get("/init")
    if entry is None:
        return "missing", "there is no /init: a kernel that is given this looks for a root elsewhere"
    if not entry.is_file or not entry.mode & 0o111:
        return quote(real), f"/init leads to {quote(real)}, which cannot be executed"
    return f"{quote(real)}, {entry.content.size} bytes", ""


def _qcow2(subject: Subject) -> Inspection:
    # Not converted here: a qcow2 file may name other files of this machine, and qemu-img would read them.
    raw = quote(subject.path.stem + ".img")
    return Inspection(
        path=subject.path, kind=subject.kind, size=subject.backing.size,
        facts={"qcow2": {"virtual size": f"{subject.virtual_size} bytes ({size_text(subject.virtual_size)})"}},
        notes=(f"to see what is in it: qemu-img convert -O raw {quote(str(subject.path))} {raw}",),
        problems=subject.problems,
    )  # fmt: skip


def _disk(subject: Subject, layout: DiskLayout, claim: Claim | None) -> Inspection:
    problems = [*layout.problems, *subject.problems]
    facts: dict[str, Mapping[str, str]] = {}
    if layout.pfn is not None:
        facts["nd_pfn superblock"] = dict(layout.pfn.fields)
    for filesystem in subject.filesystems:
        name = called(filesystem.partition)
        volume = filesystem.volume
        facts[name] = {**volume.facts, "uuid": volume.uuid, "size": str(volume.size), **_counts(volume.tree)}
        problems += [f"{name}: {problem}" for problem in volume.problems]
        if volume.size > filesystem.partition.size:
            problems.append(f"{name}: it takes {volume.size} bytes, and its partition has {filesystem.partition.size}")
    tree = _hash_tree(subject, layout, claim)
    if tree is not None:
        problems += [f"hash tree: {problem}" for problem in tree.problems]
    return Inspection(
        path=subject.path, kind=subject.kind, size=layout.size, layout=tuple(_stretches(subject, layout, tree)),
        facts=facts, sights=tuple(_sights(subject, layout)), hash_tree=tree, problems=tuple(dict.fromkeys(problems)),
    )  # fmt: skip


def _counts(tree: Tree) -> dict[str, str]:
    """How much of everything there is."""
    counts: dict[str, int] = dict.fromkeys(dict.fromkeys(_KINDS.values()), 0)
    size = 0
    names = tree.names()
    for entry in names:
        counts[_KINDS[stat.S_IFMT(entry.mode)]] += 1
        size += entry.content.size
    found = {name: str(count) for name, count in counts.items() if count}
    more = len(tree) - len(names)
    return found | ({"more names of them": str(more)} if more else {}) | {"bytes in files": str(size)}


# The hash tree


def _hash_tree(subject: Subject, layout: DiskLayout, claim: Claim | None) -> HashTree | None:
    tree = next((part for part in layout.partitions if part.kind == "hash tree"), None)
    data = next((part for part in layout.partitions if part.number == 1), None)
    claim = claim or _from_manifest(subject.path)
    if tree is None or data is None:
        if claim is None:
            return None
        return HashTree(
            root_hash="", salt="", blocks=0, levels=0, checked="the root hash",
            problems=("a root hash is given, and there is no partition 2 behind a filesystem",),
        )  # fmt: skip
    salts = (verity.DEFAULT_SALT, b"")
    return hash_check.check(subject.backing, (data.start, data.size), (tree.start, tree.size), salts, claim)


def _from_manifest(path: Path) -> Claim | None:
    """What a manifest.json beside an image says of it."""
    try:
        return hash_check.parse_params(str(_said_by_manifest(path)["verity"]["params"]))
    except (KeyError, TypeError, SpecError):
        return None  # not ours, or about something else


# The drawing


def stretches(subject: Subject) -> tuple[Stretch, ...]:
    """What lies where in an image or an initramfs; a hash tree is named and not checked."""
    if subject.kind == "initramfs":
        return _initramfs(subject).layout
    return tuple(_stretches(subject, subject.layout, None)) if subject.layout is not None else ()


def _stretches(subject: Subject, layout: DiskLayout, tree: HashTree | None) -> Iterator[Stretch]:
    """Every part from the start to the end, gaps left out."""
    found = []
    for number, mbr in enumerate((layout.outer, layout.inner), start=1):
        if mbr is not None:
            found.append(Stretch(offset=mbr.at, size=SECTOR, what=f"MBR {number}: {_slots(mbr)}"))
    if layout.pfn is not None:
        words = dict(layout.pfn.fields)
        what = f"nd_pfn superblock {words['version_major']}.{words['version_minor']}, "
        found.append(Stretch(offset=PFN_AT, size=4096, what=what + f"data at {_place(layout.pfn.data_offset)}"))
    volumes = {filesystem.partition.number: filesystem.volume for filesystem in subject.filesystems}
    for part in layout.partitions:
        what = called(part) if part.kind else f"partition {part.number}, nothing known in it"
        if part.number in volumes:
            what += f", {len(volumes[part.number].tree)} paths"
            rest = part.size - volumes[part.number].size
            what += f", {rest} bytes after it" if rest > 0 else ""
        if part.kind == "hash tree" and tree is not None:
            what += f", {tree.levels} levels over {tree.blocks} blocks"
        found.append(Stretch(offset=part.start, size=part.size, what=what))
    yield from sorted(found, key=lambda stretch: stretch.offset)


def _slots(mbr: Mbr) -> str:
    return ", ".join(f"partition {slot.number} at +{_place(slot.start)}" for slot in mbr.slots)


def _place(offset: int) -> str:
    return f"{offset // MIB} MiB" if offset and offset % MIB == 0 else f"{offset} bytes"


# What a guest sees


def _sights(subject: Subject, layout: DiskLayout) -> Iterator[Sight]:
    yield Sight(device="NVDIMM", sees=_pmem(subject, layout, mapped=False))
    yield Sight(device="virtio-pmem", sees=_pmem(subject, layout, mapped=True))
    yield Sight(device="virtio-blk", sees=_block(layout))


def _pmem(subject: Subject, layout: DiskLayout, *, mapped: bool) -> str:
    """The pmem driver's disk; `mapped`: the kernel has page structures for it without the header, too."""
    if layout.size % ALIGN:
        return f"nothing: {layout.size} bytes are no multiple of 2 MiB"
    if layout.pfn is None:
        seen = _disk_of(layout, layout.outer, "/dev/pmem0", "p")
        if mapped:
            return f"{seen}; {_dax(subject)}"
        return f"{seen}; no DAX: without a header the kernel has no page structures for it"
    if layout.pfn.problems:
        return f"nothing: the nd_pfn superblock is refused: {layout.pfn.problems[0]}"
    if layout.inner is None:
        return f"/dev/pmem0 without partitions: there is no MBR at {layout.pfn.data_offset}"
    return f"{_disk_of(layout, layout.inner, '/dev/pmem0', 'p')}; {_dax(subject)}"


def _block(layout: DiskLayout) -> str:
    if layout.outer is None and layout.inner is not None:
        return "/dev/vda without partitions: there is no MBR at 0"
    return _disk_of(layout, layout.outer, "/dev/vda", "")


def _disk_of(layout: DiskLayout, mbr: Mbr | None, device: str, infix: str) -> str:
    """Every partition of one view, with what is in it."""
    known = {part.start: part for part in layout.partitions}
    if mbr is None:
        return f"{device}: {layout.partitions[0].kind}" if layout.partitions else f"{device} without partitions"
    if any(slot.boot & 0x7F for slot in mbr.slots):
        return f"{device} without partitions: the MBR is not taken for one"
    seen = []
    for slot in mbr.slots:
        start = mbr.at + slot.start
        kind = known[start].kind if start in known else ""
        if start + slot.size > layout.size:
            seen.append(f"{device}{infix}{slot.number} cut off at the end of the disk")
        else:
            seen.append(f"{device}{infix}{slot.number}: {kind or 'nothing known'} at {_place(start)} of the file")
    return ", ".join(seen)


def _dax(subject: Subject) -> str:
    """Whether files can be mapped where they lie."""
    if not subject.filesystems:
        return "no DAX: there is no filesystem"
    filesystem = subject.filesystems[0]
    size = _block_size(filesystem)
    if size != _PAGE:
        return f"no DAX: the filesystem's blocks have {size} bytes, pages {_PAGE}"
    if filesystem.partition.start % _PAGE:
        return "no DAX: the partition does not begin on a page"
    return "DAX works"


def _block_size(filesystem: Filesystem) -> int:
    facts = filesystem.volume.facts
    if facts.get("log_block_size", "").isdigit():
        return int(1024 << int(facts["log_block_size"]))
    return int(facts["block_size"]) if facts.get("block_size", "").isdigit() else _PAGE


# For people


def drawing(found: Inspection) -> Iterator[str]:
    """Lines that fit into 80 columns, but for names and sentences that are longer."""
    yield f"{quote(str(found.path))}: {found.kind}, {found.size} bytes ({size_text(found.size)})"
    if found.layout:
        yield ""
        yield f"{'offset':>14} {'size':>14}"
        for stretch in found.layout:
            yield from _wrapped(f"{stretch.offset:>14} {stretch.size:>14}  ", stretch.what)
        yield f"{found.size:>14} {'':>14}  end"
    for heading, facts in found.facts.items():
        yield ""
        yield heading
        yield from _columns({name: value for name, value in facts.items() if _is_told(heading, name, value)})
    if found.hash_tree is not None and found.hash_tree.root_hash:
        yield ""
        yield f"hash tree, checked against {found.hash_tree.checked}"
        # To be copied, so each on one line.
        yield f"  root hash  {found.hash_tree.root_hash}"
        yield f"  salt       {found.hash_tree.salt or 'none'}"
    if found.sights:
        yield ""
        yield "seen as"
        for sight in found.sights:
            yield from _wrapped(f"  {sight.device:<20} ", sight.sees)
    yield ""
    yield from found.notes
    yield from _verdict(found.problems)


def _verdict(problems: Sequence[str]) -> Iterator[str]:
    if not problems:
        yield "nothing is wrong with it"
        return
    yield f"{len(problems)} problem{'s' * (len(problems) > 1)}:"
    yield from (f"  {problem}" for problem in problems)


def _is_told(heading: str, name: str, value: str) -> bool:
    if not heading.startswith(("partition", "ext4", "erofs", "xfs")):
        return True
    counts = {*_KINDS.values(), "uuid", "size", "more names of them", "bytes in files"}
    return name in counts or (name in _TOLD and value not in ("", "''"))


def _columns(facts: Mapping[str, str]) -> Iterator[str]:
    for name, value in facts.items():
        yield from _wrapped(f"  {name:<20} ", value)


def _wrapped(front: str, text: str) -> Iterator[str]:
    """A text behind something, on as many lines as it needs."""
    folded = textwrap.wrap(text, _WIDTH - len(front), break_long_words=False, break_on_hyphens=False) or [""]
    for line in folded:
        yield (front + line).rstrip()
        front = " " * len(front)
