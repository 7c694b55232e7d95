"""Where QEMU lays an initramfs, and whether a kernel lies there already: then the guest dies of whatever was hit.

    0 … 16 MiB   kernel: PT_LOAD segments at their physical addresses, .bss too   …   initramfs | the end of memory

hw/i386/x86.c (QEMU 7.2) puts it at the very end of the memory below 4 GiB. It refuses one that is larger than that, and
not one that reaches down into an ELF kernel.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct("<4sBB10xHHIQQQIHHH")  # of a file of 64 bits, little endian
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_LOAD: Final = 1
_MOST: Final = 64  # segments that are looked at; kernels have five
_PAGE: Final = 4096


def kernel_end(vmlinux: Path) -> int:
    """The physical address behind the last byte of its segments; 0 of what is no such file."""
    with vmlinux.open("rb") as file:
        head = file.read(_HEADER.size)
        if len(head) < _HEADER.size:
            return 0
        magic, bits, order, *_, offset, _, _, _, size, count = _HEADER.unpack(head)
        if (magic, bits, order, size) != (b"\x7fELF", 2, 1, _SEGMENT.size):
            return 0
        file.seek(offset)
        table = file.read(_SEGMENT.size * min(count, _MOST))
    whole = len(table) // _SEGMENT.size * _SEGMENT.size
    rows = _SEGMENT.iter_unpack(table[:whole])
    return max((address + size for kind, _, _, _, address, _, size, _ in rows if kind == _LOAD), default=0)


def overlap(memory: int, archive: int, kernel: int) -> int:
    """How many bytes of an archive lie where a kernel does that ends at the address `kernel`."""
    start = (memory - archive) // _PAGE * _PAGE
    return max(0, kernel - start)
