"""The walk over every call: against the built-in agent under sanitizers, and against agents that are wrong."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from osbuild.agent_walk import STEPS, Outcome, Place, Row, Step, Walk, guest, network, take_all
from osbuild.agent_walk.guest import FIRST
from osbuild.agent_walk.network import NETWORK
from osbuild.findings import Wrong
from osbuild.ttrpc import connect_unix
from tests import fake_agent as fake
from tests.agent_guest import contained
from tests.fake_agent import Asked, Behaviour, Handler, Peer, fake_agent
from tests.walking import bad, place, walk


def test_the_built_in_agent_passes_every_step_under_sanitizers(sanitized_agent: Path, tmp_path: Path) -> None:
    with contained(sanitized_agent, tmp_path / "agent.log") as (client, process):
        rows = walk(client, place(process))
    assert bad(rows) == []


# Agents that are wrong


def rows_of(tmp_path: Path, behaviour: Behaviour, steps: tuple[Step, ...] = STEPS, **where: Any) -> list[Row]:
    path = tmp_path / f"agent{len(list(tmp_path.iterdir()))}.sock"
    with fake_agent(path, behaviour), connect_unix(path, 20) as connection:
        return take_all(connection, Place(**where), steps=steps)


def row(rows: list[Row], call: str) -> Row:
    return next(found for found in rows if found.call.endswith(f"/{call}"))


def test_what_an_agent_does_not_have_is_a_failure_with_that_reason_and_no_crash(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, fake.serve)
    for call in ("CreateSandbox", "CreateContainer", "ListInterfaces", "CopyFile", "GetMetrics"):
        assert row(rows, call).verdict is Outcome.failed
        assert "UNIMPLEMENTED" in row(rows, call).detail
    assert row(rows, "AddSwapPath").verdict is Outcome.skipped, "not every agent need have it"
    assert row(rows, "NoSuchMethod").verdict is Outcome.passed


def test_every_call_that_the_client_has_is_walked_over(tmp_path: Path) -> None:
    walked = {step.full_name for step in STEPS}
    typed = {
        "CreateSandbox", "DestroySandbox", "GetGuestDetails", "SetGuestDateTime", "ReseedRandomDev",
        "UpdateInterface", "UpdateRoutes", "ListInterfaces", "ListRoutes", "AddARPNeighbors", "OnlineCPUMem",
        "MemHotplugByProbe", "CreateContainer", "StartContainer", "ExecProcess", "SignalProcess", "WaitProcess",
        "ReadStdout", "ReadStderr", "WriteStdin", "CloseStdin", "TtyWinResize", "StatsContainer", "UpdateContainer",
        "PauseContainer", "ResumeContainer", "RemoveContainer", "CopyFile", "GetOOMEvent", "GetMetrics",
    }  # fmt: skip
    assert {f"grpc.AgentService/{name}" for name in typed} | {"grpc.Health/Check", "grpc.Health/Version"} <= walked


def test_an_agent_that_goes_away_leaves_the_rest_unknown(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, fake.say_and_hang_up(b""))
    assert rows[0].verdict is Outcome.failed
    assert {found.verdict for found in rows[1:]} == {Outcome.unknown, Outcome.skipped}


def test_a_silent_agent_is_not_asked_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (guest, network):
        monkeypatch.setattr(module, "CALL_SECONDS", 0.2)
    rows = rows_of(tmp_path, fake.be_silent, (*FIRST, *NETWORK))
    assert {found.verdict for found in rows} == {Outcome.unknown, Outcome.skipped}
    assert sum(found.detail == "not asked any more" for found in rows) > 5


def test_an_agent_that_says_yes_to_everything_is_found_out(tmp_path: Path) -> None:
    """Every answer is empty, which is success: what counts is what comes of it."""

    def yes(peer: Peer, batch: list[Asked]) -> None:
        for asked in batch:
            peer.answer(asked.stream)

    passed = {found.call for found in rows_of(tmp_path, yes, mac="02:00:00:00:00:01") if found.verdict == "passed"}
    harmless = {"CreateSandbox", "DestroySandbox", "GetGuestDetails"}  # nothing can be seen of these by themselves
    assert {name.rpartition("/")[2] for name in passed} <= harmless


def test_answers_of_another_shape_are_failures_and_not_a_crash(tmp_path: Path) -> None:
    garbage: dict[str, Handler] = {
        "ReadStdout": lambda _: {"data": b"no : such\nlines"}, "GetMetrics": lambda _: {"metrics": "} {"},
        "ListInterfaces": lambda _: {"Interfaces": [{"name": "lo", "IPAddresses": [{"mask": "x"}]}]},
    }  # fmt: skip
    accepting: dict[str, Handler] = {
        call: lambda _: {} for call in ("CreateContainer", "StartContainer", "WaitProcess", "ReadStderr")
    }
    rows = rows_of(tmp_path, fake.serve_with(garbage | accepting), (*FIRST, *NETWORK))
    assert row(rows, "GetMetrics").detail == "no sample: '} {'"
    assert row(rows, "ListInterfaces").verdict is Outcome.failed
    assert "not to be understood" in row(rows, "ListInterfaces").detail


def test_what_a_place_lacks_is_skipped_with_the_reason(tmp_path: Path) -> None:
    lacks = {"clock": "no clock of its own"}
    rows = rows_of(tmp_path, fake.serve, shell=False, program="/sbin/init", lacks=lacks)
    assert row(rows, "SetGuestDateTime").detail == "no clock of its own"
    assert row(rows, "UpdateInterface").detail == "there is no link that may be changed"
    assert row(rows, "ExecProcess").detail == "there is no /bin/sh to look with"
    instead = [found for found in rows if found.about == "the agent as a container"]
    assert [found.verdict for found in instead] == [Outcome.failed], "the program that is there is tried"
    with_shell = rows_of(tmp_path, fake.serve)
    assert not any(found.about == "the agent as a container" for found in with_shell)


def test_the_calls_own_time_is_told_apart_from_the_steps(tmp_path: Path) -> None:
    def slow(_: Any) -> dict[str, Any]:
        time.sleep(0.1)
        return {}

    def take(walk: Walk) -> str:
        walk.client.check()
        for _ in range(3):
            walk.client.pause_container("x")
        return "done"

    (found,) = rows_of(
        tmp_path, fake.serve_with({"PauseContainer": slow}), (Step(call="PauseContainer", about="x", take=take),)
    )
    assert (found.verdict, found.calls) == (Outcome.passed, 3)
    assert 0.1 <= found.call_seconds < 0.2 < 0.3 <= found.seconds


@pytest.mark.parametrize(
    ("text", "samples"),
    [
        ("# HELP a b\n# TYPE a gauge\na 1\n", {"a": 1.0}),
        ('a{b="c d",e="f"} 1.5e3\n\n', {'a{b="c d",e="f"}': 1500.0}),
        ("a 1 1700000000\nb +Inf\n", {"a": 1.0, "b": math.inf}),
    ],
)
def test_prometheus_text_is_read(text: str, samples: dict[str, float]) -> None:
    assert guest.parse_metrics(text) == samples


@pytest.mark.parametrize("text", ["a", "a b", "1a 2", "a{ 1", "a 1 2 3"])
def test_what_is_no_prometheus_text_is_found(text: str) -> None:
    with pytest.raises(Wrong, match="no sample"):
        guest.parse_metrics(text)
