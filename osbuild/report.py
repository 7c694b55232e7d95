"""What came of booting: verdicts, checks and the evidence, for people, for CI (JUnit) and for programs (JSON)."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final
from xml.etree import ElementTree

from osbuild.output import write_whole, writing
from osbuild.runtime.accel import Accel

REPORT: Final = "report.json"
SCHEMA: Final = "osbuilder.smoke"
SCHEMA_VERSION: Final = 1  # a field may be added within a version, never changed or taken away
# Devices with a partner that lives as long as the boot: an open file, another program.
_ONCE: Final = (
    "vhost-vsock-", "vhost-user-vsock-", "socket,id=vsock,",
    "socket,id=service,", "user,id=network,", "tap,id=network,", "virtio-net-pci,netdev=network,",
    "virtio-net-device,netdev=network,", "socket,id=monitor,", "chardev=monitor,",
    "socket,id=share", "vhost-user-fs-", "local,id=share", "virtio-9p-",
)  # fmt: skip
CONSOLE_IN_JUNIT: Final = 16 * 1024  # bytes of a console's end; the whole of it lies beside the report

_CODES: Final[Mapping[str, int]] = {"passed": 0, "failed": 6, "unknown": 7, "skipped": 7}


class Verdict(enum.StrEnum):
    """What may be said of a guest. Silence is `unknown`: neither good nor bad."""

    passed = enum.auto()
    failed = enum.auto()
    unknown = enum.auto()
    skipped = enum.auto()  # what it takes is not there: says nothing of the guest

    @property
    def code(self) -> int:
        """The exit code of a command that ends with this verdict."""
        return _CODES[self]

    @classmethod
    def over(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """One for many: a single failure fails them all, and nothing at all is not a success."""
        found = set(verdicts) - {cls.skipped}
        if cls.failed in found:
            return cls.failed
        return cls.passed if found == {cls.passed} else cls.unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing looked at: what was seen, or why it could not be."""

    name: str
    verdict: Verdict
    detail: str
    seconds: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)  # what was measured, by name; JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """A step of the walk over the agent's calls (agent_walk.Row): the call, what of it, and how that went."""

    call: str  # with its service
    about: str
    verdict: str  # of Verdict, or skipped
    detail: str
    seconds: float
    calls: int = 0  # how often it was made in this step
    call_seconds: float = 0.0  # the median of those


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened, `seconds` after the VMM was started; `guest` is the guest's own clock, when it said."""

    name: str
    seconds: float
    guest: float | None = None


# What a guest is busy with from an event on, until the next of these.
_PHASES: Final = {
    "vmm started": "firmware", "kernel": "kernel", "init": "agent", "agent answered": "checks", "leaving": "power off",
    "panic": "panic",
}  # fmt: skip


def phases(events: Iterable[tuple[str, float]], length: float) -> Iterator[tuple[str, float, float]]:
    """What a guest was busy with, when that began and ended: of its events by name and time, and how long all took.

    The first three together are how long it took to answer.
    """
    known = [(seconds, _PHASES[name]) for name, seconds in events if name in _PHASES]
    for (begin, label), (end, _) in itertools.pairwise([*known, (length, "")]):
        if end > begin:
            yield label, begin, end


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why a guest did not do what it should: the line that shows it, and what to do."""

    name: str
    sentence: str
    line: str = ""
    hint: str = ""
    certain: bool = True  # a line shows that the guest ended so; otherwise it is a guess


@dataclass(frozen=True, slots=True, kw_only=True)
class SmokeReport:
    """One boot."""

    name: str  # of the boot: `image`, `initrd`; a directory of the report is called so
    machine: Mapping[str, str | int]
    verdict: Verdict
    reason: str  # one sentence
    cause: Cause | None
    checks: tuple[Check, ...]
    timeline: tuple[Event, ...]
    seconds: float
    accel: Accel
    command: tuple[str, ...]
    console: Path
    log: Path
    calls: tuple[Call, ...] = ()  # only when the walk was asked for
    told: tuple[Mapping[str, Any], ...] = ()  # events that the VMM told of by itself: name and data, as it has them

    def to_dict(self) -> dict[str, Any]:  # Any: JSON
        """This boot as the report's schema has it; paths are relative to the report."""
        return {
            "name": self.name,
            "verdict": self.verdict,
            "reason": self.reason,
            "cause": dataclasses.asdict(self.cause) if self.cause else None,
            "seconds": round(self.seconds, 3),
            "machine": dict(self.machine),
            "accel": dataclasses.asdict(self.accel),
            "checks": [{**dataclasses.asdict(check), "seconds": round(check.seconds, 4)} for check in self.checks],
            "calls": [
                {
                    **dataclasses.asdict(call),
                    "seconds": round(call.seconds, 4),
                    "call_seconds": round(call.call_seconds, 6),
                }
                for call in self.calls
            ],
            "timeline": [{**dataclasses.asdict(event), "seconds": round(event.seconds, 4)} for event in self.timeline],
            "events": [dict(event) for event in self.told],
            "command": list(self.command),
            "console": f"{self.name}/{self.console.name}",
            "log": f"{self.name}/{self.log.name}",
        }

    def command_text(self) -> str:
        """A shell script that boots the same again, its console on the terminal, nobody speaking to the agent."""
        words: list[str] = []
        for word in self.command:
            if word.startswith(_ONCE) and words:
                del words[-1]  # the option that it belongs to
            else:
                words.append(word)
        lines = [shlex.quote(words[0])]
        for word in words[1:]:
            if word.startswith("file,id=console,"):
                word = "stdio,id=console,signal=on"
            elif word.startswith("socket,id=agent,"):
                word = "null,id=agent"
            if word.startswith("-") or " " in lines[-1] or len(lines) == 1:
                lines.append(shlex.quote(word))
            else:
                lines[-1] += " " + shlex.quote(word)
        return "#!/bin/sh\n# The same boot with its console here; Ctrl-C ends it.\n" + " \\\n  ".join(lines) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All boots of one build."""

    boots: tuple[SmokeReport, ...]

    @property
    def verdict(self) -> Verdict:
        """Passed only if every boot did."""
        return Verdict.over(boot.verdict for boot in self.boots)

    @property
    def code(self) -> int:
        """The exit code that says so."""
        return self.verdict.code

    def to_dict(self) -> dict[str, Any]:
        """The report as its schema has it."""
        return {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "boots": [boot.to_dict() for boot in self.boots],
        }

    def to_json(self) -> str:
        """The report for programs."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=True) + "\n"

    def to_junit(self) -> str:
        """The report for CI: a suite for each boot, a case for each check; what is unknown is an error there."""
        totals = _totals(self.boots)
        del totals["skipped"]  # Jenkins' schema allows it for a suite, and not for all of them
        root = ElementTree.Element("testsuites", {"name": SCHEMA} | totals)
        for boot in self.boots:
            suite = ElementTree.SubElement(root, "testsuite", {"name": boot.name} | _totals([boot]))
            for check in boot.checks:
                _add_case(suite, boot, check)
            ElementTree.SubElement(suite, "system-out").text = printable(tail(boot.console, CONSOLE_IN_JUNIT))
            ElementTree.SubElement(suite, "system-err").text = printable(tail(boot.log, CONSOLE_IN_JUNIT))
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"

    def write(self, directory: Path, *, page: Callable[[], object] | None = None) -> Path:
        """Put the report and its evidence into `directory`; each file is whole or not there.

        `page` draws what people look at, from the evidence that then lies there. report.json comes last, and an older
        one goes first: where it is, the rest is too, and belongs to it.
        """
        home = directory
        home.mkdir(parents=True, exist_ok=True)
        (home / REPORT).unlink(missing_ok=True)
        for boot in self.boots:
            place = home / boot.name
            place.mkdir(exist_ok=True)
            write_whole(place / "command.txt", boot.command_text().encode(errors="surrogateescape"))
            for source in (boot.console, boot.log):
                _copy(source, place / source.name)
        with _open(home / "console.log") as all_consoles:
            for boot in self.boots:
                all_consoles.write(f"=== {boot.name}: {boot.verdict} ===\n".encode())
                _pour(boot.console, all_consoles)
                all_consoles.write(b"\n")
        write_whole(home / "junit.xml", self.to_junit().encode())
        if page is not None:
            page()
        write_whole(home / REPORT, self.to_json().encode())
        return home / REPORT


# --- Text from a guest --------------------------------------------------------------------------------------------

_ESCAPES: Final = re.compile(
    r"\x1b\[[0-?]{0,32}[ -/]{0,8}[@-~]"  # colours, cursor movement
    r"|\x1b\][^\x07\x1b]{0,256}(?:\x07|\x1b\\)"  # window titles
    r"|\x1b[ -/]{0,4}[0-Z\\^-~]"  # the rest
)
_CONTROLS: Final = re.compile(r"[^\t\n\x20-\x7e\xa0-\ud7ff\ue000-\ufffd]")


def printable(data: bytes | str) -> str:
    """What a guest wrote, harmless for terminals and XML: no escape sequences, other controls spelled out."""
    text = data.decode(errors="replace") if isinstance(data, bytes) else data
    text = _ESCAPES.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def tail(path: Path, size: int) -> bytes:
    """The last `size` bytes of a file; nothing if there is no such file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read(size)
    except OSError:
        return b""


# --- JUnit ----------------------------------------------------------------------------------------------------------


def _totals(boots: Iterable[SmokeReport]) -> dict[str, str]:
    boots = list(boots)
    verdicts = [check.verdict for boot in boots for check in boot.checks]
    return {
        "tests": str(len(verdicts)),
        "failures": str(verdicts.count(Verdict.failed)),
        "errors": str(verdicts.count(Verdict.unknown)),
        "skipped": str(verdicts.count(Verdict.skipped)),
        "time": f"{sum(boot.seconds for boot in boots):.3f}",
    }


def _add_case(suite: ElementTree.Element, boot: SmokeReport, check: Check) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=f"smoke.{boot.name}", name=check.name, time=f"{check.seconds:.3f}"
    )
    if check.verdict is Verdict.passed:
        return
    if check.verdict is Verdict.skipped:
        ElementTree.SubElement(case, "skipped", message=printable(check.detail))
        return
    kind = "failure" if check.verdict is Verdict.failed else "error"
    said = ElementTree.SubElement(case, kind, message=printable(check.detail), type=check.verdict)
    if boot.cause:
        lines = (boot.cause.sentence, boot.cause.line, boot.cause.hint)
        said.text = printable("\n".join(line for line in lines if line))


# --- Files ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    with writing(path) as descriptor, os.fdopen(descriptor, "wb", closefd=False) as file:
        yield file


def _copy(source: Path, target: Path) -> None:
    if target.exists() and source.exists() and target.samefile(source):
        return
    with _open(target) as file:
        _pour(source, file)


def _pour(source: Path, sink: IO[bytes]) -> None:
    if not source.exists():  # the VMM did not come so far
        return
    with source.open("rb") as file:
        shutil.copyfileobj(file, sink, 1 << 20)
