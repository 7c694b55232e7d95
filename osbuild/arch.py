"""One row per architecture: every place that spells it differently."""

from __future__ import annotations

import os
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
    kernel_plain: str  # what VMMs start as it is, below the build directory
    kernel_image: str  # the compressed image, below the build directory
    cross_compile: str  # CROSS_COMPILE= where the host is another architecture
    elf_machine: int  # e_machine
    qemu: str  # qemu-system-…
    qemu_package: str  # Debian's, that has it
    qemu_machine: str  # the machine that takes NVDIMMs
    qemu_small: str  # the machine for an initramfs: nothing on it but virtio-mmio
    qemu_cpu: str  # of software emulation
    plugs_cpus: bool  # QEMU's machine takes more of them while it runs
    virtio_pmem: bool  # QEMU's machine has that device
    firmware: str  # without which the machine announces no NVDIMM; empty: it needs none
    firmware_package: str  # Debian's, that has it
    console: str  # the first serial port, as the kernel names it
    early: str  # the kernel word for a console before there is a console
    tcg_words: tuple[str, ...]  # kernel arguments for an emulated guest
    lonely_words: tuple[str, ...]  # more of them if it has one processor, and gets no other
    nvdimm_align: int  # bytes; the image must be a multiple of it


X86_64: Final = Arch(
    name="x86_64", oci="amd64", kernel="x86_64", kernel_plain="vmlinux", kernel_image="arch/x86/boot/bzImage",
    cross_compile="x86_64-linux-gnu-", elf_machine=62, qemu="qemu-system-x86_64", qemu_package="qemu-system-x86",
    qemu_machine="q35",
    # With ACPI, microvm has no timer but the TSC, and its calibration fails on busy hosts: half of the boots hung.
    # Without ACPI a guest can restart (and so end QEMU) or halt, but not switch off.
    qemu_small="microvm,acpi=off,auto-kernel-cmdline=on",
    qemu_cpu="max", plugs_cpus=True, virtio_pmem=True, firmware="", firmware_package="",
    console="ttyS0", early="earlyprintk=ttyS0",
    # Calibrating the local timer takes 0.1 s on q35 and 0.2 s on microvm, and fails on busy hosts, where TCG's
    # clock jumps. One processor does well with the other timers. The check whether their interrupts arrive fails there,
    # too: 4 of 80 boots beside 13 busy processes panicked with "IO-APIC + timer doesn't work".
    tcg_words=("no_timer_check",), lonely_words=("nolapic_timer",),
    nvdimm_align=2 * MIB,
)  # fmt: skip

AARCH64: Final = Arch(
    name="aarch64", oci="arm64", kernel="arm64", kernel_plain="arch/arm64/boot/Image",
    kernel_image="arch/arm64/boot/Image.gz", cross_compile="aarch64-linux-gnu-", elf_machine=183,
    qemu="qemu-system-aarch64", qemu_package="qemu-system-arm", qemu_machine="virt,gic-version=3",
    qemu_small="virt,gic-version=3",
    qemu_cpu="max,pauth-impdef=on",  # the architected algorithm takes most of the time when it is emulated
    plugs_cpus=False, virtio_pmem=False,
    # virt's device tree has no word for an NVDIMM; ACPI has, and ACPI takes firmware.
    firmware="/usr/share/qemu-efi-aarch64/QEMU_EFI.fd", firmware_package="qemu-efi-aarch64",
    console="ttyAMA0", early="earlycon", tcg_words=(), lonely_words=(), nvdimm_align=16 * MIB,
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
    return find_arch(os.uname().machine)


def cross_prefix(arch: Arch) -> str:
    """What stands before the names of the compiler and its tools: nothing on a machine of that architecture."""
    return "" if arch == host_arch() else arch.cross_compile
