"""Processes run to their end, files in pieces, events: against a fake that forgets a process as the real agent does."""

from __future__ import annotations

import contextlib
import functools
import stat
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from osbuild import agent_process
from osbuild.agent_client import AgentClient
from osbuild.agent_process import Finished, copy_file, execute, oom_events, run, running
from osbuild.container import ContainerSpec, ProcessSpec
from osbuild.ttrpc import CallTimeout, Code, ProtocolError, StatusError, connect_unix
from tests.fake_agent import FakeAgent, Handler, Refuse, fake_agent, serve_with

LONG = 20.0
SPEC = ContainerSpec(id="one", process=ProcessSpec(args=("x",)))


class Program:
    """A process as the fake has it: what it writes, and how it ends. After WaitProcess it is unknown."""

    def __init__(self, stdout: list[bytes], stderr: list[bytes] | None = None, status: int = 0) -> None:
        self.left = {"ReadStdout": [*stdout, b""], "ReadStderr": [*(stderr or []), b""]}
        self.status = status
        self.stdin = b""
        self.closed = False
        self.gone = False
        self.calls: list[str] = []

    def handlers(self) -> dict[str, Handler]:
        return {
            name: functools.partial(self.answer, name)
            for name in (
                "CreateContainer", "StartContainer", "ExecProcess", "ReadStdout", "ReadStderr", "WriteStdin",
                "CloseStdin", "WaitProcess", "SignalProcess", "RemoveContainer",
            )
        }  # fmt: skip

    def answer(self, name: str, request: Any) -> Mapping[str, Any]:
        self.calls.append(name)
        if name in self.left:
            if self.gone:
                raise Refuse(Code.NOT_FOUND)
            if not (data := self.left[name].pop(0)):
                raise Refuse(Code.INTERNAL, "read meet EOF")
            return {"data": data}
        if name == "WriteStdin":
            self.stdin += request.data[:1000]
            return {"len": min(len(request.data), 1000)}
        if name == "CloseStdin":
            self.closed = True
        if name == "WaitProcess":
            self.gone = True
            return {"status": self.status}
        return {}


@contextlib.contextmanager
def client_of(tmp_path: Path, handlers: Mapping[str, Handler]) -> Iterator[tuple[AgentClient, FakeAgent]]:
    path = tmp_path / "agent.sock"
    with fake_agent(path, serve_with(handlers)) as agent, connect_unix(path, LONG) as connection:
        yield AgentClient(connection), agent


def test_both_streams_are_read_to_their_end_before_the_agent_may_forget(tmp_path: Path) -> None:
    program = Program([b"a", b"b" * 1000], [b"e"], status=137)
    with client_of(tmp_path, program.handlers()) as (client, _):
        assert run(client, SPEC, seconds=LONG) == Finished(status=137, stdout=b"a" + b"b" * 1000, stderr=b"e")
    assert program.calls.index("WaitProcess") > max(
        place for place, name in enumerate(program.calls) if name.startswith("Read")
    )
    assert program.calls[:2] == ["CreateContainer", "StartContainer"]
    assert program.calls[-1] == "RemoveContainer"


def test_input_goes_in_as_it_is_taken_and_is_closed(tmp_path: Path) -> None:
    program = Program([])
    data = bytes(range(256)) * 10
    with client_of(tmp_path, program.handlers()) as (client, _):
        run(client, SPEC, stdin=data, seconds=LONG)
    assert program.stdin == data
    assert program.closed


def test_an_agent_that_takes_more_than_it_was_given_is_wrong(tmp_path: Path) -> None:
    handlers = Program([]).handlers() | {"WriteStdin": lambda request: {"len": len(request.data) + 1}}
    with (
        client_of(tmp_path, handlers) as (client, _),
        pytest.raises(ProtocolError, match="WriteStdin: 3 bytes of 2 were taken"),
    ):
        run(client, SPEC, stdin=b"xy", seconds=LONG)


def test_a_container_that_cannot_start_is_removed_and_the_reason_kept(tmp_path: Path) -> None:
    program = Program([])

    def no(_: Any) -> Mapping[str, Any]:
        raise Refuse(Code.INTERNAL, "no such program")

    with client_of(tmp_path, program.handlers() | {"StartContainer": no}) as (client, agent):
        with pytest.raises(StatusError, match="no such program"):
            run(client, SPEC, seconds=LONG)
        assert [asked.method.rpartition("/")[2] for asked in agent.asked][-1] == "RemoveContainer"


def test_a_process_that_keeps_its_output_open_is_given_up_at_the_deadline(tmp_path: Path) -> None:
    program = Program([])
    with client_of(tmp_path, program.handlers() | {"ReadStderr": forever}) as (client, _):
        with pytest.raises(CallTimeout, match=r"^one: it has not ended its output within 0\.3 s"):
            run(client, SPEC, seconds=0.3)
        assert "WaitProcess" not in program.calls


def forever(_: Any) -> Mapping[str, Any]:
    """Never any answer that ends."""
    threading.Event().wait(0.05)
    return {"data": b"."}


def test_a_second_process_is_killed_when_the_block_ends(tmp_path: Path) -> None:
    program = Program([b"out"], status=3)
    with client_of(tmp_path, program.handlers()) as (client, agent):
        found = execute(client, "one", "two", ProcessSpec(args=("y",)), seconds=LONG)
    assert (found.status, found.stdout) == (3, b"out")
    sent = [asked for asked in agent.asked if asked.method.endswith("SignalProcess")]
    assert len(sent) == 1


def test_a_terminal_has_one_stream(tmp_path: Path) -> None:
    program = Program([b"x"])
    spec = ContainerSpec(id="one", process=ProcessSpec(args=("x",), terminal=True))
    with client_of(tmp_path, program.handlers()) as (client, _), running(client, spec) as process:
        assert process.wait(LONG).stdout == b"x"
    assert "ReadStderr" not in program.calls


@pytest.mark.parametrize(
    ("size", "offsets"), [(0, [0]), (1, [0]), (1 << 20, [0]), ((2 << 20) + 1, [0, 1 << 20, 2 << 20])]
)
def test_a_file_goes_in_pieces_of_a_mebibyte(size: int, offsets: list[int], tmp_path: Path) -> None:
    seen: list[Any] = []

    def take(request: Any) -> Mapping[str, Any]:
        seen.append(request)
        return {}

    data = bytes(range(251)) * (size // 251 + 1)
    with client_of(tmp_path, {"CopyFile": take}) as (client, _):
        copy_file(client, f"{agent_process.SHARED}/f", data[:size], mode=0o640, uid=-1, gid=7, seconds=LONG)
    assert [request.offset for request in seen] == offsets
    assert {(request.file_size, request.uid, request.gid) for request in seen} == {(size, -1, 7)}
    assert b"".join(request.data for request in seen) == data[:size]
    assert all(request.file_mode == stat.S_IFREG | 0o640 for request in seen)


def test_events_come_until_the_connection_ends(tmp_path: Path) -> None:
    names = iter(["one", "two"])

    def next_event(_: Any) -> Mapping[str, Any]:
        return {"container_id": next(names)}

    path = tmp_path / "agent.sock"

    def hang_up_later(peer: Any, batch: Any) -> None:
        try:
            serve_with({"GetOOMEvent": next_event})(peer, batch)
        except StopIteration:
            peer.hang_up()

    with fake_agent(path, hang_up_later) as agent, connect_unix(path, LONG) as connection:
        assert list(oom_events(AgentClient(connection))) == ["one", "two"]
    assert {asked.request.timeout_nano for asked in agent.asked} == {0}, "they are waited for without a limit"
