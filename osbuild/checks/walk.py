"""Every call of the agent's, one step after the other: on request, for it takes up to a minute."""

from __future__ import annotations

import dataclasses

from osbuild import walk_check
from osbuild.checks.base import Session
from osbuild.report import Call, printable
from osbuild.runtime.base import Machine


def prepare(machine: Machine) -> Machine:
    return machine if machine.mac else dataclasses.replace(machine, mac=walk_check.MAC)


def look(session: Session) -> str:
    rows = walk_check.walk(session.connection, session.machine, init=not session.service)
    session.calls += [
        Call(
            call=row.call, about=row.about, verdict=str(row.verdict), detail=printable(row.detail),
            seconds=row.seconds, calls=row.calls, call_seconds=row.call_seconds,
        )
        for row in rows
    ]  # fmt: skip
    if walk_check.gone(rows):
        session.lost = session.gone = True
    return walk_check.judge(rows)
