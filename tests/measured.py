"""Programs whose memory is measured: started by a small process, for who is forked off a large one is remembered so."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

LAUNCHER = """
import os, sys
child = os.posix_spawn(sys.argv[2], sys.argv[2:], os.environ)
_, status, usage = os.wait4(child, 0)
os.write(int(sys.argv[1]), b"%d" % usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run_measured(argv: Sequence[str], *, seconds: float = 120) -> tuple[subprocess.CompletedProcess[str], int]:
    """The program's end, and the most memory that it had, in KiB."""
    measure, write = os.pipe()
    try:
        launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, str(write), *argv]
        done = subprocess.run(launcher, pass_fds=[write], capture_output=True, text=True, check=False, timeout=seconds)
        return done, int(os.read(measure, 32))
    finally:
        os.close(measure)
        os.close(write)
