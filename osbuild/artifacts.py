"""What passes between stages: frozen, named by nouns, knowing nothing of how it was made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from osbuild.tree import Tree

_CHUNK: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A finished file: where, how many bytes, and their sha256 in hex."""

    path: Path
    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> File:
        """Measure a file that is already there."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
            return cls(path=path, size=file.tell(), sha256=digest.hexdigest())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rootfs:
    """The guest's tree, and what starts in it."""

    tree: Tree
    init: str  # absolute path in the guest of what the kernel starts
    epoch: int  # seconds since 1970: the time of everything that we add
    agent: str = ""  # name and version of the agent in it; empty before one is installed
    agent_sha256: str = ""  # of its binary
    words: tuple[str, ...] = ()  # kernel arguments that this tree needs, wherever it lies
    dropped_xattrs: Mapping[str, int] = field(default_factory=dict)  # of the image: name -> inodes that had it
    inputs: Mapping[str, str] = field(default_factory=dict)  # what came from this machine's files: what -> digest


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskImage:
    """A disk or NVDIMM image that holds a root filesystem."""

    file: File
    filesystem: str
    dax: bool  # carries the header that makes it a DAX-capable NVDIMM
    words: tuple[str, ...]  # kernel arguments that find and mount the root on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Initrd:
    """An initramfs."""

    file: File
    compression: str
    unpacked: int  # bytes of the archive before compression
    entries: int = 0  # what it holds; the guest's tmpfs counts them
    resident: int = 0  # bytes of memory that its files take there: whole pages
    lost_xattrs: int = 0  # inodes whose extended attributes the format cannot hold
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A guest kernel: the ELF (what microvm, Firecracker and Cloud Hypervisor boot) and the compressed image."""

    vmlinux: File
    vmlinuz: File
    config: File
    release: str  # uname -r
    arch: str  # a name of arch.ARCHES
    key: str  # sha256 over everything that went in
    cached: bool  # nothing was compiled this time
    inputs: Mapping[str, Any] = field(default_factory=dict)  # JSON: what the key was made from
