"""How much memory a guest must have for its kernel to unpack an initramfs, and for the agent to answer then.

The kernel's root is a tmpfs that takes half of the memory and has one inode for each of its pages (mm/shmem.c,
shmem_default_max_blocks); memory is there what the kernel and the archive, which stays until it is unpacked, have left.
A guest that has less loses files, those that get no inode without a word.

    memory - memory/64 - memory/410 >= kernel + archive + the largest of
        2 x pages
        2 x 4 KiB for each name
        pages + their index + what inodes, names and paths take + what a running kernel and the agent take
            + what the decompressor takes, which is at work while drivers start

1/64 is struct page, 1/410 the tables that grow with memory. No word on the kernel command line is to make that less:
initramfs_options=size=… (6.12.53 and later) or rootfstype=ramfs would, but Kata's runtimes give an initramfs no words,
and what is stated has to hold without.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from stat import S_ISSOCK
from typing import Final

from osbuild.tree import Entry, Tree

_MIB: Final = 1 << 20
KERNEL: Final = 23 * _MIB  # what is loaded of ours takes 20.2
_RUNNING: Final = 23 * _MIB
_LOW: Final = 2816 * _MIB  # of memory that QEMU's q35 has below 4 GiB; microvm has 256 MiB more
_BOUNCE: Final = 66 * _MIB  # what a kernel with memory above 4 GiB keeps for devices that cannot reach it: swiotlb
_PAGE: Final = 4096
_NAME: Final = 1536  # an inode, a name, and its place in the directory
_LINKED: Final = 8192  # init/initramfs.c remembers the first of several paths until the end, and kmalloc rounds up
_NODE: Final = 585  # of a file's index, for 64 pages; one page needs none
_TIME: Final = 24  # beside each path of a directory
# lib/decompress_unlz4.c has room for a block of 8 MiB and for it compressed; unzstd for our level's window and blocks.
_DECOMPRESSOR: Final = {"zstd": 3 * _MIB, "gzip": _MIB // 8, "lz4": 17 * _MIB, "none": 0}
_SHORT_LINK: Final = 127  # mm/shmem.c: a longer target takes a page


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What an initramfs takes in the guest."""

    resident: int  # bytes of its files' pages
    memory: int  # bytes of a guest's memory without which it cannot be unpacked; whole mebibytes


def measure(tree: Tree, *, packed: int, compress: str = "none") -> Needs:
    """For a tree whose archive has `packed` bytes once compressed with `compress`, a name of initrd.COMPRESSIONS."""
    links = Counter(entry for entry in tree.values() if not S_ISSOCK(entry.mode))
    resident = kept = 0
    for entry, names in links.items():
        pages = _pages(entry) * (names if entry.is_symlink else 1)  # the kernel makes a new one for each name
        resident += pages * _PAGE
        kept += names * _NAME + (names > 1) * _LINKED + (-(-pages // 64) + 1) * (pages > 1) * _NODE
    kept += sum(_remembered(path) for path, entry in tree.items() if entry.is_dir)
    running = _RUNNING + _DECOMPRESSOR[compress]
    space = max(2 * resident, 2 * _PAGE * links.total(), resident + kept + running)
    needed = (KERNEL + packed + space) * 2048 // 2011
    if needed > _LOW - _BOUNCE:
        needed += _BOUNCE
    return Needs(resident=resident, memory=-(-needed // _MIB) * _MIB)


def _pages(entry: Entry) -> int:
    if entry.is_symlink:
        return int(len(entry.target.encode(errors="surrogateescape")) > _SHORT_LINK)
    return -(-entry.content.size // _PAGE)


def _remembered(path: str) -> int:
    """What the kernel keeps of a directory's path until the end, when it sets its time: a power of two, by kmalloc."""
    return 1 << (len(path.encode(errors="surrogateescape")) + _TIME).bit_length()
