"""A guest for a person: its console on this terminal, nobody asking its agent. Ctrl-A x ends it, as QEMU has it."""

from __future__ import annotations

import contextlib
import os
import resource
import sys
import termios
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.arch import find_arch
from osbuild.runtime import abilities, bounds, qemu
from osbuild.runtime.base import CONSOLE, Machine

# With mux, QEMU itself listens for Ctrl-A; without signal=off Ctrl-C would end QEMU instead of reaching the guest.
_TERMINAL: Final = "stdio,id=console,mux=on,signal=off"
_AGENT: Final = "null,id=agent"


def attach(machine: Machine, begins: Callable[[], None]) -> int:
    """Boot it here, until it or the person ends it; QEMU's exit code, 128 and a signal's number if one ended it.

    begins: called once nothing is left that would be refused.
    """
    qemu.refuse_what_cannot_boot(machine)
    program, chosen = qemu.ready(find_arch(machine.arch), machine.accel)
    nowhere = Path(CONSOLE)
    argv = qemu.arguments(machine, console=nowhere, agent=nowhere, accel=chosen.name, able=abilities.look(program))
    begins()
    limits = {resource.RLIMIT_NOFILE: bounds.FILES}  # who sits there sees what it writes
    with restored(), command.start(str(program), *on_terminal(argv), terminal=True, limits=limits) as process:
        status = process.wait()
    return status if status >= 0 else 128 - status


def on_terminal(argv: Sequence[str]) -> list[str]:
    """The same guest with its console here, and nobody at the agent's port."""
    swapped = {"file,id=console,": _TERMINAL, "socket,id=agent,": _AGENT}
    return [next((new for old, new in swapped.items() if word.startswith(old)), word) for word in argv]


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """The terminal is as it was after the block: a VMM that was killed leaves it raw."""
    try:
        before = termios.tcgetattr(sys.stdin.fileno())
    except (termios.error, OSError, ValueError):  # no terminal
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, before)
        os.set_blocking(sys.stdin.fileno(), True)  # a file's flags outlive the process that set them
