"""Hostile layers of a million members, made up as they are read: python -m tests.bombs KIND says what became of it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Final

from osbuild.errors import InputError
from osbuild.layers import Layer, flatten
from osbuild.limits import Limits
from tests.layer_tools import header, pax

MEMBERS: Final = 1_100_000
_DEEP: Final = b"/".join([b"c" * 200] * 19)
_BATCH: Final = 200


def files(number: int) -> bytes:
    """Ordinary files with bytes in them; every number different, so that nothing is shared."""
    name = b"usr/lib/python/site-packages/package-%05d/file-name-%08d.py" % (number // 50, number)
    size, mtime = b"%011o\0" % (400 + number % 100), b"%011o\0" % (number + 10**9)
    return header(name=name, mtime=mtime, size=size) + bytes(512)


def empty(number: int) -> bytes:
    return header(name=b"f%08d" % number, mtime=b"%011o\0" % (number + 10**9))


def long_names(number: int) -> bytes:
    return pax({"path": b"%08d/" % number + _DEEP}) + header()


def directories(number: int) -> bytes:
    """Each asks for 500 directories."""
    return pax({"path": b"%08d" % number + b"/d" * 500}) + header()


def attributes(number: int) -> bytes:
    return pax({f"SCHILY.xattr.user.{number:06}-{n:02}": b"%d" % n for n in range(64)}) + header(name=b"%08d" % number)


def through_a_link(number: int) -> bytes:
    """Short names in the archive, long ones in the tree."""
    if number == 0:
        return (
            pax({"path": _DEEP + b"/x"}) + header(kind=b"5") + pax({"linkpath": _DEEP}) + header(name=b"l", kind=b"2")
        )
    return header(name=b"l/%08d" % number)


def through_many_links(number: int) -> bytes:
    """Each name is looked up in 50,000 steps."""
    if number == 0:
        target = b"x/../" * 700 + b"l%02d"
        links = [pax({"linkpath": target % (n + 1)}) + header(name=b"l%02d" % n, kind=b"2") for n in range(38)]
        return header(name=b"x", kind=b"5") + b"".join(links) + header(name=b"l38", kind=b"5")
    return header(name=b"l00/%08d/f" % number)


def whiteouts(number: int) -> bytes:
    return header(name=b"d%08d/.wh.f%08d" % (number, number))


BOMBS: Final[Mapping[str, tuple[Callable[[int], bytes], int]]] = {
    "files": (files, MEMBERS), "long names": (long_names, MEMBERS), "directories": (directories, 5000),
    "attributes": (attributes, MEMBERS), "through a link": (through_a_link, 100_000),
    "through many links": (through_many_links, 5000), "empty": (empty, MEMBERS), "whiteouts": (whiteouts, MEMBERS),
}  # fmt: skip


class MadeUp:
    """A backing that holds nothing: what is asked for is made, in batches of members of one size."""

    descriptor = -1

    def __init__(self, make: Callable[[int], bytes], members: int) -> None:
        self._make = make
        self._first = make(0)
        self._each = len(make(1))
        self._batch = b""
        self._at = -1
        self.size = len(self._first) + self._each * (members - 1)

    def read(self, offset: int, length: int) -> bytes:
        parts = []
        while length > 0 and offset < self.size:
            part = self._from(offset)[:length]
            parts.append(part)
            offset, length = offset + len(part), length - len(part)
        return b"".join(parts)

    def _from(self, offset: int) -> bytes:
        """Some bytes at an offset."""
        if offset < len(self._first):
            return self._first[offset:]
        number, skip = divmod(offset - len(self._first), self._each * _BATCH)
        if number != self._at:
            first = 1 + number * _BATCH
            self._batch, self._at = b"".join(map(self._make, range(first, first + _BATCH))), number
        return self._batch[skip : min(len(self._batch), skip + self.size - offset)]

    def check(self) -> None:
        pass


def main() -> None:
    backing = MadeUp(*BOMBS[sys.argv[1]])
    began = time.process_time()
    refusal = ""
    try:
        flatten([Layer(spool=backing, offset=0, size=backing.size, diff_id="sha256:0")], Limits())
    except InputError as refused:
        refusal = str(refused)
    json.dump({"refusal": refusal, "seconds": time.process_time() - began}, sys.stdout)


if __name__ == "__main__":
    main()
