"""Steps: health, the sandbox, the clock, randomness, hot plug, metrics, files copied into the guest."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from osbuild import agent_process
from osbuild.agent_client import AGENT
from osbuild.agent_walk.base import CALL_SECONDS, GUEST_FILES, Step, Walk, expect, refused
from osbuild.findings import Wrong
from osbuild.ttrpc import Code, PeerClosed

HOSTNAME: Final = "walk"
NAMESERVER: Final = "nameserver 192.0.2.53"  # RFC 5737: nobody's
FAMILIES: Final = (
    "kata_agent_scrape_count", "kata_agent_threads", "kata_agent_total_time", "kata_agent_total_vm",
    "kata_agent_total_rss", "kata_agent_proc_status", "kata_agent_io_stat", "kata_agent_proc_stat",
    "kata_guest_load", "kata_guest_tasks", "kata_guest_cpu_time", "kata_guest_vm_stat", "kata_guest_netdev_stat",
    "kata_guest_meminfo",
)  # fmt: skip
_DISKS: Final = "kata_guest_diskstat"  # a family has no samples where there is nothing to count
_SAMPLE: Final = re.compile(r"([a-zA-Z_:][\w:]*)(\{[^}]*\})? (\S+)( -?\d+)?")
_PAST: Final = 1_700_000_000  # November 2023
_CLOCK_SECONDS: Final = 60
_COPY_BYTES: Final = (5 << 20) // 2  # two pieces and a half


def check(walk: Walk) -> str:
    if not walk.client.check(seconds=CALL_SECONDS):
        raise Wrong("it does not serve")
    return "it serves"


def many_checks(walk: Walk) -> str:
    with ThreadPoolExecutor(8) as pool:
        if not all(pool.map(lambda _: walk.client.check(seconds=CALL_SECONDS), range(64))):
            raise Wrong("one of many says that it does not serve")
    return "64, eight at a time"


def version(walk: Walk) -> str:
    found = walk.client.version(seconds=CALL_SECONDS)
    if walk.place.version:
        expect("the agent's version", found.agent, walk.place.version)
    if not found.agent or not found.grpc:
        raise Wrong(f"it says that it is {found.agent!r}, interface {found.grpc!r}")
    return f"{found.agent}, interface {found.grpc}"


def guest_details(walk: Walk) -> str:
    details = walk.client.guest_details(seconds=CALL_SECONDS)
    if walk.place.init is not None:
        expect("init_daemon", details.agent.init_daemon, walk.place.init)
    size = details.memory_block_bytes
    if size & (size - 1):
        raise Wrong(f"memory blocks of {size} bytes are no power of two")
    expect("the version in it", details.agent.version, walk.client.version(seconds=CALL_SECONDS).agent)
    return f"memory blocks of {size >> 20} MiB, storages: {' '.join(details.agent.storage_handlers) or 'none'}"


def unknown_names(walk: Walk) -> str:
    refused(lambda: walk.caller.call(AGENT, "NoSuchMethod", b"", CALL_SECONDS), Code.UNIMPLEMENTED)
    refused(
        lambda: walk.caller.call("grpc.NoSuchService", "Check", b"", CALL_SECONDS),
        Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED,
    )  # fmt: skip
    return check(walk)


def garbage(walk: Walk) -> str:
    said = refused(lambda: walk.caller.call(AGENT, "StartContainer", b"\x0a\x7fx", CALL_SECONDS))
    expect("the code", Code(said.code).name, Code.UNKNOWN.name)
    return check(walk)


def create_sandbox(walk: Walk) -> str:
    walk.client.create_sandbox(walk.sandbox, hostname=HOSTNAME, dns=[NAMESERVER], seconds=CALL_SECONDS)
    return walk.sandbox


def sandbox_is_seen(walk: Walk) -> str:
    spec = walk.seeing_guest(walk.script(f"uname -n; cat {GUEST_FILES}/sandbox/resolv.conf"))
    expect("host name and resolv.conf", walk.output(spec).split("\n")[:2], [HOSTNAME, NAMESERVER])
    return f"a container is called {HOSTNAME}; resolv.conf is written"


def set_clock(walk: Walk) -> str:
    walk.client.set_guest_date_time(_PAST * 10**9 + 5000, seconds=CALL_SECONDS)
    try:
        if not walk.place.shell:
            return "accepted; nobody there to look at a clock"
        late = int(walk.output(walk.script("date +%s"))) - _PAST
        if not 0 <= late < _CLOCK_SECONDS:
            raise Wrong(f"a container's clock is {late} s off")
        return f"a container's clock shows it, {late} s later"
    finally:
        walk.client.set_guest_date_time(time.time_ns(), seconds=CALL_SECONDS)


def reseed(walk: Walk) -> str:
    walk.client.reseed_random(os.urandom(512), seconds=CALL_SECONDS)
    said = refused(lambda: walk.client.reseed_random(b"", seconds=CALL_SECONDS))
    return f"512 bytes; none are refused: {said.message}"


def online_cpus(walk: Walk) -> str:
    walk.client.online_cpu_mem(walk.place.cpus, seconds=CALL_SECONDS)
    walk.client.online_cpu_mem(walk.place.cpus, cpu_only=True, wait=True, seconds=CALL_SECONDS)
    if not walk.place.shell:
        return f"{walk.place.cpus} asked for"
    online = walk.output(walk.script("cat /sys/devices/system/cpu/online")).strip()
    ranges = [[int(end) for end in part.split("-")] for part in online.split(",")]
    if sum(ends[-1] - ends[0] + 1 for ends in ranges) < walk.place.cpus:
        raise Wrong(f"{walk.place.cpus} were asked for, and online are {online}")
    return f"{walk.place.cpus} asked for; online: {online}"


def probe_memory(walk: Walk) -> str:
    walk.client.mem_hotplug_by_probe([], seconds=CALL_SECONDS)
    if walk.client.guest_details(seconds=CALL_SECONDS).memory_probe:
        return "no address; the kernel would take some, but no memory was plugged"
    said = refused(lambda: walk.client.mem_hotplug_by_probe([1 << 40], seconds=CALL_SECONDS))
    return f"this kernel needs no announcement: {said.message}"


def metrics(walk: Walk) -> str:
    first, second = (parse_metrics(walk.client.metrics(seconds=CALL_SECONDS)) for _ in range(2))
    wanted = [*FAMILIES, *((_DISKS,) if walk.place.shell and walk.output(walk.script("cat /proc/diskstats")) else ())]
    missing = [name for name in wanted if not any(key.partition("{")[0] == name for key in second)]
    if missing:
        raise Wrong(f"without {', '.join(missing)}")
    name = "kata_agent_scrape_count"
    if second[name] <= first[name]:
        raise Wrong(f"{name} does not grow: {first[name]:g}, then {second[name]:g}")
    return f"{len(second)} samples; resident: {rss(second) / 1024:.0f} KiB"


def parse_metrics(text: str) -> dict[str, float]:
    """Samples of Prometheus text, by name and labels as they are written; Wrong when a line is none."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = _SAMPLE.fullmatch(line)
        try:
            if match is None:
                raise ValueError
            found[match[1] + (match[2] or "")] = float(match[3])
        except ValueError:
            raise Wrong(f"no sample: {line[:80]!r}") from None
    return found


def rss(samples: Mapping[str, float]) -> float:
    """Bytes of memory that the agent has."""
    return samples.get("kata_agent_total_rss", 0.0)


def copy_file(walk: Walk) -> str:
    data = hashlib.shake_128(b"copied").digest(_COPY_BYTES)
    name = walk.name("copied")
    path = f"{agent_process.SHARED}/{name}/file"
    agent_process.copy_file(walk.client, path, data, mode=0o640, uid=1000, gid=1001, seconds=CALL_SECONDS)
    agent_process.copy_file(walk.client, f"{agent_process.SHARED}/{name}/empty", b"", seconds=CALL_SECONDS)
    agent_process.copy_file(
        walk.client, f"{agent_process.SHARED}/{name}/link", b"file", mode=0o777, kind=stat.S_IFLNK, seconds=CALL_SECONDS
    )
    if not walk.place.shell:
        return f"{len(data)} bytes accepted; nobody there to look at them"
    here = f"{GUEST_FILES}/shared/containers/{name}"
    found = walk.output(
        walk.seeing_guest(
            walk.script(f"cd {here} && stat -c '%a %u %g %s' file empty && sha256sum < file && readlink link")
        )
    ).split()
    wanted = [
        *f"640 1000 1001 {len(data)}".split(), "644", "0", "0", "0", hashlib.sha256(data).hexdigest(), "-", "file"
    ]  # fmt: skip
    expect("mode, owner, size and digest", found, wanted)
    return f"{len(data)} bytes in 3 pieces, with mode and owner; an empty file; a link"


def copy_outside(walk: Walk) -> str:
    for path in ("/etc/walk", f"{agent_process.SHARED}/../../walk", agent_process.SHARED):
        said = refused(functools.partial(agent_process.copy_file, walk.client, path, b"x", seconds=CALL_SECONDS))
    return f"refused: {said.message}"


def add_swap(walk: Walk) -> str:
    said = refused(lambda: walk.client.add_swap_path("/run/no-such-swap", seconds=CALL_SECONDS))
    return f"a device that is not there is refused: {said.message}"


def destroy_sandbox(walk: Walk) -> str:
    try:
        walk.client.destroy_sandbox(seconds=CALL_SECONDS)
    except PeerClosed:
        return "it was gone before its answer was"
    return "answered"


FIRST: Final = (
    Step(call="grpc.Health/Check", about="it serves", take=check),
    Step(call="grpc.Health/Check", about="many at a time are answered", take=many_checks),
    Step(call="grpc.Health/Version", about="it is the agent that was put in", take=version),
    Step(call="GetGuestDetails", about="what it is, and in which guest", take=guest_details),
    Step(call="CreateSandbox", about="a sandbox begins", take=create_sandbox),
    Step(call="SetGuestDateTime", about="the guest's clock follows", take=set_clock, needs=("clock",)),
    Step(call="ReseedRandomDev", about="entropy is taken", take=reseed),
    Step(call="OnlineCPUMem", about="processors and memory are put to use", take=online_cpus, needs=("hotplug",)),
    Step(call="MemHotplugByProbe", about="plugged memory is announced", take=probe_memory, needs=("hotplug",)),
    Step(call="GetMetrics", about="Prometheus text with Kata's families", take=metrics),
    Step(call="AddSwapPath", about="swap that is not there is refused", take=add_swap, optional=True),
)
FILES: Final = (
    Step(call="CreateSandbox", about="containers see its names", take=sandbox_is_seen, needs=("shell",)),
    Step(call="CopyFile", about="a file arrives with mode and owner", take=copy_file),
    Step(call="CopyFile", about="no path outside is written", take=copy_outside),
)
LAST: Final = (
    Step(call="NoSuchMethod", about="what nobody has is refused, and the connection lives", take=unknown_names),
    Step(call="StartContainer", about="garbage is refused, and the connection lives", take=garbage),
    Step(call="DestroySandbox", about="the sandbox ends", take=destroy_sandbox),
)
