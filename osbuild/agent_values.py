"""What travels to an agent and back, as plain values: each knows how protobuf's constructors want it (`fields`).

The names are those of agent/proto where they say enough; field traps (kata-contract.md 2.4) end here.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

Fields = dict[str, Any]  # Any: a field takes what protobuf takes

_V6: Final = 1  # types.IPFamily


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentVersion:
    """Which interface it speaks, and which program it is."""

    grpc: str
    agent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentDetails:
    """What the agent says about itself."""

    version: str
    init_daemon: bool  # it is PID 1
    device_handlers: tuple[str, ...]
    storage_handlers: tuple[str, ...]
    supports_seccomp: bool
    extra_features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDetails:
    """What the agent says about its guest."""

    memory_block_bytes: int  # 0 where the kernel cannot plug memory
    memory_probe: bool  # plugged memory has to be announced
    agent: AgentDetails

    @classmethod
    def of(cls, answer: Any) -> Self:
        """From a grpc.GuestDetailsResponse."""
        agent = answer.agent_details
        return cls(
            memory_block_bytes=answer.mem_block_size_bytes,
            memory_probe=answer.support_mem_hotplug_probe,
            agent=AgentDetails(
                version=agent.version,
                init_daemon=agent.init_daemon,
                device_handlers=tuple(agent.device_handlers),
                storage_handlers=tuple(agent.storage_handlers),
                supports_seccomp=agent.supports_seccomp,
                extra_features=tuple(agent.extra_features),
            ),
        )


# --- The network ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """An address of a link, IPv4 or IPv6."""

    address: str
    prefix: int  # travels as decimal text in a field called `mask`

    def fields(self) -> Fields:
        return {"family": _family(self.address), "address": self.address, "mask": str(self.prefix)}

    @classmethod
    def of(cls, answer: Any) -> Self:
        return cls(address=answer.address, prefix=int(answer.mask or 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Interface:
    """A network link: what it is to be, or what it is."""

    name: str
    mac: str = ""
    addresses: tuple[Address, ...] = ()
    mtu: int = 1500
    device: str = ""  # the name it has, or had, on the host; the runtime sends the same as `name`
    device_path: str = ""  # a PCI path to wait for
    kind: str = ""
    flags: int = 0

    def fields(self) -> Fields:
        return {
            "device": self.device or self.name, "name": self.name, "mtu": self.mtu, "hwAddr": self.mac,
            "IPAddresses": [address.fields() for address in self.addresses], "devicePath": self.device_path,
            "type": self.kind, "raw_flags": self.flags,
        }  # fmt: skip

    @classmethod
    def of(cls, answer: Any) -> Self:
        return cls(
            name=answer.name, mac=answer.hwAddr, mtu=answer.mtu, device=answer.device, kind=answer.type,
            addresses=tuple(map(Address.of, answer.IPAddresses)), device_path=answer.devicePath,
            flags=answer.raw_flags,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A route of the main table."""

    device: str
    dest: str = ""  # ADDRESS/PREFIX; empty: the default route
    gateway: str = ""
    source: str = ""
    scope: int = 0
    flags: int = 0
    mtu: int = 0
    v6: bool = False

    def fields(self) -> Fields:
        return {
            "dest": self.dest, "gateway": self.gateway, "device": self.device, "source": self.source,
            "scope": self.scope, "family": int(self.v6), "flags": self.flags, "mtu": self.mtu,
        }  # fmt: skip

    @classmethod
    def of(cls, answer: Any) -> Self:
        return cls(
            device=answer.device, dest=answer.dest, gateway=answer.gateway, source=answer.source, scope=answer.scope,
            flags=answer.flags, mtu=answer.mtu, v6=answer.family == _V6,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Neighbor:
    """Who has an address, so that nobody need ask."""

    address: str
    device: str
    mac: str = ""
    state: int = 0  # NUD_*; 0: permanent
    flags: int = 0

    def fields(self) -> Fields:
        to = {"family": _family(self.address), "address": self.address}
        return {
            "toIPAddress": to, "device": self.device, "lladdr": self.mac, "state": self.state, "flags": self.flags
        }  # fmt: skip


def _family(address: str) -> int:
    return int(ipaddress.ip_address(address).version == 6)


# --- Storages and devices -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """Something the agent mounts before a container starts."""

    driver: str  # blk, mmioblk, scsi, nvdimm, ephemeral, local, overlayfs, virtio-fs, 9p, …
    mount_point: str
    source: str = ""
    fstype: str = ""
    options: tuple[str, ...] = ()
    driver_options: tuple[str, ...] = ()
    group: int | None = None  # that owns the files; travels as field 2 of FSGroup, which has no field 1
    shared: bool = False

    def fields(self) -> Fields:
        made: Fields = {
            "driver": self.driver, "source": self.source, "fstype": self.fstype, "options": list(self.options),
            "mount_point": self.mount_point, "driver_options": list(self.driver_options), "shared": self.shared,
        }  # fmt: skip
        return made if self.group is None else made | {"fs_group": {"group_id": self.group}}


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device of the guest that a container gets."""

    id: str
    kind: str  # blk, mmioblk, scsi, nvdimm, vfio-pci, …
    container_path: str
    vm_path: str = ""
    options: tuple[str, ...] = ()

    def fields(self) -> Fields:
        return {
            "id": self.id, "type": self.kind, "vm_path": self.vm_path, "container_path": self.container_path,
            "options": list(self.options),
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelModule:
    """A module that the guest loads before its sandbox starts."""

    name: str
    parameters: tuple[str, ...] = ()

    def fields(self) -> Fields:
        return {"name": self.name, "parameters": list(self.parameters)}


# --- Numbers --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a container used."""

    cpu_ns: int
    user_ns: int
    kernel_ns: int
    memory: int  # bytes
    memory_limit: int
    memory_peak: int
    memory_failures: int
    pids: int
    pids_limit: int
    memory_details: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, answer: Any) -> Self:
        """From a grpc.StatsContainerResponse."""
        found = answer.cgroup_stats
        cpu, memory, pids = found.cpu_stats.cpu_usage, found.memory_stats.usage, found.pids_stats
        return cls(
            cpu_ns=cpu.total_usage, user_ns=cpu.usage_in_usermode, kernel_ns=cpu.usage_in_kernelmode,
            memory=memory.usage, memory_limit=memory.limit, memory_peak=memory.max_usage,
            memory_failures=memory.failcnt, pids=pids.current, pids_limit=pids.limit,
            memory_details=dict(found.memory_stats.stats),
        )  # fmt: skip
