"""What a Prometheus would scrape: text that its parser takes, with Kata's families, and numbers that can be right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from osbuild.agent_walk.guest import FAMILIES, parse_metrics, rss
from osbuild.arch import MIB
from osbuild.checks.base import CALL_SECONDS, Session
from osbuild.findings import Wrong

_TOTAL: Final = 'kata_guest_meminfo{item="mem_total"}'


def look(session: Session) -> str:
    samples = parse_metrics(session.client.metrics(seconds=CALL_SECONDS))
    session.facts.update(samples=len(samples), agent_rss_bytes=int(rss(samples)))
    return judge(samples, session.machine.memory_mib)


def judge(samples: Mapping[str, float], memory_mib: int) -> str:
    """Wrong when a family of Kata's has no sample, or the memory cannot be this guest's."""
    there = {name.partition("{")[0] for name in samples}
    if missing := [name for name in FAMILIES if name not in there]:
        raise Wrong(f"without {', '.join(missing)}")
    total = samples.get(_TOTAL, 0.0) / MIB
    if not 0 < total <= memory_mib:
        raise Wrong(f"{_TOTAL} is {total:.0f} MiB in a guest of {memory_mib}")
    return f"{len(samples)} samples in {len(FAMILIES)} families; the agent has {rss(samples) / 1024:.0f} KiB"
