"""A walk over every call that a Kata agent answers: each is made, and what comes of it is looked at.

The same list is for a guest that was booted and for an agent that runs as an ordinary process: what cannot be done in a
place (see Place.lacks) is left out, and says why. Steps depend on nothing but the sandbox: a step that fails leaves the
others to be taken.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from osbuild.agent_client import Caller
from osbuild.agent_walk.base import Place, Step, Walk
from osbuild.agent_walk.containers import CONTAINERS
from osbuild.agent_walk.control import CONTROL
from osbuild.agent_walk.guest import FILES, FIRST, LAST
from osbuild.agent_walk.network import NETWORK
from osbuild.agent_walk.processes import PROCESSES
from osbuild.findings import NotHere, Unclear, Wrong
from osbuild.ttrpc import CallTimeout, Code, PeerClosed, RpcError, StatusError

__all__ = ["STEPS", "Outcome", "Place", "Row", "Step", "Walk", "take_all"]

STEPS: Final[tuple[Step, ...]] = (*FIRST, *NETWORK, *CONTAINERS, *FILES, *PROCESSES, *CONTROL, *LAST)

GONE: Final = "the agent has gone"
_SILENCES: Final = 3  # in a row, after which nobody is asked any more


class Outcome(enum.StrEnum):
    """What came of a step."""

    passed = enum.auto()
    failed = enum.auto()
    unknown = enum.auto()
    skipped = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A step that was taken, or not."""

    call: str  # with its service
    about: str
    verdict: Outcome
    detail: str
    seconds: float = 0.0  # of the whole step
    calls: int = 0  # how often it made the call that it is about
    call_seconds: float = 0.0  # the median of those


def take_all(
    connection: Caller, place: Place, *, steps: Iterable[Step] = STEPS, on_row: Callable[[Row], None] | None = None
) -> list[Row]:
    """Take every step in order; once the agent has gone, or is silent again and again, the rest is unknown."""
    walk = Walk(connection, place)
    rows: list[Row] = []
    silent = 0
    gone = ""
    for step in steps:
        reason = missing(step, place)
        if reason is None:
            continue
        if reason:
            row = Row(call=step.full_name, about=step.about, verdict=Outcome.skipped, detail=reason)
        elif gone or silent >= _SILENCES:
            row = Row(
                call=step.full_name, about=step.about, verdict=Outcome.unknown, detail=gone or "not asked any more"
            )
        else:
            row, problem = _take(walk, step)
            silent = silent + 1 if isinstance(problem, CallTimeout) else 0
            gone = GONE if isinstance(problem, PeerClosed) else ""
        rows.append(row)
        if on_row is not None:
            on_row(row)
    return rows


def missing(step: Step, place: Place) -> str | None:
    """Why a step cannot be taken in a place; empty when it can, None when another step is for such places."""
    lacks = dict(place.lacks)
    if not place.shell:
        lacks["shell"] = "there is no /bin/sh to look with"
        if not place.program:
            lacks["no shell"] = lacks["containers"] = "there is no program that a container could run"
    elif "no shell" in step.needs:
        return None
    if not place.mac:
        lacks.setdefault("link", "there is no link that may be changed")
    return next((lacks[need] for need in step.needs if need in lacks), "")


def _take(walk: Walk, step: Step) -> tuple[Row, Exception | None]:
    walk.caller.take(step.full_name)
    began = time.monotonic()
    problem: Exception | None = None
    try:
        verdict, detail = Outcome.passed, step.take(walk)
    except NotHere as found:
        verdict, detail = Outcome.skipped, str(found)
    except Unclear as found:
        verdict, detail = Outcome.unknown, str(found)
    except CallTimeout as found:
        verdict, detail, problem = Outcome.unknown, str(found), found
    except StatusError as found:
        absent = found.code == Code.UNIMPLEMENTED and str(found).startswith(f"{step.full_name}:")
        verdict = Outcome.skipped if absent and step.optional else Outcome.failed
        detail, problem = str(found), found
    except (Wrong, RpcError) as found:
        verdict, detail, problem = Outcome.failed, str(found), found
    except (ValueError, IndexError, KeyError) as found:  # what was looked at has another shape
        verdict, detail, problem = Outcome.failed, f"not to be understood: {found!r}", found
    calls, median = walk.caller.take(step.full_name)
    row = Row(
        call=step.full_name, about=step.about, verdict=verdict, detail=detail, seconds=time.monotonic() - began,
        calls=calls, call_seconds=median,
    )  # fmt: skip
    return row, problem
