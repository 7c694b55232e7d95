"""What a runtime takes and gives: a machine to be, and a guest that is."""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from osbuild import initrd_memory
from osbuild.arch import Arch
from osbuild.artifacts import DiskImage, Initrd, Kernel
from osbuild.network.base import GuestNetwork
from osbuild.runtime.accel import Accel
from osbuild.runtime.channel import Channel
from osbuild.runtime.qmp import Qmp
from osbuild.runtime.shares import Shares

CONSOLE: Final = "console.log"  # in the work directory: what the guest wrote to its first serial port

PLUGGED_MIB: Final = 256  # two of Linux's blocks of memory on x86_64, or on arm64 with pages of 4 KiB
VIRTIO_MEM: Final = "plugged"  # of a pluggable machine: the device's id


def make_nonce() -> str:
    """What tells this run's guest from any other's: it goes on the kernel command line, and comes back in the log."""
    return secrets.token_hex(8)


def least_memory(root: DiskImage | Initrd, kernel: Kernel) -> int:
    """Bytes of memory below which a guest cannot work.

    An initramfs says what it needs under a kernel like ours, and a larger one has as much less to give. A DAX image
    needs 64 bytes (struct page) for each of its pages.
    """
    if isinstance(root, DiskImage):
        return root.file.size // 64 if root.dax else 0
    return root.memory + max(kernel.vmlinux.size - initrd_memory.KERNEL, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What to boot, and how large; nothing of how a VMM spells it."""

    kernel: Kernel
    root: DiskImage | Initrd
    memory_mib: int = 256
    cpus: int = 1
    accel: str = "auto"  # or "kvm" or "tcg"
    board: str = "auto"  # of spec.MACHINES
    attach: str = "auto"  # of spec.ATTACHMENTS: how an image is given to it
    transport: str = "auto"  # of spec.TRANSPORTS
    mac: str = ""  # of a network card that leads nowhere; empty: none
    network: str = ""  # of network.NETWORKS: a card that leads somewhere; empty: none
    pluggable: bool = False  # there is room for one more processor, and for PLUGGED_MIB of memory in each way
    shares: bool = False  # it shares directories with this host, by each way that there is here
    words: tuple[str, ...] = ()  # the user's kernel arguments, after all of ours
    agent: str = ""  # name and version of the agent that should answer; empty: any
    nonce: str = field(default_factory=make_nonce)

    @property
    def arch(self) -> str:
        """A name of arch.ARCHES."""
        return self.kernel.arch

    @property
    def inputs(self) -> tuple[Path, ...]:
        """The files a guest reads, which it must not have changed afterwards."""
        return (self.kernel.vmlinux.path, self.kernel.vmlinuz.path, self.root.file.path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A VMM that was started. Whether a guest lives in it only the agent can say."""

    process: subprocess.Popen[bytes]
    console: Path
    log: Path
    agent: Path  # a unix socket; what the agent reads from its serial channel is written here
    channel: Channel  # how the agent is to be asked
    command: tuple[str, ...]
    accel: Accel
    monitor: Qmp
    network: GuestNetwork | None  # what its card is connected to
    shares: Shares | None
    started: float  # time.monotonic()
    disk_limit: int = 0  # bytes that the guest may write to its disk before it is ended; 0: it cannot write
    facts: Mapping[str, str] = field(default_factory=dict)  # for the report's `machine`


class Runtime(Protocol):
    """A VMM. A module with these functions and a row in RUNTIMES is one."""

    def ready(self, arch: Arch, wish: str) -> tuple[Path, Accel]:
        """The VMM's program, and what its guests run on; HostError when this host lacks it."""
        ...

    def missing_for_nvdimm(self, arch: Arch) -> str:
        """Debian's package without which its guests of this architecture have no NVDIMM; empty when nothing is."""
        ...

    def refuse_what_cannot_boot(self, machine: Machine) -> None:
        """SpecError for a machine of which it can be known, before it is started, that it cannot work."""
        ...

    def start(self, machine: Machine, work: Path) -> AbstractContextManager[Guest]:
        """Start the machine; at the end of the block nothing of it is left but the files in `work`.

        HostError when this host cannot; a guest that fails is not an error.
        """
        ...
