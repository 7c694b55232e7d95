"""Two troubles in one guest, and trouble amid what healthy guests say: never a wrong cause that is certain."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osbuild import autopsy
from osbuild.autopsy import Evidence
from osbuild.causes import GUEST, HALF_THERE
from osbuild.last_words import End
from osbuild.report import Cause, printable
from tests import noise, recordings
from tests.injections import INJECTIONS, Injection

GUESTS = [one for one in INJECTIONS if recordings.read(one.name).console]
NEAR = {row.name for row in GUEST if row.near}
# What is said of init's end, and always true.
PLAIN = {"init-exited", "init-crashed", "agent-crashed"}
# Which of two on the way to a root, or to an init, was first may be asked only of these.
ROOT = {
    "image-short", "dax-unsupported", "pmem-alignment", "verity", "initrd-memory", "initrd-compression",
    "initrd-damaged", "mount-options", "filesystem-damaged", "init-missing", "partition-table", "root-driver",
    "root-missing", "filesystem-unsupported", "root-filesystem",
}  # fmt: skip
START = {"init-not-executable", "init-architecture", "init-interpreter", "init-missing", "init-not-runnable"}


# What ends the waiting for an agent; a service that died is told before an agent that listens elsewhere.
SYSTEMD = {"unit-missing", "unit-masked", "agent-crashed", "systemd-stuck"}
UNHEARD = {"agent-deaf", "serial-missing", "vsock-missing"}


@functools.cache
def left(name: str) -> tuple[Evidence, Cause]:
    evidence = recordings.read(name)
    return evidence, autopsy.explain(evidence)


def with_lines(evidence: Evidence, lines: list[str]) -> Evidence:
    return dataclasses.replace(evidence, console="".join(f"{line}\n" for line in lines))


def shown_at(lines: list[str], line: str) -> int:
    return next((index for index, one in enumerate(lines) if line and line in one), len(lines))


def places(lines: list[str], line: str, *, by_kernel: bool) -> list[int]:
    """Where it may stand: the kernel's before it ends; userland's when there is one, and not where it hides why."""
    end = noise.ends_at(lines)
    if by_kernel:
        stop = min(end, len(lines) - 1)
        wanted = [12, stop // 2, shown_at(lines, line), noise.init_at(lines), stop]
        return sorted({at for at in wanted if 12 <= at <= stop})
    begin, shown = noise.init_at(lines), shown_at(lines, line)
    if begin == len(lines):
        return []
    return sorted({at for at in (begin, (begin + shown) // 2, shown, end) if begin <= at <= min(shown, end)})


def turn(name: str, choices: list[int]) -> list[int]:
    """One of them, by a name: all of them, over many names."""
    return [choices[zlib.crc32(name.encode()) % len(choices)]] if choices else []


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("injected", GUESTS, ids=lambda one: one.name)
def test_what_healthy_guests_say_changes_no_cause(injected: Injection, everywhere: bool) -> None:
    evidence, cause = left(injected.name)
    lines = evidence.console.splitlines()
    for by_kernel, sayings in ((True, noise.KERNEL), (False, noise.USERLAND)):
        for name, said in sayings.items():
            if noise.SAME.get(name) == injected.cause:
                continue  # that is no noise
            choices = places(lines, cause.line, by_kernel=by_kernel)
            for at in choices if everywhere else turn(injected.name + name, choices):
                changed = with_lines(evidence, noise.put(lines, at, said, by_kernel=by_kernel))
                now = autopsy.explain(changed)
                quoted = name == noise.QUOTE and not now.certain  # times that begin anew: nothing is certain any more
                assert now.certain is cause.certain or quoted, (name, at, now)
                assert now.name == cause.name or not now.certain, (name, at, now)


@pytest.mark.parametrize("injected", INJECTIONS, ids=lambda one: one.name)
def test_what_a_vmm_warns_of_changes_no_cause(injected: Injection) -> None:
    evidence, cause = left(injected.name)
    for name, said in noise.VMM.items():
        for log in (f"{said}\n{evidence.log}", f"{evidence.log}{said}\n"):
            now = autopsy.explain(dataclasses.replace(evidence, log=log))
            assert (now.name, now.certain) == (cause.name, cause.certain), name


def good(name: str) -> list[str]:
    return autopsy.console_text(recordings.HOME / f"{name}.log").splitlines()


def sayings() -> Iterator[tuple[str, bool]]:
    for by_kernel, table in ((True, noise.KERNEL), (False, noise.USERLAND)):
        for said in table.values():
            yield said, by_kernel
    for said in noise.SYSTEMD.values():
        yield said, False


@pytest.mark.parametrize("recording", ["passed-image", "passed-initrd"])
@pytest.mark.parametrize(("status", "stopped"), [(0, False), (None, True), (-9, True)])
def test_a_healthy_guest_is_never_certainly_ill(recording: str, status: int | None, stopped: bool) -> None:
    lines = good(recording)
    lines = lines if status == 0 else lines[: shown_at(lines, '"msg":"powering off"')]
    for said, by_kernel in sayings():
        end = min(noise.ends_at(lines), len(lines))
        for at in {13 if by_kernel else noise.init_at(lines), noise.init_at(lines), end - 1, end}:
            changed = noise.put(lines, at, said, by_kernel=by_kernel)
            cause = autopsy.explain(with_lines(Evidence(console="", status=status, stopped=stopped), changed))
            assert cause.name in ("powered-off", "restarted") or status != 0, (said, at, cause)
            assert cause.certain is (status == 0), (said, at, cause)


@pytest.mark.parametrize("said", [*noise.VMM.values(), ""])
def test_a_guest_that_nobody_saw_and_that_ended_rightly_has_no_certain_cause(said: str) -> None:
    """Its console may be another; a panic resets it, and that is all."""
    assert not autopsy.explain(Evidence(console="", log=f"{said}\n", status=0, memory_mib=256, kernel_mib=21)).certain


# --- Two troubles -----------------------------------------------------------------------------------------------------


def symptom(name: str) -> str:
    """The line of a cause, unless it is an end of its own."""
    _, cause = left(name)
    row = next((row for row in GUEST if row.name == cause.name), None)
    ends = "Kernel panic" in cause.line or "reboot: " in cause.line or "VFS: " in cause.line
    return "" if row is None or ends else noise.STAMP.sub("", cause.line, count=1)


SYMPTOMS = {one.name: said for one in GUESTS if (said := symptom(one.name))}


def may_be_first(one: str, other: str) -> bool:
    """Whether the second may have been the first to be fatal."""
    by_systemd = other in SYSTEMD and one in SYSTEMD | UNHEARD
    return by_systemd or {one, other} <= ROOT | START


@pytest.mark.parametrize("everywhere", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("injected", GUESTS, ids=lambda one: one.name)
def test_a_line_of_another_trouble_is_not_certainly_the_cause(injected: Injection, everywhere: bool) -> None:
    evidence, cause = left(injected.name)
    lines = evidence.console.splitlines()
    end = evidence.read.end[0]
    for name, said in SYMPTOMS.items():
        _, other = left(name)
        begin = noise.init_at(lines) if "systemd" in said else 0
        choices = [at for at in places(lines, cause.line, by_kernel=True) if at >= begin]
        for at in choices if everywhere else turn(injected.name + name, choices):
            now = autopsy.explain(with_lines(evidence, noise.put(lines, at, said, by_kernel=True)))
            hidden = now.name in PLAIN and cause.name in NEAR
            fine = (
                hidden or now.name == cause.name or not now.certain or (now.name == other.name and end is not End.left)
            )
            assert fine, (name, at, now, cause.name)
            if now.certain and now.name != cause.name and not hidden:
                near = end is End.init and other.name in NEAR and cause.name in PLAIN
                silent = end is End.unsaid and not evidence.over and other.name in HALF_THERE
                assert near or silent or may_be_first(cause.name, other.name), (name, at, now, cause.name)


DYING = [one for one in GUESTS if left(one.name)[0].panicked and left(one.name)[1].certain]


@pytest.mark.parametrize("later", DYING, ids=lambda one: one.name)
def test_of_two_panics_the_first_is_told(later: Injection) -> None:
    """What one says of its end, where the other came before."""
    second = left(later.name)[0].console.splitlines()
    for first in DYING[DYING.index(later) % 7 :: 7]:
        evidence, cause = left(first.name)
        lines = evidence.console.splitlines()
        tail = "\n".join(noise.STAMP.sub("", line) for line in second[noise.ends_at(second) :] if line.strip())
        now = autopsy.explain(with_lines(evidence, noise.put(lines, len(lines), tail, by_kernel=True)))
        assert now.name == cause.name or not now.certain, (first.name, now)


ENDED = [one for one in GUESTS if left(one.name)[0].read.end[0] is not End.unsaid and left(one.name)[1].certain]


@pytest.mark.parametrize("injected", ENDED, ids=lambda one: one.name)
def test_an_oops_that_a_guest_survived_makes_no_later_end_of_it_less_certain(injected: Injection) -> None:
    evidence, cause = left(injected.name)
    lines = evidence.console.splitlines()
    early, late = 15, noise.ends_at(lines)
    for at in {early, (early + late) // 2} if early < late else {late}:
        now = autopsy.explain(with_lines(evidence, noise.put(lines, at, noise.OOPS, by_kernel=True)))
        assert (now.name, now.certain) == (cause.name, True), at


@pytest.mark.parametrize("process", [1, 60])
@pytest.mark.parametrize(
    ("later", "by_kernel"),
    [("app: PID: 1 is init\nCPU: 0 PID: 1 Comm: app", False), (noise.STALL, True), (noise.LOCKUP, True)],
    ids=["quoted", "a stall", "a lockup"],
)
def test_an_oops_is_why_init_died_only_when_the_oops_was_inits(process: int, later: str, by_kernel: bool) -> None:
    """What others say of a process 1 later, and what the kernel says of it in other traces, is not of the oops."""
    evidence, cause = left("init-exits")
    lines, oops = evidence.console.splitlines(), noise.OOPS.replace("PID: 60 ", f"PID: {process} ")
    at = noise.ends_at(lines)
    lines = noise.put(noise.put(lines, at, later, by_kernel=by_kernel), at, oops, by_kernel=True)
    now = autopsy.explain(with_lines(evidence, lines))
    assert (now.name, now.certain) == ("oops" if process == 1 else cause.name, True)


# --- Any mixture ------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_mixture_of_what_healthy_guests_say_makes_another_cause_certain(data: st.DataObject) -> None:
    injected = data.draw(st.sampled_from(GUESTS))
    evidence, cause = left(injected.name)
    lines = evidence.console.splitlines()
    for said, by_kernel in data.draw(st.lists(st.sampled_from(list(sayings())), min_size=1, max_size=8)):
        end = min(noise.ends_at(lines), len(lines) - 1)
        low = 12 if by_kernel else noise.init_at(lines)
        if low <= end:
            lines = noise.put(lines, data.draw(st.integers(low, end)), said, by_kernel=by_kernel)
    now = autopsy.explain(with_lines(evidence, lines))
    hidden = now.name in PLAIN and cause.name in NEAR
    assert now.name == cause.name or not now.certain or hidden, now


@given(data=st.data())
@settings(max_examples=100, deadline=None, derandomize=True)
def test_a_console_cut_anywhere_of_a_guest_that_was_stopped_is_certain_of_nothing_else(data: st.DataObject) -> None:
    injected = data.draw(st.sampled_from(GUESTS))
    evidence, cause = left(injected.name)
    lines = evidence.console.splitlines()
    cut = lines[: data.draw(st.integers(0, len(lines)))]
    silent = dataclasses.replace(evidence, status=None, stopped=True, given_up=False, flooded=False, over_kernel=0)
    now = autopsy.explain(with_lines(silent, cut))
    assert not now.certain or now.name == cause.name, now


@given(text=st.text(max_size=200), at=st.integers(0, 200))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_the_kernel_writes_into_the_middle_of_anybodys_line(text: str, at: int) -> None:
    evidence, cause = left("init-exits")
    words = printable(text.encode(errors="replace")).replace("\n", " ").replace("[", "(")
    console = evidence.console.replace("[    ", f"{words[:at]}[    ").replace("\n", "\n", 1)
    head, _, tail = evidence.console.rpartition("\n[")  # only its last line but one
    head, _, panic = head.rpartition("\n")
    console = f"{head}\n{words}{panic}\n[{tail}"
    now = autopsy.explain(dataclasses.replace(evidence, console=console))
    assert (now.name, now.certain) == (cause.name, cause.certain)
