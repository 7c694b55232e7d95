"""The Kata agent's services, typed where we use them and open where we may: the protocol of 2.x and later."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from osbuild import protos
from osbuild.ttrpc import Connection, ProtocolError, decode

HEALTH: Final = "grpc.Health"
AGENT: Final = "grpc.AgentService"
SECONDS: Final = 60.0  # what Kata's runtime gives a call it has no other opinion on
HEALTH_SECONDS: Final = 30.0  # and a health check
_AGAIN_SECONDS: Final = 0.25  # a question put before the guest's driver was there may be lost
_NONE: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentVersion:
    """Which interface it speaks, and which program it is."""

    grpc: str
    agent: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentDetails:
    """What the agent says about itself."""

    version: str
    init_daemon: bool  # it is PID 1
    device_handlers: tuple[str, ...]
    storage_handlers: tuple[str, ...]
    supports_seccomp: bool
    extra_features: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDetails:
    """What the agent says about its guest."""

    memory_block_bytes: int  # 0 where the kernel cannot plug memory
    memory_probe: bool  # plugged memory has to be announced
    agent: AgentDetails


class AgentClient:
    """Calls to one agent. Everything raised is an RpcError, which is a fact about the guest."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

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

    def guest_details(self, *, seconds: float = SECONDS) -> GuestDetails:
        answer = self.call(AGENT, "GetGuestDetails", seconds=seconds, mem_block_size=True, mem_hotplug_probe=True)
        agent = answer.agent_details
        return GuestDetails(
            memory_block_bytes=answer.mem_block_size_bytes,
            memory_probe=answer.support_mem_hotplug_probe,
            agent=AgentDetails(
                version=agent.version,
                init_daemon=agent.init_daemon,
                device_handlers=tuple(agent.device_handlers),
                storage_handlers=tuple(agent.storage_handlers),
                supports_seccomp=agent.supports_seccomp,
                extra_features=tuple(agent.extra_features),
            ),
        )

    def destroy_sandbox(self, *, seconds: float = SECONDS) -> None:
        """End the sandbox. An agent that is PID 1 then powers off, so PeerClosed may come in place of the answer."""
        self.call(AGENT, "DestroySandbox", seconds=seconds)

    # Any: a field takes what protobuf takes (messages may be dicts), and what comes back is a message.
    def call(self, service: str, method: str, /, *, seconds: float = SECONDS, **fields: Any) -> Any:
        """Any method of any service in agent/proto: fields by name in, the answer's message out."""
        return self._call(service, method, seconds=seconds, fields=fields)

    def _serves(self, seconds: float, *, every: float = math.inf) -> bool:
        answer = self._call(HEALTH, "Check", seconds=seconds, every=every)
        return bool(answer.status == answer.SERVING)

    def _call(
        self, service: str, method: str, *, seconds: float, every: float = math.inf, fields: Mapping[str, Any] = _NONE
    ) -> Any:
        kinds = protos.method(service, method)
        payload = kinds.request(**fields).SerializeToString()
        answer = self._connection.call(service, method, payload, seconds, every=every)
        try:
            return decode(kinds.response.DESCRIPTOR.full_name, answer)
        except ProtocolError as problem:
            raise ProtocolError(f"{service}/{method}: {problem}") from problem
