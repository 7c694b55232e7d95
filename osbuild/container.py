"""A container as Docker would make it, and the OCI specification that travels to the agent for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from osbuild.agent_values import Device, Fields, Storage

VERSION: Final = "1.0.2"  # of the OCI runtime specification
PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CGROUPS: Final = "/kata"

# Docker's, without CAP_MKNOD: who can make a node of the guest's root device owns that guest, and through a shared
# NVDIMM every other one (CVE-2026-24834).
CAPABILITIES: Final = (
    "CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
)  # fmt: skip
MASKED: Final = (
    "/proc/acpi", "/proc/asound", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/scsi",
    "/proc/sched_debug", "/proc/timer_list", "/proc/timer_stats", "/sys/devices/virtual/powercap", "/sys/firmware",
)  # fmt: skip
READ_ONLY: Final = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
NAMESPACES: Final = ("pid", "ipc", "uts", "mount", "cgroup")  # the sandbox has one network for all


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mount in a container."""

    destination: str
    source: str
    kind: str
    options: tuple[str, ...] = ()

    def fields(self) -> Fields:
        return {
            "destination": self.destination, "source": self.source, "type": self.kind, "options": list(self.options)
        }  # fmt: skip


_QUIET: Final = ("nosuid", "noexec", "nodev")
MOUNTS: Final = (
    Mount(destination="/proc", source="proc", kind="proc", options=_QUIET),
    Mount(
        destination="/dev", source="tmpfs", kind="tmpfs", options=("nosuid", "strictatime", "mode=755", "size=65536k")
    ),
    Mount(
        destination="/dev/pts", source="devpts", kind="devpts",
        options=("nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
    ),
    Mount(destination="/dev/shm", source="shm", kind="tmpfs", options=(*_QUIET, "mode=1777", "size=65536k")),  # noqa: S108
    Mount(destination="/dev/mqueue", source="mqueue", kind="mqueue", options=_QUIET),
    Mount(destination="/sys", source="sysfs", kind="sysfs", options=(*_QUIET, "ro")),
    Mount(destination="/sys/fs/cgroup", source="cgroup", kind="cgroup", options=(*_QUIET, "relatime", "ro")),
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Whom a process runs as."""

    uid: int = 0
    gid: int = 0
    groups: tuple[int, ...] = ()
    name: str = ""

    def fields(self) -> Fields:
        return {"UID": self.uid, "GID": self.gid, "AdditionalGids": list(self.groups), "Username": self.name}


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What a process may do; the message travels even when it lists nothing, for an agent refuses its absence."""

    bounding: tuple[str, ...] = CAPABILITIES
    effective: tuple[str, ...] = CAPABILITIES
    permitted: tuple[str, ...] = CAPABILITIES
    inheritable: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()

    def fields(self) -> Fields:
        return {
            "Bounding": list(self.bounding), "Effective": list(self.effective), "Permitted": list(self.permitted),
            "Inheritable": list(self.inheritable), "Ambient": list(self.ambient),
        }  # fmt: skip


NO_CAPABILITIES: Final = Capabilities(bounding=(), effective=(), permitted=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Rlimit:
    """A limit of a process."""

    kind: str  # RLIMIT_NOFILE
    soft: int
    hard: int

    def fields(self) -> Fields:
        return {"Type": self.kind, "Soft": self.soft, "Hard": self.hard}


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """How much a container may use; 0 is no limit."""

    memory: int = 0  # bytes
    memory_swap: int = 0  # bytes of memory and swap together
    cpu_shares: int = 0
    cpu_quota: int = 0  # microseconds in each period
    cpu_period: int = 0
    cpus: str = ""  # a list such as 0-1,3
    pids: int = 0

    def fields(self) -> Fields:
        made: Fields = {}
        if self.memory or self.memory_swap:
            made["Memory"] = {"Limit": self.memory, "Swap": self.memory_swap}
        if self.cpu_shares or self.cpu_quota or self.cpu_period or self.cpus:
            made["CPU"] = {
                "Shares": self.cpu_shares, "Quota": self.cpu_quota, "Period": self.cpu_period, "Cpus": self.cpus
            }  # fmt: skip
        if self.pids:
            made["Pids"] = {"Limit": self.pids}
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """A program and what it starts with."""

    args: tuple[str, ...]
    env: tuple[str, ...] = (PATH,)
    cwd: str = "/"
    user: User = field(default_factory=User)
    terminal: bool = False
    rows: int = 0  # of the terminal, at its start
    columns: int = 0
    capabilities: Capabilities = field(default_factory=Capabilities)
    rlimits: tuple[Rlimit, ...] = ()
    no_new_privileges: bool = False
    oom_score_adj: int = 0

    def fields(self) -> Fields:
        made: Fields = {
            "Terminal": self.terminal, "User": self.user.fields(), "Args": list(self.args), "Env": list(self.env),
            "Cwd": self.cwd, "Capabilities": self.capabilities.fields(),
            "Rlimits": [limit.fields() for limit in self.rlimits], "NoNewPrivileges": self.no_new_privileges,
            "OOMScoreAdj": self.oom_score_adj,
        }  # fmt: skip
        if self.rows or self.columns:
            made["ConsoleSize"] = {"Height": self.rows, "Width": self.columns}
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class ContainerSpec:
    """A container: what `docker run` would make of these words, in a guest."""

    id: str  # the first character alphanumeric, the rest alphanumeric or . _ -; at least two
    process: ProcessSpec
    root: str = "/"  # a directory of the guest: the guest's own root is good for a try
    read_only: bool = False
    hostname: str = ""
    mounts: tuple[Mount, ...] = MOUNTS
    namespaces: tuple[str, ...] = NAMESPACES
    resources: Resources = field(default_factory=Resources)
    sysctl: Mapping[str, str] = field(default_factory=dict)
    masked: tuple[str, ...] = MASKED
    read_only_paths: tuple[str, ...] = READ_ONLY
    annotations: Mapping[str, str] = field(default_factory=dict)
    devices: tuple[Device, ...] = ()
    storages: tuple[Storage, ...] = ()
    seccomp: Fields | None = None  # a LinuxSeccomp
    sandbox_pids: bool = False  # one pid namespace for the whole sandbox

    @property
    def cgroup(self) -> str:
        """Where its limits are, below the guest's /sys/fs/cgroup."""
        return f"{CGROUPS}/{self.id}"

    def fields(self) -> Fields:
        """A CreateContainerRequest."""
        return {
            "container_id": self.id,
            "exec_id": self.id,  # as the runtime does; the first process may be called by it or by nothing
            "devices": [device.fields() for device in self.devices],
            "storages": [storage.fields() for storage in self.storages],
            "OCI": self.oci(),
            "sandbox_pidns": self.sandbox_pids,
        }

    def oci(self) -> Fields:
        """The OCI specification."""
        linux: Fields = {
            "Resources": self.resources.fields(), "CgroupsPath": self.cgroup, "Sysctl": dict(self.sysctl),
            "Namespaces": [{"Type": name} for name in self.namespaces], "MaskedPaths": list(self.masked),
            "ReadonlyPaths": list(self.read_only_paths),
        }  # fmt: skip
        if self.seccomp is not None:
            linux["Seccomp"] = self.seccomp
        return {
            "Version": VERSION, "Process": self.process.fields(),
            "Root": {"Path": self.root, "Readonly": self.read_only}, "Hostname": self.hostname,
            "Mounts": [mount.fields() for mount in self.mounts], "Annotations": dict(self.annotations),
            "Linux": linux,
        }  # fmt: skip
