"""QEMU: its command line, and a process of it, for the length of a block. Of machines and roots: see boards.

serial port 1       -> work/console.log
QEMU's own words    -> work/qemu.log
agent.channel.0    <-> a unix socket in a private directory with a short name
a shared directory  -> by QEMU itself, or a virtiofsd: see shares
vsock              <-> the host's kernel, or vhost-device-vsock, where that is wished: see channel
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from osbuild import command, network
from osbuild.arch import MIB, Arch, find_arch
from osbuild.artifacts import Initrd
from osbuild.cache import Cache, default_cache
from osbuild.errors import HostError, InputError, SpecError
from osbuild.network import GuestNetwork, Tap, User
from osbuild.runtime import abilities, accel, boards, bounds, channel, qmp, run_directory
from osbuild.runtime import shares as sharing
from osbuild.runtime.abilities import Abilities
from osbuild.runtime.base import CONSOLE, Guest, Machine, least_memory
from osbuild.runtime.options import value
from osbuild.runtime.shares import Share

LOG: Final = "qemu.log"
VSOCK_LOG: Final = "vsock.log"  # of the program that does the work of a vsock, where there is one
CHANNEL: Final = "agent.channel.0"  # the serial port's name, as agents of Kata 1.x and ours look for it

_QUIT_SECONDS: Final = 1.0  # for an answer to "quit"
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
# microvm's and virt's slots speak virtio 0.9 unless told, which a virtiofsd does not.
_MODERN: Final = ("-global", "virtio-mmio.force-legacy=false")
# Not here, because under TCG they were measured to make no difference: noreplace-smp, mitigations=off, tsc=reliable,
# no_timer_check, rcupdate.rcu_expedited=1, i8042.*, cryptomgr.notests, random.trust_cpu=on, pci=lastbus=0, lpj=, quiet.
# A console that says everything costs less than 20 ms, and is what autopsy reads.
_WORDS: Final = (
    "panic=-1",  # restart at once …
    "reboot=t",  # … by a triple fault, which every machine has, and which -no-reboot makes the end of QEMU
    "cgroup_no_v1=all",  # Kata's agent as PID 1 gives up on kernels without version 1, unless told
)
_CAREFUL: Final = Abilities(sandbox=True, parallel=False)
_PLUG_WORDS: Final = (
    "memhp_default_state=offline",  # so that it is the agent who puts it to use
    "memory_hotplug.online_policy=auto-movable",  # and nothing in it is there for good: it can be taken away again
)


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
    with run_directory.opened() as run:
        agent = run / "agent.sock"
        with (
            channel.opened(transport, agent, run, (work / VSOCK_LOG).absolute()) as (way, device),
            network.opened(machine.network, cpus=machine.cpus) as net,
            sharing.opened(machine.shares, run, (work / sharing.LOG).absolute()) as directories,
            qmp.connected() as (monitor, theirs),
        ):
            able, shared = abilities.look(qemu), directories.shares if directories is not None else ()
            options = arguments(
                machine, console=console, agent=agent, accel=chosen.name, able=able, vsock=device, net=net,
                shares=shared, monitor=theirs.fileno(),
            )  # fmt: skip
            argv = (str(qemu), *options)
            handed = (
                *((device.descriptor,) if isinstance(device, channel.Vhost) else ()),
                *(net.descriptors if net is not None else ()),
                theirs.fileno(),
            )
            began = time.monotonic()
            limits = bounds.limits(bounds.longest_file(machine, shared=_is_served(device, shared)))
            with (
                command.start(*argv, cwd=run, log=log, descriptors=handed, limits=limits) as process,
                _listening(process, monitor),
            ):
                theirs.close()
                yield Guest(
                    process=process, console=console, log=log, agent=agent, channel=way, command=argv, accel=chosen,
                    monitor=monitor, network=net, shares=directories, started=began,
                    disk_limit=bounds.disk_limit(machine), facts=_facts(machine, able),
                )  # fmt: skip


def _facts(machine: Machine, able: Abilities) -> dict[str, str]:
    """What the report says of the machine that only its VMM knows."""
    return {
        "board": boards.board(machine, find_arch(machine.arch)),
        "attached": boards.attached(machine),
        "sandbox": "on" if able.sandbox else "off",
    }


@contextlib.contextmanager
def _listening(process: subprocess.Popen[bytes], monitor: qmp.Qmp) -> Iterator[None]:
    """For the block it tells its monitor what happens; then it is told to end, and so closes its files itself.

    One that does not listen gets signals next: command.end.
    """
    monitor.begin()
    try:
        yield
    finally:
        if process.returncode is None and not command.has_ended(process):
            with contextlib.suppress(qmp.QmpError):
                monitor.execute("quit", seconds=_QUIT_SECONDS)
                command.wait(process, command.GRACE_SECONDS)


def ready(arch: Arch, wish: str) -> tuple[Path, accel.Accel]:
    """The program, and the accelerator for a wish of accel.CHOICES; HostError when this machine has no such thing."""
    qemu = Path(command.find(arch.qemu, package=arch.qemu_package))
    return qemu, accel.choose(wish, arch, qemu, cache=_cache())


def arguments(
    machine: Machine,
    *,
    console: Path,
    agent: Path,
    accel: str,
    able: Abilities = _CAREFUL,
    vsock: channel.Device = None,
    net: GuestNetwork | None = None,
    shares: Sequence[Share] = (),
    monitor: int | None = None,
) -> tuple[str, ...]:
    """QEMU's command line but for its name, decided without a look at the host."""
    arch = find_arch(machine.arch)
    bus = boards.bus(machine, arch)
    return (
        *boards.plug(machine),
        *boards.arguments(machine, arch, shared=_is_served(vsock, shares)),
        "-accel", _accel(machine, arch, accel, able),
        *_processors(machine, arch, accel),
        "-kernel", str(machine.kernel.vmlinux.path),
        "-append", " ".join(words(machine, accel=accel)),
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
        "-display", "none",
        *(("-sandbox", _SANDBOX) if able.sandbox else ()),
        "-chardev", f"file,id=console,path={value(console)}",
        "-serial", "chardev:console",
        "-object", "rng-random,id=entropy,filename=/dev/urandom",
        "-device", f"virtio-rng-{bus},rng=entropy",
        "-chardev", f"socket,id=agent,path={value(agent)},server=on,wait=off",
        "-device", f"virtio-serial-{bus}",
        "-device", f"virtserialport,chardev=agent,name={CHANNEL}",
        *_vsock(vsock, bus),
        *_network(machine.mac, bus),
        *(_card(net, bus) if net is not None else ()),
        *(_MODERN if bus == "device" and any(share.socket for share in shares) else ()),
        *(word for number, share in enumerate(shares) for word in _share(share, f"share{number}", bus)),
        *(("-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control")
          if monitor is not None else ()),
    )  # fmt: skip


def words(machine: Machine, *, accel: str) -> tuple[str, ...]:
    """The kernel's command line: ours, those that find the root, and the user's last, since the later of two wins."""
    arch = find_arch(machine.arch)
    return (
        f"console={arch.console}",
        arch.early,  # a kernel that dies before it has a console is then not silent; costs some 20 ms
        *_WORDS,
        *(arch.tcg_words if accel == "tcg" else ()),
        *(arch.lonely_words if accel == "tcg" and machine.cpus == 1 and not machine.pluggable else ()),
        *(_PLUG_WORDS if machine.pluggable else ()),
        *machine.root.words,
        f"osbuilder.nonce={machine.nonce}",
        *machine.words,
    )


def missing_for_nvdimm(arch: Arch) -> str:
    """The package with the firmware, where the machine needs one to announce an NVDIMM and it is not here."""
    return arch.firmware_package if arch.firmware and not Path(arch.firmware).is_file() else ""


def refuse_what_cannot_boot(machine: Machine) -> None:
    """What no guest is needed for to know."""
    for path in machine.inputs:
        if not path.is_file():
            raise InputError(f"there is no file {path}")
    arch = find_arch(machine.arch)
    boards.refuse(machine, arch)
    if boards.attached(machine) == boards.NVDIMM and (package := missing_for_nvdimm(arch)):
        raise HostError(
            f"a guest of {arch.name} with an NVDIMM needs firmware: {arch.firmware} is missing",
            hint=f"apt-get install {package}",
        )
    if machine.cpus < 1 or machine.memory_mib < 1:
        raise SpecError(f"a guest of {machine.cpus} processors and {machine.memory_mib} MiB cannot be")
    if machine.network:
        network.check(machine.network)
    needed = least_memory(machine.root, machine.kernel)
    if needed > machine.memory_mib * MIB:
        least = -(-needed // MIB)
        what = "initramfs needs {} to be unpacked" if isinstance(machine.root, Initrd) else "image needs {}"
        raise SpecError(
            f"this {what.format(f'{least} MiB')}; the guest has {machine.memory_mib} MiB",
            hint=f"--memory {least}",
        )
    channel.choose(machine.transport, machine.agent, channel.look())


def _vsock(device: channel.Device, bus: str) -> tuple[str, ...]:
    match device:
        case channel.Vhost(cid=cid, descriptor=descriptor):
            return ("-device", f"vhost-vsock-{bus},guest-cid={cid},vhostfd={descriptor}")
        case channel.VhostUser(socket=path):
            return (
                "-chardev", f"socket,id=vsock,path={value(path)}",
                "-device", f"vhost-user-vsock-{bus},chardev=vsock",
            )  # fmt: skip
        case None:
            return ()


def _is_served(vsock: channel.Device, shares: Sequence[Share]) -> bool:
    """Whether another process does the work of a device."""
    return isinstance(vsock, channel.VhostUser) or any(share.socket is not None for share in shares)


def _share(share: Share, name: str, bus: str) -> tuple[str, ...]:
    """As Kata's runtime spells it."""
    if share.socket is not None:
        return (
            "-chardev", f"socket,id={name},path={value(share.socket)}",
            "-device", f"vhost-user-fs-{bus},chardev={name},tag={share.tag},queue-size=1024",
        )  # fmt: skip
    access = ",readonly=on" if share.refuses else ""
    return (
        "-fsdev", f"local,id={name},path={value(share.home)},security_model=none,multidevs=remap{access}",
        "-device", f"virtio-9p-{bus},fsdev={name},mount_tag={share.tag}",
    )  # fmt: skip


def _network(mac: str, bus: str) -> tuple[str, ...]:
    """A card whose hub has no other port. There is nothing to boot over it, and the ROM may not be installed."""
    if not mac:
        return ()
    rom = ",romfile=" if bus == "pci" else ""
    return ("-netdev", "hubport,id=net,hubid=0", "-device", f"virtio-net-{bus},netdev=net,mac={mac}{rom}")


def _card(net: GuestNetwork, bus: str) -> tuple[str, ...]:
    """A card with its network behind it, as Kata's runtime spells it: several queues take a vector each way and two."""
    device = f"virtio-net-{bus},netdev=network,mac={net.mac}" + (",romfile=" if bus == "pci" else "")
    match net.card:
        case User(port=port, service=(address, service), descriptor=descriptor):
            forward = f"hostfwd=tcp:127.0.0.1:0-{net.addresses[0].ip}:{port}"
            guestfwd = f"guestfwd=tcp:{address}:{service}-chardev:service"
            return (
                "-chardev", f"socket,id=service,fd={descriptor}",
                "-netdev", f"user,id=network,ipv6=off,restrict=on,{forward},{guestfwd}",
                "-device", device,
            )  # fmt: skip
        case Tap(queues=queues, vhost=vhost):
            several = len(queues) > 1
            files = f"{'fds' if several else 'fd'}={':'.join(map(str, queues))}"
            if vhost:
                files += f",vhost=on,{'vhostfds' if several else 'vhostfd'}={':'.join(map(str, vhost))}"
            if several:
                device += ",mq=on" + (f",vectors={2 * len(queues) + 2}" if bus == "pci" else "")
            return ("-netdev", f"tap,id=network,{files}", "-device", device)


def _accel(machine: Machine, arch: Arch, accel: str, able: Abilities) -> str:
    """Several emulated processors share a thread where QEMU cannot do better.

    But for those that are plugged and taken away: in one thread, QEMU 7.2 waits for itself to end ("qemu_thread_join:
    Resource deadlock avoided"), and aborts.
    """
    several = machine.cpus > 1 and not (machine.pluggable and arch.plugs_cpus)
    return "tcg,thread=single" if accel == "tcg" and several and not able.parallel else accel


def _processors(machine: Machine, arch: Arch, accel: str) -> tuple[str, ...]:
    """Each in a socket of its own where there is room for one more.

    Linux counts a board's empty sockets only where it knows the hypervisor, which TCG's it does not: it is made to
    believe in VMware's, of which QEMU speaks enough.
    """
    cpu, smp = "host" if accel == "kvm" else arch.qemu_cpu, str(machine.cpus)
    if not machine.pluggable or not arch.plugs_cpus:
        return ("-cpu", cpu, "-smp", smp)
    most = machine.cpus + 1
    smp += f",sockets={most},cores=1,threads=1,maxcpus={most}"
    if accel == "kvm":
        return ("-cpu", cpu, "-smp", smp)
    return ("-cpu", f"{cpu},hypervisor=off", "-smp", smp, "-smbios", "type=1,serial=VMware-")


def _cache() -> Cache | None:
    try:
        return default_cache()
    except HostError:
        return None  # only costs a measurement of the accelerator each time
