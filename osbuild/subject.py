"""A file that somebody asks about, opened and read: an image, a filesystem, an initramfs, a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from osbuild import qcow2
from osbuild.borrowed import Borrowed
from osbuild.disk_layout import DiskLayout, Partition, read_layout
from osbuild.errors import InputError
from osbuild.filesystem import READERS, Volume
from osbuild.kernel_file import KernelFile, read_kernel
from osbuild.tree import Tree, quote

if TYPE_CHECKING:
    from osbuild.cpio_reader import Archive

QCOW2: Final = "qcow2 image"


@dataclass(frozen=True, slots=True, kw_only=True)
class Filesystem:
    """A filesystem in an image."""

    partition: Partition
    volume: Volume


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One file: which kind it is, and what of that kind it holds. Contents lie in the file itself."""

    path: Path
    backing: Borrowed
    kind: str  # "disk image", "filesystem", "initramfs", "kernel", "qcow2 image"
    layout: DiskLayout | None = None
    filesystems: tuple[Filesystem, ...] = ()
    archive: Archive | None = None
    kernel: KernelFile | None = None
    virtual_size: int = 0  # bytes of the disk that a qcow2 file is
    problems: tuple[str, ...] = field(default=())  # of what could not be read at all

    @property
    def tree(self) -> Tree | None:
        """The one tree that it holds."""
        if self.archive is not None:
            return self.archive.tree
        return self.filesystems[0].volume.tree if self.filesystems else None


def open_subject(path: Path) -> Subject:
    """Find out what a file is, and read it. InputError for one that nothing here knows."""
    try:
        backing = Borrowed(path)
    except OSError as problem:
        raise InputError(f"cannot read {quote(str(path))}: {problem.strerror}") from None
    head = backing.read(0, 4096)
    if head.startswith(qcow2.MAGIC):
        return _qcow2(path, backing)
    kernel = read_kernel(backing)
    if kernel is not None:
        return Subject(path=path, backing=backing, kind="kernel", kernel=kernel)
    if _is_archive(head):
        return _initramfs(path, backing)
    layout = read_layout(backing)
    if layout is not None:
        return _disk(path, backing, layout)
    if not head.strip(b"\0"):
        if not backing.size:
            raise InputError(f"{quote(str(path))} is empty")
        try:
            return _initramfs(path, backing)  # zeros may come first
        except InputError:
            pass
    raise InputError(
        f"{quote(str(path))} is nothing that is known here: no disk image, filesystem ({', '.join(READERS)}), "
        "initramfs, qcow2 image or kernel"
    )


def _is_archive(head: bytes) -> bool:
    if head.startswith(b"\0"):  # as disks do; no archive does
        return False
    from osbuild import cpio_reader

    return bool(cpio_reader.compression(head))


def _initramfs(path: Path, backing: Borrowed) -> Subject:
    from osbuild import cpio_reader

    try:
        archive = cpio_reader.read(backing)
    except InputError as problem:
        raise InputError(f"{quote(str(path))}: {problem}") from None
    return Subject(path=path, backing=backing, kind="initramfs", archive=archive)


def _disk(path: Path, backing: Borrowed, layout: DiskLayout) -> Subject:
    found, problems = [], []
    for partition in layout.partitions:
        if partition.kind not in READERS:
            continue
        try:
            volume = READERS[partition.kind].read(backing.descriptor, partition.start, partition.size)
        except InputError as problem:
            problems.append(f"{called(partition)}: {problem}")
            continue
        found.append(Filesystem(partition=partition, volume=volume))
    return Subject(
        path=path, backing=backing, kind="disk image" if layout.outer or layout.inner else "filesystem",
        layout=layout, filesystems=tuple(found), problems=tuple(problems),
    )  # fmt: skip


def called(partition: Partition) -> str:
    """What a partition is called in messages."""
    return f"partition {partition.number} {partition.kind}".rstrip() if partition.number else partition.kind


def _qcow2(path: Path, backing: Borrowed) -> Subject:
    try:
        found = qcow2.read(backing)
    except InputError as problem:
        raise InputError(f"{quote(str(path))}: {problem}") from None
    return Subject(
        path=path, backing=backing, kind=QCOW2, virtual_size=found.virtual_size, problems=found.problems
    )  # fmt: skip
