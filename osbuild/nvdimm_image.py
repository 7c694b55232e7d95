"""A disk image that a guest can use as an NVDIMM mapped with DAX, and as an ordinary disk: the same bytes, two views.

    0        MBR 1: partitions as a block device shows them
    4 KiB    nd_pfn superblock: "this is memory; the data starts at 2 MiB"
    2 MiB    MBR 2: the same partitions in the view that starts here: what the pmem driver shows
    3 MiB    partition 1: the filesystem
    …        with verity, partition 2, on the next mebibyte: the hash tree of all of partition 1
    end      a multiple of `align`: the kernel wants a namespace to end on a boundary (memremap_compat_align)

Without the header only MBR 1 is there, and partition 1 starts at 1 MiB: a disk for VMMs that know nothing else.
The last partition reaches to the end of the disk.

Source of the superblock: struct nd_pfn_sb, drivers/nvdimm/pfn.h; of its checksum: nd_fletcher64 as the kernel's
documentation and kata-contract 5.6 describe it; of the MBR: UEFI specification 2.10, table 5.1; of the words that set
dm-verity up: Documentation/admin-guide/device-mapper/dm-init.rst and verity.rst, in the order of kata-contract 5.2.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import command, verity
from osbuild.artifacts import DiskImage, File, Verity
from osbuild.begun import Begun, beginning
from osbuild.errors import CommandError, HostError, InputError, SpecError
from osbuild.filesystem import Filesystem, Plan
from osbuild.filesystem.base import NOTHING
from osbuild.output import Hashing, flushing, nameless, writing
from osbuild.tree import Content, write_all

MIB: Final = 1 << 20
SECTOR: Final = 512
DATA_OFFSET: Final = 2 * MIB  # where the pmem driver's view starts
PARTITION_OFFSET: Final = 3 * MIB  # of the file
FILESYSTEM_START: Final = PARTITION_OFFSET - DATA_OFFSET  # in the view that DAX maps; a plain disk has the same
ALIGN: Final = 2 * MIB
FORMATS: Final = ("raw", "qcow2")
_PFN_OFFSET: Final = 4096
_MODE_RAM: Final = 1
_LINUX: Final = 0x83  # partition type
_BOOT: Final = 0x80
_PFN: Final = struct.Struct("<16s 16x 16x I HH Q Q IIII")
_DISK: Final = "/dev/vda"
_PMEM: Final = "/dev/pmem0p"


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where everything lies in the file, in bytes: both MBRs are made from this."""

    header: bool  # it can be an NVDIMM
    data: int  # start of partition 1
    tree: int  # start of partition 2, the hash tree; 0 when there is none
    total: int

    @property
    def data_size(self) -> int:
        """Bytes of partition 1."""
        return (self.tree or self.total) - self.data

    @property
    def partitions(self) -> tuple[tuple[int, int], ...]:
        """Start and size of each."""
        first = (self.data, self.data_size)
        return (first, (self.tree, self.total - self.tree)) if self.tree else (first,)

    @classmethod
    def around(cls, size: int, *, align: int = ALIGN, header: bool = True, hashed: bool = False) -> Layout:
        """The smallest for a filesystem of so many bytes."""
        check_align(align)
        data = data_start(header=header)
        end, tree = data + size, 0
        if hashed:
            tree = end + -end % MIB
            end = tree + verity.tree_size(tree - data)
        return cls(header=header, data=data, tree=tree, total=end + -end % align)

    @classmethod
    def within(cls, total: int, *, align: int = ALIGN, header: bool = True, hashed: bool = False) -> Layout:
        """The one that takes so many bytes, nearly all of them for the filesystem."""
        check_align(align)
        data = data_start(header=header)
        # A tree over everything is a little larger than one over what is left beside it: by one part in 16,000.
        tree = (total - verity.tree_size(total - data)) // MIB * MIB if hashed else 0
        if total % align or (tree or total) <= data:
            raise SpecError(f"an image cannot have {total} bytes", hint=f"a multiple of {align}, large enough")
        return cls(header=header, data=data, tree=tree, total=total)


def build_nvdimm_image(
    filesystem: Filesystem,
    plan: Plan,
    out: Path,
    *,
    name: str,
    align: int = ALIGN,
    total: int = 0,
    header: bool = True,
    hashed: bool = False,
    salt: bytes = b"",
    writable: bool = False,
    file_format: str = "raw",
    words: tuple[str, ...] = (),
    needs: int = 0,
    begun: Begun | None = None,
    known: verity.Known | None = None,
) -> DiskImage:
    """Write the image of a planned filesystem called `name`, whole or not at all.

    align: bytes the total is a multiple of, itself a multiple of 2 MiB.
    total: bytes of the whole; as few as can be when it is 0.
    header: False leaves out everything that makes it an NVDIMM: a plain disk with one partition at 1 MiB.
    hashed: with a hash tree for dm-verity, salted as all are when no salt is given.
    writable: as a disk, it is to be mounted so.
    file_format: one of FORMATS; what a guest sees is the same in both.
    words: kernel arguments that the tree needs, wherever it lies.
    needs: bytes of content, known beforehand.
    begun: the file, when some of it was written before the plan was known; it is raw, and `out` when its block ends.
    known: of a raw one, digests of blocks of partition 1 with this salt.
    """
    if total:
        layout = Layout.within(total, align=align, header=header, hashed=hashed)
    else:
        layout = Layout.around(plan.size, align=align, header=header, hashed=hashed)
    if plan.size > layout.data_size:
        raise SpecError(
            f"{name} needs {plan.size} bytes, and {layout.data_size} are left in an image of {layout.total}",
            hint="give it a larger size",
        )
    salt = salt or verity.DEFAULT_SALT
    if file_format == "raw":
        with contextlib.nullcontext(begun) if begun else beginning(out, needs=needs) as opened:
            file, root_hash = _make(out, layout, plan, salt, opened, known)
    else:
        file, root_hash = _make_converted(out, layout, plan, salt, file_format, needs)
    dax = header and file_format == "raw"  # a qcow2 file cannot be mapped
    return DiskImage(
        file=file,
        filesystem=name,
        dax=dax,
        words=(*root_words(filesystem, dax=dax, writable=writable), *words),
        disk_words=(*root_words(filesystem, dax=False, writable=writable), *words),
        format=file_format,
        writable=writable,
        verity=_verity(filesystem, layout, root_hash, salt.hex(), words, dax=dax) if hashed else None,
        skipped=len(plan.skipped),
    )


def root_words(filesystem: Filesystem, *, dax: bool, writable: bool = False) -> tuple[str, ...]:
    """The kernel words that find and mount partition 1. An NVDIMM is never written to: guests share it."""
    mount = filesystem.mount_words(dax=dax)
    if writable and not dax:
        mount = (*(word for word in mount if word not in ("ro", "rootflags=ro")), "rw")
    return (f"root={_PMEM if dax else _DISK}1", *mount)


def convert(source: int, target: int, file_format: str) -> None:
    """An open raw image as another format into another open file; the same bytes each time."""
    # Neither has a name, so that a killed run leaves nothing; qemu-img finds them by ours.
    here = f"/proc/{os.getpid()}/fd"
    program = command.find("qemu-img", package="qemu-utils")
    try:
        command.run(program, "convert", "-f", "raw", "-O", file_format, f"{here}/{source}", f"{here}/{target}")
    except CommandError as problem:
        if "No space left" in problem.tail:
            raise HostError(f"no space left for {file_format}: {problem.tail.splitlines()[-1]}") from None
        raise


def check_align(align: int) -> None:
    """SpecError for an alignment that no NVDIMM can have."""
    if align <= 0 or align % ALIGN:
        raise SpecError(f"an alignment of {align} bytes is no multiple of 2 MiB", hint="2M, 128M, 1G, …")


def mbr(partitions: Sequence[tuple[int, int]], signature: bytes) -> bytes:
    """A master boot record with one or two Linux partitions: start and size of each, in bytes."""
    entries = b""
    for start, size in partitions:
        if (start + size) // SECTOR >= 1 << 32:
            raise InputError(f"a partition that ends at {start + size} bytes; an MBR holds less than 2 TiB")
        # With a hash tree, Kata marks the first as the one to boot; nobody reads that.
        flag = _BOOT if len(partitions) > 1 and not entries else 0
        # Cylinders, heads and sectors have meant nothing for decades: the largest values say "use the LBA".
        chs = b"\xfe\xff\xff"
        entries += struct.pack("<B3sB3sII", flag, chs, _LINUX, chs, start // SECTOR, size // SECTOR)
    return bytes(440) + signature + bytes(2) + entries.ljust(64, b"\0") + b"\x55\xaa"


def pfn_superblock() -> bytes:
    """The 4096 bytes that make the kernel's nd_pfn driver present everything after 2 MiB as a DAX disk."""
    block = bytearray(4096)
    _PFN.pack_into(block, 0, b"NVDIMM_PFN_INFO\0", 0, 0, 2, DATA_OFFSET, 0, _MODE_RAM, 0, 0, ALIGN)
    struct.pack_into("<Q", block, 4088, fletcher64(bytes(block)))
    return bytes(block)


def fletcher64(block: bytes) -> int:
    """Over little-endian 32 bit words: their sum (32 bits) below, the sum of its successive values above."""
    low = high = 0
    for (word,) in struct.iter_unpack("<I", block):
        low = (low + word) & 0xFFFFFFFF
        high = (high + low) & 0xFFFFFFFF
    return high << 32 | low


def data_start(*, header: bool) -> int:
    """Where partition 1 begins in the file."""
    return PARTITION_OFFSET if header else FILESYSTEM_START


def _make(
    out: Path, layout: Layout, plan: Plan, salt: bytes, begun: Begun, known: verity.Known | None
) -> tuple[File, str]:
    """The file, and the root hash of its tree in hex (empty when it has none)."""
    descriptor = begun.descriptor
    there = begun.there(plan.contents)
    with Hashing(descriptor) as hashing:
        _write(descriptor, layout, plan, hashing.upto, there)
        begun.written.set()  # the rest is flushed while the hashes are computed, each by a thread
        hashing.upto(layout.tree or layout.total)
        root_hash = _write_tree(descriptor, layout, salt, known)
        return File(path=out, size=layout.total, sha256=hashing.finish()), root_hash


def _make_converted(
    out: Path, layout: Layout, plan: Plan, salt: bytes, file_format: str, needs: int
) -> tuple[File, str]:
    """The same in another format than raw."""
    with writing(out, needs=needs) as descriptor, nameless(out.parent) as raw:
        _write(raw, layout, plan)
        root_hash = _write_tree(raw, layout, salt)
        convert(raw, descriptor, file_format)
        with flushing(descriptor) as written, Hashing(descriptor) as hashing:
            written.set()
            size = os.fstat(descriptor).st_size
            return File(path=out, size=size, sha256=hashing.finish()), root_hash


def _write(
    descriptor: int,
    layout: Layout,
    plan: Plan,
    done: Callable[[int], None] | None = None,
    there: Mapping[int, Content] = NOTHING,
) -> None:
    """Everything but the hash tree."""
    signature = bytes.fromhex(plan.uuid[:8])
    os.ftruncate(descriptor, layout.total)
    write_all(descriptor, mbr(layout.partitions, signature), 0)
    if layout.header:
        inner = [(start - DATA_OFFSET, size) for start, size in layout.partitions]
        write_all(descriptor, pfn_superblock(), _PFN_OFFSET)
        write_all(descriptor, mbr(inner, signature), DATA_OFFSET)
    plan.write(descriptor, layout.data, done, there)


def _write_tree(descriptor: int, layout: Layout, salt: bytes, known: verity.Known | None = None) -> str:
    """The hash tree, if there is to be one: the root hash in hex."""
    if not layout.tree:
        return ""
    known = known or verity.NONE
    return verity.hash_tree(descriptor, layout.data, layout.data_size, salt, descriptor, layout.tree, known).hex()


def _verity(
    filesystem: Filesystem, layout: Layout, root_hash: str, salt: str, words: tuple[str, ...], *, dax: bool
) -> Verity:
    blocks = layout.data_size // verity.BLOCK
    sectors = layout.data_size // SECTOR

    def found_on(device: str) -> tuple[str, ...]:
        table = (
            f"0 {sectors} verity 1 {device}1 {device}2 {verity.BLOCK} {verity.BLOCK} {blocks} 0 "
            f"sha256 {root_hash} {salt}"
        )
        created = f'dm-mod.create="dm-verity,,,ro,{table}"'
        return (created, "root=/dev/dm-0", *filesystem.mount_words(dax=False), *words)

    return Verity(
        root_hash=root_hash, salt=salt, blocks=blocks, words=found_on(_DISK),
        pmem_words=found_on(_PMEM) if dax else (),
    )  # fmt: skip
