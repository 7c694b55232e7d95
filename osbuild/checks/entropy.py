"""Random numbers are there as soon as the agent is, and the machine gives new ones."""

from __future__ import annotations

import re
from typing import Final

from osbuild.checks.base import Session
from osbuild.findings import Wrong
from osbuild.probe import Refused
from osbuild.report import tail

_BYTES: Final = 4096
_LEAST_DIFFERENT: Final = 240  # of 256 values: the chance that even one is missing in so many bytes is 10^-5
_CONSOLE_BYTES: Final = 1 << 20
_SEEDED: Final = re.compile(r"^\[ *(\d+\.\d+)\] random: crng init done", re.MULTILINE)
_SOURCE: Final = "/sys/class/misc/hw_random/rng_current"


def look(session: Session) -> str:
    try:
        found = [session.probe.ask("random", str(_BYTES)) for _ in range(2)]
    except Refused as problem:
        raise Wrong(f"the kernel has no random numbers yet: {problem}") from None
    judge_bytes(*found)
    try:
        source = session.probe.file(_SOURCE).strip()
    except Refused:
        source = "none"
    session.facts["source"] = source
    if seeded := _SEEDED.search(tail(session.guest.console, _CONSOLE_BYTES).decode(errors="replace")):
        session.facts["seeded_seconds"] = float(seeded[1])
    if not source.startswith("virtio_rng"):
        raise Wrong(f"the guest does not use the machine's source of randomness: its own is {source!r}")
    when = f", seeded {session.facts['seeded_seconds']:.2f} s after its start" if seeded else ""
    return f"random numbers without waiting{when}, more from {source}"


def judge_bytes(first: bytes, second: bytes) -> None:
    """Wrong when these cannot be random."""
    if first == second:
        raise Wrong(f"the same {len(first)} random bytes twice")
    for data in (first, second):
        if len(set(data)) < _LEAST_DIFFERENT:
            raise Wrong(f"{len(data)} random bytes with only {len(set(data))} values")
