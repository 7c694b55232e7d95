"""--progress: what is said on standard error while a command works, for people and for programs."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from rich.console import Console

from osbuild import console, results
from osbuild.errors import SpecError
from osbuild.report import Event, SmokeReport, Verdict
from osbuild.runtime.accel import Accel
from tests.test_cli import run


def events(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def test_as_json_every_line_is_an_event_and_every_step_ends(capsys: pytest.CaptureFixture[str]) -> None:
    show = console.Show(progress="json")
    with show.step("make it", name="make") as step:
        step.note = "twice"
    with pytest.raises(ValueError, match="no"), show.step("lose it"):
        raise ValueError("no")
    with show.step("boot it") as step:
        step.bad = True
    show.say("a word")
    told = events(capsys.readouterr().err)
    assert [(event["event"], event.get("step"), event.get("ok")) for event in told] == [
        ("begin", "make it", None), ("end", "make it", True),
        ("begin", "lose it", None), ("end", "lose it", False),
        ("begin", "boot it", None), ("end", "boot it", False),
        ("said", None, None),
    ]  # fmt: skip
    assert told[1]["note"] == "twice"
    assert told[1]["seconds"] == round(show.seconds["make"], 3)


def test_as_json_how_far_a_step_is_is_told_at_most_once_a_second(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("osbuild.console.time.monotonic", lambda: now)
    with console.Show(progress="json").step("compile") as step:
        for number in range(1, 41):
            now += 0.1
            step.advance(number, 30)
    told = [event for event in events(capsys.readouterr().err) if event["event"] == "progress"]
    assert 3 <= len(told) <= 4
    assert all(event["done"] <= event["total"] for event in told)  # type: ignore[operator]


def test_plain_draws_nothing_and_rich_does_even_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for kind in ("plain", "rich"):
        with console.Show(progress=kind).step("make it"):
            pass
        said[kind] = capsys.readouterr().err
    assert "\x1b[" not in said["plain"]
    assert said["plain"].startswith("✓ make it")
    assert "\x1b[" in said["rich"]


def test_quiet_wins(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Show(quiet=True, progress="json").step("make it"):
        pass
    assert capsys.readouterr().err == ""


def test_another_word_is_refused() -> None:
    with pytest.raises(SpecError, match="'loud' is not auto, plain, rich or json"):
        console.Show(progress="loud")


@pytest.mark.parametrize("words", [("--progress", "json"), ("--progress=json",)])
def test_an_error_is_the_last_event(words: tuple[str, ...], tmp_path: Path) -> None:
    done = run("image", f"oci:{tmp_path}/none", "-o", str(tmp_path / "x.img"), *words)
    assert done.returncode != 0
    last = events(done.stderr)[-1]
    assert last["event"] == "error"
    assert last["code"] == done.returncode
    assert "none" in str(last["error"])


def test_a_reader_of_events_that_goes_away_does_not_end_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

        def flush(self) -> None: ...

    moved: list[tuple[int, int]] = []
    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr("osbuild.console.os.dup2", lambda *numbers: moved.append(numbers))
    console.print_event("said", text="x")
    assert [number for _, number in moved] == [2]


ROWS = (
    console.Seen(what="kernel", at=0.41234),
    console.Seen(what="root", at=1.5, verdict="passed", detail="ext4 [dax]"),
)


def test_as_json_what_happens_within_a_step_is_told_when_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    with console.Show(progress="json").step("boot it") as step:
        for number, row in enumerate(ROWS):
            step.seen(row)
            assert len(events(capsys.readouterr().err)) == 1 + (number == 0)
        step.seen(ROWS[0])
        (told,) = events(capsys.readouterr().err)
    assert told == {"event": "seen", "step": "boot it", "what": "kernel", "at": 0.412, "verdict": "", "detail": ""}


def test_on_a_terminal_the_rows_are_drawn_while_the_step_goes_on_and_nowhere_else(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    said = {}
    for kind in ("plain", "rich"):
        with console.Show(progress=kind).step("boot it") as step:
            for row in ROWS:
                step.seen(row)
            if step.progress is not None:
                step.progress.refresh()
            said[kind] = capsys.readouterr().err
    assert all(word in said["rich"] for word in ("0.41 s", "kernel", "1.50 s", "root", "passed", "ext4 [dax]"))
    assert said["plain"] == ""


def test_a_long_detail_gives_way_and_a_low_terminal_shows_the_end() -> None:
    rows = [console.Seen(what=f"check.number{number:02}", at=12.5, detail="x" * 200) for number in range(40)]
    drawn = Console(width=50, height=12, record=True, file=io.StringIO())
    drawn.print(console.table_of(rows, height=12))
    lines = drawn.export_text().splitlines()
    assert len(lines) == 8
    assert all(len(line) <= 50 and "12.50 s" in line for line in lines)
    assert "check.number39" in lines[-1]


def test_a_timeline_is_as_long_as_its_boot_and_names_all_of_it() -> None:
    long, short = fake_report(name="image", seconds=4.0), fake_report(name="initrd", seconds=2.0)
    (_, first, words), (_, second, _) = results.timelines((long, short))
    assert (len(first), len(second)) == (40, 20)
    assert first == "░" * 5 + "█" * 10 + "▒" * 5 + "▓" * 20
    assert words == "firmware 0.50, kernel 1.00, agent 0.50, checks 2.00"


def fake_report(*, name: str, seconds: float) -> SmokeReport:
    events = {"vmm started": 0.0, "first output": 0.4, "kernel": 0.5, "init": 1.5, "agent answered": 2.0}
    return SmokeReport(
        name=name, machine={}, verdict=Verdict.passed, reason="", cause=None, checks=(),
        timeline=tuple(Event(name=event, seconds=at) for event, at in events.items()), seconds=seconds,
        accel=Accel(name="tcg", reason=""), command=(), console=Path("console.log"), log=Path("vmm.log"),
    )  # fmt: skip
