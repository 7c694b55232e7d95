"""The sandbox's calls: the agent in namespaces of its own, under sanitizers; the clock in a real guest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import ttrpc
from osbuild.agent_client import AGENT, AgentClient
from osbuild.arch import X86_64, host_arch
from osbuild.artifacts import Initrd, Kernel
from tests.agent_container import description, make_root, process
from tests.agent_guest import agent_pid, booted, contained, inside

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(host_arch() is not X86_64, reason="the agent is compiled for x86_64 only"),
]

INVALID_ARGUMENT, FAILED_PRECONDITION, INTERNAL = 3, 9, 13
BASE: Final = "/run/kata-containers"
OURS: Final = ("/run/kata-containers", "/run/sandbox-ns", "/etc/resolv.conf")


class Sandbox:
    def __init__(self, client: AgentClient, process: subprocess.Popen[bytes], log: Path) -> None:
        self.client, self.process, self.log = client, process, log

    def call(self, method: str, /, **fields: Any) -> Any:  # Any: as AgentClient.call
        return self.client.call(AGENT, method, **fields)

    def refused(self, method: str, /, **fields: Any) -> ttrpc.StatusError:
        with pytest.raises(ttrpc.StatusError) as refused:
            self.call(method, **fields)
        return refused.value

    def inside(self, *argv: str) -> str:
        return inside(self.process, *argv)

    def mounts(self) -> list[str]:
        """The agent's own, in order: what lies on the paths that a sandbox uses."""
        lines = Path(f"/proc/{agent_pid(self.process)}/mountinfo").read_text().splitlines()
        return [target for line in lines if (target := line.split()[4]).startswith(OURS)]


@pytest.fixture
def sandbox(sanitized_agent: Path, tmp_path: Path) -> Iterator[Sandbox]:
    log = tmp_path / "log"
    with contained(sanitized_agent, log) as (client, process):
        yield Sandbox(client, process, log)


def write_program(path: Path, text: str, mode: int = 0o755) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(mode)


def test_a_sandbox_has_a_directory_of_its_own_and_nothing_of_an_older_one(sandbox: Sandbox) -> None:
    sandbox.inside("mkdir", "-p", f"{BASE}/old/deep/deeper")
    sandbox.inside("touch", f"{BASE}/old/deep/file")
    sandbox.call("CreateSandbox", sandbox_id="one")
    assert sandbox.inside("find", BASE) == f"{BASE}\n"


def test_what_is_mounted_in_an_older_sandbox_is_not_deleted(sandbox: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "share").mkdir()
    (tmp_path / "share" / "precious").touch()
    sandbox.inside("mkdir", "-p", f"{BASE}/shared/containers")
    sandbox.inside("mount", "--bind", str(tmp_path / "share"), f"{BASE}/shared/containers")
    sandbox.call("CreateSandbox", sandbox_id="one")
    assert (tmp_path / "share" / "precious").exists()
    assert sandbox.inside("find", BASE) == f"{BASE}\n"


def test_containers_share_an_ipc_and_a_uts_namespace_with_the_sandboxs_hostname(sandbox: Sandbox) -> None:
    before = {kind: sandbox.inside("readlink", f"/proc/1/ns/{kind}") for kind in ("ipc", "uts")}
    sandbox.call("CreateSandbox", hostname="pod-7", sandbox_id="one")
    for kind in ("ipc", "uts"):
        shared = ("nsenter", f"--{kind}=/var/run/sandbox-ns/{kind}")
        assert sandbox.inside(*shared, "readlink", f"/proc/self/ns/{kind}") != before[kind]
        assert sandbox.inside("readlink", f"/proc/1/ns/{kind}") == before[kind], "the agent itself stays where it is"
    assert sandbox.inside("nsenter", "--uts=/var/run/sandbox-ns/uts", "uname", "-n") == "pod-7\n"
    assert sandbox.inside("uname", "-n") != "pod-7\n"


def test_a_sandbox_without_a_hostname_keeps_the_guests(sandbox: Sandbox) -> None:
    sandbox.call("CreateSandbox", sandbox_id="one")
    shared = sandbox.inside("nsenter", "--uts=/var/run/sandbox-ns/uts", "uname", "-n")
    assert shared == sandbox.inside("uname", "-n")


def test_nothing_stays_mounted_when_the_sandbox_has_ended(sandbox: Sandbox) -> None:
    """Asked in the agent's mount namespace, held by somebody else, after the agent has gone."""
    ours = len(sandbox.mounts())
    sandbox.call("CreateSandbox", hostname="pod", sandbox_id="one", dns=["nameserver 192.0.2.1"])
    assert len(sandbox.mounts()) > ours
    enter = ("nsenter", f"--target={agent_pid(sandbox.process)}", "--mount", "cat")
    with subprocess.Popen(enter, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdin is not None
        sandbox.client.destroy_sandbox()
        assert sandbox.process.wait(timeout=20) == 0
        lines = Path(f"/proc/{holder.pid}/mountinfo").read_text().splitlines()
        holder.stdin.close()
    assert not [line for line in lines if line.split()[4].startswith((BASE, "/run/sandbox-ns"))]
    assert "/etc/resolv.conf" not in [line.split()[4] for line in lines]


def test_a_second_sandbox_takes_the_place_of_the_first(sandbox: Sandbox) -> None:
    sandbox.call("CreateSandbox", hostname="first", sandbox_id="one", dns=["nameserver 192.0.2.1"])
    mounted = sandbox.mounts()
    sandbox.call("CreateSandbox", hostname="second", sandbox_id="two", dns=["nameserver 192.0.2.2"])
    assert sandbox.mounts() == mounted, "and leaves nothing of it mounted"
    assert sandbox.inside("nsenter", "--uts=/var/run/sandbox-ns/uts", "uname", "-n") == "second\n"
    assert sandbox.inside("cat", "/etc/resolv.conf") == "nameserver 192.0.2.2\n"


def test_a_hostname_that_no_kernel_takes_is_refused(sandbox: Sandbox) -> None:
    refused = sandbox.refused("CreateSandbox", hostname="h" * 65, sandbox_id="one")
    assert (refused.code, "longer than 64 bytes" in str(refused)) == (INVALID_ARGUMENT, True)
    sandbox.call("CreateSandbox", hostname="h" * 64, sandbox_id="one")


@pytest.mark.skipif(
    not Path("/etc/resolv.conf").is_file() or Path("/etc/resolv.conf").is_symlink(),
    reason="/etc/resolv.conf is no regular file here",
)
def test_the_lines_of_dns_cover_the_guests_resolv_conf(sandbox: Sandbox) -> None:
    before = Path("/etc/resolv.conf").read_bytes()
    sandbox.call("CreateSandbox", sandbox_id="one", dns=["search example.org", "nameserver 192.0.2.1"])
    text = "search example.org\nnameserver 192.0.2.1\n"
    assert sandbox.inside("cat", "/etc/resolv.conf") == text
    assert sandbox.inside("cat", f"{BASE}/sandbox/resolv.conf") == text
    assert Path("/etc/resolv.conf").read_bytes() == before


@pytest.mark.parametrize("how", ["link", "absent"])
def test_a_resolv_conf_that_is_no_regular_file_is_left_alone(sandbox: Sandbox, how: str) -> None:
    sandbox.inside("mount", "-t", "tmpfs", "tmpfs", "/etc")
    if how == "link":
        sandbox.inside("ln", "-s", "/run/elsewhere", "/etc/resolv.conf")
        sandbox.inside("touch", "/run/elsewhere")
    sandbox.call("CreateSandbox", sandbox_id="one", dns=["nameserver 192.0.2.1"])
    assert "/run/elsewhere" not in sandbox.mounts()
    assert not [target for target in sandbox.mounts() if target.startswith("/etc/")]


def test_kernel_modules_are_loaded_by_modprobe_with_their_parameters(sandbox: Sandbox, tmp_path: Path) -> None:
    write_program(tmp_path / "modprobe", f'echo "$0" "$@" >> {tmp_path}/said')
    sandbox.inside("mount", "--bind", str(tmp_path / "modprobe"), os.path.realpath("/sbin/modprobe"))
    modules = [{"name": "one", "parameters": ["a=1", "b=2 3"]}, {"name": "two"}]
    sandbox.call("CreateSandbox", sandbox_id="one", kernel_modules=modules)
    said = (tmp_path / "said").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in said] == ["-v one a=1 b=2 3", "-v two"]


@pytest.mark.parametrize(
    ("text", "module", "code", "words"),
    [
        ("echo no such module >&2; exit 1", {"name": "a"}, INTERNAL, "exited with 1: no such module"),
        ("kill -9 $$", {"name": "a"}, INTERNAL, "was ended by signal 9"),
        ("touch /tmp/never", {"name": ""}, INVALID_ARGUMENT, "kernel module's name"),
        ("touch /tmp/never", {"name": "--remove"}, INVALID_ARGUMENT, "kernel module's name"),
        ("touch /tmp/never", {"name": "a", "parameters": ["-C/tmp/x"]}, INVALID_ARGUMENT, "is no parameter"),
        ("touch /tmp/never", {"name": "a", "parameters": ["x"] * 65}, INVALID_ARGUMENT, "more than 64 parameters"),
    ],
    ids=["fails", "killed", "no name", "an option", "an option as parameter", "too many parameters"],
)
def test_a_module_that_cannot_be_loaded_says_why(
    sandbox: Sandbox, tmp_path: Path, text: str, module: dict[str, Any], code: int, words: str
) -> None:
    write_program(tmp_path / "modprobe", text)
    sandbox.inside("mount", "--bind", str(tmp_path / "modprobe"), os.path.realpath("/sbin/modprobe"))
    refused = sandbox.refused("CreateSandbox", sandbox_id="one", kernel_modules=[module])
    assert refused.code == code
    assert words in str(refused)
    assert not Path("/tmp/never").exists()
    assert sandbox.mounts() == [], "nothing of a sandbox that could not be made is left"
    sandbox.call("CreateSandbox", sandbox_id="one")


def test_a_storage_that_cannot_be_mounted_leaves_no_sandbox(sandbox: Sandbox) -> None:
    storage = {"driver": "no such driver", "source": "x", "mount_point": f"{BASE}/x"}
    sandbox.refused("CreateSandbox", sandbox_id="one", storages=[storage])
    assert sandbox.mounts() == []
    sandbox.call("CreateSandbox", sandbox_id="one")


def test_only_programs_of_the_guest_become_hooks(sandbox: Sandbox, tmp_path: Path) -> None:
    hooks = tmp_path / "hooks"
    write_program(hooks / "prestart" / "b", "exit 0")
    write_program(hooks / "prestart" / "a", "exit 0")
    write_program(hooks / "prestart" / "no-program", "exit 0", 0o644)
    (hooks / "prestart" / "link").symlink_to("a")
    (hooks / "prestart" / "directory").mkdir()
    write_program(hooks / "poststop" / "c", "exit 0")
    sandbox.call("CreateSandbox", sandbox_id="one", guest_hook_path=str(hooks))
    lines = [json.loads(line) for line in sandbox.log.read_text().splitlines()]
    found = {(line["kind"], line["hook"]) for line in lines if line["msg"] == "found"}
    assert found == {("prestart", "a"), ("prestart", "b"), ("poststop", "c")}


def test_hooks_are_told_what_begins_and_ends(sandbox: Sandbox, tmp_path: Path) -> None:
    """With their kind as argument and the container's state, as OCI describes it, on standard input; one fails."""
    root = make_root(tmp_path / "rootfs")
    for kind in ("prestart", "poststart", "poststop"):
        write_program(tmp_path / "hooks" / kind / "1-fails", "echo no luck >&2; exit 1")
        write_program(
            tmp_path / "hooks" / kind / "2-says", f'cat > {tmp_path}/said.$1; echo "$#" >> {tmp_path}/said.$1'
        )
    sandbox.call("CreateSandbox", sandbox_id="one", guest_hook_path=str(tmp_path / "hooks"))
    oci = description(root, process("true"))
    sandbox.call("CreateContainer", container_id="con1", exec_id="con1", OCI=oci)
    sandbox.call("StartContainer", container_id="con1")
    sandbox.call("WaitProcess", container_id="con1")
    sandbox.call("RemoveContainer", container_id="con1")
    for kind in ("prestart", "poststart", "poststop"):
        state, count = (tmp_path / f"said.{kind}").read_text().rsplit("}", 1)
        assert json.loads(state + "}")["id"] == "con1"
        assert count.strip() == "1"
    lines = [json.loads(line) for line in sandbox.log.read_text().splitlines()]
    failed = {(line["kind"], line["error"].split(": ")[-1]) for line in lines if line["msg"] == "a hook failed"}
    assert failed == {(kind, "no luck") for kind in ("prestart", "poststart", "poststop")}


def test_hooks_that_are_not_there_are_no_failure(sandbox: Sandbox) -> None:
    sandbox.call("CreateSandbox", sandbox_id="one", guest_hook_path="/no/such/directory")


def test_random_data_is_asked_for(sandbox: Sandbox) -> None:
    refused = sandbox.refused("ReseedRandomDev", data=b"")
    assert (refused.code, "no random data" in str(refused)) == (INVALID_ARGUMENT, True)


def test_the_clock_is_the_hosts_to_set_and_not_every_number_is_a_time(sandbox: Sandbox) -> None:
    """In here the agent may not set it: `contained` sees to that."""
    assert sandbox.refused("SetGuestDateTime", Sec=0, Usec=1_000_000).code == INVALID_ARGUMENT
    assert sandbox.refused("SetGuestDateTime", Sec=0, Usec=-1).code == INVALID_ARGUMENT
    before = time.time()
    refused = sandbox.refused("SetGuestDateTime", Sec=1_000_000_000)
    assert "Operation not permitted" in str(refused)
    assert time.time() >= before


def test_a_guest_has_the_time_and_the_randomness_it_is_given(
    kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path
) -> None:
    with booted(kernel, busybox_initrd, tmp_path / "guest") as client:
        client.call(AGENT, "SetGuestDateTime", Sec=1_234_567_890, Usec=999_999)
        client.call(AGENT, "ReseedRandomDev", data=os.urandom(512))
        with pytest.raises(ttrpc.StatusError):
            client.call(AGENT, "SetGuestDateTime", Sec=2**63 - 1)
        client.call(AGENT, "CreateSandbox", hostname="pod", sandbox_id="one", dns=["nameserver 192.0.2.1"])
        client.destroy_sandbox()
    console = (tmp_path / "guest" / "console.log").read_text()
    assert '"ts":"2009-02-13T23:31:3' in console, "the lines of the log are dated by the clock that was set"
