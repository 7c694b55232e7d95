"""The guest's clock is this machine's: about, from its start; well, once it was told the time.

How far an emulated guest's clock falls behind says how busy this machine is: that is measured, and not judged.
"""

from __future__ import annotations

import time
from typing import Final

from osbuild.checks.base import CALL_SECONDS, Session
from osbuild.findings import Wrong
from osbuild.probe import Refused

_START_SECONDS: Final = 600.0  # a clock that is off by more was never right: time zones are hours
# On virt with ACPI the clock is EFI's, for which the guest kernel has no driver: it begins in 1970 until it is told.
_WITHOUT_OWN: Final = frozenset(("aarch64",))
_FAST_SECONDS: Final = 0.05  # of the guest's clock against ours, in the second that this takes
_PTP: Final = "/sys/class/ptp/ptp0/clock_name"


def look(session: Session) -> str:
    before = time.time()
    found = float(session.probe.facts("clock")["realtime"])
    off = offset(found, before, time.time())
    session.facts["offset_seconds"] = round(off, 3)
    none = session.machine.arch in _WITHOUT_OWN and found < _START_SECONDS
    session.facts["own_clock"] = not none
    if abs(off) > _START_SECONDS and not none:
        raise Wrong(f"the guest's clock is {off:+.0f} s off")
    told = time.time()
    session.client.set_guest_date_time(int(told * 1e9), seconds=CALL_SECONDS)
    judge_told(float(session.probe.facts("clock")["realtime"]), told, time.time())
    try:
        session.facts["ptp"] = session.probe.file(_PTP).strip()
    except Refused:
        session.facts["ptp"] = ""
    ptp = session.facts["ptp"]
    first = "no clock of its own: 1970" if none else f"{off:+.2f} s off"
    return f"{first} when it answered, and right when it was told" + (f"; PTP: {ptp}" if ptp else "")


def offset(found: float, before: float, after: float) -> float:
    """How far a clock is off that was read between two moments; 0 when it may be right."""
    return min(found - before, 0.0) or max(found - after, 0.0)


def judge_told(found: float, told: float, now: float) -> None:
    """Wrong when the clock does not go on from what it was told."""
    if found < told - 1e-3:  # it travels in microseconds
        raise Wrong(f"the guest's clock was told the time, and is {told - found:.3f} s behind that")
    if found > now + _FAST_SECONDS:
        raise Wrong(f"the guest's clock was told the time, and is {found - now:.3f} s ahead of this machine's")
