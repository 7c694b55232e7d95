"""What a Linux kernel's file says about itself: format, architecture, release; and whether all of it is there.

bzImage    "HdrS" at 0x202, its version string at 0x200 + the number at 0x20e (x86/boot.rst)
vmlinux    ELF; "Linux version …" stands among its read-only data
Image      "ARM\\x64" at 56 (arm64/booting.rst); the same string, unless it is compressed
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from osbuild.tree import Backing

_BANNER: Final = re.compile(rb"Linux version ([0-9][!-~]{0,100}) ")
_CHUNK: Final = 1 << 20
_OVERLAP: Final = 256  # bytes: longer than the banner's beginning
_MACHINES: Final = {3: "i386", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv"}
_HEADERS_MAX: Final = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFile:
    """A kernel."""

    format: str
    arch: str
    release: str  # uname -r; empty when it is not to be found
    problems: tuple[str, ...]


def read_kernel(backing: Backing) -> KernelFile | None:
    """A kernel of one of the three formats, or None."""
    head = backing.read(0, 4096)
    if head[0x202:0x206] == b"HdrS" and head[510:512] == b"\x55\xaa" and len(head) >= 0x268:
        return _bzimage(backing, head)
    if head[56:60] == b"ARM\x64" and len(head) >= 64:
        size = int.from_bytes(head[16:24], "little")
        # image_size counts what is zeroed in memory after the file, too.
        problems = () if size else ("its header says no size",)
        return KernelFile(format="arm64 Image", arch="aarch64", release=_release(backing), problems=problems)
    if head[:4] == b"\x7fELF" and len(head) >= 64 and head[4] in (1, 2) and head[5] == 1:
        release = _release(backing)
        if release:
            (machine,) = struct.unpack_from("<H", head, 18)
            return KernelFile(
                format="vmlinux (ELF)", arch=_MACHINES.get(machine, f"ELF machine {machine}"), release=release,
                problems=tuple(_elf_problems(backing, head)),
            )  # fmt: skip
    return None


def _bzimage(backing: Backing, head: bytes) -> KernelFile:
    (protocol,) = struct.unpack_from("<H", head, 0x206)
    (at,) = struct.unpack_from("<H", head, 0x20E)
    sectors = head[0x1F1] or 4
    (paragraphs,) = struct.unpack_from("<I", head, 0x1F4)
    wide = protocol >= 0x20C and head[0x236] & 1
    text = backing.read(at + 0x200, 128).split(b"\0")[0] if at else b""
    words = text.decode("ascii", errors="replace").split()
    release = words[0] if words and words[0].isprintable() else ""
    problems = []
    wanted = (sectors + 1) * 512 + paragraphs * 16
    if wanted > backing.size:
        problems.append(f"its header speaks of {wanted} bytes, and the file has {backing.size}")
    if not release:
        problems.append("its header leads to no version")
    return KernelFile(
        format=f"bzImage (boot protocol {protocol >> 8}.{protocol & 0xFF})", arch="x86_64" if wide else "i386",
        release=release, problems=tuple(problems),
    )  # fmt: skip


def _elf_problems(backing: Backing, head: bytes) -> Iterator[str]:
    """Segments that reach beyond the end."""
    wide = head[4] == 2
    (table,) = struct.unpack_from("<Q" if wide else "<I", head, 32 if wide else 28)
    size, count = struct.unpack_from("<HH", head, 54 if wide else 42)
    if size != (56 if wide else 32) or not 0 < count <= _HEADERS_MAX or table + size * count > backing.size:
        yield f"its {count} program headers of {size} bytes at {table} cannot be"
        return
    data = backing.read(table, size * count)
    for number in range(count):
        offset, length = (
            (struct.unpack_from("<Q", data, number * size + at)[0] for at in (8, 32))
            if wide
            else (struct.unpack_from("<I", data, number * size + at)[0] for at in (4, 16))
        )
        if offset + length > backing.size:
            yield f"its segment {number} ends at {offset + length}, and the file at {backing.size}"


def _release(backing: Backing) -> str:
    for at in range(0, backing.size, _CHUNK):
        found = _BANNER.search(backing.read(at, _CHUNK + _OVERLAP))
        if found:
            return found[1].decode()
    return ""
