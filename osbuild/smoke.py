"""Boot it, ask its agent, and say what came of it. Only an answer of the agent's counts as success.

main thread   starts the VMM, asks the agent, one check after the other, until the deadline
watcher       another thread: reads the console as it grows, and ends what is beyond hope
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import autopsy, ttrpc, walk_check
from osbuild.agent import NAME
from osbuild.agent_binary import UNKNOWN
from osbuild.agent_client import AgentClient
from osbuild.artifacts import DiskImage, Initrd
from osbuild.errors import SpecError
from osbuild.findings import Unclear as Unclear
from osbuild.findings import Wrong as Wrong
from osbuild.report import Call, Cause, Check, SmokeReport, Verdict, printable, tail
from osbuild.runtime import RUNTIMES
from osbuild.runtime.base import Guest, Machine
from osbuild.tree import quote
from osbuild.watcher import OnEvent, Watcher

SECONDS: Final = 60.0

_POLL_SECONDS: Final = 0.005
_LINE_SECONDS: Final = 2.0  # a line written before the agent answered is on the console soon after
_POWEROFF_SECONDS: Final = 10.0
_CONNECT_SECONDS: Final = 0.2
_CALL_SECONDS: Final = 10.0  # for an agent that answered before
_CONSOLE_BYTES: Final = 1 << 20  # in which the kernel has said what its root is
_NOT_REACHED: Final = "not reached"
_LAST_CHARACTERS: Final = 60  # of a console's last line, in a reason


def run(
    machine: Machine,
    work: Path,
    *,
    name: str = "boot",
    vmm: str = "qemu",
    seconds: float = SECONDS,
    checks: Iterable[str] = (),
    on_event: OnEvent | None = None,
) -> SmokeReport:
    """Boot `machine` once and look at what `select` gives; its console and logs stay in `work`."""
    selected = select(checks)
    if WALK in selected and not machine.mac:
        machine = dataclasses.replace(machine, mac=walk_check.MAC)
    if vmm not in RUNTIMES:
        raise SpecError(f"no VMM {vmm!r}", hint=f"one of {', '.join(RUNTIMES)}")
    before = _stamps(machine)
    with RUNTIMES[vmm].start(machine, work) as guest, Watcher(guest, on_event) as watcher:
        session = Session(machine=machine, guest=guest, watcher=watcher, deadline=guest.started + seconds)
        seen = session.go_through(selected)
        evidence = watcher.finish(answered=seen[0].verdict is Verdict.passed, gone=session.gone)
    seen.append(_console_is_clean(evidence, lost=session.lost))
    seen.append(_unchanged(before, _stamps(machine)))
    took = time.monotonic() - guest.started
    cause = autopsy.explain(evidence) if session.lost else None
    if cause is not None:
        seen = [_blame(check, cause) for check in seen]
    verdict = Verdict.over(check.verdict for check in seen)
    return SmokeReport(
        name=name,
        machine=_facts(machine, vmm, guest),
        verdict=verdict,
        reason=_reason(verdict, seen, cause, evidence, seconds),
        cause=cause,
        checks=tuple(seen),
        calls=tuple(session.calls),
        timeline=watcher.timeline,
        seconds=took,
        accel=guest.accel,
        command=guest.command,
        console=guest.console,
        log=guest.log,
    )


# --- Checks ---------------------------------------------------------------------------------------------------------


class Session:
    """One guest, being asked."""

    def __init__(self, *, machine: Machine, guest: Guest, watcher: Watcher, deadline: float) -> None:
        self.machine = machine
        self.guest = guest
        self.watcher = watcher
        self.deadline = deadline
        self.lost = False  # the guest fell silent or went away: the console knows more than the check does
        self.gone = False  # it went away
        self.calls: list[Call] = []  # of the walk
        self._connection: ttrpc.Connection | None = None
        self._client: AgentClient | None = None
        self._connections = contextlib.ExitStack()

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
            self._connection = self._connections.enter_context(self._connect())
        return self._connection

    @property
    def service(self) -> bool:
        """The agent is one of systemd's services: who names a unit to systemd boots such a guest."""
        return any(word.startswith("systemd.unit=") for word in self.machine.root.words)

    def go_through(self, checks: Mapping[str, CheckFunction]) -> list[Check]:
        """Every check in order; once the guest is lost the rest is unknown."""
        with self._connections:
            return [self._look(name, function) for name, function in checks.items()]

    def _look(self, name: str, function: CheckFunction) -> Check:
        began = time.monotonic()
        if self.lost:
            return Check(name=name, verdict=Verdict.unknown, detail=_NOT_REACHED)
        try:
            verdict, detail = Verdict.passed, function(self)
        except Wrong as problem:
            verdict, detail = Verdict.failed, str(problem)
        except Unclear as problem:
            verdict, detail = Verdict.unknown, str(problem)
        except ttrpc.CallTimeout as problem:
            verdict, detail, self.lost = Verdict.unknown, str(problem), True
        except ttrpc.PeerClosed as problem:
            verdict, detail, self.lost, self.gone = Verdict.failed, str(problem), True, True
        except ttrpc.RpcError as problem:
            verdict, detail = Verdict.failed, str(problem)
        return Check(name=name, verdict=verdict, detail=printable(detail), seconds=time.monotonic() - began)

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


CheckFunction = Callable[[Session], str]  # what was seen; Wrong or Unclear otherwise


def agent_answers(session: Session) -> str:
    session.client.wait(session.left)
    session.watcher.record("agent answered")
    return "it serves"


def agent_version(session: Session) -> str:
    version = session.client.version(seconds=min(_CALL_SECONDS, session.left))
    wanted = session.machine.agent.rpartition(" ")[2]
    if wanted not in ("", UNKNOWN) and version.agent != wanted:
        raise Wrong(f"the agent that answers is {version.agent}, not the {wanted} that was put in")
    return f"{version.agent}, interface {version.grpc}"


def agent_details(session: Session) -> str:
    details = session.client.guest_details(seconds=min(_CALL_SECONDS, session.left))
    if details.agent.init_daemon is session.service:
        raise Wrong(f"the agent says that it is {'' if session.service else 'not '}PID 1")
    return f"{'a service' if session.service else 'PID 1'}, {details.agent.version}"


def _logs_as_ours(session: Session) -> bool:
    """Whether the agent that was put in says on the console what its root is, and which run it belongs to."""
    return session.machine.agent.partition(" ")[0] in ("", NAME)


def root_mounted(session: Session) -> str:
    if not _logs_as_ours(session):
        console = tail(session.guest.console, _CONSOLE_BYTES)
        return judge_kernel(session.machine.root, console.decode(errors="replace"))
    fields = session.watcher.message("root mounted", min(_LINE_SECONDS, session.left))
    if fields is None:
        raise Unclear("no log line of the agent's on the console says what its root is")
    return judge_root(session.machine.root, fields)


def judge_kernel(root: DiskImage | Initrd, console: str) -> str:
    """The same from what the kernel says: which filesystem, on a disk; of an initramfs, that it starts /init of one."""
    if isinstance(root, Initrd):
        if not re.search(r"\] Run /init as init process", console):
            raise Unclear("the kernel does not say that it starts /init of an initramfs")
        return "initramfs, by the kernel's word"
    found = re.search(r"\] VFS: Mounted root \((\w+) filesystem\)( readonly)? on device (\d+:\d+)", console)
    if found is None:
        raise Unclear("the kernel does not say what it mounted as root")
    said = f"{found[1]} on device {found[3]}, {'read-only' if found[2] else 'writable'}, by the kernel's word"
    if found[1] != root.filesystem:
        raise Wrong(f"the root is not {root.filesystem} but {said}")
    if bool(found[2]) is ("rw" in root.words):
        raise Wrong(f"the root is mounted in the wrong way: {said}")
    return said


def judge_root(root: DiskImage | Initrd, fields: Mapping[str, Any]) -> str:
    """What the guest's root is, when it is what was booted; Wrong otherwise."""
    kind, device = str(fields.get("fstype", "")), str(fields.get("device", ""))
    options = str(fields.get("options", "")).split(",")
    said = f"{kind} on {device} ({','.join(options)})"
    if isinstance(root, Initrd):
        if kind not in ("rootfs", "tmpfs", "ramfs"):
            raise Wrong(f"the root is not the initramfs but {said}")
        return said
    if kind != root.filesystem:
        raise Wrong(f"the root is not {root.filesystem} but {said}")
    wanted = next((word.partition("=")[2] for word in root.words if word.startswith("root=/dev/")), "")
    names = (wanted,) if root.verified else (wanted, "/dev/root")
    if wanted and device.startswith("/dev/") and device not in names:
        raise Wrong(f"the root is not on {wanted} but {said}")
    if "rw" in root.words:
        if "rw" not in options:
            raise Wrong(f"the root cannot be written to: {said}")
    elif "ro" not in options:
        raise Wrong(f"the root can be written to: {said}")
    if root.dax and not root.verified and not {"dax", "dax=always"} & set(options):
        raise Wrong(f"the root is mounted without DAX: {said}")
    return said


def nonce_agrees(session: Session) -> str:
    if not _logs_as_ours(session):
        return "the answers came through this run's own channel; this agent says no nonce"
    fields = session.watcher.message("agent started", min(_LINE_SECONDS, session.left))
    if fields is None:
        raise Unclear("no log line of the agent's on the console says which run it belongs to")
    if fields.get("nonce") != session.machine.nonce:
        raise Wrong(f"the agent belongs to another run: its nonce is {fields.get('nonce')!r}")
    return "this run's"


def every_call(session: Session) -> str:
    began = time.monotonic()
    rows = walk_check.walk(session.connection, session.machine, init=not session.service)
    session.deadline += time.monotonic() - began  # each of its calls has had a deadline
    session.calls += [
        Call(
            call=row.call, about=row.about, verdict=str(row.verdict), detail=printable(row.detail),
            seconds=row.seconds, calls=row.calls, call_seconds=row.call_seconds,
        )
        for row in rows
    ]  # fmt: skip
    if walk_check.gone(rows):
        session.lost = session.gone = True
    return walk_check.judge(rows)


def powers_off(session: Session) -> str:
    with contextlib.suppress(ttrpc.PeerClosed):  # it may be gone before its answer is
        session.client.destroy_sandbox(seconds=min(_CALL_SECONDS, session.left))
    end = session.watcher.wait_for_end(_POWEROFF_SECONDS)
    if end.panicked:
        raise Wrong("the kernel panicked instead of powering off")
    if end.halted:
        return "halted: this machine has no power switch"
    if end.status is None:
        raise Wrong(f"the guest is still there {_POWEROFF_SECONDS:g} s after it was told to power off")
    if end.status != 0:
        raise Wrong(f"the VMM ended with status {end.status}")
    if not end.leaving:
        raise Wrong("the VMM ended, but the guest's kernel never said that it would power off")
    return "the VMM ended by itself"


CHECKS: Final[Mapping[str, CheckFunction]] = {
    "agent.check": agent_answers,
    "agent.version": agent_version,
    "agent.details": agent_details,
    "root": root_mounted,
    "nonce": nonce_agrees,
    "agent": every_call,
    "poweroff": powers_off,
}
WALK: Final = "agent"
_FIRST: Final = "agent.check"  # without it nothing else can be asked
_ON_REQUEST: Final = frozenset((WALK,))


def select(names: Iterable[str]) -> dict[str, CheckFunction]:
    """The checks of these names, in order; of none, all that take no time.

    A walk's last call is the one that ends a guest, so that is looked at too.
    """
    wanted = set(names)
    if unknown := sorted(wanted - CHECKS.keys()):
        raise SpecError(f"no check {quote(unknown[0])}", hint=f"one of {', '.join(CHECKS)}")
    wanted = wanted | {_FIRST} if wanted else CHECKS.keys() - _ON_REQUEST
    if WALK in wanted:
        wanted = wanted | {"poweroff"}
    return {name: function for name, function in CHECKS.items() if name in wanted}


# --- What it comes to -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stamp:
    """Changes with every write to a file, through mmap too."""

    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


def _stamps(machine: Machine) -> dict[Path, _Stamp]:
    stamps = {}
    for path in machine.inputs:
        with contextlib.suppress(OSError):  # the runtime says it better
            found = path.stat()
            stamps[path] = _Stamp(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return stamps


def _console_is_clean(evidence: autopsy.Evidence, *, lost: bool) -> Check:
    """A guest may answer well and still have lost half of its root: the kernel says so on the console only."""
    if lost:  # then the console was asked for the cause
        return Check(name="console", verdict=Verdict.unknown, detail=_NOT_REACHED)
    trouble = autopsy.trouble(evidence)
    if trouble is not None:
        return Check(name="console", verdict=Verdict.failed, detail=f"{trouble.sentence}: {trouble.line}")
    return Check(name="console", verdict=Verdict.passed, detail="the kernel complains of nothing")


def _unchanged(before: Mapping[Path, _Stamp], after: Mapping[Path, _Stamp]) -> Check:
    changed = sorted(str(path) for path in before if before[path] != after.get(path))
    if changed:
        return Check(name="files", verdict=Verdict.failed, detail=f"changed during the run: {', '.join(changed)}")
    return Check(name="files", verdict=Verdict.passed, detail="not changed by the run")


# The VMM was ended from outside: nothing the guest did.
_NOT_THE_GUEST: Final = frozenset({"vmm-killed"})


def _blame(check: Check, cause: Cause) -> Check:
    """The check that lost the guest says why, once the console has said it."""
    if check.verdict is Verdict.passed or check.detail == _NOT_REACHED:
        return check
    verdict = check.verdict
    if cause.name in _NOT_THE_GUEST:
        verdict = Verdict.unknown
    elif cause.certain:
        verdict = Verdict.failed
    detail = cause.sentence if cause.certain else f"{check.detail}; {cause.sentence}"
    return Check(name=check.name, verdict=verdict, detail=detail, seconds=check.seconds)


def _reason(
    verdict: Verdict, checks: list[Check], cause: Cause | None, evidence: autopsy.Evidence, seconds: float
) -> str:
    if verdict is Verdict.passed:
        return "the agent answered, and everything it said was right"
    if cause is not None and not cause.certain and not evidence.answered:
        return _silence(cause, evidence, seconds)
    worst = next((check for check in checks if check.verdict is verdict), checks[0])
    return f"{worst.name}: {worst.detail}"


def _silence(cause: Cause, evidence: autopsy.Evidence, seconds: float) -> str:
    """How long nobody answered, how far the guest came, and the end of its console in a few words."""
    said = "" if cause.name == "unknown" else f", {cause.sentence}"
    last = cause.line.strip()
    shown = f"; last: {last[:_LAST_CHARACTERS]}{'…' * (len(last) > _LAST_CHARACTERS)}" if last else ""
    return f"silent after {seconds:g} s (seen: {evidence.phase}){said}{shown}"


def _kind(root: DiskImage | Initrd) -> str:
    if isinstance(root, Initrd):
        return "initramfs"
    if root.verified:
        return f"{root.filesystem} with verity"
    return f"{root.filesystem}{' with DAX' if root.dax else ''}"


def _facts(machine: Machine, vmm: str, guest: Guest) -> dict[str, str | int]:
    root = machine.root
    return {
        "vmm": vmm,
        "arch": machine.arch,
        "kernel": machine.kernel.release,
        "root": str(root.file.path),
        "root_kind": _kind(root),
        "transport": guest.channel.name,
        "memory_mib": machine.memory_mib,
        "cpus": machine.cpus,
        "nonce": machine.nonce,
    }
