"""report.html: what came of booting, as one page that needs nothing else: no network, no script.

Made from report.json (its schema is in docs/report.md), the consoles beside it, and the image that was booted.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import inspection, manifest
from osbuild.console import size_text
from osbuild.errors import InputError, OsbuilderError
from osbuild.oci import parse_json
from osbuild.output import write_whole
from osbuild.report import SCHEMA, SCHEMA_VERSION, Verdict, phases, printable, tail
from osbuild.resources import render
from osbuild.subject import open_subject
from osbuild.tree import Tree, quote

PAGE: Final = "report.html"
_CONSOLE_BYTES: Final = 256 << 10  # of each boot, from its end; all of it lies beside the page
_DIRECTORIES: Final = 12
_TICKS: Final = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A part of a chart's line: where, how long, in percent of its width."""

    left: float
    width: float
    label: str
    kind: str  # a word for its colour
    value: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """An image: what lies where in it, and which directories are large."""

    name: str
    size: str
    layout: tuple[tuple[str, str, str], ...]  # offset, size, what
    bars: tuple[Bar, ...]
    directories: tuple[Bar, ...]
    problem: str = ""


def write_page(home: Path, report: Mapping[str, Any], images: Sequence[Path]) -> Path:
    """Write report.html into the directory of a report.json; `images` are the roots that were booted."""
    boots = [_boot(home, boot) for boot in report["boots"]]
    pictures = [picture(path) for path in images]
    text = render("report.html.j2", verdict=report["verdict"], boots=boots, pictures=pictures)
    write_whole(home / PAGE, text.encode(errors="replace"))
    return home / PAGE


def _boot(home: Path, boot: Mapping[str, Any]) -> dict[str, Any]:
    console = tail(home / str(boot["console"]), _CONSOLE_BYTES)
    return {
        **boot,
        "reason": printable(boot["reason"]),
        "bars": list(bars(boot)),
        "ticks": list(ticks(_length(boot))),
        "console": printable(console),
        "cut": len(console) == _CONSOLE_BYTES,
    }


# --- the timeline ---------------------------------------------------------------------------------------------------


def bars(boot: Mapping[str, Any]) -> Iterator[Bar]:
    """What a guest was busy with, one after the other; the first three together are how long it took to answer."""
    length = _length(boot)
    for label, begin, end in phases(((event["name"], event["seconds"]) for event in boot["timeline"]), length):
        yield Bar(
            left=100 * begin / length, width=100 * (end - begin) / length, label=label,
            kind=label.replace(" ", "-"), value=f"{end - begin:.2f} s",
        )  # fmt: skip


def ticks(length: float) -> Iterator[tuple[float, str]]:
    """Round numbers of seconds below a chart, with where they stand in percent."""
    step = _round(length / _TICKS)
    for number in range(int(length / step + 1e-9) + 1):
        yield 100 * number * step / length, f"{number * step:g}"


def _length(boot: Mapping[str, Any]) -> float:
    last = max((event["seconds"] for event in boot["timeline"]), default=0.0)
    return max(float(boot["seconds"]), float(last), 0.001)


def _round(value: float) -> float:
    """1, 2 or 5, and zeros: not less than the value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= value * (1 - 1e-9))


# --- images ---------------------------------------------------------------------------------------------------------


def picture(path: Path) -> Picture:
    """An image as it lies there now; what is wrong with it is said instead."""
    try:
        subject = open_subject(path)
        trees = [filesystem.volume.tree for filesystem in subject.filesystems]
        if subject.archive is not None:
            trees.append(subject.archive.tree)
        layout = inspection.stretches(subject)
    except (OsbuilderError, OSError) as problem:
        return Picture(name=path.name, size="", layout=(), bars=(), directories=(), problem=str(problem))
    size = subject.backing.size
    rows = tuple((f"{one.offset:,}", size_text(one.size), one.what) for one in layout)
    return Picture(
        name=path.name, size=size_text(size), layout=rows, bars=tuple(_places(layout, size)),
        directories=tuple(directories(trees)),
    )  # fmt: skip


def _places(layout: Sequence[inspection.Stretch], size: int) -> Iterator[Bar]:
    """To scale, but for what would be too thin to be seen."""
    for one in layout:
        yield Bar(
            left=100 * one.offset / size, width=max(100 * one.size / size, 0.4), label=one.what.partition(",")[0],
            kind="part" if one.size > 1 << 20 else "record", value=size_text(one.size),
        )  # fmt: skip


def directories(trees: Sequence[Tree]) -> Iterator[Bar]:
    """The largest directories of the second level, or of the first where there is no second."""
    sizes: Counter[str] = Counter()
    for tree in trees:
        for entry, names in tree.names().items():
            if entry.is_file:
                parts = names[0].split("/")
                sizes["/".join(parts[: min(3, len(parts) - 1)]) or "/"] += entry.content.size
    largest = sizes.most_common(_DIRECTORIES)
    rest = sum(sizes.values()) - sum(size for _, size in largest)
    most = max([rest, *(size for _, size in largest)])
    for path, size in largest:
        if size:
            yield _share(printable(path), size, most, "part")
    if rest:
        yield _share("all others", rest, most, "other")


def _share(label: str, size: int, most: int, kind: str) -> Bar:
    return Bar(left=0, width=100 * size / most, label=label, kind=kind, value=size_text(size))


# --- reports that are there already ---------------------------------------------------------------------------------


def read_report(path: Path) -> dict[str, Any]:
    """The report.json of a build's directory, of its smoke/, or itself; InputError for what is none of ours."""
    found = report_file(path)
    where = quote(str(found))
    try:
        document = parse_json(found.read_bytes(), where)
    except OSError as problem:
        raise InputError(
            f"there is no report at {where}: {problem.strerror}", hint="osbuilder smoke OUT makes one"
        ) from None
    if document.get("schema") != SCHEMA or document.get("version") != SCHEMA_VERSION:
        raise InputError(f"{where} is no report of osbuilder's, version {SCHEMA_VERSION}", hint="osbuilder smoke OUT")
    try:
        _check(document)
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise InputError(f"{where} is damaged: {problem!r}", hint="osbuilder smoke OUT makes another") from None
    return document


def _check(document: Mapping[str, Any]) -> None:
    """Raises what a reader of a damaged report would stumble over."""
    verdict_of(document)
    for boot in document["boots"]:
        _facts(boot)
        list(bars(boot))
        if not isinstance(boot["console"], str) or Path(boot["console"]).is_absolute() or ".." in boot["console"]:
            raise KeyError("console")


def verdict_of(report: Mapping[str, Any]) -> Verdict:
    """What the whole of a report comes to."""
    return Verdict(report["verdict"])


def not_passed(report: Mapping[str, Any]) -> list[str]:
    """A line for each guest that did not pass, with the reason."""
    return [
        printable(f"{boot['name']}: {boot['verdict']}: {boot['reason']}")
        for boot in report["boots"]
        if boot["verdict"] != Verdict.passed
    ]


def page_again(path: Path, report: Mapping[str, Any]) -> Path:
    """report.html beside a report.json, with the images of its build if they are there."""
    home = report_file(path).parent
    images = [home.parent / name for name in (manifest.NAMES["image"], manifest.NAMES["initrd"])]
    return write_page(home, report, [image for image in images if image.is_file()])


def report_file(path: Path) -> Path:
    """Where the report.json of a directory is or would be, or the file itself."""
    for candidate in (path / "smoke" / "report.json", path / "report.json"):
        if candidate.is_file():
            return candidate
    return path / "smoke" / "report.json" if path.is_dir() else path


# --- two reports ----------------------------------------------------------------------------------------------------

_VERDICT: Final = "verdict"
_SECONDS: Final = "seconds"
_NOT_BOOTED: Final = "not booted"
_NEVER: Final = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A row of a comparison. `before` is empty for what nobody looked at then."""

    boot: str
    what: str
    before: str
    after: str
    worse: bool


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """What differs between two reports: verdicts of boots, checks and calls, and how long each boot took to answer.

    A check that nobody asked for later says nothing, and is no row; a boot that is gone is one.
    """
    old, new = ({boot["name"]: boot for boot in report["boots"]} for report in (before, after))
    return [
        Change(boot=name, what=what, before=one, after=other, worse=one == "passed" != other)
        for name in dict.fromkeys((*old, *new))
        for what, one, other in _differing(old.get(name), new.get(name))
    ]


def worse_line(changes: Sequence[Change]) -> str:
    """Which of them are worse, in a line; empty when none is."""
    worse = [f"{one.boot}: {one.what}" for one in changes if one.worse]
    return f"{len(worse)} worse: {', '.join(worse)}" if worse else ""


def _differing(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> Iterator[tuple[str, str, str]]:
    """What, before and after, of one boot."""
    if old is None or new is None:
        one, other = (_NOT_BOOTED if boot is None else str(boot["verdict"]) for boot in (old, new))
        yield _VERDICT, one, other
        return
    a, b = _facts(old), _facts(new)
    for what in dict.fromkeys((*a, *b)):
        timed = what.startswith(_SECONDS)
        if not timed and what not in b:
            continue
        one, other = (facts.get(what, _NEVER if timed else "") for facts in (a, b))
        if one != other:
            yield what, one, other


def _facts(boot: Mapping[str, Any]) -> dict[str, str]:
    facts = {_VERDICT: str(boot["verdict"]), "reason": printable(str(boot["reason"]))}
    for event in boot["timeline"]:
        facts[f"{_SECONDS} until {event['name']}"] = f"{event['seconds']:.2f}"
    facts[f"{_SECONDS} in all"] = f"{boot['seconds']:.2f}"
    for check in boot["checks"]:
        facts[f"check {check['name']}"] = str(check["verdict"])
    for call in boot.get("calls", ()):
        facts[f"call {call['call'].rpartition('/')[2]}: {call['about']}"] = str(call["verdict"])
    return facts


def to_dict(changes: Sequence[Change]) -> list[dict[str, Any]]:
    """As JSON."""
    return [dataclasses.asdict(change) for change in changes]
