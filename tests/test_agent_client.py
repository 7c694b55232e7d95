"""The agent's services as Python values: against a fake, and against the built-in agent as a process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import osbuild
from osbuild import command, protos
from osbuild.agent import build_agent
from osbuild.agent_client import AGENT, HEALTH, AgentClient, AgentDetails, AgentVersion, GuestDetails
from osbuild.arch import host_arch
from osbuild.cache import Cache
from osbuild.errors import BuildError, HostError
from osbuild.ttrpc import CallTimeout, Code, PeerClosed, ProtocolError, StatusError, connect_unix
from tests import fake_agent as fake
from tests.fake_agent import Asked, Behaviour, FakeAgent, Peer, fake_agent

LONG = 20.0


@contextlib.contextmanager
def client_of(tmp_path: Path, behaviour: Behaviour = fake.serve) -> Iterator[tuple[AgentClient, FakeAgent]]:
    path = tmp_path / "agent.sock"
    with fake_agent(path, behaviour) as agent, connect_unix(path, LONG) as connection:
        yield AgentClient(connection), agent


@pytest.mark.parametrize("behaviour", [fake.serve, fake.serve_tersely], ids=["like Rust", "like Go"])
def test_the_typed_calls_give_plain_values(tmp_path: Path, behaviour: Behaviour) -> None:
    with client_of(tmp_path, behaviour) as (client, agent):
        assert client.check() is True
        assert client.version() == AgentVersion(grpc="0.0.1", agent="4.1.0")
        assert client.guest_details() == GuestDetails(
            memory_block_bytes=128 << 20,
            memory_probe=False,
            agent=AgentDetails(
                version="4.1.0",
                init_daemon=True,
                device_handlers=(),
                storage_handlers=("blk", "nvdimm"),
                supports_seccomp=False,
                extra_features=(),
            ),
        )
        client.destroy_sandbox()
    asked = {asked.method: asked.request.payload for asked in agent.asked}
    assert asked["grpc.Health/Check"] == b""
    assert asked["grpc.AgentService/GetGuestDetails"] == bytes.fromhex("08011001")  # vector F


def test_any_other_method_takes_fields_by_name(tmp_path: Path) -> None:
    with client_of(tmp_path, fake.echo) as (client, agent):
        routes = client.call(AGENT, "UpdateRoutes", seconds=LONG, routes={"Routes": [{"dest": "", "device": "eth0"}]})
        client.call(HEALTH, "Check", service="a field whose name is that of an argument")
    sent = protos.message("grpc.UpdateRoutesRequest").FromString(agent.asked[0].request.payload)
    assert sent.routes.Routes[0].device == "eth0"
    assert isinstance(routes, protos.message("grpc.Routes"))


def test_a_field_or_method_that_does_not_exist_is_our_mistake_and_is_not_sent(tmp_path: Path) -> None:
    with client_of(tmp_path) as (client, agent):
        with pytest.raises(ValueError, match="no_such_field"):
            client.call(AGENT, "SetPolicy", no_such_field=1)
        with pytest.raises(BuildError, match="no method 'Fly'"):
            client.call(AGENT, "Fly")
    assert agent.asked == []


def test_what_the_agent_refuses_is_a_status(tmp_path: Path) -> None:
    with (
        client_of(tmp_path) as (client, _),
        pytest.raises(StatusError, match=r"^grpc\.AgentService/SetPolicy: UNIMPLEMENTED: .* is not supported$"),
    ):
        client.call(AGENT, "SetPolicy", policy="package agent_policy")


def test_a_payload_of_another_shape_is_a_protocol_error(tmp_path: Path) -> None:
    def answer_nonsense(peer: Peer, batch: list[Asked]) -> None:
        for asked in batch:
            peer.answer(asked.stream, b"\x0a\x7fshort")

    with client_of(tmp_path, answer_nonsense) as (client, _):
        with pytest.raises(ProtocolError, match=r"^grpc\.Health/Version: 7 bytes that are no grpc\.VersionCheck"):
            client.version()
        with pytest.raises(ProtocolError, match=r"no grpc\.GuestDetailsResponse: 0a7f73686f7274"):
            client.guest_details()


def status_answer(peer: Peer, stream: int, status: int) -> None:
    peer.answer(stream, protos.message("grpc.HealthCheckResponse")(status=status).SerializeToString())


def test_an_agent_that_does_not_serve_is_not_called_healthy(tmp_path: Path) -> None:
    def not_serving(peer: Peer, batch: list[Asked]) -> None:
        for asked in batch:
            status_answer(peer, asked.stream, 2)

    with client_of(tmp_path, not_serving) as (client, agent):
        assert client.check() is False
        with pytest.raises(ProtocolError, match=r"the agent answers, but for 0\.6 s never that it serves"):
            client.wait(0.6)
    assert len(agent.asked) >= 3


def test_an_empty_health_answer_is_unknown_and_so_not_serving(tmp_path: Path) -> None:
    with client_of(tmp_path, fake.say(fake.answer_frame(1))) as (client, _):
        assert client.check() is False


def test_waiting_outlasts_checks_that_were_lost(tmp_path: Path) -> None:
    def lose_two(peer: Peer, batch: list[Asked]) -> None:
        for asked in batch:
            if asked.stream >= 5:
                status_answer(peer, asked.stream, 1)

    with client_of(tmp_path, lose_two) as (client, agent):
        client.wait(LONG)
        assert client.check()
    assert [asked.stream for asked in agent.asked][:3] == [1, 3, 5]


def test_waiting_takes_an_answer_that_is_slower_than_its_patience(tmp_path: Path) -> None:
    with client_of(tmp_path, fake.answer_late(0.6, fake.serve)) as (client, _):
        client.wait(LONG)  # each answer comes after its question was put again
        assert client.check()


def test_waiting_for_a_silent_agent_ends_in_silence(tmp_path: Path) -> None:
    with client_of(tmp_path, fake.be_silent) as (client, _):
        began = time.monotonic()
        with pytest.raises(CallTimeout, match=r"no answer within 0\.6 s.*; not one byte has come"):
            client.wait(0.6)
        assert 0.5 < time.monotonic() - began < LONG / 2


def test_waiting_ends_when_the_agent_hangs_up(tmp_path: Path) -> None:
    with client_of(tmp_path, fake.say_and_hang_up(b"")) as (client, _), pytest.raises(PeerClosed):
        client.wait(LONG)


# The built-in agent


@contextlib.contextmanager
def real_agent(tmp_path: Path) -> Iterator[AgentClient]:
    try:
        program = build_agent(host_arch(), Cache(root=tmp_path / "cache"))
    except HostError as problem:
        pytest.skip(f"the agent cannot be built here: {problem} ({problem.hint})")
    path = tmp_path / "agent.sock"
    with (
        command.start(str(program.path), "--listen", f"unix:{path}", log=tmp_path / "agent.log"),
        connect_unix(path, LONG) as connection,
    ):
        yield AgentClient(connection)


def test_the_built_in_agent_speaks_the_same_protocol(tmp_path: Path) -> None:
    with real_agent(tmp_path) as client:
        client.wait(LONG)
        assert client.version() == AgentVersion(grpc="0.0.1", agent=osbuild.__version__)
        details = client.guest_details()
        assert details.agent.version == osbuild.__version__
        assert details.agent.init_daemon is False
        with pytest.raises(StatusError) as caught:
            client.call(AGENT, "SetPolicy", policy="package agent_policy")
        assert caught.value.code == Code.UNIMPLEMENTED


def test_the_built_in_agent_answers_many_threads_at_once(tmp_path: Path) -> None:
    with real_agent(tmp_path) as client, ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda _: client.check(), range(200)))
