"""What a kernel build knows of its objects: how large each is, and how long its compiler worked on it.

Sizes are the same in every build and lie beside the kernel (objects.json). Seconds are not: they are remembered per
architecture, an object's latest, and ccache's hits, for which no compiler ran, leave them as they were.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.cache import Cache
from osbuild.output import write_whole

NAME: Final = "objects.json"
TIMED: Final = "timed"  # in the build directory: the program that runs a compiler and notes what that took

# dash and bash print the same lines: user and system time of the shell, then of its children.
_SCRIPT: Final = """\
#!/bin/sh
"$@" || exit
for word; do
  [ "$before" = -o ] && object=$word
  before=$word
done
case $object in *.o) times >"$object.seconds" ;; esac
exit 0
"""
_TIMES: Final = re.compile(r"(\d+)m([\d.]+)s (\d+)m([\d.]+)s")


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes of one object that go into the kernel's memory."""

    text: int
    data: int
    bss: int

    @property
    def total(self) -> int:
        """All of them; what alignment, linking and relocation make of it is not in here."""
        return self.text + self.data + self.bss


def write_timed(out: Path) -> Path:
    """The program, in a build directory."""
    path = out / TIMED
    path.write_text(_SCRIPT)
    path.chmod(0o755)
    return path


def measure(out: Path, prefix: str) -> dict[str, Size]:
    """The objects that make up out/vmlinux, by their names in the build directory; libraries' members are not told."""
    archive = out / "vmlinux.a"
    if not archive.is_file():
        return {}
    names = command.run(f"{prefix}ar", "t", archive.name, cwd=out).output.split()
    names = sorted({name for name in names if name.endswith(".o") and (out / name).is_file()})
    if not names:
        return {}
    rows = command.run(f"{prefix}size", *names, cwd=out).output.splitlines()[1:]
    found = {}
    for row in rows:
        text, data, bss, _, _, name = row.split(None, 5)
        found[name] = Size(int(text), int(data), int(bss))
    return found


def write_sizes(sizes: Mapping[str, Size], home: Path) -> None:
    """objects.json: name -> [text, data, bss]."""
    document = {name: [size.text, size.data, size.bss] for name, size in sizes.items()}
    (home / NAME).write_text(json.dumps(document, indent=0, sort_keys=True) + "\n")


def read_sizes(home: Path) -> dict[str, Size]:
    """The same back."""
    return {name: Size(*numbers) for name, numbers in json.loads((home / NAME).read_text()).items()}


def remember_seconds(out: Path, memory: Path, cache: Cache) -> None:
    """Add what the compilers of this build took to what is known; a cache that cannot be written to learns nothing."""
    notes = list(out.rglob("*.o.seconds"))
    found = {str(path.relative_to(out))[: -len(".seconds")]: _seconds(path) for path in notes}
    for path in notes:
        path.unlink()  # the next build here notes what it compiles
    if found:
        with cache.lock(f"kernel-{memory.name}"), contextlib.suppress(OSError):
            known = recall_seconds(memory) | {name: value for name, value in found.items() if value is not None}
            write_whole(memory, json.dumps(known, indent=0, sort_keys=True).encode())


def recall_seconds(memory: Path) -> dict[str, float]:
    """Object -> processor seconds of its compiler when it last ran."""
    try:
        return {str(name): float(value) for name, value in json.loads(memory.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def total(sizes: Mapping[str, Size], names: Iterable[str]) -> int:
    """Bytes of these objects."""
    return sum(sizes[name].total for name in names if name in sizes)


def _seconds(path: Path) -> float | None:
    lines = _TIMES.findall(path.read_text(errors="replace"))
    if len(lines) != 2:
        return None
    minutes, seconds, system_minutes, system_seconds = map(float, lines[1])
    return round(60 * (minutes + system_minutes) + seconds + system_seconds, 3)
