"""Reads a guest's console while it grows: what happens when, the agent's log lines, and a panic as it happens.

A VMM that outlives its guest's panic, or whose guest writes without end or says that no agent will answer any more, is
ended here: the agent's channel then closes, and whoever waits for an answer need not wait for the deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import stat
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import autopsy, causes
from osbuild.last_words import STAMP, TIME
from osbuild.output import free_blocks
from osbuild.report import Event, printable, tail
from osbuild.runtime.base import Guest

CONSOLE_LIMIT: Final = 64 << 20  # bytes; a guest that writes more is ended before it fills the host's disk

_POLL_SECONDS: Final = 0.005
_PANIC_GRACE_SECONDS: Final = 0.3  # for the trace that follows the line, when the VMM does not end by itself
_DISK_POLL_SECONDS: Final = 0.1
_LISTEN_SECONDS: Final = 5.0  # after an agent's start: its port's driver is there by then, or never
_LOG_BYTES: Final = 64 * 1024

OnEvent = Callable[[Event], None]


def _said(words: str) -> re.Pattern[bytes]:
    """By the kernel, with its time."""
    return re.compile(f"^{STAMP}{words}".encode())


_SIGHTS: Final[Mapping[str, re.Pattern[bytes]]] = {
    "kernel": _said(""),
    "init": _said(r"Run \S+ as init process"),
    "panic": re.compile(f"^(?:{STAMP})?Kernel panic - not syncing".encode()),
    # Machines without ACPI cannot be switched off by a guest, only halted.
    "leaving": _said("reboot: (?:Power down|Restarting system|machine restart)"),
    "halted": _said("reboot: (?:Power off not available: )?System halted"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """How a guest ended."""

    status: int | None  # the VMM's; None: it is still there
    leaving: bool  # its kernel said that it powers off or restarts
    halted: bool
    panicked: bool


class Watcher:
    """Reads a guest's console while it grows."""

    def __init__(self, guest: Guest, on_event: OnEvent | None = None) -> None:
        self._guest = guest
        self._on_event = on_event
        self._changed = threading.Condition()  # for all of the following
        self._events: dict[str, Event] = {}
        self._log = AgentLog()
        self._flooded = False
        self._stopped = False  # we ended the VMM
        self._hopeless: float | None = None  # when that was seen
        self._disk_seen = 0.0  # when what it wrote to its disk was measured
        self._stop = threading.Event()
        # Opened before anybody can reap it, so that it never means another process.
        self._process = os.pidfd_open(guest.process.pid)
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)

    def __enter__(self) -> Watcher:
        self.record("vmm started", at=self._guest.started)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._drain()
        os.close(self._process)

    @property
    def timeline(self) -> tuple[Event, ...]:
        """What has happened so far, in order."""
        with self._changed:
            return tuple(sorted(self._events.values(), key=lambda event: event.seconds))

    def record(self, name: str, *, guest: float | None = None, at: float | None = None) -> None:
        """Something happens now; only the first time counts."""
        seconds = (time.monotonic() if at is None else at) - self._guest.started
        with self._changed:
            if name in self._events:
                return
            event = self._events[name] = Event(name=name, seconds=seconds, guest=guest)
            self._changed.notify_all()
        if self._on_event is not None:
            self._on_event(event)

    def message(self, text: str, seconds: float) -> Mapping[str, Any] | None:
        """The fields of the agent's log line with that message, waiting for it a little."""
        with self._changed:
            self._changed.wait_for(lambda: text in self._log.messages, seconds)
            return self._log.messages.get(text)

    def wait_for_end(self, seconds: float) -> End:
        """How the guest ends by itself, waiting for it so long."""
        deadline = time.monotonic() + seconds
        while not self._ended(_POLL_SECONDS):
            if {"halted", "panic"} & self._events.keys() or time.monotonic() > deadline:
                break
        else:
            self.record("powered off")
        self._drain()
        status = self._guest.process.poll()
        seen = {name: name in self._events for name in ("halted", "leaving")}
        return End(status=status, panicked="panic" in self._events, **seen)

    def finish(self, *, answered: bool, gone: bool) -> autopsy.Evidence:
        """Stop watching, see everything that was still written, and say what is left of the guest."""
        self._ended(2 * _PANIC_GRACE_SECONDS if gone else 0.0)
        self._drain()
        status = self._guest.process.poll()
        return autopsy.Evidence(
            console=autopsy.console_text(self._guest.console),
            log=printable(tail(self._guest.log, _LOG_BYTES)),
            status=status,
            answered=answered,
            stopped=self._stopped or status is None,
            flooded=self._flooded,
            given_up="given up" in self._events,
            full=_is_full(self._guest.console),
            transport=self._guest.channel.name,
        )

    def _ended(self, seconds: float) -> bool:
        """Whether the VMM ends within so many seconds."""
        return bool(select.select([self._process], [], [], seconds)[0])

    def _drain(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with self._guest.console.open("rb", buffering=0) as console:
            lines = Lines()
            last = False
            while True:
                while data := console.read(1 << 20):
                    self.record("first output")
                    self._see(lines.feed(data))
                    if console.tell() > CONSOLE_LIMIT:
                        self._flooded = True
                        self._end_vmm()
                        return
                if last:
                    return
                # One more round of reading after the end.
                last = self._stop.is_set() or self._ended(_POLL_SECONDS)
                self._end_what_is_over()

    def _see(self, lines: list[bytes]) -> None:
        for line in lines:
            for name, pattern in _SIGHTS.items():
                if name not in self._events and (match := pattern.search(line)):
                    if name == "panic" and not match["guest"] and "kernel" in self._events:
                        continue  # the kernel writes its time: somebody quotes a panic
                    self.record(name, guest=float(match["guest"]) if match["guest"] else None)
            if self._hopeless is None and causes.HOPELESS.search(line):
                self._hopeless = time.monotonic()
            found = self._log.feed(line)
            if found is None:
                continue
            with self._changed:
                self._changed.notify_all()
            if found.get("msg") == "agent started":
                self.record("agent started", guest=_number(found.get("uptime_seconds")))

    def _end_what_is_over(self) -> None:
        now = time.monotonic()
        if self._guest.disk_limit and now - self._disk_seen > _DISK_POLL_SECONDS:
            self._disk_seen = now
            self._end_at_limit()
        panic = self._events.get("panic")
        if panic and now - self._guest.started - panic.seconds > _PANIC_GRACE_SECONDS:
            self._end_vmm()
        elif self._is_hopeless(now) and not {"agent answered", "panic"} & self._events.keys():
            self.record("given up")
            self._end_vmm()

    def _end_at_limit(self) -> None:
        """By the signal that such a limit ends a program with; QEMU's threads have it blocked, and see an error."""
        written, limit = _written(self._guest.process.pid), self._guest.disk_limit
        if written < limit or self._ended(0.0):
            return
        with contextlib.suppress(OSError), self._guest.log.open("a") as log:
            log.write(f"{causes.BOUND} {written >> 20} MiB to its disk: more than {limit >> 20} MiB\n")
        signal.pidfd_send_signal(self._process, signal.SIGXFSZ)

    def _is_hopeless(self, now: float) -> bool:
        """The console said so; or the agent started long ago, and listens, but not where we ask."""
        if self._hopeless is not None:
            return now - self._hopeless > _PANIC_GRACE_SECONDS
        started = self._events.get("agent started")
        if started is None or now - self._guest.started - started.seconds < _LISTEN_SECONDS:
            return False
        said = self._log.addresses or "no vsock" in self._log.messages
        return bool(said) and not autopsy.listens(self._log.addresses, self._guest.channel.name)

    def _end_vmm(self) -> None:
        if not self._ended(0.0):
            self._stopped = True
            signal.pidfd_send_signal(self._process, signal.SIGKILL)


class Lines:
    """Bytes in, whole lines out; a line without an end is cut."""

    LONGEST: Final = 16 * 1024

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > self.LONGEST:
            lines.append(self._rest)
            self._rest = b""
        return [line[: self.LONGEST].rstrip(b"\r") for line in lines]


class AgentLog:
    """The agent's JSON lines, out of everything else on a console.

    The kernel writes into the middle of other people's lines; what follows its time stamp up to the end of the line is
    taken out, and the next line is the rest of the torn one.
    """

    _KERNEL: Final = re.compile(f"{TIME}.*$".encode())
    _MOST: Final = 64  # messages kept; a guest may invent any number

    def __init__(self) -> None:
        self.messages: dict[str, Mapping[str, Any]] = {}  # Any: JSON
        self.addresses: set[str] = set()  # where it listens
        self._torn = b""

    def feed(self, line: bytes) -> Mapping[str, Any] | None:
        """The message that this line is, or completes."""
        start = line.find(b'{"msg":')
        if start >= 0:
            whole, self._torn = line[start:], b""
        elif self._torn:
            whole, self._torn = self._torn + line, b""
        else:
            return None
        fields = _parse(whole)
        if fields is None:
            kept = self._KERNEL.sub(b"", whole)
            self._torn = kept if len(kept) < Lines.LONGEST and kept != whole else b""
            return None
        if len(self.messages) < self._MOST:
            self.messages.setdefault(str(fields["msg"]), fields)
        if fields["msg"] == "listening" and len(self.addresses) < self._MOST:
            self.addresses.add(str(fields.get("address")))
        return fields


def _parse(text: bytes) -> Mapping[str, Any] | None:
    try:
        fields, _ = json.JSONDecoder().raw_decode(text.decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None


def _written(process: int) -> int:
    """Bytes on this host's disk of what its guest has written to a disk of its own: a file of the VMM's, and no name.

    Guest memory that is shared has no name either, and is no file on a disk.
    """
    total = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{process}/fd"):
            with contextlib.suppress(OSError):
                found = entry.stat()
                if (
                    stat.S_ISREG(found.st_mode)
                    and not found.st_nlink
                    and "memfd:" not in str(Path(entry.path).readlink())
                ):
                    total += found.st_blocks * 512
    return total


def _is_full(console: Path) -> bool:
    """The filesystem that a console is written to has no room: what the guest said last is not in it."""
    try:
        found = os.statvfs(console)
    except OSError:
        return False
    return free_blocks(found) == 0 and found.f_blocks > 0


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None
