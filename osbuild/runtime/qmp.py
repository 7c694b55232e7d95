"""QEMU's monitor protocol (QMP): a question, its answer, and events in between; a line of JSON each.

QEMU inherits one end of a socket pair, so there is no path, and nobody else can ask. Written here and not taken from
qemu.qmp: that is asyncio throughout, and of it we would use what stands below.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Container, Iterator, Mapping
from typing import Any, Final

SECONDS: Final = 10.0
Json = Mapping[str, Any]
_LINE_MAX: Final = 1 << 20
_EVENTS_MAX: Final = 1000  # kept for who waits for one


class QmpError(Exception):
    """The monitor gave no good answer."""


class RefusedError(QmpError):
    """QEMU understood, and will not."""

    def __init__(self, command: str, kind: str, description: str) -> None:
        super().__init__(f"QEMU refuses {command}: {description}")
        self.kind = kind
        self.description = description


class SilentError(QmpError):
    """No answer in time, or QEMU has gone."""


class Qmp:
    """One monitor. Every call has a deadline; an answer that comes after it is passed over by the next."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._unread = bytearray()
        self._events: list[dict[str, Any]] = []
        self._welcomed = False  # it said that it is there
        self._greeted = False  # and that it listens
        self._begun = 0  # the number of the message that made QEMU listen
        self._asked = 0

    def begin(self) -> None:
        """Make QEMU listen as soon as it is there: until then it tells of no event. Nothing is waited for."""
        with contextlib.suppress(SilentError):  # who asks next is told
            self._begun = self._send("qmp_capabilities", {}, SECONDS)

    # Any, here and below: as JSON has it.
    def execute(self, command: str, arguments: Json | None = None, *, seconds: float = SECONDS) -> Any:
        """The answer. RefusedError when QEMU says no, SilentError when it says nothing."""
        deadline = time.monotonic() + seconds
        self._greet(deadline)
        return self._ask(command, arguments or {}, deadline)

    def take_events(self, *names: str) -> list[dict[str, Any]]:
        """The data of all events of these names that came with the answers so far, each once."""
        return [event["data"] for event in self._taken(names)]

    def told(self, *names: str, seconds: float) -> list[dict[str, Any]]:
        """Name and data of all events of these names so far, each once; reads on for so long, or to QEMU's end."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(QmpError):
            self._greet(deadline)
            while True:
                self._keep(self._read("no more", deadline))
        return self._taken(names)

    def _taken(self, names: Container[str]) -> list[dict[str, Any]]:
        found = [seen for seen in self._events if seen["event"] in names]
        self._events = [seen for seen in self._events if seen["event"] not in names]
        return [{"name": seen["event"], "data": dict(seen.get("data", {}))} for seen in found]

    def close(self) -> None:
        self._socket.close()

    def _greet(self, deadline: float) -> None:
        """Go on until QEMU listens; what there is no time for is left to the next who asks."""
        if not self._welcomed:
            if "QMP" not in self._read("no greeting", deadline):
                raise SilentError("what answers is no monitor of QEMU's")
            self._welcomed = True
        if not self._greeted:
            self._begun = self._begun or self._send("qmp_capabilities", {}, max(deadline - time.monotonic(), 0.001))
            self._answer("qmp_capabilities", self._begun, deadline)
            self._greeted = True

    def _ask(self, command: str, arguments: Json, deadline: float) -> Any:
        return self._answer(command, self._send(command, arguments, max(deadline - time.monotonic(), 0.001)), deadline)

    def _send(self, command: str, arguments: Json, seconds: float) -> int:
        """The message's number, which its answer has, too."""
        self._asked += 1
        message = {"execute": command, "id": self._asked} | ({"arguments": arguments} if arguments else {})
        self._socket.settimeout(seconds)
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as problem:
            raise SilentError(f"{command}: QEMU has gone, or does not listen: {problem.strerror or problem}") from None
        return self._asked

    def _answer(self, command: str, number: int, deadline: float) -> Any:
        while True:
            answer = self._read(f"no answer to {command}", deadline)
            if answer.get("id") != number:  # an event, or an answer that came too late for who asked
                self._keep(answer)
            elif "error" in answer:
                raise RefusedError(command, str(answer["error"].get("class")), str(answer["error"].get("desc")))
            else:
                return answer.get("return")

    def _keep(self, message: dict[str, Any]) -> None:
        if "event" in message:
            self._events = [*self._events[1 - _EVENTS_MAX :], message]

    def _read(self, missing: str, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._unread:
            left = deadline - time.monotonic()
            if left <= 0:
                raise SilentError(f"{missing} in time")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise SilentError(f"{missing} in time") from None
            except OSError as problem:
                raise SilentError(f"{missing}: {problem.strerror}") from None
            if not data:
                raise SilentError(f"{missing}: QEMU has gone")
            self._unread += data
            if len(self._unread) > _LINE_MAX:
                raise SilentError(f"{missing}: QEMU's line has no end")
        line, _, rest = self._unread.partition(b"\n")
        self._unread = rest
        try:
            found = json.loads(line)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise SilentError(f"{missing}: what came is no message: {bytes(line[:80])!r}")
        return found


@contextlib.contextmanager
def connected() -> Iterator[tuple[Qmp, socket.socket]]:
    """Our end, and the one that QEMU is to inherit: closed here then, so that we hear of QEMU's end."""
    ours, theirs = socket.socketpair()
    with theirs:
        qmp = Qmp(ours)
        try:
            yield qmp, theirs
        finally:
            qmp.close()
