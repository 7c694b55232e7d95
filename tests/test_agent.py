"""The built-in agent, as an ordinary process under the sanitizers, spoken to in raw bytes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

import osbuild
import osbuild.agent as agent_module
from osbuild import command
from osbuild.agent import agent_version, build_agent
from osbuild.arch import X86_64, host_arch
from osbuild.cache import Cache, default_cache
from osbuild.errors import InputError
from osbuild.resources import resource
from tests.agent_program import compile_agent, toy_agent

pytestmark = [
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
    pytest.mark.skipif(host_arch() is not X86_64, reason="the agent is compiled for x86_64 only"),
]

MIB: Final = 1 << 20
OK, UNKNOWN, INVALID_ARGUMENT, RESOURCE_EXHAUSTED, UNIMPLEMENTED = 0, 2, 3, 8, 12

CHECK: Final = bytes.fromhex("000000140000000101000a0b677270632e4865616c74681205436865636b")
CHECK_WITH_TIMEOUT: Final = bytes.fromhex("0000001a0000000101000a0b677270632e4865616c74681205436865636b2080d88ee16f")
SERVING: Final = bytes.fromhex("000000060000000102000a0012020801")
EMPTY: Final = bytes.fromhex("000000020000000102000a00")
SOMEBODY_ELSES_REQUEST: Final = bytes.fromhex(
    "0a11677270632e5465737453657276696365731204546573741a09010203040506070809"
    "2080dac4092a180a09746573745f6b657931120b746573745f76616c756531"
)


# --- speaking ttRPC, as little of it as it takes ---


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def text(number: int, value: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(value)) + value


def frame(stream: int, payload: bytes, kind: int = 1, flags: int = 0) -> bytes:
    return len(payload).to_bytes(4, "big") + stream.to_bytes(4, "big") + bytes([kind, flags]) + payload


def request(stream: int, service: str, method: str, payload: bytes = b"") -> bytes:
    return frame(stream, text(1, service.encode()) + text(2, method.encode()) + text(3, payload))


def check(stream: int) -> bytes:
    return request(stream, "grpc.Health", "Check")


def fields(message: bytes) -> list[tuple[int, Any]]:  # Any: int or bytes, and the tests know which
    found: list[tuple[int, Any]] = []
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        tag = number()
        value: int | bytes = number()
        if tag & 7 == 2:
            size = int(value)
            value, at = message[at : at + size], at + size
        found.append((tag >> 3, value))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    stream: int
    code: int
    message: str
    payload: bytes


class Client:
    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(20)
        try:
            self.socket.connect(str(path))
        except OSError:
            self.socket.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = self.socket.recv(size - len(data))
            if not piece:
                raise EOFError(f"the agent hung up after {len(data)} of {size} bytes")
            data += piece
        return data

    def answer(self) -> Answer:
        header = self.receive(10)
        assert header[8:] == b"\x02\x00"
        body = self.receive(int.from_bytes(header[:4], "big"))
        # The Rust agent writes the status first, also when it is empty.
        (first, status), *rest = fields(body)
        assert first == 1
        said = dict(fields(status))
        return Answer(
            stream=int.from_bytes(header[4:8], "big"),
            code=said.get(1, OK),
            message=said.get(2, b"").decode(),
            payload=dict(rest).get(2, b""),
        )

    def call(self, data: bytes) -> Answer:
        self.send(data)
        return self.answer()


# --- the agent ---


@pytest.fixture
def program(sanitized_agent: Path) -> Path:
    return sanitized_agent


@dataclass(frozen=True, slots=True, kw_only=True)
class Agent:
    process: subprocess.Popen[bytes]
    path: Path
    log: Path

    def connect(self) -> Client:
        return Client(self.path)

    def lines(self) -> list[dict[str, Any]]:  # Any: what JSON may hold
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def messages(self) -> list[str]:
        return [line["msg"] for line in self.lines()]

    def peak_kib(self) -> int:
        return int((Path("/proc") / str(self.process.pid) / "status").read_text().split("VmHWM:")[1].split()[0])


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            Client(path).socket.close()
            return
        time.sleep(0.005)
    raise AssertionError("the agent did not listen")


@contextlib.contextmanager
def running(program: Path, log: Path) -> Iterator[Agent]:
    # Not below tmp_path: the path of a socket has to fit into 108 bytes.
    with tempfile.TemporaryDirectory(prefix="agent-") as directory:
        path = Path(directory) / "socket"
        with command.start(str(program), "--listen", f"unix:{path}", log=log) as process:
            wait_for(path)
            yield Agent(process=process, path=path, log=log)
            if process.poll() is None:
                process.terminate()
            assert process.wait(timeout=20) == 0, log.read_text()


@pytest.fixture
def agent(program: Path, tmp_path: Path) -> Iterator[Agent]:
    with running(program, tmp_path / "agent.log") as agent:
        yield agent


@pytest.fixture
def client(agent: Agent) -> Iterator[Client]:
    with agent.connect() as client:
        yield client


# --- what it answers ---


@pytest.mark.parametrize("said", [CHECK, CHECK_WITH_TIMEOUT], ids=["plain", "with a timeout"])
def test_a_check_is_answered_byte_for_byte_as_the_rust_agent_answers_it(client: Client, said: bytes) -> None:
    client.send(said)
    assert client.receive(len(SERVING)) == SERVING


def test_an_empty_answer_is_byte_for_byte_that_of_the_rust_agent(client: Client) -> None:
    client.send(request(1, "grpc.AgentService", "DestroySandbox"))
    assert client.receive(len(EMPTY)) == EMPTY


def test_version_names_the_api_and_this_agent(client: Client) -> None:
    answer = client.call(request(1, "grpc.Health", "Version"))
    assert fields(answer.payload) == [(1, b"0.0.1"), (2, osbuild.__version__.encode())]


def test_guest_details_are_those_of_the_machine(client: Client) -> None:
    answer = client.call(request(1, "grpc.AgentService", "GetGuestDetails", bytes.fromhex("08011001")))
    said = dict(fields(answer.payload))
    memory = Path("/sys/devices/system/memory")
    block_size = memory / "block_size_bytes"
    assert said.get(1, 0) == (int(block_size.read_text(), 16) if block_size.exists() else 0)
    assert said.get(3, 0) == int((memory / "probe").exists())
    about = fields(said[2])
    assert about[0] == (1, osbuild.__version__.encode())
    assert all(number != 2 for number, _ in about)  # not init
    for number in (3, 4):  # handlers of devices and of storages
        names = [value for found, value in about if found == number]
        assert names == sorted(names)
        assert b"blk" in names
    assert about[-1] == (5, 1)  # seccomp


def test_guest_details_that_were_not_asked_for_are_left_out(client: Client) -> None:
    answer = client.call(request(1, "grpc.AgentService", "GetGuestDetails"))
    assert [number for number, _ in fields(answer.payload)] == [2]


def test_destroy_sandbox_is_answered_and_then_ends_the_agent(agent: Agent) -> None:
    with agent.connect() as client:
        assert client.call(request(1, "grpc.AgentService", "DestroySandbox")).code == OK
        assert client.socket.recv(1) == b""
    assert agent.process.wait(timeout=20) == 0


def test_destroy_sandbox_ends_the_agent_even_when_nobody_reads_the_answer(agent: Agent) -> None:
    with agent.connect() as client:
        client.send(request(1, "grpc.AgentService", "DestroySandbox"))
    assert agent.process.wait(timeout=20) == 0


# --- what it refuses, and how ---

TOO_DEEP: Final = b"\x0b" * 65 + b"\x0c" * 65


@pytest.mark.parametrize(
    ("said", "code"),
    [
        pytest.param(request(1, "grpc.Nobody", "Check"), INVALID_ARGUMENT, id="unknown service"),
        pytest.param(frame(1, SOMEBODY_ELSES_REQUEST), INVALID_ARGUMENT, id="somebody else's service"),
        pytest.param(frame(1, b""), INVALID_ARGUMENT, id="no service at all"),
        pytest.param(request(1, "grpc.Health", "Chec"), UNIMPLEMENTED, id="unknown method of Health"),
        pytest.param(request(1, "grpc.AgentService", "Nothing"), UNIMPLEMENTED, id="unknown method of AgentService"),
        pytest.param(request(1, "grpc.AgentService", "SetPolicy"), UNIMPLEMENTED, id="method we lack"),
        pytest.param(request(1, "grpc.AgentService", "é" * 500), UNIMPLEMENTED, id="long unknown method"),
        pytest.param(check(2), INVALID_ARGUMENT, id="even stream"),
        pytest.param(check(0), INVALID_ARGUMENT, id="stream zero"),
        pytest.param(frame(1, b"\x0a\x7fgrpc"), INVALID_ARGUMENT, id="string past the end"),
        pytest.param(frame(1, b"\x0a" + b"\xff" * 9 + b"\x01"), INVALID_ARGUMENT, id="string of 2^64 - 1 bytes"),
        pytest.param(frame(1, b"\x20" + b"\xff" * 11), INVALID_ARGUMENT, id="number of eleven bytes"),
        pytest.param(frame(1, b"\x20" + b"\xff" * 9 + b"\x02"), INVALID_ARGUMENT, id="number over 64 bits"),
        pytest.param(frame(1, b"\x20\x80"), INVALID_ARGUMENT, id="number cut short"),
        pytest.param(frame(1, b"\x39\1\2\3"), INVALID_ARGUMENT, id="fixed64 cut short"),
        pytest.param(frame(1, b"\x3d\1\2"), INVALID_ARGUMENT, id="fixed32 cut short"),
        pytest.param(frame(1, b"\x02\x00"), INVALID_ARGUMENT, id="field number zero"),
        pytest.param(frame(1, b"\x0e\x00"), INVALID_ARGUMENT, id="wire type six"),
        pytest.param(frame(1, b"\x0b\x08\x01"), INVALID_ARGUMENT, id="group without an end"),
        pytest.param(frame(1, b"\x0b\x14"), INVALID_ARGUMENT, id="group that another one ends"),
        pytest.param(frame(1, b"\x0c"), INVALID_ARGUMENT, id="end of no group"),
        pytest.param(frame(1, TOO_DEEP + CHECK[10:]), INVALID_ARGUMENT, id="groups too deep"),
        pytest.param(frame(1, CHECK[10:] + text(1, b"\xff")), INVALID_ARGUMENT, id="service not UTF-8"),
        pytest.param(frame(1, CHECK[10:] + text(2, b"\xc0\x80")), INVALID_ARGUMENT, id="method in overlong UTF-8"),
        pytest.param(frame(1, CHECK[10:] + text(2, b"\xed\xa0\x80")), INVALID_ARGUMENT, id="method a surrogate"),
        pytest.param(frame(1, CHECK[10:] + text(5, b"\x0a\x09")), INVALID_ARGUMENT, id="metadata cut short"),
        pytest.param(frame(1, CHECK[10:] + text(5, text(1, b"\xf8"))), INVALID_ARGUMENT, id="metadata not UTF-8"),
        pytest.param(request(1, "grpc.Health", "Check", b"\x0a\x05x"), UNKNOWN, id="payload of Check"),
        pytest.param(request(1, "grpc.Health", "Check", text(1, b"\xff")), UNKNOWN, id="payload not UTF-8"),
        pytest.param(request(1, "grpc.Health", "Version", b"\x0f"), UNKNOWN, id="payload of Version"),
        pytest.param(request(1, "grpc.AgentService", "GetGuestDetails", b"\x08"), UNKNOWN, id="payload of details"),
        pytest.param(request(1, "grpc.AgentService", "DestroySandbox", b"\x08"), UNKNOWN, id="payload of destroy"),
    ],
)
def test_what_is_wrong_gets_the_code_of_the_rust_agent_and_the_connection_lives_on(
    client: Client, said: bytes, code: int
) -> None:
    answer = client.call(said)
    assert (answer.stream, answer.code) == (int.from_bytes(said[4:8], "big"), code)
    assert answer.message
    assert answer.payload == b""
    client.send(CHECK)
    assert client.receive(len(SERVING)) == SERVING


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param(b"\x38\x01", id="a number"),
        pytest.param(b"\x39" + bytes(8), id="a fixed64"),
        pytest.param(b"\x3d" + bytes(4), id="a fixed32"),
        pytest.param(text(7, b"\xff\xfe"), id="bytes"),
        pytest.param(b"\x3b\x08\x01\x43\x44\x3c", id="groups in a group"),
        pytest.param(b"\x08\x01", id="the service's number with another type"),
        pytest.param(b"\x20" + b"\xff" * 9 + b"\x01", id="a negative timeout"),
    ],
)
def test_fields_that_the_agent_does_not_know_are_skipped(client: Client, extra: bytes) -> None:
    for body in (extra + CHECK[10:], CHECK[10:] + extra):
        client.send(frame(1, body))
        assert client.receive(len(SERVING)) == SERVING


def test_of_a_field_that_comes_twice_the_last_one_counts(client: Client) -> None:
    assert client.call(frame(1, text(2, b"Nothing") + CHECK[10:])).code == OK


@pytest.mark.parametrize("kind", [0, 2, 3, 4, 255])
def test_a_frame_of_another_type_is_ignored_and_logged(agent: Agent, client: Client, kind: int) -> None:
    client.send(frame(1, b"anything", kind=kind) + CHECK)
    assert client.receive(len(SERVING)) == SERVING
    assert [line["type"] for line in agent.lines() if line["level"] == "WARN"] == [kind]


@pytest.mark.parametrize("kind", [1, 3])
def test_an_oversized_frame_is_read_to_its_end_and_refused_on_its_own_stream(client: Client, kind: int) -> None:
    client.send(check(1) + frame(3, bytes(4 * MIB + 1), kind=kind) + check(5))
    answers = [client.answer() for _ in range(3 if kind == 1 else 2)]
    expected = [(1, OK), (3, INVALID_ARGUMENT), (5, OK)]
    assert [(answer.stream, answer.code) for answer in answers] == [row for row in expected if row[0] != 3 or kind == 1]


def test_a_frame_of_exactly_four_mebibytes_is_taken(client: Client) -> None:
    filler = 4 * MIB - len(CHECK[10:]) - 5  # a tag, and a length of four bytes
    body = CHECK[10:] + text(7, bytes(filler))
    assert len(body) == 4 * MIB
    assert client.call(frame(9, body)).code == OK


# --- how the bytes come ---


def test_a_frame_may_come_one_byte_at_a_time(client: Client) -> None:
    for byte in CHECK:
        client.send(bytes([byte]))
    assert client.receive(len(SERVING)) == SERVING


def test_many_frames_in_one_write_are_all_answered_in_order(client: Client) -> None:
    streams = range(1, 2000, 2)
    client.send(b"".join(check(stream) for stream in streams))
    assert [client.answer().stream for _ in streams] == list(streams)


def test_a_host_that_reads_nothing_for_a_while_loses_nothing(client: Client) -> None:
    calls = 60_000  # 1.8 MB of calls, 1 MB of answers: more than the sockets and the agent's bound hold
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        sending = pool.submit(client.send, CHECK * calls)
        time.sleep(0.3)
        assert client.receive(calls * len(SERVING)) == SERVING * calls
        sending.result()


def test_a_host_that_never_reads_does_not_stop_the_others(agent: Agent) -> None:
    with agent.connect() as deaf, agent.connect() as other:
        deaf.socket.settimeout(0.3)
        with pytest.raises(TimeoutError):
            deaf.send(CHECK * 200_000)
        assert other.call(CHECK).code == OK


def test_several_hosts_are_served_at_once(agent: Agent) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(agent.connect()) for _ in range(12)]
        for client in clients:
            client.send(CHECK[:7])
        for client in reversed(clients):
            client.send(CHECK[7:])
        assert all(client.receive(len(SERVING)) == SERVING for client in clients)


def test_a_connection_too_many_waits_until_another_one_ends(agent: Agent) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(agent.connect()) for _ in range(60)]
        assert clients[0].call(CHECK).code == OK
        clients[-1].send(CHECK)
        clients[-1].socket.settimeout(0.1)
        with pytest.raises(TimeoutError):
            clients[-1].receive(1)
        for client in clients[:-1]:
            client.socket.close()
        clients[-1].socket.settimeout(20)
        assert clients[-1].receive(len(SERVING)) == SERVING


def test_half_a_frame_from_one_host_is_nothing_to_the_next(agent: Agent) -> None:
    for cut in range(1, len(CHECK)):
        with agent.connect() as client:
            client.send(CHECK[:cut])
        with agent.connect() as client:
            assert client.call(CHECK).code == OK


def test_answers_still_come_after_the_host_has_closed_its_side(client: Client) -> None:
    client.send(check(1) + check(3))
    client.socket.shutdown(socket.SHUT_WR)
    assert [client.answer().stream, client.answer().stream] == [1, 3]
    assert client.socket.recv(1) == b""


def test_garbage_ends_nothing_but_its_own_connection(agent: Agent) -> None:
    generator = random.Random(1)
    for _ in range(30):
        with agent.connect() as client, contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(generator.randbytes(generator.randrange(1, 3000)))
    with agent.connect() as client:
        assert client.call(CHECK).code == OK


def mutate(valid: bytes, generator: random.Random) -> bytes:
    data = bytearray(valid)
    for _ in range(generator.randrange(1, 4)):
        at = generator.randrange(len(data))
        match generator.randrange(4):
            case 0:
                data[at] ^= 1 << generator.randrange(8)
            case 1:
                data[at] = generator.choice((0, 1, 0x7F, 0x80, 0xFF))
            case 2:
                del data[at : at + generator.randrange(1, 4)]
            case _:
                data[at:at] = generator.randbytes(generator.randrange(1, 4))
        data = data or bytearray(b"\0")
    return bytes(data)


def test_three_hundred_damaged_frames_leave_an_agent_that_answers(agent: Agent) -> None:
    generator = random.Random(20240501)
    metadata = text(5, text(1, b"key") + text(2, b"value"))
    details = request(1, "grpc.AgentService", "GetGuestDetails", bytes.fromhex("08011001"))
    seeds = [CHECK_WITH_TIMEOUT, frame(1, SOMEBODY_ELSES_REQUEST), frame(1, CHECK[10:] + metadata), details]
    for _ in range(300):
        body = mutate(generator.choice(seeds), generator)
        with agent.connect() as client:
            # With its length put right it reaches the decoder; without, the framing.
            client.send(frame(1, body[10:]) if generator.random() < 0.7 else body)
            client.send(CHECK)
    with agent.connect() as client:
        assert client.call(CHECK).code == OK


# --- hosts that take more than their share ---


def half(frame: bytes, left: int = 1) -> bytes:
    return frame[: len(frame) - left]


def big(stream: int) -> bytes:
    """A call of 4 MiB, all but its name in a field that nobody knows."""
    return frame(stream, CHECK[10:] + text(7, bytes(4 * MIB - len(CHECK[10:]) - 5)))


@pytest.mark.parametrize("size", [16 * MIB + 1, 0xFFFFFFFF], ids=["16 MiB and a byte", "4 GiB"])
def test_an_absurd_length_is_refused_at_once_and_ends_the_connection(agent: Agent, size: int) -> None:
    with agent.connect() as client:
        client.send(size.to_bytes(4, "big") + CHECK[4:10])
        assert client.answer().code == INVALID_ARGUMENT
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            client.send(request(3, "grpc.AgentService", "DestroySandbox") * 3000)
            assert client.socket.recv(1) == b""
    with agent.connect() as client:
        assert client.call(CHECK).code == OK


def test_a_connection_that_was_refused_is_closed_although_its_host_stays(agent: Agent) -> None:
    with agent.connect() as client:
        client.send(b"\xff" * 4 + CHECK[4:10])
        assert client.answer().code == INVALID_ARGUMENT
        assert client.socket.recv(1) == b""
        time.sleep(1.5)
        with pytest.raises(BrokenPipeError):
            client.send(CHECK)


def test_half_frames_beyond_the_budget_are_refused_and_their_connections_live_on(agent: Agent) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(agent.connect()) for _ in range(30)]
        for client in clients:
            client.send(half(big(1)))
        with agent.connect() as other:  # a small call needs nothing of the budget
            assert other.call(CHECK).code == OK
        codes = []
        for client in clients:
            client.send(big(1)[-1:] + check(3))
            codes.append(client.answer().code)
            assert client.answer().stream == 3
    assert set(codes) == {OK, RESOURCE_EXHAUSTED}
    assert codes.count(OK) == 2  # of 12 MiB, with the third one's last bytes not fitting any more


def test_after_big_frames_there_is_room_for_big_frames(agent: Agent) -> None:
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(agent.connect()) for _ in range(12)]
        for stream in range(1, 7, 2):
            assert [client.call(big(stream)).code for client in clients] == [OK] * 12


def test_thirty_one_half_frames_take_less_than_twenty_mebibytes(tmp_path: Path) -> None:
    with running(compile_agent(), tmp_path / "log") as agent, contextlib.ExitStack() as stack:
        for _ in range(31):
            stack.enter_context(agent.connect()).send(half(big(1)))
        with agent.connect() as other:
            assert other.call(CHECK).code == OK
        assert agent.peak_kib() < 20 * 1024


def test_calls_that_wait_do_not_take_more_than_the_budget_however_many_they_are(client: Client) -> None:
    unknown = text(1000, b"x" * 60_000)  # the agent skips the field, and keeps the request until there is an answer
    streams = range(1, 601, 2)
    for stream in streams:
        client.send(request(stream, "grpc.AgentService", "GetOOMEvent", unknown))
    client.send(check(9001))
    answers = list(iter(client.answer, Answer(stream=9001, code=OK, message="", payload=b"\x08\x01")))
    assert {answer.code for answer in answers} == {RESOURCE_EXHAUSTED}
    assert len(streams) - len(answers) in range(150, 200)  # of 64 KiB each: 12 MiB


def test_a_frame_that_takes_too_long_ends_its_connection_and_no_other(tmp_path: Path) -> None:
    impatient = compile_agent("-DAGENT_HALF_FRAME_MS=200")
    with running(impatient, tmp_path / "log") as agent, agent.connect() as idle, agent.connect() as slow:
        assert idle.call(CHECK).code == OK
        assert slow.call(CHECK).code == OK
        began = time.monotonic()
        slow.send(CHECK[:15])
        assert slow.socket.recv(1) == b""
        assert 0.15 < time.monotonic() - began < 5
        assert idle.call(CHECK).code == OK


@pytest.mark.parametrize("said", [b"", CHECK[:5], CHECK + CHECK[:12]], ids=["nothing", "half", "one and a half"])
def test_hosts_that_say_nothing_whole_make_way_when_all_places_are_taken(agent: Agent, said: bytes) -> None:
    with contextlib.ExitStack() as stack:
        good = stack.enter_context(agent.connect())
        assert good.call(CHECK).code == OK
        for _ in range(31):
            stack.enter_context(agent.connect()).send(said)
        newcomer = stack.enter_context(agent.connect())
        began = time.monotonic()
        assert newcomer.call(CHECK).code == OK
        assert time.monotonic() - began < 5
        assert good.call(CHECK).code == OK


# --- what it logs ---


def test_every_line_of_the_log_is_one_object_with_the_keys_of_kata(agent: Agent, client: Client) -> None:
    assert client.call(CHECK).code == OK
    lines = agent.lines()
    assert [line["msg"] for line in lines] == ["root mounted", "agent started", "listening"]
    for line in lines:
        assert line.keys() >= {"msg", "level", "ts", "name", "pid", "source", "version", "subsystem"}
        assert line["version"] == osbuild.__version__
        assert line["pid"] == str(agent.process.pid)
        assert time.strptime(line["ts"][:19] + line["ts"][29:], "%Y-%m-%dT%H:%M:%SZ")


def test_the_log_says_what_the_root_is_and_how_the_agent_started(agent: Agent) -> None:
    deadline = time.monotonic() + 20
    while len(agent.lines()) < 3 and time.monotonic() < deadline:  # it may be connected to before it says so
        time.sleep(0.01)
    mounted, started, listening = agent.lines()
    root = [line.split() for line in Path("/proc/mounts").read_text().splitlines() if line.split()[1] == "/"][-1]
    assert mounted["fstype"] == root[2]
    assert mounted["device"]
    assert set(mounted["options"].split(",")) >= {root[3].split(",")[0]}
    assert started["init"] is False
    assert started["nonce"] == ""
    assert 0 < started["uptime_seconds"] <= time.clock_gettime(time.CLOCK_BOOTTIME)
    assert listening["address"] == f"unix:{agent.path}"


def test_a_host_that_sends_nonsense_without_end_does_not_flood_the_log(agent: Agent, client: Client) -> None:
    client.send(frame(1, b"", kind=9) * 50_000 + CHECK)
    assert client.receive(len(SERVING)) == SERVING
    assert len(agent.lines()) < 200


def test_a_console_that_nobody_reads_does_not_stop_the_agent(program: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="agent-") as directory:
        path = Path(directory) / "socket"
        with command.start(str(program), "--listen", f"unix:{path}", pipe=True) as process:
            wait_for(path)
            assert process.stdout is not None
            with Client(path) as client:
                for _ in range(3):  # more lines than a bucket holds, with the bucket refilling in between
                    client.send(frame(1, b"", kind=9) * 2000 + CHECK)
                    assert client.receive(len(SERVING)) == SERVING
            process.terminate()
            assert process.wait(timeout=20) == 0


def test_arguments_that_mean_nothing_are_refused(program: Path) -> None:
    for arguments in (["--nonsense"], ["--listen"], ["--listen", "tcp:1"]):
        with command.start(str(program), *arguments) as process:
            assert process.wait(timeout=20) == 2


# --- the program itself ---


@pytest.fixture
def built() -> Path:
    return build_agent(X86_64, default_cache()).path


@pytest.mark.slow
def test_the_same_sources_give_the_same_bytes_in_another_directory(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "a directory of another length" / "agent"
    shutil.copytree(resource("agent"), elsewhere)
    monkeypatch.setattr(agent_module, "resource", lambda name: elsewhere)
    again = build_agent(X86_64, Cache(root=tmp_path / "cache")).path
    assert again != built
    assert again.read_bytes() == built.read_bytes()


def test_the_agent_is_static_small_and_runs(built: Path) -> None:
    headers = command.run("readelf", "--program-headers", "--wide", str(built)).output
    assert "INTERP" not in headers
    assert "RWE" not in headers
    assert command.run(str(built), "--version").output == f"osbuilder-agent {osbuild.__version__}\n"
    if shutil.which("musl-gcc") is not None:
        assert built.stat().st_size < 300 * 1024


def test_the_agent_can_lie_at_any_address(built: Path) -> None:
    assert "DYN (" in command.run("readelf", "--file-header", str(built)).output
    assert "NEEDED" not in command.run("readelf", "--dynamic", str(built)).output
    lines = command.run("readelf", "--relocs", "--wide", str(built)).output.splitlines()
    kinds = {line.split()[2] for line in lines if " R_X86_64_" in line}
    assert kinds  # with glibc also functions that are chosen at the start
    assert kinds <= {"R_X86_64_RELATIVE", "R_X86_64_IRELATIV"}


def test_no_path_of_the_build_gets_into_the_agent(built: Path) -> None:
    data = built.read_bytes()
    assert b"agent/" not in data
    assert os.fsencode(tempfile.gettempdir()) + b"/" not in data


def test_the_version_is_found_in_the_bytes(built: Path) -> None:
    assert agent_version(built.read_bytes()) == osbuild.__version__


def test_bytes_without_a_version_are_no_agent() -> None:
    with pytest.raises(InputError, match="no agent"):
        agent_version(b"\x7fELF osbuilder-agent version=;")


def test_a_second_build_compiles_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_agent(tmp_path / "agent", monkeypatch)
    cache = Cache(root=tmp_path / "cache")
    first = build_agent(X86_64, cache)
    assert build_agent(X86_64, cache) == first
    assert len(list(first.path.parent.parent.iterdir())) == 1
    assert first.path.stat().st_mtime_ns == build_agent(X86_64, cache).path.stat().st_mtime_ns


def test_a_changed_source_makes_another_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(root=tmp_path / "cache")
    source = toy_agent(tmp_path / "agent", monkeypatch)
    before = build_agent(X86_64, cache)
    source.write_text(source.read_text().replace("argc - 1", "argc - 2"))
    assert build_agent(X86_64, cache).sha256 != before.sha256
