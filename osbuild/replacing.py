"""May a file be replaced? One that an earlier run of the same command wrote may, so that make can run it again.

Whether it is one, its first bytes say: of a disk image the MBR, in which there is no boot code and the first partition
starts at 1 or 3 MiB; of everything else the magic number of its format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import qcow2
from osbuild.arch import MIB
from osbuild.errors import SpecError
from osbuild.output import check_output
from osbuild.tree import quote

_HEAD: Final = 64 << 10
_BOOT_CODE: Final = 440
_FIRST_START: Final = slice(446 + 8, 446 + 12)  # of the first partition, in sectors
_STARTS: Final = frozenset((1 * MIB // 512, 3 * MIB // 512))
_PACKED: Final = (b"070701", b"\x28\xb5\x2f\xfd", b"\x1f\x8b", b"\x02\x21\x4c\x18")  # newc, zstd, gzip, lz4 (legacy)
_RULE: Final = re.compile(rb"[^\n]+: \\\n  /")


@dataclass(frozen=True, slots=True)
class _Kind:
    name: str
    begins: Callable[[bytes], bool]  # whether one of these begins so


KINDS: Final[Mapping[str, _Kind]] = {
    "image": _Kind("disk image of osbuilder's", lambda head: _is_ours(head) or head.startswith(qcow2.MAGIC)),
    "initramfs": _Kind("initramfs", lambda head: head.startswith(_PACKED)),
    "tar": _Kind("tar", lambda head: head[257:262] == b"ustar"),
    "iso": _Kind("ISO", lambda head: head[32769:32774] == b"CD001"),
    "program": _Kind("program", lambda head: head.startswith(b"\x7fELF")),
    "rules": _Kind("file of rules for make", lambda head: _RULE.match(head) is not None),
}


def check_replaceable(path: Path, kind: str, *, force: bool) -> None:
    """What can be said before any work whether a file of that kind may be written there, or take a place.

    SpecError when a file is there that is neither empty nor of that kind, and nobody says that it may go.
    """
    check_output(path)
    if force:
        return
    head = _head(path)
    if head and not KINDS[kind].begins(head):
        raise SpecError(
            f"{quote(str(path))} exists and is no {KINDS[kind].name}", hint="--force replaces it; or name another file"
        )


def _head(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    except OSError:
        return b"?"  # what we may not read, we cannot know
    try:
        return os.read(descriptor, _HEAD)
    finally:
        os.close(descriptor)


def _is_ours(head: bytes) -> bool:
    start = int.from_bytes(head[_FIRST_START], "little")
    return not any(head[:_BOOT_CODE]) and head[510:512] == b"\x55\xaa" and start in _STARTS
