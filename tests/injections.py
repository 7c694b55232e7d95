"""Guests, and starts of QEMU, that are wrong in one way each, for real: what autopsy is to find out.

A row says what it does wrong and which cause that is. What nobody names from what such a guest leaves behind has a
`named` of its own: it must be an answer that is not certain.
"""

from __future__ import annotations

import bz2
import dataclasses
import os
import re
import signal
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from osbuild import command, watcher
from osbuild.arch import X86_64
from osbuild.artifacts import DiskImage, File
from osbuild.filesystem import FILESYSTEMS, ext4
from osbuild.filesystem.base import Room
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.report import SmokeReport
from osbuild.runtime import accel as accelerators
from osbuild.runtime import bounds
from osbuild.tree import Draft, directory, regular, symlink
from tests.boot_fixtures import image_of, initrd_of_bytes, tree_with_init
from tests.lab import MIB, START, Lab, crashing, place, replaced, with_word


@dataclass(frozen=True, slots=True, kw_only=True)
class Injection:
    """One way to be wrong."""

    name: str
    cause: str  # the truth
    carry_out: Callable[[Lab], SmokeReport]
    certain: bool = True
    named: str = ""  # what is said instead, where the truth is not to be seen
    slow: bool = False
    waits: float = 0.0  # seconds, that its own deadline allows a silent guest


INJECTIONS: list[Injection] = []


Function = Callable[[Lab], SmokeReport]


def injection(
    cause: str, *, certain: bool = True, named: str = "", slow: bool = False, waits: float = 0.0
) -> Callable[[Function], Function]:
    """A row."""

    def add(function: Function) -> Function:
        name = function.__name__.replace("_", "-")
        row = Injection(
            name=name, cause=cause, carry_out=function, certain=certain, named=named, slow=slow, waits=waits
        )  # fmt: skip
        INJECTIONS.append(row)
        return function

    return add


# --- QEMU -----------------------------------------------------------------------------------------------------------


@injection("vmm-option")
def qemu_refuses_an_option(lab: Lab) -> SmokeReport:
    lab.qemu('exec "$real" "$@" -device nosuchdevice')
    return lab.boot()


@injection("vmm-option")
def qemu_misses_a_property(lab: Lab) -> SmokeReport:
    lab.qemu('exec "$real" "$@" -device virtio-rng-pci,wings=on')
    return lab.boot()


@injection("vmm-memory")
def host_without_memory(lab: Lab) -> SmokeReport:
    lab.qemu('ulimit -v 1500000; exec "$real" "$@"')
    return lab.boot(memory_mib=4096)


@injection("vmm-memory")
def more_memory_than_there_can_be(lab: Lab) -> SmokeReport:
    return lab.boot(lab.initrd, memory_mib=1 << 28)


@injection("vmm-file")
def image_unreadable(lab: Lab) -> SmokeReport:
    if os.geteuid() != 0:
        pytest.skip("a file of somebody else's: needs root")
    image = lab.image_with(lambda data: None)
    image.file.path.chmod(0o600)
    os.chown(image.file.path, 65534, 65534)
    lab.qemu('exec setpriv --bounding-set=-dac_override,-dac_read_search "$real" "$@"')
    return lab.boot(image)


@injection("vmm-lock")
def image_busy(lab: Lab) -> SmokeReport:
    disk = lab.disk()
    argv = [X86_64.qemu, "-S", "-nodefaults", "-display", "none", "-drive", f"file={disk.file.path},format=raw"]
    other = lab.cleanup.enter_context(subprocess.Popen([*argv, "-monitor", "stdio"], stdin=-1, stdout=-1))
    lab.cleanup.callback(other.kill)
    assert other.stdout is not None
    assert other.stdin is not None
    other.stdin.write(b"info status\n")
    other.stdin.flush()
    while b"VM status" not in other.stdout.readline():  # which it says when its devices are there
        assert other.poll() is None
    return lab.boot(disk)


@injection("vmm-kernel")
def no_kernel(lab: Lab) -> SmokeReport:
    (lab.home / "vmlinux").write_bytes(bytes(range(256)) * 400)
    return lab.boot(lab.initrd, kernel=dataclasses.replace(lab.kernel, vmlinux=File.of(lab.home / "vmlinux")))


@injection("vmm-kvm")
def kvm_device_is_none(lab: Lab) -> SmokeReport:
    if os.geteuid() != 0 or not Path("/dev/kvm").exists():
        pytest.skip("something else is mounted over /dev/kvm: needs root, and a /dev/kvm")
    lab.qemu(
        'args=$(printf "%s\\n" "$@" | sed "s/^tcg$/kvm/;s/^max$/host/")\nIFS="\n"\n'
        'exec unshare -m sh -c \'mount --bind /dev/null /dev/kvm; exec "$0" "$@"\' "$real" $args'
    )
    return lab.boot(lab.initrd)


@injection("vmm-failed")
def qemu_gives_up(lab: Lab) -> SmokeReport:
    lab.qemu('echo "qemu: nobody knows why" >&2; exit 3')
    return lab.boot(lab.initrd)


@injection("vmm-killed")
def qemu_killed(lab: Lab) -> SmokeReport:
    return lab.kill(signal.SIGKILL)


@injection("vmm-crashed")
def qemu_crashes(lab: Lab) -> SmokeReport:
    return lab.kill(signal.SIGSEGV)


@injection("vmm-killed")
def qemu_terminated(lab: Lab) -> SmokeReport:
    return lab.kill(signal.SIGTERM)


# --- Finding the root -----------------------------------------------------------------------------------------------


@injection("root-driver")
def no_virtio_blk(lab: Lab) -> SmokeReport:
    return lab.boot(lab.disk(), words=("initcall_blacklist=virtio_blk_init",))


@injection("root-driver")
def no_virtio_pci(lab: Lab) -> SmokeReport:
    return lab.boot(lab.disk(), words=("initcall_blacklist=virtio_pci_driver_init",))


@injection("root-driver")
def no_pmem(lab: Lab) -> SmokeReport:
    return lab.boot(lab.image, words=("initcall_blacklist=nd_pmem_driver_init",))


@injection("root-driver")
def no_nfit(lab: Lab) -> SmokeReport:
    return lab.boot(lab.image, words=("initcall_blacklist=nfit_init",))


@injection("root-driver", slow=True)
def a_kernel_of_modules(lab: Lab) -> SmokeReport:
    return lab.boot(lab.image, kernel=lab.debian_kernel(), memory_mib=512)


@injection("root-missing")
def another_disk(lab: Lab) -> SmokeReport:
    return lab.boot(with_word(lab.image, "root=/dev/vda1"))


@injection("root-missing")
def another_partition(lab: Lab) -> SmokeReport:
    return lab.boot(with_word(lab.image, "root=/dev/pmem0p3"))


@injection("root-missing")
def another_uuid(lab: Lab) -> SmokeReport:
    return lab.boot(with_word(lab.image, "root=PARTUUID=12345678-01"))


@injection("partition-table")
def no_partition_table(lab: Lab) -> SmokeReport:
    def erase(data: bytearray) -> None:
        for start in (0, 2 * MIB):
            data[start + 510 : start + 512] = b"\0\0"

    return lab.boot(lab.image_with(erase))


@injection("filesystem-unsupported")
def filesystem_not_in_the_kernel(lab: Lab) -> SmokeReport:
    xfs = FILESYSTEMS["xfs"]
    plan = xfs.plan(lab.rootfs.tree, start=FILESYSTEM_START, epoch=0)
    return lab.boot(build_nvdimm_image(xfs, plan, lab.home / "xfs.img", name="xfs"))


@injection("root-filesystem")
def another_filesystem(lab: Lab) -> SmokeReport:
    words = tuple(word for word in lab.image.words if not word.startswith("rootflags="))
    return lab.boot(with_word(dataclasses.replace(lab.image, words=words), "rootfstype=erofs"))


@injection("root-filesystem")
def no_filesystem(lab: Lab) -> SmokeReport:
    def erase(data: bytearray) -> None:
        data[START : START + 4096] = bytes(4096)

    return lab.boot(lab.image_with(erase))


@injection("mount-options")
def a_flag_nobody_knows(lab: Lab) -> SmokeReport:
    return lab.boot(with_word(lab.image, "rootflags=nosuchflag"))


@injection("dax-unsupported")
def dax_on_a_disk(lab: Lab) -> SmokeReport:
    return lab.boot(with_word(lab.disk(), "rootflags=dax"))


@injection("dax-unsupported")
def damaged_dax_header(lab: Lab) -> SmokeReport:
    def flip(data: bytearray) -> None:
        data[8184] ^= 1

    return lab.boot(lab.image_with(flip))


@injection("pmem-alignment")
def misaligned(lab: Lab) -> SmokeReport:
    return lab.boot(lab.image_with(lambda data: data + bytes(MIB)))


@injection("pmem-alignment")
def one_mib_short(lab: Lab) -> SmokeReport:
    return lab.boot(lab.image_with(lambda data: data[:-MIB]))


@injection("image-short")
def short(lab: Lab) -> SmokeReport:
    return lab.boot(lab.image_with(lambda data: data[: -2 * MIB]))


@injection("image-short")
def short_disk(lab: Lab) -> SmokeReport:
    disk = lab.disk()
    os.truncate(disk.file.path, disk.file.size - MIB)
    return lab.boot(dataclasses.replace(disk, file=File.of(disk.file.path)))


def hashed(lab: Lab) -> DiskImage:
    ext4 = FILESYSTEMS["ext4"]
    plan = ext4.plan(lab.rootfs.tree, start=FILESYSTEM_START, epoch=0)
    return build_nvdimm_image(ext4, plan, lab.home / "hashed.img", name="ext4", hashed=True)


@injection("verity")
def one_bit_of_the_agent_under_verity(lab: Lab) -> SmokeReport:
    made = hashed(lab)
    data = bytearray(made.file.path.read_bytes())
    data[data.index(b"\x7fELF", FILESYSTEM_START) + 0x1000] ^= 1
    made.file.path.write_bytes(data)
    return lab.boot(made.through_verity())


@injection("verity")
def another_root_hash(lab: Lab) -> SmokeReport:
    made = hashed(lab)
    assert made.verity is not None
    wrong = f"{int(made.verity.root_hash[0], 16) ^ 1:x}{made.verity.root_hash[1:]}"
    root = made.through_verity()
    return lab.boot(
        dataclasses.replace(root, words=tuple(word.replace(made.verity.root_hash, wrong) for word in root.words))
    )


def inode_of(path: str, image: Path) -> int:
    """Where e2fsprogs finds it."""
    argv = [command.find("debugfs", package="e2fsprogs"), "-R", f"imap {path}", f"{image}?offset={START}"]
    said = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    found = re.search(r"block (\d+), offset 0x(\w+)", said)
    assert found is not None, said
    return START + int(found[1]) * 4096 + int(found[2], 16)


@injection("filesystem-damaged")
def damaged_directory(lab: Lab) -> SmokeReport:
    def spoil(data: bytearray) -> None:
        data[inode_of("/sbin/init", lab.image.file.path) + 40] ^= 0xFF

    return lab.boot(lab.image_with(spoil))


# --- The initramfs --------------------------------------------------------------------------------------------------


@injection("init-missing")
def no_init_in_the_initramfs(lab: Lab) -> SmokeReport:
    draft = lab.draft()
    draft.remove("/init")
    return lab.boot(lab.initrd_of(draft.tree()))


@injection("init-missing")
def no_init_in_the_image(lab: Lab) -> SmokeReport:
    draft = lab.draft()
    draft.remove("/init")
    draft.remove("/sbin/init")
    return lab.boot(image_of(draft.tree(), lab.home / "img"))


def _large_initramfs(lab: Lab, *, memory_mib: int) -> SmokeReport:
    """80 MiB that nothing makes smaller."""
    draft = lab.draft()
    draft.put("/big", regular(os.urandom(80 << 20)))
    return lab.boot(lab.initrd_of(draft.tree()), memory_mib=memory_mib)


@injection("initrd-memory")
def initramfs_bigger_than_memory(lab: Lab) -> SmokeReport:
    return _large_initramfs(lab, memory_mib=64)


@injection("initrd-memory")
def initramfs_over_the_kernels_code(lab: Lab) -> SmokeReport:
    """What it hits is code that runs at once: the processor gives up."""
    return _large_initramfs(lab, memory_mib=100)


@injection("initrd-memory")
def initramfs_over_the_kernels_data(lab: Lab) -> SmokeReport:
    """What it hits makes the kernel stumble; a little higher lies .bss, which is cleared, and the archive damaged."""
    return _large_initramfs(lab, memory_mib=110)


@injection("initrd-memory")
def initramfs_that_does_not_fit_unpacked(lab: Lab) -> SmokeReport:
    return _large_initramfs(lab, memory_mib=140)


@injection("initrd-memory")
def initramfs_that_almost_fits(lab: Lab) -> SmokeReport:
    return _large_initramfs(lab, memory_mib=200)


@injection("initrd-compression")
def bzip2(lab: Lab) -> SmokeReport:
    return lab.boot(
        initrd_of_bytes(bz2.compress(lab.initrd_of(lab.rootfs.tree).file.path.read_bytes()), lab.home / "b")
    )


@injection("initrd-damaged")
def no_initramfs(lab: Lab) -> SmokeReport:
    return lab.boot(initrd_of_bytes(bytes(range(1, 256)) * 1000, lab.home / "junk"))


@injection("initrd-damaged")
def half_an_initramfs(lab: Lab) -> SmokeReport:
    data = lab.initrd.file.path.read_bytes()
    return lab.boot(initrd_of_bytes(data[: len(data) // 2], lab.home / "half"))


@injection("oom")
def no_memory_for_a_program(lab: Lab) -> SmokeReport:
    return lab.boot(
        lab.script("mount -t devtmpfs d /dev\nmount -t tmpfs -o size=99% t /tmp\nexec dd if=/dev/zero of=/tmp/a bs=1M")
    )


# --- Init -----------------------------------------------------------------------------------------------------------


@injection("init-not-executable")
def init_without_x(lab: Lab) -> SmokeReport:
    return lab.boot(lab.init(lab.compile_init("sleeps"), 0o644))


@injection("init-architecture")
def init_of_another_architecture(lab: Lab) -> SmokeReport:
    program = bytearray(lab.compile_init("sleeps"))
    program[18] = 183  # e_machine
    return lab.boot(lab.init(bytes(program)))


@injection("init-interpreter")
def init_without_its_interpreter(lab: Lab) -> SmokeReport:
    return lab.boot(lab.init(b"#!/nowhere\n"))


@injection("init-not-runnable")
def init_that_is_its_own_interpreter(lab: Lab) -> SmokeReport:
    return lab.boot(lab.init(b"#!/init\n"))


def dynamic(lab: Lab) -> Draft:
    """Init is a program that needs a library."""
    source, program = lab.home / "dynamic.c", lab.home / "dynamic"
    source.write_text('#include <stdio.h>\nint main(void) { puts("here"); return 3; }\n')
    subprocess.run(["gcc", "-o", program, source], check=True)
    return tree_with_init(program.read_bytes()).edit()


@injection("init-interpreter")
def init_without_its_loader(lab: Lab) -> SmokeReport:
    return lab.boot(lab.initrd_of(dynamic(lab).tree()))


@injection("library-missing")
def init_without_its_library(lab: Lab) -> SmokeReport:
    draft = dynamic(lab)
    draft.put("/lib64", directory())
    draft.put("/lib64/ld-linux-x86-64.so.2", regular(Path("/lib64/ld-linux-x86-64.so.2").read_bytes(), 0o755))
    return lab.boot(lab.initrd_of(draft.tree()))


@injection("init-exited")
def init_exits(lab: Lab) -> SmokeReport:
    return lab.boot(lab.init(lab.compile_init("exits")))


@injection("init-crashed")
def init_faults(lab: Lab) -> SmokeReport:
    return lab.boot(lab.init(lab.compile_init("faults")))


@injection("init-crashed")
def agent_faults(lab: Lab) -> SmokeReport:
    tree = replaced(lab.rootfs.tree, lab.agent.path.read_bytes(), crashing(lab.agent))
    return lab.boot(lab.initrd_of(tree))


@injection("restarted")
def init_restarts(lab: Lab) -> SmokeReport:
    return lab.boot(lab.init(lab.compile_init("restarts")))


@injection("powered-off")
def init_powers_off(lab: Lab) -> SmokeReport:
    return lab.boot(image_of(lab.script_tree("/bin/sh -c 'poweroff -f'"), lab.home / "img"))


@injection("flood")
def init_floods(lab: Lab) -> SmokeReport:
    lab.monkeypatch.setattr(watcher, "CONSOLE_LIMIT", 64 << 10)
    return lab.boot(lab.init(lab.compile_init("floods")))


@injection("disk-flood")
def init_fills_its_disk(lab: Lab) -> SmokeReport:
    lab.monkeypatch.setattr(bounds, "SNAPSHOT", 24 * MIB)
    tree = lab.script_tree("while :; do dd if=/dev/zero bs=1M count=48 of=/x conv=fsync; done")
    plan = ext4.plan(tree, start=FILESYSTEM_START, epoch=0, room=Room(writable=True, free=64 * MIB), dax=False)
    return lab.boot(build_nvdimm_image(ext4, plan, lab.home / "img", name="ext4", header=False, writable=True))


@injection("cgroup-v1")
def cgroup_v1_expected(lab: Lab) -> SmokeReport:
    return lab.boot(lab.script(
        "/bin/sh -c 'mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs t /sys/fs/cgroup;"
        " mkdir /sys/fs/cgroup/memory; mount -t cgroup -o memory cgroup /sys/fs/cgroup/memory || exit 1'"
    ))  # fmt: skip


@injection("run-read-only")
def run_read_only(lab: Lab) -> SmokeReport:
    return lab.boot(image_of(lab.script_tree("exec /bin/agent --listen unix:/run/agent.sock"), lab.home / "img"))


# --- The agent ------------------------------------------------------------------------------------------------------


@injection("agent-absent", certain=False)
def no_agent(lab: Lab) -> SmokeReport:
    return lab.boot_and_wait(lab.init(lab.compile_init("sleeps")), "init")


@injection("agent-deaf")
def agent_listens_elsewhere(lab: Lab) -> SmokeReport:
    return lab.boot(lab.script("mount -t proc proc /proc\nexec /bin/agent --listen unix:/tmp/agent.sock"))


@injection("agent-crashed")
def agent_dies_when_it_waits(lab: Lab) -> SmokeReport:
    _, here = place(bytearray(lab.kernel.vmlinux.path.read_bytes()), lab.kernel.vmlinux.path, "do_epoll_wait")
    _, force = place(bytearray(lab.kernel.vmlinux.path.read_bytes()), lab.kernel.vmlinux.path, "force_sig")
    # mov $11, %edi; call force_sig; xor %eax, %eax; ret
    code = b"\xbf\x0b\0\0\0\xe8" + struct.pack("<i", force - (here + 10)) + b"\x31\xc0\xc3"
    return lab.boot(lab.initrd, kernel=lab.patched("do_epoll_wait", code))


@injection("vsock-missing")
def no_vsock(lab: Lab) -> SmokeReport:
    return lab.ask_by_vsock(lab.initrd)


@injection("vsock-missing")
def no_vsock_in_the_kernel(lab: Lab) -> SmokeReport:
    return lab.ask_by_vsock(lab.initrd, "initcall_blacklist=vsock_init,virtio_vsock_init")


@injection("serial-missing")
def nothing_to_listen_on(lab: Lab) -> SmokeReport:
    words = "initcall_blacklist=virtio_console_init,vsock_init,virtio_vsock_init"
    return lab.boot(lab.initrd, words=(words,))


@injection("serial-missing")
def no_serial_port(lab: Lab) -> SmokeReport:
    return lab.boot(lab.initrd, words=("initcall_blacklist=virtio_console_init",))


_ANOTHER_CONSOLE: Final = """
for word; do shift; set -- "$@" "$(printf %s "$word" | sed s/console=ttyS0/console=ttyS1/)"; done
exec "$real" "$@"
"""


@injection("console-wrong")
def another_console(lab: Lab) -> SmokeReport:
    lab.qemu(_ANOTHER_CONSOLE)
    return lab.boot(lab.initrd)


@injection("console-wrong", certain=False)
def another_console_of_a_silent_guest(lab: Lab) -> SmokeReport:
    lab.qemu(_ANOTHER_CONSOLE)
    return lab.boot_and_wait(lab.init(lab.compile_init("sleeps")), "kernel")


@injection("console-full")
def no_room_for_the_console(lab: Lab) -> SmokeReport:
    if os.geteuid() != 0:
        pytest.skip("a small filesystem: needs root")
    small = lab.home / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "small", small], check=True)
    lab.cleanup.callback(lambda: subprocess.run(["umount", small], check=True))
    return lab.boot(lab.initrd, work=small / "work")


# --- systemd --------------------------------------------------------------------------------------------------------


def systemd(lab: Lab, change: Callable[[Draft], object], *words: str) -> SmokeReport:
    rootfs = lab.debian()
    draft = rootfs.tree.edit()
    change(draft)
    image = image_of(draft.tree(), lab.home / "img")
    image = dataclasses.replace(image, words=(*image.words, *rootfs.words, *words))
    return lab.boot(image, memory_mib=512, agent=rootfs.agent)


TARGET: Final = "kata-containers.target"
SERVICE: Final = "kata-agent.service"


def unit(draft: Draft, name: str) -> str:
    (found,) = [path for path, _ in draft.tree().items() if path.endswith(f"/systemd/system/{name}")]
    return found


@injection("unit-missing", slow=True)
def no_target(lab: Lab) -> SmokeReport:
    return systemd(lab, lambda draft: draft.remove(unit(draft, TARGET)))


@injection("unit-masked", slow=True)
def masked_target(lab: Lab) -> SmokeReport:
    def mask(draft: Draft) -> None:
        draft.remove(unit(draft, TARGET))
        draft.put(f"/etc/systemd/system/{TARGET}", symlink("/dev/null"))

    return systemd(lab, mask)


@injection("unit-masked", slow=True)
def masked_service(lab: Lab) -> SmokeReport:
    def mask(draft: Draft) -> None:
        draft.put(f"/etc/systemd/system/{SERVICE}", symlink("/dev/null"))

    return systemd(lab, mask)


@injection("agent-crashed", slow=True)
def agent_faults_under_systemd(lab: Lab) -> SmokeReport:
    def spoil(draft: Draft) -> None:
        tree = replaced(draft.tree(), lab.agent.path.read_bytes(), crashing(lab.agent))
        for path, entry in tree.items():
            draft.put(path, entry)

    return systemd(lab, spoil)


# --- The kernel itself ----------------------------------------------------------------------------------------------

EARLY: Final = "pvh_start_xen"
CALL: Final = "__x64_sys_sethostname"  # what the agent does early


@injection("panic")
def kernel_panics(lab: Lab) -> SmokeReport:
    data = bytearray(lab.kernel.vmlinux.path.read_bytes())
    _, here = place(data, lab.kernel.vmlinux.path, CALL)
    _, panic = place(data, lab.kernel.vmlinux.path, "panic")
    # mov $text, %rdi; xor %eax, %eax; call panic
    code = b"\x48\xc7\xc7" + struct.pack("<I", (here + 14) & 0xFFFFFFFF) + b"\x31\xc0\xe8"
    code += struct.pack("<i", panic - (here + 14)) + b"it was told to\0"
    return lab.boot(lab.initrd, kernel=lab.patched(CALL, code))


@injection("oops")
def kernel_follows_a_null_pointer(lab: Lab) -> SmokeReport:
    return lab.boot(lab.initrd, kernel=lab.patched(CALL, b"\x31\xc0\x89\x00"))  # xor %eax, %eax; mov %eax, (%rax)


# sub $16, %rsp; xor %eax, %eax; mov %rax, (%rsp); mov %rax, 8(%rsp); lidt (%rsp); ud2
_TRIPLE: Final = bytes.fromhex("4883ec10 31c0 48890424 4889442408 0f011c24 0f0b")


@injection("triple-fault")
def kernel_faults_three_times(lab: Lab) -> SmokeReport:
    return lab.boot(lab.initrd, kernel=lab.patched(CALL, _TRIPLE))


@injection("triple-fault", certain=False)  # a panic that nobody sees looks the same
def kernel_faults_three_times_at_its_start(lab: Lab) -> SmokeReport:
    return lab.boot(lab.initrd, kernel=lab.patched(EARLY, b"\x0f\x0b"))


@injection("silent", certain=False)
def kernel_stops_at_its_start(lab: Lab) -> SmokeReport:
    return lab.boot_and_wait(lab.initrd, "vmm started", kernel=lab.patched(EARLY, b"\xeb\xfe"))  # jmp .


@injection("agent-silent", certain=False)
def kernel_never_waits_for_the_agents_guests(lab: Lab) -> SmokeReport:
    """The agent listens, and the kernel takes its first wait for somebody for ever: it spins there."""
    return lab.boot_and_wait(lab.initrd, "agent started", kernel=lab.patched("do_epoll_wait", b"\xeb\xfe"))


@injection("kernel-stuck", certain=False, slow=True, waits=35)
def kernel_hangs(lab: Lab) -> SmokeReport:
    return lab.boot_and_wait(lab.initrd, "init", seconds=35, kernel=lab.patched(CALL, b"\xeb\xfe"))


@injection("kernel-stuck", certain=False, named="agent-absent")
def kernel_hangs_and_has_not_noticed_yet(lab: Lab) -> SmokeReport:
    return lab.boot_and_wait(lab.initrd, "init", kernel=lab.patched(CALL, b"\xeb\xfe"))


# --- KVM ------------------------------------------------------------------------------------------------------------


@injection("kvm-disguise", waits=15)
def kvm_that_is_an_emulator(lab: Lab) -> SmokeReport:
    """On a host whose /dev/kvm is one, and was taken for a real one."""
    found = accelerators.probe(X86_64, Path(command.find(X86_64.qemu)))
    if not os.access(accelerators.DEVICE, os.R_OK | os.W_OK) or found.name == "kvm":
        pytest.skip(f"this host has no emulator in disguise: {found.reason}")
    remembered = accelerators.Accel(name="kvm", reason="it was faster when it was measured")
    lab.monkeypatch.setattr(accelerators, "choose", lambda *_, **__: remembered)
    return lab.boot(lab.image, seconds=15, accel="auto")


@injection("memory-tiny")
def memory_that_the_kernel_alone_fills(lab: Lab) -> SmokeReport:
    return lab.boot(lab.image, memory_mib=24)


@injection("memory-tiny")
def memory_that_is_gone_soon(lab: Lab) -> SmokeReport:
    return lab.boot(lab.image, memory_mib=32)
