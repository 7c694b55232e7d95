"""Whether the kernel would take an ext4's journal: without one that it can load, it does not mount.

Source: Documentation/filesystems/ext4/journal.rst of the kernel (the journal's superblock, big-endian).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

from osbuild.filesystem.ext4_reader_head import checksum

SIZE: Final = 1024  # bytes of its superblock
_MAGIC: Final = 0xC03B3998
_SUPERBLOCKS: Final = (3, 4)  # block types
_CHECKSUMS: Final = 0x8 | 0x10  # of version 2 and 3
_CHECKSUM_AT: Final = 0xFC


def check(block: bytes, blocks: int, block_size: int) -> Iterator[str]:
    """What is wrong with the first SIZE bytes of a journal that has so many blocks."""
    magic, kind, _, size, length, _, _, start = struct.unpack_from(">8I", block)
    (incompatible,) = struct.unpack_from(">I", block, 40)
    if magic != _MAGIC or kind not in _SUPERBLOCKS:
        yield "it does not begin with a journal's superblock: no kernel mounts this"
        return
    if kind == _SUPERBLOCKS[1] and incompatible & _CHECKSUMS:
        (said,) = struct.unpack_from(">I", block, _CHECKSUM_AT)
        found = checksum(0xFFFFFFFF, block[:_CHECKSUM_AT], bytes(4), block[_CHECKSUM_AT + 4 : SIZE])
        if said != found:
            yield f"its checksum is {said:#010x}, its bytes give {found:#010x}: no kernel mounts this"
    if size != block_size:
        yield f"its blocks have {size} bytes, the filesystem's {block_size}"
    if length > blocks:
        yield f"it says that it has {length} blocks, and has {blocks}"
    if start:
        yield "it is not empty: a kernel has to write to the filesystem before it can read it"
