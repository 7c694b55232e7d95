"""QEMU: q35 with the image as an NVDIMM (or a disk), microvm with an initramfs.

serial port 1       -> work/console.log
QEMU's own words    -> work/qemu.log
agent.channel.0    <-> a unix socket in a private directory with a short name
vsock              <-> the host's kernel, or vhost-device-vsock, where that is wished: see channel
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.arch import MIB, Arch, find_arch
from osbuild.artifacts import DiskImage, Initrd
from osbuild.cache import Cache, default_cache
from osbuild.errors import CommandError, HostError, InputError, SpecError
from osbuild.runtime import accel, channel
from osbuild.runtime.base import CONSOLE, Guest, Machine, least_memory

LOG: Final = "qemu.log"
VSOCK_LOG: Final = "vsock.log"  # of the program that does the work of a vsock, where there is one
CHANNEL: Final = "agent.channel.0"  # the serial port's name, as agents of Kata 1.x and ours look for it

_RUN_PREFIX: Final = "osbuilder-run-"
_RUN_LOCKED_SECONDS: Final = 60.0  # after which a run directory is locked, if anybody still has a use for it
_SUN_PATH: Final = 108  # bytes for a unix socket's path and its NUL: unix(7)
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_CPUS: Final[Mapping[str, str]] = {"kvm": "host", "tcg": "max"}

# Not here, because under TCG they were measured to make no difference: noreplace-smp, mitigations=off, tsc=reliable,
# no_timer_check, rcupdate.rcu_expedited=1, i8042.*, cryptomgr.notests, random.trust_cpu=on, pci=lastbus=0, lpj=, quiet.
# A console that says everything costs less than 20 ms, and is what autopsy reads.
_WORDS: Final = (
    "panic=-1",  # restart at once …
    "reboot=t",  # … by a triple fault, which every machine has, and which -no-reboot makes the end of QEMU
    "cgroup_no_v1=all",  # Kata's agent as PID 1 gives up on kernels without version 1, unless told
)
# Calibrating the local timer takes 0.1 s on q35 and 0.2 s on microvm, and fails on busy hosts, where TCG's
# clock jumps. One processor does well with the other timers.
_TCG_WORDS: Final = ("nolapic_timer",)


@contextlib.contextmanager
def start(machine: Machine, work: Path) -> Iterator[Guest]:
    """Start QEMU as `machine`; the console and QEMU's log are in `work`, and stay there."""
    refuse_what_cannot_boot(machine)
    qemu, chosen = ready(find_arch(machine.arch), machine.accel)
    transport = channel.choose(machine.transport, machine.agent, channel.look())
    console, log = (work / CONSOLE).absolute(), (work / LOG).absolute()
    try:
        work.mkdir(parents=True, exist_ok=True)
        for output in (console, log):
            output.write_bytes(b"")
    except OSError as problem:
        raise HostError(f"cannot write into {work}: {problem.strerror}", hint="name another directory") from problem
    with _run_directory() as run:
        agent = run / "agent.sock"
        with channel.opened(transport, agent, run, (work / VSOCK_LOG).absolute()) as (way, device):
            options = arguments(
                machine, console=console, agent=agent, accel=chosen.name, sandbox=_has_seccomp(qemu), vsock=device
            )
            argv = (str(qemu), *options)
            shared = (device.descriptor,) if isinstance(device, channel.Vhost) else ()
            began = time.monotonic()
            with command.start(*argv, cwd=run, log=log, descriptors=shared) as process:
                yield Guest(
                    process=process, console=console, log=log, agent=agent, channel=way, command=argv, accel=chosen,
                    started=began,
                )  # fmt: skip


def ready(arch: Arch, wish: str) -> tuple[Path, accel.Accel]:
    """The program, and the accelerator for a wish of accel.CHOICES; HostError when this machine has no such thing."""
    qemu = Path(command.find(arch.qemu, package="qemu-system-x86"))
    return qemu, accel.choose(wish, arch, qemu, cache=_cache())


def arguments(
    machine: Machine,
    *,
    console: Path,
    agent: Path,
    accel: str,
    sandbox: bool = True,
    vsock: channel.Device = None,
) -> tuple[str, ...]:
    """QEMU's command line but for its name, decided without a look at the host."""
    arch = find_arch(machine.arch)
    if arch.name != "x86_64":
        raise SpecError(f"QEMU guests of {arch.name} are not there yet", hint="boot x86_64")
    micro = isinstance(machine.root, Initrd)
    bus = "device" if micro else "pci"
    return (
        *_board(machine, arch, shared=isinstance(vsock, channel.VhostUser)),
        "-accel", accel,
        "-cpu", _CPUS[accel],
        "-smp", str(machine.cpus),
        "-kernel", str(machine.kernel.vmlinux.path),
        "-append", " ".join(words(machine, accel=accel)),
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display", "none",
        *(("-sandbox", _SANDBOX) if sandbox else ()),
        "-chardev", f"file,id=console,path={_value(console)}",
        "-serial", "chardev:console",
        "-object", "rng-random,id=entropy,filename=/dev/urandom",
        "-device", f"virtio-rng-{bus},rng=entropy",
        "-chardev", f"socket,id=agent,path={_value(agent)},server=on,wait=off",
        "-device", f"virtio-serial-{bus}",
        "-device", f"virtserialport,chardev=agent,name={CHANNEL}",
        *_vsock(vsock, bus),
        *_network(machine.mac, bus),
    )  # fmt: skip


def words(machine: Machine, *, accel: str) -> tuple[str, ...]:
    """The kernel's command line: ours, those that find the root, and the user's last, since the later of two wins."""
    console = find_arch(machine.arch).console
    return (
        f"console={console}",
        f"earlyprintk={console}",  # a kernel that dies before it has a console is then not silent; costs some 20 ms
        *_WORDS,
        *(_TCG_WORDS if accel == "tcg" and machine.cpus == 1 else ()),
        *machine.root.words,
        f"osbuilder.nonce={machine.nonce}",
        *machine.words,
    )


def refuse_what_cannot_boot(machine: Machine) -> None:
    """What no guest is needed for to know."""
    for path in machine.inputs:
        if not path.is_file():
            raise InputError(f"there is no file {path}")
    if machine.cpus < 1 or machine.memory_mib < 1:
        raise SpecError(f"a guest of {machine.cpus} processors and {machine.memory_mib} MiB cannot be")
    needed = least_memory(machine.root, machine.kernel)
    if needed > machine.memory_mib * MIB:
        least = _mib(needed)
        what = "initramfs needs {} to be unpacked" if isinstance(machine.root, Initrd) else "image needs {}"
        raise SpecError(
            f"this {what.format(f'{least} MiB')}; the guest has {machine.memory_mib} MiB",
            hint=f"--memory {least}",
        )


def _vsock(device: channel.Device, bus: str) -> tuple[str, ...]:
    match device:
        case channel.Vhost(cid=cid, descriptor=descriptor):
            return ("-device", f"vhost-vsock-{bus},guest-cid={cid},vhostfd={descriptor}")
        case channel.VhostUser(socket=path):
            return (
                "-chardev", f"socket,id=vsock,path={_value(path)}",
                "-device", f"vhost-user-vsock-{bus},chardev=vsock",
            )  # fmt: skip
        case None:
            return ()


def _network(mac: str, bus: str) -> tuple[str, ...]:
    """A card whose hub has no other port. There is nothing to boot over it, and the ROM may not be installed."""
    if not mac:
        return ()
    rom = ",romfile=" if bus == "pci" else ""
    return ("-netdev", "hubport,id=net,hubid=0", "-device", f"virtio-net-{bus},netdev=net,mac={mac}{rom}")


def _board(machine: Machine, arch: Arch, *, shared: bool) -> tuple[str, ...]:
    memory = f"{machine.memory_mib}M"
    # Another process that does a device's work reads and writes the guest's memory.
    backend = ("-object", f"memory-backend-memfd,id=memory,size={memory},share=on") if shared else ()
    use = ",memory-backend=memory" if shared else ""
    match machine.root:
        case Initrd(file=file):
            return (
                # With ACPI, microvm has no timer but the TSC, and its calibration fails on busy hosts: half of the
                # boots hung. Without ACPI a guest can restart (and so end QEMU) or halt, but not switch off.
                "-machine", f"microvm,acpi=off,auto-kernel-cmdline=on{use}",
                "-m", memory,
                *backend,
                "-initrd", str(file.path),
            )  # fmt: skip
        case DiskImage(dax=True, file=file):
            # A guest that can write a shared image owns every guest: CVE-2026-24834.
            return (
                "-machine", f"{arch.qemu_machine},nvdimm=on{use}",
                "-m", f"{memory},slots=1,maxmem={machine.memory_mib + _mib(file.size)}M",
                *backend,
                "-object",
                f"memory-backend-file,id=root,mem-path={_value(file.path)},size={file.size},share=on,readonly=on",
                "-device", "nvdimm,memdev=root,unarmed=on",
            )  # fmt: skip
        case DiskImage(file=file):
            # What a guest may write goes to a temporary file of QEMU's: the image stays what it is.
            access = "snapshot=on" if machine.root.writable else "readonly=on"
            return (
                "-machine", f"{arch.qemu_machine}{use}",
                "-m", memory,
                *backend,
                "-drive", f"if=none,id=root,file={_value(file.path)},format={machine.root.format},{access}",
                "-device", "virtio-blk-pci,drive=root",
            )  # fmt: skip


def _mib(size: int) -> int:
    return -(-size // MIB)


def _value(path: Path) -> str:
    """A path inside an option with commas: QEMU takes two of them for one."""
    return str(path).replace(",", ",,")


@contextlib.contextmanager
def _run_directory() -> Iterator[Path]:
    """A directory for this run's sockets: nobody else's, and short, wherever the results go.

    A lock that dies with us tells it from one whose owner was killed; such are taken away here.
    """
    for parent in (os.environ.get("XDG_RUNTIME_DIR"), tempfile.gettempdir(), "/tmp"):  # noqa: S108
        if parent and os.access(parent, os.W_OK | os.X_OK) and len(os.fsencode(parent)) < _SUN_PATH - 40:
            break
    else:
        raise HostError("no directory can be written that is short enough for a socket", hint="set TMPDIR to one")
    _sweep(Path(parent))
    run = Path(tempfile.mkdtemp(prefix=_RUN_PREFIX, dir=parent))
    with _locked(run):
        try:
            yield run
        finally:
            shutil.rmtree(run, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for left in parent.glob(f"{_RUN_PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else's, locked, or just gone
            found = left.lstat()
            old = time.time() - found.st_mtime > _RUN_LOCKED_SECONDS
            if old and stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
                with _locked(left):
                    shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@functools.cache
def _has_seccomp(qemu: Path) -> bool:
    """Whether this QEMU was built with what -sandbox needs; it says so before it does anything else."""
    try:
        command.run(str(qemu), "-sandbox", "on", "-version", seconds=10)
    except CommandError:
        return False
    return True


def _cache() -> Cache | None:
    try:
        return default_cache()
    except HostError:
        return None  # only costs a measurement of the accelerator each time
