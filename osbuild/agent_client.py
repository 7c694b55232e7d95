"""The Kata agent's services, typed where we use them and open where we may: the protocol of 2.x and later.

What takes more than one call (a container run to its end, a file of several pieces) is in agent_process.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final, Protocol

from osbuild import protos
from osbuild.agent_values import (
    AgentDetails,
    AgentVersion,
    Fields,
    GuestDetails,
    Interface,
    KernelModule,
    Neighbor,
    Route,
    Stats,
    Storage,
)
from osbuild.container import ContainerSpec, ProcessSpec, Resources
from osbuild.ttrpc import Code, ProtocolError, StatusError, decode

__all__ = ["AGENT", "HEALTH", "AgentClient", "AgentDetails", "AgentVersion", "Caller", "GuestDetails"]

HEALTH: Final = "grpc.Health"
AGENT: Final = "grpc.AgentService"
SECONDS: Final = 60.0  # what Kata's runtime gives a call it has no other opinion on
HEALTH_SECONDS: Final = 30.0  # and a health check
READ_BYTES: Final = 64 << 10  # what a pipe holds
_AGAIN_SECONDS: Final = 0.25  # a question put before the guest's driver was there may be lost
_ENDS: Final = ("eof", "os error 5")  # EIO: nobody has the other end of the terminal open any more
_NONE: Final[Mapping[str, Any]] = MappingProxyType({})


class Caller(Protocol):
    """What carries a call there and its answer back: ttrpc.Connection, or what counts for it."""

    def call(self, service: str, method: str, payload: bytes, seconds: float, *, every: float = math.inf) -> bytes: ...


class AgentClient:
    """Calls to one agent. Everything raised is an RpcError, which is a fact about the guest.

    A process is named by its container and `exec_id`; without one the container's first process is meant.
    """

    def __init__(self, connection: Caller) -> None:
        self.connection = connection

    # Health

    def wait(self, seconds: float) -> None:
        """Return as soon as the agent says that it serves; ask again as long as it is silent, or says not yet."""
        deadline = time.monotonic() + seconds
        while not self._serves(deadline - time.monotonic(), every=_AGAIN_SECONDS):
            if time.monotonic() + _AGAIN_SECONDS > deadline:
                raise ProtocolError(f"{HEALTH}/Check: the agent answers, but for {seconds:g} s never that it serves")
            time.sleep(_AGAIN_SECONDS)

    def check(self, *, seconds: float = HEALTH_SECONDS) -> bool:
        """Does it serve."""
        return self._serves(seconds)

    def version(self, *, seconds: float = HEALTH_SECONDS) -> AgentVersion:
        answer = self.call(HEALTH, "Version", seconds=seconds)
        return AgentVersion(grpc=answer.grpc_version, agent=answer.agent_version)

    # The sandbox and the guest

    def create_sandbox(
        self,
        sandbox_id: str,
        *,
        hostname: str = "",
        dns: Iterable[str] = (),
        storages: Iterable[Storage] = (),
        pid_namespace: bool = False,  # one for all of its containers
        hooks: str = "",  # a directory of the guest
        modules: Iterable[KernelModule] = (),
        seconds: float = SECONDS,
    ) -> None:
        self._ask(
            "CreateSandbox", seconds, sandbox_id=sandbox_id, hostname=hostname, dns=list(dns),
            storages=_all(storages), sandbox_pidns=pid_namespace, guest_hook_path=hooks, kernel_modules=_all(modules),
        )  # fmt: skip

    def destroy_sandbox(self, *, seconds: float = SECONDS) -> None:
        """End the sandbox. An agent that is PID 1 then powers off, so PeerClosed may come in place of the answer."""
        self._ask("DestroySandbox", seconds)

    def guest_details(self, *, seconds: float = SECONDS) -> GuestDetails:
        return GuestDetails.of(self._ask("GetGuestDetails", seconds, mem_block_size=True, mem_hotplug_probe=True))

    def set_guest_date_time(self, moment_ns: int, *, seconds: float = SECONDS) -> None:
        """Set the guest's clock to nanoseconds since 1970."""
        whole, rest = divmod(moment_ns, 10**9)
        self._ask("SetGuestDateTime", seconds, Sec=whole, Usec=rest // 1000)

    def reseed_random(self, data: bytes, *, seconds: float = SECONDS) -> None:
        self._ask("ReseedRandomDev", seconds, data=data)

    def online_cpu_mem(
        self, cpus: int, *, wait: bool = False, cpu_only: bool = False, seconds: float = SECONDS
    ) -> None:
        """Put plugged processors to use until there are so many, and, unless `cpu_only`, plugged memory."""
        self._ask("OnlineCPUMem", seconds, nb_cpus=cpus, wait=wait, cpu_only=cpu_only)

    def mem_hotplug_by_probe(self, addresses: Iterable[int], *, seconds: float = SECONDS) -> None:
        self._ask("MemHotplugByProbe", seconds, memHotplugProbeAddr=list(addresses))

    def update_ephemeral_mounts(self, storages: Iterable[Storage], *, seconds: float = SECONDS) -> None:
        self._ask("UpdateEphemeralMounts", seconds, storages=_all(storages))

    def add_swap_path(self, path: str, *, seconds: float = SECONDS) -> None:
        self._ask("AddSwapPath", seconds, path=path)

    def metrics(self, *, seconds: float = SECONDS) -> str:
        """Prometheus text."""
        return str(self._ask("GetMetrics", seconds).metrics)

    # The network

    def update_interface(self, interface: Interface, *, seconds: float = SECONDS) -> Interface:
        return Interface.of(self._ask("UpdateInterface", seconds, interface=interface.fields()))

    def update_routes(self, routes: Iterable[Route], *, seconds: float = SECONDS) -> tuple[Route, ...]:
        """Add or replace routes; all there are then. Nothing is taken away."""
        answer = self._ask("UpdateRoutes", seconds, routes={"Routes": _all(routes)})
        return tuple(map(Route.of, answer.Routes))

    def interfaces(self, *, seconds: float = SECONDS) -> tuple[Interface, ...]:
        return tuple(map(Interface.of, self._ask("ListInterfaces", seconds).Interfaces))

    def routes(self, *, seconds: float = SECONDS) -> tuple[Route, ...]:
        return tuple(map(Route.of, self._ask("ListRoutes", seconds).Routes))

    def add_arp_neighbors(self, neighbors: Iterable[Neighbor], *, seconds: float = SECONDS) -> None:
        self._ask("AddARPNeighbors", seconds, neighbors={"ARPNeighbors": _all(neighbors)})

    # Containers and processes

    def create_container(self, spec: ContainerSpec, *, seconds: float = SECONDS) -> None:
        self._ask("CreateContainer", seconds, **spec.fields())

    def start_container(self, container: str, *, seconds: float = SECONDS) -> None:
        self._ask("StartContainer", seconds, container_id=container)

    def remove_container(self, container: str, *, timeout: int = 0, seconds: float = SECONDS) -> None:
        """Remove it; the agent itself gives up after `timeout` whole seconds, unless that is 0."""
        self._ask("RemoveContainer", seconds, container_id=container, timeout=timeout)

    def pause_container(self, container: str, *, seconds: float = SECONDS) -> None:
        self._ask("PauseContainer", seconds, container_id=container)

    def resume_container(self, container: str, *, seconds: float = SECONDS) -> None:
        self._ask("ResumeContainer", seconds, container_id=container)

    def update_container(self, container: str, resources: Resources, *, seconds: float = SECONDS) -> None:
        self._ask("UpdateContainer", seconds, container_id=container, resources=resources.fields())

    def stats_container(self, container: str, *, seconds: float = SECONDS) -> Stats:
        return Stats.of(self._ask("StatsContainer", seconds, container_id=container))

    def exec_process(self, container: str, exec_id: str, process: ProcessSpec, *, seconds: float = SECONDS) -> None:
        """Start another process in a container."""
        self._ask("ExecProcess", seconds, container_id=container, exec_id=exec_id, process=process.fields())

    def signal_process(self, container: str, number: int, exec_id: str = "", *, seconds: float = SECONDS) -> None:
        """Without `exec_id`, SIGKILL reaches every process of the container."""
        self._ask("SignalProcess", seconds, container_id=container, exec_id=exec_id, signal=number)

    def wait_process(self, container: str, exec_id: str = "", *, seconds: float = math.inf) -> int:
        """Its exit code, or 128 + signal, once it has ended; the agent then forgets it and its unread output."""
        return int(self._ask("WaitProcess", seconds, container_id=container, exec_id=exec_id).status)

    def oom_event(self, *, seconds: float = math.inf) -> str:
        """The next container of which something was killed for want of memory."""
        return str(self._ask("GetOOMEvent", seconds).container_id)

    # Their input and output

    def read_stdout(
        self, container: str, exec_id: str = "", *, size: int = READ_BYTES, seconds: float = SECONDS
    ) -> bytes:
        """At most `size` bytes, at least one; none at the end."""
        return self._read("ReadStdout", seconds, container_id=container, exec_id=exec_id, len=size)

    def read_stderr(
        self, container: str, exec_id: str = "", *, size: int = READ_BYTES, seconds: float = SECONDS
    ) -> bytes:
        return self._read("ReadStderr", seconds, container_id=container, exec_id=exec_id, len=size)

    def write_stdin(self, container: str, data: bytes, exec_id: str = "", *, seconds: float = SECONDS) -> int:
        """How many of the bytes were taken. No bytes at all close it, so `data` must not be empty."""
        if not data:
            raise ValueError("no bytes would close standard input; close_stdin does that by its name")
        return int(self._ask("WriteStdin", seconds, container_id=container, exec_id=exec_id, data=data).len)

    def close_stdin(self, container: str, exec_id: str = "", *, seconds: float = SECONDS) -> None:
        self._ask("CloseStdin", seconds, container_id=container, exec_id=exec_id)

    def resize_terminal(
        self, container: str, rows: int, columns: int, exec_id: str = "", *, seconds: float = SECONDS
    ) -> None:
        self._ask("TtyWinResize", seconds, container_id=container, exec_id=exec_id, row=rows, column=columns)

    # Any: a field takes what protobuf takes (messages may be dicts), and what comes back is a message.
    def call(self, service: str, method: str, /, *, seconds: float = SECONDS, **fields: Any) -> Any:
        """Any method of any service in agent/proto: fields by name in, the answer's message out."""
        return self._call(service, method, seconds=seconds, fields=fields)

    def _ask(self, method: str, seconds: float, **fields: Any) -> Any:
        return self._call(AGENT, method, seconds=seconds, fields=fields)

    def _read(self, method: str, seconds: float, **fields: Any) -> bytes:
        """To Kata's agent the end of a stream is a failure, and that of a terminal the one its read ended with."""
        try:
            return bytes(self._ask(method, seconds, **fields).data)
        except StatusError as problem:
            if problem.code == Code.INTERNAL and any(word in problem.message.lower() for word in _ENDS):
                return b""
            raise

    def _serves(self, seconds: float, *, every: float = math.inf) -> bool:
        answer = self._call(HEALTH, "Check", seconds=seconds, every=every)
        return bool(answer.status == answer.SERVING)

    def _call(
        self, service: str, method: str, *, seconds: float, every: float = math.inf, fields: Mapping[str, Any] = _NONE
    ) -> Any:
        kinds = protos.method(service, method)
        payload = kinds.request(**fields).SerializeToString()
        answer = self.connection.call(service, method, payload, seconds, every=every)
        try:
            return decode(kinds.response.DESCRIPTOR.full_name, answer)
        except ProtocolError as problem:
            raise ProtocolError(f"{service}/{method}: {problem}") from problem


def _all(values: Iterable[Any]) -> list[Fields]:  # Any: whatever has `fields`
    return [value.fields() for value in values]
