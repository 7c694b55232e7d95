"""A guest's console, and who said what on it: its kernel, or anybody else; and how the kernel says that it ended.

The kernel begins each line with its time, which never runs back, and writes a line at a time, if need be into the
middle of somebody else's. Whatever has no such time is userland's, however much it looks like a panic: programs quote.
"""

from __future__ import annotations

import bisect
import enum
import functools
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

STAMP: Final = r"\[ *(?P<guest>\d+\.\d{6})\](?:\[ *[CT]\d+\])? "  # with CONFIG_PRINTK_CALLER, who wrote it
TIME: Final = STAMP.replace("?P<guest>", "?:")  # for patterns that have it more than once

_READ_CHARACTERS: Final = 1000  # of a line; a guest may write lines without end, and patterns take their time for those
_STAMP: Final = re.compile(STAMP)
_BACK_SECONDS: Final = 0.01  # processors write side by side, and not quite in order
_TORN_SECONDS: Final = 1.0  # until the kernel's next line, where it wrote into somebody else's
_FEW: Final = 4
_LONG_SECONDS: Final = 600.0  # more than is waited for a guest: a time so far ahead is another guest's
_TORN: Final = 2  # lines that others had begun to write when the kernel panicked


class Phase(enum.StrEnum):
    """How far a guest came, as far as its console shows."""

    nothing = enum.auto()
    firmware = enum.auto()
    kernel = enum.auto()
    init = enum.auto()
    agent = enum.auto()


class End(enum.StrEnum):
    """How a guest's kernel says that it ended."""

    unsaid = enum.auto()  # it lives, or was reset, or was ended from outside
    root = enum.auto()  # the panics: no root to mount,
    start = enum.auto()  # nothing to start on it,
    init = enum.auto()  # init ended,
    memory = enum.auto()  # none is left,
    fault = enum.auto()  # the kernel itself stumbled,
    panic = enum.auto()  # and all others
    left = enum.auto()  # somebody asked for it


_PANIC: Final = re.compile(rf"^(?:{TIME})?Kernel panic - not syncing: (?P<why>.*)$", re.MULTILINE)
_LEFT: Final = re.compile(
    rf"^(?:{TIME})?(?:reboot: (?:machine restart|Restarting system|Power down|Power off not available|System halted)"
    r"|sysrq: Resetting)",
    re.MULTILINE,
)
_PANICS: Final = (
    (End.root, "VFS: Unable to mount root fs"),
    (End.start, "No working init found"),
    (End.start, "No init found"),
    (End.start, "Requested init "),
    (End.init, "Attempted to kill init!"),
    (End.memory, "System is deadlocked on memory"),
    (End.memory, "Out of memory"),
    (End.fault, "Fatal exception"),
    (End.fault, "Oops"),
    (End.fault, "Attempted to kill the idle task"),
    (End.fault, "Aiee, killing interrupt handler"),
)

_RUN: Final = re.compile(rf"^(?:{TIME})?(?:Run \S+ as init process|systemd\[1\]: )", re.MULTILINE)
_AGENT: Final = re.compile(r'^[^"\n]*\{"msg":"agent started"', re.MULTILINE)
_ROOT: Final = (
    re.compile(r"ommand line: .*(?<!\S)root=(?:/dev/)?(\S+)"),
    re.compile(r"VFS: Cannot open root device \"(?:/dev/)?([^\"]*)\""),
    re.compile(r"VFS: Unable to mount root fs on \"(?:/dev/)?([^\"]*)\""),
)
_WORDS: Final = re.compile(r"ommand line: .*")
_TYPE: Final = re.compile(r"ommand line: .*(?<!\S)rootfstype=(\S+)")
_TRIED: Final = re.compile(rf"No filesystem could mount root, tried: *(.*(?:\n(?:{TIME})? +\w+ *$)*)", re.MULTILINE)
# What the kernel writes below a complaint, and not because it went on.
_TRACE: Final = re.compile(
    r"\s|$|CPU: |RIP: |RSP: |R[A-Z0-9]{2}: |[FC]S: |CR2: |DR\d: |PKRU|ORIG_RAX|EFLAGS|Code: |Call [Tt]race|</?[A-Z]+>"
    r"|---\[|Modules linked|Hardware name|Workqueue: |NMI backtrace|Sending NMI|rcu: |task:|pc : |lr : |sp : |x\d+ *: "
    r"|pstate: |Kernel Offset|CPU features|Memory Limit|Rebooting in|#PF: |PGD |Oops: |BUG: |note: |Internal error"
    r"|SMP: stopping secondary|Dumping ftrace|\(sampled|\(detected by|\(t=|Kernel panic"
)
_PROCESS: Final = re.compile(rf"^(?:{TIME})?CPU: \d+ (?:UID: \d+ )?PID: (\d+) ", re.MULTILINE)
_TRACE_ENDS: Final = re.compile(r"---\[ end trace|Kernel panic - ")
_TRACE_CHARACTERS: Final = 4000  # until it has said whose it is


@dataclass(frozen=True, kw_only=True)
class Console:
    """A console, read."""

    text: str  # all of it: a line for each piece that somebody wrote
    kernel: str  # the kernel's lines
    places: tuple[tuple[int, int], ...]  # where each of those begins, here and there
    stamped: bool  # the kernel writes its time; otherwise who said what is a guess

    def place(self, at: int) -> int:
        """Where in all of it the kernel's character at an offset lies."""
        index = bisect.bisect_right(self.places, (at, math.inf)) - 1
        return self.places[index][1] + at - self.places[index][0]

    @functools.cached_property
    def phase(self) -> Phase:
        """The furthest that it shows."""
        if _AGENT.search(self.text):
            return Phase.agent
        if _RUN.search(self.kernel) or re.search(r"^systemd\[1\]: ", self.text, re.MULTILINE):
            return Phase.init
        if (self.stamped and self.kernel) or re.search(r"^Linux version \d", self.text, re.MULTILINE):
            return Phase.kernel
        return Phase.firmware if self.text.strip() else Phase.nothing

    @functools.cached_property
    def end(self) -> tuple[End, str]:
        """How the kernel says that it ended, and why it panicked; nobody says much after that."""
        last: tuple[End, str] = (End.unsaid, "")
        at = -1
        for match in _PANIC.finditer(self.kernel):
            if self._said_behind(self.place(match.end())) <= _TORN:
                why = match["why"]
                kind = next((end for end, begins in _PANICS if why.startswith(begins)), End.panic)
                last, at = (kind, why), match.start()
                break
        for match in _LEFT.finditer(self.kernel):
            if match.start() > at:
                return End.left, ""
        return last

    @functools.cached_property
    def roots(self) -> frozenset[str] | None:
        """The device that was to be mounted, without /dev, and those that it is made of; None where nobody says."""
        told = _WORDS.search(self.kernel)
        found = next((match[1] for pattern in _ROOT if (match := pattern.search(self.kernel))), None)
        if found is None:
            return None if told is None else frozenset()
        if found.startswith("dm-") and told is not None:
            return frozenset([found, *re.findall(r"/dev/(\w+)", told[0])])
        return None if "=" in found else frozenset([found] if found else ())

    @functools.cached_property
    def tried(self) -> frozenset[str]:
        """The filesystems that the root was to be mounted as."""
        tried, kind = _TRIED.search(self.kernel), _TYPE.search(self.kernel)
        words = re.sub(TIME, " ", tried[1]).split() if tried else []
        return frozenset([*words, *(kind[1].split(",") if kind else ())])

    def process(self, at: int) -> int | None:
        """Whose the trace is that follows there, in the kernel's lines."""
        trace = _TRACE_ENDS.split(self.kernel[at : at + _TRACE_CHARACTERS], maxsplit=1)[0]
        told = _PROCESS.search(trace)
        return int(told[1]) if told else None

    def went_on(self, at: int) -> bool:
        """Whether anybody says anything behind there but what belongs to a complaint of the kernel's."""
        return at < self._last_words

    def said_since(self, at: int, *, but: str = "") -> bool:
        """Whether userland has said anything behind there, but lines of a kind."""
        said = self._said[len(self._said) - self._said_behind(at) :]
        return any(not (but and re.search(but, line)) for _, line in said)

    def _said_behind(self, at: int) -> int:
        """How many lines of userland's begin behind there."""
        return len(self._said) - bisect.bisect_right(self._said, at, key=lambda said: said[0])

    @functools.cached_property
    def _said(self) -> list[tuple[int, str]]:
        """Userland's lines, and where each begins."""
        if not self.stamped:
            return []
        return [(at, line) for at, line in self._lines if line.strip() and not _STAMP.match(line)]

    @functools.cached_property
    def _last_words(self) -> int:
        """Where the last line begins that belongs to no complaint of the kernel's."""
        lines = (at for at, line in reversed(self._lines) if not _TRACE.match(_STAMP.sub("", line, count=1)))
        return next(lines, -1)

    @functools.cached_property
    def _lines(self) -> list[tuple[int, str]]:
        lines = self.text.split("\n")
        return list(zip(itertools.accumulate((len(line) + 1 for line in lines), initial=0), lines, strict=False))


@functools.lru_cache(maxsize=8)
def read(console: str, *, over: bool) -> Console:
    """Who said what; `over`: nothing can have followed what stands last."""
    pieces = list(_pieces(console, over=over))
    stamped = any(by_kernel for by_kernel, _ in pieces)
    text, kernel, places = [], [], []
    here = there = 0
    for by_kernel, line in pieces:
        if by_kernel or not stamped:
            places.append((there, here))
            kernel.append(line)
            there += len(line) + 1
        text.append(line)
        here += len(line) + 1
    return Console(text="\n".join(text), kernel="\n".join(kernel), places=tuple(places), stamped=stamped)


def _pieces(console: str, *, over: bool) -> Iterator[tuple[bool, str]]:
    """Every line, and whether the kernel wrote it; those that it wrote into are two."""
    lines = [line[:_READ_CHARACTERS] for line in console.split("\n")]
    mine = _in_order(lines)
    last = max((index for index, line in enumerate(lines) if line.strip()), default=0)
    follows, after = [math.inf] * len(lines), math.inf  # the kernel's next time
    for index in reversed(range(len(lines))):
        follows[index] = after
        after = mine.get(index, after)
    now = math.inf  # before its first line it writes into none
    for index, line in enumerate(lines):
        if index in mine:
            now = mine[index]
            yield True, line
            continue
        torn = _STAMP.search(line)
        time = float(torn[1]) if torn and torn.start() else -1.0
        soon = time <= follows[index] <= time + _TORN_SECONDS
        soon = soon or (over and index == last and time < now + _LONG_SECONDS)
        if torn is not None and time >= now and soon:
            now = time
            yield False, line[: torn.start()]
            yield True, line[torn.start() :]
        else:
            yield False, f" {line}" if _STAMP.match(line) else line  # no stamp of the kernel's


def _in_order(lines: list[str]) -> dict[int, float]:
    """Which lines the kernel wrote, and when: of those with a time, the most that follow one another.

    Others are quoted: by dmesg, from another guest's log.
    """
    seen: dict[str, float] = {}
    latest = 0.0
    stamped: list[tuple[int, float]] = []
    for index, line in enumerate(lines):
        if (stamp := _STAMP.match(line)) is not None:
            time = float(stamp[1])
            if line not in seen or latest <= time + _BACK_SECONDS:
                stamped.append((index, time))
            seen[line] = latest = time
    ends: list[float] = []  # of the longest rows so far, by length
    heads: list[int] = []
    before: list[int] = []
    for number, (_, time) in enumerate(stamped):
        length = bisect.bisect_right(ends, time)
        before.append(heads[length - 1] if length else -1)
        ends[length : length + 1] = [time]
        heads[length : length + 1] = [number]
    kept, number = set(), heads[-1] if heads else -1
    while number >= 0:
        kept.add(number)
        number = before[number]
    row = sorted(kept)
    for number, following in itertools.pairwise(row[-_FEW:]):
        if stamped[following][1] > stamped[number][1] + _LONG_SECONDS:
            kept = {one for one in kept if one <= number}
            break
    return _with_neighbours(stamped, kept)


def _with_neighbours(stamped: list[tuple[int, float]], kept: set[int]) -> dict[int, float]:
    """Also those that are only a little out of order."""
    after = [math.inf] * len(stamped)
    following = math.inf
    for number in reversed(range(len(stamped))):
        after[number] = following
        following = stamped[number][1] if number in kept else following
    now, mine = 0.0, {}
    for number, (index, time) in enumerate(stamped):
        if number in kept or now - _BACK_SECONDS <= time <= after[number] + _BACK_SECONDS < math.inf:
            mine[index] = time
        now = time if number in kept else now
    return mine
