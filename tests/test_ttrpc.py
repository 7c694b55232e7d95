"""Frames, calls, and what a guest may do to them."""

from __future__ import annotations

import contextlib
import math
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osbuild import ttrpc
from osbuild.errors import HostError
from osbuild.ttrpc import (
    CallTimeout,
    Connection,
    Frame,
    FrameBuffer,
    PeerClosed,
    ProtocolError,
    Request,
    Response,
    RpcError,
    Status,
    StatusError,
    connect_hybrid,
    connect_unix,
    connect_vsock,
)
from tests import fake_agent as fake
from tests.fake_agent import Asked, Behaviour, FakeAgent, Peer, fake_agent

CHECK = ("grpc.Health", "Check", b"")
SHORT = 0.2  # for calls that are expected to time out
LONG = 20.0  # for calls that are expected not to; a test that waits that long has failed


@contextlib.contextmanager
def connected(tmp_path: Path, behaviour: Behaviour) -> Iterator[tuple[Connection, FakeAgent]]:
    path = tmp_path / "agent.sock"
    with fake_agent(path, behaviour) as agent, connect_unix(path, LONG) as connection:
        yield connection, agent


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace(" ", ""))


# Vectors of kata-contract.md 1.6

A = unhex("0000001400000001 0100 0a0b677270632e4865616c7468 1205436865636b")
A2 = unhex("0000001a00000001 0100 0a0b677270632e4865616c7468 1205436865636b 2080d88ee16f")
D = unhex(
    "0a11677270632e5465737453657276696365731204546573741a090102030405060708092080dac4092a180a09746573745f6b65793112"
    "0b746573745f76616c756531"
)


@pytest.mark.parametrize(
    ("request_", "wire"),
    [
        pytest.param(Request(service="grpc.Health", method="Check"), A, id="A"),
        pytest.param(Request(service="grpc.Health", method="Check", timeout_nano=30 * 10**9), A2, id="A2"),
    ],
)
def test_a_request_has_the_contract_s_bytes(request_: Request, wire: bytes) -> None:
    assert Frame(stream=1, kind=ttrpc.REQUEST, payload=request_.encode()).encode() == wire
    (frame,) = FrameBuffer().feed(wire)
    assert (frame.stream, frame.kind, frame.flags) == (1, ttrpc.REQUEST, 0)
    assert Request.decode(frame.payload) == request_


def test_a_request_with_everything_has_the_contract_s_bytes() -> None:
    request = Request(
        service="grpc.TestServices",
        method="Test",
        payload=bytes(range(1, 10)),
        timeout_nano=20 * 10**6,
        metadata=(("test_key1", "test_value1"),),
    )
    assert request.encode() == D
    assert len(D) == 67
    assert Request.decode(D) == request


@pytest.mark.parametrize(
    ("stream", "response", "explicit", "wire"),
    [
        pytest.param(1, Response(payload=b"\x08\x01"), False, "0000000400000001 0200 12020801", id="B terse"),
        pytest.param(1, Response(payload=b"\x08\x01"), True, "0000000600000001 0200 0a0012020801", id="B explicit"),
        pytest.param(
            3, Response(status=Status(code=12, message="x")), False, "0000000700000003 0200 0a05080c120178", id="C"
        ),
        pytest.param(1, Response(), False, "00000000000000010200", id="I terse"),
        pytest.param(1, Response(), True, "000000020000000102000a00", id="I explicit"),
    ],
)
def test_a_response_has_the_contract_s_bytes(stream: int, response: Response, explicit: bool, wire: str) -> None:
    payload = response.encode(explicit=explicit)
    assert Frame(stream=stream, kind=ttrpc.RESPONSE, payload=payload).encode() == unhex(wire)
    (frame,) = FrameBuffer().feed(unhex(wire))
    assert Response.decode(frame.payload) == response


# For all inputs

U32 = st.integers(0, 2**32 - 1)
FRAMES = st.builds(Frame, stream=U32, kind=st.integers(0, 255), flags=st.integers(0, 255), payload=st.binary())
REQUESTS = st.builds(
    Request,
    service=st.text(),
    method=st.text(),
    payload=st.binary(),
    timeout_nano=st.integers(-(2**63), 2**63 - 1),
    metadata=st.lists(st.tuples(st.text(), st.text())).map(tuple),
)
STATUSES = st.builds(
    Status,
    code=st.integers(-(2**31), 2**31 - 1),
    message=st.text(),
    details=st.lists(st.tuples(st.text(), st.binary())).map(tuple),
)
RESPONSES = st.builds(Response, status=STATUSES, payload=st.binary())


@settings(deadline=None)  # a busy machine is not a bug
@given(frames=st.lists(FRAMES, max_size=5), cut=st.integers(1, 64))
def test_frames_survive_being_cut_anywhere(frames: list[Frame], cut: int) -> None:
    wire = b"".join(frame.encode() for frame in frames)
    buffer = FrameBuffer()
    found = [frame for at in range(0, len(wire), cut) for frame in buffer.feed(wire[at : at + cut])]
    assert found == frames
    assert buffer.rest == ""


@settings(deadline=None)
@given(REQUESTS)
def test_a_request_survives_the_trip(request: Request) -> None:
    assert Request.decode(request.encode()) == request


@settings(deadline=None)
@given(RESPONSES, st.booleans())
def test_a_response_survives_the_trip(response: Response, explicit: bool) -> None:
    assert Response.decode(response.encode(explicit=explicit)) == response


@settings(deadline=None)
@given(st.binary())
def test_random_bytes_are_decoded_or_refused_and_nothing_else(data: bytes) -> None:
    for decode in (FrameBuffer().feed, Request.decode, Response.decode):
        with contextlib.suppress(ProtocolError):
            decode(data)


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=40), st.integers(0, 1), st.data())
def test_a_damaged_answer_is_decoded_or_refused_and_nothing_else(text: bytes, flag: int, data: st.DataObject) -> None:
    wire = bytearray(Response(status=Status(code=flag, message="no"), payload=text).encode(explicit=True))
    wire[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        Response.decode(bytes(wire))


def test_a_payload_of_exactly_4_mib_fits_and_one_byte_more_does_not() -> None:
    largest = Frame(stream=1, kind=2, payload=bytes(ttrpc.MAX_PAYLOAD))
    assert FrameBuffer().feed(largest.encode()) == [largest]
    with pytest.raises(ValueError, match="4194305 bytes in one message; ttRPC allows 4194304"):
        Frame(stream=1, kind=2, payload=bytes(ttrpc.MAX_PAYLOAD + 1)).encode()
    with pytest.raises(ProtocolError, match="a frame of 4194305 bytes is announced, 4194304 are allowed"):
        FrameBuffer().feed(unhex("0040000100000001 0200"))


def test_text_that_is_not_utf_8_is_refused() -> None:
    with pytest.raises(ProtocolError, match=r"are no ttrpc\.Response: 0a04120280ff"):
        Response.decode(unhex("0a04 120280ff"))


# Calls


@pytest.mark.parametrize("explicit", [True, False], ids=["as Rust answers", "as Go answers"])
def test_both_ways_to_spell_success_are_success(tmp_path: Path, explicit: bool) -> None:
    def behave(peer: Peer, batch: list[Asked]) -> None:
        for asked in batch:
            peer.answer(asked.stream, asked.request.payload, explicit=explicit)

    with connected(tmp_path, behave) as (connection, _):
        assert connection.call("s", "m", b"some", LONG) == b"some"
        assert connection.call("s", "m", b"", LONG) == b""


def test_streams_are_odd_and_rise_and_the_deadline_travels(tmp_path: Path) -> None:
    with connected(tmp_path, fake.echo) as (connection, agent):
        connection.call("grpc.Health", "Check", b"x", 7.0)
        connection.call("grpc.Health", "Check", b"", math.inf)
        connection.call("grpc.Health", "Check", b"", 1e12)
    assert [(asked.stream, asked.flags, asked.method) for asked in agent.asked] == [
        (stream, 0, "grpc.Health/Check") for stream in (1, 3, 5)
    ]
    assert 6.9e9 < agent.asked[0].request.timeout_nano <= 7e9
    assert agent.asked[0].request.payload == b"x"
    assert agent.asked[1].request.timeout_nano == 0
    assert agent.asked[2].request.timeout_nano == 2**63 - 1


def test_200_calls_from_8_threads_get_their_own_answers_in_any_order(tmp_path: Path) -> None:
    with connected(tmp_path, fake.answer_late(0.002, fake.echo_shuffled)) as (connection, agent):

        def call(number: int) -> bytes:
            return connection.call("s", "m", b"%d" % number * (number + 1), LONG)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(call, range(200)))
    assert answers == [b"%d" % number * (number + 1) for number in range(200)]
    assert [asked.stream for asked in agent.asked] == list(range(1, 401, 2))


def test_a_long_call_does_not_hold_up_a_short_one(tmp_path: Path) -> None:
    held: list[Asked] = []

    def hold_the_first(peer: Peer, batch: list[Asked]) -> None:
        held.extend(asked for asked in batch if asked.request.method == "WaitProcess")
        for asked in batch:
            if asked.request.method == "Kill":
                peer.answer(asked.stream, b"killed")
                peer.answer(held[0].stream, b"\x08\x89\x01")

    with connected(tmp_path, hold_the_first) as (connection, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connection.call, "s", "WaitProcess", b"", math.inf)
        while not held:
            time.sleep(0.001)
        assert connection.call("s", "Kill", b"", LONG) == b"killed"
        assert waiting.result(LONG) == b"\x08\x89\x01"


def test_4_mib_go_there_and_come_back(tmp_path: Path) -> None:
    big = bytes(range(256)) * 16380  # leaves room for the envelope
    with connected(tmp_path, fake.echo) as (connection, _):
        assert connection.call("s", "m", big, LONG) == big
        with pytest.raises(ValueError, match="ttRPC allows 4194304"):
            connection.call("s", "m", bytes(ttrpc.MAX_PAYLOAD), LONG)
        assert connection.call("s", "m", b"still here", LONG) == b"still here"


def test_an_error_status_becomes_an_error_with_its_code_and_text(tmp_path: Path) -> None:
    with connected(tmp_path, fake.refuse(12, "no such method")) as (connection, _):
        with pytest.raises(StatusError, match=r"^grpc\.Health/Check: UNIMPLEMENTED: no such method$") as caught:
            connection.call(*CHECK, LONG)
        assert (caught.value.code, caught.value.message) == (ttrpc.Code.UNIMPLEMENTED, "no such method")
        with pytest.raises(StatusError):  # and the connection is as good as before
            connection.call(*CHECK, LONG)


def test_a_status_nobody_ever_heard_of_is_shown_as_it_is(tmp_path: Path) -> None:
    with (
        connected(tmp_path, fake.refuse(-77, "")) as (connection, _),
        pytest.raises(StatusError, match="status -77: no reason given"),
    ):
        connection.call(*CHECK, LONG)


# Faults

GARBAGE = b"[    0.000000] Linux version 6.12\r\n"


@pytest.mark.parametrize(
    ("behaviour", "error", "message"),
    [
        pytest.param(fake.be_silent, CallTimeout, "no answer within 0.2 s; not one byte has come", id="silence"),
        pytest.param(fake.say(b"\0\0"), CallTimeout, "stopped after 2 of the 10 bytes of a header", id="half header"),
        pytest.param(
            fake.say(fake.answer_frame(1, b"full")[:13]), CallTimeout, "after 13 of the 18 bytes of a frame", id="half"
        ),
        pytest.param(fake.say_and_hang_up(b""), PeerClosed, "closed the connection and never sent a byte", id="closes"),
        pytest.param(
            fake.say_and_hang_up(fake.answer_frame(1, b"full")[:13]),
            PeerClosed,
            "closed the connection after 13 of the 18 bytes of a frame",
            id="closes in mid-answer",
        ),
        pytest.param(fake.say(GARBAGE), ProtocolError, r"are allowed: b'\[    0\.000'", id="console text"),
        pytest.param(
            fake.say(b"\xff\xff\xff\xff\0\0\0\1\2\0"), ProtocolError, "a frame of 4294967295 bytes", id="4 GiB"
        ),
        pytest.param(fake.say(bytes(64)), ProtocolError, "a message of type 0 came on stream 0", id="zeros"),
        pytest.param(fake.say(fake.frame(1, b"", kind=3)), ProtocolError, "type 3 came on stream 1", id="stream data"),
        pytest.param(fake.say(A), ProtocolError, "type 1 came on stream 1; only answers may", id="our own request"),
        pytest.param(
            fake.say(fake.answer_frame(3)), ProtocolError, "stream 3, where nothing is being asked", id="wrong stream"
        ),
        pytest.param(fake.say(fake.answer_frame(2)), ProtocolError, "on stream 2, where nothing", id="even stream"),
        pytest.param(
            fake.say(fake.frame(1, b"\xff\xff")), ProtocolError, r"2 bytes that are no ttrpc\.Response: ffff", id="body"
        ),
    ],
)
def test_a_fault_of_the_guest_is_named_soon_and_in_words(
    tmp_path: Path, behaviour: Behaviour, error: type[RpcError], message: str
) -> None:
    with connected(tmp_path, behaviour) as (connection, _):
        began = time.monotonic()
        with pytest.raises(error, match=rf"^grpc\.Health/Check: .*{message}") as caught:
            connection.call(*CHECK, SHORT if error is CallTimeout else LONG)
        assert type(caught.value) is error
        assert time.monotonic() - began < LONG / 2


def test_after_garbage_every_further_call_says_why_at_once(tmp_path: Path) -> None:
    with connected(tmp_path, fake.say(GARBAGE)) as (connection, agent):
        for _ in range(2):
            with pytest.raises(ProtocolError, match="is announced"):
                connection.call(*CHECK, LONG)
    assert len(agent.asked) == 1


def test_a_body_that_is_garbage_costs_only_its_own_call(tmp_path: Path) -> None:
    def garble_the_first(peer: Peer, batch: list[Asked]) -> None:
        for asked in batch:
            peer.send(fake.frame(asked.stream, b"\xff" if asked.stream == 1 else b""))

    with connected(tmp_path, garble_the_first) as (connection, _):
        with pytest.raises(ProtocolError):
            connection.call(*CHECK, LONG)
        assert connection.call(*CHECK, LONG) == b""


def test_all_pending_calls_fail_when_the_peer_closes(tmp_path: Path) -> None:
    seen: list[Asked] = []

    def hang_up_on_the_fourth(peer: Peer, batch: list[Asked]) -> None:
        seen.extend(batch)
        if len(seen) == 4:
            peer.hang_up()

    with connected(tmp_path, hang_up_on_the_fourth) as (connection, _), ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(connection.call, "s", f"m{number}", b"", math.inf) for number in range(4)]
        for number, call in enumerate(calls):
            with pytest.raises(PeerClosed, match=f"^s/m{number}: the peer closed"):
                call.result(LONG)


def test_answers_sent_before_hanging_up_are_still_delivered(tmp_path: Path) -> None:
    with connected(tmp_path, fake.say_and_hang_up(fake.answer_frame(1, b"bye"))) as (connection, _):
        assert connection.call(*CHECK, LONG) == b"bye"
        with pytest.raises(PeerClosed):
            connection.call(*CHECK, LONG)


def test_a_late_answer_is_dropped_and_does_no_harm(tmp_path: Path) -> None:
    def answer_the_first_with_the_second(peer: Peer, batch: list[Asked]) -> None:
        for asked in batch:
            if asked.stream == 3:
                peer.answer(1, b"late")
                peer.answer(3, b"in time")

    with connected(tmp_path, answer_the_first_with_the_second) as (connection, _):
        with pytest.raises(CallTimeout):
            connection.call(*CHECK, SHORT)
        assert connection.call(*CHECK, LONG) == b"in time"


def test_a_second_answer_to_the_same_call_is_a_fault(tmp_path: Path) -> None:
    def answer_twice(peer: Peer, batch: list[Asked]) -> None:
        for asked in batch:
            peer.send(fake.answer_frame(asked.stream) * 2)

    with connected(tmp_path, answer_twice) as (connection, _):
        assert connection.call(*CHECK, LONG) == b""
        with pytest.raises(ProtocolError, match="stream 1, where nothing is being asked"):
            connection.call(*CHECK, LONG)


def test_a_call_ends_at_its_deadline_and_not_before(tmp_path: Path) -> None:
    with connected(tmp_path, fake.be_silent) as (connection, agent):
        began = time.monotonic()
        with pytest.raises(CallTimeout):
            connection.call(*CHECK, 0.3)
        assert 0.29 < time.monotonic() - began < 5
        with pytest.raises(CallTimeout):
            connection.call(*CHECK, 0)
    assert [asked.stream for asked in agent.asked][:1] == [1]


def test_a_peer_that_reads_nothing_does_not_hold_a_call_past_its_deadline(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs, Connection(ours) as connection:
        for _ in range(3):
            with pytest.raises(CallTimeout):
                connection.call("s", "CopyFile", bytes(1 << 20), SHORT)


def test_asking_again_goes_out_on_fresh_streams_until_one_is_answered(tmp_path: Path) -> None:
    def answer_the_third(peer: Peer, batch: list[Asked]) -> None:
        for asked in batch:
            if asked.stream == 5:
                peer.send(fake.answer_frame(1, b"one") + fake.answer_frame(5, b"five") + fake.answer_frame(3, b"three"))
            if asked.stream > 5:
                peer.answer(asked.stream, b"after")

    with connected(tmp_path, answer_the_third) as (connection, agent):
        assert connection.call(*CHECK, LONG, every=0.02) == b"one"
        assert connection.call(*CHECK, LONG) == b"after"
    assert agent.asked[0].request.timeout_nano > agent.asked[2].request.timeout_nano


def test_asking_again_in_vain_says_how_often(tmp_path: Path) -> None:
    with (
        connected(tmp_path, fake.be_silent) as (connection, _),
        pytest.raises(CallTimeout, match=r"no answer within 0\.2 s, asked \d+ times; not one byte"),
    ):
        connection.call(*CHECK, SHORT, every=0.02)


# The end


def test_closing_twice_is_fine_and_leaves_no_thread(tmp_path: Path) -> None:
    with connected(tmp_path, fake.echo) as (connection, _):
        connection.call(*CHECK, LONG)
        connection.close()
        connection.close()
        assert not any(thread.name == "ttrpc" for thread in threading.enumerate())
        with pytest.raises(RpcError, match="the connection was closed here"):
            connection.call(*CHECK, LONG)


def test_closing_fails_the_calls_that_are_still_waiting(tmp_path: Path) -> None:
    asked = threading.Event()

    def behave(peer: Peer, batch: list[Asked]) -> None:
        asked.set()

    with connected(tmp_path, behave) as (connection, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(connection.call, *CHECK, math.inf)
        assert asked.wait(LONG)
        connection.close()
        with pytest.raises(RpcError, match="closed here"):
            waiting.result(LONG)


# Ways there


def test_a_socket_that_appears_late_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with ThreadPoolExecutor(1) as pool:
        connecting = pool.submit(connect_unix, path, LONG)
        time.sleep(0.15)
        with fake_agent(path), connecting.result(LONG) as connection:
            assert connection.call(*CHECK, LONG) == b"\x08\x01"


def test_a_socket_nobody_listens_on_any_more_is_silence(tmp_path: Path) -> None:
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with pytest.raises(CallTimeout, match=r"agent\.sock: nobody there within 0\.2 s; last: Connection refused"):
        connect_unix(path, SHORT)


def test_a_socket_that_never_appears_is_silence(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(CallTimeout, match=r"nobody there within 0\.2 s; last: No such file or directory"):
        connect_unix(tmp_path / "none", SHORT)
    assert time.monotonic() - began < LONG / 2


@pytest.mark.parametrize(
    ("name", "problem"),
    [("f/sock", "Not a directory"), ("x" * 200, "AF_UNIX path too long")],
    ids=["below a file", "too long"],
)
def test_a_socket_that_cannot_be_is_the_host_s_fault_at_once(tmp_path: Path, name: str, problem: str) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(HostError, match=problem):
        connect_unix(tmp_path / name, LONG)


def test_hybrid_vsock_asks_for_the_port_and_then_speaks_ttrpc(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    with (
        fake_agent(path, fake.echo, greeting=b"OK 1073741824\n") as agent,
        connect_hybrid(path, 1024, LONG) as connection,
    ):
        assert connection.call("s", "m", b"hello", LONG) == b"hello"
    assert agent.greetings == [b"CONNECT 1024\n"]


def test_hybrid_vsock_leaves_what_follows_the_greeting_to_ttrpc(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    with (
        fake_agent(path, greeting=b"OK 5\n" + GARBAGE),
        connect_hybrid(path, 1024, LONG) as connection,
        pytest.raises(ProtocolError, match=re.escape(repr(GARBAGE[:10]))),
    ):
        connection.call(*CHECK, LONG)


def test_hybrid_vsock_tries_again_while_the_guest_refuses(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    with fake_agent(path, greeting=b"OK 1\n", refuse_first=2) as agent, connect_hybrid(path, 1024, LONG) as connection:
        assert connection.call(*CHECK, LONG) == b"\x08\x01"
    assert agent.connections == 3


def test_hybrid_vsock_that_always_refuses_is_silence(tmp_path: Path) -> None:
    path = tmp_path / "vsock"
    with (
        fake_agent(path, greeting=b"OK 1\n", refuse_first=1000),
        pytest.raises(CallTimeout, match=r"vsock port 1024: nobody there within 0\.2 s; last: hung up on CONNECT"),
    ):
        connect_hybrid(path, 1024, SHORT)


@pytest.mark.parametrize("greeting", [b"NO\n", b"O" * 100], ids=["another word", "no end"])
def test_hybrid_vsock_that_does_not_say_ok_is_wrong(tmp_path: Path, greeting: bytes) -> None:
    path = tmp_path / "vsock"
    with fake_agent(path, greeting=greeting), pytest.raises(ProtocolError, match="and not with OK"):
        connect_hybrid(path, 1024, LONG)


def test_a_vsock_guest_that_is_not_there_is_silence_or_the_host_s_lack() -> None:
    with pytest.raises((CallTimeout, HostError), match="vsock 4294967000:1024"):
        connect_vsock(4294967000, 1024, SHORT)


def test_vsock_reaches_a_listener() -> None:
    local = 1  # VMADDR_CID_LOCAL, which Python 3.11 has no name for
    with socket.socket(socket.AF_VSOCK) as listening:
        try:
            listening.bind((local, socket.VMADDR_PORT_ANY))
        except OSError as problem:
            pytest.skip(f"no vsock loopback here (modprobe vsock_loopback): {problem.strerror}")
        listening.listen()
        with connect_vsock(local, listening.getsockname()[1], LONG) as connection:
            accepted, _ = listening.accept()
            with accepted:
                accepted.sendall(fake.answer_frame(1, b"here"))
                assert connection.call(*CHECK, LONG) == b"here"
