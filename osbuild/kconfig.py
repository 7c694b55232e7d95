"""Kernel configuration fragments: what is asked for, by which line and why; and what of it a kernel did not keep.

    # why: the reason for this file                 first line, always
    CONFIG_EXT4_FS=y

    # why: a reason of their own                    for the lines up to the next empty one
    # CONFIG_MODULES is not set

Nothing here reads a file or runs a program.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from osbuild.errors import InputError

UNSET: Final = "n"  # how "# CONFIG_X is not set", "CONFIG_X=n" and a symbol that is nowhere all read

# Tools that Kconfig looks for and writes the version of into the configuration, though nothing of ours needs them.
ABSENT: Final[Mapping[str, str]] = {"RUSTC": "none", "BINDGEN": "none", "PAHOLE": "none"}

_WHY: Final = re.compile(r"# why: (\S.*)")
_SET: Final = re.compile(r'(CONFIG_\w+)=([ymn]|"(?:[^"\\]|\\.)*"|-?\d+|0x[0-9A-Fa-f]+)', re.ASCII)
_NOT_SET: Final = re.compile(r"# (CONFIG_\w+) is not set", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One symbol that a fragment sets."""

    symbol: str  # with its CONFIG_
    value: str  # as in .config: y, m, n, a number, or a string in its quotes
    file: str
    line: int
    why: str

    @property
    def place(self) -> str:
        """Where to find it, as editors and compilers write it."""
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dropped:
    """A request that the final configuration does not honour."""

    request: Request
    got: str

    def __str__(self) -> str:
        return f"{self.request.symbol}: wanted {self.request.value}, got {self.got} ({self.request.place})"


def parse_fragment(text: str, file: str) -> tuple[Request, ...]:
    """What one fragment asks for; `file` is what errors call it."""
    lines = text.splitlines()
    first = _WHY.fullmatch(lines[0]) if lines else None
    if first is None:
        raise InputError(f"{file}:1: a fragment begins with its reason", hint="make the first line `# why: …`")
    why = own = first[1]
    requests = []
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            own = why
        elif reason := _WHY.fullmatch(line):
            own = reason[1]
        elif setting := _setting(line):
            symbol, value = setting
            requests.append(Request(symbol=symbol, value=value, file=file, line=number, why=own))
        elif not line.startswith("#") or "CONFIG_" in line:  # a comment that names a symbol is a setting misspelt
            raise InputError(
                f"{file}:{number}: not a setting: {line}", hint="`CONFIG_X=value`, or `# CONFIG_X is not set`"
            )
    return tuple(requests)


def combine(fragments: Iterable[Iterable[Request]]) -> tuple[Request, ...]:
    """All requests of several fragments, in order; a symbol may be asked for once, so that nothing depends on order."""
    seen: dict[str, Request] = {}
    for request in (request for fragment in fragments for request in fragment):
        first = seen.setdefault(request.symbol, request)
        if first is not request:
            verb = "repeats" if first.value == request.value else "contradicts"
            raise InputError(
                f"{request.place}: {request.symbol}={request.value} {verb} {first.place}: {first.symbol}={first.value}",
                hint="delete one of the two lines",
            )
    return tuple(seen.values())


def parse_config(text: str) -> dict[str, str]:
    """The symbols of a finished .config that are set."""
    found = (_setting(line) for line in text.splitlines())
    return dict(setting for setting in found if setting is not None and setting[1] != UNSET)


def dropped(requested: Iterable[Request], final: str) -> tuple[Dropped, ...]:
    """Every request whose value in the text of the final .config is another one."""
    config = parse_config(final)
    pairs = ((request, config.get(request.symbol, UNSET)) for request in requested)
    return tuple(Dropped(request=request, got=got) for request, got in pairs if not same(request.value, got))


def _setting(line: str) -> tuple[str, str] | None:
    if match := _SET.fullmatch(line):
        return match[1], match[2]
    if match := _NOT_SET.fullmatch(line):
        return match[1], UNSET
    return None


def same(wanted: str, got: str) -> bool:
    """Whether two values of .config are one."""
    # Kconfig writes numbers as they were typed, but a default of its own may be spelt in another base.
    try:
        return wanted == got or int(wanted, 0) == int(got, 0)
    except ValueError:
        return False
