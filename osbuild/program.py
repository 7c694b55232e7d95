"""The end of every run: errors become one line and an exit code, signals are told, and a lost reader is no error."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final, NoReturn

import typer

from osbuild import cache, console, signals
from osbuild.errors import CommandError, HostError, Interrupted, OsbuilderError, SpecError
from osbuild.tree import quote


def run(app: typer.Typer) -> NoReturn:
    """The program: every error raised on purpose becomes one line and its exit code; everything started is ended."""
    signals.heed()
    if sys.stdout is None or sys.stderr is None:  # closed by the caller
        null = open(os.devnull, "w")  # noqa: SIM115, PTH123 - for the rest of the program
        sys.stdout, sys.stderr = sys.stdout or null, sys.stderr or null
    try:
        code = _run(app)
    except Interrupted as interruption:  # while the end was told
        code = interruption.code
    signals.heed_no_more()
    gc.freeze()  # what is left goes with the process: nobody need look through it first
    sys.exit(code)


def _run(app: typer.Typer) -> int:
    """The command's exit code; what went wrong has been told."""
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
    return code


# Typer names only one of its usage errors in public; this is what all of them are.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def _command(app: typer.Typer, words: list[str]) -> int:
    """The command that these words name; its exit code."""
    # Not app(): that ends with 1 on a broken pipe, and words its errors in its own way.
    command = typer.main.get_command(_narrowed(app, words))
    _add_cache_dir(command)
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


def _narrowed(app: typer.Typer, words: Sequence[str]) -> typer.Typer:
    """The same with no command but the one that is named: to make them all takes longer than most of them take."""
    name = words[0] if words else ""
    commands = [command for command in app.registered_commands if _name(command) == name]
    groups = [group for group in app.registered_groups if group.name == name]
    if not commands and not groups:
        return app
    narrowed = copy.copy(app)
    narrowed.registered_commands = commands
    narrowed.registered_groups = [copy.copy(group) for group in groups]
    for group in narrowed.registered_groups:
        if group.typer_instance is not None:
            group.typer_instance = _narrowed(group.typer_instance, words[1:])
    return narrowed


def _add_cache_dir(command: Any) -> None:  # Any: typer keeps the class to itself
    """Every command takes --cache-dir, and so do the groups that they are in."""
    command.params.append(
        typer.core.TyperOption(
            param_decls=[cache.OPTION], metavar="DIR", expose_value=False, callback=_choose_cache,
            help=f"what is kept between runs lies there, whatever {cache.SETTING} says",
        )
    )  # fmt: skip
    for each in getattr(command, "commands", {}).values():
        _add_cache_dir(each)


def _choose_cache(_context: object, _parameter: object, value: str | None) -> None:
    if value is None:
        return
    if not value or value.startswith("-"):
        raise SpecError(f"{cache.OPTION}: no value, for {quote(value)} is no directory", hint=f"{cache.OPTION} DIR")
    cache.choose(value)


def _name(command: Any) -> str:  # Any: typer keeps the class to itself
    return command.name or str(command.callback.__name__).replace("_", "-")


# What typer's own checker says, and what we say.
_WORDS: Final = (
    ("is not a valid integer", "not a whole number"),
    ("is not a valid float", "not a number"),
    ("is not in the range x>=1", "not a number from 1"),
)


def _usage(problem: Any) -> SpecError:  # Any: see _UsageError
    """One of typer's complaints as one of ours."""
    said = problem.format_message()
    parameter = getattr(problem, "param", None)
    if parameter is not None and not said.startswith("Missing"):
        name = max(parameter.opts, key=len)
        said = next((words for theirs, words in _WORDS if theirs in problem.message), problem.message)
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
    import difflib

    return "".join(difflib.get_close_matches(getattr(problem, "option_name", ""), there, n=1))


def say(error: OsbuilderError) -> None:
    """What went wrong, on standard error, for whom that is."""
    tail = error.tail if isinstance(error, CommandError) else "\n".join(error.details)
    if _events_wished(sys.argv):
        console.print_event("error", error=str(error), hint=error.hint, code=error.code, tail=tail)
    else:
        console.print_error(error, tail)


def _tell(error: OsbuilderError) -> int:
    say(error)
    if "--json" in sys.argv:
        try:
            details = {"details": list(error.details)} if error.details else {}
            console.print_json({"error": str(error), "hint": error.hint, "code": error.code} | details)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # standard output is what failed
    return error.code


def _events_wished(words: Sequence[str]) -> bool:
    """Whether standard error is for a program: --progress json, in both spellings."""
    return "--progress=json" in words or ("--progress", "json") in itertools.pairwise(words)
