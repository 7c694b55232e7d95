"""Containers as Docker makes them, decoded by protobuf: what an agent gets to see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from osbuild import protos
from osbuild.agent_values import Device, Storage
from osbuild.container import (
    NO_CAPABILITIES,
    ContainerSpec,
    Mount,
    ProcessSpec,
    Resources,
    Rlimit,
    User,
)

PROCESS = ProcessSpec(args=("/bin/true",))
SPEC = ContainerSpec(id="one", process=PROCESS)


def request(spec: ContainerSpec) -> Any:
    """The message, through its bytes."""
    kind = protos.message("grpc.CreateContainerRequest")
    return kind.FromString(kind(**spec.fields()).SerializeToString())


def test_what_the_real_agent_insists_on_is_always_there() -> None:
    """Kata-contract 2.9; an empty message of capabilities counts, a missing one does not."""
    made = request(replace(SPEC, process=replace(PROCESS, capabilities=NO_CAPABILITIES)))
    assert made.container_id == made.exec_id == "one"
    assert made.HasField("OCI")
    oci = made.OCI
    assert all(oci.HasField(name) for name in ("Process", "Root", "Linux"))
    assert oci.Process.HasField("Capabilities")
    assert oci.Process.Cwd == "/"
    assert oci.Linux.HasField("Resources")
    assert "mount" in {namespace.Type for namespace in oci.Linux.Namespaces}
    assert oci.Linux.CgroupsPath == "/kata/one"


def test_nobody_gets_cap_mknod_or_a_network_of_his_own() -> None:
    oci = request(SPEC).OCI
    capabilities = oci.Process.Capabilities
    for names in (capabilities.Bounding, capabilities.Effective, capabilities.Permitted):
        assert "CAP_CHOWN" in names
        assert not {"CAP_MKNOD", "CAP_SYS_ADMIN"} & set(names)
    assert not capabilities.Inheritable
    assert not capabilities.Ambient
    assert {namespace.Type for namespace in oci.Linux.Namespaces} == {"pid", "ipc", "uts", "mount", "cgroup"}
    assert not any(namespace.Path for namespace in oci.Linux.Namespaces)


def test_docker_s_mounts_are_in_an_order_in_which_they_can_be_made() -> None:
    mounts = {mount.destination: mount for mount in request(SPEC).OCI.Mounts}
    order = list(mounts)
    for inner in order:
        for outer in order:
            if inner.startswith(f"{outer}/"):
                assert order.index(outer) < order.index(inner)
    assert {"/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys", "/sys/fs/cgroup"} == set(mounts)
    for read_only in ("/sys", "/sys/fs/cgroup"):
        assert "ro" in mounts[read_only].options
    assert "newinstance" in mounts["/dev/pts"].options


def test_what_must_not_be_read_is_masked() -> None:
    linux = request(SPEC).OCI.Linux
    assert {"/proc/kcore", "/sys/firmware", "/proc/keys"} <= set(linux.MaskedPaths)
    assert {"/proc/sys", "/proc/sysrq-trigger"} <= set(linux.ReadonlyPaths)


def test_every_wish_travels_under_its_own_name() -> None:
    process = ProcessSpec(
        args=("a", "b"), env=("X=1",), cwd="/srv", user=User(uid=1, gid=2, groups=(3, 4), name="me"), terminal=True,
        rows=24, columns=80, rlimits=(Rlimit(kind="RLIMIT_NOFILE", soft=5, hard=6),), no_new_privileges=True,
        oom_score_adj=-7,
    )  # fmt: skip
    spec = ContainerSpec(
        id="all", process=process, root="/root", read_only=True, hostname="host",
        mounts=(Mount(destination="/m", source="s", kind="k", options=("o", "p")),), namespaces=("mount",),
        resources=Resources(memory=1 << 40, memory_swap=2, cpu_shares=3, cpu_quota=4, cpu_period=5, cpus="0-1", pids=6),
        sysctl={"kernel.x": "y"}, masked=("/a",), read_only_paths=("/b",), annotations={"k": "v"},
        devices=(Device(id="d", kind="blk", container_path="/dev/x", vm_path="/dev/vda", options=("z",)),),
        storages=(Storage(driver="blk", mount_point="/s", source="02/01", fstype="ext4", options=("ro",),
                          driver_options=("e",), group=1000, shared=True),),
        seccomp={"DefaultAction": "SCMP_ACT_ALLOW"}, sandbox_pids=True,
    )  # fmt: skip
    made = request(spec)
    got = made.OCI.Process
    assert (list(got.Args), list(got.Env), got.Cwd, got.Terminal) == (["a", "b"], ["X=1"], "/srv", True)
    assert (got.User.UID, got.User.GID, list(got.User.AdditionalGids), got.User.Username) == (1, 2, [3, 4], "me")
    assert (got.ConsoleSize.Height, got.ConsoleSize.Width, got.NoNewPrivileges, got.OOMScoreAdj) == (24, 80, True, -7)
    assert [(limit.Type, limit.Soft, limit.Hard) for limit in got.Rlimits] == [("RLIMIT_NOFILE", 5, 6)]
    oci = made.OCI
    assert (oci.Root.Path, oci.Root.Readonly, oci.Hostname) == ("/root", True, "host")
    assert [(m.destination, m.source, m.type, list(m.options)) for m in oci.Mounts] == [("/m", "s", "k", ["o", "p"])]
    limits = oci.Linux.Resources
    assert (limits.Memory.Limit, limits.Memory.Swap, limits.Pids.Limit) == (1 << 40, 2, 6)
    assert (limits.CPU.Shares, limits.CPU.Quota, limits.CPU.Period, limits.CPU.Cpus) == (3, 4, 5, "0-1")
    assert (dict(oci.Linux.Sysctl), dict(oci.Annotations)) == ({"kernel.x": "y"}, {"k": "v"})
    assert (list(oci.Linux.MaskedPaths), list(oci.Linux.ReadonlyPaths)) == (["/a"], ["/b"])
    assert oci.Linux.Seccomp.DefaultAction == "SCMP_ACT_ALLOW"
    (device,), (storage,) = made.devices, made.storages
    assert (device.id, device.type, device.container_path, device.vm_path) == ("d", "blk", "/dev/x", "/dev/vda")
    assert (storage.driver, storage.source, storage.fstype, storage.mount_point) == ("blk", "02/01", "ext4", "/s")
    assert (storage.fs_group.group_id, storage.shared, list(storage.driver_options)) == (1000, True, ["e"])
    assert made.sandbox_pidns is True


def test_what_is_not_limited_does_not_travel() -> None:
    assert Resources().fields() == {}
    assert not request(SPEC).OCI.Linux.Resources.HasField("Memory")
    assert not request(SPEC).OCI.Linux.HasField("Seccomp")
    assert (
        not request(replace(SPEC, storages=(Storage(driver="local", mount_point="/x"),)))
        .storages[0]
        .HasField("fs_group")
    )
