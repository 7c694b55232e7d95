"""A pod as Kata's runtime and containerd make one: a sandbox, its pause container and a workload, call by call."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild.agent_client import AGENT
from osbuild.artifacts import Initrd, Kernel
from tests.agent_container import DEV, PROC, PTS, SYS, Containers, Later, Message, make_root, process
from tests.agent_guest import booted, contained
from tests.agent_program import BUSYBOX

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="a static busybox is not installed"),
]

SHARED: Final = "/run/kata-containers/shared/containers"
SHM: Final = "/run/kata-containers/sandbox/shm"
SANDBOX: Final = "5f2d0a7c9c0b4f6e8a4d1c3b5e7f9a1b2c3d4e5f60718293a4b5c6d7e8f90123"
WORKLOAD: Final = "a1b2c3d4e5f60718293a4b5c6d7e8f901235f2d0a7c9c0b4f6e8a4d1c3b5e7f9"
MQUEUE: Final = {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                 "options": ["nosuid", "noexec", "nodev"]}  # fmt: skip
CGROUP: Final = {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                 "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}  # fmt: skip
MASKED: Final = ["/proc/asound", "/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
                 "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
                 "/sys/devices/virtual/powercap"]  # fmt: skip
READONLY: Final = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
SECRETS: Final = "/var/run/secrets/kubernetes.io/serviceaccount"
UNITS: Final = "kubepods-besteffort-pod0c1d2e3f.slice:cri-containerd:"
PATHS: Final = "/kubepods/besteffort/pod0c1d2e3f/"


def bind(source: str, destination: str, *options: str) -> Message:
    return {"destination": destination, "type": "bind", "source": source, "options": list(options)}


class Pod:
    """What the host's runtime does, with a directory for the share."""

    one_pid_namespace = False
    pause_score = 998  # a runtime says -998, for which this host may lack the privilege

    def __init__(self, containers: Containers, share: Path, resources: Message) -> None:
        self.containers, self.share, self.resources = containers, share, resources

    def call(self, method: str, /, **fields: Any) -> Any:  # Any: the answer's message
        return self.containers.client.call(AGENT, method, **fields)

    def put(self, name: str, text: str) -> str:
        """A file of the host in the share; where the guest has it."""
        (self.share / name).parent.mkdir(parents=True, exist_ok=True)
        (self.share / name).write_text(text)
        return f"{SHARED}/{name}"

    def link(self, name: str, target: str) -> None:
        (self.share / name).symlink_to(target)

    def put_root(self, name: str) -> None:
        make_root(self.share / name / "rootfs")
        (self.share / name / "rootfs/etc/resolv.conf").touch()  # what is read-only must have the places for mounts

    def storages(self) -> list[Message]:
        # A bind mount stands for virtiofs.
        return [{"driver": "virtio-fs", "source": str(self.share), "fstype": "bind", "mount_point": f"{SHARED}/"}]

    def create_sandbox(self) -> None:
        shm = {"driver": "ephemeral", "source": "shm", "fstype": "tmpfs", "mount_point": SHM,
               "options": ["noexec", "nosuid", "nodev", "mode=1777", "size=67108864"]}  # fmt: skip
        self.call("CreateSandbox", hostname="pod", dns=["nameserver 10.96.0.10"], storages=[*self.storages(), shm],
                  sandbox_pidns=False, sandbox_id=SANDBOX)  # fmt: skip

    def oci(self, name: str, first: Message, mounts: list[Message], cgroups: str, **root: Any) -> Message:
        self.put_root(name)
        return {
            "Version": "1.2.0",
            "Process": first,
            "Root": {"Path": f"{SHARED}/{name}/rootfs", **root},
            "Hostname": "pod",
            "Mounts": mounts,
            "Annotations": {
                "io.kubernetes.cri.sandbox-id": SANDBOX,
                "io.katacontainers.pkg.oci.bundle_path": f"/run/containerd/io.containerd.runtime.v2.task/k8s.io/{name}",
            },
            "Linux": {
                "Namespaces": [{"Type": kind} for kind in ("ipc", "uts", "mount")],  # Kata takes the others out
                "Resources": self.resources,
                "CgroupsPath": cgroups + name,
                "MaskedPaths": MASKED,
                "ReadonlyPaths": READONLY,
            },
        }

    def create_pause(self, cgroups: str) -> None:
        first = process("/bin/sleep", "1000", User={"UID": 65535, "GID": 65535, "AdditionalGids": [65535]},
                        NoNewPrivileges=True, OOMScoreAdj=self.pause_score)  # fmt: skip
        resolv = self.put(f"{SANDBOX}-1a2b3c4d5e6f7a8b-resolv.conf", "nameserver 10.96.0.10\n")
        mounts = [PROC, DEV, PTS, MQUEUE, SYS, bind(SHM, "/dev/shm", "rbind"),
                  bind(resolv, "/etc/resolv.conf", "rbind", "ro", "nosuid", "nodev", "noexec")]  # fmt: skip
        oci = self.oci(SANDBOX, first, mounts, cgroups, Readonly=True)
        oci["Linux"]["Sysctl"] = {
            "net.ipv4.ip_unprivileged_port_start": "0",
            "net.ipv4.ping_group_range": "0 2147483647",
        }
        # Not even where the pod has one namespace of PIDs: it is the pause container's, which joins nobody's.
        self.call("CreateContainer", container_id=SANDBOX, exec_id=SANDBOX, OCI=oci, sandbox_pidns=False)
        self.call("StartContainer", container_id=SANDBOX)

    def create_workload(self, cgroups: str, *args: str) -> None:
        token = f"{WORKLOAD}-0011223344556677-serviceaccount"
        self.put(f"{token}/..2026_11_30/token", "a token\n")
        for link, target in (("..data", "..2026_11_30"), ("token", "..data/token")):
            self.link(f"{token}/{link}", target)
        empty = f"{SHARED}/{SANDBOX}/rootfs/local/cache"
        memory = "/run/kata-containers/sandbox/ephemeral/scratch"
        storages = [
            {"driver": "watchable-bind", "source": f"{SHARED}/{token}", "fstype": "bind",
             "mount_point": f"{SHARED}/watchable/{token}", "options": ["rbind", "rprivate", "ro"]},
            {"driver": "local", "source": "local", "fstype": "local", "mount_point": empty, "options": ["mode=0777"]},
            {"driver": "ephemeral", "source": "tmpfs", "fstype": "tmpfs", "mount_point": memory,
             "options": ["fsgid=2000"]},
        ]  # fmt: skip
        rw = ("rbind", "rprivate", "rw")
        mounts = [
            PROC, DEV, PTS, MQUEUE, SYS, CGROUP,
            bind(f"{SHARED}/watchable/{token}", SECRETS, "rbind", "rprivate", "ro"),
            bind(empty, "/cache", *rw),
            bind(memory, "/scratch", *rw),
            bind(self.put(f"{WORKLOAD}-0123456789abcdef-hosts", "127.0.0.1 localhost\n"), "/etc/hosts", *rw),
            bind(self.put(f"{WORKLOAD}-1123456789abcdef-termination-log", ""), "/dev/termination-log", *rw),
            bind(self.put(f"{WORKLOAD}-2123456789abcdef-hostname", "pod\n"), "/etc/hostname", *rw),
            bind(self.put(f"{WORKLOAD}-3123456789abcdef-resolv.conf", "nameserver 10.96.0.10\n"),
                 "/etc/resolv.conf", *rw),
            bind(SHM, "/dev/shm", *rw),
        ]  # fmt: skip
        first = process(*args, Env=["PATH=/bin", "HOSTNAME=pod"], OOMScoreAdj=1000,
                        User={"UID": 0, "GID": 0, "AdditionalGids": [0, 10]},
                        ApparmorProfile="cri-containerd.apparmor.d")  # fmt: skip
        oci = self.oci(WORKLOAD, first, mounts, cgroups)
        self.call("CreateContainer", container_id=WORKLOAD, exec_id=WORKLOAD, OCI=oci, storages=storages,
                  sandbox_pidns=self.one_pid_namespace)  # fmt: skip


class GuestPod(Pod):
    """Without a share, as for Firecracker: what the host has is copied. The guest's own root is the containers'."""

    one_pid_namespace = True
    pause_score = -998

    def _copy(self, name: str, mode: int, data: bytes) -> None:
        self.call("CopyFile", path=f"{SHARED}/{name}", file_size=len(data), file_mode=mode, dir_mode=0o750, data=data)

    def put(self, name: str, text: str) -> str:
        self._copy(name, stat.S_IFREG | 0o644, text.encode())
        return f"{SHARED}/{name}"

    def link(self, name: str, target: str) -> None:
        self._copy(name, stat.S_IFLNK | 0o777, target.encode())

    def put_root(self, name: str) -> None:
        pass

    def storages(self) -> list[Message]:
        return [{"driver": "virtio-fs", "source": "/", "fstype": "bind", "mount_point": f"{SHARED}/{name}/rootfs"}
                for name in (SANDBOX, WORKLOAD)]  # fmt: skip


@pytest.fixture
def pod(sanitized_agent: Path, tmp_path: Path) -> Iterator[Pod]:
    share = tmp_path / "share"
    share.mkdir()
    with contained(sanitized_agent, tmp_path / "log") as (client, _):
        yield Pod(Containers(client), share, {})  # this host may have no controllers


SCRIPT: Final = f"""
cat /etc/hosts /etc/hostname /etc/resolv.conf {SECRETS}/token
hostname
echo done > /dev/termination-log
echo kept > /cache/file && echo kept > /scratch/file && echo shared > /dev/shm/file
echo x > {SECRETS}/x || echo sealed
[ -e /sys/fs/cgroup/cgroup.procs ] && echo ready
exec sleep 1000
"""


def run_workload(pod: Pod, cgroups: str) -> tuple[Later, Later]:
    """Up to where its script sleeps: the waits for the pause container and for the workload."""
    pod.create_sandbox()
    details = pod.call("GetGuestDetails", mem_block_size=True, mem_hotplug_probe=True)
    assert "watchable-bind" in details.agent_details.storage_handlers
    pod.create_pause(cgroups)
    pause = pod.containers.later("WaitProcess", container_id=SANDBOX, exec_id=SANDBOX)
    pod.create_workload(cgroups, "/bin/sh", "-c", SCRIPT)
    work = pod.containers.later("WaitProcess", container_id=WORKLOAD, exec_id=WORKLOAD)
    pod.call("StartContainer", container_id=WORKLOAD)
    text = ""
    while not text.endswith("ready\n"):
        text += pod.call("ReadStdout", container_id=WORKLOAD, exec_id=WORKLOAD, len=32768).data.decode()
    assert text == "127.0.0.1 localhost\npod\nnameserver 10.96.0.10\na token\npod\nsealed\nready\n"
    files = ("/dev/termination-log", "/dev/shm/file", "/scratch/file", "/cache/file")
    assert pod.containers.run_in(WORKLOAD, "cat", *files)[1] == "done\nshared\nkept\nkept\n"
    assert pod.containers.run_in(SANDBOX, "cat", "/dev/shm/file")[1] == "shared\n"
    return pause, work


def end(pod: Pod, pause: Later, work: Later) -> None:
    pod.call("SignalProcess", container_id=WORKLOAD, exec_id=WORKLOAD, signal=15)
    assert work.result().status in {128 + 9, 128 + 15}  # a namespace's first process without a handler is killed
    pod.call("SignalProcess", container_id=WORKLOAD, exec_id="", signal=9)
    pod.call("RemoveContainer", container_id=WORKLOAD)
    assert pod.containers.run_in(SANDBOX, "echo", "alive") == (0, "alive\n")
    pod.call("SignalProcess", container_id=SANDBOX, exec_id=SANDBOX, signal=9)
    assert pause.result().status == 128 + 9
    pod.call("RemoveContainer", container_id=SANDBOX)


@pytest.mark.parametrize("cgroups", [UNITS, PATHS], ids=["systemd's cgroup names", "paths of cgroups"])
def test_a_pod_goes_its_way_from_the_sandbox_to_the_end_as_the_runtime_drives_it(pod: Pod, cgroups: str) -> None:
    oom = pod.containers.later("GetOOMEvent")
    end(pod, *run_workload(pod, cgroups))
    assert not oom.done(0)
    (log,) = pod.share.glob("*-termination-log")
    assert log.read_text() == "done\n"
    assert list((pod.share / "watchable").iterdir()) == []  # what was there was on the agent's own filesystem


@pytest.mark.boot
@pytest.mark.parametrize("cgroups", [UNITS, PATHS], ids=["systemd's cgroup names", "paths of cgroups"])
def test_in_a_guest_a_pod_has_its_limits_and_shares_its_pids(
    kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path, cgroups: str
) -> None:
    resources = {
        "CPU": {"Shares": 2, "Period": 100000, "Quota": 50000},
        "Memory": {"Limit": 64 << 20, "Swap": 64 << 20},
        "HugepageLimits": [{"Pagesize": "2MB"}, {"Pagesize": "1GB"}],  # sizes of the host's
    }
    with booted(kernel, busybox_initrd, tmp_path) as client:
        pod = GuestPod(Containers(client), tmp_path, resources)
        pause, work = run_workload(pod, cgroups)
        stats = pod.call("StatsContainer", container_id=WORKLOAD).cgroup_stats
        assert stats.memory_stats.usage.limit == 64 << 20
        assert stats.cpu_stats.cpu_usage.total_usage > 0
        changed = {
            "CPU": {"Shares": 1024, "Period": 100000, "Quota": -1},
            "Memory": {"Limit": 96 << 20, "Swap": 96 << 20},
        }
        pod.call("UpdateContainer", container_id=WORKLOAD, resources=changed)
        assert pod.call("StatsContainer", container_id=WORKLOAD).cgroup_stats.memory_stats.usage.limit == 96 << 20
        assert pod.containers.run_in(WORKLOAD, "cat", "/proc/1/cmdline")[1] == "/bin/sleep\x001000\x00"
        end(pod, pause, work)
        client.destroy_sandbox()
