"""What came of booting: verdicts, checks and the evidence, for people, for CI (JUnit) and for programs (JSON)."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final
from xml.etree import ElementTree

from osbuild.output import write_whole, writing
from osbuild.runtime.accel import Accel

SCHEMA: Final = "osbuilder.smoke"
SCHEMA_VERSION: Final = 1  # a field may be added within a version, never changed or taken away
# Devices with a partner that lives as long as the boot: an open file, another program.
_ONCE: Final = ("vhost-vsock-", "vhost-user-vsock-", "socket,id=vsock,")
CONSOLE_IN_JUNIT: Final = 16 * 1024  # bytes of a console's end; the whole of it lies beside the report

_CODES: Final[Mapping[str, int]] = {"passed": 0, "failed": 6, "unknown": 7}


class Verdict(enum.StrEnum):
    """What may be said of a guest. Silence is `unknown`: neither good nor bad."""

    passed = enum.auto()
    failed = enum.auto()
    unknown = enum.auto()

    @property
    def code(self) -> int:
        """The exit code of a command that ends with this verdict."""
        return _CODES[self]

    @classmethod
    def over(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """One for many: a single failure fails them all, and nothing at all is not a success."""
        found = set(verdicts)
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """Why a guest did not do what it should: the line that shows it, and what to do."""

    name: str
    sentence: str
    line: str = ""
    hint: str = ""
    certain: bool = True  # something was seen that shows it; otherwise it is only what silence allows to say


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
            "command": list(self.command),
            "console": f"{self.name}/{self.console.name}",
            "log": f"{self.name}/{self.log.name}",
        }

    def command_text(self) -> str:
        """A shell script that boots the same again, its console on the terminal, nobody speaking to the agent."""
        words = list(self.command)
        for place in range(len(words) - 1, 0, -1):
            if words[place].startswith(_ONCE):
                del words[place - 1 : place + 1]
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

    def to_json(self) -> str:
        """The report for programs."""
        whole = {
            "schema": SCHEMA,
            "version": SCHEMA_VERSION,
            "verdict": self.verdict,
            "boots": [boot.to_dict() for boot in self.boots],
        }
        return json.dumps(whole, indent=2, ensure_ascii=True) + "\n"

    def to_junit(self) -> str:
        """The report for CI: a suite for each boot, a case for each check; what is unknown is an error there."""
        root = ElementTree.Element("testsuites", {"name": SCHEMA} | _totals(self.boots))
        for boot in self.boots:
            suite = ElementTree.SubElement(root, "testsuite", {"name": boot.name} | _totals([boot]))
            for check in boot.checks:
                _add_case(suite, boot, check)
            ElementTree.SubElement(suite, "system-out").text = printable(tail(boot.console, CONSOLE_IN_JUNIT))
            ElementTree.SubElement(suite, "system-err").text = printable(tail(boot.log, CONSOLE_IN_JUNIT))
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"

    def write(self, directory: Path) -> Path:
        """Put the report and its evidence into `directory`; each file is whole or not there."""
        home = directory
        home.mkdir(parents=True, exist_ok=True)
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
        write_whole(home / "report.json", self.to_json().encode())  # last: where it is, the rest is too
        return home / "report.json"


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
        "skipped": "0",
        "time": f"{sum(boot.seconds for boot in boots):.3f}",
    }


def _add_case(suite: ElementTree.Element, boot: SmokeReport, check: Check) -> None:
    case = ElementTree.SubElement(
        suite, "testcase", classname=f"smoke.{boot.name}", name=check.name, time=f"{check.seconds:.3f}"
    )
    if check.verdict is Verdict.passed:
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
