"""A disk image that a guest can use as an NVDIMM mapped with DAX, and as an ordinary disk: the same bytes, two views.

    0        MBR 1: partition 1 at 3 MiB of the file: what a block device shows
    4 KiB    nd_pfn superblock: "this is memory; the data starts at 2 MiB"
    2 MiB    MBR 2: partition 1 at 1 MiB of the view that starts here: what the pmem driver shows
    3 MiB    the filesystem
    end      a multiple of `align`: the kernel wants a namespace to end on a boundary (memremap_compat_align)

Source of the superblock: struct nd_pfn_sb, drivers/nvdimm/pfn.h; of its checksum: nd_fletcher64 as the kernel's
documentation and kata-contract 5.6 describe it; of the MBR: UEFI specification 2.10, table 5.1.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

from osbuild.artifacts import DiskImage, File
from osbuild.errors import InputError, SpecError
from osbuild.filesystem import Filesystem, Plan
from osbuild.output import writing
from osbuild.tree import write_all

MIB: Final = 1 << 20
SECTOR: Final = 512
DATA_OFFSET: Final = 2 * MIB  # where the pmem driver's view starts
PARTITION_OFFSET: Final = 3 * MIB  # of the file
FILESYSTEM_START: Final = PARTITION_OFFSET - DATA_OFFSET  # in the view that DAX maps; a plain disk has the same
ALIGN: Final = 2 * MIB
_PFN_OFFSET: Final = 4096
_MODE_RAM: Final = 1
_LINUX: Final = 0x83  # partition type
_PFN: Final = struct.Struct("<16s 16x 16x I HH Q Q IIII")


def build_nvdimm_image(
    filesystem: Filesystem, plan: Plan, out: Path, *, name: str, align: int = ALIGN, header: bool = True
) -> DiskImage:
    """Write the image of a planned filesystem called `name`, whole or not at all.

    align: bytes the total is a multiple of, itself a multiple of 2 MiB.
    header: False leaves out everything that makes it an NVDIMM: a plain disk with one partition at 1 MiB.
    """
    if align <= 0 or align % ALIGN:
        raise SpecError(f"an alignment of {align} bytes is no multiple of 2 MiB")
    first = PARTITION_OFFSET if header else FILESYSTEM_START
    total = first + plan.size
    total += -total % align
    signature = bytes.fromhex(plan.uuid[:8])
    with writing(out) as descriptor:
        os.ftruncate(descriptor, total)
        write_all(descriptor, mbr(first, total - first, signature), 0)
        if header:
            write_all(descriptor, pfn_superblock(), _PFN_OFFSET)
            write_all(descriptor, mbr(first - DATA_OFFSET, total - first, signature), DATA_OFFSET)
        plan.write(descriptor, first)
    device = "/dev/pmem0p1" if header else "/dev/vda1"
    return DiskImage(
        file=File.of(out),
        filesystem=name,
        dax=header,
        words=(f"root={device}", *filesystem.mount_words(dax=header)),
    )


def mbr(start: int, size: int, signature: bytes) -> bytes:
    """A master boot record with one Linux partition; start and size in bytes."""
    if size // SECTOR >= 1 << 32:
        raise InputError(f"a partition of {size} bytes; an MBR holds less than 2 TiB")
    # Cylinders, heads and sectors have meant nothing for decades: the largest values say "use the LBA".
    entry = struct.pack("<B3sB3sII", 0, b"\xfe\xff\xff", _LINUX, b"\xfe\xff\xff", start // SECTOR, size // SECTOR)
    return bytes(440) + signature + bytes(2) + entry + bytes(48) + b"\x55\xaa"


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
