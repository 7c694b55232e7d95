"""Another agent into an image that was made before: what a clean build with that agent would give, byte for byte.

    image ──▶ tree ──▶ proof: planned again, it is this image ──▶ tree with the other agent ──▶ image

A filesystem's identity comes from its content, and nearly every block of metadata from the identity; so it is laid out
anew, and only the contents are copied, inside the kernel. What cannot be proved to be an image of this program, made
with options that are known, is refused: lock.json beside it knows them, or the words that were given then.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import osbuild
from osbuild import manifest, summary, verity
from osbuild.agent import INIT, Agent, install_init
from osbuild.agents import AGENTS, find_agent, init_words
from osbuild.arch import ARCHES, Arch
from osbuild.artifacts import DiskImage, Initrd, Rootfs
from osbuild.begun import beginning
from osbuild.bootable import problems
from osbuild.borrowed import Borrowed
from osbuild.cache import Cache
from osbuild.content import pieces_of
from osbuild.elf import read_elf
from osbuild.errors import InputError, OsbuilderError, SpecError
from osbuild.filesystem import FILESYSTEMS, Plan
from osbuild.filesystem.base import Foreseen
from osbuild.nvdimm_image import FILESYSTEM_START, Layout, build_nvdimm_image, data_start
from osbuild.spec import DiskSpec
from osbuild.subject import QCOW2, Filesystem, Subject, open_subject
from osbuild.summary import agent_of, with_agent
from osbuild.systemd import WORDS, find_units, unit_texts
from osbuild.tree import Content, Draft, Tree, quote, regular, without_sockets
from osbuild.view import lookup, read_at
from osbuild.wishes import DEFAULT_POLICY, POLICIES
from osbuild.workspace import locked, put_in_place, room_for

_NANO: Final = 1_000_000_000
_SUMMARY_MAX: Final = 4 << 20
_SOME_DIGEST: Final = "00" * 32
_WORDS: Final = "give those that it was made with: --align, --size, --free, --writable"
_BUILD_AGAIN: Final = "build it again with --agent"


@dataclass(frozen=True, slots=True, kw_only=True)
class Swapped:
    """What came of it."""

    image: DiskImage
    before: str  # name and version of the one that was in it
    agent: str  # name and version of the one that is
    initrd: Initrd | None = None  # made again, too

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        words = {"words": list(self.image.words), **manifest.about_disk(self.image)}
        return self.image.file.to_dict() | {"before": self.before, "agent": self.agent} | words


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """An image of ours, understood."""

    subject: Subject
    filesystem: Filesystem
    disk: DiskSpec
    tree: Tree
    agent: str  # name and version of the one that is in it
    service: bool
    arch: Arch
    epoch: int
    root_hash: str = ""  # of its hash tree, where manifest.json says it


def swap(path: Path, source: str, cache: Cache, *, out: Path | None = None, disk: DiskSpec | None = None) -> Swapped:
    """Put the agent that `source` names into the image at `path`, or write the result to `out`.

    `disk` is how the image was made; where a lock.json beside the image says so, that counts. In the directory of a
    build everything that holds the agent changes with it: initrd.img, manifest.json and lock.json; the smoke test's
    report, which is about another agent, goes.
    """
    home = path.absolute().parent
    if out is not None or not _is_build(path):
        known = _open(path, disk)
        rootfs = _with_agent(known, find_agent(source, known.arch, cache))
        image = _write(known, rootfs, (out or path).absolute())
        return Swapped(image=image, before=known.agent, agent=rootfs.agent)
    with locked(home), room_for(home) as new:
        document, lock = manifest.load(home)
        known = _open(path, disk)
        rootfs = _with_agent(known, find_agent(source, known.arch, cache))
        roots: dict[str, DiskImage | Initrd] = {"image": _write(known, rootfs, new / path.name)}
        name = manifest.NAMES["initrd"]
        if name in document["outputs"]:
            from osbuild.initrd import build_initrd

            compress = str(document["outputs"][name]["compression"])
            roots["initrd"] = build_initrd(rootfs, new / name, compress=compress)
        put_in_place(home)
        moved = {name: _moved(root, home) for name, root in roots.items()}
        from osbuild import records  # an image alone has none

        given = source if source in AGENTS else str(Path(source).absolute())
        records.change_agent(home, *manifest.with_agent(document, lock, rootfs, moved, given))
    made, packed = moved["image"], moved.get("initrd")
    assert isinstance(made, DiskImage)
    assert packed is None or isinstance(packed, Initrd)
    return Swapped(image=made, before=known.agent, agent=rootfs.agent, initrd=packed)


def _is_build(path: Path) -> bool:
    """Whether it is the image of a build's directory."""
    return path.name == manifest.NAMES["image"] and (path.parent / manifest.MANIFEST).exists()


def _open(path: Path, disk: DiskSpec | None) -> _Known:
    """The image, and how it was made, as far as anybody says."""
    if not _is_build(path):
        return _understand(path, disk or DiskSpec())
    document, lock = manifest.load(path.absolute().parent)
    try:
        said: Mapping[str, Any] = lock["options"]["disk"]
        disk = DiskSpec(**{**said, "salt": bytes.fromhex(said["salt"])})
    except (KeyError, TypeError, ValueError, AttributeError):
        raise InputError(f"{quote(str(path.parent / manifest.LOCK))} is not one of ours") from None
    try:
        hashed = document["outputs"][path.name]["verity"]
        root_hash = str(hashed["root_hash"]) if hashed else ""
    except (KeyError, TypeError):
        raise InputError(f"{quote(str(path.parent / manifest.MANIFEST))} is not one of ours") from None
    return dataclasses.replace(_understand(path, disk), root_hash=root_hash)


# --- what there is ---


def _understand(path: Path, disk: DiskSpec) -> _Known:
    """The image, proved to be what its tree and these options give."""
    where = quote(str(path))
    subject = open_subject(path)
    if subject.kind == QCOW2:
        raise InputError(f"{where} is a qcow2 image", hint=f"qemu-img convert -O raw, or {_BUILD_AGAIN}")
    layout = subject.layout
    if layout is None or layout.outer is None or len(subject.filesystems) != 1:
        hint = f"in a build's directory name {manifest.NAMES['image']}; else {_BUILD_AGAIN}"
        raise InputError(f"{where} is no disk image of osbuilder's, but {subject.kind}", hint=hint)
    filesystem = subject.filesystems[0]
    broken = (*layout.problems, *subject.problems, *filesystem.volume.problems)
    if broken:
        raise InputError(f"{where} is damaged: {broken[0]}", hint="osbuilder inspect says all of it")
    tree = filesystem.volume.tree
    agent, service, epoch = _summary(tree, where)
    hashed = any(part.kind == "hash tree" for part in layout.partitions)
    for wish, wanted, there in (
        ("--fs", disk.filesystem not in (DiskSpec().filesystem, filesystem.partition.kind), filesystem.partition.kind),
        ("--verity", disk.verity and not hashed, "without a hash tree"),
        ("--no-dax-header", not disk.header and layout.pfn is not None, "with the header"),
        ("--format", disk.format != "raw", "raw"),
    ):
        if wanted:
            raise SpecError(f"{wish}: {where} is {there}, and a swap changes nothing but the agent", hint=_BUILD_AGAIN)
    disk = dataclasses.replace(
        disk, filesystem=filesystem.partition.kind, header=layout.pfn is not None, format="raw",
        verity=hashed,
    )  # fmt: skip
    return _Known(
        subject=subject, filesystem=filesystem, disk=disk, tree=tree, agent=agent, service=service,
        arch=_arch(tree, service, agent, where), epoch=epoch,
    )  # fmt: skip


def _summary(tree: Tree, where: str) -> tuple[str, bool, int]:
    """The agent that is in it, whether it is a service, and the time of all that was added."""
    entry = tree.get(summary.PATH)
    text = read_at(entry.content, 0, _SUMMARY_MAX).decode(errors="replace") if entry and entry.is_file else ""
    found = agent_of(text)
    if entry is None or found is None:
        raise InputError(f"{where} was not made by osbuilder: {summary.PATH} names no agent", hint=_BUILD_AGAIN)
    name, version, service = found
    return f"{name} {version}", service, (entry.mtime_ns or 0) // _NANO


def _arch(tree: Tree, service: bool, name: str, where: str) -> Arch:
    """Of the agent that is in it."""
    draft = tree.edit()
    programs = [kind.PROGRAM for kind in AGENTS.values()] if service else [INIT]
    for program in programs:
        entry = lookup(draft, program)
        elf = read_elf(entry.content) if entry is not None and entry.is_file else None
        for arch in ARCHES.values():
            if elf is not None and elf.machine == arch.elf_machine:
                return arch
    raise InputError(f"{where}: {name} is not where osbuilder puts it, at {' or '.join(programs)}", hint=_BUILD_AGAIN)


def _prove(known: _Known, plan: Plan) -> None:
    """InputError unless this program would have written this very filesystem, of these contents, with these options."""
    volume, partition = known.filesystem.volume, known.filesystem.partition
    where = quote(str(known.subject.path))
    if plan.uuid != volume.uuid:
        raise InputError(
            f"{where} is not what osbuilder {osbuild.__version__} would make of its content",
            hint=_BUILD_AGAIN,
        )
    layout = _layout(known.disk, plan)
    found = known.subject.layout
    assert found is not None
    tree = next((part for part in found.partitions if part.kind == "hash tree"), None)
    if (layout.total, layout.data, layout.data_size, layout.tree, plan.size) != (
        found.size, partition.start, partition.size, tree.start if tree else 0, volume.size,
    ):  # fmt: skip
        raise InputError(
            f"{where} was made with other options: with these it would have {layout.total} bytes, not {found.size}",
            hint=_WORDS,
        )
    if tree is not None:
        _prove_hashes(known, tree.start)


def _prove_hashes(known: _Known, tree: int) -> None:
    """InputError unless the hash tree has this salt, agrees with itself, and has the root hash of manifest.json.

    With that root hash it is the tree of the proved data, and the digests of what stays are taken from it. Without,
    somebody may have made another for data that is not there, which a new root hash would vouch for: see `_digests`.
    """
    backing, data = known.subject.backing, known.filesystem.partition
    where = quote(str(known.subject.path))
    salt = known.disk.salt or verity.DEFAULT_SALT
    level = verity.first_level(data.size)
    if level is None:
        return
    first = backing.read(tree + level, verity.DIGEST)
    if first != verity.block_digest(salt, backing.read(data.start, verity.BLOCK)):
        raise InputError(f"{where} has a hash tree with another salt", hint="--salt HEX, as it was made")
    root = verity.stored_root(backing.descriptor, tree, data.size, salt)
    if root is None or (known.root_hash and known.root_hash != root.hex()):
        raise InputError(f"{where} has a hash tree that somebody changed", hint=_BUILD_AGAIN)


def _layout(disk: DiskSpec, plan: Plan) -> Layout:
    if disk.size:
        return disk.layout()
    return Layout.around(plan.size, align=disk.align, header=disk.header, hashed=disk.verity)


# --- what it becomes ---


def _with_agent(known: _Known, agent: Agent) -> Rootfs:
    """The guest's tree with the other agent; InputError when it could not boot with it."""
    draft = known.tree.edit()
    now = known.epoch * _NANO
    if agent.wants_policy and lookup(draft, f"{POLICIES}/{DEFAULT_POLICY}") is None:
        raise InputError(f"{agent} was built to obey a policy, and there is none in the image", hint=_BUILD_AGAIN)
    if known.service:
        _put_service(draft, agent, now)
    else:
        install_init(draft, agent, now=now)
    before = known.tree[summary.PATH].content
    text = with_agent(b"".join(before.chunks()).decode(errors="surrogateescape"), agent)
    assert text is not None
    draft.put(summary.PATH, regular(text.encode(errors="surrogateescape"), mtime_ns=now))
    tree = draft.tree()
    found = problems(tree, INIT, known.arch, systemd=known.service)
    if found:
        raise InputError(
            "the image would not boot with it: " + "; ".join(one.text for one in found), hint=found[0].hint
        )
    words = WORDS if known.service else init_words(agent, service=False)
    return Rootfs(
        tree=tree, init=INIT, epoch=known.epoch, agent=str(agent), agent_sha256=agent.sha256,
        agent_inputs=agent.inputs, words=words,
    )  # fmt: skip


def _put_service(draft: Draft, agent: Agent, now: int) -> None:
    """As rules do it, but for what does not depend on the agent."""
    for kind in AGENTS.values():
        draft.remove(kind.PROGRAM)
    draft.put(AGENTS[agent.kind].PROGRAM, regular(agent.data, 0o755, mtime_ns=now))
    units = find_units(draft)
    for name, text in unit_texts(agent).items():
        draft.put(f"{units}/{name}", regular(text.encode(), mtime_ns=now))


def _proved(known: _Known, rootfs: Rootfs, foreseen: Plan | None) -> Plan:
    """The new plan, once the old image is proved: every byte of both trees is hashed, those that they share once."""
    contents: dict[Content, bytes] = {}
    for tree in (known.tree, rootfs.tree):  # which share nearly all of them
        tree.digest(contents)
    try:
        _prove(known, _plan(known, known.tree))
    except SpecError as problem:
        raise InputError(
            f"{quote(str(known.subject.path))} was made with other options: {problem}", hint=_WORDS
        ) from None
    if isinstance(foreseen, Foreseen):
        return foreseen.with_digest(without_sockets(rootfs.tree).digest(contents))
    return _plan(known, rootfs.tree)


def _plan(known: _Known, tree: Tree, digest: str = "") -> Plan:
    disk = known.disk
    return FILESYSTEMS[disk.filesystem].plan(
        tree, start=FILESYSTEM_START, epoch=known.epoch, dax=disk.header, room=disk.room, digest=digest
    )


def _foreseen(known: _Known, tree: Tree) -> Plan | None:
    """The new image's plan but for its digest: the old one need not be proved to know where contents will lie."""
    try:
        return _plan(known, tree, digest=_SOME_DIGEST)
    except OsbuilderError:  # it cannot be, or the old image is not what it was said to be: the proof comes first
        return None


def _contents(foreseen: Plan | None) -> Iterable[tuple[int, Content]]:
    """Where the new image's contents will lie, nearly always."""
    return foreseen.contents if foreseen is not None else ()


def _digests(known: _Known, plan: Plan) -> verity.Known:
    """Where the old hash tree has the digests of blocks that the new image has, too: of whole blocks of contents.

    Nothing of a tree whose root hash nobody knows is believed: all of the new image is hashed then.
    """
    layout, data = known.subject.layout, known.filesystem.partition
    tree = next((part for part in layout.partitions if part.kind == "hash tree"), None) if layout else None
    level = verity.first_level(data.size)
    if tree is None or level is None or not known.root_hash:
        return verity.NONE
    runs: list[tuple[int, int, int]] = []
    for at, content in plan.contents:
        backing, pieces = pieces_of(content)
        if not isinstance(backing, Borrowed) or backing.mark != known.subject.backing.mark:  # the agent itself
            continue
        for begin, source, size in pieces:
            here, there, whole = at + begin, source - data.start, size - size % verity.BLOCK
            if not whole or here % verity.BLOCK or there % verity.BLOCK:
                continue
            digests = tree.start + level + there // verity.BLOCK * verity.DIGEST
            if runs and _follows(runs[-1], here, digests):
                start, before, first = runs.pop()
                here, whole, digests = start, before + whole, first
            runs.append((here, whole, digests))
    return verity.Known(known.subject.backing.descriptor, runs)


def _follows(run: tuple[int, int, int], here: int, digests: int) -> bool:
    start, size, first = run
    return start + size == here and first + size // verity.BLOCK * verity.DIGEST == digests


def _write(known: _Known, rootfs: Rootfs, out: Path) -> DiskImage:
    """The image of the new tree; its contents go to the disk while the old image is being proved."""
    disk = known.disk
    foreseen = _foreseen(known, rootfs.tree)
    offset = data_start(header=disk.header)
    with beginning(out, needs=known.subject.backing.size, offset=offset, contents=_contents(foreseen)) as begun:
        plan = _proved(known, rootfs, foreseen)
        return build_nvdimm_image(
            FILESYSTEMS[disk.filesystem], plan, out, name=disk.filesystem, align=disk.align, total=disk.size,
            header=disk.header, hashed=disk.verity, salt=disk.salt, writable=disk.writable, words=rootfs.words,
            begun=begun, known=_digests(known, plan),
        )  # fmt: skip


def _moved(root: DiskImage | Initrd, home: Path) -> DiskImage | Initrd:
    return dataclasses.replace(root, file=dataclasses.replace(root.file, path=home / root.file.path.name))


def lines(done: Swapped) -> Iterator[str]:
    """For people."""
    file = done.image.file
    yield f"{file.path}: {done.agent} instead of {done.before}"
    yield f"  sha256:{file.sha256}"
    if done.image.verity is not None:
        yield done.image.verity.params
    if done.initrd is not None:
        yield f"{done.initrd.file.path}: made again"
        yield f"  sha256:{done.initrd.file.sha256}"
