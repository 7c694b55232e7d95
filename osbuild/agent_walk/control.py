"""Steps: how much a container may use, how much it did, and holding it still."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Final

from osbuild.agent_process import running
from osbuild.agent_walk.base import CALL_SECONDS, RUN_SECONDS, Step, Walk, expect, refused
from osbuild.container import Resources
from osbuild.findings import Wrong

MIB: Final = 1 << 20
_MEMORY: Final = 64 * MIB
_MORE_MEMORY: Final = 96 * MIB
_LITTLE: Final = 20 * MIB
_TICKING: Final = "while :; do echo tick; sleep 0.05; done"
_BUSY: Final = "echo up; while :; do :; done"
_STILL_SECONDS: Final = 0.4


def stats(walk: Walk) -> str:
    with running(walk.client, walk.script(_BUSY)) as process:
        if not process.wait_for_output(b"up", CALL_SECONDS):
            raise Wrong("it does not run")
        first = walk.client.stats_container(process.container, seconds=CALL_SECONDS)
        deadline = time.monotonic() + CALL_SECONDS
        while True:
            time.sleep(0.1)
            second = walk.client.stats_container(process.container, seconds=CALL_SECONDS)
            if second.cpu_ns > first.cpu_ns:
                break
            if time.monotonic() > deadline:
                raise Wrong(f"a busy container's time stands still at {second.cpu_ns} ns")
    refused(lambda: walk.client.stats_container("nobody", seconds=CALL_SECONDS))
    return f"{(second.cpu_ns - first.cpu_ns) / 1e6:.0f} ms of processor time more"


def stats_memory(walk: Walk) -> str:
    limited = replace(walk.script(_BUSY), resources=Resources(memory=_MEMORY, pids=50))
    with running(walk.client, limited) as process:
        if not process.wait_for_output(b"up", CALL_SECONDS):
            raise Wrong("it does not run")
        found = walk.client.stats_container(process.container, seconds=CALL_SECONDS)
    expect("the limit of memory", found.memory_limit, _MEMORY)
    if not 0 < found.memory < _MEMORY:
        raise Wrong(f"it uses {found.memory} bytes of {_MEMORY}")
    if found.pids < 1:
        raise Wrong(f"it has {found.pids} processes")
    return f"{found.memory >> 10} KiB of {_MEMORY >> 20} MiB, {found.pids} processes of {found.pids_limit}"


def update(walk: Walk) -> str:
    read = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max"
    spec = walk.script(f"{read}; read line; {read} /sys/fs/cgroup/cpu.max")
    with running(walk.client, replace(spec, resources=Resources(memory=_MEMORY, pids=40))) as process:
        if not process.wait_for_output(b"40\n", CALL_SECONDS):
            raise Wrong(f"memory.max and pids.max are {process.stdout!r}")
        expect("memory.max and pids.max", process.stdout.split(), [b"%d" % _MEMORY, b"40"])
        more = Resources(memory=_MORE_MEMORY, pids=60, cpu_quota=50000, cpu_period=100000)
        walk.client.update_container(process.container, more, seconds=CALL_SECONDS)
        process.write(b"\n")
        found = process.wait(RUN_SECONDS).stdout.split()[2:]
    expect("memory.max, pids.max, cpu.max afterwards", found, [b"%d" % _MORE_MEMORY, b"60", b"50000", b"100000"])
    return f"memory.max {_MEMORY >> 20}, then {_MORE_MEMORY >> 20} MiB; pids.max 40, then 60; half a processor"


def pause(walk: Walk) -> str:
    with running(walk.client, walk.script(_TICKING)) as process:
        if not process.wait_for_output(b"tick", CALL_SECONDS):
            raise Wrong("it does not tick")
        walk.client.pause_container(process.container, seconds=CALL_SECONDS)
        time.sleep(_STILL_SECONDS)  # what was on its way
        before = len(process.stdout)
        time.sleep(_STILL_SECONDS)
        after = len(process.stdout)
        walk.client.resume_container(process.container, seconds=CALL_SECONDS)
        if after != before:
            raise Wrong(f"it wrote {after - before} bytes while it was paused")
    return f"not a byte in {_STILL_SECONDS:g} s"


def resume(walk: Walk) -> str:
    with running(walk.client, walk.script(_TICKING)) as process:
        process.wait_for_output(b"tick", CALL_SECONDS)
        walk.client.pause_container(process.container, seconds=CALL_SECONDS)
        time.sleep(_STILL_SECONDS)
        before = process.stdout
        walk.client.resume_container(process.container, seconds=CALL_SECONDS)
        if not process.wait_for_output(before + b"tick", CALL_SECONDS):
            raise Wrong("it does not go on")
    return "it goes on"


def kill_paused(walk: Walk) -> str:
    """What is paused can be killed: SIGKILL must reach it."""
    with running(walk.client, walk.script(_TICKING)) as process:
        process.wait_for_output(b"tick", CALL_SECONDS)
        walk.client.pause_container(process.container, seconds=CALL_SECONDS)
        walk.client.signal_process(process.container, 9, seconds=CALL_SECONDS)
        expect("its status", process.wait(RUN_SECONDS).status, 137)
    return "SIGKILL reaches it: 137"


def out_of_memory(walk: Walk) -> str:
    spec = replace(walk.script("exec tail /dev/zero", about="greedy"), resources=Resources(memory=_LITTLE))
    with ThreadPoolExecutor(1) as pool:
        event = pool.submit(walk.client.oom_event, seconds=RUN_SECONDS)
        status = walk.run(spec).status
        expect("the container that ran out of memory", event.result(math.inf), spec.id)
    expect("its status", status, 137)
    return f"a container with {_LITTLE >> 20} MiB that takes more is killed, and named"


CONTROL: Final = (
    Step(call="StatsContainer", about="processor time grows", take=stats, needs=("shell", "cgroup")),
    Step(call="StatsContainer", about="memory and processes", take=stats_memory, needs=("shell", "cgroup", "memory")),
    Step(call="UpdateContainer", about="limits change", take=update, needs=("shell", "cgroup", "memory")),
    Step(call="PauseContainer", about="it stands still", take=pause, needs=("shell", "cgroup")),
    Step(call="ResumeContainer", about="it goes on", take=resume, needs=("shell", "cgroup")),
    Step(call="ResumeContainer", about="what is paused can be killed", take=kill_paused, needs=("shell", "cgroup")),
    Step(call="GetOOMEvent", about="who ran out of memory", take=out_of_memory, needs=("shell", "cgroup", "memory")),
)
