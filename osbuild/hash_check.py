"""Whether a dm-verity hash tree is that of the data before it: every block's digest computed again and compared.

Made without what `verity` makes trees with, so that a mistake there is noticed here. The tree has no superblock; a salt
that nobody gives is guessed: the one that comes from the filesystem's UUID, or none.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from osbuild.errors import SpecError
from osbuild.tree import Backing, quote

BLOCK: Final = 4096
_DIGEST: Final = 32
_FAN: Final = BLOCK // _DIGEST
_BATCH: Final = 256  # blocks read at a time; a multiple of _FAN
_ZERO: Final = bytes(BLOCK)
_SAID: Final = 5  # blocks that are named


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """What somebody says of a hash tree."""

    root_hash: str  # hex; empty: not said
    salt: bytes | None = None
    blocks: int = 0  # of data; 0: not said


@dataclass(frozen=True, slots=True, kw_only=True)
class HashTree:
    """What a hash tree turned out to be."""

    root_hash: str  # computed, hex; empty when the salt is not known
    salt: str  # hex
    blocks: int
    levels: int
    checked: str  # against what
    problems: tuple[str, ...]


def parse_params(text: str) -> Claim:
    """Kata's kernel_verity_params: root_hash=…,salt=…,data_blocks=…,data_block_size=4096,hash_block_size=4096."""
    pairs = dict(pair.split("=", 1) for pair in text.split(",") if "=" in pair)
    hint = "root_hash=HEX,salt=HEX,data_blocks=N,data_block_size=4096,hash_block_size=4096"
    for name in ("data_block_size", "hash_block_size"):
        if pairs.get(name, "4096") != "4096":
            raise SpecError(f"{name}={quote(pairs[name])}: only blocks of 4096 bytes are known", hint=hint)
    if not re.fullmatch(r"[0-9]{1,15}", pairs.get("data_blocks", "0")):
        raise SpecError(f"data_blocks={quote(pairs['data_blocks'])} is no number", hint=hint)
    salt = pairs.get("salt", "")
    if not re.fullmatch(r"([0-9a-fA-F]{2})*|-", salt):
        raise SpecError(f"salt={quote(salt)} is not hex", hint=hint)
    return Claim(
        root_hash=parse_root_hash(pairs.get("root_hash", "")), salt=bytes.fromhex(salt.replace("-", "")),
        blocks=int(pairs.get("data_blocks", "0")),
    )  # fmt: skip


def parse_root_hash(text: str) -> str:
    """64 hex digits."""
    if not re.fullmatch(r"[0-9a-fA-F]{64}", text):
        raise SpecError(f"no root hash {quote(text)}", hint="64 hex digits: sha256")
    return text.lower()


def check(
    backing: Backing, data: tuple[int, int], tree: tuple[int, int], salts: Iterable[bytes], claim: Claim | None
) -> HashTree:
    """Compute everything again. `data` and `tree` are offset and size; `salts` are tried when the claim has none."""
    blocks = data[1] // BLOCK
    if claim is not None and claim.blocks:
        blocks = min(blocks, claim.blocks)
    counts = _counts(blocks)
    need = sum(counts) * BLOCK
    source = "the root hash" if claim is not None and claim.root_hash else "the data alone"
    if need > tree[1] or not counts:
        problem = f"the hash tree over {blocks} blocks takes {need} bytes, and its partition has {tree[1]}"
        return HashTree(root_hash="", salt="", blocks=blocks, levels=len(counts), checked=source, problems=(problem,))
    starts = [tree[0] + sum(counts[level + 1 :]) * BLOCK for level in range(len(counts))]
    salt = claim.salt if claim is not None else None
    if salt is None:
        salt = _guess(backing, data[0], starts[0], blocks, salts)
    if salt is None:
        problem = "the hash tree does not belong to this data, or has a salt that must be given: --verity-params"
        return HashTree(root_hash="", salt="", blocks=blocks, levels=len(counts), checked=source, problems=(problem,))
    problems: list[str] = []
    if claim is not None and claim.blocks > blocks:
        problems.append(f"the hash tree is said to be over {claim.blocks} blocks, and there are {blocks}")
    below, count = data[0], blocks
    for level, start in enumerate(starts):
        _compare(backing, below, count, start, salt, level, problems)
        below, count = start, counts[level]
    root = hashlib.sha256(salt + backing.read(starts[-1], BLOCK)).hexdigest()
    if claim is not None and claim.root_hash and claim.root_hash != root:
        problems.append(f"the hash tree's root hash is {root}, not {claim.root_hash}")
    return HashTree(
        root_hash=root, salt=salt.hex(), blocks=blocks, levels=len(counts), checked=source, problems=tuple(problems)
    )  # fmt: skip


def _counts(blocks: int) -> list[int]:
    """Blocks of each level, that over the data first."""
    counts = []
    while blocks > 1:
        blocks = -(-blocks // _FAN)
        counts.append(blocks)
    return counts


def _guess(backing: Backing, data: int, level: int, blocks: int, salts: Iterable[bytes]) -> bytes | None:
    """The salt with which at least one of the first blocks has the digest that the tree has."""
    stored = backing.read(level, BLOCK)
    for salt in salts:
        for index in range(min(_FAN, blocks)):
            block = backing.read(data + index * BLOCK, BLOCK)
            if hashlib.sha256(salt + block).digest() == stored[index * _DIGEST : (index + 1) * _DIGEST]:
                return salt
    return None


def _compare(
    backing: Backing, below: int, count: int, start: int, salt: bytes, level: int, problems: list[str]
) -> None:
    """Hold one level against the blocks that it has the digests of."""
    sha256 = hashlib.sha256
    hole = sha256(salt + _ZERO).digest()
    what = f"block {{}} of hash level {level - 1}" if level else "data block {}"
    bad = 0
    for first in range(0, count, _BATCH):
        number = min(_BATCH, count - first)
        blocks = backing.read(below + first * BLOCK, number * BLOCK)
        length = -(-number // _FAN) * BLOCK
        stored = backing.read(start + first * _DIGEST, length)
        pieces = (blocks[at : at + BLOCK] for at in range(0, len(blocks), BLOCK))
        digests = [hole if piece == _ZERO else sha256(salt + piece).digest() for piece in pieces]
        if b"".join(digests).ljust(length, b"\0") == stored:
            continue
        for index, digest in enumerate(digests):
            if digest != stored[index * _DIGEST : (index + 1) * _DIGEST]:
                bad += 1
                if bad <= _SAID:
                    problems.append(f"{what.format(first + index)} has not the digest that the hash tree has")
        if any(stored[number * _DIGEST :]):
            problems.append(f"hash level {level} has bytes after its last digest, which must be zeros")
    if bad > _SAID:
        problems.append(f"… and {bad - _SAID} more blocks whose digest is another")
