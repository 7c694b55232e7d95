"""One row per architecture: every place that spells it differently."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from osbuild.errors import SpecError

MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """How the kernel, OCI, QEMU and the toolchain each name one architecture."""

    name: str  # uname -m
    oci: str  # image config "architecture"
    kernel: str  # ARCH= of the kernel's Makefile
    kernel_image: str  # the compressed image, below the build directory
    cross_compile: str  # CROSS_COMPILE= where the host is another architecture
    elf_machine: int  # e_machine
    qemu: str  # qemu-system-…
    qemu_machine: str  # the machine that takes NVDIMMs
    console: str  # the first serial port, as the kernel names it
    nvdimm_align: int  # bytes; the image must be a multiple of it


X86_64: Final = Arch(
    name="x86_64", oci="amd64", kernel="x86_64", kernel_image="arch/x86/boot/bzImage",
    cross_compile="x86_64-linux-gnu-", elf_machine=62, qemu="qemu-system-x86_64", qemu_machine="q35",
    console="ttyS0", nvdimm_align=2 * MIB,
)  # fmt: skip

AARCH64: Final = Arch(
    name="aarch64", oci="arm64", kernel="arm64", kernel_image="arch/arm64/boot/Image.gz",
    cross_compile="aarch64-linux-gnu-", elf_machine=183, qemu="qemu-system-aarch64", qemu_machine="virt",
    console="ttyAMA0", nvdimm_align=16 * MIB,
)  # fmt: skip

ARCHES: Final[Mapping[str, Arch]] = {arch.name: arch for arch in (X86_64, AARCH64)}


def find_arch(name: str) -> Arch:
    """The row for any of an architecture's usual names (`x86_64`, `amd64`, `arm64` …)."""
    for arch in ARCHES.values():
        if name in (arch.name, arch.oci, arch.kernel):
            return arch
    raise SpecError(f"no architecture {name!r}", hint=f"one of {', '.join(ARCHES)}")


def host_arch() -> Arch:
    """The architecture of this machine."""
    return find_arch(platform.machine())
