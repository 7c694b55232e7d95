"""Measuring programs: each in a fresh process, its wall time, its processor time and the most memory it had."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# A process that was forked has its parent's memory at first, and is remembered for it: a small one starts the measured.
_LAUNCHER: Final = """
import os, sys
_, status, usage = os.wait4(os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ), 0)
print(usage.ru_maxrss, usage.ru_utime + usage.ru_stime)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one program."""

    seconds: float
    mebibytes: int
    words: tuple[str, ...]  # that it printed
    processor: float  # seconds of it, its children's included


def run(argv: list[str], work: Path) -> Run:
    """Run a program in a directory; the bench ends when it fails."""
    began = time.monotonic()
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *argv]
    child = subprocess.run(launcher, cwd=work, stdout=subprocess.PIPE, text=True, check=False)
    seconds = time.monotonic() - began
    if child.returncode != 0:
        raise SystemExit(f"bench: {argv[0]} failed")
    *words, kibibytes, processor = child.stdout.split()
    return Run(seconds, int(kibibytes) // 1024, tuple(words), float(processor))
