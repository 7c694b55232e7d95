"""ext4's extended attributes: as many as fit behind the inode, the others in one block.

    entries from the front, in a block sorted; values from the end; four zero bytes after the last entry

Source: Documentation/filesystems/ext4/attributes.rst of the kernel.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Final

from osbuild.errors import InputError
from osbuild.filesystem.ext4_format import BLOCK, EXTRA_ISIZE, INODE, checksum
from osbuild.tree import quote

_MAGIC: Final = 0xEA020000
_INSIDE: Final = INODE - 128 - EXTRA_ISIZE - 4  # bytes behind an inode's fields, without the magic number
_HEADER: Final = 32
_CHECKSUM_AT: Final = 16
_ENTRY: Final = struct.Struct("<BBHIII")
_END: Final = 4
_NAME_MAX: Final = 255
# ext4 has a number for "system.", too, but no Linux hands those out: of that name only ACLs can be read.
_PREFIXES: Final = (("user.", 1), ("trusted.", 4), ("security.", 6))
_ACLS: Final[Mapping[str, int]] = {"system.posix_acl_access": 2, "system.posix_acl_default": 3}

_Xattr = tuple[int, bytes, bytes]  # index of the prefix, rest of the name, value


def pack(xattrs: Mapping[str, bytes], path: str) -> tuple[bytes, bytes]:
    """What lies behind the inode, and the block for the rest without its checksum; either may be empty.

    InputError when they do not fit, or are of a kind that ext4 has no number for.
    """
    entries = _entries(xattrs, path)
    inside: list[_Xattr] = []
    left = _INSIDE - _END
    for entry in sorted(entries, key=lambda entry: (_size(entry), entry)):
        if _size(entry) <= left:
            inside.append(entry)
            left -= _size(entry)
    outside = [entry for entry in entries if entry not in inside]
    if sum(map(_size, outside)) > BLOCK - _HEADER - _END:
        raise InputError(f"{quote(path)}: its extended attributes do not fit into one {BLOCK} byte block")
    behind = struct.pack("<I", _MAGIC) + _area(sorted(inside, key=_order), _INSIDE, 0) if inside else b""
    return behind, _block(outside) if outside else b""


def with_checksum(block: bytes, number: int, seed: int) -> bytes:
    """A block of attributes that lies in block `number`; seed: the filesystem's."""
    total = checksum(seed, struct.pack("<Q", number), block)
    return block[:_CHECKSUM_AT] + struct.pack("<I", total) + block[_CHECKSUM_AT + 4 :]


def _entries(xattrs: Mapping[str, bytes], path: str) -> list[_Xattr]:
    """In the order in which a block must hold them."""
    found = []
    for name, value in xattrs.items():
        if name in _ACLS:
            found.append((_ACLS[name], b"", _acl(value, path)))
            continue
        for prefix, index in _PREFIXES:
            rest = name.removeprefix(prefix).encode(errors="surrogateescape")
            if name.startswith(prefix) and 0 < len(rest) <= _NAME_MAX:
                found.append((index, rest, value))
                break
        else:
            raise InputError(f"{quote(path)}: ext4 has no place for the extended attribute {quote(name)}")
    return sorted(found, key=_order)


def _order(entry: _Xattr) -> tuple[int, int, bytes]:
    return entry[0], len(entry[1]), entry[1]


def _size(entry: _Xattr) -> int:
    """Bytes of an entry and its value."""
    return _ENTRY.size + len(entry[1]) + -len(entry[1]) % 4 + len(entry[2]) + -len(entry[2]) % 4


def _area(entries: Sequence[_Xattr], space: int, base: int) -> bytes:
    """Entries from the front and values from the end of `space` bytes; offsets count from `base` before them."""
    values_at = space
    heads = bytearray()
    area = bytearray(space)
    for index, name, value in entries:
        values_at -= len(value) + -len(value) % 4
        value_at = values_at + base if value else 0
        heads += _ENTRY.pack(len(name), index, value_at, 0, len(value), _hash(name, value))
        heads += name + bytes(-len(name) % 4)
        area[values_at : values_at + len(value)] = value
    area[: len(heads)] = heads
    return bytes(area)


def _block(entries: Sequence[_Xattr]) -> bytes:
    total = 0
    for _, name, value in entries:
        total = (total << 16 ^ total >> 16 ^ _hash(name, value)) & 0xFFFFFFFF
    header = struct.pack("<IIII", _MAGIC, 1, 1, total).ljust(_HEADER, b"\0")
    return header + _area(entries, BLOCK - _HEADER, _HEADER)


def _hash(name: bytes, value: bytes) -> int:
    total = 0
    for byte in name:
        total = (total << 5 ^ total >> 27 ^ byte) & 0xFFFFFFFF
    padded = value + bytes(-len(value) % 4)
    for (word,) in struct.iter_unpack("<I", padded):
        total = (total << 16 ^ total >> 16 ^ word) & 0xFFFFFFFF
    return total


def _acl(value: bytes, path: str) -> bytes:
    """A POSIX ACL in ext4's short form (version 1) from the one that getxattr(2) gives (version 2)."""
    if len(value) < 4 or (len(value) - 4) % 8 or value[:4] != b"\2\0\0\0":
        raise InputError(f"{quote(path)}: a POSIX ACL that is none")
    short = bytearray(b"\1\0\0\0")
    for tag, permissions, identity in struct.iter_unpack("<HHI", value[4:]):
        short += struct.pack("<HH", tag, permissions)
        if tag in (0x02, 0x08):  # a named user or group
            short += struct.pack("<I", identity)
    return bytes(short)
