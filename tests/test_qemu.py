from __future__ import annotations

import dataclasses
import ipaddress
import itertools
import os
import re
import signal
import stat
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from osbuild.arch import find_arch
from osbuild.artifacts import DiskImage, File, Initrd, Kernel
from osbuild.errors import HostError, InputError, SpecError
from osbuild.network import GuestNetwork, Tap, User
from osbuild.runtime import RUNTIMES, abilities, boards, bounds, qemu
from osbuild.runtime.abilities import Abilities
from osbuild.runtime.base import Machine, least_memory
from osbuild.runtime.channel import Device, Vhost, VhostUser

MIB = 1 << 20
CONSOLE, AGENT = Path("/work/console.log"), Path("/run/agent.sock")


def file(path: str, size: int = 1000) -> File:
    return File(path=Path(path), size=size, sha256="")


KERNEL = Kernel(
    vmlinux=file("/k/vmlinux"), vmlinuz=file("/k/vmlinuz"), config=file("/k/config"), release="6.12", arch="x86_64",
    key="", cached=True,
)  # fmt: skip
ARM = dataclasses.replace(KERNEL, arch="aarch64")
WORDS = ("root=/dev/pmem0p1", "rootflags=dax", "ro", "rootfstype=ext4")
IMAGE = DiskImage(file=file("/o/rootfs.img", 8 * MIB), filesystem="ext4", dax=True, words=WORDS)
INITRD = Initrd(file=file("/o/initrd.img"), compression="zstd", unpacked=MIB)


def machine(root: DiskImage | Initrd = IMAGE, **more: object) -> Machine:
    made = Machine(kernel=KERNEL, root=root, nonce="n0nce")
    return dataclasses.replace(made, **more)  # type: ignore[arg-type]


def options(
    root: DiskImage | Initrd = IMAGE,
    *,
    accel: str = "tcg",
    vsock: Device = None,
    net: GuestNetwork | None = None,
    monitor: int | None = None,
    **more: object,
) -> list[tuple[str, str]]:
    """The options in order, each with its value or nothing."""
    made = qemu.arguments(
        machine(root, **more), console=CONSOLE, agent=AGENT, accel=accel, vsock=vsock, net=net, monitor=monitor
    )
    argv = [*made, "-"]
    pairs = itertools.pairwise(argv)
    return [(here, "" if after.startswith("-") else after) for here, after in pairs if here.startswith("-")]


def value(name: str, pairs: list[tuple[str, str]]) -> str:
    (found,) = [value for option, value in pairs if option == name]
    return found


def test_a_dax_image_is_never_shared_for_writing() -> None:
    pairs = options()
    backend = next(value for _, value in pairs if value.startswith("memory-backend-file"))
    assert {"share=on", "readonly=on", "mem-path=/o/rootfs.img", f"size={8 * MIB}"} <= set(backend.split(","))
    assert ("-device", "nvdimm,memdev=root,unarmed=on") in pairs


@pytest.mark.parametrize(("size", "most"), [(8 * MIB, 264), (8 * MIB + 1, 265), (128 * MIB, 384)])
def test_there_is_room_for_the_image_beside_the_memory(size: int, most: int) -> None:
    pairs = options(dataclasses.replace(IMAGE, file=file("/i", size)))
    assert value("-m", pairs) == f"256M,slots=1,maxmem={most}M"
    assert value("-machine", pairs).split(",")[:2] == ["q35", "nvdimm=on"]


def test_an_image_without_a_dax_header_is_a_read_only_disk() -> None:
    pairs = options(dataclasses.replace(IMAGE, dax=False))
    assert "readonly=on" in value("-drive", pairs).split(",")
    assert ("-device", "virtio-blk-pci,drive=root") in pairs
    assert "nvdimm" not in str(pairs)


def test_an_image_can_be_virtio_pmem_and_is_still_shared_for_reading_only() -> None:
    pairs = options(attach="virtio-pmem")
    assert ("-device", "virtio-pmem-pci,memdev=root") in pairs
    backend = next(value for _, value in pairs if value.startswith("memory-backend-file"))
    assert {"share=on", "readonly=on"} <= set(backend.split(","))
    assert value("-m", pairs) == "256M,slots=1,maxmem=264M"
    assert "nvdimm" not in str(pairs)


def test_an_image_on_microvm_is_a_disk_with_no_pci_device() -> None:
    pairs = options(IMAGE.as_disk(), board="microvm")
    assert value("-machine", pairs).startswith("microvm,")
    assert ("-device", "virtio-blk-device,drive=root") in pairs
    assert "pci" not in str(pairs)


def test_an_initramfs_goes_onto_q35_when_asked_to() -> None:
    pairs = options(INITRD, board="q35")
    assert value("-machine", pairs).startswith("q35,")
    assert value("-initrd", pairs) == "/o/initrd.img"
    assert "virtio-serial-pci" in [value for option, value in pairs if option == "-device"]


@pytest.mark.parametrize(
    ("root", "more", "said"),
    [
        (IMAGE, {"board": "microvm"}, "a microvm takes no NVDIMM"),
        (IMAGE, {"board": "microvm", "attach": "virtio-pmem"}, "a microvm takes no NVDIMM"),
        (INITRD, {"board": "microvm", "pluggable": True}, "cannot be added to while it runs"),
        (INITRD, {"board": "virt"}, "a guest of x86_64 has no machine virt"),
        (IMAGE.as_disk(), {"attach": "virtio-pmem"}, "cannot be attached as virtio-pmem"),
        (IMAGE, {"attach": "virtio-blk"}, "cannot be attached as virtio-blk"),
        (IMAGE, {"attach": "virtio-pmem", "kernel": ARM}, "QEMU's machine for aarch64 has no virtio-pmem"),
    ],
)
def test_a_machine_that_cannot_be_is_refused_before_it_starts(
    root: DiskImage | Initrd, more: dict[str, Any], said: str
) -> None:
    with pytest.raises(SpecError, match=said):
        boards.refuse(machine(root, **more), find_arch(more.get("kernel", KERNEL).arch))


@pytest.mark.parametrize("more", [{}, {"attach": "virtio-pmem"}, {"pluggable": True}])
def test_a_core_file_would_have_nothing_of_the_guests_memory(more: dict[str, Any]) -> None:
    assert "dump-guest-core=off" in value("-machine", options(**more)).split(",")


def test_the_longest_file_is_as_long_as_what_may_grow() -> None:
    writable = dataclasses.replace(IMAGE.as_disk(), writable=True)
    assert bounds.longest_file(machine(), shared=False) == bounds.LONGEST
    assert bounds.longest_file(machine(memory_mib=4096), shared=False) == bounds.LONGEST
    assert bounds.longest_file(machine(memory_mib=4096), shared=True) == 4096 * MIB
    assert bounds.longest_file(machine(writable), shared=False) == 2 * bounds.SNAPSHOT
    assert bounds.longest_file(machine(dataclasses.replace(IMAGE, writable=True)), shared=False) == bounds.LONGEST


def test_an_initramfs_boots_on_microvm_with_no_pci_device() -> None:
    pairs = options(INITRD)
    assert value("-machine", pairs).startswith("microvm,")
    assert value("-initrd", pairs) == "/o/initrd.img"
    assert "pci" not in str(pairs)


@pytest.mark.parametrize("root", [IMAGE, INITRD], ids=["image", "initrd"])
def test_nothing_is_there_that_was_not_asked_for(root: DiskImage | Initrd) -> None:
    names = [name for name, _ in options(root)]
    for wanted in ("-nodefaults", "-no-user-config", "-no-reboot", "-sandbox"):
        assert wanted in names
    assert not {"-net", "-netdev", "-nic"} & set(names)


def test_a_qemu_without_seccomp_gets_no_sandbox() -> None:
    able = Abilities(sandbox=False, parallel=False)
    argv = qemu.arguments(machine(), console=CONSOLE, agent=AGENT, accel="tcg", able=able)
    assert "-sandbox" not in argv


def test_commas_in_paths_are_doubled_where_options_have_commas() -> None:
    argv = qemu.arguments(
        machine(dataclasses.replace(IMAGE, file=file("/a,b/c,d.img", MIB))),
        console=Path("/x,y/console.log"), agent=Path("/r,s/agent.sock"), accel="tcg",
    )  # fmt: skip
    text = "\n".join(argv)
    assert "mem-path=/a,,b/c,,d.img," in text
    assert "path=/x,,y/console.log" in text
    assert "path=/r,,s/agent.sock,server=on" in text
    initrd = dataclasses.replace(INITRD, file=file("/a,b/initrd"))
    assert "/a,b/initrd" in qemu.arguments(machine(initrd), console=CONSOLE, agent=AGENT, accel="tcg")


def test_the_users_words_come_last_and_the_roots_before_them() -> None:
    words = qemu.words(machine(words=("panic=5", "debug")), accel="tcg")
    assert words[-2:] == ("panic=5", "debug")
    assert "osbuilder.nonce=n0nce" in words
    start = words.index(WORDS[0])
    assert words[start : start + len(WORDS)] == WORDS


def test_an_initramfs_has_no_root_word() -> None:
    assert not [word for word in qemu.words(machine(INITRD), accel="tcg") if word.startswith("root")]


@pytest.mark.parametrize(("accel", "cpus", "there"), [("tcg", 1, True), ("tcg", 2, False), ("kvm", 1, False)])
def test_only_a_lonely_emulated_processor_does_without_its_timer(accel: str, cpus: int, there: bool) -> None:
    assert ("nolapic_timer" in qemu.words(machine(cpus=cpus), accel=accel)) is there


@pytest.mark.parametrize(("accel", "there"), [("tcg", True), ("kvm", False)])
@pytest.mark.parametrize("cpus", [1, 2])
def test_no_emulated_kernel_looks_whether_its_timer_ticks_in_time(accel: str, there: bool, cpus: int) -> None:
    assert ("no_timer_check" in qemu.words(machine(cpus=cpus), accel=accel)) is there


@pytest.mark.parametrize(
    ("more", "accel", "mended", "said"),
    [
        ({"cpus": 1}, "tcg", False, "tcg"),
        ({"cpus": 2}, "tcg", False, "tcg,thread=single"),
        ({"cpus": 2, "pluggable": True}, "tcg", False, "tcg"),
        ({"cpus": 1, "pluggable": True}, "tcg", False, "tcg"),
        ({"cpus": 2, "pluggable": True, "kernel": ARM}, "tcg", False, "tcg,thread=single"),
        ({"cpus": 2, "kernel": ARM}, "tcg", False, "tcg,thread=single"),
        ({"cpus": 2}, "tcg", True, "tcg"),
        ({"cpus": 2}, "kvm", False, "kvm"),
    ],
)
def test_emulated_processors_share_a_thread_where_qemu_gets_code_that_changes_wrong(
    more: dict[str, Any], accel: str, mended: bool, said: str
) -> None:
    able = Abilities(sandbox=True, parallel=mended)
    argv = qemu.arguments(machine(INITRD, **more), console=CONSOLE, agent=AGENT, accel=accel, able=able)
    assert argv[argv.index("-accel") + 1] == said


@pytest.mark.parametrize(
    ("said", "parallel"),
    [
        ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022", False),
        ("QEMU emulator version 8.0.50", False),
        ("QEMU emulator version 8.1.0", True),
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)", True),
        ("something else", False),
    ],
)
def test_only_a_qemu_that_says_it_is_new_enough_gives_each_processor_a_thread(
    said: str, parallel: bool, tmp_path: Path
) -> None:
    program = tmp_path / "qemu"
    words = "qemu-system-x86_64: -sandbox on: -sandbox support is not enabled in this QEMU binary"
    for sandbox, body in ((True, ""), (False, f'case "$*" in *sandbox*) echo "{words}"; exit 1;; esac\n')):
        program.write_text(f"#!/bin/sh\n{body}echo '{said}'\n")
        program.chmod(0o755)
        abilities.look.cache_clear()
        assert abilities.look(program) == Abilities(sandbox=sandbox, parallel=parallel)


@pytest.mark.parametrize(
    "body", ["exit 1", "kill -KILL $$", "echo cannot allocate memory; exit 1"], ids=["dumb", "killed", "no memory"]
)
def test_a_qemu_that_does_not_start_loses_its_threads_and_keeps_its_sandbox(body: str, tmp_path: Path) -> None:
    program = tmp_path / "qemu"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    assert abilities.look(program) == Abilities(sandbox=True, parallel=False)


def test_a_qemu_that_was_slow_to_answer_keeps_its_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "qemu"
    program.write_text('#!/bin/sh\ncase "$*" in *sandbox*) sleep 60;; esac\necho "QEMU emulator version 8.1.0"\n')
    program.chmod(0o755)
    monkeypatch.setattr(abilities, "SECONDS", 0.2)
    assert abilities.look(program) == Abilities(sandbox=True, parallel=True)


def test_kvm_gets_the_hosts_processor() -> None:
    assert value("-cpu", options(accel="kvm")) == "host"
    assert value("-accel", options(accel="kvm")) == "kvm"


@pytest.mark.parametrize(("root", "bus"), [(IMAGE, "pci"), (INITRD, "device")], ids=["q35", "microvm"])
def test_the_host_kernels_vsock_gets_the_number_and_the_file_that_claims_it(root: DiskImage | Initrd, bus: str) -> None:
    pairs = options(root, vsock=Vhost(cid=77, descriptor=9))
    assert ("-device", f"vhost-vsock-{bus},guest-cid=77,vhostfd=9") in pairs
    assert not any("memory-backend=" in value for _, value in pairs)


@pytest.mark.parametrize("root", [IMAGE, INITRD, dataclasses.replace(IMAGE, dax=False)], ids=["dax", "initrd", "disk"])
def test_a_programs_vsock_gets_all_of_the_guests_memory(root: DiskImage | Initrd) -> None:
    pairs = options(root, vsock=VhostUser(socket=Path("/r/a,b")))
    assert ("-object", "memory-backend-memfd,id=memory,size=256M,share=on") in pairs
    assert "memory-backend=memory" in value("-machine", pairs).split(",")
    assert ("-chardev", "socket,id=vsock,path=/r/a,,b") in pairs
    assert any(value.startswith("vhost-user-vsock-") for _, value in pairs)


@pytest.mark.parametrize("root", [IMAGE, INITRD], ids=["q35", "microvm"])
def test_a_card_is_there_when_asked_for_and_leads_nowhere(root: DiskImage | Initrd) -> None:
    assert not any("virtio-net" in value for _, value in options(root))
    pairs = options(root, mac="02:00:00:00:00:01")
    assert value("-netdev", pairs).startswith("hubport,")
    assert any("mac=02:00:00:00:00:01" in value for _, value in pairs)


def network_of(card: Tap | User) -> GuestNetwork:
    return GuestNetwork(
        kind="tap", mac="02:00:00:00:00:02", mtu=1400, addresses=(ipaddress.ip_interface("10.0.2.15/24"),),
        gateways=(), card=card,
    )  # fmt: skip


@pytest.mark.parametrize(("root", "bus"), [(IMAGE, "pci"), (INITRD, "device")], ids=["q35", "microvm"])
def test_a_tap_is_handed_over_as_an_open_file(root: DiskImage | Initrd, bus: str) -> None:
    pairs = options(root, net=network_of(Tap(queues=(9,))))
    assert value("-netdev", pairs) == "tap,id=network,fd=9"
    rom = ",romfile=" if bus == "pci" else ""
    assert ("-device", f"virtio-net-{bus},netdev=network,mac=02:00:00:00:00:02{rom}") in pairs


@pytest.mark.parametrize(("root", "vectors"), [(IMAGE, ",vectors=6"), (INITRD, "")], ids=["q35", "microvm"])
def test_several_queues_and_the_hosts_own_virtio_are_handed_over_together(
    root: DiskImage | Initrd, vectors: str
) -> None:
    pairs = options(root, net=network_of(Tap(queues=(9, 11), vhost=(12, 13))))
    assert value("-netdev", pairs) == "tap,id=network,fds=9:11,vhost=on,vhostfds=12:13"
    (device,) = [value for _, value in pairs if value.startswith("virtio-net-")]
    assert device.endswith(f",mq=on{vectors}")


def test_qemus_own_network_has_one_way_in_and_one_way_out() -> None:
    pairs = options(net=network_of(User(port=7, service=("10.0.2.100", 7), descriptor=9)))
    assert ("-chardev", "socket,id=service,fd=9") in pairs
    assert value("-netdev", pairs).split(",") == [
        "user", "id=network", "ipv6=off", "restrict=on", "hostfwd=tcp:127.0.0.1:0-10.0.2.15:7",
        "guestfwd=tcp:10.0.2.100:7-chardev:service",
    ]  # fmt: skip


def test_a_card_that_leads_somewhere_lives_beside_one_that_does_not() -> None:
    pairs = options(mac="02:00:00:00:00:01", net=network_of(Tap(queues=(9,))))
    names = [value.split("id=")[1].split(",")[0] for option, value in pairs if option == "-netdev"]
    assert sorted(names) == ["net", "network"]


def test_the_monitor_is_an_open_file() -> None:
    pairs = options(monitor=9)
    assert ("-chardev", "socket,id=monitor,fd=9") in pairs
    assert ("-mon", "chardev=monitor,mode=control") in pairs
    assert "-mon" not in [name for name, _ in options()]


@pytest.mark.parametrize(
    ("root", "room"),
    [(IMAGE, "256M,slots=2,maxmem=776M"), (IMAGE.as_disk(), "256M,slots=1,maxmem=768M"),
     (INITRD, "256M,slots=1,maxmem=768M")],
    ids=["nvdimm", "disk", "initrd"],
)  # fmt: skip
def test_a_pluggable_guest_has_room_for_memory_twice_and_for_a_processor(root: DiskImage | Initrd, room: str) -> None:
    pairs = options(root, pluggable=True, cpus=2)
    assert value("-machine", pairs).startswith("q35")
    assert value("-m", pairs) == room
    assert value("-smp", pairs) == "2,sockets=3,cores=1,threads=1,maxcpus=3"
    assert ("-device", "virtio-mem-pci,id=plugged,memdev=room,requested-size=0") in pairs
    assert not any(value.endswith("-device") for _, value in pairs)


def test_what_can_grow_lies_before_the_image_whose_end_is_no_place_for_memory() -> None:
    devices = [value.split(",")[0] for option, value in options(pluggable=True) if option == "-device"]
    assert devices.index("virtio-mem-pci") < devices.index("nvdimm")


@pytest.mark.parametrize(("accel", "there"), [("tcg", True), ("kvm", False)])
def test_only_an_emulated_pluggable_guest_is_told_of_another_hypervisor(accel: str, there: bool) -> None:
    pairs = options(accel=accel, pluggable=True)
    assert (("-smbios", "type=1,serial=VMware-") in pairs) is there
    assert ("hypervisor=off" in value("-cpu", pairs)) is there
    assert "nolapic_timer" not in value("-append", pairs)


def test_an_aarch64_guest_has_no_room_for_processors_only() -> None:
    pairs = options(IMAGE, kernel=ARM, pluggable=True)
    assert value("-smp", pairs) == "1"
    assert any(value.startswith("virtio-mem-pci,") for _, value in pairs)


@pytest.mark.parametrize("root", [IMAGE, IMAGE.as_disk(), INITRD])
def test_an_aarch64_guest_gets_a_machine_a_console_and_words_of_its_own(root: DiskImage | Initrd) -> None:
    pairs = options(root, kernel=ARM)
    assert value("-machine", pairs).startswith("virt,gic-version=3")
    assert ",nvdimm=on" in value("-machine", pairs) or root is not IMAGE
    assert value("-bios", pairs).endswith("QEMU_EFI.fd") if root is IMAGE else ("-bios", "") not in pairs
    words = value("-append", pairs).split()
    assert {"console=ttyAMA0", "earlycon"} <= set(words)
    assert not {"nolapic_timer", "earlyprintk=ttyS0"} & set(words)
    assert value("-cpu", pairs).startswith("max")


def test_an_x86_64_guest_gets_no_firmware_of_ours() -> None:
    assert "-bios" not in [option for option, _ in options()]


def test_a_missing_file_is_named_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="/k/vmlinux"), qemu.start(machine(), tmp_path):
        pass


def real(tmp_path: Path, root: DiskImage | Initrd) -> Machine:
    """A machine whose files exist."""
    for name in ("vmlinux", "vmlinuz", "root"):
        (tmp_path / name).write_bytes(b"x")
    kernel = dataclasses.replace(
        KERNEL, vmlinux=file(str(tmp_path / "vmlinux")), vmlinuz=file(str(tmp_path / "vmlinuz"))
    )
    root = dataclasses.replace(root, file=dataclasses.replace(root.file, path=tmp_path / "root"))
    return machine(root, kernel=kernel, accel="tcg")


def test_an_initramfs_that_cannot_be_unpacked_is_refused_with_what_it_needs(tmp_path: Path) -> None:
    wanted = real(tmp_path, dataclasses.replace(INITRD, memory=413 * MIB))
    said = "this initramfs needs 413 MiB to be unpacked; the guest has 256 MiB"
    with pytest.raises(SpecError, match=said) as caught, qemu.start(wanted, tmp_path):
        pass
    assert caught.value.hint == "--memory 413"


def test_an_initramfs_gets_in_where_it_just_fits(tmp_path: Path) -> None:
    qemu.refuse_what_cannot_boot(real(tmp_path, dataclasses.replace(INITRD, memory=256 * MIB)))
    with pytest.raises(SpecError, match="needs 257 MiB"):
        qemu.refuse_what_cannot_boot(real(tmp_path, dataclasses.replace(INITRD, memory=256 * MIB + 1)))


def test_a_kernel_larger_than_ours_needs_as_much_more(tmp_path: Path) -> None:
    wanted = real(tmp_path, dataclasses.replace(INITRD, memory=100 * MIB))
    small, large = (dataclasses.replace(wanted.kernel, vmlinux=file("/k/vmlinux", n * MIB)) for n in (10, 63))
    assert least_memory(wanted.root, small) == 100 * MIB
    assert least_memory(wanted.root, large) == 140 * MIB


def test_an_image_of_16_gib_needs_256_mib_for_its_pages(tmp_path: Path) -> None:
    large = dataclasses.replace(IMAGE, file=dataclasses.replace(IMAGE.file, size=16 << 30))
    assert least_memory(large, real(tmp_path, IMAGE).kernel) == 256 * MIB


@pytest.mark.parametrize("more", [{"cpus": 0}, {"memory_mib": 0}, {"cpus": -1}])
def test_a_guest_of_nothing_is_refused(more: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(SpecError), qemu.start(dataclasses.replace(real(tmp_path, IMAGE), **more), tmp_path):  # type: ignore[arg-type]
        pass


def install_fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / "qemu-system-x86_64"
    program.write_text(f'#!/bin/sh\ncase "$*" in *-version*) exit 0;; esac\n{body}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


def test_the_run_directory_is_private_and_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, monkeypatch, "exec sleep 60")
    with qemu.start(real(tmp_path, IMAGE), tmp_path / "work") as guest:
        run = guest.agent.parent
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
        assert len(os.fsencode(guest.agent)) < 108
    assert not run.exists()
    assert guest.process.returncode is not None


def test_a_long_and_strange_work_directory_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, monkeypatch, "exec sleep 60")
    work = tmp_path / ("long, and\nstrange " * 10)
    with qemu.start(real(tmp_path, IMAGE), work) as guest:
        assert guest.console.parent == work
        assert len(os.fsencode(guest.agent)) < 108


def test_a_runtime_directory_that_is_not_there_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "nothing"))
    with qemu.start(real(tmp_path, IMAGE), tmp_path / "work") as guest:
        assert guest.agent.parent.is_dir()


def test_a_qemu_that_ignores_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, monkeypatch, "trap '' TERM; touch ready; while :; do sleep 0.1; done")
    with qemu.start(real(tmp_path, IMAGE), tmp_path / "work") as guest:
        deadline = time.monotonic() + 10
        while not (guest.agent.parent / "ready").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        began = time.monotonic()
    assert time.monotonic() - began < 5
    assert guest.process.returncode == -signal.SIGKILL


def test_a_qemu_that_listens_is_told_to_end_by_its_monitor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """exec python3 -c '
import json, re, signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
monitor = socket.socket(fileno=int(re.search("id=monitor,fd=([0-9]+)", " ".join(sys.argv))[1]))
lines = monitor.makefile("rw")
def say(what): lines.write(json.dumps(what) + "\\n"); lines.flush()
say({"QMP": {}})
for line in lines:
    asked = json.loads(line)
    say({"return": {}, "id": asked["id"]})
    if asked["execute"] == "quit": sys.exit(7)
' "$@"
"""
    install_fake(tmp_path, monkeypatch, body)
    with qemu.start(real(tmp_path, IMAGE), tmp_path / "work") as guest:
        pass
    assert guest.process.returncode == 7


def test_what_a_guests_vmm_may_use_is_set_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, monkeypatch, "exec cat /proc/self/limits")
    with qemu.start(real(tmp_path, IMAGE), tmp_path / "work") as guest:
        guest.process.wait(timeout=20)
    rows = dict(re.findall(r"^Max (.+?)  +(\d+) ", guest.log.read_text(), re.MULTILINE))
    assert rows["core file size"] == "0"
    assert int(rows["open files"]) <= bounds.FILES
    assert rows["file size"] == str(bounds.LONGEST)


def test_a_missing_qemu_is_named_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("osbuild.command.shutil.which", lambda *_, **__: None)
    with pytest.raises(HostError, match="qemu-system-x86_64") as caught, qemu.start(real(tmp_path, IMAGE), tmp_path):
        pass
    assert "apt-get install" in caught.value.hint


@pytest.mark.skipif(not Path("/usr/bin/qemu-system-x86_64").exists(), reason="qemu-system-x86 is not installed")
@pytest.mark.parametrize("root", [IMAGE, INITRD, dataclasses.replace(IMAGE, dax=False)], ids=["dax", "initrd", "disk"])
def test_this_qemu_takes_every_option(root: DiskImage | Initrd, tmp_path: Path) -> None:
    """An empty kernel is all that it complains of: options are looked at first."""
    (tmp_path / "root").write_bytes(bytes(8 * MIB))
    wanted = real(tmp_path, root)
    (tmp_path / "root").write_bytes(bytes(8 * MIB))
    wanted = dataclasses.replace(wanted, mac="02:00:00:00:00:01")
    argv = qemu.arguments(wanted, console=tmp_path / "c", agent=tmp_path / "s", accel="tcg")
    ended = subprocess.run(["/usr/bin/qemu-system-x86_64", *argv], capture_output=True, text=True, timeout=20)
    assert ended.returncode == 1
    assert "kernel" in ended.stderr
    assert "property" not in ended.stderr.lower()


@pytest.mark.parametrize("name", RUNTIMES)
def test_every_runtime_can_be_started(name: str) -> None:
    assert callable(RUNTIMES[name].start)


def test_a_work_directory_that_cannot_be_one_is_the_hosts_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_fake(tmp_path, monkeypatch, "exec sleep 60")
    (tmp_path / "work").write_bytes(b"in the way")
    with pytest.raises(HostError, match="cannot write into"), qemu.start(real(tmp_path, IMAGE), tmp_path / "work"):
        pass


def test_what_a_killed_run_left_is_taken_away_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(tmp_path, monkeypatch, "exec sleep 60")
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as short:
        monkeypatch.setenv("XDG_RUNTIME_DIR", short)
        left, fresh, other = (Path(short, name) for name in ("osbuilder-run-left", "osbuilder-run-new", "other"))
        for path in (left, fresh, other):
            path.mkdir()
            (path / "agent.sock").touch()
        with qemu.start(real(tmp_path, IMAGE), tmp_path / "first") as first:
            running = first.agent.parent
            for path in (left, other, running):
                os.utime(path, (1, 1))
            with qemu.start(real(tmp_path, IMAGE), tmp_path / "second"):
                assert not left.exists()
                assert running.exists()
        assert sorted(Path(short).iterdir()) == [fresh, other]
