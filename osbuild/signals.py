"""A signal to end becomes an exception where that ends something, never where it is lost or leaves a lock behind.

Python calls a handler between any two steps of the main thread. What it raises inside a callback that nobody calls (of
a weak reference, of a fork, of a finalizer) is printed and forgotten, and the program would run on; inside the import
system's or the logging module's own few lines it leaves a lock behind, on which other threads then wait for ever. There
it is raised a moment later instead.
"""

from __future__ import annotations

import functools
import signal
import sys
from types import FrameType
from typing import Any, Final

from osbuild.errors import Interrupted

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LATER_SECONDS: Final = 0.0001
_AGAIN_SECONDS: Final = 0.01  # until it is raised: around a fork, CPython 3.11 was seen to forget one signal of 300
# Modules whose own lines take no time: what they call has frames of its own.
_GLUE: Final = frozenset(
    ("importlib._bootstrap", "importlib._bootstrap_external", "_frozen_importlib", "_frozen_importlib_external",
     "logging", "contextlib", "weakref", __name__)  # what the hook below raises is lost for good
)  # fmt: skip
# Functions whose own lines wait for nobody: a child whose number is not known yet would not be ended; a lock would stay
# taken.
_BRIEF: Final = frozenset((
    ("subprocess", "_execute_child"), ("subprocess", "_close_pipe_fds"), ("osbuild.command", "start"),
    ("threading", "__enter__"), ("threading", "__exit__"), ("threading", "_acquire_restore"),
    ("threading", "_release_save"),
))  # fmt: skip
_CALLBACK: Final = ("asyncio.events", "_run")  # logs what is raised in what it calls, and goes on


def heed() -> None:
    """From now on a signal to end raises Interrupted; the same once more ends us at once. In the main thread only."""
    sys.unraisablehook = _not_lost
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def heed_no_more(action: signal.Handlers = signal.SIG_DFL) -> None:
    """Nobody is left to catch what is raised for them: they end us as they end any program, or (SIG_IGN) do nothing."""
    for number in SIGNALS:
        signal.signal(number, action)
    _cancel()  # last: until here, one could have come


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # the next time: at once
    _raise(number, frame)


def _raise(number: int, frame: FrameType | None) -> None:
    if _must_wait(frame):
        _raise_later(number)
    else:
        _cancel()
        raise Interrupted(number)


def _raise_later(number: int) -> None:
    signal.signal(signal.SIGALRM, functools.partial(_later, number))
    signal.setitimer(signal.ITIMER_REAL, _LATER_SECONDS, _AGAIN_SECONDS)


def _cancel() -> None:
    signal.signal(signal.SIGALRM, _nothing)  # first: one may be on its way
    signal.setitimer(signal.ITIMER_REAL, 0)


def _nothing(_number: int, _frame: FrameType | None) -> None:
    pass


def _later(number: int, _alarm: int, frame: FrameType | None) -> None:
    _raise(number, frame)


def _must_wait(frame: FrameType | None) -> bool:
    if frame is None:
        return False
    module, name = _where(frame)
    if module in _GLUE or (module, name) in _BRIEF:
        return True
    caller: FrameType | None = frame
    while caller is not None and _where(caller) != _CALLBACK:
        caller = caller.f_back
    return caller is not None


def _where(frame: FrameType) -> tuple[str, str]:
    return str(frame.f_globals.get("__name__")), frame.f_code.co_name


def _not_lost(unraisable: Any) -> None:  # Any: sys.UnraisableHookArgs is a name of type checkers only
    """What is raised in a callback has no caller to go to: the interruption is raised once more, outside of it."""
    if isinstance(unraisable.exc_value, Interrupted):
        _raise_later(unraisable.exc_value.number)
    else:
        sys.__unraisablehook__(unraisable)
