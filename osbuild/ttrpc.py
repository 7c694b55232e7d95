"""ttRPC: many calls at a time over one connection, and the ways to reach an agent in a guest.

    0        4        8      9       10
    +--------+--------+------+-------+---- - - -
    | length | stream | type | flags | payload: a ttrpc.Request or a ttrpc.Response (agent/proto/ttrpc.proto)
    +--------+--------+------+-------+---- - - -
    big endian; length is the payload's alone, at most 4 MiB

What goes wrong here is a fact about a guest, and smoke.py makes a verdict of it:

    RpcError              not raised itself, except after our own close()
    ├── CallTimeout       silence: we may say neither that the guest is right nor that it is wrong
    ├── PeerClosed        it hung up
    ├── ProtocolError     it answered, and that was not ttRPC
    └── StatusError       it answered that it will not, or cannot
"""

from __future__ import annotations

import contextlib
import enum
import errno
import math
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from osbuild import protos
from osbuild.errors import HostError

MAX_PAYLOAD: Final = 4 << 20
REQUEST: Final = 1
RESPONSE: Final = 2
AGENT_PORT: Final = 1024  # where a Kata agent listens

_HEADER: Final = struct.Struct(">IIBB")
_LAST_STREAM: Final = (1 << 32) - 1
_READ_BYTES: Final = 1 << 16
_INT64_MAX: Final = (1 << 63) - 1
_RETRY_SECONDS: Final = 0.05
_GREETING_SECONDS: Final = 10.0  # what Kata's own client gives a VMM to answer CONNECT
_GREETING_BYTES: Final = 64  # "OK 4294967295\n" and some air


class RpcError(Exception):
    """A call gave no result."""


class CallTimeout(RpcError):  # noqa: N818 - silence is not an error of anybody's
    """Nothing came before the deadline."""


class PeerClosed(RpcError):  # noqa: N818 - nor is hanging up, at the end of a sandbox
    """The other side ended the connection."""


class ProtocolError(RpcError):
    """What came is not what the protocol allows."""


class StatusError(RpcError):
    """The call was answered with an error."""

    def __init__(self, what: str, code: int, message: str) -> None:
        super().__init__(f"{what}: {_code_name(code)}: {message or 'no reason given'}")
        self.code = code
        self.message = message


class Code(enum.IntEnum):
    """The status codes, which are those of gRPC."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


def _code_name(code: int) -> str:
    try:
        return Code(code).name
    except ValueError:
        return f"status {code}"


# Bytes: nothing below here, down to Connection, touches a socket.


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One message on the wire."""

    stream: int
    kind: int
    flags: int = 0
    payload: bytes = b""

    def encode(self) -> bytes:
        if len(self.payload) > MAX_PAYLOAD:
            raise ValueError(f"{len(self.payload)} bytes in one message; ttRPC allows {MAX_PAYLOAD}")
        return _HEADER.pack(len(self.payload), self.stream, self.kind, self.flags) + self.payload


class FrameBuffer:
    """Bytes in, in pieces of any size; whole frames out."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes."""
        self._bytes += data
        frames: list[Frame] = []
        while len(self._bytes) >= _HEADER.size:
            length, stream, kind, flags = _HEADER.unpack_from(self._bytes)
            if length > MAX_PAYLOAD:
                shown = bytes(self._bytes[: _HEADER.size])
                raise ProtocolError(f"a frame of {length} bytes is announced, {MAX_PAYLOAD} are allowed: {shown!r}")
            end = _HEADER.size + length
            if len(self._bytes) < end:
                break
            payload = bytes(self._bytes[_HEADER.size : end])
            frames.append(Frame(stream=stream, kind=kind, flags=flags, payload=payload))
            del self._bytes[:end]
        return frames

    @property
    def rest(self) -> str:
        """How far into a frame the bytes end, in words; empty between frames."""
        if not self._bytes:
            return ""
        if len(self._bytes) < _HEADER.size:
            return f"{len(self._bytes)} of the {_HEADER.size} bytes of a header"
        return f"{len(self._bytes)} of the {_HEADER.size + _HEADER.unpack_from(self._bytes)[0]} bytes of a frame"


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked."""

    service: str
    method: str
    payload: bytes = b""
    timeout_nano: int = 0  # 0: no limit
    metadata: tuple[tuple[str, str], ...] = ()

    def encode(self) -> bytes:
        made = protos.message("ttrpc.Request")(
            service=self.service, method=self.method, payload=self.payload, timeout_nano=self.timeout_nano
        )
        for key, value in self.metadata:
            made.metadata.add(key=key, value=value)
        return bytes(made.SerializeToString())

    @classmethod
    def decode(cls, data: bytes) -> Request:
        read = decode("ttrpc.Request", data)
        return cls(
            service=read.service,
            method=read.method,
            payload=read.payload,
            timeout_nano=read.timeout_nano,
            metadata=tuple((pair.key, pair.value) for pair in read.metadata),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How it went."""

    code: int = 0
    message: str = ""
    details: tuple[tuple[str, bytes], ...] = ()  # type URL and bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Response:
    """What is answered."""

    status: Status = field(default_factory=Status)
    payload: bytes = b""

    def encode(self, *, explicit: bool = False) -> bytes:
        """With `explicit`, success is an empty status that is there, as the Rust agent writes it."""
        made = protos.message("ttrpc.Response")(payload=self.payload)
        if explicit or self.status != Status():
            made.status.SetInParent()
            made.status.code = self.status.code
            made.status.message = self.status.message
            for url, value in self.status.details:
                made.status.details.add(type_url=url, value=value)
        return bytes(made.SerializeToString())

    @classmethod
    def decode(cls, data: bytes) -> Response:
        read = decode("ttrpc.Response", data)
        details = tuple((item.type_url, item.value) for item in read.status.details)
        status = Status(code=read.status.code, message=read.status.message, details=details)
        return cls(status=status, payload=read.payload)


def decode(name: str, data: bytes) -> Any:  # Any: see protos.Method
    """The message of that full name; ProtocolError when the bytes are not one."""
    from google.protobuf.message import DecodeError

    try:
        return protos.message(name).FromString(data)
    except DecodeError as problem:
        shown = data[:16].hex() + ("…" if len(data) > 16 else "")
        raise ProtocolError(f"{len(data)} bytes that are no {name}: {shown or 'none'}") from problem


class Connection:
    """A connected socket, from now on owned here, and the thread that moves its bytes.

    Any number of threads may call at the same time. Once broken it stays broken: every call says why.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._buffer = FrameBuffer()
        self._received = 0
        self._lock = threading.Lock()  # for everything from here on
        self._next_stream = 1
        self._waiting: dict[int, Future[bytes]] = {}
        self._given_up: set[int] = set()  # streams whose answer may still come and is then dropped
        self._outgoing = bytearray()
        self._dead: RpcError | None = None
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="ttrpc", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection and its thread; calls still waiting fail. May be called again."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        self._socket.close()

    def call(self, service: str, method: str, payload: bytes, seconds: float, *, every: float = math.inf) -> bytes:
        """The answer to one call; `math.inf` seconds wait for ever.

        With `every`, the question is asked again that often, on a fresh stream each time, until any of them is
        answered. That is for what may be asked twice, of a guest that may not yet have been there the first time.
        """
        what = f"{service}/{method}"
        deadline = time.monotonic() + seconds
        answer: Future[bytes] = Future()
        streams: list[int] = []
        try:
            while (left := deadline - time.monotonic()) > 0 or not streams:
                if streams and every == math.inf:  # the clock that woke us was a hair early
                    break
                request = Request(service=service, method=method, payload=payload, timeout_nano=_nano(left))
                streams.append(self._ask(request, answer))
                with contextlib.suppress(TimeoutError):
                    return _result(what, answer.result(min(every, left, threading.TIMEOUT_MAX)))
            raise CallTimeout(f"{what}: {self._describe_silence(seconds, len(streams))}")
        except (CallTimeout, StatusError):
            raise
        except RpcError as problem:
            raise type(problem)(f"{what}: {problem}") from problem
        finally:
            self._give_up(streams)

    def _ask(self, request: Request, answer: Future[bytes]) -> int:
        """Put a request in the queue and say on which stream it goes."""
        encoded = request.encode()
        with self._lock:
            if self._closed:
                raise RpcError("the connection was closed here")
            if self._dead is not None:
                raise type(self._dead)(str(self._dead))
            stream = self._next_stream
            if stream > _LAST_STREAM:
                raise RpcError("this connection has used up its streams")
            # Numbers must rise on the wire, so one lock covers both the number and its place in the queue.
            self._outgoing += Frame(stream=stream, kind=REQUEST, payload=encoded).encode()
            self._next_stream += 2
            self._waiting[stream] = answer
            os.eventfd_write(self._wake, 1)
        return stream

    def _give_up(self, streams: list[int]) -> None:
        with self._lock:
            for stream in streams:
                if self._waiting.pop(stream, None) is not None:
                    self._given_up.add(stream)

    def _describe_silence(self, seconds: float, asked: int) -> str:
        times = f", asked {asked} times" if asked > 1 else ""
        if not self._received:
            detail = "; not one byte has come on this connection"
        else:
            detail = f"; what came last stopped after {self._buffer.rest}" if self._buffer.rest else ""
        return f"no answer within {seconds:.3g} s{times}{detail}"

    # The thread

    def _run(self) -> None:
        ended: RpcError = RpcError("the ttRPC thread ended by a bug of ours")
        try:
            self._move_bytes()
            ended = RpcError("the connection was closed here")
        except RpcError as problem:
            ended = problem
        except OSError as problem:
            ended = PeerClosed(f"the connection broke: {problem.strerror}")
        finally:
            with self._lock:
                self._dead = ended
                orphans = set(self._waiting.values())
                self._waiting.clear()
            for answer in orphans:
                if not answer.done():
                    answer.set_exception(type(ended)(str(ended)))
            with contextlib.suppress(OSError):  # so that the other side learns of it before close()
                self._socket.shutdown(socket.SHUT_RDWR)

    def _move_bytes(self) -> None:
        """Both directions, until close() asks to stop or something raises."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._socket, select.POLLIN)
        while True:
            with self._lock:
                if self._closed:
                    return
                wanted = select.POLLIN | (select.POLLOUT if self._outgoing else 0)
            poll.modify(self._socket, wanted)
            ready = dict(poll.poll())
            if self._wake in ready:
                os.eventfd_read(self._wake)
            state = ready.get(self._socket.fileno(), 0)
            if state & select.POLLOUT:
                self._send()
            if state & ~select.POLLOUT:  # bytes, or a hang-up, which recv() explains
                self._receive()

    def _send(self) -> None:
        with self._lock:
            try:
                del self._outgoing[: self._socket.send(self._outgoing[:_READ_BYTES])]
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                # It reads no more, but may have answered earlier calls: receiving finds both its answers and the end.
                self._outgoing.clear()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""  # it closed before it had read all that we sent
        if not data:
            if self._buffer.rest:
                raise PeerClosed(f"the peer closed the connection after {self._buffer.rest}")
            raise PeerClosed(f"the peer closed the connection{'' if self._received else ' and never sent a byte'}")
        self._received += len(data)
        for frame in self._buffer.feed(data):
            self._accept(frame)

    def _accept(self, frame: Frame) -> None:
        if frame.kind != RESPONSE:
            raise ProtocolError(f"a message of type {frame.kind} came on stream {frame.stream}; only answers may come")
        with self._lock:
            answer = self._waiting.pop(frame.stream, None)
            if answer is None and frame.stream not in self._given_up:
                raise ProtocolError(f"an answer came on stream {frame.stream}, where nothing is being asked")
            self._given_up.discard(frame.stream)
        if answer is not None and not answer.done():  # it is done when asked `every` so often
            answer.set_result(frame.payload)


def _result(what: str, payload: bytes) -> bytes:
    response = Response.decode(payload)
    if response.status.code != Code.OK:
        raise StatusError(what, response.status.code, response.status.message)
    return response.payload


def _nano(seconds: float) -> int:
    """What travels as timeout_nano, where 0 means no limit."""
    return 0 if seconds == math.inf else min(max(int(seconds * 1e9), 1), _INT64_MAX)


# Ways to an agent. Each tries again until the deadline while nobody listens yet: CallTimeout after it.

# What a socket says while a guest, or the VMM before it, is still starting.
_NOT_YET: Final = frozenset({
    errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EPIPE, errno.EAGAIN,
    errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENODEV, errno.EINTR,
})  # fmt: skip


def connect_unix(path: Path, seconds: float) -> Connection:
    """To a unix socket: QEMU's end of a virtio-serial port, or an agent started by hand."""
    return _connect(socket.AF_UNIX, os.fspath(path), os.fspath(path), seconds)


def connect_vsock(cid: int, port: int, seconds: float) -> Connection:
    """To a guest with vhost-vsock."""
    return _connect(socket.AF_VSOCK, (cid, port), f"vsock {cid}:{port}", seconds)


def connect_hybrid(path: Path, port: int, seconds: float) -> Connection:
    """To a guest of Firecracker or Cloud Hypervisor, through the unix socket that stands for its vsock."""

    def greet(connected: socket.socket) -> None:
        connected.sendall(b"CONNECT %d\n" % port)
        answer = b""
        while not answer.endswith(b"\n"):
            byte = connected.recv(1)  # what follows the line is already ttRPC
            if not byte:
                raise ConnectionResetError(errno.ECONNRESET, f"hung up on CONNECT {port}")
            answer += byte
            if len(answer) > _GREETING_BYTES:
                break
        if not answer.startswith(b"OK"):
            raise ProtocolError(f"{path} answered CONNECT {port} with {answer!r} and not with OK")

    return _connect(socket.AF_UNIX, os.fspath(path), f"{path} port {port}", seconds, greet=greet)


def _connect(
    family: int,
    address: str | tuple[int, int],
    where: str,
    seconds: float,
    *,
    greet: Callable[[socket.socket], None] = lambda _: None,
) -> Connection:
    deadline = time.monotonic() + seconds
    while True:
        left = deadline - time.monotonic()
        try:
            with contextlib.ExitStack() as undo:
                made = undo.enter_context(socket.socket(family, socket.SOCK_STREAM))
                made.settimeout(min(max(left, _RETRY_SECONDS), _GREETING_SECONDS))
                made.connect(address)
                greet(made)
                connection = Connection(made)
                undo.pop_all()
                return connection
        except OSError as problem:
            if problem.errno not in _NOT_YET and not isinstance(problem, TimeoutError):
                raise HostError(f"cannot connect to {where}: {problem.strerror or problem}") from problem
            last = problem.strerror or "no reply"
        left = deadline - time.monotonic()
        if left <= 0:
            raise CallTimeout(f"{where}: nobody there within {seconds:g} s; last: {last}")
        time.sleep(min(_RETRY_SECONDS, left))
