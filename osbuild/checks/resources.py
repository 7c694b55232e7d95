"""What programs in the guest take for their machine is what it was given, and not this host: the reason why people
want such guests at all. A runtime that sizes its heap and its threads by what it sees gets both right here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from osbuild import agent_process, ordinary_container, walk_check
from osbuild.arch import MIB
from osbuild.artifacts import DiskImage
from osbuild.checks.base import Session
from osbuild.container import ContainerSpec, ProcessSpec, Resources
from osbuild.findings import NotHere, Wrong
from osbuild.probe import Probe
from osbuild.runtime.base import Machine
from osbuild.tree import Tree

PERIOD: Final = 100_000  # microseconds: Docker's
_RESERVED_MIB: Final = 48  # the kernel's code and tables, firmware; measured: 19 of 256, 38 of 2048
_RESERVED_SHARE: Final = 0.03  # a struct page for each page is 1.6 %
_JAVA_SECONDS: Final = 300.0
_SERVER_CPUS, _SERVER_MIB = 2, 1792  # what the JVM calls a server, where it takes G1: os::is_server_class_machine
_G1_SINCE: Final = 9
_ALL_CPUS: Final = 8  # up to here a thread for each: VM_Version::calc_parallel_worker_threads
_HEAP_SHARE: Final = 4  # of the memory there is, MaxRAMPercentage: 25
_FLAG: Final = re.compile(r"^\s*\w+ (\w+)\s+:?= (\S+)", re.MULTILINE)
_VERSION: Final = re.compile(r'version "(?:1\.)?(\d{1,4})')
_HOTSPOT: Final = re.compile(r"(?:OpenJDK|HotSpot\(TM\)) .*\bVM\b")
_J9: Final = re.compile(r"J9 ?VM")  # Eclipse OpenJ9, and IBM's
_JAVA: Final = re.compile(r"/bin/java$")


def look(session: Session) -> str:
    machine, probe = session.machine, session.probe
    session.facts["guest"] = guest = seen(probe)
    told = judge(guest, machine)
    session.facts["container"] = container = limited(session)
    told += f"; {judge_limits(container, machine)}"
    java = find_java(walk_check.tree_of(machine))
    if java is not None:
        try:
            session.facts["jvm"] = flags = run_java(session, java)
        except NotHere as lack:  # a part of this check: the rest was seen
            told += f"; {lack}"
        else:
            told += f"; {judge_java(flags, guest)}"
    session.facts["host"] = {"cpus": os.cpu_count(), "total_kib": kib(Path("/proc/meminfo").read_text())["MemTotal"]}
    docker = ordinary_container.seen(machine)
    if docker is not None:
        session.facts["docker"] = docker
        told += f"; an ordinary container sees {_processors(docker['cpuinfo'])} and {docker['total_kib'] >> 10} MiB"
    return told


# --- What is seen ---------------------------------------------------------------------------------------------------

FILES: Final = ("/proc/meminfo", "/proc/cpuinfo", "/sys/devices/system/cpu/online")


def seen(probe: Probe) -> dict[str, int]:
    """By a program in a container without limits."""
    return numbers([probe.file(path) for path in FILES], probe.facts("host"))


def numbers(texts: Sequence[str], host: Mapping[str, str]) -> dict[str, int]:
    """The same machine as FILES and calls have it."""
    meminfo, cpuinfo, online = texts
    memory = kib(meminfo)
    return {
        "total_kib": memory["MemTotal"], "available_kib": memory["MemAvailable"],
        "sysconf_kib": int(host["pages"]) * int(host["page"]) >> 10,
        "cpuinfo": len(re.findall(r"^processor\s*:", cpuinfo, re.MULTILINE)), "online": count(online),
        "affinity": int(host["affinity"]), "sysconf": int(host["online"]),
    }  # fmt: skip


def kib(meminfo: str) -> dict[str, int]:
    """/proc/meminfo."""
    rows = [line.partition(":") for line in meminfo.splitlines()]
    return {name: int(value.split()[0]) for name, _, value in rows if value}


def count(ranges: str) -> int:
    """How many processors 0-3,5 are."""
    ends = [[int(end) for end in part.split("-")] for part in ranges.strip().split(",") if part]
    return sum(end[-1] - end[0] + 1 for end in ends)


def _processors(number: int) -> str:
    return f"{number} processor{'s' * (number != 1)}"


def judge(found: Mapping[str, int], machine: Machine) -> str:
    """Wrong when a number is not the machine's."""
    for name in ("cpuinfo", "online", "affinity", "sysconf"):
        if found[name] != machine.cpus:
            raise Wrong(f"a guest with {_processors(machine.cpus)} shows {found[name]} ({name})")
    given, total = machine.memory_mib << 10, found["total_kib"]
    if not least_kib(machine) <= total <= given:
        raise Wrong(f"a guest with {given} KiB of memory shows {total} KiB; {least_kib(machine)} were the least")
    if found["sysconf_kib"] != total:
        raise Wrong(f"sysconf says {found['sysconf_kib']} KiB of memory, and /proc/meminfo {total}")
    return (
        f"{_processors(machine.cpus)} everywhere; {total >> 10} of {machine.memory_mib} MiB are the guest's to use, "
        f"{found['available_kib'] >> 10} are free"
    )


def least_kib(machine: Machine) -> int:
    """Memory that must be left of what a guest was given, after what its kernel takes for itself."""
    root = machine.root
    pages = root.file.size // 64 if isinstance(root, DiskImage) and root.dax else 0  # struct pages of an NVDIMM
    return int(machine.memory_mib * 1024 * (1 - _RESERVED_SHARE)) - _RESERVED_MIB * 1024 - (pages >> 10)


# --- A container with limits ----------------------------------------------------------------------------------------


def limits(machine: Machine) -> Resources:
    """Half of the guest."""
    return Resources(memory=machine.memory_mib * MIB // 2, cpu_quota=machine.cpus * PERIOD // 2, cpu_period=PERIOD)


def limited(session: Session) -> dict[str, str]:
    """What a container with limits reads of its own cgroup."""
    probe = session.start_probe(limits(session.machine))
    try:
        return {name: probe.file(f"/sys/fs/cgroup/{name}").strip() for name in ("memory.max", "cpu.max")}
    finally:
        probe.remove()


def judge_limits(found: Mapping[str, str], machine: Machine) -> str:
    """Wrong when its cgroup has other limits."""
    wanted = limits(machine)
    for name, limit in (("memory.max", str(wanted.memory)), ("cpu.max", f"{wanted.cpu_quota} {wanted.cpu_period}")):
        if found[name] != limit:
            raise Wrong(f"a container with half of the guest has {name} {found[name]!r}, not {limit!r}")
    return "a container's cgroup has the limits that it was given"


# --- A JVM ----------------------------------------------------------------------------------------------------------


def find_java(tree: Tree | None) -> str | None:
    """A JVM's launcher in the image."""
    names = (name for entry, names in tree.names().items() if entry.is_file for name in names) if tree else ()
    return min((name for name in names if _JAVA.search(name)), default=None)


def run_java(session: Session, java: str) -> dict[str, Any]:
    """What the JVM would do in this guest."""
    spec = ContainerSpec(
        id=f"jvm-{session.machine.nonce}", process=ProcessSpec(args=(java, "-XX:+PrintFlagsFinal", "-version"))
    )
    session.begin_sandbox()
    done = agent_process.run(session.client, spec, seconds=_JAVA_SECONDS)
    out, err = (data.decode(errors="replace") for data in (done.stdout, done.stderr))
    return {"java": java} | read_java(done.status, out, err)


def read_java(status: int, out: str, err: str) -> dict[str, Any]:
    """Flags and version, out of what such a call writes; NotHere when that is none of HotSpot's."""
    flags = dict(_FLAG.findall(out))
    if "MaxHeapSize" not in flags and (_J9.search(out + err) or (status == 0 and not _HOTSPOT.search(out + err))):
        raise NotHere("its JVM is not HotSpot, and was not asked what it takes")
    if status != 0 or "MaxHeapSize" not in flags:
        raise Wrong(f"the image's JVM ended with {status}: {' '.join((err or out)[-200:].split())}")
    version = _VERSION.search(err + out)
    names = ("MaxHeapSize", "InitialHeapSize", "ParallelGCThreads", "ConcGCThreads", "CICompilerCount")
    found: dict[str, Any] = {name: int(flags[name]) for name in names if name in flags}
    return found | {"gc": collector(flags), "version": int(version[1]) if version else 0}


def collector(flags: Mapping[str, str]) -> str:
    """Which one is switched on."""
    return next(
        (name for name in ("G1", "Serial", "Parallel", "Z", "Shenandoah") if flags.get(f"Use{name}GC") == "true"), ""
    )


def collecting(cpus: int) -> int:
    """Threads that a JVM collects with: each processor's up to eight, of more five of eight."""
    return cpus if cpus <= _ALL_CPUS else _ALL_CPUS + (cpus - _ALL_CPUS) * 5 // 8


def judge_java(found: Mapping[str, Any], guest: Mapping[str, int]) -> str:
    """Wrong when heap or threads are for another machine."""
    cpus, memory = guest["cpuinfo"], guest["total_kib"] << 10
    heap = found["MaxHeapSize"]
    # Below 250 MiB the JVM takes half instead, and between the two what it calls small: MinRAMPercentage.
    if not memory / _HEAP_SHARE * 0.97 <= heap <= max(memory / _HEAP_SHARE * 1.03, 128 * MIB):
        raise Wrong(f"the JVM would take a heap of {heap // MIB} MiB in a guest of {memory // MIB}")
    server = cpus >= _SERVER_CPUS and memory >= _SERVER_MIB * MIB * 0.99
    # G1 is what is chosen since Java 9.
    servers = "Parallel" if 0 < found.get("version", 0) < _G1_SINCE else "G1"
    wanted, threads = (servers, collecting(cpus)) if server else ("Serial", 0)
    if (found["gc"], found["ParallelGCThreads"]) != (wanted, threads):
        told = f"{found['gc']} with {found['ParallelGCThreads']} threads"
        raise Wrong(f"the JVM would collect with {told} on {_processors(cpus)}; {wanted} with {threads} is right")
    return f"its JVM takes {wanted} with {threads} threads and a heap of {heap // MIB} MiB"
