"""What passes between stages: frozen, named by nouns, knowing nothing of how it was made."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"path": str(self.path), "size": self.size, "sha256": self.sha256}

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
    agent_inputs: Mapping[str, Any] = field(default_factory=dict)  # JSON: what it was compiled from, if it was
    words: tuple[str, ...] = ()  # kernel arguments that this tree needs, wherever it lies
    dropped_xattrs: Mapping[str, int] = field(default_factory=dict)  # of the image: name -> inodes that had it
    inputs: Mapping[str, str] = field(default_factory=dict)  # what came from this machine's files: what -> digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Verity:
    """What a kernel must be told to check every block of an image's partition 1 against the tree in partition 2."""

    root_hash: str  # hex
    salt: str  # hex
    blocks: int  # of data, from the start of partition 1
    words: tuple[str, ...]  # kernel arguments instead of the image's own: it is a disk
    pmem_words: tuple[str, ...] = ()  # it is an NVDIMM, mounted without DAX; empty when it cannot be one

    @property
    def params(self) -> str:
        """The same as Kata's `kernel_verity_params`."""
        return (
            f"root_hash={self.root_hash},salt={self.salt},data_blocks={self.blocks},"
            "data_block_size=4096,hash_block_size=4096"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskImage:
    """A disk or NVDIMM image that holds a root filesystem."""

    file: File
    filesystem: str
    dax: bool  # to be an NVDIMM: it has the header, and is no qcow2
    words: tuple[str, ...]  # kernel arguments that find and mount the root on it
    disk_words: tuple[str, ...] = ()  # the same when it is a disk, whatever else it can be
    format: str = "raw"  # of the file; or qcow2
    writable: bool = False  # a guest with a copy of its own may write to it: as a disk it is mounted rw
    verity: Verity | None = None
    skipped: int = 0  # paths of the tree that a filesystem cannot hold: sockets

    @property
    def verified(self) -> bool:
        """Whether `words` mount it through dm-verity."""
        return any(word.startswith("root=/dev/dm-") for word in self.words)

    def as_disk(self) -> DiskImage:
        """The same file, booted as a disk."""
        return replace(self, dax=False, words=self.disk_words)

    def through_verity(self, *, pmem: bool = False) -> DiskImage:
        """The same file, booted as a disk (or as an NVDIMM) whose every block is checked; then nothing is mapped."""
        assert self.verity is not None
        if pmem:
            return replace(self, words=self.verity.pmem_words)
        return replace(self, dax=False, words=self.verity.words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Initrd:
    """An initramfs."""

    file: File
    compression: str
    unpacked: int  # bytes of the archive before compression
    entries: int = 0  # what it holds; the guest's tmpfs counts them
    resident: int = 0  # bytes of memory that its files take there: whole pages
    memory: int = 0  # bytes of memory without which a guest cannot unpack it, see initrd_memory; 0 when nobody knows
    skipped: int = 0  # names of sockets, which nobody would listen to
    lost_xattrs: int = 0  # inodes whose extended attributes the format cannot hold
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A guest kernel: what VMMs boot as it is (an ELF on x86_64, an Image on aarch64), and the compressed image."""

    vmlinux: File
    vmlinuz: File
    config: File
    release: str  # uname -r
    arch: str  # a name of arch.ARCHES
    key: str  # sha256 over everything that went in
    cached: bool  # nothing was compiled this time
    inputs: Mapping[str, Any] = field(default_factory=dict)  # JSON: what the key was made from
    extras: tuple[File, ...] = ()  # System.map and kernel.json, where it was built
