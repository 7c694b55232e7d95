"""The agent: how soon it answers, what it weighs, how many calls and how many bytes go through each way to it."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from bench.boots import busybox_rootfs
from osbuild import command
from osbuild.agent import build_agent
from osbuild.agent_client import AgentClient
from osbuild.agent_process import running
from osbuild.agent_walk.guest import parse_metrics, rss
from osbuild.arch import X86_64
from osbuild.cache import default_cache
from osbuild.container import ContainerSpec, ProcessSpec
from osbuild.initrd import build_initrd
from osbuild.kernel import build_kernel, default_spec
from osbuild.pipeline import memory_for
from osbuild.runtime import RUNTIMES
from osbuild.runtime.base import Guest, Machine
from osbuild.runtime.channel import DAEMON
from osbuild.ttrpc import CallTimeout, Connection, connect_unix
from tests.agent_guest import contained

SECONDS = 60.0
CHECKS = 500
MEGABYTES = 16
GUEST_MEGABYTES = 2  # an emulated guest takes a second for each
STARTS = 20


def measure_agent(work: Path, rounds: int) -> list[dict[str, object]]:
    """Rows of what, number and unit; each number is the median of the rounds."""
    program = build_agent(X86_64, default_cache()).path
    rows = [
        row("stripped size", [program.stat().st_size / 1024], "KiB"),
        row("start as a process: exec to Check answered", [start(program) * 1000 for _ in range(STARTS)], "ms"),
    ]
    if os.geteuid() == 0:
        rows += measure_process(program, work, rounds)
    for transport in ("serial", *(("vhost-user-vsock",) if shutil.which(DAEMON) else ())):
        rows += measure_guest(transport, work, rounds)
    return rows


def start(program: Path) -> float:
    """Seconds from starting the program until its first answer is there."""
    with tempfile.TemporaryDirectory(prefix="bench-") as home:
        path = Path(home) / "s"
        began = time.monotonic()
        with command.start(str(program), "--listen", f"unix:{path}"):
            while not path.exists():
                time.sleep(0.0001)
            with connect_unix(path, SECONDS) as connection:
                AgentClient(connection).wait(SECONDS)
                return time.monotonic() - began


def measure_process(program: Path, work: Path, rounds: int) -> list[dict[str, object]]:
    """Over a unix socket, in namespaces of its own; containers are made of this machine's programs."""
    with contained(program, work / "agent.log") as (client, _):
        return measure_calls("unix socket", client, rounds, MEGABYTES)


def measure_guest(transport: str, work: Path, rounds: int) -> list[dict[str, object]]:
    """In an emulated guest with busybox."""
    kernel = build_kernel(default_spec(X86_64), default_cache())
    root = build_initrd(busybox_rootfs(work), work / f"agent-{transport}.initrd")
    machine = Machine(kernel=kernel, root=root, memory_mib=memory_for(root, kernel), accel="tcg", transport=transport)
    with RUNTIMES["qemu"].start(machine, work / transport) as guest, connect(guest) as connection:
        client = AgentClient(connection)
        client.wait(SECONDS)
        memory = rss(parse_metrics(client.metrics())) / 1024
        if transport != "serial":  # long answers get stuck there: see osbuild.runtime.channel
            return [row(f"Check, emulated guest, {transport}", [checks(client) for _ in range(rounds)], "calls/s")]
        return [
            row(f"resident in a guest, {transport}", [memory], "KiB"),
            *measure_calls(f"emulated guest, {transport}", client, rounds, GUEST_MEGABYTES),
        ]


def measure_calls(where: str, client: AgentClient, rounds: int, size: int) -> list[dict[str, object]]:
    """Round trips and bytes a second, one caller."""
    client.create_sandbox("bench")
    return [
        row(f"Check, {where}", [checks(client) for _ in range(rounds)], "calls/s"),
        row(f"ReadStdout, {where}", [megabytes(client, number, size) for number in range(rounds)], "MB/s"),
    ]


def checks(client: AgentClient) -> float:
    began = time.monotonic()
    for _ in range(CHECKS):
        client.check()
    return CHECKS / (time.monotonic() - began)


def megabytes(client: AgentClient, number: int, size: int) -> float:
    """A container that writes as fast as it is read."""
    script = f"read line; exec head -c {size * 1000000} /dev/zero"
    spec = ContainerSpec(id=f"bench-{number}", process=ProcessSpec(args=("/bin/sh", "-c", script)))
    with running(client, spec) as process:
        began = time.monotonic()
        process.write(b"\n")
        found = process.wait(SECONDS * 5)
        took = time.monotonic() - began
    if len(found.stdout) != size * 1000000:
        raise SystemExit(f"bench: {len(found.stdout)} bytes of {size} MB came")
    return size / took


def connect(guest: Guest) -> Connection:
    deadline = time.monotonic() + SECONDS
    while guest.process.poll() is None and time.monotonic() < deadline:
        try:
            if guest.channel.ready:
                return guest.channel.connect(0.5)
        except CallTimeout:
            continue
        time.sleep(0.01)
    raise SystemExit(f"bench: no way to the guest's agent; see {guest.log}")


def row(what: str, numbers: list[float], unit: str) -> dict[str, object]:
    return {"what": what, "number": statistics.median(numbers), "unit": unit}


def show_agent(rows: list[dict[str, object]]) -> None:
    for found in rows:
        print(f"{found['what']:48} {found['number']:10.1f} {found['unit']}")
    print()
