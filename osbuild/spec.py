"""What a build is asked for, as a value: the words of the command line, checked before anything slow starts."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from osbuild import networks
from osbuild.arch import Arch
from osbuild.checks import CHECKS
from osbuild.errors import SpecError
from osbuild.filesystem import FILESYSTEMS, Room
from osbuild.limits import Limits
from osbuild.nvdimm_image import ALIGN, FORMATS, Layout, check_align
from osbuild.registry_spec import RegistrySpec as RegistrySpec
from osbuild.tree import quote

if TYPE_CHECKING:
    from osbuild.oci import Platform

KINDS: Final = ("image", "initrd")
ACCELS: Final = ("auto", "kvm", "tcg")
TRANSPORTS: Final = ("auto", "serial", "vsock", "vhost-user-vsock")
MACHINES: Final = ("auto", "q35", "microvm", "virt")
ATTACHMENTS: Final = ("auto", "nvdimm", "virtio-pmem", "virtio-blk")
INITS: Final = ("agent", "systemd")
_SECONDS_MAX: Final = 86400
_GUESTS_MAX: Final = 64
_LEAST_MIB: Final = 64
_DISK_MAX: Final = 2 << 40  # what an MBR can say
_READ_ONLY: Final = frozenset(("erofs",))
_EPOCH_MAX: Final = (1 << 32) - 1  # what a cpio header can say


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestSpec:
    """How to boot what a build made: SpecError when it cannot be meant."""

    memory_mib: int = 0  # 0: as much as each guest needs
    cpus: int = 1
    accel: str = "auto"
    seconds: float = 60.0  # that a guest has to answer
    machine: str = "auto"  # QEMU's board
    attach: str = "auto"  # how it gets an image
    transport: str = "auto"  # how its agent is asked
    network: str = ""  # as networks.split reads it; empty: none
    guests: int = 1  # of each image, at the same time
    checks: tuple[str, ...] = ()  # what to look at; none: everything that takes no time

    @property
    def as_disk(self) -> bool:
        """An image is a disk for it, whatever else it could be."""
        return self.attach == "virtio-blk" or self.machine == "microvm"

    def __post_init__(self) -> None:
        _one_of("accelerator", self.accel, ACCELS)
        _one_of("transport", self.transport, TRANSPORTS)
        _one_of("machine", self.machine, MACHINES)
        _one_of("way to attach an image", self.attach, ATTACHMENTS)
        if self.machine == "microvm" and self.attach not in ("auto", "virtio-blk"):
            raise SpecError(f"a microvm takes no {self.attach}", hint="--attach virtio-blk, or --machine q35")
        if self.network:
            networks.split(self.network)
        if unknown := [name for name in self.checks if name not in CHECKS]:
            given = [f"--check {name}" for text in unknown for name in text.split(",") if name in CHECKS]
            raise SpecError(
                f"no check {', '.join(map(quote, unknown))}",
                hint=f"{' '.join(given)}: one at a time" if given else f"one of {', '.join(CHECKS)}",
            )
        if not 0 < self.seconds <= _SECONDS_MAX:
            raise SpecError(f"a guest cannot have {self.seconds:g} s to answer", hint="more than 0, at most a day")
        if self.memory_mib and self.memory_mib < _LEAST_MIB:
            raise SpecError(f"no guest boots in {self.memory_mib} MiB", hint=f"at least {_LEAST_MIB}, or 0 for enough")
        if not 1 <= self.guests <= _GUESTS_MAX:
            raise SpecError(f"{self.guests} guests cannot be looked at", hint=f"1 to {_GUESTS_MAX}")
        if self.cpus < 1:
            raise SpecError(f"a guest cannot have {self.cpus} processors", hint="1 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """A file or directory of this machine that goes into the guest's tree.

    A directory is laid over the target, what is there already staying; a file becomes the target, or goes into it
    under its own name when the target ends with a slash.
    """

    source: Path
    target: str  # absolute, in the guest

    def __post_init__(self) -> None:
        if self.target != "/":
            _guest_path("add", self.target.removesuffix("/"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RootfsSpec:
    """What the guest's tree is to be, besides what every guest needs: SpecError when it cannot be meant."""

    init: str = "agent"  # or systemd: the agent as one of its services
    agent: str = "builtin"  # or the path of an agent, or of a tarball that holds one
    slim: bool = False  # without the systemd units that a guest has no use for
    modules: Path | None = None  # a directory of kernel modules: becomes /lib/modules/RELEASE
    hooks: Path | None = None  # a directory of OCI hooks: prestart/, poststart/, poststop/
    policy: Path | None = None  # the agent's policy, in rego
    add: tuple[Addition, ...] = ()
    remove: tuple[str, ...] = ()  # absolute paths in the guest; * and ? match within one component

    def __post_init__(self) -> None:
        _one_of("init", self.init, INITS)
        if self.agent in ("", "kata"):
            raise SpecError(
                f"no agent {quote(self.agent)}",
                hint="builtin, or the path of a kata-agent or kata-static-agent.tar.zst",
            )
        for pattern in self.remove:
            _guest_path("remove", pattern)


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpec:
    """What the disk image is to be, whatever is in it: SpecError when it cannot be meant."""

    filesystem: str = "ext4"
    align: int = ALIGN  # bytes that its size is a multiple of
    size: int = 0  # bytes of the whole image; 0: as few as it needs
    free: int = 0  # bytes of free space in the filesystem at least
    writable: bool = False  # good for a guest that has a copy of its own and writes to it
    header: bool = True  # it can be an NVDIMM
    verity: bool = False  # with a hash tree
    salt: bytes = b""  # of the hash tree; made from the content when empty
    format: str = "raw"

    def __post_init__(self) -> None:
        _one_of("filesystem", self.filesystem, FILESYSTEMS)
        _one_of("format", self.format, FORMATS)
        check_align(self.align)
        if max(self.size, self.free) >= _DISK_MAX:
            raise SpecError(f"an image of {max(self.size, self.free)} bytes; it must have less than 2 TiB")
        if self.size % self.align:
            raise SpecError(
                f"an image of {self.size} bytes is no multiple of its alignment, {self.align}",
                hint="another size, or another alignment",
            )
        if self.size:
            self.layout()
        if self.verity and self.writable:
            raise SpecError(
                "an image with a hash tree cannot be written to: each write would make it a damaged one",
                hint="either verity or writable",
            )
        if self.filesystem in _READ_ONLY and (self.writable or self.free or self.size):
            raise SpecError(
                f"{self.filesystem} is read-only and as large as its content: nothing can be free, or written",
                hint="ext4 can have that",
            )

    def layout(self) -> Layout:
        """Where everything lies in an image of the size that was asked for."""
        return Layout.within(self.size, align=self.align, header=self.header, hashed=self.verity)

    @property
    def room(self) -> Room:
        """What the filesystem is to have beyond its contents."""
        size = self.layout().data_size if self.size else 0
        return Room(writable=self.writable, size=size, free=self.free)


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSpec:
    """One build: SpecError when it cannot be meant."""

    image: str
    out: Path
    arch: Arch
    kinds: tuple[str, ...] = KINDS  # what to make and boot
    disk: DiskSpec = field(default_factory=DiskSpec)
    compress: str = "zstd"
    kernel_source: str | None = None  # as kernel_sources has it; None: the pinned default
    keyring: Path | None = None  # public keys for a kernel source whose signature is checked
    features: tuple[str, ...] = ()
    lock: Path | None = None  # a lock.json: nothing is taken that is not in it
    smoke: bool = True
    guest: GuestSpec = field(default_factory=GuestSpec)
    platform: Platform | None = None  # of the image; the architecture's own when not given
    limits: Limits = field(default_factory=Limits)
    registry: RegistrySpec = field(default_factory=RegistrySpec)
    rootfs: RootfsSpec = field(default_factory=RootfsSpec)
    epoch: int | None = field(default_factory=lambda: source_date_epoch())

    def __post_init__(self) -> None:
        from osbuild.initrd import COMPRESSIONS

        _one_of("compression", self.compress, COMPRESSIONS)
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise SpecError(f"nothing to make of {quote(', '.join(self.kinds))}", hint=f"some of {', '.join(KINDS)}")


def source_date_epoch() -> int | None:
    """$SOURCE_DATE_EPOCH, the convention of reproducible-builds.org; None when it is not set."""
    text = os.environ.get("SOURCE_DATE_EPOCH")
    if text is None:
        return None
    if not re.fullmatch(r"[0-9]{1,10}", text) or int(text) > _EPOCH_MAX:
        raise SpecError(
            f"SOURCE_DATE_EPOCH is {quote(text)}", hint=f"it must be whole seconds since 1970, at most {_EPOCH_MAX}"
        )
    return int(text)


def _one_of(what: str, word: str, known: Iterable[str]) -> None:
    names = tuple(known)
    if word not in names:
        raise SpecError(f"no {what} {quote(word)}", hint=f"one of {', '.join(names)}")


def _guest_path(what: str, path: str) -> None:
    parts = path.split("/")
    if parts[0] != "" or len(parts) < 2 or "\0" in path or not {"", ".", ".."}.isdisjoint(parts[1:]):
        raise SpecError(
            f"cannot {what} {quote(path)}", hint="an absolute path in the guest, below /, without . and .. in it"
        )
