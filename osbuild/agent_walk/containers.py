"""Steps: what a container is given, and kept from, as a program inside it sees that."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Final

from osbuild.agent_client import AGENT
from osbuild.agent_process import running
from osbuild.agent_values import Storage
from osbuild.agent_walk.base import CALL_SECONDS, RUN_SECONDS, SHELL, Step, Walk, expect, refused, said
from osbuild.container import CAPABILITIES, NO_CAPABILITIES, ContainerSpec, Mount, Rlimit, User
from osbuild.findings import NotHere, Wrong
from osbuild.ttrpc import Code, StatusError

# linux/capability.h: bit numbers of those Docker gives
_BITS: Final = {
    "CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3, "CAP_FSETID": 4, "CAP_KILL": 5, "CAP_SETGID": 6,
    "CAP_SETUID": 7, "CAP_SETPCAP": 8, "CAP_NET_BIND_SERVICE": 10, "CAP_NET_RAW": 13, "CAP_SYS_CHROOT": 18,
    "CAP_AUDIT_WRITE": 29, "CAP_SETFCAP": 31,
}  # fmt: skip
_STATUS: Final = "cat /proc/self/status"
# What Docker's containers have in /dev; a disk or a pmem would be somebody else's.
_DEVICES: Final = frozenset(
    ("console", "core", "fd", "full", "guest", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin",
     "stdout", "tty", "urandom", "zero")
)  # fmt: skip
_EPHEMERAL: Final = "/run/kata-containers/sandbox/ephemeral/walk"
_LOCAL: Final = "/run/kata-containers/sandbox/local/walk"


def environment(walk: Walk) -> str:
    spec = walk.script(
        'echo "$WALK|$HOME|$(pwd)"', env=("PATH=/bin:/usr/bin", "WALK=a b=c", "HOME=/nowhere"), cwd="/dev"
    )
    expect("environment and directory", walk.output(spec).strip(), "a b=c|/nowhere|/dev")
    return "as they were asked for"


def user(walk: Walk) -> str:
    spec = walk.script(_STATUS, user=User(uid=1234, gid=2345, groups=(3456, 4567)), capabilities=NO_CAPABILITIES)
    found = walk.lines(spec)
    expect("Uid", found["Uid"].split(), ["1234"] * 4)
    expect("Gid", found["Gid"].split(), ["2345"] * 4)
    expect("Groups", {"3456", "4567"} - set(found["Groups"].split()), set())
    return "1234, 2345, and two more groups"


def capabilities(walk: Walk) -> str:
    found = walk.lines(walk.script(_STATUS))
    wanted = f"{sum(1 << _BITS[name] for name in CAPABILITIES):016x}"
    for name in ("CapBnd", "CapPrm", "CapEff"):
        expect(name, found[name], wanted)
    expect("CapInh and CapAmb", (found["CapInh"], found["CapAmb"]), ("0" * 16,) * 2)
    none = walk.lines(walk.script(_STATUS, capabilities=NO_CAPABILITIES))
    expect("CapEff without any", none["CapEff"], "0" * 16)
    expect("CapBnd without any", none["CapBnd"], "0" * 16)
    return f"{wanted}: Docker's without CAP_MKNOD; and none at all"


def limits(walk: Walk) -> str:
    wanted = (Rlimit(kind="RLIMIT_NOFILE", soft=123, hard=456), Rlimit(kind="RLIMIT_CORE", soft=0, hard=0))
    found = walk.output(
        walk.script("ulimit -S -n; ulimit -H -n; cat /proc/self/oom_score_adj", rlimits=wanted, oom_score_adj=321)
    )
    expect("RLIMIT_NOFILE and oom_score_adj", found.split(), ["123", "456", "321"])
    return "123 of 456 files; oom_score_adj 321"


def no_new_privileges(walk: Walk) -> str:
    for wish in (True, False):
        found = walk.lines(walk.script(_STATUS, no_new_privileges=wish))
        expect(f"NoNewPrivs, asked for {wish},", found["NoNewPrivs"], str(int(wish)))
    return "there when asked for only"


def namespaces(walk: Walk) -> str:
    script = "echo $$; for n in pid ipc uts mnt net cgroup; do readlink /proc/self/ns/$n; done"
    with running(walk.client, walk.script(f"{script}; read line")) as process:  # a dead one's numbers are used again
        process.wait_for_output(b"cgroup:", CALL_SECONDS)
        other = walk.output(walk.script(script)).split()
        one = process.stdout.decode().split()
    expect("the first process", one[0], "1")
    same = {name.partition(":")[0] for name in set(one[1:]) & set(other[1:])}
    if {"pid", "mnt"} & same:
        raise Wrong(f"two containers share {', '.join(sorted(same))}")
    if "net" not in same:
        raise Wrong("two containers have networks of their own")
    return f"the first process is 1; two containers share {', '.join(sorted(same))}"


def hidden(walk: Walk) -> str:
    """Masked files read as nothing, masked directories are empty, and /proc/sys and /sys cannot be written."""
    script = """
    for path in /proc/kcore /proc/keys /proc/timer_list /proc/interrupts; do
        if [ -e $path ] && [ -n "$(head -c 1 $path 2>&1)" ]; then echo "can be read: $path"; fi
    done
    if [ -d /sys/firmware ] && [ -n "$(ls /sys/firmware)" ]; then echo "not empty: /sys/firmware"; fi
    for path in /proc/sys/kernel/msgmax /proc/sysrq-trigger; do
        if (echo 9 > $path) 2>/dev/null; then echo "can be written: $path"; fi
    done
    if mkdir /sys/fs/cgroup/walk 2>/dev/null; then echo "can be written: /sys/fs/cgroup"; fi
    echo looked
    """
    expect("what is not hidden", walk.output(walk.script(script)).splitlines(), ["looked"])
    return "nothing in them, nothing to write"


def read_only_root(walk: Walk) -> str:
    spec = replace(
        walk.script("echo x > /walk-was-here && echo written || grep ' / ' /proc/self/mountinfo"), read_only=True
    )
    found = walk.output(spec)
    if "written" in found:
        raise Wrong("a file was made in a root that should be read-only")
    if " / " not in found:
        raise Wrong(f"nobody looked: {found!r}")
    return "nothing can be made in it"


def no_devices(walk: Walk) -> str:
    found = walk.output(
        walk.script("ls /dev; mknod /dev/walk b 259 0 2>/dev/null && echo 'made a node' || true")
    ).split("\n")
    if "made a node" in found:
        raise Wrong("a container made a block device's node: whoever has one writes the image of all (CVE-2026-24834)")
    more = set(filter(None, found)) - _DEVICES
    if more:
        raise Wrong(f"/dev also has {', '.join(sorted(more))}")
    missing = {"null", "zero", "full", "random", "urandom", "tty"} - set(found)
    if missing:
        raise Wrong(f"/dev lacks {', '.join(sorted(missing))}")
    return "Docker's devices; none of the guest's disks, and none can be made"


def device_files(walk: Walk) -> str:
    script = (
        "head -c 3 /dev/zero | od -An -tx1; head -c 8 /dev/urandom | wc -c; echo x > /dev/null; echo ok; "
        "grep -c ' /dev/shm ' /proc/self/mounts"
    )
    found = walk.output(walk.script(script)).split()
    expect("zero, urandom, null and shm", found, ["00", "00", "00", "8", "ok", "1"])
    return "zero, urandom, null, shm"


def sysctl(walk: Walk) -> str:
    spec = replace(walk.script("cat /proc/sys/kernel/msgmax"), sysctl={"kernel.msgmax": "12345"})
    expect("kernel.msgmax", walk.output(spec).strip(), "12345")
    return "kernel.msgmax is 12345"


def seccomp(walk: Walk) -> str:
    if not walk.client.guest_details(seconds=CALL_SECONDS).agent.supports_seccomp:
        raise NotHere("the agent says that it has no seccomp")
    rules = {
        "DefaultAction": "SCMP_ACT_ALLOW",
        "Syscalls": [{"Names": ["mkdir", "mkdirat"], "Action": "SCMP_ACT_ERRNO", "errnoret": 1}],
    }
    script = "mkdir /dev/shm/walk 2>/dev/null && echo made; grep Seccomp: /proc/self/status"
    found = walk.output(replace(walk.script(script), seccomp=rules)).split()
    expect("what a filtered container could do", found, ["Seccomp:", "2"])
    return "mkdir is refused"


def mounts(walk: Walk) -> str:
    view = Mount(destination="/dev/view", source="/etc", kind="bind", options=("rbind", "ro"))
    small = Mount(destination="/dev/small", source="tmpfs", kind="tmpfs", options=("size=64k", "mode=711", "noexec"))
    spec = walk.script(
        "(echo x > /dev/view/walk) 2>/dev/null && echo written; stat -c %a /dev/small; ls /dev/view | head -n 1 | wc -l"
    )
    expect("a bind and a tmpfs", walk.output(replace(spec, mounts=(*spec.mounts, view, small))).split(), ["711", "1"])
    return "a bind that is read-only, a tmpfs with its mode"


def storages(walk: Walk) -> str:
    kinds = walk.client.guest_details(seconds=CALL_SECONDS).agent.storage_handlers
    if kinds and not {"ephemeral", "local"} <= set(kinds):
        raise NotHere(f"the agent's storages are {' '.join(kinds)}")
    here = (
        Storage(driver="ephemeral", source="tmpfs", fstype="tmpfs", mount_point=_EPHEMERAL, options=("size=1m",)),
        Storage(driver="local", source="local", fstype="local", mount_point=_LOCAL, options=("mode=0777",)),
    )
    spec = with_storages(
        walk.script("grep /dev/ephemeral /proc/self/mountinfo; echo x > /dev/local/file && cat /dev/local/file")
    )
    found = walk.output(replace(spec, storages=here))
    if "size=1024k" not in found or not found.endswith("x\n"):
        raise Wrong(f"in the container: {found!r}")
    return "ephemeral with its size, local to write to"


def with_storages(spec: ContainerSpec) -> ContainerSpec:
    """The container with both storages bound into its /dev."""
    made = (
        Mount(destination="/dev/ephemeral", source=_EPHEMERAL, kind="bind", options=("rbind", "rw")),
        Mount(destination="/dev/local", source=_LOCAL, kind="bind", options=("rbind", "rw")),
    )
    return replace(spec, mounts=(*spec.mounts, *made))


def update_ephemeral(walk: Walk) -> str:
    made = Storage(driver="ephemeral", source="tmpfs", fstype="tmpfs", mount_point=_EPHEMERAL, options=("size=1m",))
    script = "echo up; read line; grep /dev/ephemeral /proc/self/mountinfo"
    spec = replace(walk.script(script), storages=(made,))
    with running(walk.client, replace(spec, mounts=with_storages(spec).mounts[:-1])) as process:
        process.wait_for_output(b"up", CALL_SECONDS)
        walk.client.update_ephemeral_mounts([replace(made, options=("size=2m",))], seconds=CALL_SECONDS)
        process.write(b"\n")
        found = process.wait(RUN_SECONDS).stdout
    if b"size=2048k" not in found:
        raise Wrong(f"in the container: {found!r}")
    return "a container sees it grow"


def no_such_program(walk: Walk) -> str:
    try:
        finished = walk.run(walk.spec("/no/such/program"))
    except StatusError as problem:
        if problem.code == Code.UNIMPLEMENTED:
            raise
        return f"refused: {problem.message}"
    if finished.status in (126, 127):
        return f"ended with {finished.status}"
    raise Wrong(f"a program that is not there ended with {finished.status}")


def no_good_container(walk: Walk) -> str:
    """Each of these an agent must refuse, and go on."""
    good = walk.spec(SHELL)
    whole = good.fields()
    bad = {
        "without OCI": whole | {"OCI": {}},
        "a name with a slash": whole | {"container_id": "../walk"},
        "no such root": replace(good, root="/no/such/root").fields(),
        "no such capability": replace(
            good, process=replace(good.process, capabilities=replace(NO_CAPABILITIES, bounding=("CAP_FLY",)))
        ).fields(),
    }
    for name, fields in bad.items():
        try:
            refused(functools.partial(walk.client.call, AGENT, "CreateContainer", seconds=CALL_SECONDS, **fields))
        except Wrong as problem:
            raise Wrong(f"{name}: {problem}") from None
    return f"refused: {', '.join(bad)}"


def remove(walk: Walk) -> str:
    spec = walk.script("exit 0")
    for _ in range(2):  # the name is free again
        walk.run(spec)
    said = refused(lambda: walk.client.remove_container(spec.id, seconds=CALL_SECONDS))
    return f"its name is free again; once more is refused: {said.message}"


def remove_running(walk: Walk) -> str:
    spec = walk.script("sleep 100")
    walk.client.create_container(spec, seconds=CALL_SECONDS)
    walk.client.start_container(spec.id, seconds=CALL_SECONDS)
    walk.client.remove_container(spec.id, timeout=10, seconds=CALL_SECONDS)
    refused(lambda: walk.client.stats_container(spec.id, seconds=CALL_SECONDS))
    return "one that runs, too"


def not_started(walk: Walk) -> str:
    """Created, not started: nothing of it runs yet, and then it does."""
    spec = walk.script("echo started")
    walk.client.create_container(spec, seconds=CALL_SECONDS)
    try:
        refused(lambda: walk.client.create_container(spec, seconds=CALL_SECONDS))
        walk.client.start_container(spec.id, seconds=CALL_SECONDS)
        expect("its output", walk.client.read_stdout(spec.id, seconds=CALL_SECONDS), b"started\n")
        expect("its status", walk.client.wait_process(spec.id, seconds=CALL_SECONDS), 0)
    finally:
        walk.client.remove_container(spec.id, timeout=10, seconds=CALL_SECONDS)
    refused(lambda: walk.client.start_container("nobody", seconds=CALL_SECONDS))
    return "one of that name once; then it runs"


def only_agent(walk: Walk) -> str:
    """Without a shell: the agent itself says its version, in a container."""
    finished = walk.run(walk.spec(walk.place.program, "--version"))
    expect("status", finished.status, 0)
    if not finished.stdout.strip():
        raise Wrong("it wrote nothing")
    vain = walk.run(walk.spec(walk.place.program, "--listen", "unix:/no/such/directory/socket"))
    expect("the status where it cannot listen", vain.status, 1)
    if b"No such file or directory" not in vain.stdout + vain.stderr:
        raise Wrong(f"it does not say why it cannot listen: {said(vain.stdout + vain.stderr)}")
    return f"{finished.stdout.decode(errors='replace').strip()}; where it cannot listen it ends with 1, and says why"


CONTAINERS: Final = (
    Step(call="CreateContainer", about="environment and directory", take=environment, needs=("shell",)),
    Step(call="CreateContainer", about="user and groups", take=user, needs=("shell",)),
    Step(call="CreateContainer", about="capabilities", take=capabilities, needs=("shell",)),
    Step(call="CreateContainer", about="limits of the process", take=limits, needs=("shell",)),
    Step(call="CreateContainer", about="no_new_privs", take=no_new_privileges, needs=("shell",)),
    Step(call="CreateContainer", about="namespaces", take=namespaces, needs=("shell",)),
    Step(call="CreateContainer", about="masked and read-only paths", take=hidden, needs=("shell",)),
    Step(call="CreateContainer", about="a read-only root", take=read_only_root, needs=("shell",)),
    Step(call="CreateContainer", about="no devices of the guest", take=no_devices, needs=("shell",)),
    Step(call="CreateContainer", about="devices that work", take=device_files, needs=("shell",)),
    Step(call="CreateContainer", about="sysctl", take=sysctl, needs=("shell",)),
    Step(call="CreateContainer", about="seccomp", take=seccomp, needs=("shell",)),
    Step(call="CreateContainer", about="mounts", take=mounts, needs=("shell",)),
    Step(call="CreateContainer", about="storages", take=storages, needs=("shell",)),
    Step(call="CreateContainer", about="a program that is not there", take=no_such_program, needs=("containers",)),
    Step(call="CreateContainer", about="what cannot be is refused", take=no_good_container),
    Step(call="CreateContainer", about="the agent as a container", take=only_agent, needs=("no shell",)),
    Step(call="StartContainer", about="it runs when it is started", take=not_started, needs=("shell",)),
    Step(
        call="UpdateEphemeralMounts", about="a tmpfs changes its size", take=update_ephemeral, needs=("shell",),
        optional=True,
    ),
    Step(call="RemoveContainer", about="nothing of it is left", take=remove, needs=("shell",)),
    Step(call="RemoveContainer", about="one that runs", take=remove_running, needs=("shell",)),
)  # fmt: skip
