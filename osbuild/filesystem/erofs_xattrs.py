"""Extended attributes as erofs stores them: behind each inode, or once for all the inodes that have the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from osbuild.errors import InputError
from osbuild.filesystem import erofs_format as disk
from osbuild.tree import quote

_NAME_MAX: Final = 255
_VALUE_MAX: Final = 0xFFFF
_SHARED_MAX: Final = 255  # of one inode
_SPACE_MAX: Final = disk.XATTR_HEADER.size + 4 * 0xFFFE  # of one inode

_Xattr = tuple[int, bytes, bytes]  # index of the prefix, rest of the name, value


class SharedXattrs:
    """The attributes that are shared because that takes fewer bytes, and where each of them is."""

    def __init__(self, users: Iterable[tuple[str, Mapping[str, bytes]]]) -> None:
        """`users`: the path and the attributes of every inode that has any."""
        count: Counter[_Xattr] = Counter()
        for path, xattrs in users:
            count.update(_split(path, xattrs))
        area = bytearray()
        self._places: dict[_Xattr, int] = {}
        for xattr, users_of_it in sorted(count.items()):
            size = _size(xattr)
            if users_of_it * size > users_of_it * 4 + size:
                self._places[xattr] = len(area) // 4
                area += _packed(xattr)
        self.area = bytes(area)

    def pack(self, path: str, xattrs: Mapping[str, bytes]) -> bytes:
        """What stands behind the inode; InputError when it cannot hold that much."""
        listed = _split(path, xattrs)
        shared = [xattr for xattr in listed if xattr in self._places][:_SHARED_MAX]
        own = [xattr for xattr in listed if xattr not in shared]
        data = disk.XATTR_HEADER.pack(0, len(shared))
        data += b"".join(self._places[xattr].to_bytes(4, "little") for xattr in shared)
        data += b"".join(_packed(xattr) for xattr in own)
        if len(data) > _SPACE_MAX:
            raise InputError(
                f"{quote(path)}: its extended attributes take {len(data)} bytes; erofs has room for {_SPACE_MAX}"
            )
        return data


def count_field(size: int) -> int:
    """How an inode says that `size` bytes of attributes follow it."""
    return (size - disk.XATTR_HEADER.size) // 4 + 1 if size else 0


def _split(path: str, xattrs: Mapping[str, bytes]) -> list[_Xattr]:
    found = []
    for name, value in xattrs.items():
        index, rest = _index(path, name)
        if len(rest) > _NAME_MAX or len(value) > _VALUE_MAX:
            raise InputError(
                f"{quote(path)}: the extended attribute {quote(name)} has {len(value)} bytes; erofs holds "
                f"names of up to {_NAME_MAX} bytes after the prefix and values of up to {_VALUE_MAX}"
            )
        found.append((index, rest, value))
    return sorted(found)


def _index(path: str, name: str) -> tuple[int, bytes]:
    if name in disk.ACLS:
        return disk.ACLS[name], b""
    for prefix, index in disk.XATTR_PREFIXES:
        if name.startswith(prefix):
            return index, name.removeprefix(prefix).encode(errors="surrogateescape")
    raise InputError(f"{quote(path)}: erofs has no place for the extended attribute {quote(name)}")


def _size(xattr: _Xattr) -> int:
    return (disk.XATTR_ENTRY.size + len(xattr[1]) + len(xattr[2]) + 3) & ~3


def _packed(xattr: _Xattr) -> bytes:
    index, name, value = xattr
    return (disk.XATTR_ENTRY.pack(len(name), index, len(value)) + name + value).ljust(_size(xattr), b"\0")
