"""What a person sees: steps and their progress on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from osbuild.errors import Interrupted, OsbuilderError, SpecError

if TYPE_CHECKING:  # what is slow to import is imported where it is shown
    from rich.console import Console, RenderableType
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

AUTO, PLAIN, RICH, JSON = PROGRESS = ("auto", "plain", "rich", "json")  # auto: rich on a terminal, else plain
_GOOD, _BAD = "✓", "✗"
_EVENT_SECONDS: Final = 1.0  # between two events about the same step
_LINES_ELSE: Final = 4  # of a terminal, beside what a step has seen
_SAY_SECONDS: Final = 30.0  # between signs of life where there is no terminal
_WIDTH_OF_PIPES: Final = 160  # columns, where no terminal says how many it has
_VERDICT_STYLES: Final = {
    "passed": "bold green", "failed": "bold red", "unknown": "bold yellow", "skipped": "dim",
    "built": "bold green", "unchanged": "green",
}  # fmt: skip


class Show:
    """Says what is being done, and remembers how long each step took.

    `progress` is one of PROGRESS. As JSON each line is an object with `event`: "begin", "progress" (`done`, `total`),
    "seen" (`what`, `at` seconds, `verdict`, `detail`: of a guest that boots), "end" (`seconds`, `ok`, `note`), all with
    their `step`; "said" with its `text`; and, last of all, "error".
    """

    def __init__(self, *, quiet: bool = False, progress: str = AUTO) -> None:
        if progress not in PROGRESS:
            raise SpecError(f"--progress: {progress!r} is not {', '.join(PROGRESS[:-1])} or {PROGRESS[-1]}")
        self.seconds: dict[str, float] = {}
        self._quiet = quiet
        self._events = progress == JSON and not quiet
        self._bars = {RICH: True, PLAIN: False}.get(progress)

    @functools.cached_property
    def _console(self) -> Console:
        return _standard_error(terminal=self._bars)

    @contextlib.contextmanager
    def step(self, title: str, *, name: str = "") -> Iterator[Step]:
        """One step of a build; its time is kept under `name`."""
        began = time.monotonic()
        step = Step(self, title)
        self.event("begin", step=title)
        with self._progress(step.rows) as progress:
            if progress is not None:
                step.task = progress.add_task(title, total=None)
                step.progress = progress
            try:
                yield step
            except BaseException:
                self._line(_BAD, "red", title, step.note, time.monotonic() - began)
                raise
        taken = time.monotonic() - began
        if name:
            self.seconds[name] = taken
        mark, style = (_BAD, "red") if step.bad else (_GOOD, "green")
        self._line(mark, style, title, step.note, taken)

    def say(self, text: str) -> None:
        """One line that is no step."""
        from rich.text import Text

        if self._events:
            self.event("said", text=text)
        elif not self._quiet:
            self._console.print(Text(text))

    def ended(self, title: str, *, note: str, seconds: float, ok: bool) -> None:
        """A step that went on beside others, and is over."""
        self._line(*((_GOOD, "green") if ok else (_BAD, "red")), title, note, seconds)

    @property
    def pause(self) -> float:
        """Seconds between two words about how far a step is."""
        return _EVENT_SECONDS if self._events else _SAY_SECONDS

    def event(self, name: str, **facts: object) -> bool:
        """Tell a program, if one listens."""
        if self._events:
            print_event(name, **facts)
        return self._events

    @contextlib.contextmanager
    def _progress(self, rows: Sequence[Seen]) -> Iterator[Progress | None]:
        if self._quiet or self._events or not self._console.is_terminal:
            yield None
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        class Live(Progress):
            def get_renderables(self) -> Iterable[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                if rows:
                    yield table_of(rows, self.console.height)

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Live(*columns, console=self._console, transient=True) as progress:
            yield progress

    def _line(self, mark: str, style: str, title: str, note: str, seconds: float) -> None:
        if self._quiet or self.event("end", step=title, ok=mark == _GOOD, note=note, seconds=round(seconds, 3)):
            return
        from rich.text import Text

        text = Text.assemble(
            (mark, style), f" {title}", (f" ({note})" if note else "", "dim"), (f"  {seconds:.2f} s", "dim")
        )
        if self._console.is_terminal:  # elsewhere a line is a line
            text = _hung(text, self._console.width, "  ")
        self._console.print(text)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """Something that happened within a step, `at` seconds after it began."""

    what: str
    at: float
    verdict: str = ""
    detail: str = ""


class Step:
    """A step that is going on."""

    def __init__(self, show: Show, title: str) -> None:
        self.rows: list[Seen] = []  # for who looks at a terminal
        self.note = ""  # what came of it, in a word or two
        self.bad = False  # it ended, and what came of it is not what was hoped for
        self.title = title
        self.progress: Progress | None = None
        self.task: Any = None  # rich's own kind of number
        self._show = show
        self._said = time.monotonic()

    def advance(self, done: int, total: int) -> None:
        """How far it is: a bar on a terminal, elsewhere a line now and then."""
        if self.progress is not None:
            self.progress.update(self.task, completed=done, total=max(done, total))
        elif time.monotonic() - self._said > self._show.pause:
            self._said = time.monotonic()
            if self._show.event("progress", step=self.title, done=done, total=max(done, total)):
                return
            self._show.say(f"… {self.title}: {done} of about {max(done, total)}")

    def seen(self, row: Seen) -> None:
        """A row below the step while it goes on, on a terminal; any thread may call it."""
        self.rows.append(row)
        self._show.event("seen", step=self.title, **asdict(row) | {"at": round(row.at, 3)})


def table_of(rows: Sequence[Seen], height: int) -> Table:
    """What a step has seen, drawn anew each time: the last of it that a terminal of so many lines has room for."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for style, width in (("dim", 10), ("", 14), ("", 7), ("dim", None)):  # what is long gives way, and nothing else
        table.add_column(style=style, min_width=width, no_wrap=True, overflow="ellipsis")
    for row in rows[-max(1, height - _LINES_ELSE) :]:
        verdict = Text(row.verdict, _VERDICT_STYLES.get(row.verdict, ""))
        table.add_row(f"{row.at:8.2f} s", row.what, verdict, Text(row.detail))
    return table


def print_event(name: str, **facts: object) -> None:
    """A line of JSON on standard error; it may get lost, and the work goes on."""
    try:
        sys.stderr.write(json.dumps({"event": name, **facts}) + "\n")
        sys.stderr.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _standard_error(*, terminal: bool | None = None) -> Console:
    """What is said there may get lost, and the work goes on; None for `terminal`: see whether it is one."""
    from rich.console import Console

    class Progress(Console):
        def on_broken_pipe(self) -> None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)

    return Progress(stderr=True, highlight=False, markup=False, soft_wrap=True, force_terminal=terminal)


@contextlib.contextmanager
def _result() -> Iterator[None]:
    """Standard output: a reader who has gone away ends us quietly, as SIGPIPE would."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise Interrupted(signal.SIGPIPE) from None


def print_json(value: object) -> None:
    """A result for machines, on standard output."""
    with _result():
        sys.stdout.write(json.dumps(value, indent=2) + "\n")


def print_text(text: str) -> None:
    """A result that is a document, on standard output."""
    with _result():
        sys.stdout.write(text)


def print_lines(lines: Iterable[str]) -> None:
    """A result that is a list, on standard output."""
    with _result():
        sys.stdout.writelines(f"{line}\n" for line in lines)


def print_bytes(pieces: Iterable[bytes]) -> None:
    """A result that is no text, on standard output; refused on a terminal."""
    if sys.stdout.isatty():
        raise SpecError("this would fill the terminal with bytes", hint="send it to a file or a program")
    with _result():
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A result for people, on standard output; verdicts are coloured."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    class Results(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for column in columns:
        table.add_column(Text(column), justify="right" if column in ("size", "seconds") else "left", overflow="fold")
    for row in rows:
        cells = [
            Text(cell, style=_VERDICT_STYLES.get(cell, "") if column == "verdict" else "")
            for column, cell in zip(columns, row, strict=True)
        ]
        table.add_row(*cells)
    with _result():
        Results(highlight=False, markup=False, width=_width()).print(table)


def fold(text: str, *, indent: str = "", hanging: str = "") -> list[str]:
    """Lines of the result's width, broken at blanks only: a path stays whole."""
    return textwrap.wrap(
        text, _width(), initial_indent=indent, subsequent_indent=hanging, break_long_words=False,
        break_on_hyphens=False,
    ) or [indent.rstrip()]  # fmt: skip


def _hung(text: Text, width: int, indent: str) -> Text:
    """A styled text broken at blanks only; every line but the first has this indent (and room for it)."""
    from rich.text import Text

    offsets, column, room = [], 0, max(width - len(indent), 20)
    for word in re.finditer(r"\S+\s*", text.plain):
        if column and column + len(word[0].rstrip()) > room:
            offsets.append(word.start())
            column = 0
        column += len(word[0])
    lines = text.divide(offsets)
    for line in lines:
        line.rstrip()
    return Text(f"\n{indent}").join(lines)


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH_OF_PIPES


def print_error(error: OsbuilderError, tail: str = "") -> None:
    """What went wrong, and what to do; the last lines of a program's output when that is what failed."""
    from rich.text import Text

    console = _standard_error()
    if tail.strip():
        console.print(Text(tail.rstrip(), style="dim"))
    for word, style, text in (("error: ", "bold red", str(error)), ("hint:  ", "bold", error.hint)):
        if text:
            said = Text(text)
            if console.is_terminal:  # elsewhere a line is a line
                said = _hung(said, console.width, " " * len(word))
            console.print(Text.assemble((word, style), said))


def print_note(text: str) -> None:
    """A line on standard error, whether or not anybody reads it."""
    from rich.text import Text

    _standard_error().print(Text(text))


def age_text(moment: float) -> str:
    """How long ago that was, as people say it."""
    seconds = max(time.time() - moment, 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return "now"


def size_text(size: int) -> str:
    """A number of bytes as people write it."""
    value = float(size)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"
