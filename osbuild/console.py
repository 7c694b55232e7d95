"""What a person sees: steps and their progress on standard error, results on standard output."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.text import Text

from osbuild.errors import Interrupted, OsbuilderError, SpecError

if TYPE_CHECKING:  # what is slow to import is imported where it is shown
    from rich.progress import Progress

_SAY_SECONDS: Final = 30.0  # between signs of life where there is no terminal
_WIDTH_OF_PIPES: Final = 160  # columns, where no terminal says how many it has
_VERDICT_STYLES: Final = {
    "passed": "bold green", "failed": "bold red", "unknown": "bold yellow",
}  # fmt: skip


class Show:
    """Says what is being done, and remembers how long each step took."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._console = _Progress(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._quiet = quiet
        self._live: Progress | None = None

    @contextlib.contextmanager
    def step(self, title: str, *, name: str = "") -> Iterator[Step]:
        """One step of a build; its time is kept under `name`."""
        began = time.monotonic()
        step = Step(self, title)
        with self._progress() as progress:
            if progress is not None:
                step.task = progress.add_task(title, total=None)
                step.progress = progress
            try:
                yield step
            except BaseException:
                self._line("✗", "red", title, step.note, time.monotonic() - began)
                raise
        taken = time.monotonic() - began
        if name:
            self.seconds[name] = taken
        mark, style = ("✗", "red") if step.bad else ("✓", "green")
        self._line(mark, style, title, step.note, taken)

    def say(self, text: str) -> None:
        """One line that is no step."""
        if not self._quiet:
            self._console.print(Text(text))

    @contextlib.contextmanager
    def _progress(self) -> Iterator[Progress | None]:
        if self._quiet or not self._console.is_terminal:
            yield None
            return
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            yield progress

    def _line(self, mark: str, style: str, title: str, note: str, seconds: float) -> None:
        if self._quiet:
            return
        text = Text.assemble(
            (mark, style), f" {title}", (f" ({note})" if note else "", "dim"), (f"  {seconds:.2f} s", "dim")
        )
        if self._console.is_terminal:  # elsewhere a line is a line
            text = _hung(text, self._console.width, "  ")
        self._console.print(text)


class Step:
    """A step that is going on."""

    def __init__(self, show: Show, title: str) -> None:
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
        elif time.monotonic() - self._said > _SAY_SECONDS:
            self._said = time.monotonic()
            self._show.say(f"… {self.title}: {done} of about {max(done, total)}")


class _Progress(Console):
    """Standard error: what is said there may get lost, and the work goes on."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


@contextlib.contextmanager
def _result() -> Iterator[None]:
    """Standard output: a reader who has gone away ends us quietly, as SIGPIPE would."""
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise Interrupted(signal.SIGPIPE) from None


class _Results(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_json(value: object) -> None:
    """A result for machines, on standard output."""
    with _result():
        sys.stdout.write(json.dumps(value, indent=2) + "\n")


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
    from rich.table import Table

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
        _Results(highlight=False, markup=False, width=_width()).print(table)


def fold(text: str, *, indent: str = "", hanging: str = "") -> list[str]:
    """Lines of the result's width, broken at blanks only: a path stays whole."""
    return textwrap.wrap(
        text, _width(), initial_indent=indent, subsequent_indent=hanging, break_long_words=False,
        break_on_hyphens=False,
    ) or [indent.rstrip()]  # fmt: skip


def _hung(text: Text, width: int, indent: str) -> Text:
    """A styled text broken at blanks only; every line but the first has this indent (and room for it)."""
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
    console = _Progress(stderr=True, highlight=False, markup=False, soft_wrap=True)
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
    _Progress(stderr=True, highlight=False, markup=False, soft_wrap=True).print(Text(text))


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
