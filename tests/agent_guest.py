"""Where tests meet the agent: as a process in namespaces of its own, under sanitizers, or as PID 1 of a guest."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from osbuild import command, ttrpc
from osbuild.agent_client import AgentClient
from osbuild.artifacts import DiskImage, Initrd, Kernel
from osbuild.runtime import RUNTIMES
from osbuild.runtime.base import Guest, Machine

_SECONDS: Final = 60.0  # a busy machine is slow, and what fails must not fail by this
_UNIFIED: Final = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))  # where a host has cgroup version 2
# $1: the program; $2: its socket; $3: a directory of cgroup version 2. What the agent touches is its own: mounts,
# processes, network, names, cgroups. What has no namespace it may not touch: clock, modules, power, /sys.
_CONTAIN: Final = """
set -e
mkdir -p "$3"
echo $$ > "$3/cgroup.procs"
exec unshare --mount --pid --net --ipc --uts --cgroup --fork --kill-child --mount-proc sh -c '
  mount -t tmpfs tmpfs /run
  mount -t tmpfs tmpfs /var/tmp
  mount -o remount,bind,ro /sys
  mkdir -p /run/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup
  exec setpriv --bounding-set=-sys_time,-sys_module,-sys_boot "$0" --listen "unix:$1"' "$1" "$2"
"""


@contextlib.contextmanager
def contained(program: Path, log: Path) -> Iterator[tuple[AgentClient, subprocess.Popen[bytes]]]:
    """The agent as an ordinary process that can reach nothing of this machine; at the end it must exit with 0.

    The process is unshare's, whose child is the agent.
    """
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("namespaces for the agent need root and unshare (util-linux)")
    home = next((path for path in _UNIFIED if (path / "cgroup.procs").exists()), None)
    if home is None:
        pytest.skip("this host has no cgroup version 2 to give the agent a part of")
    cgroup = home / f"osbuilder-test-{os.getpid()}-{time.monotonic_ns()}"
    # Not below tmp_path: the path of a socket has to fit into 108 bytes.
    with tempfile.TemporaryDirectory(prefix="agent-") as directory:
        path = Path(directory) / "socket"
        script = ("sh", "-c", _CONTAIN, "sh", str(program), str(path), str(cgroup))
        try:
            with command.start(*script, log=log) as process, ttrpc.connect_unix(path, _SECONDS) as connection:
                client = AgentClient(connection)
                client.wait(_SECONDS)
                yield client, process
                if process.poll() is None:
                    client.destroy_sandbox()
                assert process.wait(timeout=_SECONDS) == 0, log.read_text()
        finally:
            _remove(cgroup)


def agent_pid(process: subprocess.Popen[bytes]) -> int:
    """The number that the agent of `contained` has on this host."""
    return int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())


def inside(process: subprocess.Popen[bytes], *argv: str) -> str:
    """What a program prints that sees the mounts, the network and the names that the agent of `contained` sees."""
    enter = ("nsenter", f"--target={agent_pid(process)}", "--mount", "--net", "--ipc", "--uts", "--pid")
    done = subprocess.run((*enter, *argv), capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert done.returncode == 0, f"{' '.join(argv)} inside: {done.stderr}"
    return done.stdout


def _remove(cgroup: Path) -> None:
    """Nothing runs in it any more: the namespace's first process has ended."""
    for child, _, _ in os.walk(cgroup, topdown=False):
        with contextlib.suppress(OSError):
            Path(child).rmdir()


@contextlib.contextmanager
def booted(
    kernel: Kernel,
    root: Initrd | DiskImage,
    work: Path,
    *,
    memory_mib: int = 256,
    cpus: int = 1,
    words: tuple[str, ...] = (),
) -> Iterator[AgentClient]:
    """The agent as PID 1 of a guest; the console is work/console.log."""
    machine = Machine(kernel=kernel, root=root, memory_mib=memory_mib, cpus=cpus, accel="tcg", words=words)
    work.mkdir(exist_ok=True)
    with RUNTIMES["qemu"].start(machine, work) as guest, _connected(guest) as connection:
        client = AgentClient(connection)
        client.wait(_SECONDS)
        yield client


def _connected(guest: Guest) -> ttrpc.Connection:
    deadline = time.monotonic() + _SECONDS
    while not guest.agent.exists() and guest.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    return ttrpc.connect_unix(guest.agent, _SECONDS)
