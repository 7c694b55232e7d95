"""What the commands print for people: the same facts as their JSON, in lines that fit the terminal."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from osbuild import console
from osbuild.checks import ON_REQUEST, WALK
from osbuild.errors import SpecError
from osbuild.output import writing
from osbuild.replacing import check_replaceable

if TYPE_CHECKING:  # what is slow to import is imported by the command that needs it
    from osbuild.agent_binary import AgentBinary
    from osbuild.artifacts import File
    from osbuild.doctor import Finding
    from osbuild.housekeeping import CacheItem
    from osbuild.kernel_cost import Costs
    from osbuild.pipeline import Build
    from osbuild.report import Call, Report, SmokeReport
    from osbuild.rootfs import Explained

_NOT_WISHED: Final = "not wished"
_CAME_TO: Final = {
    "passed": ", and every guest passed", "failed": ", but a guest failed", "unknown": ", but a guest was silent",
}  # fmt: skip
_BAR_CHARACTERS, _SHADES = 40, "░█▒▓"  # of a timeline: all of it, and one part after the other
_KEY_CHARACTERS: Final = 12  # of a digest: enough to tell things apart, as Docker shows them


# --- rootfs --explain -----------------------------------------------------------------------------------------------


def print_rules(rules: Sequence[Explained]) -> None:
    """What was changed first and in full; then, in a line each, the rules that had nothing to do."""
    lines: list[str] = []
    for rule in rules:
        if _paths(rule):
            note = f" [{rule.note}]" if rule.note else ""
            lines += console.fold(f"{rule.name}: {rule.why}{note}", hanging="    ")
            for sign, text in _paths(rule):
                lines += console.fold(f"{sign} {text}", indent="    ", hanging="      ")
    idle = [rule for rule in rules if not _paths(rule)]
    wished = [rule.name for rule in idle if not rule.applied and rule.note == _NOT_WISHED]
    rest = [rule for rule in idle if not rule.applied and rule.note != _NOT_WISHED]
    right = [f"{rule.name} ({rule.note})" if rule.note else rule.name for rule in idle if rule.applied]
    for title, names in (
        ("as it should be already", right),
        ("not asked for", wished),
        ("not for this image", [f"{rule.name} ({rule.note})" for rule in rest]),
    ):
        if names:
            lines += console.fold(f"{title}: {', '.join(names)}", hanging="    ")
    console.print_lines(lines)


def _paths(rule: Explained) -> list[tuple[str, str]]:
    from osbuild.listing import spell

    found = []
    for sign, change in (("+", rule.added), ("~", rule.changed), ("-", rule.removed)):
        rest = change.count - len(change.first)
        if change.count:
            found.append((sign, " ".join(map(spell, change.first)) + (f" and {rest} more" if rest else "")))
    return found


# --- rootfs --tar ---------------------------------------------------------------------------------------------------


def check_tar(out: Path, *, force: bool) -> None:
    """What can be said before any work whether a tar may go there."""
    if str(out) != "-" and not _is_stream(out):
        check_replaceable(out, "tar", force=force)


def write_tar(out: Path, pieces: Iterable[bytes]) -> None:
    """A tar into a file, whole or not at all; into a device or a pipe as it comes; - is standard output."""
    if str(out) == "-":
        console.print_bytes(pieces)
        return
    if _is_stream(out):
        with out.open("wb") as stream:
            if stream.isatty():
                raise SpecError("this would fill the terminal with bytes", hint="send it to a file or a program")
            stream.writelines(pieces)
        return
    with writing(out) as descriptor, os.fdopen(descriptor, "wb", closefd=False) as file:
        file.writelines(pieces)


def _is_stream(out: Path) -> bool:
    """A device or a pipe: written to where it is, and never replaced."""
    try:
        kind = out.stat().st_mode
    except OSError:
        return False
    return stat.S_ISCHR(kind) or stat.S_ISFIFO(kind)


# --- build and smoke ------------------------------------------------------------------------------------------------


def print_build(result: Build, show: console.Show) -> None:
    """Every output, what it took, and how its guest fared."""
    verdicts = {boot.name: str(boot.verdict) for boot in result.report.boots} if result.report else {}
    steps = {"rootfs.img": "image", "initrd.img": "initrd", "vmlinux": "kernel"}
    rows = []
    for name, output in result.manifest["outputs"].items():
        step = steps.get(name, "")
        seconds = f"{show.seconds[step]:.2f}" if step in show.seconds else ""
        rows.append((name, console.size_text(output["size"]), output["sha256"][:12], seconds, verdicts.get(step, "")))
    came_to = _CAME_TO[result.report.verdict] if result.report else "; nothing was booted"
    title = f"built in {result.out}{came_to}"
    console.print_table(title, ("output", "size", "sha256", "seconds", "verdict"), rows)
    if result.report:
        print_boots(result.report, result.out)


def print_boots(report: Report, out: Path) -> None:
    """Every boot in a line; below it why it did not pass, and where to look."""
    rows = []
    for boot in report.boots:
        passed = sum(check.verdict == "passed" for check in boot.checks)
        skipped = sum(check.verdict == "skipped" for check in boot.checks)
        answered = next((f"{event.seconds:.2f}" for event in boot.timeline if event.name == "agent answered"), "")
        checks = f"{passed} of {len(boot.checks) - skipped}" + (f", {skipped} skipped" if skipped else "")
        rows.append((boot.name, boot.accel.name, answered, f"{boot.seconds:.2f}", checks, str(boot.verdict)))
    console.print_table("smoke test", ("boot", "accel", "answered", "seconds", "checks", "verdict"), rows)
    console.print_table("timeline, on one scale", ("boot", "", "seconds of"), timelines(report.boots))
    lines: list[str] = []
    for reason in dict.fromkeys(boot.accel.reason for boot in report.boots if "disguise" in boot.accel.reason):
        lines += console.fold(f"emulated: {reason}", hanging="  ")
    for boot in report.boots:
        evidence = out / "smoke" / boot.name / boot.console.name
        quoted = shlex.quote(str(evidence.with_name("command.txt")))
        print_calls(boot)
        for check in boot.checks:
            if check.name in ON_REQUEST and check.name != WALK and check.verdict in ("passed", "skipped"):
                lines += console.fold(f"{boot.name}: {check.name}: {check.detail}", hanging="  ")
        if boot.verdict != "passed":
            lines += console.fold(f"{boot.name}: {boot.reason}", hanging="  ")
            if boot.cause is not None and boot.cause.hint:
                lines += console.fold(f"hint: {boot.cause.hint}", indent="  ", hanging="  ")
            waited = boot.verdict == "unknown" and boot.cause is not None and not boot.cause.certain
            more = "; --timeout SECONDS gives more time" if waited else ""
            lines += console.fold(f"console: {evidence}{more}", indent="  ", hanging="  ")
        lines.append(f"{boot.name} again, with its console here: sh {quoted}")
    console.print_lines(lines)


def timelines(boots: Sequence[SmokeReport]) -> list[tuple[str, str, str]]:
    """Of each boot a bar as long as it took, and what the guest was busy with."""
    from osbuild.report import phases

    longest = max((boot.seconds for boot in boots), default=0.0) or 1.0
    rows = []
    for boot in boots:
        found = list(phases(((event.name, event.seconds) for event in boot.timeline), boot.seconds))
        ends = [round(end / longest * _BAR_CHARACTERS) for _, _, end in found]
        parts = [end - begin for begin, end in itertools.pairwise([0, *ends])]
        bar = "".join(_SHADES[number % len(_SHADES)] * part for number, part in enumerate(parts))
        words = [f"{label} {end - begin:.2f}" for label, begin, end in found]
        rows.append((boot.name, bar, ", ".join(words)))
    return rows


def print_calls(boot: SmokeReport) -> None:
    """Every step of a walk in a line; below them why some did not pass."""
    if not boot.calls:
        return
    columns = ("call", "about", "ms", "seconds", "verdict")
    console.print_table(f"{boot.name}: every call of the agent", columns, walk_table(boot.calls))
    reasons: dict[tuple[str, str], list[Call]] = {}
    for call in boot.calls:
        if call.verdict != "passed":
            reasons.setdefault((call.verdict, call.detail), []).append(call)
    lines: list[str] = []
    for (verdict, detail), calls in reasons.items():
        first, more = calls[0], f" and {len(calls) - 1} more" if len(calls) > 1 else ""
        name = first.call.rpartition("/")[2]
        lines += console.fold(f"{verdict}: {name}, {first.about}{more}: {detail}", hanging="  ")
    console.print_lines(lines)


def walk_table(calls: Sequence[Call]) -> list[tuple[str, ...]]:
    """Each step: the call without its service, milliseconds of the call itself, seconds of all that the step took."""
    return [
        (
            call.call.rpartition("/")[2], call.about, f"{call.call_seconds * 1000:.1f}" if call.calls else "",
            f"{call.seconds:.2f}" if call.seconds else "", call.verdict,
        )
        for call in calls
    ]  # fmt: skip


# --- doctor ---------------------------------------------------------------------------------------------------------


def print_findings(findings: Sequence[Finding]) -> None:
    """What is here and what is missing, by what it is for; a path is never split."""
    states = max(len(finding.state) for finding in findings)
    names = max(len(finding.name) for finding in findings if finding.name != finding.detail)
    lines: list[str] = []
    for purpose in dict.fromkeys(finding.purpose for finding in findings):
        lines.append(purpose)
        for finding in findings:
            if finding.purpose == purpose:
                detail = "" if finding.detail == finding.name else finding.detail
                head = f"  {finding.state:{states}}  {finding.name:{names}}  "
                lines += console.fold(detail, indent=head, hanging=" " * (states + 6))
    missing = [finding.name for finding in findings if finding.state == "missing"]
    lines.append(f"missing: {', '.join(missing)}" if missing else "all that is needed is here")
    console.print_lines(lines)


# --- agent version ---------------------------------------------------------------------------------------------------


def print_agent(found: AgentBinary) -> None:
    """What a program is, a fact in a line."""
    from osbuild.listing import spell

    facts = {
        "agent": " ".join(dict.fromkeys((found.name, found.version))),  # "unknown" once
        "architecture": found.arch,
        "needs": found.interpreter or "nothing: it is static",
        "protocol": found.protocol,
    }
    lines = [f"{name:14}{spell(value)}" for name, value in facts.items()]
    for index, how in enumerate(found.evidence):
        lines += console.fold(how, indent=f"{'' if index else 'seen':14}", hanging=" " * 14)
    console.print_lines(lines)


# --- kernel cost -----------------------------------------------------------------------------------------------------


def print_costs(found: Costs) -> None:
    """A row for each fragment, and the whole."""
    rows = [
        (
            cost.name, str(cost.objects), console.size_text(cost.bytes),
            f"{cost.seconds:.1f}" + (f" + {cost.unmeasured} not measured" if cost.unmeasured else ""),
            str(cost.symbols), ", ".join(Path(name).name for name in cost.largest[:3]),
        )
        for cost in (*found.fragments, found.whole)
    ]  # fmt: skip
    columns = ("without it, less of", "objects", "size", "seconds", "settings", "largest")
    console.print_table("What each fragment costs", columns, rows)


# --- cache ----------------------------------------------------------------------------------------------------------


def print_cache(root: Path, items: Sequence[CacheItem], *, everything: bool) -> None:
    """What is in the cache, in the words of those who put it there; locks and logs are only counted."""
    if not items:
        console.print_lines([f"{root}: nothing is kept there" if root.is_dir() else f"{root}: there is no cache yet"])
        return
    shown = [item for item in items if everything or not _minor(item)]
    lines = [f"{root}: {console.size_text(sum(item.size for item in items))}"]
    for item in shown:
        head = f"{item.kind:10}  {console.size_text(item.size):>10}  {console.age_text(item.used):>10}  "
        about = f"  {item.about}" if item.about else ""
        lines += console.fold(f"{short(item.key)}{about}{', in use' * item.in_use}", indent=head, hanging=" " * 38)
    lines += _counted(item.kind for item in items if item not in shown)
    console.print_lines(lines)


def _minor(item: CacheItem) -> bool:
    return item.kind in ("lock", "log") or item.path.parent.name == "logs"


def name(item: CacheItem) -> str:
    """A thing in the cache, in a few words."""
    return f"{item.kind} {short(item.key)}" + (f" ({item.about})" if item.about else "")


def short(key: str) -> str:
    """A key with its digests cut as Docker cuts them; whole ones are in the JSON."""
    return re.sub(r"[0-9a-f]{16,}", lambda match: match[0][:_KEY_CHARACTERS], key)


def _counted(kinds: Iterable[str]) -> list[str]:
    counts = [f"{count} {kind}{'s' * (count > 1)}" for kind, count in sorted(Counter(kinds).items())]
    return [f"besides: {', '.join(counts)}; --all lists them"] if counts else []


def print_file(file: File, about: Mapping[str, object], *, as_json: bool) -> None:
    """One file that was made."""
    if as_json:
        console.print_json({**file.to_dict(), **about})
    else:
        console.print_lines([f"{file.path}  {console.size_text(file.size)}  sha256:{file.sha256}"])
