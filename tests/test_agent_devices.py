"""Storages on devices: a real guest with disks on PCI, SCSI, NVDIMMs and shared directories, some plugged in late.

What came of a mount is seen from outside: files are copied into it, and looked for in the image or the directory.
"""

from __future__ import annotations

import concurrent.futures
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import ttrpc
from osbuild.agent import install_init, read_agent
from osbuild.artifacts import DiskImage, File, Kernel
from osbuild.tree import symlink
from tests.agent_container import DOCKER, Containers, Message, description, make_root, process
from tests.agent_disks import MIB, PROGRAMS, SHARED, Disks, Guest, Storage, plug_in, put_wrapper, run, virtiofsd
from tests.agent_guest import booted
from tests.agent_program import BUSYBOX
from tests.boot_fixtures import boot_kernel, image_of, skeleton

__all__ = ["boot_kernel"]  # a fixture

pytestmark = pytest.mark.boot

INVALID_ARGUMENT, PERMISSION_DENIED, INTERNAL = 3, 7, 13
ANY_BLOCK_DEVICE: Final = {"Allow": True, "Type": "b", "Major": -1, "Minor": -1, "Access": "rwm"}


@pytest.fixture(scope="module")
def guest_image(agent: File, tmp_path_factory: pytest.TempPathFactory) -> DiskImage:
    """A root as guests have it, with nothing in it but the agent."""
    draft = skeleton()
    draft.put("/var/run", symlink("/run"))
    install_init(draft, read_agent(agent), now=0)
    return image_of(draft.tree(), tmp_path_factory.mktemp("image") / "rootfs.img")


@pytest.fixture(scope="module")
def guest(boot_kernel: Kernel, guest_image: DiskImage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    if not all(Path("/usr/sbin", name).exists() for name in PROGRAMS) or not BUSYBOX.exists():
        pytest.skip(f"disks for the guest need {', '.join(PROGRAMS)} (e2fsprogs, util-linux) and a static busybox")
    home = tmp_path_factory.mktemp("d")
    disks = Disks(home)
    disks.path("fs").mkdir()
    with pytest.MonkeyPatch.context() as patch, virtiofsd(disks.path("fs.sock"), disks.path("fs")) as shared:
        plug_in(disks, make_root(home / "root-files"), shared=shared)
        put_wrapper(home, disks.arguments)
        patch.setattr("osbuild.runtime.bounds.LONGEST", 512 << 20)  # what the wrapper adds are files, too
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
    shown = run("debugfs", "-R", "stat lost+found", str(guest.disks.path("plain"))).decode()
    assert "Group:  4321" in shown
    assert "2770" in shown


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


# --- containers ---


class Hosts:
    """Containers whose root is on a disk."""

    def __init__(self, guest: Guest) -> None:
        self.containers = Containers(guest.client)

    def run(self, name: str, script: str, *, storages: tuple[Storage, ...] = (), linux: Message | None = None,
            mounts: tuple[Message, ...] = (), **fields: Any) -> tuple[int, str]:  # fmt: skip
        root = ext4("blk", "17", f"{name}/rootfs")
        first = process("sh", "-c", script, capabilities=[*DOCKER, "CAP_SYS_ADMIN"])
        allow = {"io.osbuilder.allow-mknod": "true"}  # CAP_MKNOD is taken away without it
        about = description(Path(root["mount_point"]), first, linux=linux, Annotations=allow)
        about["Mounts"] += mounts
        return self.containers.run(about, name=name, storages=[root, *storages], **fields)


@pytest.fixture
def hosts(guest: Guest) -> Hosts:
    guest.mount()
    return Hosts(guest)


def namespaces(**fields: Any) -> Message:
    return {"Namespaces": [{"Type": kind} for kind in ("pid", "ipc", "uts", "mount")], **fields}


def test_a_container_lives_on_a_disk_that_is_its_own_again_afterwards(guest: Guest, hosts: Hosts) -> None:
    assert hosts.run("one", "cat /etc/group; echo written > /tmp/new") == (
        0,
        "root:x:0:\nusers:x:1001:\naudio:x:29:user\n",
    )
    assert guest.disks.read("root", "tmp/new") == b"written\n", "nothing holds the disk back"


def test_two_containers_that_share_a_volume_do_not_take_it_from_each_other(guest: Guest, hosts: Hosts) -> None:
    volume = ext4("blk", "10", "volume")
    mount = {"destination": "/volume", "type": "bind", "source": f"{SHARED}/volume", "options": ["rbind", "rw"]}
    about = description(Path(f"{SHARED}/first/rootfs"), process("sleep", "1000"))
    about["Mounts"] += (mount,)
    first = hosts.containers.start(about, name="first", storages=[ext4("blk", "17", "first/rootfs"), volume])
    script = "echo second > /volume/second; cat /volume/second"
    assert hosts.run("second", script, storages=(volume,), mounts=(mount,)) == (0, "second\n")
    assert hosts.containers.run_in(first, "cat", "/volume/second") == (0, "second\n")
    assert guest.disk_of(f"{SHARED}/volume")
    hosts.containers.remove(first)
    assert not guest.disk_of(f"{SHARED}/volume")
    assert guest.disks.read("plain", "second") == b"second\n"


@pytest.mark.parametrize("driver", ["local", "ephemeral"])
def test_what_a_container_leaves_in_the_pods_storage_is_there_for_the_next(hosts: Hosts, driver: str) -> None:
    place = f"/run/kata-containers/sandbox/storage/{driver}"
    storage = {"driver": driver, "source": driver, "mount_point": place, "options": ["mode=0777"]}
    mount = {"destination": "/empty", "type": "bind", "source": place, "options": ["rbind", "rw"]}
    for name, script, text in (("writer", "echo kept > /empty/file", ""), ("reader", "cat /empty/file", "kept\n")):
        assert hosts.run(name, script, storages=(storage,), mounts=(mount,)) == (0, text)


def test_what_a_container_writes_over_its_layers_ends_with_it(guest: Guest, hosts: Hosts) -> None:
    place = f"{SHARED}/over/rootfs"
    layer = ext4("blk", "17", "layer", "ro")
    over = {
        "driver": "overlayfs", "source": "none", "fstype": "overlay", "mount_point": place,
        "options": [f"lowerdir={SHARED}/layer", "io.katacontainers.fs-opt.overlay-rw"],
    }  # fmt: skip
    for _ in range(2):
        about = description(Path(place), process("sh", "-c", "ls /over; echo > /over; cat /etc/passwd"))
        status, text = hosts.containers.run(about, name="over", storages=[layer, over])
        assert status == 0
        assert "No such file" in text, "what the one before has written"
    assert guest.call("GetGuestDetails").agent_details.init_daemon


def device(kind: str, where: str, path: str) -> Message:
    on_bus = kind in ("blk", "scsi")
    return {"type": kind, "container_path": path, "id" if on_bus else "vm_path": where}


@pytest.mark.parametrize(
    ("kind", "where", "name"), [("blk", "11/03", "bridged"), ("scsi", "3:2", "scsi"), ("nvdimm", "/dev/pmem1", "pmem")]
)
def test_a_container_is_given_a_disk_under_the_name_it_wants(
    guest: Guest, hosts: Hosts, kind: str, where: str, name: str
) -> None:
    node = {"Path": "/dev/data", "Type": "b", "Major": 8, "Minor": 0, "FileMode": 0o660}
    script = "dd if=/dev/data bs=1024 skip=1 count=1 2>/dev/null | dd bs=1 skip=120 count=16 2>/dev/null; ls /dev/data"
    found = hosts.run("given", script, linux=namespaces(Devices=[node]), devices=[device(kind, where, "/dev/data")])
    assert found == (0, name.ljust(16, "\0") + "/dev/data\n"), "the label of its filesystem"


@pytest.mark.parametrize("driver", ["blk", "scsi"])
def test_the_node_of_a_disk_can_be_bound_into_a_container(hosts: Hosts, driver: str) -> None:
    place = "/run/kata-containers/sandbox/storage/L2Rldi9kYXRh"
    options = ["rbind", "rprivate", "rw"]
    source = {"blk": "11/03", "scsi": "3:2"}[driver]
    storage = {"driver": driver, "source": source, "fstype": "bind", "mount_point": place, "options": options}
    mount = {"destination": "/data", "type": "bind", "source": place, "options": options}
    assert hosts.run("bound", "[ -b /data ] && echo disk", storages=(storage,), mounts=(mount,)) == (0, "disk\n")


def root_numbers(hosts: Hosts) -> dict[str, tuple[int, int]]:
    """Numbers of block devices by name, as every container may see them."""
    _, text = hosts.run("looks", "cat /proc/partitions")
    rows = [line.split() for line in text.splitlines()[2:]]
    return {row[3]: (int(row[0]), int(row[1])) for row in rows}


def test_no_container_reaches_the_root_even_with_all_that_a_host_can_give_it(hosts: Hosts) -> None:
    numbers = root_numbers(hosts)
    script = "".join(
        f"mknod /dev/{name} b {major} {minor} && dd if=/dev/{name} count=1 >/dev/null 2>&1 && echo {name}; "
        for name, (major, minor) in numbers.items()
    )
    linux = namespaces(Resources={"Devices": [ANY_BLOCK_DEVICE, {**ANY_BLOCK_DEVICE, "Type": "a"}]})
    _, text = hosts.run("attacker", script, linux=linux)
    reached = {line for line in text.splitlines() if "mknod" not in line}
    assert {"pmem0", "pmem0p1"} <= set(numbers)
    assert reached == set(numbers) - {"pmem0", "pmem0p1"}


@pytest.mark.parametrize("where", ["/dev/pmem0", "/dev/pmem0p1"])
def test_the_root_is_not_given_to_a_container(hosts: Hosts, where: str) -> None:
    major, minor = root_numbers(hosts)[where.removeprefix("/dev/")]
    node = {"Path": "/dev/data", "Type": "b", "Major": major, "Minor": minor}
    for devices in ([device("nvdimm", where, "/dev/data")], []):
        with pytest.raises(ttrpc.StatusError) as refused:
            hosts.run("given", "true", linux=namespaces(Devices=[node]), devices=devices)
        assert refused.value.code == PERMISSION_DENIED


def test_devices_that_cannot_be_passed_on_are_refused_by_name(hosts: Hosts) -> None:
    node = {"Path": "/dev/data", "Type": "b", "Major": 8, "Minor": 0}
    for kind in ("vfio-pci", "vfio-pci-gk", "vfio-ap", "ccw", ""):
        with pytest.raises(ttrpc.StatusError) as refused:
            hosts.run(
                "given", "true", linux=namespaces(Devices=[node]), devices=[device(kind, "0000:00:01.0", "/dev/data")]
            )
        assert kind in refused.value.message
