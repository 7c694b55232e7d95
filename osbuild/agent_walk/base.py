"""What a walk over the agent's calls is made of: steps, the place where they are taken, and what came of each."""

from __future__ import annotations

import math
import secrets
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from osbuild import agent_process
from osbuild.agent_client import AGENT, AgentClient, Caller
from osbuild.agent_process import Finished
from osbuild.container import ContainerSpec, Mount, ProcessSpec
from osbuild.findings import NotHere, Wrong
from osbuild.ttrpc import Code, StatusError

CALL_SECONDS: Final = 20.0  # for a single call
RUN_SECONDS: Final = 40.0  # for a container from its creation to its removal: guests may be emulated
SHELL: Final = "/bin/sh"
GUEST_FILES: Final = "/dev/guest"  # where a container of ours sees the guest's /run/kata-containers
_NOT_FOUND: Final = 127  # a shell's status for a program that is not there


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where the agent runs, as far as that decides what can be expected of it."""

    version: str = ""  # of the agent that should be there; empty: any
    init: bool | None = None  # it is PID 1; None: nobody knows
    cpus: int = 1
    mac: str = ""  # of a link that may be changed
    shell: bool = True  # /bin/sh is there, and the usual programs
    program: str = ""  # the path of the agent itself, for places without a shell
    lacks: Mapping[str, str] = field(default_factory=dict)  # what steps need and is not there -> why


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to do with one call, and what must come of it."""

    call: str
    about: str  # what it finds out, in a few words
    take: Callable[[Walk], str]  # what was seen; Wrong or NotHere otherwise
    needs: tuple[str, ...] = ()
    optional: bool = False  # an agent may answer that it does not have it

    @property
    def full_name(self) -> str:
        """The call with its service."""
        return self.call if "/" in self.call else f"{AGENT}/{self.call}"


class Timed:
    """A connection that remembers how long each call took."""

    def __init__(self, connection: Caller) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def call(self, service: str, method: str, payload: bytes, seconds: float, *, every: float = math.inf) -> bytes:
        began = time.monotonic()
        try:
            return self._connection.call(service, method, payload, seconds, every=every)
        finally:
            with self._lock:
                self._seconds[f"{service}/{method}"].append(time.monotonic() - began)

    def take(self, name: str) -> tuple[int, float]:
        """How many of these calls there were since this was last asked, and the median of their seconds."""
        with self._lock:
            found = self._seconds.pop(name, [])
        return len(found), statistics.median(found) if found else 0.0


class Walk:
    """What the steps share: the client, the place, and names that nobody else has."""

    def __init__(self, connection: Caller, place: Place) -> None:
        self.caller = Timed(connection)
        self.client = AgentClient(self.caller)
        self.place = place
        self.sandbox = f"walk-{secrets.token_hex(3)}"
        self._count = 0

    def name(self, about: str) -> str:
        """A container's, or a process's."""
        self._count += 1
        return f"{about}-{self._count}"

    def spec(self, *args: str, about: str = "walk", **process: Any) -> ContainerSpec:
        """A container of the guest's own root that runs this program."""
        return ContainerSpec(id=self.name(about), process=ProcessSpec(args=args, **process))

    def script(self, text: str, about: str = "walk", **process: Any) -> ContainerSpec:
        """A container that runs a shell script."""
        return self.spec(SHELL, "-c", text, about=about, **process)

    def seeing_guest(self, spec: ContainerSpec) -> ContainerSpec:
        """The same container with the guest's /run/kata-containers at GUEST_FILES, read-only."""
        view = Mount(
            destination=GUEST_FILES, source="/run/kata-containers", kind="bind", options=("rbind", "ro", "rprivate")
        )
        return replace(spec, mounts=(*spec.mounts, view))

    def run(self, spec: ContainerSpec, *, stdin: bytes = b"") -> Finished:
        """A container from its creation to its removal."""
        return agent_process.run(self.client, spec, stdin=stdin, seconds=RUN_SECONDS)

    def output(self, spec: ContainerSpec) -> str:
        """What a container wrote; it must end with 0."""
        finished = self.run(spec)
        if finished.status == _NOT_FOUND:
            raise NotHere(f"this image lacks a program: {said(finished.stderr)}")
        if finished.status != 0:
            raise Wrong(f"the container ended with {finished.status}: {said(finished.stderr or finished.stdout)}")
        return finished.stdout.decode(errors="replace")

    def lines(self, spec: ContainerSpec) -> dict[str, str]:
        """Lines `NAME: VALUE` that a container wrote."""
        pairs = [line.partition(":") for line in self.output(spec).splitlines() if ":" in line]
        return {name.strip(): value.strip() for name, _, value in pairs}


def said(data: bytes) -> str:
    """The end of what a program wrote, in a line."""
    return " ".join(data[-200:].decode(errors="replace").split()) or "no word"


def expect(what: str, found: object, wanted: object) -> None:
    """Wrong, in words, when they differ."""
    if found != wanted:
        raise Wrong(f"{what} is {found!r}, not {wanted!r}")


def refused(call: Callable[[], object], *codes: int) -> StatusError:
    """The error that a call must give, with one of these codes if any are named; what is not there refuses nothing."""
    try:
        call()
    except StatusError as problem:
        if problem.code == Code.UNIMPLEMENTED and problem.code not in codes:
            raise
        if codes and problem.code not in codes:
            raise Wrong(f"refused, but for another reason: {problem}") from problem
        return problem
    raise Wrong("it was accepted, and should have been refused")
