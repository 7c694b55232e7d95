"""One part of the agent by itself: its C, and a small program of tests/agent_parts around it, under sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.errors import CommandError
from osbuild.resources import resource
from tests.agent_program import SANITIZERS

_PROGRAMS: Final = Path(__file__).parent / "agent_parts"
_COMMON: Final = ("failure", "wire", "buffer", "arena", "messages", "log")


def compile_part(name: str, out: Path, *sources: str) -> Path:
    """agent_parts/NAME.c with those of agent/*.c."""
    home = Path(str(resource("agent")))
    files = [str(_PROGRAMS / f"{name}.c"), *(str(home / f"{source}.c") for source in (*_COMMON, *sources))]
    flags = ("-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", '-DAGENT_VERSION="0"', f"-I{home}")
    program = out / name
    try:
        command.run("gcc", *flags, *SANITIZERS, *files, "-o", str(program))
    except CommandError:  # no libasan
        command.run("gcc", *flags, *files, "-o", str(program))
    return program


def answers(*argv: str | Path) -> list[str]:
    """What the program said, a line each."""
    return subprocess.run(
        [str(word) for word in argv], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    ).stdout.splitlines()
