"""What takes several calls: a process run to its end with all it wrote, a file in pieces, events as they come."""

from __future__ import annotations

import contextlib
import math
import signal
import stat
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final, TypeVar

from osbuild.agent_client import AGENT, SECONDS, AgentClient
from osbuild.container import ContainerSpec, ProcessSpec
from osbuild.ttrpc import CallTimeout, PeerClosed, ProtocolError, RpcError, StatusError

CHUNK: Final = 1 << 20  # bytes of a file in one CopyFile, as Kata's runtime sends them
SHARED: Final = "/run/kata-containers/shared/containers"  # below which files may be copied
_STDIN_BYTES: Final = 64 << 10
T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How a process ended, and all that it wrote."""

    status: int  # its exit code, or 128 + signal
    stdout: bytes
    stderr: bytes


class Process:
    """A process in a container that runs; what it writes is read from the first moment on.

    WaitProcess makes the agent forget a process and what it still had to say, so waiting comes after both streams have
    ended. A process that leaves a child behind, its output open, is therefore waited for as long as that child.
    """

    def __init__(self, client: AgentClient, container: str, exec_id: str = "", *, terminal: bool = False) -> None:
        self.container = container
        self.exec_id = exec_id
        self._client = client
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="stream")
        readers = {"stdout": client.read_stdout} | ({} if terminal else {"stderr": client.read_stderr})
        self._drains = [self._pool.submit(self._drain, name, read) for name, read in readers.items()]

    @property
    def stdout(self) -> bytes:
        """What it has written so far."""
        return bytes(self._output["stdout"])

    def wait_for_output(self, wanted: bytes, seconds: float) -> bool:
        """Whether it writes that to its standard output in time."""
        deadline = time.monotonic() + seconds
        while wanted not in self._output["stdout"]:
            if time.monotonic() > deadline or self._drains[0].done():
                return wanted in self._output["stdout"]
            time.sleep(0.005)
        return True

    def write(self, data: bytes, *, seconds: float = SECONDS) -> None:
        """All of it, in pieces that a pipe takes."""
        at = 0
        while at < len(data):
            piece = data[at : at + _STDIN_BYTES]
            taken = self._client.write_stdin(self.container, piece, self.exec_id, seconds=seconds)
            if not 0 < taken <= len(piece):
                raise ProtocolError(f"{AGENT}/WriteStdin: {taken} bytes of {len(piece)} were taken")
            at += taken

    def close_stdin(self) -> None:
        self._client.close_stdin(self.container, self.exec_id)

    def signal(self, number: int) -> None:
        self._client.signal_process(self.container, number, self.exec_id)

    def wait(self, seconds: float = SECONDS) -> Finished:
        """How it ends. CallTimeout when it does not in time."""
        deadline = time.monotonic() + seconds
        for drain in self._drains:
            try:
                drain.result(None if seconds == math.inf else max(deadline - time.monotonic(), 0))
            except TimeoutError:
                name = f"{self.container}{'/' * bool(self.exec_id)}{self.exec_id}"
                raise CallTimeout(f"{name}: it has not ended its output within {seconds:g} s") from None
        left = max(deadline - time.monotonic(), 0.1)
        status = self._client.wait_process(self.container, self.exec_id, seconds=left)
        return Finished(status=status, stdout=self.stdout, stderr=bytes(self._output["stderr"]))

    def give_up(self) -> None:
        """Stop caring: the threads end when the agent next answers, or the connection ends."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _drain(self, name: str, read: Callable[..., bytes]) -> None:
        while data := read(self.container, self.exec_id, seconds=math.inf):
            self._output[name] += data


def run(client: AgentClient, spec: ContainerSpec, *, stdin: bytes = b"", seconds: float = SECONDS) -> Finished:
    """A container from its creation to its removal."""
    with running(client, spec) as process:
        return _feed_and_wait(process, stdin, seconds)


def execute(
    client: AgentClient,
    container: str,
    exec_id: str,
    process: ProcessSpec,
    *,
    stdin: bytes = b"",
    seconds: float = SECONDS,
) -> Finished:
    """Another process in a container that runs, to its end."""
    with executing(client, container, exec_id, process) as started:
        return _feed_and_wait(started, stdin, seconds)


@contextlib.contextmanager
def running(client: AgentClient, spec: ContainerSpec) -> Iterator[Process]:
    """A container for the length of the block; afterwards it is killed if need be, and removed."""
    client.create_container(spec)
    try:
        client.start_container(spec.id)
        process = Process(client, spec.id, terminal=spec.process.terminal)
        try:
            yield process
        finally:
            process.give_up()
    finally:
        remove(client, spec.id)


@contextlib.contextmanager
def executing(client: AgentClient, container: str, exec_id: str, spec: ProcessSpec) -> Iterator[Process]:
    """Another process for the length of the block; afterwards it is killed if need be."""
    client.exec_process(container, exec_id, spec)
    process = Process(client, container, exec_id, terminal=spec.terminal)
    try:
        yield process
    finally:
        with contextlib.suppress(RpcError):  # it has mostly ended by itself
            client.signal_process(container, signal.SIGKILL, exec_id)
        process.give_up()


def copy_file(
    client: AgentClient,
    path: str,
    data: bytes,
    *,
    mode: int = 0o644,
    directories: int = 0o755,
    uid: int = 0,
    gid: int = 0,
    kind: int = stat.S_IFREG,
    chunk: int = CHUNK,
    seconds: float = SECONDS,
) -> None:
    """A file, whole in the guest when the last piece is there; with S_IFLNK, `data` is where the link points.

    `path` lies below SHARED; parents that are missing are made with the mode `directories`.
    """
    pieces = range(0, len(data), chunk) or (0,)
    for offset in pieces:
        client.call(
            AGENT, "CopyFile", seconds=seconds, path=path, file_size=len(data), file_mode=kind | mode,
            dir_mode=directories, uid=uid, gid=gid, offset=offset, data=data[offset : offset + chunk],
        )  # fmt: skip


def oom_events(client: AgentClient) -> Iterator[str]:
    """The containers of which something is killed for want of memory, as it happens, until the connection ends."""
    with contextlib.suppress(PeerClosed):
        while True:
            yield client.oom_event()


def in_background(call: Callable[[], T]) -> Future[T]:
    """A call that blocks, beside others; its thread ends when the answer comes or the connection ends."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="call")
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def _feed_and_wait(process: Process, stdin: bytes, seconds: float) -> Finished:
    if stdin:
        process.write(stdin, seconds=seconds)
    process.close_stdin()
    return process.wait(seconds)


def remove(client: AgentClient, container: str) -> None:
    """Whatever state it is in; the reason why the block ended must not be hidden by what goes wrong here."""
    with contextlib.suppress(StatusError, CallTimeout):
        client.signal_process(container, signal.SIGKILL, seconds=10)
    with contextlib.suppress(StatusError, CallTimeout):
        client.remove_container(container, timeout=10, seconds=20)
