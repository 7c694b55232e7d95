"""What fuzz_agent.c starts from: what a runtime says to an agent, one file for each conversation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from osbuild import protos, ttrpc
from osbuild.agent_client import AGENT, HEALTH
from tests.agent_container import DEV, PROC, PTS, description, make_root, process

ROOT: Final = Path("/rootfs")  # where the jail has it
BASE: Final = "/run/kata-containers"
MAC: Final = "02:00:5e:10:00:01"
REQUEST: Final = 1
PAUSE: Final = ttrpc.Frame(stream=0, kind=0x10).encode()  # the host waits for an answer: see fuzz_agent.c
IN_VAIN: Final = {"GetOOMEvent", "ReadStdout", "ReadStderr"}  # what nobody waits for before the next call
DEEPEST: Final = 6
Call = tuple[str, str, Mapping[str, Any]]  # Any: what protobuf takes for a field


_RESOURCES: Final = {
    "Memory": {"Limit": 1 << 26},
    "CPU": {"Shares": 512, "Quota": 50000, "Period": 100000},
    "Pids": {"Limit": 10},
}


def write_seeds(directory: Path) -> int:
    """How many."""
    directory.mkdir(parents=True, exist_ok=True)
    make_root(directory.parent / "rootfs")
    count = 0
    for name, calls in conversations():
        (directory / name).write_bytes(b"".join(frame(2 * i + 1, call) for i, call in enumerate(calls)))
        count += 1
    return count


def frame(stream: int, call: Call) -> bytes:
    service, method, fields = call
    payload = protos.method(service, method).request(**fields).SerializeToString()
    request = ttrpc.Request(service=service, method=method, payload=payload, timeout_nano=10**9)
    made = ttrpc.Frame(stream=stream, kind=REQUEST, payload=request.encode()).encode()
    return made if method in IN_VAIN else made + PAUSE


def agent(method: str, /, **fields: Any) -> Call:
    return AGENT, method, fields


def conversations() -> Iterator[tuple[str, list[Call]]]:
    yield "health", [(HEALTH, "Check", {}), (HEALTH, "Version", {}), agent("GetGuestDetails", mem_block_size=True)]
    yield "sandbox", [_sandbox(), agent("ReseedRandomDev", data=b"random"), agent("SetGuestDateTime", Sec=1, Usec=2)]
    yield "container", [_sandbox(), *_container("one", "cat"), *_talk("one"), *_end("one")]
    yield "terminal", [_sandbox(), *_container("tty", "sh", Terminal=True), *_talk("tty"), *_end("tty")]
    yield "limits", [_sandbox(), *_limited("two"), *_end("two")]
    yield (
        "network",
        [
            agent("UpdateInterface", interface=_interface()),
            agent("UpdateRoutes", routes={"Routes": _routes()}),
            agent("AddARPNeighbors", neighbors={"ARPNeighbors": _neighbors()}),
            agent("ListInterfaces"),
            agent("ListRoutes"),
        ],
    )
    yield "files", [_sandbox(), *_files()]
    yield "storages", [_sandbox(), *_storages(), agent("GetMetrics")]
    yield (
        "plugged",
        [
            agent("OnlineCPUMem", nb_cpus=1),
            agent("MemHotplugByProbe", memHotplugProbeAddr=[1 << 27]),
            agent("AddSwapPath", path="/dev/zram0"),
        ],
    )
    for service in (HEALTH, AGENT):
        for method in protos.schema().methods(service):
            yield f"all-{method}", [(service, method, _fill(protos.method(service, method).request.DESCRIPTOR))]


def _fill(descriptor: Any, depth: int = 0) -> dict[str, Any]:  # Any: protobuf's descriptors
    """Every field of a message, with something in it."""
    found: dict[str, Any] = {}
    for field in descriptor.fields:
        value = _value(field, depth)
        if value is None:
            continue
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = _fill(field.message_type, depth + 1)
            found[field.name] = {entry.get("key", "x"): entry["value"]} if "value" in entry else {}
        else:
            found[field.name] = [value] if field.is_repeated else value
    return found


def _value(field: Any, depth: int) -> Any:
    if field.message_type is not None:
        return _fill(field.message_type, depth + 1) if depth < DEEPEST else None
    return {field.TYPE_STRING: "x", field.TYPE_BYTES: b"x", field.TYPE_BOOL: True}.get(field.type, 1)


def _sandbox() -> Call:
    shm = {
        "driver": "ephemeral",
        "source": "shm",
        "fstype": "tmpfs",
        "options": ["noexec", "nosuid", "size=1m"],
        "mount_point": f"{BASE}/sandbox/shm",
    }
    return agent(
        "CreateSandbox",
        hostname="pod",
        sandbox_id="sandbox",
        dns=["nameserver 192.0.2.1"],
        storages=[shm],
        guest_hook_path="/work/hooks",
        kernel_modules=[],
    )


def _container(name: str, *argv: str, **fields: Any) -> list[Call]:
    oci = description(ROOT, process(*argv, **fields), mounts=(PROC, DEV, PTS), Hostname="host")
    return [
        agent("CreateContainer", container_id=name, exec_id=name, OCI=oci),
        agent("StartContainer", container_id=name),
    ]


def _limited(name: str) -> list[Call]:
    linux = {
        "CgroupsPath": f"/kata/{name}",
        "Sysctl": {"net.ipv4.ip_forward": "1", "kernel.shmmax": "65536"},
        "MaskedPaths": ["/proc/kcore", "/proc/keys"],
        "ReadonlyPaths": ["/proc/sys"],
        "Devices": [{"Path": "/dev/fuse", "Type": "c", "Major": 10, "Minor": 229, "FileMode": 0o666}],
        "Resources": {
            "Devices": [{"Allow": False, "Access": "rwm"}],
        },
        "Seccomp": {
            "DefaultAction": "SCMP_ACT_ALLOW",
            "Architectures": ["SCMP_ARCH_X86_64"],
            "Syscalls": [
                {
                    "Names": ["mkdir", "personality"],
                    "Action": "SCMP_ACT_ERRNO",
                    "errnoret": 1,
                    "Args": [{"Index": 0, "Value": 8, "Op": "SCMP_CMP_EQ"}],
                }
            ],
        },
    }
    first = process("true", NoNewPrivileges=True, Rlimits=[{"Type": "RLIMIT_NOFILE", "Hard": 64, "Soft": 64}])
    hook = {"Path": "/bin/true", "Args": ["true"], "Env": ["A=b"], "Timeout": 1}
    oci = description(ROOT, first, linux=linux, Hooks={"Prestart": [hook], "Poststop": [hook]})
    storage = {
        "driver": "local",
        "source": "local",
        "fstype": "local",
        "options": ["mode=0777"],
        "mount_point": f"{BASE}/sandbox/storage/a",
    }
    return [
        agent("CreateContainer", container_id=name, exec_id=name, OCI=oci, storages=[storage], sandbox_pidns=True),
        agent("StartContainer", container_id=name),
        agent("StatsContainer", container_id=name),
        agent("UpdateContainer", container_id=name, resources=_RESOURCES),
        agent("PauseContainer", container_id=name),
        agent("ResumeContainer", container_id=name),
        agent("GetOOMEvent"),
    ]


def _talk(name: str) -> list[Call]:
    return [
        agent("WriteStdin", container_id=name, data=b"hello\n"),
        agent("ReadStdout", container_id=name, len=100),
        agent("ReadStderr", container_id=name, len=100),
        agent("TtyWinResize", container_id=name, row=24, column=80),
        agent("ExecProcess", container_id=name, exec_id="exec", process=process("echo", "a")),
        agent("ReadStdout", container_id=name, exec_id="exec", len=100),
        agent("WaitProcess", container_id=name, exec_id="exec"),
        agent("CloseStdin", container_id=name),
        agent("SignalProcess", container_id=name, signal=15),
    ]


def _end(name: str) -> list[Call]:
    return [
        agent("SignalProcess", container_id=name, signal=9),
        agent("WaitProcess", container_id=name),
        agent("RemoveContainer", container_id=name, timeout=1),
    ]


def _interface() -> dict[str, Any]:
    addresses = [{"address": "192.0.2.2", "mask": "24"}, {"family": 1, "address": "2001:db8::2", "mask": "64"}]
    return {"name": "eth0", "device": "eth0", "hwAddr": MAC, "mtu": 1400, "IPAddresses": addresses}


def _routes() -> list[dict[str, Any]]:
    return [
        {"dest": "", "gateway": "192.0.2.1", "device": "eth0"},
        {"dest": "2001:db8:1::/48", "gateway": "2001:db8::1", "device": "eth0", "family": 1, "mtu": 1300},
        {"dest": "198.51.100.0/24", "device": "eth0", "source": "192.0.2.2", "scope": 253, "flags": 4},
    ]


def _neighbors() -> list[dict[str, Any]]:
    return [{"toIPAddress": {"address": "192.0.2.1"}, "device": "eth0", "lladdr": MAC, "state": 2}]


def _files() -> list[Call]:
    path = f"{BASE}/shared/containers/a/file.txt"
    whole = {"path": path, "file_size": 6, "file_mode": 0o100644, "dir_mode": 0o755}
    return [
        agent("CopyFile", **whole, offset=0, data=b"abc"),
        agent("CopyFile", **whole, offset=3, data=b"def"),
        agent("CopyFile", path=f"{path}.d", file_mode=0o040755, dir_mode=0o755),
        agent("CopyFile", path=f"{path}.l", file_mode=0o120777, dir_mode=0o755, data=b"file.txt"),
        agent("GetVolumeStats", volume_guest_path=BASE),
    ]


def _storages() -> list[Call]:
    drivers = ("ephemeral", "local", "overlayfs", "virtio-fs", "9p", "blk", "mmioblk", "nvdimm", "scsi", "bind",
               "watchable-bind")  # fmt: skip
    storages = [
        {
            "driver": driver,
            "source": "02/01" if driver == "blk" else "/rootfs",
            "fstype": "tmpfs" if driver == "ephemeral" else "overlay" if driver == "overlayfs" else "ext4",
            "options": ["lowerdir=/rootfs"] if driver == "overlayfs" else ["ro"],
            "mount_point": f"{BASE}/sandbox/storage/{driver}",
            "fs_group": {"group_id": 7},
        }
        for driver in drivers
    ]
    each = [agent("CreateSandbox", sandbox_id="s", storages=[storage]) for storage in storages]
    return [*each, agent("UpdateEphemeralMounts", storages=storages[:1]), agent("RemoveStaleVirtiofsShareMounts")]
