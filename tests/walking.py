"""The walk over every call, for tests: against an agent that runs as a process in namespaces of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import osbuild
from osbuild.agent_client import AgentClient
from osbuild.agent_walk import Outcome, Place, Row, take_all
from osbuild.walk_check import MAC

_CGROUPS: Final = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))


def place(process: subprocess.Popen[bytes]) -> Place:
    """Where a contained agent is: this machine's programs, a network of its own with one link in it."""
    lacks = {
        "clock": "the clock is this machine's",
        "hotplug": "the processors and the memory are this machine's",
    }
    controllers = next(
        (path for root in _CGROUPS if (path := root / "cgroup.controllers").exists()), Path("/nonexistent")
    )
    if not controllers.exists() or "memory" not in controllers.read_text().split():
        lacks["memory"] = "this machine's cgroup version 2 has no memory controller"
    return Place(version=osbuild.__version__, init=False, mac=_add_link(process), lacks=lacks)


def walk(client: AgentClient, where: Place) -> list[Row]:
    """All steps; what they came to is printed, for those who read a failed test."""
    return take_all(client.connection, where, on_row=show)


def show(row: Row) -> None:
    sys.stdout.write(
        f"{row.verdict:8} {row.call.rpartition('/')[2]:22} {row.about:45} {row.seconds:6.2f} s  {row.detail}\n"
    )


def bad(rows: list[Row]) -> list[str]:
    """Those that did not pass and were not skipped, in words."""
    return [
        f"{row.verdict}: {row.call}, {row.about}: {row.detail}"
        for row in rows
        if row.verdict in (Outcome.failed, Outcome.unknown)
    ]


def _add_link(process: subprocess.Popen[bytes]) -> str:
    """A link in the agent's network, never in this machine's; empty where there is no `ip` or no veth."""
    here, there = (Path(f"/proc/{pid}/ns/net").readlink() for pid in ("self", process.pid))
    if here == there:
        raise AssertionError("the agent is in this machine's network")
    into = ("nsenter", "--net", "--target", str(process.pid), "ip", "link", "add", "walk-test", "address", MAC)
    added = subprocess.run([*into, "type", "veth", "peer", "name", "walk-peer"], capture_output=True, check=False)
    return MAC if added.returncode == 0 else ""
