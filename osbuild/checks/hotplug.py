"""Memory and a processor, added while the guest runs and taken away again: by QEMU's monitor, put to use by the agent.

    pc-dimm      a DIMM is plugged; the guest's MemTotal grows by all of it
    virtio-mem   a device that is there from the start is told to give more
    processor    one more socket is filled; OnlineCPUMem returns when the guest has it

Seen by a process in a container, as a workload would: MemTotal of /proc/meminfo, and sysconf's processors. Taking away
is the guest's to allow, so memory that it keeps is told, and no failure; a processor is given back.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from osbuild.arch import MIB, find_arch
from osbuild.checks.base import CALL_SECONDS, Session
from osbuild.findings import NotHere, Unclear, Wrong
from osbuild.runtime.base import PLUGGED_MIB, VIRTIO_MEM, Machine
from osbuild.runtime.qmp import Qmp, RefusedError, SilentError

_SECONDS: Final = 30.0  # in which a guest puts to use, or gives back, what it was told to; it may be emulated
_POLL_SECONDS: Final = 0.05
_DIMM, _BACKEND, _CPU = "dimm", "dimm-memory", "cpu"
_VIRTIO_MEM: Final = f"/machine/peripheral/{VIRTIO_MEM}"
_TOTAL: Final = re.compile(r"^MemTotal: +(\d+) kB$", re.MULTILINE)
_REFUSALS: Final = ("MEM_UNPLUG_ERROR", "DEVICE_UNPLUG_GUEST_ERROR")
_LEAST: Final = 0.95  # of the memory that was plugged must be seen: its descriptions may lie in it


def prepare(machine: Machine) -> Machine:
    return dataclasses.replace(machine, pluggable=True)


def look(session: Session) -> str:
    try:
        return "; ".join(_Plug(session).tell())
    except SilentError as problem:
        raise Unclear(str(problem)) from problem
    except RefusedError as problem:
        raise Wrong(str(problem)) from problem


def place_for(devices: Sequence[Mapping[str, Any]], block: int) -> tuple[int, str]:  # Any: as JSON has it
    """Where a DIMM must begin so that Linux takes it, 0 for where QEMU would put it; and a remark on that.

    QEMU puts it right behind the last device. Linux refuses memory that does not begin with one of its blocks, mostly
    of 128 MiB: plugged without a place, as Kata's runtime does it, a DIMM behind an image of another size is lost.
    """
    end = max((_end(row["data"]) for row in devices), default=0)
    if end % block == 0:
        return 0, ""
    return -(-end // block) * block, (
        f" (at the next multiple of {block // MIB} MiB: right behind this image, where Kata's runtime has it put, the "
        "guest would refuse it; build with --align 128M for that)"
    )


def _end(device: Mapping[str, Any]) -> int:  # Any: as JSON has it
    """Of what a device covers: virtio-mem's size is what the guest has of it now."""
    if "memaddr" in device:
        return int(device["memaddr"]) + int(device["max-size"])
    return int(device["addr"]) + int(device["size"])


class _Plug:
    """One guest, and what it had before."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._monitor: Qmp = session.guest.monitor
        self._block = session.client.guest_details(seconds=CALL_SECONDS).memory_block_bytes
        if not self._block:
            raise NotHere("this guest's kernel cannot plug memory")

    def tell(self) -> Iterator[str]:
        """Each step, in words, once it was seen."""
        yield self._dimm()
        yield self._virtio_mem()
        if find_arch(self._session.machine.arch).plugs_cpus:
            yield self._processor()
        else:
            yield "processors: QEMU's machine for this architecture takes none while it runs"

    def _dimm(self) -> str:
        before = self._memory()
        began = time.monotonic()
        backend = {"qom-type": "memory-backend-ram", "id": _BACKEND, "size": PLUGGED_MIB * MIB}
        self._monitor.execute("object-add", backend)
        place, moved = place_for(self._monitor.execute("query-memory-devices"), self._block)
        where = {"addr": place} if place else {}
        self._monitor.execute("device_add", {"driver": "pc-dimm", "id": _DIMM, "memdev": _BACKEND, **where})
        self._online(memory=True)
        after = self._grown(before, "pc-dimm")
        told = f"pc-dimm: MemTotal {before} to {after} MiB in {self._note('dimm_added_s', began):.1f} s{moved}"
        return f"{told}, {self._take_dimm(after)}"

    def _take_dimm(self, before: int) -> str:
        began = time.monotonic()
        self._monitor.execute("device_del", {"id": _DIMM})
        if not self._is_gone(self._dimms):
            return "which the guest did not give back"
        after = self._until(self._memory, lambda now: now <= before - int(_LEAST * PLUGGED_MIB))
        if after is None:
            raise Wrong(f"a DIMM was taken away, and the guest still has {self._memory()} MiB")
        self._monitor.execute("object-del", {"id": _BACKEND})
        return f"taken away again in {self._note('dimm_removed_s', began):.1f} s"

    def _virtio_mem(self) -> str:
        before = self._memory()
        began = time.monotonic()
        self._request(PLUGGED_MIB)
        self._online(memory=True)
        if self._until(self._given, lambda given: given == PLUGGED_MIB) is None:
            raise Wrong(f"virtio-mem: of {PLUGGED_MIB} MiB the guest took {self._given()} within {_SECONDS:g} s")
        after = self._grown(before, "virtio-mem")
        told = f"virtio-mem: MemTotal {before} to {after} MiB in {self._note('virtio_mem_added_s', began):.1f} s"
        began = time.monotonic()
        self._request(0)
        if self._until(self._given, lambda given: given == 0) is None:
            return f"{told}, of which the guest kept {self._given()} MiB"
        return f"{told}, taken away again in {self._note('virtio_mem_removed_s', began):.1f} s"

    def _processor(self) -> str:
        before = self._processors()
        slots = self._monitor.execute("query-hotpluggable-cpus")
        free = next((slot for slot in slots if "qom-path" not in slot), None)
        if free is None:
            raise Wrong("QEMU has no socket free")
        began = time.monotonic()
        self._monitor.execute("device_add", {"driver": free["type"], "id": _CPU, **free["props"]})
        self._session.client.online_cpu_mem(before + 1, wait=True, cpu_only=True, seconds=_SECONDS)
        after = self._processors()
        if after != before + 1:
            raise Wrong(f"a processor was plugged, and the guest says that it has {after}, as {before} before")
        told = f"processors: {before} to {after} in {self._note('processor_added_s', began):.1f} s"
        began = time.monotonic()
        self._monitor.execute("device_del", {"id": _CPU})
        if not self._is_gone(self._sockets):
            return f"{told}, which the guest did not give back"
        if self._processors() != before:
            raise Wrong(f"a processor was taken away, and the guest says that it has {self._processors()}")
        return f"{told}, taken away again in {self._note('processor_removed_s', began):.1f} s"

    def _online(self, *, memory: bool) -> None:
        self._session.client.online_cpu_mem(self._processors(), cpu_only=not memory, seconds=_SECONDS)

    def _grown(self, before: int, what: str) -> int:
        """The guest's memory once it has what was plugged."""
        after = self._until(self._memory, lambda now: now >= before + int(_LEAST * PLUGGED_MIB))
        if after is None:
            raise Wrong(
                f"{what}: {PLUGGED_MIB} MiB were plugged, and after {_SECONDS:g} s MemTotal is {self._memory()} MiB, "
                f"as {before} before"
            )
        return after

    def _is_gone(self, left: Callable[[], int]) -> bool:
        """Whether the guest let go of what it was asked for, rather than refuse, or say nothing.

        Of a processor, QEMU 7.2 says DEVICE_DELETED for its local timer only: so it is asked what it has.
        """
        return self._until(lambda: -1 if self._monitor.take_events(*_REFUSALS) else left(), lambda now: now <= 0) == 0

    def _dimms(self) -> int:
        """How many of ours QEMU has."""
        return sum(row["data"].get("id") == _DIMM for row in self._monitor.execute("query-memory-devices"))

    def _sockets(self) -> int:
        """How many of ours are filled."""
        path = f"/machine/peripheral/{_CPU}"
        return sum(row.get("qom-path") == path for row in self._monitor.execute("query-hotpluggable-cpus"))

    def _memory(self) -> int:
        """MiB of it, as any program reads."""
        found = _TOTAL.search(self._session.probe.file("/proc/meminfo"))
        if found is None:
            raise Wrong("the guest's /proc/meminfo has no MemTotal")
        return int(found[1]) // 1024

    def _processors(self) -> int:
        return int(self._session.probe.facts("host")["online"])

    def _request(self, mib: int) -> None:
        value = {"path": _VIRTIO_MEM, "property": "requested-size", "value": mib * MIB}
        self._monitor.execute("qom-set", value)

    def _given(self) -> int:
        return int(self._monitor.execute("qom-get", {"path": _VIRTIO_MEM, "property": "size"})) // MIB

    def _note(self, name: str, began: float) -> float:
        """Seconds since then, for the report, too."""
        took = time.monotonic() - began
        self._session.facts[name] = took
        return took

    def _until(self, ask: Callable[[], int], good: Callable[[int], bool]) -> int | None:
        """The first good answer; None when there is none in time."""
        deadline = time.monotonic() + _SECONDS
        while not good(answer := ask()):
            if time.monotonic() > deadline:
                return None
            time.sleep(_POLL_SECONDS)
        return answer
