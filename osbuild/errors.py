"""Everything raised on purpose, and the exit code that follows from it.

    OsbuilderError            1   never raised itself: a bug of ours
    ├── SpecError             2   the words on the command line, or osbuild.toml
    ├── InputError            3   an image, file or registry answer that we refuse
    ├── HostError             4   this machine lacks something, or will not let us
    └── BuildError            5   a build step failed
        └── CommandError          … because a program did
    Interrupted         128 + n   a signal; not an Exception, so that nothing swallows it

Guests that fail are not raised: they are reported (`report.SmokeReport`), 6 for wrong, 7 for silent.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import ClassVar


class OsbuilderError(Exception):
    """One line for the user: what and where; the hint says what to do next."""

    code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "", details: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.hint = hint
        self.details = details  # lines before the one, when it is about several things


class SpecError(OsbuilderError):
    """What was asked for cannot be meant."""

    code = 2


class InputError(OsbuilderError):
    """Something that came from outside breaks a rule; the message names the entry and the rule."""

    code = 3


class HostError(OsbuilderError):
    """A tool, a permission, space or memory is missing on this machine."""

    code = 4


class BuildError(OsbuilderError):
    """A step of ours did not give what it should."""

    code = 5


class CommandError(BuildError):
    """A program ended badly; `log` is the whole output when there is such a file, `tail` its last lines."""

    def __init__(self, message: str, *, log: Path | None = None, tail: str = "", hint: str = "") -> None:
        super().__init__(message, hint=hint or (f"full output in {log}" if log else ""))
        self.log = log
        self.tail = tail


class Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP arrived: everything that was started is being ended."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number
        self.code = 128 + number
