"""Why a guest did not do what it should: a table of causes, matched on what it left behind.

A cause is named only by a line that shows it; "unknown, last seen: …" is the honest rest. It is certain when that line
explains how the guest ended: each row says which ends it can explain, of whose device and how soon before. Of lines
that do the first one wins. What else is broken is a guess, and what many a healthy guest says is the last resort.
"""

from __future__ import annotations

import enum
import re
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import last_words
from osbuild.causes import (
    ALWAYS_BAD,
    BOUND,
    GIVES_UP,
    GUEST,
    HALF_THERE,
    OF_MEMORY,
    OUTCOMES,
    TERMINATED,
    VMM,
    Speaker,
    Symptom,
)
from osbuild.last_words import Console, End
from osbuild.last_words import Phase as Phase
from osbuild.report import Cause, printable, tail

HEAD_BYTES: Final = 64 * 1024  # of a console: what a kernel says before anything goes wrong
TAIL_BYTES: Final = 256 * 1024  # and of its end; a guest may write gigabytes in between
LINE_CHARACTERS: Final = 400
_TINY: Final = 1.7  # times what its kernel takes: with 32 MiB ours, of 20, never comes to init, with 40 it does


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is left of a guest."""

    console: str  # printable
    log: str = ""  # the VMM's own words, printable
    status: int | None = None  # the VMM's exit status; None: it was still running when we stopped waiting
    answered: bool = False  # the agent did, at least once
    stopped: bool = False  # we ended the VMM, so that its status says nothing
    flooded: bool = False  # … because the console would not end
    given_up: bool = False  # … because of a line after which no agent answers
    full: bool = False  # the console's disk has no room
    transport: str = "serial"  # how the agent was asked: of spec.TRANSPORTS
    memory_mib: int = 0  # of the guest; 0: nobody said
    kernel_mib: int = 0  # of its kernel, in memory
    over_kernel: int = 0  # bytes of the initramfs that lie where the kernel does
    doubt: str = ""  # of the accelerator, measured again; empty: there is none

    @property
    def read(self) -> Console:
        """The console, and who said what on it."""
        return last_words.read(self.console, over=self.over)

    @property
    def over(self) -> bool:
        """The VMM ended, and not by us."""
        return self.status is not None and not self.stopped

    @property
    def ended(self) -> bool:
        """The guest is over, by its own doing."""
        return self.panicked or self.over

    @property
    def panicked(self) -> bool:
        """The guest's kernel did."""
        return self.read.end[0] not in (End.unsaid, End.left)

    @property
    def phase(self) -> Phase:
        """The furthest that the console shows."""
        return self.read.phase


_NO_VSOCK: Final = "vsock://-1:"  # VMADDR_CID_ANY where the guest's number should stand: it has no such device
_OWN_FAULT: Final = (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
_LISTENING: Final = re.compile(r'^.*"msg":"listening".*"address":"([^"]*)".*$', re.MULTILINE)
_CONSOLE: Final = re.compile(rf"^(?:{last_words.TIME})?printk: (?:legacy )?console \[(?:ttyS0|ttyAMA0)\] enabled", re.M)
_BOOT_CONSOLE: Final = re.compile(rf"^(?:{last_words.TIME})?printk: (?:legacy )?bootconsole \[\S+\] disabled.*$", re.M)
# Those that a guest can have brought about, long after a VMM had read its options.
_OF_RUNNING: Final = ("vmm-kvm", "vmm-memory")
_HARMLESS: Final = re.compile(r": (?:warning|info): |falling back to ")
_WORDS: Final = "ommand line: "
_EXITED: Final = re.compile(r"exitcode=0x0000(?!00)[0-9a-f]{2}00")
_NO_LOADER: Final = "exitcode=0x00007f00"
_BOUND: Final = re.compile(rf"^{BOUND}.*$", re.MULTILINE)
_RESET: Final = re.compile(r"^.*[Tt]riple fault.*$", re.MULTILINE)


def explain(evidence: Evidence) -> Cause:
    """The cause, as far as the evidence goes."""
    if evidence.over and evidence.read.end[0] is End.unsaid and (said := _by_vmm(evidence)) is not None:
        return said
    if evidence.doubt:
        return _outcome("kvm-disguise", line=evidence.doubt)
    last = (last_lines(evidence.console, 1) or [""])[0]
    if evidence.over_kernel and _is_early(evidence) and not evidence.answered:
        return _outcome(
            "initrd-memory", line=last, memory=evidence.memory_mib, over=-(-evidence.over_kernel // 1024)
        )  # fmt: skip
    findings = _look(GUEST, evidence)
    # A stable sort: of two that one line shows the first row is the more specific. What a guest survived hides no end.
    grave = [found for found in findings if found.grade > Grade.weak]
    grave.sort(key=lambda found: (-found.grade, found.at))
    if _is_tiny(evidence) and (not grave or grave[0].cause.name in OF_MEMORY):
        sure = evidence.memory_mib < _TINY * evidence.kernel_mib
        return _outcome(
            "memory-tiny", line=last, certain=sure, memory=evidence.memory_mib, kernel=evidence.kernel_mib
        )  # fmt: skip
    if grave:
        return grave[0].cause
    seen = evidence.flooded or (evidence.over and evidence.status != 0)
    outcome = (None if seen else unseen(evidence)) or _by_outcome(evidence)
    return findings[0].cause if findings and not outcome.certain else outcome


def _by_vmm(evidence: Evidence) -> Cause | None:
    """What a VMM says, and how it ended, of a guest whose kernel did not say that it is over."""
    assert evidence.status is not None
    if evidence.status < 0 and (told := _BOUND.search(evidence.log)) is not None:
        return _outcome("disk-flood", line=told[0])
    said = _first((TERMINATED,), evidence.log)
    if said is None and (evidence.status > 0 or -evidence.status in _OWN_FAULT):
        said = _complaint(evidence.log, running=evidence.phase is not Phase.nothing)
    if said is not None and not (evidence.doubt and said.name == "vmm-kvm"):
        return said
    return _by_outcome(evidence) if evidence.status < 0 and not evidence.doubt else None


def _complaint(log: str, *, running: bool) -> Cause | None:
    """The last that a row knows: what a VMM says before may be what it lives with."""
    table = tuple(row for row in VMM if not running or row.name in _OF_RUNNING)
    lines = (line for line in reversed(log.splitlines()) if not _HARMLESS.search(line))
    return next((found for line in lines if (found := _first(table, line)) is not None), None)


class Grade(enum.IntEnum):
    """How much a line explains."""

    nothing = enum.auto()  # it is of another device, or of what was long over
    weak = enum.auto()  # many a healthy guest has such a line
    suspect = enum.auto()  # something is broken, and perhaps it is that
    certain = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A row that fits, where, and how well."""

    cause: Cause
    at: int  # in Console.text
    grade: Grade


def _look(table: Iterable[Symptom], evidence: Evidence) -> list[_Found]:
    """Every row that fits, by the line that explains most."""
    console = evidence.read
    found = []
    for row in table:
        if row.phase not in (None, console.phase):
            continue
        text = console.kernel if row.by is Speaker.kernel else console.text
        matches = list(row.pattern.finditer(text))
        if matches:
            at = [console.place(match.start()) if row.by is Speaker.kernel else match.start() for match in matches]
            how = _How.of(row, at[-1], evidence)
            grades = [_grade(row, match, how, console) for match in matches]
            best = max(range(len(matches)), key=lambda index: grades[index])
            cause = _cause(row, matches[best], certain=grades[best] is Grade.certain and console.stamped)
            found.append(_Found(cause=cause, at=at[best], grade=grades[best]))
    return [one for one in found if one.grade > Grade.nothing]


@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """How a guest ended after the last line of a row: the same for each of its lines, of which there may be many."""

    end: End
    explained: bool  # by such a line
    given_up: bool  # we ended it, because of one
    stopped: bool  # it says nothing behind such a line, and is over
    stale: bool  # what stood still went on
    broken: bool  # what it was given is, whether it came to init or not, and it fell silent

    @classmethod
    def of(cls, row: Symptom, last: int, evidence: Evidence) -> _How:
        """`last`: where the last line of the row begins."""
        console = evidence.read
        end, why = console.end
        if end is End.left and not evidence.over:
            end = End.unsaid
        went_on = console.went_on(last)
        return cls(
            end=end,
            explained=end in row.ends and _explains(row, end, why, last, console),
            given_up=row.final and end is End.unsaid and evidence.given_up and bool(GIVES_UP.search(console.text)),
            stopped=end is End.unsaid and evidence.over and not went_on,
            stale=row.name == "kernel-stuck" and went_on,
            broken=row.name in HALF_THERE and end is End.unsaid and _is_silent(evidence),
        )


def _grade(row: Symptom, match: re.Match[str], how: _How, console: Console) -> Grade:
    is_roots = _is_the_roots(row, match, console)
    mounted = row.ends and row.ends <= {End.root, End.start} and console.phase in (Phase.init, Phase.agent)
    if is_roots is False or (mounted and how.end is not End.start and not how.broken) or how.stale:
        return Grade.nothing
    if is_roots is None:
        return Grade.weak
    if how.explained or how.given_up or how.broken:
        return Grade.certain
    if how.end is End.init and row.name == "oops" and console.process(match.end()) == 1:
        return Grade.certain
    if row.name in ALWAYS_BAD and row.name != "oom":
        return Grade.certain if how.stopped else Grade.suspect
    return Grade.suspect if row.final and how.end is End.left else Grade.weak


def _explains(row: Symptom, end: End, why: str, last: int, console: Console) -> bool:
    """Whether a row of such an end came soon before it: programs live with much, and only init's end is its own."""
    if not row.near or end is not End.init:
        return True
    if row.but:
        return (
            _EXITED.search(why) is not None and console.said_since(last) and not console.said_since(last, but=row.but)
        )
    return not console.said_since(last) and (row.name != "library-missing" or _NO_LOADER in why)


def _is_the_roots(row: Symptom, match: re.Match[str], console: Console) -> bool | None:
    """Whether a line is about the root, as far as it says what it is about; None: nobody knows."""
    words, roots = match.groupdict(), console.roots
    device = "".join(value for name, value in words.items() if name.startswith("device") and value)
    device = re.sub(r"^(?:pfn|namespace|region)(\d+)$", r"pmem\1", device)
    kind = next((value for name, value in words.items() if name.startswith("filesystem") and value), "")
    if kind and kind not in console.tried:
        return False
    if row.name == "verity":
        return roots is None or any(root.startswith("dm-") for root in roots)
    if not device:
        return True
    if roots is None:
        return None if console.stamped and _WORDS in console.kernel else True
    rests = (root.removeprefix(device) for root in roots if root.startswith(device))
    return any(re.fullmatch(r"(?:p?\d+)?", rest) for rest in rests)


def _is_tiny(evidence: Evidence) -> bool:
    """It ended before init, in memory that is not twice what its kernel takes."""
    return _is_early(evidence) and evidence.ended and evidence.memory_mib < 2 * evidence.kernel_mib


def _is_silent(evidence: Evidence) -> bool:
    """It still ran, and nothing of its own doing made us end it."""
    return not (evidence.over or evidence.given_up or evidence.flooded)


def _is_early(evidence: Evidence) -> bool:
    """It never came to init."""
    return evidence.phase in (Phase.nothing, Phase.firmware, Phase.kernel)


def unseen(evidence: Evidence) -> Cause | None:
    """Why a console does not say what it should, of a guest that may be right."""
    last = (last_lines(evidence.console, 1) or [""])[0]
    if evidence.full:
        return _outcome("console-full", line=last)
    told = _BOOT_CONSOLE.search(evidence.read.kernel)
    if told is not None and not _CONSOLE.search(evidence.read.kernel) and evidence.phase is Phase.kernel:
        return _outcome("console-wrong", line=told[0], certain=evidence.answered)
    return None


def trouble(evidence: Evidence) -> Cause | None:
    """What a kernel says only when something of its guest's is broken, even if the guest went on."""
    guess: Cause | None = None
    for cause in _troubles(evidence.read):
        if cause.certain:
            return cause
        guess = guess or cause
    return guess


def _troubles(console: Console) -> Iterator[Cause]:
    """Certain is what a row shows that explains some end; where it explains none, it is of a program."""
    for row in (row for row in GUEST if row.name in ALWAYS_BAD):
        for match in row.pattern.finditer(console.kernel):
            is_roots = _is_the_roots(row, match, console)
            if is_roots is not False:
                yield _cause(row, match, certain=is_roots is True and bool(row.ends) and console.stamped)


def listens(addresses: Iterable[str], transport: str) -> bool:
    """Whether an agent that says that it listens there can be asked this way."""
    way = "virtio-serial:" if transport == "serial" else "vsock:"
    return any(address.startswith(way) and not address.startswith(_NO_VSOCK) for address in addresses)


def console_text(path: Path) -> str:
    """A console as text: its head and its end when it is long, nothing in it that a terminal would act on."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            rest = path.stat().st_size - len(head)
    except OSError:
        return ""
    if rest <= 0:
        return printable(head)
    end = tail(path, min(rest, TAIL_BYTES))
    gap = f"\n[… {rest - len(end)} bytes left out …]\n" if rest > len(end) else ""
    return printable(head + end) if not gap else printable(head) + gap + printable(end)


def last_lines(text: str, count: int = 40) -> list[str]:
    """The last lines that say something, cut to a readable length."""
    return [line[:LINE_CHARACTERS] for line in text.splitlines() if line.strip()][-count:]


def _first(table: tuple[Symptom, ...], text: str) -> Cause | None:
    """Of a VMM's words."""
    matches = ((row, row.pattern.search(text)) for row in table)
    return next((_cause(row, match) for row, match in matches if match is not None), None)


def _cause(row: Symptom, match: re.Match[str], *, certain: bool = True) -> Cause:
    groups = {name: (value or "").strip() for name, value in match.groupdict().items()}
    line = (groups.get("shows") or match[0].strip()).partition("\n")[0][:LINE_CHARACTERS]
    return Cause(
        name=row.name, sentence=row.sentence.format_map(groups), line=line, hint=row.hint, certain=certain
    )  # fmt: skip


def _outcome(name: str, *, line: str = "", certain: bool = True, **words: object) -> Cause:
    outcome = OUTCOMES[name]
    return Cause(
        name=name, sentence=outcome.sentence.format_map(words), line=line, hint=outcome.hint, certain=certain
    )  # fmt: skip


def _by_outcome(evidence: Evidence) -> Cause:
    """No line explains it: what can be said from how it ended, and how far it came."""
    last = (last_lines(evidence.console, 1) or [""])[0]
    if evidence.flooded:
        return _outcome("flood", line=last)
    if evidence.status is not None and not evidence.stopped:
        return _by_status(evidence, evidence.status, last)
    return _by_phase(evidence, last)


def _by_status(evidence: Evidence, status: int, last: str) -> Cause:
    said = (last_lines(evidence.log, 1) or [""])[0]
    if status < 0:
        number = signal.Signals(-status).name if -status in signal.valid_signals() else str(-status)
        return _outcome("vmm-crashed" if -status in _OWN_FAULT else "vmm-killed", line=said or last, signal=number)
    if status > 0:
        return _outcome("vmm-failed", line=said or last, status=status, said=f": {said}" if said else "")
    told = _RESET.search(evidence.log)
    # A guest's restart ends it, by -no-reboot, and a kernel announces those: where anybody can see it.
    seen = evidence.phase not in (Phase.nothing, Phase.firmware)
    return _outcome("triple-fault", line=told[0] if told else last, certain=seen or told is not None)


def _by_phase(evidence: Evidence, last: str) -> Cause:
    """It lives, or did when we stopped waiting: little is certain."""
    if evidence.phase is Phase.agent and not evidence.answered:
        return _by_addresses(evidence, last)
    names = {Phase.nothing: "silent", Phase.init: "agent-absent"}
    return _outcome(names.get(evidence.phase, "unknown"), line=last, certain=False, last=last)


def _by_addresses(evidence: Evidence, last: str) -> Cause:
    """The agent started, and says where it listens."""
    found = {match[1]: match[0] for match in _LISTENING.finditer(evidence.read.text)}
    if listens(found, evidence.transport) or not (found or evidence.given_up):
        return _outcome("agent-silent", line=last, certain=False)
    line = next(iter(found.values()), last)[:LINE_CHARACTERS]
    if found and all(address.startswith("unix:") for address in found):
        return _outcome("agent-deaf", line=line, certain=evidence.given_up, addresses=", ".join(found))
    missing = "serial-missing" if evidence.transport == "serial" else "vsock-missing"
    return _outcome(missing, line=line, certain=evidence.given_up)
