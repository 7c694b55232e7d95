"""What came of a build and its boots, as Markdown: for a job's summary, a merge request or a chat.

GitHub's kind of it, which GitLab shows as well: tables, and what is long folded away. Everything that a guest or an
image has said is text there: it draws no table, no heading and no picture.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from osbuild.console import size_text
from osbuild.errors import InputError
from osbuild.manifest import MANIFEST
from osbuild.oci import parse_json
from osbuild.report import printable, tail
from osbuild.report_page import Change, worse_line
from osbuild.tree import quote

_MARKS: Final = {"passed": "✅", "failed": "❌", "unknown": "❔", "skipped": "➖", "built": "✅", "unchanged": "✅"}
_CONSOLE_BYTES: Final = 8 << 10  # GitHub shows one MiB of summaries for a whole step
_SPECIAL: Final = re.compile(r"([\\`*_{}\[\]<>()#+!|~@&-])")


def markdown(report: Mapping[str, Any], home: Path) -> str:
    """A report.json, with the manifest beside its directory if there is one; `home` is the directory of the report."""
    lines = [f"## osbuilder: {_verdict(report['verdict'])}", ""]
    lines += _outputs(home.parent / MANIFEST)
    lines += _boots(report["boots"])
    for boot in report["boots"]:
        lines += _details(boot, home)
    return "\n".join(lines).rstrip() + "\n"


def markdown_of_matrix(path: Path) -> str:
    """A matrix.json: a row for each cell with the reason if it failed, and the indexes that name them."""
    where = quote(str(path))
    table = parse_json(path.read_bytes(), where)
    try:
        return "\n".join(_matrix(table)) + "\n"
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise InputError(f"{where} is damaged: {problem!r}", hint="osbuilder matrix makes another") from None


def _matrix(table: Mapping[str, Any]) -> Iterator[str]:
    cells = table["cells"]
    verdicts = [str(cell["verdict"]) for cell in cells]
    counts = ", ".join(f"{verdicts.count(verdict)} {escaped(verdict)}" for verdict in dict.fromkeys(verdicts))
    yield f"## osbuilder matrix: {counts}"
    yield ""
    rows = [
        (
            escaped(str(cell["name"])), _verdict(cell["verdict"]),
            f"{cell['seconds']:.2f} s" if cell["seconds"] else "",
            _short(cell["published"] or cell["digest"]), escaped(str(cell["note"] or cell["reason"])),
        )
        for cell in cells
    ]  # fmt: skip
    yield from _table(("cell", "verdict", "seconds", "digest", ""), rows, plain=True)
    if table["indexes"]:
        named = [(escaped(str(each["reference"])), _short(each["digest"])) for each in table["indexes"]]
        yield ""
        yield from _table(("index", "digest"), named, plain=True)
    if table.get("error"):
        yield ""
        yield f"The cells could not be named: {escaped(str(table['error']))}"


def _short(digest: object) -> str:
    found = re.sub(r"[^0-9a-f]", "", str(digest).removeprefix("sha256:"))[:12]
    return f"`{found}`" if found else ""


def markdown_of(changes: Sequence[Change]) -> str:
    """Two reports beside each other, as `osbuilder report A B` compares them."""
    rows = [(one.boot, one.what, one.before, one.after, "worse" if one.worse else "") for one in changes]
    lines = [*_table(("boot", "what", "before", "after", ""), rows)]
    worse = worse_line(changes)
    return "\n".join([*lines, *(["", escaped(worse)] if worse else [])]) + "\n"


def escaped(text: str) -> str:
    """Text that Markdown takes as it is: one line, no markup, no mention of anybody."""
    return _SPECIAL.sub(r"\\\1", " ".join(printable(text).split()))


def fenced(text: str) -> list[str]:
    """Lines that are shown as they are: the fence is longer than any that they hold."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [fence, *text.rstrip("\n").split("\n"), fence]


def _verdict(verdict: object) -> str:
    return f"{_MARKS.get(str(verdict), '')} {escaped(str(verdict))}".strip()


def _outputs(path: Path) -> Iterator[str]:
    """Every file that was made; nothing where no manifest lies, or none that can be read."""
    try:
        document = json.loads(path.read_bytes())
        rows = [
            (f"`{name}`", size_text(output["size"]), f"`{output['sha256'][:12]}`")
            for name, output in document["outputs"].items()
        ]
        made_of = f"Image `{document['image'][:19]}`, kernel {escaped(document['kernel']['release'])}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return
    yield f"{made_of}, {escaped(str(document.get('agent', '')))}."
    yield ""
    yield from _table(("output", "size", "sha256"), rows, plain=True)
    yield ""


def _boots(boots: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    rows = []
    for boot in boots:
        passed = sum(check["verdict"] == "passed" for check in boot["checks"])
        skipped = sum(check["verdict"] == "skipped" for check in boot["checks"])
        answered = next((event["seconds"] for event in boot["timeline"] if event["name"] == "agent answered"), None)
        rows.append(
            (
                escaped(str(boot["name"])), _verdict(boot["verdict"]), escaped(str(boot["accel"]["name"])),
                "" if answered is None else f"{answered:.2f} s", f"{boot['seconds']:.2f} s",
                f"{passed} of {len(boot['checks']) - skipped}",
            )
        )  # fmt: skip
    yield from _table(("boot", "verdict", "accel", "answered", "in all", "checks"), rows, plain=True)


def _details(boot: Mapping[str, Any], home: Path) -> Iterator[str]:
    """Why a guest did not pass, and the end of what it said."""
    if boot["verdict"] == "passed":
        return
    yield ""
    yield f"### {escaped(str(boot['name']))}: {escaped(str(boot['reason']))}"
    yield ""
    if cause := boot.get("cause"):
        if cause.get("line"):
            yield from fenced(printable(str(cause["line"])))
            yield ""
        if cause.get("hint"):
            yield f"What to do: {escaped(str(cause['hint']))}"
            yield ""
    for check in boot["checks"]:
        if check["verdict"] not in ("passed", "skipped"):
            yield f"* {escaped(str(check['name']))}: {_verdict(check['verdict'])} {escaped(str(check['detail']))}"
    said = printable(tail(home / str(boot["console"]), _CONSOLE_BYTES))
    if said.strip():
        yield ""
        yield "<details><summary>the end of the console</summary>"
        yield ""
        yield from fenced(said)
        yield ""
        yield "</details>"


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], *, plain: bool = False) -> Iterator[str]:
    """A table; cells that are Markdown already are `plain`."""
    yield f"| {' | '.join(names)} |"
    yield f"|{' --- |' * len(names)}"
    for row in rows:
        yield f"| {' | '.join(cell if plain else escaped(cell) for cell in row)} |"
