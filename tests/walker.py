"""The kernel as a reader: a guest whose PID 1 walks what our writers wrote, and what it saw beside what went in.

jobs + walker/walker.c -> an initramfs -> QEMU -> JSON, an object a line -> Walk -> differences(tree, walk, keeps)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import command
from osbuild.arch import X86_64
from osbuild.artifacts import DiskImage, File, Initrd, Kernel
from osbuild.cache import default_cache
from osbuild.initrd import archive
from osbuild.runtime import accel, qemu
from osbuild.runtime.base import Machine
from osbuild.tree import Draft, Entry, Sparse, Tree, directory, regular

HOME: Final = "/.walker"
SOURCE: Final = Path(__file__).parent / "walker/walker.c"
HUGE: Final = 2 << 20
_BLOCK: Final = 4096
_SECOND: Final = 10**9
_JOB: Final = "walker: job "
# What a kernel says when a filesystem, or something in itself, is not right.
_ALARM: Final = re.compile(r"EXT4-fs|erofs|XFS|WARNING:|BUG:|I/O error|Oops")
_CALM: Final = re.compile(
    r"EXT4-fs (un)?mount: \d+ callbacks suppressed|mounted filesystem|mounted with root inode|unmounting filesystem|"
    r"ommand line|SGI XFS|Mounting V5 Filesystem|Ending clean mount|Unmounting Filesystem"
)


@pytest.fixture(scope="session")
def walker(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The walker, static."""
    if shutil.which("musl-gcc") is None:
        pytest.skip("musl-gcc is not installed")
    program = tmp_path_factory.mktemp("walker") / "walker"
    flags = ("-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-s")
    subprocess.run(["musl-gcc", *flags, "-o", program, SOURCE], check=True)
    return program.read_bytes()


# What to walk, and what came of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A filesystem to walk: on the whole of a device, or on a part of it that gets a partition for the while."""

    device: str  # under /dev; "-" with the type "-": the root the walker runs in
    type: str
    options: str = "-"
    start: int = 0
    size: int = 0

    def line(self) -> str:
        return f"{self.device} {self.start} {self.size} {self.type} {self.options}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What can be known of a path. None: not compared there."""

    mode: int
    uid: int
    gid: int
    size: int | None
    mtime_ns: int | None
    links: int
    group: str  # the first of all paths that are the same inode
    major: int
    minor: int
    target: str | None
    xattrs: Mapping[str, str | None]
    sha256: str | None
    data: tuple[tuple[int, int], ...] | None  # what SEEK_DATA and SEEK_HOLE call data: from, to
    extents: tuple[tuple[int, int], ...] | None  # what FIEMAP says has blocks
    huge: int | None  # bytes that mmap maps with huge pages
    blocks: int = field(default=0, compare=False)
    kind: int = field(default=0, compare=False)  # of its directory entry
    listed: bool = field(default=True, compare=False)  # with the inode number that its directory says


@dataclass(slots=True, kw_only=True)
class Walk:
    """What the walker said of one job."""

    mounted: str = ""  # its line of /proc/mounts
    facts: dict[str, int] = field(default_factory=dict)  # statfs(2)
    paths: dict[str, Seen] = field(default_factory=dict)
    ghosts: list[str] = field(default_factory=list)  # names that the walker invented, and found
    errors: list[str] = field(default_factory=list)


def machine_of(kernel: Kernel, path: Path, *, dax: bool, memory_mib: int = 256) -> Machine:
    """A guest that sees a file as an NVDIMM (with our DAX header in it) or as a disk."""
    image = DiskImage(file=File(path=path, size=path.stat().st_size, sha256=""), filesystem="", dax=dax, words=())
    return Machine(kernel=kernel, root=image, memory_mib=memory_mib)


def walk(
    machine: Machine, jobs: Sequence[Job], program: bytes, work: Path, *, pmem: str = "nvdimm", seconds: float = 240
) -> list[Walk]:
    """Boot the machine with the walker in place of its root's init, and read what it saw."""
    work.mkdir(parents=True, exist_ok=True)
    own = work / "walker.cpio"
    own.write_bytes(b"".join(archive(_own_tree(jobs, program, directory()))))
    return _boot(machine, ("-initrd", str(own)), work, pmem, len(jobs), seconds)


def walk_initrd(machine: Machine, tree: Tree, program: bytes, work: Path, *, seconds: float = 240) -> Walk:
    """Boot an initramfs with a second one behind it, in which the walker is."""
    root = machine.root
    assert isinstance(root, Initrd)
    work.mkdir(parents=True, exist_ok=True)
    both = work / "both.cpio"
    own = b"".join(archive(_own_tree([Job(device="-", type="-")], program, tree["/"])))
    # Four zeros end an lz4 stream: the kernel takes anything else behind it for its next block.
    both.write_bytes(root.file.path.read_bytes() + bytes(4 + -root.file.size % 4) + own)
    joined = Initrd(file=File.of(both), compression=root.compression, unpacked=root.unpacked)
    guest = Machine(kernel=machine.kernel, root=joined, memory_mib=machine.memory_mib)
    return _boot(guest, (), work, "nvdimm", 1, seconds)[0]


def _own_tree(jobs: Sequence[Job], program: bytes, root: Entry) -> Tree:
    draft = Draft()
    draft.put("/", root)  # what comes later says what the root is
    for name in ("dev", "proc", "sys", "mnt"):
        draft.put(f"{HOME}/{name}", directory(mtime_ns=0))
    draft.put(f"{HOME}/init", regular(program, 0o755))
    draft.put(f"{HOME}/jobs", regular("".join(job.line() for job in jobs).encode()))
    return draft.tree()


def _boot(machine: Machine, more: Sequence[str], work: Path, pmem: str, count: int, seconds: float) -> list[Walk]:
    program = Path(command.find(X86_64.qemu))
    chosen = accel.choose("auto", X86_64, program, cache=default_cache())
    console, answer = work / "console.log", work / "answer.json"
    with tempfile.TemporaryDirectory(prefix="walker-") as run:
        machine = Machine(
            kernel=machine.kernel, root=machine.root, memory_mib=machine.memory_mib, words=(f"rdinit={HOME}/init",),
            attach=pmem if pmem == "virtio-pmem" else "auto",
        )  # fmt: skip
        options = qemu.arguments(machine, console=console, agent=Path(run) / "agent", accel=chosen.name)
        port = ("-chardev", f"file,id=walker,path={answer}", "-device", "virtserialport,chardev=walker,name=walker")
        argv = [*options, *port, *more]
        with (work / "qemu.log").open("wb") as log:
            subprocess.run(
                [program, *argv], stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True, timeout=seconds
            )
    said = console.read_text(errors="replace")
    walks = list(_read(answer))
    assert len(walks) == count, f"the walker ended in job {len(walks)} of {count}; its console:\n{said[-2000:]}"
    _take_alarms(walks, said)
    return walks


def _take_alarms(walks: Sequence[Walk], console: str) -> None:
    """What the kernel complained of, into the walk that it was at."""
    number = 0
    for line in console.splitlines():
        if _JOB in line:
            number = int(line.partition(_JOB)[2])
        elif _ALARM.search(line) and not _CALM.search(line):
            walks[number].errors.append(f"the kernel: {line.strip()}")


# Reading the answer


def _read(answer: Path) -> Iterator[Walk]:
    """Each job's walk, as it ends; one that does not end is not there."""
    found: Walk | None = None
    inodes: dict[int, str] = {}
    with answer.open("rb") as lines:
        for line in lines:
            said = json.loads(line)
            if "job" in said or "end" in said:
                if found is not None:
                    yield _grouped(found, inodes)
                found, inodes = Walk(), {}
            elif found is not None:
                _take(found, inodes, said)


def _take(found: Walk, inodes: dict[int, str], said: dict[str, Any]) -> None:
    if "error" in said:
        number = said["errno"]
        found.errors.append(f"{_text(said['path'])!a}: {said['error']}: {os.strerror(number)}")
    elif "ghost" in said:
        found.ghosts.append(_text(said["ghost"]))
    elif "mounted" in said:
        found.mounted = _text(said.pop("mounted"))
        found.facts = said
    else:
        path = _text(said["path"])
        inode = said["inode"]
        inodes[inode] = min(inodes.get(inode, path), path)
        found.paths[path] = _seen(said)


def _grouped(found: Walk, inodes: Mapping[int, str]) -> Walk:
    for path, seen in found.paths.items():
        found.paths[path] = replace(seen, group=inodes[int(seen.group)])
    return found


def _seen(said: dict[str, Any]) -> Seen:
    target = said.get("target")
    return Seen(
        mode=said["mode"],
        uid=said["uid"],
        gid=said["gid"],
        size=said["size"],
        mtime_ns=said["seconds"] * _SECOND + said["nanoseconds"],
        links=said["links"],
        group=str(said["inode"]),  # until all are known
        major=said["major"],
        minor=said["minor"],
        target=None if target is None else _text(target),
        xattrs={_text(name): value for name, value in said.get("xattrs", ())},
        sha256=said.get("sha256"),
        data=_runs(said["data"], said["size"]) if "data" in said else None,
        extents=_runs(said["extents"], said["size"]) if "extents" in said else None,
        huge=said.get("huge"),
        blocks=said["blocks"],
        kind=said["kind"],
        listed=said["listed"] == said["inode"],
    )


def _text(digits: str) -> str:
    return bytes.fromhex(digits).decode(errors="surrogateescape")


# Comparing


@dataclass(frozen=True, slots=True, kw_only=True)
class Keeps:
    """What is left of a tree in one kind of filesystem. Sockets stay behind in all of them."""

    first: int = -(1 << 62)  # seconds that a time can have; one outside becomes the nearest second inside
    last: int = 1 << 62
    times: bool = True
    nanoseconds: bool = True
    untimed: int = 0  # seconds: the time of a directory that nobody described
    xattrs: bool = True
    holes: int = _BLOCK  # bytes: aligned ones of this size stay holes; 0: none do
    seeks: bool = True  # SEEK_HOLE finds them
    extents: bool = True  # FIEMAP says anything
    linked_symlinks: bool = True
    dax: bool = False  # then every whole huge page of a file without holes is mapped as one
    given: tuple[str, ...] = ()  # names that the guest has from elsewhere, if the tree does not say what they are


def differences(tree: Tree, found: Walk, keeps: Keeps) -> list[str]:
    """Everything that the kernel saw and the tree does not say, or the other way round: path, field, both values."""
    wanted = expected(tree, keeps)
    given = [path for path in keeps.given if path not in tree]
    told = [*found.errors, *(f"{ghost!a}: found, and not there" for ghost in found.ghosts if ghost not in wanted)]
    if ("dax=always" in found.mounted) != keeps.dax:
        told.append(f"mounted as {found.mounted!a}")
    told += [f"{path!a}: missing" for path in wanted if path not in found.paths]
    told += [f"{path!a}: not in the tree" for path in found.paths if path not in wanted and path not in given]
    for path, seen in found.paths.items():
        if path in wanted:
            told += [f"{path!a}: {difference}" for difference in _compare(wanted[path], seen)]
    return told


def expected(tree: Tree, keeps: Keeps) -> dict[str, Seen]:
    """What the kernel should see of a tree."""
    kept = {path: entry for path, entry in tree.items() if not stat.S_ISSOCK(entry.mode)}
    groups: dict[Entry, list[str]] = {}
    below: dict[str, int] = {}
    for path, entry in kept.items():
        groups.setdefault(entry, []).append(path)
        if entry.is_dir and path != "/":
            above = path.rpartition("/")[0] or "/"
            below[above] = below.get(above, 0) + 1
    below["/"] = below.get("/", 0) + sum(path not in tree and path.count("/") == 1 for path in keeps.given)
    digests = {entry: _sha256(entry) for entry in groups if entry.is_file}
    found = {}
    for path, entry in kept.items():
        apart = entry.is_symlink and not keeps.linked_symlinks
        names = [path] if apart else groups[entry]
        found[path] = Seen(
            mode=entry.mode,
            uid=entry.uid,
            gid=entry.gid,
            size=_size(entry),
            mtime_ns=_time(entry.mtime_ns, keeps),
            links=2 + below.get(path, 0) if entry.is_dir else len(names),
            group=names[0],
            major=entry.major,
            minor=entry.minor,
            target=entry.target if entry.is_symlink else None,
            xattrs={name: value.hex() for name, value in entry.xattrs.items()} if keeps.xattrs else {},
            sha256=digests.get(entry),
            data=_data(entry, keeps.holes if keeps.seeks else 0) if entry.is_file else None,
            extents=(_data(entry, keeps.holes) if keeps.extents else ()) if entry.is_file else None,
            huge=_huge(entry, keeps),
        )
    return found


def _compare(wanted: Seen, seen: Seen) -> Iterator[str]:
    for item in fields(Seen):
        want, saw = getattr(wanted, item.name), getattr(seen, item.name)
        loose = item.name in ("size", "mtime_ns", "huge") and want is None
        if item.compare and not loose and want != saw:
            yield f"{item.name}: {_short(saw)} instead of {_short(want)}"
    if seen.kind != stat.S_IFMT(seen.mode) >> 12:
        yield f"its directory entry says type {seen.kind}"
    if not seen.listed:
        yield "its directory entry has another inode number"
    if stat.S_ISREG(seen.mode):
        least = sum(-(-end // _BLOCK) - start // _BLOCK for start, end in seen.data or ())
        most = least + 1 + -(-least // 32768) + len(seen.data or ()) // 4  # attributes; extents that are elsewhere
        if not least <= seen.blocks * 512 / _BLOCK <= most:
            yield f"blocks: {seen.blocks * 512} bytes for {least * _BLOCK} bytes of data"


def _short(value: object) -> str:
    text = f"{value:#o}" if isinstance(value, int) and value > 1 << 12 and value < 1 << 17 else ascii(value)
    return text if len(text) < 300 else f"{text[:140]} … {text[-140:]}"


def _size(entry: Entry) -> int | None:
    if entry.is_dir:
        return None  # each filesystem's own
    return len(entry.target.encode(errors="surrogateescape")) if entry.is_symlink else entry.content.size


def _time(mtime_ns: int | None, keeps: Keeps) -> int | None:
    if not keeps.times:
        return None
    seconds, rest = divmod(keeps.untimed * _SECOND if mtime_ns is None else mtime_ns, _SECOND)
    if not keeps.first <= seconds <= keeps.last:
        return min(max(seconds, keeps.first), keeps.last) * _SECOND
    return seconds * _SECOND + (rest if keeps.nanoseconds else 0)


def _sha256(entry: Entry) -> str:
    total = hashlib.sha256()
    for chunk in entry.content.chunks():
        total.update(chunk)
    return total.hexdigest()


def _data(entry: Entry, unit: int) -> tuple[tuple[int, int], ...]:
    """Everything in a file, but for whole units of a sparse one in which no piece is."""
    content = entry.content
    if not unit or not isinstance(content, Sparse):
        return ((0, content.size),) if content.size else ()
    pieces = [(at, at + size) for at, _, size in content.pieces if size]
    return _runs([(start // unit * unit, end + -end % unit) for start, end in pieces], content.size)


def _runs(pieces: Sequence[Sequence[int]], size: int) -> tuple[tuple[int, int], ...]:
    """Pieces, in order, with those joined that touch, and cut at the end of the file."""
    runs: list[tuple[int, int]] = []
    for start, end in pieces:
        first = runs.pop()[0] if runs and start <= runs[-1][1] else start
        runs.append((first, min(end, size)))
    return tuple(runs)


def _huge(entry: Entry, keeps: Keeps) -> int | None:
    """Every whole huge page of a file, unless it has holes."""
    if not keeps.dax or not entry.is_file or isinstance(entry.content, Sparse):
        return None
    return entry.content.size // HUGE * HUGE
