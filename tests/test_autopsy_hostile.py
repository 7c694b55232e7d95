"""Consoles that are made to be slow to read: what a guest writes costs its reader no more than its length."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import pytest

from osbuild import autopsy, last_words
from osbuild.autopsy import Evidence

_KIB: Final = 1024
_FIRST: Final = "[    0.000000] Linux version 6.12\n[    0.100000] Kernel command line: root=/dev/pmem0p1\n"
_INIT: Final = "[    0.500000] Run /init as init process\n"
_DIED: Final = "[    9.000000] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00000100\n"
_UNPACKED: Final = "Trying to unpack rootfs image as initramfs..."


def _many(*lines: str, begin: str = "", end: str = "") -> Callable[[int], str]:
    """The same lines, again and again; what has no end is one line."""
    unit = "".join(lines)
    return lambda size: f"{_FIRST}{begin}{unit * (size // len(unit))}\n{end}"


def _kernel(*lines: str, end: str = "") -> Callable[[int], str]:
    """The kernel's, who gets no further in time."""
    return _many(*(f"[    1.000000] {line}\n" for line in lines), end=end)


def _times(size: int) -> str:
    """Half of it rises, and the rest is always before that."""
    count = size // 54
    rising = "".join(f"[{second:5}.000000] on and on\n" for second in range(count))
    return _FIRST + rising + "".join(f"[    0.{second:06}] and again\n" for second in reversed(range(count)))


# Each was quadratic, or looks as if it could be.
SHAPES: Final[dict[str, Callable[[int], str]]] = {
    "nothing but ends of lines": _many("\n"),
    "blanks": _many(" "),
    "braces": _many("{"),
    "lines of a brace": _many("{\n"),
    "brackets": _many("[ "),
    "no agent's start": _many('{"msg":"agent starte\n'),
    "times that run back": _times,
    "an oops": _kernel("BUG: unable to handle page fault for address: 0", end=_DIED),
    "an oops, and words": _many("[    1.000000] Oops: 0\n", "x\n"),
    "panics that nobody heeds": _many("[    1.000000] Kernel panic - not syncing: x\n", "x\n"),
    "a stall": _kernel("rcu: INFO: rcu_sched self-detected stall"),
    "unpacking": _kernel(_UNPACKED),
    "unpacking that ends with a word": _kernel(_UNPACKED, "xxx"),
    "unpacking, until memory is gone": _kernel(
        "Unpacking initramfs...", end="[    2.000000] Kernel panic - not syncing: Out of memory\n"
    ),
    "an initramfs that is damaged": _kernel("Initramfs unpacking failed: junk"),
    "agents that listen, on a line": _many('"msg":"listening",', begin=_INIT + '{"msg":"agent started"}\n'),
    "agents that listen": _many(
        '{"msg":"listening","address":"unix:x"}\n', begin=_INIT + '{"msg":"agent started"}\n'
    ),
    "cgroups": _many("[    1.000000] cgroup: Disabled controller 'x'\n", "cgroup x\n", end=_DIED),
    "libraries": _many("a: error while loading shared libraries: b: cannot open\n", end=_DIED),
    "other disks": _kernel("EXT4-fs error (device vdb1): x"),
    "no root": _kernel('VFS: Cannot open root device "vda1" or unknown-block(0,0)', "available partitions:"),
    "a disk, and no driver": _kernel(
        'VFS: Cannot open root device "vda1" or unknown-block(0,0)', "available partitions:", "fe00 1 vda", "  x"
    ),
    "filesystems that were tried": _kernel("No filesystem could mount root, tried: ", "  ext4"),
    "DAX": _kernel("EXT4-fs: unknown unknown unknown unknown unknown unknown unknown"),
    "units": _many("systemd[1]: Unit a is masked.\n"),
    "read-only": _many("/run /run /run /run /run Read-only file syste\n"),
    "resets": _many("triple faul "),
}  # fmt: skip


def _seconds(console: str) -> float:
    """Of a processor, at best: what else a machine does takes none of it."""
    took = []
    for _ in range(2):
        last_words.read.cache_clear()
        began = time.process_time()
        evidence = Evidence(console=console, status=0 if "panic" in console else None)
        autopsy.explain(evidence)
        autopsy.trouble(evidence)
        took.append(time.process_time() - began)
    return min(took)


@pytest.mark.parametrize("shape", SHAPES)
def test_four_times_the_console_takes_no_eight_times_as_long(shape: str) -> None:
    """Sixteen, if it were quadratic. What takes no time at all is not compared."""
    small, large = (_seconds(SHAPES[shape](size * _KIB)) for size in (30, 120))
    assert large < 8 * max(small, 0.003), (small, large)
