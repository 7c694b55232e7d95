"""QEMU's monitor, by a fake one: what comes between question and answer, too late, or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from osbuild.runtime.qmp import Qmp, RefusedError, SilentError, connected

GREETING: Final[dict[str, Any]] = {"QMP": {"version": {}, "capabilities": []}}
Answer = Callable[[dict[str, Any]], list[Any]]  # what is sent for a message; bytes go as they are


def good(message: dict[str, Any]) -> list[Any]:
    return [{"return": {"asked": message["execute"], **message.get("arguments", {})}, "id": message["id"]}]


@contextmanager
def monitor(answer: Answer = good, *, greeting: Any = GREETING) -> Iterator[Qmp]:
    """One that says yes to qmp_capabilities, and to the rest what `answer` does."""
    ours, theirs = socket.socketpair()

    def send(lines: list[Any]) -> None:
        for line in lines:
            theirs.sendall(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\r\n")

    def serve() -> None:
        with contextlib.suppress(OSError), theirs, theirs.makefile("r") as lines:
            send([greeting])
            for line in lines:
                message = json.loads(line)
                if message["execute"] == "qmp_capabilities":
                    send(good(message))
                elif message["execute"] == "quit":
                    return
                else:
                    send(answer(message))

    thread = threading.Thread(target=serve)
    thread.start()
    qmp = Qmp(ours)
    try:
        yield qmp
    finally:
        qmp.close()
        thread.join()


def test_a_question_has_its_answer() -> None:
    with monitor() as qmp:
        assert qmp.execute("device_add", {"driver": "pc-dimm"}) == {"asked": "device_add", "driver": "pc-dimm"}
        assert qmp.execute("query-status") == {"asked": "query-status"}


def test_what_qemu_refuses_is_told_in_its_words() -> None:
    refusal = {"class": "DeviceNotFound", "desc": "Device 'x' not found"}
    with (
        monitor(lambda message: [{"error": refusal, "id": message["id"]}]) as qmp,
        pytest.raises(RefusedError, match="QEMU refuses device_del: Device 'x' not found") as refused,
    ):
        qmp.execute("device_del", {"id": "x"})
    assert refused.value.kind == "DeviceNotFound"


def test_events_that_come_in_between_are_kept_until_they_are_taken() -> None:
    event = {"event": "DEVICE_DELETED", "data": {"device": "d"}}
    with monitor(lambda message: [event, {"event": "RESUME"}, *good(message), event]) as qmp:
        qmp.execute("one")
        qmp.execute("two")
        assert qmp.take_events("DEVICE_DELETED") == [{"device": "d"}] * 3
        assert qmp.take_events("DEVICE_DELETED") == []
        assert qmp.take_events("RESUME") == [{}, {}]


def test_an_answer_that_came_too_late_is_not_taken_for_another() -> None:
    late: list[dict[str, Any]] = []

    def slow_first(message: dict[str, Any]) -> list[Any]:
        if message["execute"] == "slow":
            late.extend(good(message))
            return []
        return [*late, *good(message)]

    with monitor(slow_first) as qmp:
        with pytest.raises(SilentError, match="no answer to slow in time"):
            qmp.execute("slow", seconds=0.05)
        assert qmp.execute("quick") == {"asked": "quick"}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda message: [], "no answer to ask in time"),
        (lambda message: [b"{no json}\n"], "no answer to ask: what came is no message"),
        (lambda message: [b"[1]\n"], "no answer to ask: what came is no message"),
        (lambda message: [b"x" * (2 << 20)], "no answer to ask: QEMU's line has no end"),
    ],
    ids=["silence", "no JSON", "no object", "no end"],
)
def test_what_is_no_answer_is_named(answer: Answer, reason: str) -> None:
    with monitor(answer) as qmp, pytest.raises(SilentError, match=reason):
        qmp.execute("ask", seconds=0.3)


def test_a_qemu_that_goes_away_is_told_at_once() -> None:
    with monitor() as qmp:
        qmp.execute("query-status")
        began = time.monotonic()
        with pytest.raises(SilentError, match="QEMU has gone"):
            qmp.execute("quit", seconds=30)
        with pytest.raises(SilentError, match="QEMU has gone"):
            qmp.execute("query-status", seconds=30)
    assert time.monotonic() - began < 10


def test_what_greets_in_another_way_is_no_monitor() -> None:
    with monitor(greeting={"hello": 1}) as qmp, pytest.raises(SilentError, match="no monitor"):
        qmp.execute("query-status")


def test_nobody_who_does_not_inherit_it_has_the_other_end() -> None:
    with connected() as (qmp, theirs):
        assert not os.get_inheritable(theirs.fileno())
        with pytest.raises(SilentError, match="no greeting in time"):
            qmp.execute("query-status", seconds=0.05)


def test_a_qemu_that_is_gone_is_heard_of_at_once() -> None:
    with connected() as (qmp, theirs):
        child = os.dup(theirs.fileno())
        theirs.close()
        os.close(child)
        with pytest.raises(SilentError, match="QEMU has gone"):
            qmp.execute("query-status", seconds=30)


def test_what_a_monitor_tells_by_itself_is_there_without_a_question() -> None:
    ours, theirs = socket.socketpair()
    with contextlib.closing(Qmp(ours)) as qmp:
        qmp.begin()
        asked = json.loads(theirs.recv(4096))
        assert asked["execute"] == "qmp_capabilities"
        lines = [
            GREETING, {"return": {}, "id": asked["id"]}, {"event": "RTC_CHANGE", "data": {"offset": 1}},
            {"event": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}}, {"event": "STOP"},
        ]  # fmt: skip
        theirs.sendall(b"".join(json.dumps(line).encode() + b"\r\n" for line in lines))
        theirs.close()
        assert qmp.told("SHUTDOWN", "STOP", seconds=10) == [
            {"name": "SHUTDOWN", "data": {"guest": True, "reason": "guest-reset"}}, {"name": "STOP", "data": {}},
        ]  # fmt: skip
        assert qmp.told("SHUTDOWN", seconds=0) == []


def test_a_question_after_the_beginning_has_its_own_answer() -> None:
    with monitor() as qmp:
        qmp.begin()
        assert qmp.execute("query-status") == {"asked": "query-status"}
        assert qmp.told("SHUTDOWN", seconds=0.01) == []


def test_a_monitor_that_has_gone_is_no_trouble_before_it_is_asked() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with contextlib.closing(Qmp(ours)) as qmp:
        qmp.begin()
        assert qmp.told("SHUTDOWN", seconds=1) == []
        with pytest.raises(SilentError):
            qmp.execute("quit", seconds=1)


@pytest.mark.parametrize("begun", [False, True])
def test_who_listened_to_what_a_monitor_tells_can_still_ask_it(begun: bool) -> None:
    with monitor() as qmp:
        if begun:
            qmp.begin()
        assert qmp.told("SHUTDOWN", seconds=0.2) == []
        assert qmp.execute("device_add") == {"asked": "device_add"}
        assert qmp.told("SHUTDOWN", seconds=0.01) == []
        assert qmp.execute("device_del") == {"asked": "device_del"}


def test_a_greeting_whose_answer_comes_too_late_is_not_waited_for_again() -> None:
    with connected() as (qmp, theirs):
        qmp.begin()
        theirs.sendall(json.dumps(GREETING).encode() + b"\n")
        assert qmp.told("SHUTDOWN", seconds=0.05) == []
        number = json.loads(theirs.recv(4096))["id"]
        theirs.sendall(json.dumps({"return": {}, "id": number}).encode() + b"\n")
        theirs.sendall(json.dumps({"return": "yes", "id": number + 1}).encode() + b"\n")
        assert qmp.execute("query-status", seconds=5.0) == "yes"
