"""Boot it, ask its agent, and say what came of it. Only an answer of the agent's counts as success.

main thread   starts the VMM, asks the agent, one check after the other, until the deadline
watcher       another thread: reads the console as it grows, and ends what is beyond hope
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import autopsy, ttrpc
from osbuild.arch import MIB, X86_64, find_arch
from osbuild.artifacts import DiskImage, Initrd
from osbuild.checks import CHECKS, FIRST, GUESTS, prepare, select
from osbuild.checks.base import Session
from osbuild.errors import SpecError
from osbuild.findings import NotHere, Unclear, Unsaid, Wrong
from osbuild.network import GuestNetwork
from osbuild.network.leftovers import host_addresses, left_behind
from osbuild.probe import Refused
from osbuild.report import Cause, Check, SmokeReport, Verdict, printable
from osbuild.runtime import RUNTIMES, accel
from osbuild.runtime.base import Guest, Machine
from osbuild.runtime.placing import kernel_end, overlap
from osbuild.watcher import OnEvent, Watcher

SECONDS: Final = 60.0

OnCheck = Callable[[Check, float], None]  # what came of it, and seconds since the VMM was started

_CONSOLE: Final = "console"  # the check that the kernel complains of nothing of its guest's
_NOT_REACHED: Final = "not reached"
# What a VMM tells of how its guest fared: SHUTDOWN has the reason, guest-reset for one that only wanted to restart.
_TOLD: Final = ("SHUTDOWN", "RESET", "POWERDOWN", "STOP", "GUEST_PANICKED", "GUEST_CRASHLOADED", "BLOCK_IO_ERROR")
_TOLD_MOST: Final = 50  # a guest may have any number of errors
_SOON, _NOW = 1.0, 0.02  # seconds: of one that ends, what is left to read; of one that lives, what is there
_LAST_CHARACTERS: Final = 60  # of a console's last line, in a reason


def run(
    machine: Machine,
    work: Path,
    *,
    name: str = "boot",
    vmm: str = "qemu",
    seconds: float = SECONDS,
    checks: Iterable[str] = (),
    guests: int = 1,
    on_event: OnEvent | None = None,
    on_check: OnCheck | None = None,
) -> SmokeReport:
    """Boot `machine` once and look at what `select` gives; its console and logs stay in `work`."""
    checks = frozenset(checks)
    selected = select(checks, machine, asked=(GUESTS,) if guests > 1 else ())
    machine = prepare(machine, selected)
    if vmm not in RUNTIMES:
        raise SpecError(f"no VMM {vmm!r}", hint=f"one of {', '.join(RUNTIMES)}")
    before, addresses = _stamps(machine), host_addresses()
    with RUNTIMES[vmm].start(machine, work) as guest, Watcher(guest, on_event) as watcher:
        session = Session(
            machine=machine,
            guest=guest,
            watcher=watcher,
            deadline=guest.started + seconds,
            work=work,
            vmm=vmm,
            asked=checks,
            reads_tree=not {"dax", GUESTS}.isdisjoint(selected),
            guests=guests,
        )
        seen = go_through(session, selected, on_check)
        evidence = watcher.finish(answered=seen[0].verdict is Verdict.passed, gone=session.gone)
        told = guest.monitor.told(*_TOLD, seconds=_SOON if evidence.status is not None else _NOW)
    seen += _afterwards(session, evidence, before, addresses)
    took = time.monotonic() - guest.started
    evidence = _with_machine(evidence, session)
    cause, seen = _blamed(session, evidence, seen)
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
        told=tuple(told[:_TOLD_MOST]),
        seconds=took,
        accel=guest.accel,
        command=guest.command,
        console=guest.console,
        log=guest.log,
    )


# --- One check after the other ----------------------------------------------------------------------------------------


def go_through(session: Session, names: Iterable[str], on_check: OnCheck | None = None) -> list[Check]:
    """Every check in order; once the guest is lost the rest is unknown. `on_check` hears of each, and when it ended."""
    seen = []
    with session.connections:
        for name in names:
            seen.append(_look(session, name))
            if on_check is not None:
                on_check(seen[-1], time.monotonic() - session.guest.started)
    return seen


def _look(session: Session, name: str) -> Check:
    began = time.monotonic()
    session.facts = {}
    if session.lost:
        return Check(name=name, verdict=Verdict.unknown, detail=_NOT_REACHED)
    try:
        verdict, detail = Verdict.passed, CHECKS[name].look(session)
    except Wrong as problem:
        verdict, detail = Verdict.failed, str(problem)
        if not (session.lost or isinstance(problem, Unsaid)):
            session.seen_wrong.add(name)
    except Unclear as problem:
        verdict, detail = Verdict.unknown, str(problem)
    except NotHere as problem:  # who named it is not told that all is well
        verdict, detail = Verdict.unknown if session.by_name(name) else Verdict.skipped, str(problem)
    except ttrpc.CallTimeout as problem:
        verdict, detail, session.lost = Verdict.unknown, str(problem), True
    except ttrpc.PeerClosed as problem:
        verdict, detail, session.lost, session.gone = Verdict.failed, str(problem), True, True
    except ttrpc.RpcError as problem:
        verdict, detail = Verdict.failed, str(problem)
    except Refused as problem:
        verdict, detail = Verdict.unknown, f"the guest refuses it: {problem}"
    except (ValueError, LookupError, TypeError) as problem:  # of numbers and names that an image may choose
        verdict, detail = Verdict.unknown, f"what the guest says is not to be understood: {problem!r}"
    finally:
        seconds = time.monotonic() - began
        if name != FIRST:  # what is asked later waits with deadlines of its own, and takes none of the next one's time
            session.deadline += seconds
    return Check(name=name, verdict=verdict, detail=printable(detail), seconds=seconds, facts=session.facts)


def _afterwards(
    session: Session, evidence: autopsy.Evidence, before: Mapping[Path, _Stamp], addresses: frozenset[str]
) -> Iterator[Check]:
    """What can be seen only once the guest has gone: its console, its files, and what it had of the host."""
    console = _console_is_clean(evidence, lost=session.lost)
    if console.verdict is Verdict.failed:
        session.seen_wrong.add(console.name)
    yield console
    yield _unchanged(before, _stamps(session.machine))
    if session.guest.network is not None:
        yield _network_is_gone(session.guest.network, addresses)


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
        return Check(name=_CONSOLE, verdict=Verdict.unknown, detail=_NOT_REACHED)
    trouble = autopsy.trouble(evidence)
    if trouble is not None:
        return Check(name=_CONSOLE, verdict=Verdict.failed, detail=f"{trouble.sentence}: {trouble.line}")
    return Check(name=_CONSOLE, verdict=Verdict.passed, detail="the kernel complains neither of itself nor of its root")


def _unchanged(before: Mapping[Path, _Stamp], after: Mapping[Path, _Stamp]) -> Check:
    changed = sorted(str(path) for path in before if before[path] != after.get(path))
    if changed:
        return Check(name="files", verdict=Verdict.failed, detail=f"changed during the run: {', '.join(changed)}")
    return Check(name="files", verdict=Verdict.passed, detail="not changed by the run")


def _network_is_gone(net: GuestNetwork, before: frozenset[str]) -> Check:
    if left := left_behind(net, before):
        return Check(name="network.gone", verdict=Verdict.failed, detail=f"still on the host: {', '.join(left)}")
    return Check(name="network.gone", verdict=Verdict.passed, detail="no address, link, namespace or rule is left here")


# Nothing the guest did: the VMM was ended from outside, or nobody could see.
_NOT_THE_GUEST: Final = frozenset({"vmm-killed", "console-full", "console-wrong", "kvm-disguise", "clock"})


def _with_machine(evidence: autopsy.Evidence, session: Session) -> autopsy.Evidence:
    """What a guest left, and what it was given; a KVM under which one was lost is measured again."""
    machine, guest = session.machine, session.guest
    if session.lost and guest.accel.name == "kvm" and evidence.status != 0:
        evidence = dataclasses.replace(evidence, doubt=accel.doubt(find_arch(machine.arch), Path(guest.command[0])))
    return dataclasses.replace(
        evidence, memory_mib=machine.memory_mib, kernel_mib=-(-machine.kernel.vmlinux.size // MIB),
        over_kernel=_over_kernel(machine),
    )  # fmt: skip


def _over_kernel(machine: Machine) -> int:
    """Bytes of the initramfs that a VMM has to lay where an x86 kernel lies; arm64's goes behind its kernel."""
    if not isinstance(machine.root, Initrd) or find_arch(machine.arch) is not X86_64:
        return 0
    with contextlib.suppress(OSError):  # gone meanwhile
        return overlap(machine.memory_mib * MIB, machine.root.file.size, kernel_end(machine.kernel.vmlinux.path))
    return 0


def _cause(evidence: autopsy.Evidence, seen: Iterable[Check], *, lost: bool) -> Cause | None:
    """Why: of a guest that was lost, or of one in which something was wrong that nobody could have seen rightly."""
    if lost:
        return autopsy.explain(evidence)
    if all(check.verdict in (Verdict.passed, Verdict.skipped) for check in seen):
        return None
    return autopsy.unseen(evidence)


def _blamed(session: Session, evidence: autopsy.Evidence, seen: list[Check]) -> tuple[Cause | None, list[Check]]:
    """The cause, and the checks once those that it explains say so."""
    cause = _cause(evidence, seen, lost=session.lost)
    if cause is not None:
        seen = [check if check.name in session.seen_wrong else _blame(check, cause) for check in seen]
    if session.seen_wrong and not session.lost:  # what failed was seen, and is its own cause
        cause = autopsy.trouble(evidence) if _CONSOLE in session.seen_wrong else None
    return cause, seen


def _blame(check: Check, cause: Cause) -> Check:
    """The check that lost the guest, or could not see, says why once the console has said it."""
    if check.verdict in (Verdict.passed, Verdict.skipped) or check.detail == _NOT_REACHED:
        return check
    verdict = check.verdict
    if cause.name in _NOT_THE_GUEST:
        verdict = Verdict.unknown
    elif cause.certain:
        verdict = Verdict.failed
    detail = cause.sentence if cause.certain else f"{check.detail}; {cause.sentence}"
    return dataclasses.replace(check, verdict=verdict, detail=detail)


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
        "network": machine.network or "none",
        "memory_mib": machine.memory_mib,
        "cpus": machine.cpus,
        "nonce": machine.nonce,
        **guest.facts,
    }
