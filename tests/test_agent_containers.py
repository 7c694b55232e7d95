"""Containers in the agent: what a runtime may ask for, what it gets, and what is left behind."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild.ttrpc import StatusError
from tests.agent_container import (
    DEV,
    PROC,
    SYS,
    Containers,
    Message,
    description,
    make_root,
    process,
)
from tests.agent_guest import agent_pid, contained, inside
from tests.agent_program import BUSYBOX

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(not BUSYBOX.exists(), reason="a static busybox is not installed"),
]

Pod = tuple[Containers, "subprocess.Popen[bytes]"]
TRUE: Final = process("true")


@pytest.fixture(scope="module")
def pod(sanitized_agent: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pod]:
    with contained(sanitized_agent, tmp_path_factory.mktemp("agent") / "log") as (client, started):
        yield Containers(client), started


@pytest.fixture
def containers(pod: Pod) -> Containers:
    return pod[0]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("containers") / "root")


def left(started: subprocess.Popen[bytes]) -> tuple[int, int, list[str], set[str]]:
    """What the agent holds: descriptors, mounts, children, cgroups."""
    pid = agent_pid(started)
    home = Path(f"/proc/{pid}")
    cgroups = inside(started, "find", "/sys/fs/cgroup", "-mindepth", "1", "-type", "d")
    return (
        len(os.listdir(home / "fd")),
        len((home / "mountinfo").read_text().splitlines()),
        (home / f"task/{pid}/children").read_text().split(),
        set(cgroups.split()),
    )


# --- the life of a container ---


def test_nothing_runs_before_it_is_started_and_everything_afterwards(containers: Containers, root: Path) -> None:
    name = containers.create(description(root, process("sh", "-c", "echo here; exit 7")))
    output = containers.later("ReadStdout", container_id=name, exec_id=name, len=100)
    assert not output.done(0.2)
    containers.call("StartContainer", container_id=name)
    assert output.result().data == b"here\n"
    assert containers.wait(name, name) == 7
    containers.remove(name)


def test_a_container_cannot_be_started_twice_or_made_twice(containers: Containers, root: Path) -> None:
    name = containers.start(description(root, process("sleep", "100")))
    with pytest.raises(StatusError, match="not one to start"):
        containers.call("StartContainer", container_id=name)
    with pytest.raises(StatusError, match="ALREADY_EXISTS"):
        containers.create(description(root, TRUE), name=name)
    containers.remove(name)
    assert containers.run(description(root, TRUE), name=name) == (0, "")


def test_nothing_is_left_of_many_containers(pod: Pod, root: Path) -> None:
    containers, started = pod
    containers.run(description(root, TRUE))
    before = left(started)
    for _ in range(40):
        containers.run(description(root, process("sh", "-c", "sleep 100 & exec >&- 2>&-")))
    for _ in range(10):
        with pytest.raises(StatusError):
            containers.run(description(root, process("absent")))
        with pytest.raises(StatusError):
            containers.create(description(root / "absent", TRUE))
    assert left(started) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"Process": None}, "lacks OCI, Linux, Root or Process"),
        ({"Linux": None}, "lacks OCI, Linux, Root or Process"),
        ({"Root": {"Path": "relative"}}, "not absolute"),
        ({"Linux": {"Resources": {}}}, "lists no namespaces"),
        ({"Linux": {"Namespaces": [{"Type": "user"}]}}, "kind user are not supported"),
        ({"Linux": {"Namespaces": [{"Type": "mount"}], "Sysctl": {"kernel.panic": "1"}}}, "kernel.panic does"),
        ({"Process": {"Args": ["true"], "Cwd": "/"}}, "lacks Process.Capabilities"),
        ({"Process": process()}, "no arguments"),
        ({"Process": process("true", capabilities=["CAP_FLY"])}, "CAP_FLY is no capability"),
        ({"Process": process("true", Rlimits=[{"Type": "RLIMIT_FUN"}])}, "RLIMIT_FUN is no limit"),
        ({"Process": process("true", Cwd="here")}, "not absolute"),
    ],
)  # fmt: skip
def test_a_description_that_lacks_something_is_refused_with_the_reason(
    containers: Containers, root: Path, change: Message, words: str
) -> None:
    oci = {key: value for key, value in {**description(root, TRUE), **change}.items() if value is not None}
    with pytest.raises(StatusError, match=words) as caught:
        containers.create(oci)
    assert caught.value.code == 3


PORTS = ("stdin_port", "stdout_port", "stderr_port")
UNIMPLEMENTED = 12


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"shared_mounts": [{"name": "logs", "src_ctr": "a", "src_path": "/a", "dst_path": "/b"}]}, "served: logs"),
        ({"shared_mounts": [{}]}, "shared between containers"),
        *(({port: 1028}, port) for port in PORTS),
    ],
)
def test_what_is_not_served_of_a_request_for_a_container_is_refused(
    containers: Containers, root: Path, fields: Message, words: str
) -> None:
    with pytest.raises(StatusError, match=words) as caught:
        containers.create(description(root, TRUE), **fields)
    assert caught.value.code == UNIMPLEMENTED
    containers.run(description(root, TRUE), shared_mounts=[], **dict.fromkeys(PORTS, 0))


@pytest.mark.parametrize("port", PORTS)
def test_a_process_whose_streams_are_to_have_ports_is_refused(containers: Containers, root: Path, port: str) -> None:
    name = containers.start(description(root, process("sleep", "1000")))
    with pytest.raises(StatusError, match="not served") as caught:
        containers.call("ExecProcess", container_id=name, exec_id="port", process=TRUE, **{port: 1028})
    assert caught.value.code == UNIMPLEMENTED
    containers.remove(name)


@pytest.mark.parametrize("name", ["", "x", "../x", ".x", "a/b", "-a", "a b", "a" * 300, "shared", "sandbox"])
def test_an_id_that_could_be_a_path_or_is_the_sandboxs_is_refused(
    containers: Containers, root: Path, name: str
) -> None:
    with pytest.raises(StatusError, match="INVALID_ARGUMENT"):
        containers.call("CreateContainer", container_id=name, OCI=description(root, TRUE))


@pytest.mark.parametrize(
    ("oci", "words"),
    [
        ({"Process": process("absent")}, "cannot execute absent: No such file"),
        ({"Process": process("/bin")}, "cannot execute /bin: Permission denied"),
        ({"Process": process("true", Cwd="/etc/passwd")}, "/etc/passwd of the container: Not a directory"),
        ({"Mounts": [{"destination": "/x", "type": "nofs", "source": "x"}]}, "cannot mount nofs on /x: No such device"),
        ({"Mounts": [{"destination": "/x", "type": "tmpfs", "source": "x", "options": ["size=huge"]}]}, "size"),
        ({"Mounts": [{"destination": "/x", "type": "bind", "source": "/absent", "options": ["rbind"]}]}, "/absent"),
        ({"Process": process("true", Terminal=True), "Mounts": [PROC, DEV]}, "no devpts on /dev/pts"),
    ],
)  # fmt: skip
def test_what_a_container_cannot_have_is_told_in_words_and_it_can_be_removed(
    containers: Containers, root: Path, oci: Message, words: str
) -> None:
    with pytest.raises(StatusError, match=words):
        containers.run({**description(root, TRUE), **oci})


def test_a_container_of_which_a_step_failed_is_gone_and_its_id_is_free(pod: Pod, root: Path) -> None:
    containers, started = pod
    before = left(started)
    with pytest.raises(StatusError):
        containers.create(description(root / "absent", TRUE), name="again")
    assert left(started) == before
    assert containers.run(description(root, TRUE), name="again") == (0, "")


def test_a_container_that_does_not_end_in_time_is_not_removed_and_says_etime(pod: Pod, root: Path) -> None:
    containers, started = pod
    name = containers.start(description(root, process("sleep", "1000")))
    pid = agent_pid(started)
    first = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])
    with held_at_its_end(first):
        with pytest.raises(StatusError, match=r"ETIME: Timer expired"):
            containers.remove(name, timeout=1)
        assert containers.call("StatsContainer", container_id=name)
    containers.remove(name)


@contextlib.contextmanager
def held_at_its_end(pid: int) -> Iterator[None]:
    """Whatever kills that process, it stays."""
    libc = ctypes.CDLL(None, use_errno=True)
    seize, detach, stop_at_exit = 0x4206, 17, 0x40
    assert libc.ptrace(seize, pid, None, ctypes.c_void_p(stop_at_exit)) == 0, os.strerror(ctypes.get_errno())
    try:
        yield
    finally:
        os.waitpid(pid, 0x40000000)  # __WALL
        libc.ptrace(detach, pid, None, None)


# --- what it finds ---


def test_a_container_has_the_devices_and_links_every_container_has(containers: Containers, root: Path) -> None:
    script = "stat -c '%n %t,%T %a' null zero full random urandom tty; for x in fd stdin stdout stderr ptmx; do "
    script += "readlink $x; done"
    status, text = containers.run(description(root, process("sh", "-c", script, Cwd="/dev")))
    assert (status, text.split("\n")) == (
        0,
        ["null 1,3 666", "zero 1,5 666", "full 1,7 666", "random 1,8 666", "urandom 1,9 666", "tty 5,0 666",
         "/proc/self/fd", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2", "pts/ptmx", ""],
    )  # fmt: skip


def test_a_description_without_dev_gets_one_and_the_image_keeps_its_own(containers: Containers, root: Path) -> None:
    text = containers.run(description(root, process("sh", "-c", "echo x >/dev/null; ls /dev"), mounts=[]))[1]
    assert "null" in text.split()
    assert not any((root / "dev").iterdir())


def test_devices_of_the_description_are_made_as_it_says(containers: Containers, root: Path) -> None:
    devices = [
        {"Path": "/dev/sub/loud", "Type": "c", "Major": 1, "Minor": 3, "FileMode": 0o640, "UID": 5, "GID": 6},
        {"Path": "/dev/fifo", "Type": "p"},
    ]
    about = {"Devices": devices}
    oci = description(root, process("stat", "-c", "%F %t,%T %a %u %g", "/dev/sub/loud", "/dev/fifo"), linux=about)
    assert containers.run(oci) == (0, "character special file 1,3 640 5 6\nfifo 0,0 666 0 0\n")


def test_mounts_have_their_options_and_binds_can_be_read_only(
    containers: Containers, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("content")
    (tmp_path / "sub").mkdir()
    mounts = [
        PROC, DEV, SYS,
        {"destination": "/mnt/a", "source": str(tmp_path), "type": "bind", "options": ["rbind", "ro", "rprivate"]},
        {"destination": "/mnt/b", "source": str(tmp_path / "file"), "type": "bind", "options": ["bind"]},
        {"destination": "/mnt/c", "source": "tmpfs", "type": "tmpfs",
         "options": ["noexec", "nosuid", "nodev", "noatime", "size=1m", "mode=700"]},
    ]  # fmt: skip
    script = "cat /mnt/a/file /mnt/b; grep ' /mnt/' /proc/mounts; touch /mnt/a/x || echo refused; echo y >/mnt/b"
    text = containers.run(description(root, process("sh", "-c", script), mounts=mounts))[1]
    assert text.startswith("contentcontent")
    lines = {line.split()[1]: line.split() for line in text[14:].splitlines() if " /mnt/" in line}
    assert "ro" in lines["/mnt/a"][3].split(",")
    assert "rw" in lines["/mnt/b"][3].split(",")
    assert "tmpfs /mnt/c tmpfs rw,nosuid,nodev,noexec,noatime,size=1024k,mode=700" in text
    assert "refused" in text
    assert (tmp_path / "file").read_text() == "y\n"


def test_a_read_only_root_cannot_be_written_to_but_its_mounts_can(containers: Containers, root: Path) -> None:
    script = "touch /x || echo refused; touch /dev/x && echo fine"
    oci = description(root, process("sh", "-c", script), Root={"Path": str(root), "Readonly": True})
    status, text = containers.run(oci)
    assert (status, [line for line in text.splitlines() if "touch" not in line]) == (0, ["refused", "fine"])


def test_the_hostname_is_set_only_in_a_uts_namespace_of_its_own(pod: Pod, root: Path) -> None:
    containers, started = pod
    before = inside(started, "hostname")
    assert containers.run(description(root, process("hostname"), Hostname="box")) == (0, "box\n")
    assert inside(started, "hostname") == before


def test_sysctls_of_its_namespaces_are_set(containers: Containers, root: Path) -> None:
    script = "cat /proc/sys/kernel/shmmni /proc/sys/kernel/msgmax"
    about = {"Sysctl": {"kernel.shmmni": "123", "kernel/msgmax": "4567"}}
    assert containers.run(description(root, process("sh", "-c", script), linux=about)) == (0, "123\n4567\n")


def test_the_working_directory_is_made_when_it_is_missing(containers: Containers, root: Path) -> None:
    assert containers.run(description(root, process("pwd", Cwd="/srv/new/place"))) == (0, "/srv/new/place\n")


def test_containers_may_share_one_pid_namespace(containers: Containers, root: Path) -> None:
    one = containers.start(description(root, process("sleep", "100")), sandbox_pidns=True)
    status, text = containers.run(
        description(root, process("sh", "-c", "echo $$; cat /proc/1/cmdline")), sandbox_pidns=True
    )
    containers.remove(one)
    assert status == 0
    assert text.split("\n")[0] != "1"
    assert text.split("\n")[1] == "sleep\x00100\x00"


def test_hooks_are_told_the_state_and_one_that_fails_stops_the_container(
    containers: Containers, root: Path, tmp_path: Path
) -> None:
    def hook(name: str, line: str = "") -> list[Message]:
        script = f"cat >{tmp_path}/{name}; {line}"
        return [{"Path": "/bin/sh", "Args": ["sh", "-c", script], "Env": ["PATH=/bin:/usr/bin"], "Timeout": 5}]

    hooks: dict[str, Any] = {name: hook(name) for name in ("Prestart", "CreateRuntime", "Poststart", "Poststop")}
    notes = {"note": 'a "quoted"\nline'}
    name = containers.start(description(root, TRUE, Hooks=hooks, Annotations=notes))
    containers.wait(name)
    containers.remove(name)
    states = {kind: json.loads((tmp_path / kind).read_text()) for kind in hooks}
    assert [states[kind]["status"] for kind in hooks] == ["created", "created", "running", "stopped"]
    assert all((state["id"], state["annotations"]) == (name, notes) for state in states.values())
    with pytest.raises(StatusError, match="no luck"):
        containers.create(description(root, TRUE, Hooks={"Prestart": hook("bad", "echo no luck >&2; exit 1")}))


AWKWARD = 'a "b" \\ \n\t\x01\x1f\x7f \u00e9 \u2028 \U0001f600 </script>'


def test_hooks_find_the_description_in_the_bundle_that_they_are_told(pod: Pod, root: Path, tmp_path: Path) -> None:
    containers, started = pod
    script = f"cat >{tmp_path}/state; cp -p /run/kata-containers/$0/config.json {tmp_path}"
    oci = description(
        root, process("true", AWKWARD, "", Env=["PATH=/bin", f"A={AWKWARD}"], Cwd="/tmp",
                      User={"UID": 2**32 - 2, "GID": 7, "AdditionalGids": [8, 9]}),
        Annotations={AWKWARD: AWKWARD, "b": ""}, Hostname="host", Mounts=[PROC, DEV, {**PROC, "destination": "/x"}],
    )  # fmt: skip
    oci["Hooks"] = {"Prestart": [{"Path": "/bin/sh", "Args": ["sh", "-c", script, "bundled"]}]}
    containers.run(oci, name="bundled")
    config = json.loads((tmp_path / "config.json").read_bytes().decode())
    assert json.loads((tmp_path / "state").read_text())["bundle"] == "/run/kata-containers/bundled"
    assert config == {
        "ociVersion": "1.0.2",
        "process": {
            "terminal": False,
            "user": {"uid": 2**32 - 2, "gid": 7, "additionalGids": [8, 9]},
            "args": ["true", AWKWARD, ""],
            "env": ["PATH=/bin", f"A={AWKWARD}"],
            "cwd": "/tmp",
        },
        "root": {"path": str(root), "readonly": False},
        "hostname": "host",
        "mounts": [{"options": [], **mount} for mount in oci["Mounts"]],
        "annotations": {AWKWARD: AWKWARD, "b": ""},
    }
    assert (tmp_path / "config.json").stat().st_mode & 0o777 == 0o600
    assert "bundled" not in inside(started, "ls", "/run/kata-containers").split()


def test_hooks_of_the_container_run_in_its_namespaces(containers: Containers, root: Path, tmp_path: Path) -> None:
    made = {"Path": "/bin/sh", "Args": ["sh", "-c", f"hostname >{tmp_path}/made"], "Env": ["PATH=/bin:/usr/bin"]}
    started = {"Path": "/bin/sh", "Args": ["sh", "-c", "hostname >/hooked"], "Env": ["PATH=/bin"]}
    hooks = {"CreateContainer": [made], "StartContainer": [started]}
    oci = description(root, process("cat", "/hooked"), Hooks=hooks, Hostname="hooked")
    assert containers.run(oci) == (0, "hooked\n")
    assert (tmp_path / "made").read_text() == "hooked\n"


# --- with the agent's other parts ---


def test_a_storage_is_mounted_for_the_container_and_gone_with_it(pod: Pod, root: Path, tmp_path: Path) -> None:
    containers, started = pod
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_text("stored")
    place = "/run/kata-containers/shared/containers/volume"
    storage = {"driver": "overlayfs", "source": "overlay", "fstype": "overlay", "mount_point": place,
               "options": [f"lowerdir={source}:{root}"]}  # fmt: skip
    mounts = [PROC, DEV, {"destination": "/data", "type": "bind", "source": place, "options": ["rbind"]}]
    name = containers.start(description(root, process("cat", "/data/file"), mounts=mounts), storages=[storage])
    assert containers.read(name) == b"stored"
    assert place in inside(started, "cat", "/proc/self/mountinfo")
    containers.remove(name)
    assert place not in inside(started, "cat", "/proc/self/mountinfo")
    with pytest.raises(StatusError, match="cannot execute"):
        containers.start(description(root, process("absent"), mounts=mounts), storages=[storage])
    assert place not in inside(started, "cat", "/proc/self/mountinfo")


@pytest.mark.parametrize("locked", [False, True], ids=["before the user changes", "after no_new_privs"])
def test_a_seccomp_filter_holds_for_all_processes_of_a_container(
    containers: Containers, root: Path, locked: bool
) -> None:
    rule = {"Names": ["mkdir", "mkdirat"], "Action": "SCMP_ACT_ERRNO", "errnoret": 95}
    filtered = {
        "Seccomp": {"DefaultAction": "SCMP_ACT_ALLOW", "Architectures": ["SCMP_ARCH_X86_64"], "Syscalls": [rule]}
    }
    first = process("sleep", "1000", NoNewPrivileges=locked)
    name = containers.start(description(root, first, linux=filtered))
    for user in (0, 1000):
        fields: Message = {"User": {"UID": user}, "NoNewPrivileges": locked}
        text = containers.run_in(name, "sh", "-c", "mkdir /tmp/x; grep Seccomp: /proc/self/status", **fields)[1]
        assert "Operation not supported" in text or "Not supported" in text
        assert "Seccomp:\t2" in text
    containers.remove(name)


def test_a_device_of_the_request_must_be_in_the_description(containers: Containers, root: Path) -> None:
    device = {"id": "d", "type": "blk", "vm_path": "/dev/vdz", "container_path": "/dev/data"}
    with pytest.raises(StatusError, match="lists no /dev/data"):
        containers.create(description(root, TRUE), devices=[device])


# --- what is asked about it ---


def test_a_paused_container_stands_still_until_it_is_resumed(containers: Containers, root: Path) -> None:
    name = containers.start(description(root, process("sh", "-c", "while read x; do echo $x; done")))
    containers.call("PauseContainer", container_id=name)
    containers.call("WriteStdin", container_id=name, data=b"word\n")
    answer = containers.later("ReadStdout", container_id=name, len=100)
    assert not answer.done(0.2)
    with pytest.raises(StatusError, match="FAILED_PRECONDITION"):
        containers.execute(name, "true")
    containers.call("ResumeContainer", container_id=name)
    assert answer.result().data == b"word\n"
    containers.call("PauseContainer", container_id=name)
    containers.remove(name)


def test_a_container_has_numbers_and_takes_new_limits(containers: Containers, root: Path) -> None:
    name = containers.start(description(root, process("sleep", "100")))
    assert containers.call("StatsContainer", container_id=name).cgroup_stats.cpu_stats.cpu_usage.total_usage > 0
    containers.call("UpdateContainer", container_id=name, resources={})
    containers.remove(name)


@pytest.mark.parametrize(
    "method",
    ["StartContainer", "ExecProcess", "SignalProcess", "WaitProcess", "ReadStdout", "ReadStderr", "WriteStdin",
     "CloseStdin", "TtyWinResize", "StatsContainer", "UpdateContainer", "PauseContainer", "ResumeContainer",
     "RemoveContainer"],
)  # fmt: skip
def test_a_container_that_nobody_made_is_an_invalid_argument(containers: Containers, method: str) -> None:
    with pytest.raises(StatusError) as caught:
        containers.call(method, container_id="nobody")
    assert caught.value.code == 3


def test_destroying_the_sandbox_ends_all_containers(sanitized_agent: Path, root: Path, tmp_path: Path) -> None:
    with contained(sanitized_agent, tmp_path / "log") as (client, started):
        containers = Containers(client)
        name = containers.start(description(root, process("sleep", "100")))
        containers.create(description(root, TRUE))
        waiting = containers.later("WaitProcess", container_id=name)
        pids = left(started)[2]
        assert len(pids) == 2
        client.destroy_sandbox()
        started.wait(20)
        assert waiting.done(20)
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert "would not end" not in (tmp_path / "log").read_text()
