"""A program by itself: links forward for as long as somebody holds its standard input open, and not a moment longer.

    keeper SWITCH…                      each a /proc/sys/net/ipv4/conf/LINK/forwarding
      <- a line with those that it will switch on, and will have to switch off: who asks makes them safe first
      -> a line                         and on they are
      <- a line
      -> the end of the input           because the block has ended, or because a kill -9 has ended who held it

Several of these may have a switch between them: each that needs it on holds a lock on the switch's second byte, the
last one to let go of it switches it off, and whoever looks or acts holds the first byte. If meanwhile the host has been
told to forward on all links (ip_forward), as dockerd does when it starts, the link stays on: it would be on without us.
Only where its host forwarded on all links before and not on this one it goes off again; the third byte says so. Kernel
locks end with their holder. Nothing but the standard library is used here: it has to start fast, and must need nobody
to end well.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import sys

_TURN, _USE, _APART = (
    0,
    1,
    2,
)  # bytes of a switch: whose turn it is, who needs it on, who knows that it was off by itself


class Switch:
    """One that is being looked at: nobody else of us does meanwhile."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._lock(_TURN, fcntl.LOCK_EX)
        off = self._is_off()
        self.ours = off or not self._is_free(_USE)
        self._apart = self.ours and (_all_forward(path) if off else not self._is_free(_APART))
        if self.ours:
            self._lock(_USE, fcntl.LOCK_SH)
        if self._apart:
            self._lock(_APART, fcntl.LOCK_SH)

    def turn_on(self) -> None:
        if self.ours:
            self._write(b"1")
        self._lock(_TURN, fcntl.LOCK_UN)

    def leave(self) -> None:
        """Off, if it was, unless somebody else of us needs it."""
        if self.ours:
            self._lock(_TURN, fcntl.LOCK_EX)
            self._lock(_USE, fcntl.LOCK_UN)
            if self._is_free(_USE) and (self._apart or not _all_forward(self.path)):
                with contextlib.suppress(OSError):  # the link has gone, with its switch
                    self._write(b"0")
        os.close(self._file)

    def _write(self, value: bytes) -> None:
        try:
            os.pwrite(self._file, value, 0)
        except OSError as problem:
            raise OSError(problem.errno, problem.strerror, self.path) from problem

    def _is_off(self) -> bool:
        return os.pread(self._file, 9, 0).strip() == b"0"

    def _is_free(self, byte: int) -> bool:
        """Whether nobody else holds it; a lock of our own ends with the question."""
        try:
            self._lock(byte, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        self._lock(byte, fcntl.LOCK_UN)
        return True

    def _lock(self, byte: int, how: int) -> None:
        fcntl.lockf(self._file, how, 1, byte)


def _all_forward(path: str) -> bool:
    """Whether the host was told to forward on all links, those to come too: net.ipv4.ip_forward."""
    file = os.open(f"{path.rsplit('/', 2)[0]}/all/forwarding", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(file, 9).strip() != b"0"
    finally:
        os.close(file)


def main(paths: list[str]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # its input says when to end
    switches = []
    try:
        for path in sorted(paths):  # everybody in one order, so that nobody waits for who waits for him
            switches.append(Switch(path))  # noqa: PERF401 - those before one that fails are left, too
        _say(" ".join(switch.path for switch in switches if switch.ours))
        if not os.read(0, 1):
            return
        for switch in switches:
            switch.turn_on()
        _say("on")
        while os.read(0, 1):
            pass
    except OSError as problem:
        _say(f"!{problem.filename}: {problem.strerror}")
    finally:
        for switch in switches:
            switch.leave()


def _say(line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # who asked has gone
        os.write(1, line.encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
