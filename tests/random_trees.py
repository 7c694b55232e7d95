"""Trees made from a seed: every feature that a Tree has, in every combination that a thousand of them reach."""

from __future__ import annotations

import random
import stat
import struct
from collections.abc import Iterable
from typing import Final

from osbuild.tree import Bytes, Content, Draft, Entry, Sparse, Spool, Tree, regular

_SECOND: Final = 10**9
_MIB: Final = 1 << 20
_PATH_BYTES: Final = 3900  # of PATH_MAX; the rest is for who puts such a tree into another
_XATTR_BYTES: Final = 3900  # with the heads that ext4 gives them; its one block holds 4060

IDS: Final = (0, 1, 1000, 65534, 65535, 65536, 100_000, (1 << 31) - 1, 1 << 31, (1 << 32) - 2)
SIZES: Final = (0, 1, 2, 59, 60, 61, 160, 4000, 4095, 4096, 4097, 8191, 8192, 8193, 65535, 65536, 100_000)
LARGE_SIZES: Final = (2 * _MIB - 1, 2 * _MIB, 2 * _MIB + 1, 4 * _MIB + 4097)
TARGET_SIZES: Final = (1, 2, 30, 58, 59, 60, 61, 100, 255, 256, 1024, 4094, 4095)
PERMISSIONS: Final = (0o644, 0o755, 0o600, 0o700, 0o000, 0o4755, 0o2755, 0o6711, 0o1777, 0o7777, 0o444)
TIMES: Final = (
    0, 1, -1, 999_999_999, 1_700_000_000 * _SECOND + 123_456_789, 946_684_800 * _SECOND, -86_400 * _SECOND - 5,
    -(1 << 31) * _SECOND, ((1 << 31) - 1) * _SECOND + 999_999_999, (1 << 31) * _SECOND, ((1 << 32) - 1) * _SECOND + 7,
    (1 << 32) * _SECOND, 4_102_444_800 * _SECOND + 1, ((1 << 33) + 5) * _SECOND + 999_999_999,
    ((1 << 34) - (1 << 31) - 1) * _SECOND,
)  # fmt: skip
# Before 1901-12-13 and after 2446-05-10: more than ext4 has bits for.
FAR_TIMES: Final = (-5_000_000_000 * _SECOND + 7, 20_000_000_000 * _SECOND + 7)
_AWKWARD: Final = (
    b"lost+found", b"...", b"..a", b" ", b"\n", b"a\nb", b"-rf", b"*", b"\\", b"'", b'"', b"$x", b"\xff", b"\x80\xfe",
    b"\x7f", b"TRAILER!!!", b"\xed\xa0\x80", b".wh.a", "äöü".encode(), "日本".encode(), "e\u0301".encode(), b"CON",
    b"~", b"a:b", b"a,b",
)  # fmt: skip


def random_tree(seed: int) -> Tree:
    """The tree of a seed: the same each time."""
    return _Maker(random.Random(seed)).make()


def forest(seeds: Iterable[int]) -> Tree:
    """The trees of some seeds as directories of one, beside a directory of 5,000 names and files of some MiB."""
    chance = random.Random(0)
    draft = Draft()
    draft.put("/", Entry(mode=stat.S_IFDIR | 0o755, mtime_ns=_SECOND))
    for seed in seeds:
        for path, entry in random_tree(seed).items():
            draft.put(f"/{seed:04}{path}" if path != "/" else f"/{seed:04}", entry)
    for number in range(5000):
        draft.put(f"/many/{number:x}", regular(b"", mtime_ns=number))
    for size in LARGE_SIZES:
        draft.put(f"/large/{size}", regular(chance.randbytes(size)))
    draft.put("/large/sparse", regular(_holes()))
    draft.put("/init", regular(b"#!", 0o755))  # without which it could not be an initramfs
    return draft.tree()


def _holes() -> Content:
    """A mebibyte, a block and a byte in twelve mebibytes that hold nothing else."""
    spool = Spool()
    spool.append(random.Random(1).randbytes(_MIB + 4096 + 1))
    return Sparse(spool, 12 * _MIB, ((_MIB, 0, _MIB), (5 * _MIB, _MIB, 4096), (9 * _MIB + 77, _MIB + 4096, 1)))


class _Maker:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._draft = Draft()
        self._directories = [""]
        self._others: list[Entry] = []
        self._names: list[str] = []
        self._spool: Spool | None = None
        self._large = chance.random() < 0.12  # whether a file of megabytes may still come

    def make(self) -> Tree:
        chance = self._chance
        if chance.random() < 0.9:  # else a root that nobody described
            self._draft.put("/", self._entry(stat.S_IFDIR))
        for _ in range(chance.choice((0, 1, 3, 10, 20, 40))):
            self._add(self._kind())
        if chance.random() < 0.03:
            self._fill(chance.choice((60, 120, 300)))
        if chance.random() < 0.03:
            self._dig(chance.choice((20, 20, 20, 300, 300, 1900)))
        return self._draft.tree()

    def _kind(self) -> int:
        kinds = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK, 0)
        return self._chance.choices(kinds, (40, 18, 14, 4, 4, 4, 2, 14))[0]

    def _add(self, kind: int) -> None:
        """Another name; kind 0 makes it one of an inode that is there."""
        above = self._chance.choice(self._directories)
        path = f"{above}/{self._name()}"
        if len(path.encode(errors="surrogateescape")) > _PATH_BYTES or self._draft.get(path) is not None:
            return
        if kind == 0 and self._others:
            self._draft.put(path, self._chance.choice(self._others))
            return
        entry = self._entry(kind or stat.S_IFREG)
        self._draft.put(path, entry)
        if entry.is_dir:
            self._directories.append(path)
        else:
            self._others.append(entry)

    def _fill(self, count: int) -> None:
        """A directory of many names, of one or of many lengths."""
        chance = self._chance
        above = f"{chance.choice(self._directories)}/{self._name()}"
        if len(above.encode(errors="surrogateescape")) > _PATH_BYTES // 2 or self._draft.get(above) is not None:
            return
        longest = chance.choice((4, 12, 100, 240))
        entries = [self._entry(stat.S_IFREG, plain=True), self._entry(stat.S_IFLNK), self._entry(stat.S_IFDIR)]
        self._draft.put(above, entries[2])
        for number in range(count):
            name = f"{number:x}".ljust(chance.randint(1, longest), chance.choice("xyz"))
            kind = chance.random()
            if kind < 0.1:
                entry = self._entry(stat.S_IFDIR, plain=True)
            else:
                entry = entries[kind < 0.5] if kind < 0.7 else self._entry(stat.S_IFREG, plain=True)
            self._draft.put(f"{above}/{name}", entry)

    def _dig(self, depth: int) -> None:
        """Directories above each other, most of them described by nobody."""
        path = self._chance.choice(self._directories)
        while depth and len(path.encode(errors="surrogateescape")) < _PATH_BYTES - 2:
            path += f"/{self._chance.choice('ab')}"
            depth -= 1
            met = self._draft.get(path)
            if met is not None and not met.is_dir:
                return
        if self._draft.get(path) is None:
            self._draft.put(path, self._entry(stat.S_IFREG))

    def _name(self) -> str:
        chance = self._chance
        shape = chance.randrange(12)
        if shape < 6:
            name = bytes(chance.choice(b"abcdefgh.-_0123XYZ") for _ in range(chance.randint(1, 14)))
        elif shape == 6:
            name = chance.choice(_AWKWARD)
        elif shape == 7:
            length = chance.choice((253, 254, 255))
            name = bytes(chance.choice(b"ab\xc3\xa4\xff") for _ in range(length))
        elif shape == 8 and self._names:  # close to one that is there
            name = (chance.choice(self._names).encode(errors="surrogateescape") + chance.choice(b"~ \n0").to_bytes())[
                -255:
            ]
        else:
            name = bytes(chance.choice(range(1, 256)) for _ in range(chance.randint(1, 40))).replace(b"/", b"|")
        text = "_" if name in (b".", b"..") else name.decode(errors="surrogateescape")
        self._names.append(text)
        return text

    def _entry(self, kind: int, *, plain: bool = False) -> Entry:
        chance = self._chance
        permissions = 0o777 if kind == stat.S_IFLNK else chance.choice(PERMISSIONS)
        is_device = kind in (stat.S_IFCHR, stat.S_IFBLK)
        return Entry(
            mode=kind | permissions,
            uid=chance.choice(IDS),
            gid=chance.choice(IDS),
            mtime_ns=self._time(),
            xattrs={} if plain or chance.random() < 0.6 else self._xattrs(kind),
            target=self._target() if kind == stat.S_IFLNK else "",
            major=chance.choice((0, 1, 8, 255, 256, 4095)) if is_device else 0,
            minor=chance.choice((0, 3, 255, 256, 65535, (1 << 20) - 1)) if is_device else 0,
            content=self._content(plain=plain) if kind == stat.S_IFREG else Bytes(b""),
        )

    def _time(self) -> int:
        shape = self._chance.random()
        if shape < 0.03:
            return self._chance.choice(FAR_TIMES)
        if shape < 0.5:
            return self._chance.choice(TIMES)
        return self._chance.randint(-(1 << 31) * _SECOND, ((1 << 34) - (1 << 31) - 1) * _SECOND)

    def _target(self) -> str:
        size = self._chance.choice(TARGET_SIZES)
        return bytes(self._chance.choice(b"../aab\xff\n ") for _ in range(size)).decode(errors="surrogateescape")

    def _content(self, *, plain: bool) -> Content:
        chance = self._chance
        shape = chance.random()
        if plain:
            return Bytes(chance.randbytes(chance.choice((0, 1, 20))))
        if shape < 0.06:
            return self._sparse()
        if shape < 0.2 and self._large:
            self._large = False
            return Bytes(chance.randbytes(chance.choice(LARGE_SIZES)))
        if shape > 0.97:
            return Bytes(bytes(chance.choice(SIZES)))  # zeros that are no hole
        return Bytes(chance.randbytes(chance.choice(SIZES) if shape < 0.7 else chance.randint(0, 9000)))

    def _sparse(self) -> Content:
        """Pieces and holes, on the boundaries of blocks and off them; also nothing but a hole."""
        chance = self._chance
        size = chance.choice((1, 4096, 4097, 40_000, 40_000, 300_000, 300_000, 2 * _MIB + 1 if self._large else 4095))
        if self._spool is None:
            self._spool = Spool()
        step = chance.choice((1, 512, 4096))
        pieces: list[tuple[int, int, int]] = []
        at = 0
        for _ in range(chance.choice((0, 1, 2, 7, 30))):
            at += chance.choice((0, 1, 8, 40)) * step + bool(pieces)
            length = chance.choice((1, 100, 4096, 5000, 8192))
            if at + length > size:
                break
            pieces.append((at, self._spool.size, length))
            self._spool.append(chance.randbytes(length))
            at += length
        return Sparse(self._spool, size, tuple(pieces))

    def _xattrs(self, kind: int) -> dict[str, bytes]:
        """Attributes that the kernel lets somebody read: none of user.* but on files and directories."""
        chance = self._chance
        spaces = ["trusted.", "security."] + ["user."] * 3 * (kind in (stat.S_IFREG, stat.S_IFDIR))
        wanted: dict[str, bytes] = {}
        for _ in range(chance.choice((1, 1, 2, 3, 30))):
            name = chance.choice(spaces) + self._attribute_name()
            wanted[name] = chance.randbytes(chance.choice((0, 1, 3, 4, 5, 20, 44, 45, 64)))
        shape = chance.random()
        if shape < 0.2:
            wanted[f"{chance.choice(spaces)}large"] = chance.randbytes(chance.choice((500, 1000, 3000, 3800)))
        if shape > 0.7:
            wanted["security.selinux"] = b"system_u:object_r:bin_t:s0\0"
        if shape > 0.8 and kind == stat.S_IFREG:
            wanted["security.capability"] = struct.pack("<5I", 0x02000001, 0x3000, 0, 0, 0)
        if 0.4 < shape < 0.7 and kind != stat.S_IFLNK:
            wanted["system.posix_acl_access"] = self._acl()
            if kind == stat.S_IFDIR:
                wanted["system.posix_acl_default"] = self._acl()
        return _fitting(wanted)

    def _attribute_name(self) -> str:
        shape = self._chance.random()
        if shape < 0.05:
            return "n" * (255 - len("security."))
        if shape < 0.1:
            return self._chance.choice(("ä", "\udcff", "a b", "a\nb", "a.b", "=", "\\"))
        return "".join(self._chance.choice("abc.") for _ in range(self._chance.randint(1, 12)))

    def _acl(self) -> bytes:
        """A POSIX ACL as getxattr(2) gives it (linux/posix_acl_xattr.h): version 2, then tag, permissions, id."""
        chance = self._chance
        nobody = 0xFFFFFFFF
        users = sorted(set(chance.choices(IDS, k=chance.choice((0, 1, 3)))))
        groups = sorted(set(chance.choices(IDS, k=chance.choice((0, 1, 3)))))
        rows = [(0x01, nobody), *((0x02, user) for user in users), (0x04, nobody)]
        rows += [*((0x08, group) for group in groups), *([(0x10, nobody)] if users or groups else []), (0x20, nobody)]
        return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", tag, chance.randrange(8), who) for tag, who in rows)


def _fitting(wanted: dict[str, bytes]) -> dict[str, bytes]:
    """As many of them as every filesystem holds."""
    kept = {}
    room = _XATTR_BYTES
    for name, value in wanted.items():
        room -= 16 + len(name.encode(errors="surrogateescape")) + 4 + len(value) + 4
        if room >= 0:
            kept[name] = value
    return kept
