"""The end of every run: errors become one line and an exit code, signals are told, and a lost reader is no error."""

from __future__ import annotations

import difflib
import gc
import os
import signal
import sys
from types import FrameType
from typing import Any, Final, NoReturn

import typer

from osbuild import console
from osbuild.errors import CommandError, HostError, Interrupted, OsbuilderError, SpecError
from osbuild.tree import quote


def run(app: typer.Typer) -> NoReturn:
    """The program: every error raised on purpose becomes one line and its exit code; everything started is ended."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    if sys.stdout is None or sys.stderr is None:  # closed by the caller
        null = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the rest of the program
        sys.stdout, sys.stderr = sys.stdout or null, sys.stderr or null
    try:
        code = _command(app, sys.argv[1:])
        sys.stdout.flush()
    except OsbuilderError as error:
        code = _tell(error)
    except BrokenPipeError:  # whoever read our results has gone: as silent as a program that SIGPIPE ends
        code = 128 + signal.SIGPIPE
    except OSError as problem:
        # The disk, a permission, a limit: this machine's, whichever step met it.
        where = f"{quote(str(problem.filename))}: " if problem.filename else ""
        code = _tell(HostError(f"{where}{problem.strerror or problem}"))
    except Interrupted as interruption:
        code = interruption.code
        if code != 128 + signal.SIGPIPE:
            console.print_note(str(interruption))
    except MemoryError:
        console.print_note("error: out of memory")
        code = 4
    try:
        sys.stdout.flush()
    except OSError:  # has been said, or needs no word; Python would try once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    gc.freeze()  # what is left goes with the process: nobody need look through it first
    sys.exit(code)


# Typer names only one of its usage errors in public; this is what all of them are.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _command(app: typer.Typer, words: list[str]) -> int:
    """The command that these words name; its exit code."""
    # Not app(): that ends with 1 on a broken pipe, and words its errors in its own way.
    command = typer.main.get_command(app)
    try:
        with command.make_context("osbuilder", words) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except _UsageError as problem:
        if str(problem).startswith("Usage:"):  # nothing was asked for
            console.print_note(str(problem))
            return 2
        raise _usage(problem) from None
    return 0


# What typer's own checker says, and what we say.
_WORDS: Final = (
    ("Input should be a valid integer", "not a whole number"),
    ("Input should be a valid number", "not a number"),
    ("Input should be greater than or equal to 1", "not a number from 1"),
)


def _usage(problem: Any) -> SpecError:  # Any: see _UsageError
    """One of typer's complaints as one of ours."""
    said = problem.format_message()
    parameter = getattr(problem, "param", None)
    if parameter is not None and not said.startswith("Missing"):
        name = max(parameter.opts, key=len)
        said = next((words for start, words in _WORDS if problem.message.startswith(start)), problem.message)
        said = f"{name}: {said}" if name.startswith("-") else said[:1].lower() + said[1:]
    else:
        said = said[:1].lower() + said[1:]
    said = said.partition(" (Possible options:")[0].rstrip(".")
    near = _near(problem)
    context = getattr(problem, "ctx", None)
    there = f"{context.command_path if context else 'osbuilder'} --help lists what there is"
    return SpecError(said, hint=f"did you mean {near}? {there}" if near else there)


def _near(problem: Any) -> str:
    """The option that was meant, if that can be guessed."""
    there = [word for word in getattr(problem, "possibilities", None) or () if word.startswith("-")]
    return "".join(difflib.get_close_matches(getattr(problem, "option_name", ""), there, n=1))


def _tell(error: OsbuilderError) -> int:
    console.print_error(error, error.tail if isinstance(error, CommandError) else "")
    if "--json" in sys.argv:
        try:
            console.print_json({"error": str(error), "hint": error.hint, "code": error.code})
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # standard output is what failed
    return error.code


def _interrupt(number: int, frame: FrameType | None) -> None:
    del frame
    signal.signal(number, signal.SIG_DFL)  # a second time: at once
    raise Interrupted(number)
