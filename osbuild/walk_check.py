"""The walk over every call, in a guest that was booted: what is in its root decides what can be looked at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from osbuild import agent_walk
from osbuild.agent import INIT
from osbuild.agent_client import Caller
from osbuild.agent_walk import Outcome, Row
from osbuild.agent_walk.base import SHELL
from osbuild.artifacts import DiskImage
from osbuild.errors import InputError
from osbuild.findings import Unclear, Wrong
from osbuild.runtime.base import Machine
from osbuild.subject import open_subject
from osbuild.tree import Tree
from osbuild.view import View

MAC: Final = "02:00:00:00:00:01"  # of the card that the guest gets for it: one that nobody's vendor made


def place_of(machine: Machine, tree: Tree | None, *, init: bool) -> agent_walk.Place:
    """What can be expected in this guest; without its tree, a shell is expected."""
    view = View(tree) if tree is not None else None
    return agent_walk.Place(
        version=machine.agent.rpartition(" ")[2],
        init=init,
        cpus=machine.cpus,
        mac=machine.mac,
        shell=view is None or view.get(SHELL) is not None,
        program=INIT if view is None or view.get(INIT) is not None else "",
    )


def tree_of(machine: Machine) -> Tree | None:
    """The guest's root, as far as it can be read here; a qcow2 image is not looked into."""
    if isinstance(machine.root, DiskImage) and machine.root.format != "raw":
        return None
    try:
        return open_subject(machine.root.file.path).tree
    except InputError:
        return None


def walk(
    connection: Caller, machine: Machine, *, init: bool, on_row: Callable[[Row], None] | None = None
) -> list[Row]:  # fmt: skip
    """Every call, in that guest."""
    return agent_walk.take_all(connection, place_of(machine, tree_of(machine), init=init), on_row=on_row)


def gone(rows: Sequence[Row]) -> bool:
    """The agent went away in the middle: the console knows more."""
    return any(row.detail == agent_walk.GONE for row in rows)


def judge(rows: Sequence[Row]) -> str:
    """What it comes to: Wrong when a step failed, Unclear when one could not be taken."""
    counts = Counter(row.verdict for row in rows)
    calls = len({row.call for row in rows if row.verdict is Outcome.passed})
    told = f"{counts[Outcome.passed]} steps passed, over {calls} calls"
    told += "".join(
        f", {counts[kind]} {kind}" for kind in (Outcome.failed, Outcome.unknown, Outcome.skipped) if counts[kind]
    )
    for verdict, kind in ((Outcome.failed, Wrong), (Outcome.unknown, Unclear)):
        if counts[verdict]:
            first = next(row for row in rows if row.verdict is verdict)
            raise kind(f"{told}; first: {first.call.rpartition('/')[2]}, {first.about}: {first.detail}")
    return told
