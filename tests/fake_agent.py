"""An agent in a thread: a small ttRPC server on a unix socket that misbehaves on request.

It reads frames with its own few lines, so that what osbuild.ttrpc writes is judged by somebody else's reader.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osbuild import protos

HEADER = struct.Struct(">IIBB")


@dataclass(frozen=True)
class Asked:
    """One request as it came in."""

    stream: int
    flags: int
    request: Any  # a ttrpc.Request

    @property
    def method(self) -> str:
        return f"{self.request.service}/{self.request.method}"


class Peer:
    """The connection, as a behaviour sees it."""

    def __init__(self, connected: socket.socket, stopping: int) -> None:
        self._socket = connected
        self._stopping = stopping
        self.open = True

    def send(self, data: bytes) -> None:
        with contextlib.suppress(OSError):  # the client may have had enough
            self._socket.sendall(data)

    def answer(self, stream: int, payload: bytes = b"", *, explicit: bool = True) -> None:
        self.send(answer_frame(stream, payload, explicit=explicit))

    def refuse(self, stream: int, code: int, message: str) -> None:
        status = protos.message("ttrpc.Status")(code=code, message=message)
        self.send(frame(stream, protos.message("ttrpc.Response")(status=status).SerializeToString()))

    def pause(self, seconds: float) -> None:
        _wait([self._stopping], seconds)

    def hang_up(self) -> None:
        self.open = False


Behaviour = Callable[[Peer, list[Asked]], None]


@dataclass
class FakeAgent:
    """What the test can look at while, and after, it runs."""

    path: Path
    asked: list[Asked] = field(default_factory=list)
    greetings: list[bytes] = field(default_factory=list)
    connections: int = 0


def frame(stream: int, payload: bytes, *, kind: int = 2, flags: int = 0) -> bytes:
    return HEADER.pack(len(payload), stream, kind, flags) + payload


def answer_frame(stream: int, payload: bytes = b"", *, explicit: bool = True) -> bytes:
    body = protos.message("ttrpc.Response")(payload=payload).SerializeToString()
    return frame(stream, (b"\x0a\x00" if explicit else b"") + body)


class FakeProbe:
    """What a guest's probe would say: one that has all it should have."""

    def __init__(self) -> None:
        self.files = {"/sys/class/misc/hw_random/rng_current": b"virtio_rng.0\n"}
        self._answers = b""
        nothing: Callable[[Any], dict[str, Any]] = lambda request: {}  # noqa: E731
        self.calls: dict[str, Callable[[Any], dict[str, Any]]] = {
            "CopyFile": nothing, "CreateContainer": nothing, "StartContainer": nothing, "CreateSandbox": nothing,
            "SetGuestDateTime": nothing, "WriteStdin": self._write, "ReadStdout": self._read,
            "GetMetrics": lambda request: {"metrics": METRICS},
        }  # fmt: skip

    def _write(self, request: Any) -> dict[str, Any]:
        words = request.data.decode().split("\0")
        match words[:-2]:
            case ["clock"]:
                body: bytes | None = f"realtime {time.time():.9f}\nboottime 1.0\n".encode()
            case ["random", size]:
                body = os.urandom(int(size))
            case ["file", path]:
                body = self.files.get(path)
            case _:
                body = None
        said = body if body is not None else b"no: No such file or directory"
        self._answers += b"%c%d\n%s" % (b"-+"[body is not None], len(said), said)
        return {"len": len(request.data)}

    def _read(self, request: Any) -> dict[str, Any]:
        found, self._answers = self._answers[: request.len], self._answers[request.len :]
        return {"data": found}


METRICS = "".join(
    f'{name}{{item="mem_total"}} {200 << 20}\n'
    for name in (
        "kata_agent_scrape_count", "kata_agent_threads", "kata_agent_total_time", "kata_agent_total_vm",
        "kata_agent_total_rss", "kata_agent_proc_status", "kata_agent_io_stat", "kata_agent_proc_stat",
        "kata_guest_load", "kata_guest_tasks", "kata_guest_cpu_time", "kata_guest_vm_stat", "kata_guest_netdev_stat",
        "kata_guest_meminfo",
    )
)  # fmt: skip

# Behaviours: each is given all the requests that came in together.

KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "grpc.Health/Check": ("grpc.HealthCheckResponse", {"status": 1}),
    "grpc.Health/Version": ("grpc.VersionCheckResponse", {"grpc_version": "0.0.1", "agent_version": "4.1.0"}),
    "grpc.AgentService/GetGuestDetails": (
        "grpc.GuestDetailsResponse",
        {
            "mem_block_size_bytes": 128 << 20,
            "agent_details": {"version": "4.1.0", "init_daemon": True, "storage_handlers": ["blk", "nvdimm"]},
        },
    ),
    "grpc.AgentService/DestroySandbox": ("google.protobuf.Empty", {}),
}


def serve(peer: Peer, batch: list[Asked]) -> None:
    for asked in batch:
        if asked.method in KNOWN:
            name, fields = KNOWN[asked.method]
            peer.answer(asked.stream, protos.message(name)(**fields).SerializeToString())
        else:
            peer.refuse(asked.stream, 12, f"{asked.method} is not supported")


def serve_tersely(peer: Peer, batch: list[Asked]) -> None:
    """As a Go server: no status means success."""
    for asked in batch:
        name, fields = KNOWN[asked.method]
        peer.answer(asked.stream, protos.message(name)(**fields).SerializeToString(), explicit=False)


def echo(peer: Peer, batch: list[Asked]) -> None:
    for asked in batch:
        peer.answer(asked.stream, asked.request.payload)


def echo_shuffled(peer: Peer, batch: list[Asked]) -> None:
    echo(peer, random.sample(batch, len(batch)))


def be_silent(peer: Peer, batch: list[Asked]) -> None:
    pass


def refuse(code: int, message: str) -> Behaviour:
    def behave(peer: Peer, batch: list[Asked]) -> None:
        for asked in batch:
            peer.refuse(asked.stream, code, message)

    return behave


def say(data: bytes) -> Behaviour:
    """The same bytes whatever is asked."""

    def behave(peer: Peer, batch: list[Asked]) -> None:
        peer.send(data)

    return behave


def say_and_hang_up(data: bytes) -> Behaviour:
    def behave(peer: Peer, batch: list[Asked]) -> None:
        peer.send(data)
        peer.hang_up()

    return behave


class Refuse(Exception):  # noqa: N818 - what a handler says
    """A handler's no."""

    def __init__(self, code: int, message: str = "no") -> None:
        super().__init__(message)
        self.code = code


Handler = Callable[[Any], Mapping[str, Any]]  # the request's message in, the fields of the answer's out


def serve_with(handlers: Mapping[str, Handler]) -> Behaviour:
    """What `serve` knows, and these methods."""

    def behave(peer: Peer, batch: list[Asked]) -> None:
        for asked in batch:
            handler = handlers.get(asked.method.rpartition("/")[2])
            if handler is None:
                serve(peer, [asked])
                continue
            kinds = protos.method(asked.request.service, asked.request.method)
            try:
                fields = handler(kinds.request.FromString(asked.request.payload))
            except Refuse as no:
                peer.refuse(asked.stream, no.code, str(no))
            else:
                peer.answer(asked.stream, kinds.response(**fields).SerializeToString())

    return behave


def serve_probe(probe: FakeProbe | None = None) -> Behaviour:
    """What `serve` knows, and a container in which the probe runs."""
    return serve_with((probe or FakeProbe()).calls)


def answer_late(seconds: float, then: Behaviour = echo) -> Behaviour:
    def behave(peer: Peer, batch: list[Asked]) -> None:
        peer.pause(seconds)
        then(peer, batch)

    return behave


# The server


@contextlib.contextmanager
def fake_agent(
    path: Path, behaviour: Behaviour = serve, *, greeting: bytes = b"", refuse_first: int = 0
) -> Iterator[FakeAgent]:
    """Serve until the block ends. With `greeting`, a line is read first and that is the reply: hybrid vsock."""
    agent = FakeAgent(path)
    stopping = os.eventfd(0)
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(os.fspath(path))
        listening.listen()
        thread = threading.Thread(target=_serve, args=(agent, listening, stopping, behaviour, greeting, refuse_first))
        thread.start()
        try:
            yield agent
        finally:
            os.eventfd_write(stopping, 1)
            thread.join()
    finally:
        listening.close()
        os.close(stopping)


def _serve(
    agent: FakeAgent, listening: socket.socket, stopping: int, behaviour: Behaviour, greeting: bytes, refuse_first: int
) -> None:
    while stopping not in _wait([listening.fileno(), stopping]):
        connected, _ = listening.accept()
        agent.connections += 1
        with connected:
            if greeting:
                agent.greetings.append(_line(connected, stopping))
            if agent.connections <= refuse_first:
                continue
            # A VMM's reply and the guest's first bytes may well come in one piece.
            with contextlib.suppress(OSError):
                connected.sendall(greeting)
            _serve_one(agent, connected, stopping, behaviour)


def _serve_one(agent: FakeAgent, connected: socket.socket, stopping: int, behaviour: Behaviour) -> None:
    peer = Peer(connected, stopping)
    buffer = b""
    while peer.open and stopping not in _wait([connected.fileno(), stopping]):
        try:
            data = connected.recv(1 << 20)
        except OSError:
            return
        if not data:
            return
        buffer += data
        batch: list[Asked] = []
        while len(buffer) >= HEADER.size:
            length, stream, kind, flags = HEADER.unpack_from(buffer)
            if len(buffer) < HEADER.size + length:
                break
            assert kind == 1, "a client sends requests only"
            body = buffer[HEADER.size : HEADER.size + length]
            buffer = buffer[HEADER.size + length :]
            batch.append(Asked(stream, flags, protos.message("ttrpc.Request").FromString(body)))
        agent.asked += batch
        if batch:
            behaviour(peer, batch)


def _line(connected: socket.socket, stopping: int) -> bytes:
    line = b""
    while not line.endswith(b"\n") and stopping not in _wait([connected.fileno(), stopping]):
        byte = connected.recv(1)
        if not byte:
            break
        line += byte
    return line


def _wait(files: list[int], seconds: float | None = None) -> set[int]:
    """Which of the files can be read."""
    poll = select.poll()
    for file in files:
        poll.register(file, select.POLLIN)
    return {file for file, _ in poll.poll(None if seconds is None else seconds * 1000)}
