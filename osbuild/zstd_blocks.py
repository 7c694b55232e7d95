"""Where the blocks of zstd frames end, without unpacking or proving anything.

    magic | descriptor | window? | dictionary? | content size? | blocks | checksum?
    block: 3 bytes, little endian: last (1 bit), type (2), size (21) | bytes

Source: RFC 8878, 3.1.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from osbuild.content import Backing

MAGIC: Final = b"\x28\xb5\x2f\xfd"
BLOCK_MAX: Final = 128 << 10
_RLE: Final = 1  # one byte, `size` times
_RESERVED: Final = 3
_CHECKSUM: Final = 4


def block_ends(file: Backing) -> Iterator[int]:
    """The end of each block of one frame after the other; a frame's last block ends with the frame.

    No more, and no word, from where something else begins.
    """
    at = 0
    while True:
        head = file.read(at, 5)
        if len(head) < 5 or not head.startswith(MAGIC):
            return
        at += _header_size(head[4])
        last = False
        while not last:
            header = file.read(at, 3)
            word = int.from_bytes(header, "little")
            last, kind, size = bool(word & 1), word >> 1 & 3, word >> 3
            at += 3 + (1 if kind == _RLE else size)
            if last and head[4] & _CHECKSUM:
                at += 4
            if len(header) < 3 or kind == _RESERVED or size > BLOCK_MAX or at > file.size:
                return
            yield at


def _header_size(descriptor: int) -> int:
    single = descriptor >> 5 & 1  # no window, for the content is one
    dictionary = (0, 1, 2, 4)[descriptor & 3]
    content = (single, 2, 4, 8)[descriptor >> 6]
    return 5 + (1 - single) + dictionary + content
