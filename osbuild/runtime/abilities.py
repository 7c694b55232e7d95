"""What a QEMU can do, and what it does wrong: asked of the program once."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.errors import CommandError

# Before it, one thread may translate code that another is changing, and keep what it read. Linux changes its own code
# (static keys) by way of a breakpoint: where that was kept, the guest dies of `Oops: int3`, one boot in some dozens.
# QEMU's commit deba78709ae8, "accel/tcg: Always lock pages before translation".
MENDED: Final = (8, 1)
SECONDS: Final = 10.0

_VERSION: Final = re.compile(r"QEMU emulator version (\d+)\.(\d+)")
# softmmu/vl.c, of a QEMU built without libseccomp: since 4.2, and before.
_NO_SANDBOX: Final = re.compile(r"-sandbox support is not enabled|seccomp is not compiled into this build")


@dataclass(frozen=True, slots=True, kw_only=True)
class Abilities:
    """Of a QEMU's program."""

    sandbox: bool  # it does not say that it was built without what -sandbox needs
    parallel: bool  # several emulated processors may each have a thread


@functools.cache
def look(qemu: Path) -> Abilities:
    """It says whether it has a sandbox before it does anything else.

    Only its own words take the sandbox away: a QEMU that is slow, or does not start, keeps it, and says later what is
    wrong.
    """
    try:
        return Abilities(sandbox=True, parallel=parallel(_ask(qemu, "-sandbox", "on", "-version")))
    except CommandError as problem:
        sandbox = _NO_SANDBOX.search(problem.tail) is None
    try:
        return Abilities(sandbox=sandbox, parallel=parallel(_ask(qemu, "-version")))
    except CommandError:
        return Abilities(sandbox=sandbox, parallel=False)


def parallel(said: str) -> bool:
    """Whether a QEMU that says this to -version is one with MENDED; one that cannot be told is not."""
    found = _VERSION.search(said)
    return found is not None and (int(found[1]), int(found[2])) >= MENDED


def _ask(qemu: Path, *words: str) -> str:
    return command.run(str(qemu), *words, seconds=SECONDS).output
