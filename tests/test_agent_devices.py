"""Storages on devices: a real guest with disks on PCI, SCSI, NVDIMMs and shared directories, some plugged in late.

What came of a mount is seen from outside: files are copied into it, and looked for in the image or the directory.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from osbuild import ttrpc
from osbuild.agent import install_init, read_agent
from osbuild.agent_client import AGENT, AgentClient
from osbuild.arch import X86_64
from osbuild.artifacts import DiskImage, File, Kernel
from osbuild.tree import symlink
from tests.agent_guest import booted
from tests.boot_fixtures import boot_kernel, image_of, skeleton

__all__ = ["boot_kernel"]  # a fixture

pytestmark = pytest.mark.boot

SHARED: Final = "/run/kata-containers/shared/containers"
MIB: Final = 1 << 20
PERMISSION_DENIED, INVALID_ARGUMENT, INTERNAL = 7, 3, 13
VIRTIOFSD: Final = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd", "/usr/bin/virtiofsd")

Storage = dict[str, Any]  # Any: a grpc.Storage


class Disks:
    """What the guest of these tests has besides its root: QEMU's arguments for it, and where it is seen from here."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.arguments: list[str] = []
        self.qmp = home / "qmp"

    def path(self, name: str) -> Path:
        return self.home / name

    def add(self, *arguments: str) -> None:
        self.arguments += arguments

    def image(self, name: str, *, size: int = 16 * MIB) -> Path:
        """An ext4 of mke2fs's."""
        path = self.path(name)
        with path.open("wb") as file:
            file.truncate(size)
        command = ("mke2fs", "-q", "-F", "-t", "ext4", "-L", name, str(path))
        subprocess.run(command, check=True, env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"})
        return path

    def disk(self, name: str, device: str) -> None:
        path = self.image(name)
        self.add(
            "-drive", f"if=none,id={name},file={path},format=raw,cache=unsafe", "-device", f"{device},drive={name}"
        )

    def read(self, name: str, file: str) -> bytes:
        """A file in an image, by e2fsprogs."""
        command = ("debugfs", "-R", f"cat {file}", str(self.path(name)))
        path = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
        return subprocess.run(command, check=True, capture_output=True, env=path).stdout


class Guest:
    def __init__(self, client: AgentClient, disks: Disks) -> None:
        self.client, self.disks = client, disks

    def call(self, method: str, /, **fields: Any) -> Any:
        return self.client.call(AGENT, method, **fields)

    def refuses(self, *storages: Storage) -> ttrpc.StatusError:
        with pytest.raises(ttrpc.StatusError) as refused:
            self.mount(*storages)
        return refused.value

    def mount(self, *storages: Storage) -> None:
        self.call("CreateSandbox", storages=storages)

    def copy(self, path: str, data: bytes) -> None:
        self.call("CopyFile", path=path, data=data, file_size=len(data), file_mode=stat.S_IFREG | 0o644)

    def metric(self, family: str, **labels: str) -> float | None:
        for found in text_string_to_metric_families(self.call("GetMetrics").metrics):
            for sample in found.samples:
                if sample.name == family and sample.labels == labels:
                    return sample.value
        return None

    def disk_of(self, place: str) -> str | None:
        """The device whose filesystem is mounted there and can be written to."""
        for found in text_string_to_metric_families(self.call("GetMetrics").metrics):
            for sample in found.samples:
                if found.name == "kata_guest_filesystem_bytes" and sample.labels["mountpoint"] == place:
                    return str(sample.labels["disk"])
        return None

    def plug(self, *commands: dict[str, Any]) -> None:
        """Commands to QEMU itself."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.disks.qmp))
            file = connection.makefile("rwb")
            file.readline()
            for command in ({"execute": "qmp_capabilities"}, *commands):
                file.write(json.dumps(command).encode() + b"\n")
                file.flush()
                while "return" not in (answer := json.loads(file.readline())):
                    assert "error" not in answer, answer


@contextlib.contextmanager
def virtiofsd(socket_path: Path, source: Path) -> Iterator[bool]:
    program = next((path for path in VIRTIOFSD if Path(path).exists()), None)
    if program is None or os.geteuid() != 0:
        yield False
        return
    command = (program, f"--socket-path={socket_path}", "-o", f"source={source}", "-o", "sandbox=chroot")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 10
        while not socket_path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        try:
            yield process.poll() is None
        finally:
            process.kill()


def put_wrapper(home: Path, arguments: list[str]) -> None:
    """A QEMU that is given some arguments more."""
    real = shutil.which(X86_64.qemu)
    quoted = " ".join(f"'{argument}'" for argument in arguments)
    wrapper = home / "bin" / X86_64.qemu
    wrapper.parent.mkdir()
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *virtserialport*) exec {real} "$@" {quoted} ;; esac\nexec {real} "$@"\n'
    )
    wrapper.chmod(0o755)


def has(disks: Disks, *, shared: bool) -> None:
    """Everything that the tests below speak of."""
    disks.disk("plain", "virtio-blk-pci,addr=0x10")
    disks.add("-device", "pci-bridge,id=bridge,chassis_nr=9,addr=0x11")
    disks.disk("bridged", "virtio-blk-pci,bus=bridge,addr=0x03")
    disks.disk("function", "virtio-blk-pci,addr=0x14.0x1")
    disks.add("-device", "virtio-rng-pci,addr=0x14.0x0,multifunction=on,rng=entropy")
    disks.add("-device", "pcie-root-port,id=late-port,chassis=7,addr=0x12")
    disks.add("-device", "virtio-scsi-pci,id=scsi,addr=0x13")
    disks.disk("scsi", "scsi-hd,bus=scsi.0,channel=0,scsi-id=3,lun=2")
    disks.image("late")
    pmem = disks.image("pmem", size=128 * MIB)
    disks.add(
        "-m", "256M,slots=4,maxmem=4G",
        "-object", f"memory-backend-file,id=pmem,mem-path={pmem},size=128M,share=on",
        "-device", "nvdimm,memdev=pmem",
    )  # fmt: skip
    swap = disks.path("swap")
    swap.write_bytes(bytes(4 * MIB))
    subprocess.run(["/usr/sbin/mkswap", "-q", str(swap)], check=True)
    disks.add("-drive", f"if=none,id=swap,file={swap},format=raw", "-device", "virtio-blk-pci,drive=swap,addr=0x15")
    disks.path("nine").mkdir()
    disks.add(
        "-fsdev", f"local,id=nine,path={disks.path('nine')},security_model=none",
        "-device", "virtio-9p-pci,fsdev=nine,mount_tag=nine",
        "-qmp", f"unix:{disks.qmp},server=on,wait=off",
    )  # fmt: skip
    if shared:
        disks.add(
            "-object", "memory-backend-memfd,id=memory,size=256M,share=on",
            "-numa", "node,memdev=memory",
            "-chardev", f"socket,id=fs,path={disks.path('fs.sock')}",
            "-device", "vhost-user-fs-pci,chardev=fs,tag=kataShared",
        )  # fmt: skip
    # At the end: devices behind it that name no bus would be put on it.
    disks.add("-device", "pxb-pcie,id=numa,bus_nr=32,addr=0x16", "-device", "pcie-root-port,bus=numa,id=np,chassis=8")
    disks.disk("numa", "virtio-blk-pci,bus=np")


@pytest.fixture(scope="module")
def guest_image(agent: File, tmp_path_factory: pytest.TempPathFactory) -> DiskImage:
    """A root as guests have it, with nothing in it but the agent."""
    draft = skeleton()
    draft.put("/var/run", symlink("/run"))
    install_init(draft, read_agent(agent), now=0)
    return image_of(draft.tree(), tmp_path_factory.mktemp("image") / "rootfs.img")


@pytest.fixture(scope="module")
def guest(boot_kernel: Kernel, guest_image: DiskImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    if not all(Path("/usr/sbin", name).exists() for name in ("mke2fs", "debugfs", "mkswap")):
        pytest.skip("disks for the guest need mke2fs and debugfs (e2fsprogs) and mkswap (util-linux)")
    home = tmp_path_factory.mktemp("d")
    disks = Disks(home)
    disks.path("fs").mkdir()
    with pytest.MonkeyPatch.context() as patch, virtiofsd(disks.path("fs.sock"), disks.path("fs")) as shared:
        has(disks, shared=shared)
        put_wrapper(home, disks.arguments)
        patch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
        with booted(boot_kernel, guest_image, home / "work") as client:
            yield Guest(client, disks)


def ext4(driver: str, source: str, name: str, *options: str, **fields: Any) -> Storage:
    place = f"{SHARED}/{name}"
    return {"driver": driver, "source": source, "fstype": "ext4", "mount_point": place, "options": options, **fields}


@pytest.mark.parametrize(
    ("driver", "source", "name"),
    [
        ("blk", "10", "plain"),
        ("blk", "10.0", "plain"),
        ("blk", "11/03", "bridged"),
        ("blk", "11.0/03.0", "bridged"),
        ("blk", "14.1", "function"),
        ("blk", "20/00/00", "numa"),
        ("scsi", "3:2", "scsi"),
        ("nvdimm", "/dev/pmem1", "pmem"),
    ],
)
def test_a_disk_is_found_by_its_place_and_written_to(guest: Guest, driver: str, source: str, name: str) -> None:
    data = f"{driver} {source}".encode()
    guest.mount(ext4(driver, source, name))
    guest.copy(f"{SHARED}/{name}/file", data)
    guest.mount()  # a new sandbox: what the one before had is unmounted
    assert guest.disks.read(name, "file") == data


def test_a_disk_is_found_by_its_name(guest: Guest) -> None:
    guest.mount(ext4("blk", "10", "plain"))
    node = guest.disk_of(f"{SHARED}/plain")
    assert node is not None
    for driver in ("blk", "mmioblk"):
        guest.mount(ext4(driver, f"/dev/{node}", "by-name"))
        assert guest.disk_of(f"{SHARED}/by-name") == node


def test_a_disk_that_is_plugged_in_while_a_call_waits_for_it_is_mounted(guest: Guest) -> None:
    path = guest.disks.path("late")
    with concurrent.futures.ThreadPoolExecutor(1) as other:
        mounting = other.submit(guest.mount, ext4("blk", "12/00", "late"))
        time.sleep(0.3)
        assert not mounting.done()
        guest.plug(
            {
                "execute": "blockdev-add",
                "arguments": {"driver": "raw", "node-name": "late", "file": {"driver": "file", "filename": str(path)}},
            },
            {"execute": "device_add", "arguments": {"driver": "virtio-blk-pci", "drive": "late", "bus": "late-port"}},
        )
        mounting.result()
    guest.copy(f"{SHARED}/late/file", b"late")
    guest.mount()
    assert guest.disks.read("late", "file") == b"late"


@pytest.mark.parametrize(
    ("driver", "source"), [("blk", "10/00"), ("blk", "20/01/00"), ("blk", "30/00/00"), ("scsi", "3:3")]
)
def test_a_disk_that_is_not_there_is_named(guest: Guest, driver: str, source: str) -> None:
    error = guest.refuses(ext4(driver, source, "nothing"))
    assert error.code == INTERNAL
    assert source in error.message


@pytest.mark.parametrize(
    ("driver", "source"),
    [("nvdimm", "/dev/pmem0"), ("nvdimm", "/dev/pmem0p1"), ("blk", "/dev/pmem0p1"), ("mmioblk", "/dev/pmem0")],
)
def test_the_guests_own_root_is_never_mounted(guest: Guest, driver: str, source: str) -> None:
    assert guest.refuses(ext4(driver, source, "root", "ro")).code == PERMISSION_DENIED


def test_a_filesystem_that_is_not_there_is_the_kernels_to_refuse(guest: Guest) -> None:
    for type_ in ("xfs", "none", "", "no-such"):
        error = guest.refuses({**ext4("blk", "10", "plain"), "fstype": type_})
        assert error.code in (INTERNAL, INVALID_ARGUMENT)


def test_a_volume_on_a_disk_is_given_to_its_group(guest: Guest) -> None:
    guest.mount(ext4("blk", "10", "plain", fs_group={"group_id": 4321}))
    guest.mount()
    shown = subprocess.run(
        ["/usr/sbin/debugfs", "-R", "stat lost+found", str(guest.disks.path("plain"))], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert "Group:  4321" in shown.stdout
    assert "2770" in shown.stdout


@pytest.mark.parametrize("options", [[], ["trans=virtio,version=9p2000.L,cache=mmap", "nodev"], ["msize=65536"]])
def test_a_directory_of_the_host_is_shared_by_9p(guest: Guest, options: list[str]) -> None:
    shared = {"driver": "9p", "source": "nine", "fstype": "9p", "mount_point": f"{SHARED}/nine", "options": options}
    guest.mount(shared)
    guest.copy(f"{SHARED}/nine/file", str(options).encode())
    assert guest.disks.path("nine/file").read_bytes() == str(options).encode()
    guest.call("RemoveStaleVirtiofsShareMounts")


def test_a_directory_of_the_host_is_shared_by_virtiofs(guest: Guest) -> None:
    if not guest.disks.path("fs.sock").exists():
        pytest.skip("there is no virtiofsd, or nobody who may start one")
    shared = {"driver": "virtio-fs", "source": "kataShared", "fstype": "virtiofs", "mount_point": SHARED}
    guest.mount({**shared, "options": ["nodev"]})
    guest.copy(f"{SHARED}/a/file", b"shared")
    assert guest.disks.path("fs/a/file").read_bytes() == b"shared"
    guest.call("RemoveStaleVirtiofsShareMounts")


def test_huge_pages_are_set_aside_for_those_who_ask(guest: Guest) -> None:
    def huge(name: str, size: str) -> Storage:
        return {
            "driver": "ephemeral", "source": "none", "fstype": "hugetlbfs", "mount_point": f"/run/huge/{name}",
            "options": [f"pagesize=2097152,size={size}"],
        }  # fmt: skip

    before = guest.metric("kata_guest_meminfo", item="hugepages_total")
    assert before is not None
    guest.mount(huge("a", "4194304"), huge("b", "2M"))
    assert guest.metric("kata_guest_meminfo", item="hugepages_total") == before + 3
    assert "huge pages" in guest.refuses(huge("c", "64G")).message
    assert guest.metric("kata_guest_meminfo", item="hugepages_total") == before + 3
    assert "there are no huge pages" in guest.refuses({**huge("d", "8M"), "options": ["pagesize=4M,size=8M"]}).message


def test_swap_is_added_by_place_and_by_name(guest: Guest) -> None:
    assert guest.metric("kata_guest_meminfo", item="swap_total") == 0
    guest.call("AddSwap", PCIPath=[0x15])
    assert guest.metric("kata_guest_meminfo", item="swap_total") == 4 * MIB - 4096
    with pytest.raises(ttrpc.StatusError, match="busy"):
        guest.call("AddSwap", PCIPath=[0x15])
    with pytest.raises(ttrpc.StatusError) as refused:
        guest.call("AddSwapPath", path="/dev/pmem0p1")
    assert refused.value.code == PERMISSION_DENIED
    with pytest.raises(ttrpc.StatusError, match="Invalid argument"):
        guest.call("AddSwapPath", path="/dev/pmem1")  # which holds a filesystem
