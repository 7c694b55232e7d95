"""The machines that a guest may be put into, and how its root gets there.

q35      x86_64, a PC with PCI: the image as an NVDIMM, through virtio-pmem or as a virtio disk; an initramfs
microvm  x86_64, nothing but virtio-mmio: the image as a virtio disk; an initramfs
virt     aarch64, with PCI and without: the image as an NVDIMM or as a virtio disk; an initramfs
"""

from __future__ import annotations

from typing import Final

from osbuild.arch import MIB, Arch
from osbuild.artifacts import DiskImage, Initrd
from osbuild.errors import SpecError
from osbuild.runtime.base import PLUGGED_MIB, VIRTIO_MEM, Machine
from osbuild.runtime.options import value

NVDIMM, PMEM, BLOCK, INITRD = "nvdimm", "virtio-pmem", "virtio-blk", "initrd"
_PMEM: Final = frozenset((NVDIMM, PMEM))
# A core file would have the guest's memory in it.
_ALWAYS: Final = ",dump-guest-core=off"


def board(machine: Machine, arch: Arch) -> str:
    """The name of the machine, as QEMU has it."""
    return _name(_spelled(machine, arch))


def attached(machine: Machine) -> str:
    """How the guest gets its root."""
    if isinstance(machine.root, Initrd):
        return INITRD
    if not machine.root.dax:
        return BLOCK
    return PMEM if machine.attach == PMEM else NVDIMM


def bus(machine: Machine, arch: Arch) -> str:
    """How names of virtio devices end there."""
    return "device" if _is_small(machine, arch) else "pci"


def refuse(machine: Machine, arch: Arch) -> None:
    """SpecError for what such a machine cannot be."""
    known = tuple(dict.fromkeys(_name(one) for one in (arch.qemu_machine, arch.qemu_small)))
    if machine.board not in ("auto", *known):
        raise SpecError(f"a guest of {arch.name} has no machine {machine.board}", hint=f"one of {', '.join(known)}")
    if isinstance(machine.root, Initrd):
        wanted = ""
    elif machine.root.dax:
        wanted = BLOCK if machine.attach == BLOCK else ""
    else:
        wanted = machine.attach if machine.attach in _PMEM else ""
    if wanted:
        raise SpecError(f"this root cannot be attached as {wanted}", hint="its kernel arguments are for another device")
    if attached(machine) == PMEM and not arch.virtio_pmem:
        raise SpecError(f"QEMU's machine for {arch.name} has no virtio-pmem", hint="--attach nvdimm, or leave it out")
    if _is_small(machine, arch) and (machine.pluggable or attached(machine) in _PMEM):
        what = "cannot be added to while it runs" if machine.pluggable else "takes no NVDIMM"
        raise SpecError(f"a {machine.board} {what}", hint=f"--machine {_name(arch.qemu_machine)}")


def plug(machine: Machine) -> tuple[str, ...]:
    """Memory that the guest has none of yet: virtio-mem, as Kata's runtime has it, there from the start and empty.

    It comes before an NVDIMM: behind one it would begin where the image ends, in the middle of one of Linux's blocks of
    memory, and the guest could not use it up to the next.
    """
    if not machine.pluggable:
        return ()
    return (
        "-object", f"memory-backend-ram,id=room,size={PLUGGED_MIB}M,reserve=off",
        "-device", f"virtio-mem-pci,id={VIRTIO_MEM},memdev=room,requested-size=0",
    )  # fmt: skip


def arguments(machine: Machine, arch: Arch, *, shared: bool) -> tuple[str, ...]:
    """The machine, its memory, and its root; `shared`: another process reads and writes the guest's memory."""
    backend = ("-object", f"memory-backend-memfd,id=memory,size={machine.memory_mib}M,share=on") if shared else ()
    use = _ALWAYS + (",memory-backend=memory" if shared else "")
    way = attached(machine)
    spelled = _spelled(machine, arch) + (",nvdimm=on" if way == NVDIMM else "")
    return (
        "-machine", f"{spelled}{use}",
        *_firmware(arch, needed=machine.pluggable or way == NVDIMM),
        "-m", _memory(machine),
        *backend,
        *_root(machine, way, bus(machine, arch)),
    )  # fmt: skip


def _root(machine: Machine, way: str, bus: str) -> tuple[str, ...]:
    match machine.root:
        case Initrd(file=file):
            return ("-initrd", str(file.path))
        case DiskImage(dax=True, file=file):
            # A guest that can write a shared image owns every guest: CVE-2026-24834.
            backend = f"memory-backend-file,id=root,mem-path={value(file.path)},size={file.size},share=on,readonly=on"
            device = "virtio-pmem-pci,memdev=root" if way == PMEM else "nvdimm,memdev=root,unarmed=on"
            return ("-object", backend, "-device", device)
        case DiskImage(file=file):
            # What a guest may write goes to a temporary file of QEMU's: the image stays what it is.
            access = "snapshot=on" if machine.root.writable else "readonly=on"
            return (
                "-drive", f"if=none,id=root,file={value(file.path)},format={machine.root.format},{access}",
                "-device", f"virtio-blk-{bus},drive=root",
            )  # fmt: skip


def _memory(machine: Machine) -> str:
    """`-m`, with slots and room for an image that is memory, and for what may be plugged."""
    mapped = isinstance(machine.root, DiskImage) and machine.root.dax
    room = -(-machine.root.file.size // MIB) if mapped else 0
    room += 2 * PLUGGED_MIB if machine.pluggable else 0
    slots = mapped + machine.pluggable
    return f"{machine.memory_mib}M" + (f",slots={slots},maxmem={machine.memory_mib + room}M" if slots else "")


def _firmware(arch: Arch, *, needed: bool) -> tuple[str, ...]:
    """With ACPI in it, where the board has none of its own: NVDIMMs, and what is plugged in, are announced there."""
    return ("-bios", arch.firmware) if needed and arch.firmware else ()


def _spelled(machine: Machine, arch: Arch) -> str:
    return arch.qemu_small if _is_small(machine, arch) else arch.qemu_machine


def _is_small(machine: Machine, arch: Arch) -> bool:
    """Whether it has no device but virtio-mmio's: a board that is there for that, or what a mere initramfs gets."""
    if machine.board == "auto" or _name(arch.qemu_small) == _name(arch.qemu_machine):
        return isinstance(machine.root, Initrd) and not machine.pluggable
    return machine.board == _name(arch.qemu_small)


def _name(spelled: str) -> str:
    return spelled.partition(",")[0]
