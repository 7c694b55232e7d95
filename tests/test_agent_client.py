"""The agent's services as Python values: against a fake, and against the built-in agent as a process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import osbuild
from osbuild import command, protos
from osbuild.agent import build_agent
from osbuild.agent_client import AGENT, HEALTH, AgentClient, AgentDetails, AgentVersion, GuestDetails
from osbuild.agent_values import Address, Interface, KernelModule, Neighbor, Route, Stats, Storage
from osbuild.arch import host_arch
from osbuild.cache import default_cache
from osbuild.container import ContainerSpec, ProcessSpec, Resources
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


# Every typed call: what is asked, in the words of the protocol, and what comes of the answer

FOREVER = 0  # nanoseconds: no limit
SANDBOX = {"sandbox_id": "s", "hostname": "h", "dns": ["d"], "guest_hook_path": "/hooks", "sandbox_pidns": True}
ETH0 = Interface(name="eth0", mac="02:00:00:00:00:01", addresses=(Address(address="10.0.0.2", prefix=24),))
ROUTE = Route(
    device="eth0", dest="2001:db8::/32", gateway="2001:db8::1", source="::2", scope=1, mtu=9, flags=4, v6=True
)
PROCESS = ProcessSpec(args=("a",))
CALLS: dict[str, tuple[Callable[[AgentClient], Any], dict[str, Any]]] = {
    "CreateSandbox": (
        lambda c: c.create_sandbox(
            "s", hostname="h", dns=["d"], hooks="/hooks", pid_namespace=True,
            modules=[KernelModule(name="m", parameters=("p=1",))],
        ),
        {**SANDBOX, "kernel_modules": [{"name": "m", "parameters": ["p=1"]}]},
    ),
    "DestroySandbox": (lambda c: c.destroy_sandbox(), {}),
    "SetGuestDateTime": (
        lambda c: c.set_guest_date_time(1_700_000_000_000_005_999), {"Sec": 1_700_000_000, "Usec": 5}
    ),
    "ReseedRandomDev": (lambda c: c.reseed_random(b"\1\2"), {"data": b"\1\2"}),
    "OnlineCPUMem": (lambda c: c.online_cpu_mem(3, wait=True, cpu_only=True),
                     {"nb_cpus": 3, "wait": True, "cpu_only": True}),
    "MemHotplugByProbe": (lambda c: c.mem_hotplug_by_probe([1 << 40]), {"memHotplugProbeAddr": [1 << 40]}),
    "UpdateInterface": (lambda c: c.update_interface(ETH0), {"interface": ETH0.fields()}),
    "UpdateRoutes": (lambda c: c.update_routes([ROUTE]), {"routes": {"Routes": [ROUTE.fields()]}}),
    "ListInterfaces": (lambda c: c.interfaces(), {}),
    "ListRoutes": (lambda c: c.routes(), {}),
    "AddARPNeighbors": (
        lambda c: c.add_arp_neighbors([Neighbor(address="fe80::1", device="eth0", mac="m", state=2, flags=1)]),
        {"neighbors": {"ARPNeighbors": [{
            "toIPAddress": {"family": 1, "address": "fe80::1"}, "device": "eth0", "lladdr": "m", "state": 2, "flags": 1
        }]}},
    ),
    "CreateContainer": (
        lambda c: c.create_container(ContainerSpec(id="one", process=PROCESS)),
        ContainerSpec(id="one", process=PROCESS).fields(),
    ),
    "StartContainer": (lambda c: c.start_container("one"), {"container_id": "one"}),
    "RemoveContainer": (lambda c: c.remove_container("one", timeout=7), {"container_id": "one", "timeout": 7}),
    "PauseContainer": (lambda c: c.pause_container("one"), {"container_id": "one"}),
    "ResumeContainer": (lambda c: c.resume_container("one"), {"container_id": "one"}),
    "StatsContainer": (lambda c: c.stats_container("one"), {"container_id": "one"}),
    "UpdateContainer": (
        lambda c: c.update_container("one", Resources(memory=1 << 33)),
        {"container_id": "one", "resources": {"Memory": {"Limit": 1 << 33}}},
    ),
    "ExecProcess": (
        lambda c: c.exec_process("one", "two", PROCESS),
        {"container_id": "one", "exec_id": "two", "process": PROCESS.fields()},
    ),
    "SignalProcess": (lambda c: c.signal_process("one", 9, "two"),
                      {"container_id": "one", "exec_id": "two", "signal": 9}),
    "WaitProcess": (lambda c: c.wait_process("one", "two"), {"container_id": "one", "exec_id": "two"}),
    "ReadStdout": (lambda c: c.read_stdout("one", "two", size=5), {"container_id": "one", "exec_id": "two", "len": 5}),
    "ReadStderr": (lambda c: c.read_stderr("one", "two", size=5), {"container_id": "one", "exec_id": "two", "len": 5}),
    "WriteStdin": (lambda c: c.write_stdin("one", b"x", "two"),
                   {"container_id": "one", "exec_id": "two", "data": b"x"}),
    "CloseStdin": (lambda c: c.close_stdin("one", "two"), {"container_id": "one", "exec_id": "two"}),
    "TtyWinResize": (lambda c: c.resize_terminal("one", 33, 99, "two"),
                     {"container_id": "one", "exec_id": "two", "row": 33, "column": 99}),
    "GetOOMEvent": (lambda c: c.oom_event(), {}),
    "GetMetrics": (lambda c: c.metrics(), {}),
    "UpdateEphemeralMounts": (
        lambda c: c.update_ephemeral_mounts([Storage(driver="ephemeral", mount_point="/m", group=5)]),
        {"storages": [{"driver": "ephemeral", "mount_point": "/m", "fs_group": {"group_id": 5}}]},
    ),
    "AddSwapPath": (lambda c: c.add_swap_path("/dev/vdb"), {"path": "/dev/vdb"}),
}  # fmt: skip


@pytest.mark.parametrize("method", CALLS)
def test_a_typed_call_asks_in_the_words_of_the_protocol(method: str, tmp_path: Path) -> None:
    call, fields = CALLS[method]
    with client_of(tmp_path, fake.serve_with({method: lambda _: {}})) as (client, agent):
        call(client)
    (asked,) = agent.asked
    assert asked.method == f"{AGENT}/{method}"
    kind = protos.method(AGENT, method).request
    assert kind.FromString(asked.request.payload) == kind(**fields)
    assert (asked.request.timeout_nano == FOREVER) is (method in ("WaitProcess", "GetOOMEvent"))


def test_what_comes_back_is_plain_values(tmp_path: Path) -> None:
    usage = {"usage": 1, "max_usage": 2, "failcnt": 3, "limit": 4}
    stats = {
        "cpu_stats": {"cpu_usage": {"total_usage": 10, "usage_in_kernelmode": 4, "usage_in_usermode": 6}},
        "memory_stats": {"usage": usage, "stats": {"anon": 5}}, "pids_stats": {"current": 7, "limit": 8},
    }  # fmt: skip
    answers: dict[str, dict[str, Any]] = {
        "UpdateInterface": ETH0.fields(), "ListInterfaces": {"Interfaces": [ETH0.fields()]},
        "ListRoutes": {"Routes": [ROUTE.fields()]}, "UpdateRoutes": {"Routes": [ROUTE.fields()]},
        "StatsContainer": {"cgroup_stats": stats}, "WaitProcess": {"status": -1}, "WriteStdin": {"len": 3},
        "ReadStdout": {"data": b"o"}, "GetMetrics": {"metrics": "m 1"}, "GetOOMEvent": {"container_id": "c"},
    }  # fmt: skip
    handlers = {name: lambda _, fields=fields: fields for name, fields in answers.items()}
    with client_of(tmp_path, fake.serve_with(handlers)) as (client, _):
        there = replace(ETH0, device="eth0")
        assert client.update_interface(ETH0) == there
        assert client.interfaces() == (there,)
        assert client.routes() == client.update_routes([]) == (ROUTE,)
        assert client.stats_container("one") == Stats(
            cpu_ns=10, user_ns=6, kernel_ns=4, memory=1, memory_peak=2, memory_failures=3, memory_limit=4,
            memory_details={"anon": 5}, pids=7, pids_limit=8,
        )  # fmt: skip
        assert client.wait_process("one") == -1
        assert client.write_stdin("one", b"xyz") == 3
        assert client.read_stdout("one") == b"o"
        assert (client.metrics(), client.oom_event()) == ("m 1", "c")


def test_the_interface_of_the_contract_has_the_contract_s_bytes(tmp_path: Path) -> None:
    """Vector H, by way of plain values."""
    wire = bytes.fromhex(
        "0a320a04657468301204657468301a0e120831302e302e302e321a02323420dc0b2a1130323a30303a30303a30303a30303a3031"
    )
    with client_of(tmp_path, fake.serve_with({"UpdateInterface": lambda _: {}})) as (client, agent):
        client.update_interface(ETH0)
    assert agent.asked[0].request.payload == wire


def test_writing_nothing_is_our_mistake_for_it_would_close(tmp_path: Path) -> None:
    with client_of(tmp_path) as (client, agent), pytest.raises(ValueError, match="close_stdin"):
        client.write_stdin("one", b"")
    assert agent.asked == []


# The built-in agent


@contextlib.contextmanager
def real_agent(tmp_path: Path) -> Iterator[AgentClient]:
    try:
        program = build_agent(host_arch(), default_cache())
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
