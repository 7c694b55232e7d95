"""ext4's superblock and group descriptors as they are found: every field by name, every checksum recomputed.

    1024             the superblock, 1024 bytes
    next block       group descriptors, 32 bytes each, 64 with the feature 64bit

Source: Documentation/filesystems/ext4/ of the kernel (super.rst, group_descr.rst, checksums.rst), nothing else.
"""

from __future__ import annotations

import struct
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from osbuild.crc import crc32c
from osbuild.errors import InputError
from osbuild.tree import Backing, quote

SUPERBLOCK_AT: Final = 1024
SUPERBLOCK_SIZE: Final = 1024
MAGIC: Final = 0xEF53
_GROUPS_PER_READ: Final = 1 << 12

# name, offset, how struct reads it
SUPERBLOCK: Final[tuple[tuple[str, int, str], ...]] = (
    ("inodes_count", 0x0, "I"), ("blocks_count_lo", 0x4, "I"), ("r_blocks_count_lo", 0x8, "I"),
    ("free_blocks_count_lo", 0xC, "I"), ("free_inodes_count", 0x10, "I"), ("first_data_block", 0x14, "I"),
    ("log_block_size", 0x18, "I"), ("log_cluster_size", 0x1C, "I"), ("blocks_per_group", 0x20, "I"),
    ("clusters_per_group", 0x24, "I"), ("inodes_per_group", 0x28, "I"), ("mtime", 0x2C, "I"), ("wtime", 0x30, "I"),
    ("mnt_count", 0x34, "H"), ("max_mnt_count", 0x36, "H"), ("magic", 0x38, "H"), ("state", 0x3A, "H"),
    ("errors", 0x3C, "H"), ("minor_rev_level", 0x3E, "H"), ("lastcheck", 0x40, "I"), ("checkinterval", 0x44, "I"),
    ("creator_os", 0x48, "I"), ("rev_level", 0x4C, "I"), ("def_resuid", 0x50, "H"), ("def_resgid", 0x52, "H"),
    ("first_ino", 0x54, "I"), ("inode_size", 0x58, "H"), ("block_group_nr", 0x5A, "H"), ("feature_compat", 0x5C, "I"),
    ("feature_incompat", 0x60, "I"), ("feature_ro_compat", 0x64, "I"), ("uuid", 0x68, "16s"),
    ("volume_name", 0x78, "16s"), ("last_mounted", 0x88, "64s"), ("algorithm_usage_bitmap", 0xC8, "I"),
    ("prealloc_blocks", 0xCC, "B"), ("prealloc_dir_blocks", 0xCD, "B"), ("reserved_gdt_blocks", 0xCE, "H"),
    ("journal_uuid", 0xD0, "16s"), ("journal_inum", 0xE0, "I"), ("journal_dev", 0xE4, "I"), ("last_orphan", 0xE8, "I"),
    ("hash_seed", 0xEC, "16s"), ("def_hash_version", 0xFC, "B"), ("jnl_backup_type", 0xFD, "B"),
    ("desc_size", 0xFE, "H"), ("default_mount_opts", 0x100, "I"), ("first_meta_bg", 0x104, "I"),
    ("mkfs_time", 0x108, "I"), ("jnl_blocks", 0x10C, "68s"), ("blocks_count_hi", 0x150, "I"),
    ("r_blocks_count_hi", 0x154, "I"), ("free_blocks_count_hi", 0x158, "I"), ("min_extra_isize", 0x15C, "H"),
    ("want_extra_isize", 0x15E, "H"), ("flags", 0x160, "I"), ("raid_stride", 0x164, "H"), ("mmp_interval", 0x166, "H"),
    ("mmp_block", 0x168, "Q"), ("raid_stripe_width", 0x170, "I"), ("log_groups_per_flex", 0x174, "B"),
    ("checksum_type", 0x175, "B"), ("encryption_level", 0x176, "B"), ("kbytes_written", 0x178, "Q"),
    ("snapshot_inum", 0x180, "I"), ("snapshot_id", 0x184, "I"), ("snapshot_r_blocks_count", 0x188, "Q"),
    ("snapshot_list", 0x190, "I"), ("error_count", 0x194, "I"), ("first_error_time", 0x198, "I"),
    ("first_error_ino", 0x19C, "I"), ("first_error_block", 0x1A0, "Q"), ("first_error_func", 0x1A8, "32s"),
    ("first_error_line", 0x1C8, "I"), ("last_error_time", 0x1CC, "I"), ("last_error_ino", 0x1D0, "I"),
    ("last_error_line", 0x1D4, "I"), ("last_error_block", 0x1D8, "Q"), ("last_error_func", 0x1E0, "32s"),
    ("mount_opts", 0x200, "64s"), ("usr_quota_inum", 0x240, "I"), ("grp_quota_inum", 0x244, "I"),
    ("overhead_blocks", 0x248, "I"), ("backup_bgs_0", 0x24C, "I"), ("backup_bgs_1", 0x250, "I"),
    ("encrypt_algos", 0x254, "4s"), ("encrypt_pw_salt", 0x258, "16s"), ("lpf_ino", 0x268, "I"),
    ("prj_quota_inum", 0x26C, "I"), ("checksum_seed", 0x270, "I"), ("wtime_hi", 0x274, "B"), ("mtime_hi", 0x275, "B"),
    ("mkfs_time_hi", 0x276, "B"), ("lastcheck_hi", 0x277, "B"), ("first_error_time_hi", 0x278, "B"),
    ("last_error_time_hi", 0x279, "B"), ("encoding", 0x27C, "H"), ("encoding_flags", 0x27E, "H"),
    ("orphan_file_inum", 0x280, "I"), ("checksum", 0x3FC, "I"),
)  # fmt: skip
_TEXTS: Final = frozenset(("volume_name", "last_mounted", "first_error_func", "last_error_func", "mount_opts"))

COMPAT: Final[Mapping[int, str]] = {
    0x1: "dir_prealloc", 0x2: "imagic_inodes", 0x4: "has_journal", 0x8: "ext_attr", 0x10: "resize_inode",
    0x20: "dir_index", 0x40: "lazy_bg", 0x80: "exclude_inode", 0x100: "exclude_bitmap", 0x200: "sparse_super2",
    0x400: "fast_commit", 0x800: "stable_inodes", 0x1000: "orphan_file",
}  # fmt: skip
INCOMPAT: Final[Mapping[int, str]] = {
    0x1: "compression", 0x2: "filetype", 0x4: "needs_recovery", 0x8: "journal_dev", 0x10: "meta_bg", 0x40: "extents",
    0x80: "64bit", 0x100: "mmp", 0x200: "flex_bg", 0x400: "ea_inode", 0x1000: "dirdata", 0x2000: "metadata_csum_seed",
    0x4000: "large_dir", 0x8000: "inline_data", 0x10000: "encrypt", 0x20000: "casefold",
}  # fmt: skip
RO_COMPAT: Final[Mapping[int, str]] = {
    0x1: "sparse_super", 0x2: "large_file", 0x4: "btree_dir", 0x8: "huge_file", 0x10: "uninit_bg", 0x20: "dir_nlink",
    0x40: "extra_isize", 0x80: "snapshot", 0x100: "quota", 0x200: "bigalloc", 0x400: "metadata_csum", 0x800: "replica",
    0x1000: "read-only", 0x2000: "project", 0x4000: "shared_blocks", 0x8000: "verity", 0x10000: "orphan_present",
}  # fmt: skip
# What changes how names, inodes or contents are found, and is understood here.
_READABLE: Final = 0x2 | 0x4 | 0x40 | 0x80 | 0x100 | 0x200 | 0x2000 | 0x4000

# name, offset, bytes
GROUP_FIELDS: Final[tuple[tuple[str, int, int], ...]] = (
    ("block_bitmap_lo", 0x0, 4), ("inode_bitmap_lo", 0x4, 4), ("inode_table_lo", 0x8, 4),
    ("free_blocks_count_lo", 0xC, 2), ("free_inodes_count_lo", 0xE, 2), ("used_dirs_count_lo", 0x10, 2),
    ("flags", 0x12, 2), ("exclude_bitmap_lo", 0x14, 4), ("block_bitmap_csum_lo", 0x18, 2),
    ("inode_bitmap_csum_lo", 0x1A, 2), ("itable_unused_lo", 0x1C, 2), ("checksum", 0x1E, 2),
    ("block_bitmap_hi", 0x20, 4), ("inode_bitmap_hi", 0x24, 4), ("inode_table_hi", 0x28, 4),
    ("free_blocks_count_hi", 0x2C, 2), ("free_inodes_count_hi", 0x2E, 2), ("used_dirs_count_hi", 0x30, 2),
    ("itable_unused_hi", 0x32, 2), ("exclude_bitmap_hi", 0x34, 4), ("block_bitmap_csum_hi", 0x38, 2),
    ("inode_bitmap_csum_hi", 0x3A, 2),
)  # fmt: skip
_GROUP: Final = struct.Struct("<IIIHHHHIHHHH")
_GROUP_HIGH: Final = struct.Struct("<IIIHHHHIHH")


class DamageError(Exception):
    """Something is not as the format says; whoever knows where we are adds that."""


class Disk:
    """The bytes of a filesystem that lies in a file, and nothing around them."""

    def __init__(self, backing: Backing, offset: int, size: int) -> None:
        self.backing = backing
        self.offset = offset
        self.size = max(0, min(size, backing.size - offset))

    def read(self, at: int, length: int) -> bytes:
        """`length` bytes; DamageError where they are not there."""
        if at < 0 or at + length > self.size:
            raise DamageError(f"bytes {at} to {at + length} are beyond the {self.size} that are there")
        data = self.backing.read(self.offset + at, length)
        if len(data) < length:
            raise DamageError(f"bytes {at} to {at + length} cannot be read")
        return data


def checksum(seed: int, *parts: bytes | memoryview) -> int:
    """crc32c as ext4 takes it: from a seed, without the inversions at both ends."""
    value = seed ^ 0xFFFFFFFF
    for part in parts:
        value = crc32c(part, value)
    return value ^ 0xFFFFFFFF


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What the rest of the reader needs of it."""

    raw: Mapping[str, int | bytes]  # every field by its name
    blocks: int
    block_size: int
    groups: int
    inode_size: int
    group_size: int  # of one descriptor
    csum: bool  # metadata_csum: everything has a crc32c
    wide: bool  # 64bit
    typed: bool  # filetype: directories say what their entries are
    seed: int  # what they start from

    def number(self, name: str) -> int:
        """A field that is a number."""
        value = self.raw[name]
        assert isinstance(value, int)
        return value

    def has(self, kind: str, feature: str) -> bool:
        """Whether a feature is on; `kind` is compat, incompat or ro_compat."""
        names = {"compat": COMPAT, "incompat": INCOMPAT, "ro_compat": RO_COMPAT}[kind]
        return any(self.number(f"feature_{kind}") & bit for bit, name in names.items() if name == feature)

    @property
    def first_block(self) -> int:
        """Of the first group: block 0 holds the boot sector alone when blocks have 1024 bytes."""
        return self.number("first_data_block")

    @property
    def per_group(self) -> int:
        return self.number("blocks_per_group")

    @property
    def uuid(self) -> str:
        return str(uuid.UUID(bytes=bytes(_bytes(self.raw["uuid"]))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One group's descriptor."""

    block_bitmap: int
    inode_bitmap: int
    inode_table: int
    free_blocks: int
    free_inodes: int
    directories: int
    flags: int
    unused: int  # inodes at the end of its table that never held anything
    block_bitmap_csum: int
    inode_bitmap_csum: int


def _bytes(value: int | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


def read_superblock(disk: Disk, problems: list[str]) -> Superblock:
    """The superblock; InputError when nothing can be read with it."""
    try:
        block = disk.read(SUPERBLOCK_AT, SUPERBLOCK_SIZE)
    except DamageError as damage:
        raise InputError(f"no ext4 superblock: {damage}") from None
    raw: dict[str, int | bytes] = {name: struct.unpack_from("<" + code, block, at)[0] for name, at, code in SUPERBLOCK}
    magic = int.from_bytes(block[56:58], "little")
    if magic != MAGIC:
        raise InputError(f"no ext4 superblock: its magic number is {magic:#06x}, not {MAGIC:#06x}")
    _check_features(raw)
    found = _measured(raw)
    if found.csum:
        given, wanted = found.number("checksum"), checksum(0xFFFFFFFF, block[:-4])
        if given != wanted:
            problems.append(f"the superblock's checksum is {given:#010x}, its bytes give {wanted:#010x}")
    if not found.number("state") & 1:
        problems.append("the superblock says that the filesystem was not unmounted cleanly")
    if found.number("state") & 2:
        problems.append("the superblock says that errors were found")
    if found.has("incompat", "needs_recovery"):
        problems.append("the journal holds changes that are not in the filesystem yet: it needs recovery")
    there, wanted_size = disk.size, found.blocks * found.block_size
    if there < wanted_size:
        problems.append(f"the superblock speaks of {wanted_size} bytes, of which {there} are there")
    return found


def _check_features(raw: Mapping[str, int | bytes]) -> None:
    wanted, revision = raw["feature_incompat"], raw["rev_level"]
    assert isinstance(wanted, int)
    assert isinstance(revision, int)
    unknown = wanted & ~_READABLE
    if revision != 1:
        raise InputError(f"ext4 of revision {revision}; this reader knows 1")
    if unknown:
        raise InputError(f"ext4 with features that this reader does not know: {', '.join(names(unknown, INCOMPAT))}")


def _measured(raw: Mapping[str, int | bytes]) -> Superblock:
    """What follows from the fields; InputError where they contradict the format or each other."""
    number = {name: value for name, value in raw.items() if isinstance(value, int)}
    if number["log_block_size"] > 6:
        raise InputError(f"the superblock's log_block_size is {number['log_block_size']}; 6 is the most, for 64 KiB")
    size = 1024 << number["log_block_size"]
    wide = bool(number["feature_incompat"] & 0x80)
    blocks = number["blocks_count_lo"] | (number["blocks_count_hi"] << 32 if wide else 0)
    per_group, inodes = number["blocks_per_group"], number["inodes_per_group"]
    first = number["first_data_block"]
    inode_size = number["inode_size"]
    group_size = number["desc_size"] if wide else 32
    bigalloc = number["feature_ro_compat"] & 0x200
    rules = (
        (first == (size == 1024) or (bigalloc and first == 0), f"first_data_block is {first}"),
        (blocks > first, f"it has {blocks} blocks"),
        (bigalloc or (256 <= per_group <= 8 * size and per_group % 8 == 0), f"blocks_per_group is {per_group}"),
        (per_group >= 256, f"blocks_per_group is {per_group}"),
        (128 <= inode_size <= size and inode_size & (inode_size - 1) == 0, f"inode_size is {inode_size}"),
        (0 < inodes <= 8 * size and inodes * inode_size % size == 0, f"inodes_per_group is {inodes}"),
        (32 <= group_size <= size and group_size & (group_size - 1) == 0, f"desc_size is {group_size}"),
        (not wide or group_size >= 64, f"desc_size is {group_size} although the feature 64bit is on"),
    )
    for good, what in rules:
        if not good:
            raise InputError(f"the ext4 superblock cannot be: {what}, blocks have {size} bytes")
    groups = -(-(blocks - first) // per_group)
    seed = number["checksum_seed"] if number["feature_incompat"] & 0x2000 else checksum(0xFFFFFFFF, _bytes(raw["uuid"]))
    return Superblock(
        raw=raw, blocks=blocks, block_size=size, groups=groups, inode_size=inode_size, group_size=group_size,
        csum=bool(number["feature_ro_compat"] & 0x400), wide=wide, typed=bool(number["feature_incompat"] & 2),
        seed=seed,
    )  # fmt: skip


def facts(superblock: Superblock) -> dict[str, str]:
    """Every field as text, in the superblock's order."""
    found = {}
    for name, value in superblock.raw.items():
        if name.startswith("feature_"):
            known = {"compat": COMPAT, "incompat": INCOMPAT, "ro_compat": RO_COMPAT}[name.removeprefix("feature_")]
            assert isinstance(value, int)
            found[name] = " ".join(names(value, known))
        elif isinstance(value, bytes):
            found[name] = quote(value.rstrip(b"\0").decode(errors="surrogateescape")) if name in _TEXTS else value.hex()
        else:
            found[name] = f"{value:#x}" if "checksum" in name or name == "magic" else str(value)
    return found


def names(bits: int, known: Mapping[int, str]) -> list[str]:
    """Features by name, unknown ones by number."""
    return [known.get(1 << shift, f"{1 << shift:#x}") for shift in range(32) if bits >> shift & 1]


def read_groups(disk: Disk, superblock: Superblock, problems: list[str]) -> list[Group]:
    """The descriptors of all groups that begin in what is there: a number in the superblock asks for no more."""
    groups: list[Group] = []
    there = -(-(disk.size // superblock.block_size - superblock.first_block) // superblock.per_group)
    try:
        for number, data in _descriptors(disk, superblock, min(superblock.groups, there)):
            _check_descriptor(superblock, number, data, problems)
            groups.append(_group(data))
    except DamageError as damage:
        problems.append(f"{superblock.groups} group descriptors, but {damage}")
    return groups


def _descriptors(disk: Disk, superblock: Superblock, groups: int) -> Iterator[tuple[int, bytes]]:
    size = superblock.group_size
    start = (superblock.first_block + 1) * superblock.block_size
    for first in range(0, groups, _GROUPS_PER_READ):
        count = min(_GROUPS_PER_READ, groups - first)
        data = disk.read(start + first * size, count * size)
        for index in range(count):
            yield first + index, data[index * size : (index + 1) * size]


def _check_descriptor(superblock: Superblock, number: int, data: bytes, problems: list[str]) -> None:
    head = struct.pack("<I", number)
    given = int.from_bytes(data[0x1E:0x20], "little")
    if superblock.csum:
        wanted = checksum(superblock.seed, head, data[:0x1E], bytes(2), data[0x20:]) & 0xFFFF
    elif superblock.has("ro_compat", "uninit_bg"):
        wanted = _crc16(_bytes(superblock.raw["uuid"]) + head + data[:0x1E] + data[0x20:])
    else:
        return
    if given != wanted:
        problems.append(f"group {number}: its descriptor's checksum is {given:#06x}, its bytes give {wanted:#06x}")


def _group(data: bytes) -> Group:
    low = _GROUP.unpack_from(data)
    high = _GROUP_HIGH.unpack_from(data, 32) if len(data) >= 64 else (0,) * 10
    return Group(
        block_bitmap=low[0] | high[0] << 32, inode_bitmap=low[1] | high[1] << 32, inode_table=low[2] | high[2] << 32,
        free_blocks=low[3] | high[3] << 16, free_inodes=low[4] | high[4] << 16, directories=low[5] | high[5] << 16,
        flags=low[6], unused=low[10] | high[6] << 16,
        block_bitmap_csum=low[8] | high[8] << 16, inode_bitmap_csum=low[9] | high[9] << 16,
    )  # fmt: skip


def _crc16(data: bytes) -> int:
    """CRC-16 with the polynomial 0x8005, reflected, from 0xffff: what uninit_bg has instead of crc32c."""
    value = 0xFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ (0xA001 if value & 1 else 0)
    return value
