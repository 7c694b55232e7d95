"""Links of this host forward IPv4 for the length of a block, and are put back by a program that outlives us.

keeper.py does it: it hears that we have ended, however we did, and it has the firewall's socket until then.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final

from osbuild import command
from osbuild.errors import HostError
from osbuild.network import keeper

_SWITCH: Final = "/proc/sys/net/ipv4/conf/{}/forwarding"
_SECONDS: Final = 10.0  # for the keeper to end


@contextlib.contextmanager
def forwarding(links: Iterable[str], firewall: int) -> Iterator[Forwarding]:
    """Nothing is switched on before `turn_on`; afterwards all is as it was, but for what forwarded already."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    with os.fdopen(reading, "rb") as theirs, os.fdopen(writing, "wb", buffering=0) as ours:
        argv = (sys.executable, "-I", "-S", keeper.__file__, *(_SWITCH.format(link) for link in links))
        with command.start(*argv, pipe=True, stdin=theirs, descriptors=(firewall,), outlives=True) as process:
            try:
                assert process.stdout is not None
                answer = _answer(process.stdout)
                yield Forwarding(frozenset(Path(path).parent.name for path in answer.split()), ours, process.stdout)
            finally:
                ours.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_SECONDS)


class Forwarding:
    """What is not switched on yet."""

    def __init__(self, borrowed: frozenset[str], words: IO[bytes], answers: IO[bytes]) -> None:
        self.borrowed = borrowed  # links that do not forward by their host's wish
        self._words, self._answers = words, answers

    def turn_on(self) -> None:
        self._words.write(b"\n")
        _answer(self._answers)


def _answer(answers: IO[bytes]) -> str:
    """A line of the keeper's; HostError for what it could not do."""
    answer = answers.readline()
    line = answer.decode().rstrip("\n")
    if not answer:
        raise HostError("the program that keeps this host's forwarding has ended before it began")
    if line.startswith("!"):
        raise HostError(f"{line[1:]}: no forwarding", hint="sysctl net.ipv4.ip_forward=1, by who may")
    return line
