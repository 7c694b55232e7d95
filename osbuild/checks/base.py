"""What the checks share: one guest, being asked."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Final, Protocol

from osbuild import agent_process, ttrpc
from osbuild.agent import NAME
from osbuild.agent_client import AgentClient
from osbuild.agent_compiler import NoCompilerError
from osbuild.agent_values import Storage
from osbuild.arch import find_arch
from osbuild.artifacts import DiskImage, Initrd
from osbuild.cache import default_cache
from osbuild.container import Mount, ProcessSpec, Resources
from osbuild.content import stored
from osbuild.findings import NotHere
from osbuild.probe import Probe, build_probe, start_probe
from osbuild.report import Call
from osbuild.runtime.base import Guest, Machine
from osbuild.tree import Tree
from osbuild.walk_check import tree_of
from osbuild.watcher import Watcher

CALL_SECONDS: Final = 10.0  # for an agent that answered before
LINE_SECONDS: Final = 2.0  # a line written before the agent answered is on the console soon after

_NO_LIMIT: Final = (1 << 63) - 1
_SHORT: Final = 64 << 20  # bytes of holes that are read as fast as anything
_POLL_SECONDS: Final = 0.005
_CONNECT_SECONDS: Final = 0.2


class Session:
    """One guest, being asked."""

    def __init__(
        self,
        *,
        machine: Machine,
        guest: Guest,
        watcher: Watcher,
        deadline: float,
        work: Path,
        vmm: str,
        asked: Collection[str] = (),
        reads_tree: bool = False,
        guests: int = 1,
    ) -> None:
        self.machine = machine
        self.guest = guest
        self.watcher = watcher
        self.deadline = deadline
        self.seconds = deadline - guest.started  # that a guest has to answer
        self.work = work  # this boot's own directory: what a check leaves as evidence lies there
        self.vmm = vmm  # of RUNTIMES, for a check that starts another guest
        self.asked = asked  # the checks that were named, rather than all the usual ones
        self.guests = guests  # how many of the same there are to be, this one included
        self.facts: dict[str, Any] = {}  # what the check that is looking has measured; JSON
        self.lost = False  # the guest fell silent or went away: the console knows more than the check does
        self.gone = False  # it went away
        self.seen_wrong: set[str] = set()  # checks that failed by what the guest showed: no silence explains them
        self.calls: list[Call] = []  # of the walk
        self._connection: ttrpc.Connection | None = None
        self._client: AgentClient | None = None
        self._probe: Probe | None = None
        self._sandbox = False
        self._tree = agent_process.in_background(lambda: tree_of(machine) if reads_tree else None)
        self.connections = contextlib.ExitStack()  # closed by who made the session

    @property
    def left(self) -> float:
        """Seconds until the deadline, and a little more than none after it."""
        return max(self.deadline - time.monotonic(), 0.01)

    @property
    def client(self) -> AgentClient:
        """The agent, connected to when first asked for."""
        if self._client is None:
            self._client = AgentClient(self.connection)
        return self._client

    @property
    def connection(self) -> ttrpc.Connection:
        """The connection under it."""
        if self._connection is None:
            self._connection = self.connections.enter_context(self._connect())
        return self._connection

    @property
    def probe(self) -> Probe:
        """A program of ours in a container of the guest, started when first asked for."""
        if self._probe is None:
            self._probe = self.start_probe()
        return self._probe

    def start_probe(
        self,
        resources: Resources | None = None,
        process: ProcessSpec | None = None,
        storages: Iterable[Storage] = (),
        mounts: Iterable[Mount] = (),
    ) -> Probe:
        """Another one: in a container that may use so much, or has these mounts, or in the place of that process."""
        try:
            program = build_probe(find_arch(self.machine.arch), default_cache()).read_bytes()
        except NoCompilerError as problem:
            raise NotHere(f"no program can be put into the guest: {problem}: {problem.hint}") from problem
        self.begin_sandbox()
        return start_probe(self.client, program, resources=resources, process=process, storages=storages, mounts=mounts)

    def begin_sandbox(self) -> None:
        """What an agent wants before the first container; once."""
        if not self._sandbox:
            self.client.create_sandbox(f"smoke-{self.machine.nonce}", seconds=CALL_SECONDS)
            self._sandbox = True

    def tree(self) -> Tree | None:
        """The guest's root as it is read here, begun when the guest was started; None when it cannot be read."""
        return self._tree.result()

    def without_holes(self, read: int) -> int:
        """Of so many bytes that a guest has read of its root; erofs does not tell it which of them are stored."""
        tree = self.tree()
        return read if tree is None else min(read, tree.stored_size())

    def longest(self) -> int:
        """Bytes of the longest file that it is worth reading in the guest."""
        return longest(self.machine.root, self.tree())

    def by_name(self, check: str) -> bool:
        """Whether it was asked for: then it may take its time."""
        return check in self.asked

    @property
    def logs_as_ours(self) -> bool:
        """Whether the agent that was put in says on the console what its root is, and which run it belongs to."""
        return self.machine.agent.partition(" ")[0] in ("", NAME)

    @property
    def service(self) -> bool:
        """The agent is one of systemd's services: who names a unit to systemd boots such a guest."""
        return any(word.startswith("systemd.unit=") for word in self.machine.root.words)

    def _connect(self) -> ttrpc.Connection:
        while self.guest.process.poll() is None:
            if not self.guest.channel.ready:
                time.sleep(_POLL_SECONDS)
            else:
                # A VMM that made its channel may die the next moment: look at it from time to time.
                with contextlib.suppress(ttrpc.CallTimeout):
                    return self.guest.channel.connect(min(_CONNECT_SECONDS, self.left))
            if time.monotonic() > self.deadline:
                raise ttrpc.CallTimeout("the VMM has no channel to the agent")
        raise ttrpc.PeerClosed("the VMM ended before there was a channel to the agent")


def longest(root: DiskImage | Initrd, tree: Tree | None) -> int:
    """Bytes of the longest file without holes, where the filesystem tells of none.

    That is erofs: who reads a lastlog of 290 GiB there, in a guest, reads zeros for an hour.
    """
    if tree is None or not isinstance(root, DiskImage) or root.filesystem != "erofs":
        return _NO_LIMIT
    contents = (one.content for one in tree.names() if one.is_file)
    return max(_SHORT, *(one.size for one in contents if stored(one) >= one.size), 0)


class CheckModule(Protocol):
    """What a module must have to be a row of CHECKS."""

    def look(self, session: Session) -> str:
        """What was seen; Wrong or Unclear otherwise, NotHere when what it takes is not there."""


class Preparing(Protocol):
    """What a check's module has besides when the guest must be made for it."""

    def prepare(self, machine: Machine) -> Machine:
        """The machine with what the check needs."""
