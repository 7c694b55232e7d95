"""The macro language under Kconfig: `$(name,argument,…)` becomes text before the line is read.

    name := text    expanded when it is read        name = text    expanded each time it is used, with $(1), $(2) …
    name += text    as the name was first given

Functions that are always there: $(shell,…) $(info,…) $(warning-if,…) $(error-if,…) $(filename) $(lineno).

A name that is none of these is an environment variable; one that is unset is empty. Nothing here starts a process:
`ask` is the caller's, and answers a shell command with what it printed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

_DEEPEST: Final = 100  # a variable that uses itself never ends


class MacroError(ValueError):
    """A macro cannot be expanded, or says itself that something is wrong."""


@dataclass(slots=True)
class Macros:
    """The variables and functions that the lines read so far have defined."""

    environment: Mapping[str, str]
    ask: Callable[[str], str]
    file: str = ""  # where the reader is, for $(filename) and $(lineno)
    line: int = 0
    said: list[str] = field(default_factory=list)  # by $(info) and $(warning-if)
    read: set[str] = field(default_factory=set)  # the environment variables that were asked for
    _simple: dict[str, str] = field(default_factory=dict)
    _recursive: dict[str, str] = field(default_factory=dict)
    _depth: int = 0

    def assign(self, name: str, operator: str, value: str) -> None:
        """`name := value`, `name = value` or `name += value`."""
        if operator == "+=" and name in self._simple:
            self._simple[name] += " " + self.expand(value)
        elif operator == "+=" and name in self._recursive:
            self._recursive[name] += " " + value
        elif operator == ":=":
            self._recursive.pop(name, None)
            self._simple[name] = self.expand(value)
        else:
            self._simple.pop(name, None)
            self._recursive[name] = value

    def expand(self, text: str, arguments: Sequence[str] = ()) -> str:
        """The text with every `$(…)` replaced; a dollar before anything else is a dollar."""
        start = text.find("$(")
        if start < 0:
            return text
        pieces, at = [], 0
        while start >= 0:
            end = closing(text, start + 2)
            pieces += [text[at:start], self._call(text[start + 2 : end], arguments)]
            at = end + 1
            start = text.find("$(", at)
        return "".join(pieces) + text[at:]

    def _call(self, clause: str, arguments: Sequence[str]) -> str:
        name, *given = (self.expand(part, arguments) for part in _split(clause))
        if name.isdigit() and not given:
            number = int(name)
            return arguments[number - 1] if 1 <= number <= len(arguments) else ""
        if name in self._recursive:
            return self._apply(name, given)
        if name in self._simple:
            return self._simple[name]
        if name in _BUILTIN:
            count, function = _BUILTIN[name]
            if len(given) != count:
                raise MacroError(f"$({name}) takes {count} arguments, and has {len(given)}")
            return function(self, *given)
        if given:
            raise MacroError(f"no function {name!r}")
        self.read.add(name)
        return self.environment.get(name, "")

    def _apply(self, name: str, given: Sequence[str]) -> str:
        if self._depth >= _DEEPEST:
            raise MacroError(f"$({name}) uses itself")
        self._depth += 1
        try:
            return self.expand(self._recursive[name], given)
        finally:
            self._depth -= 1

    def _shell(self, script: str) -> str:
        return self.ask(script).rstrip("\n").replace("\n", " ")

    def _info(self, text: str) -> str:
        self.said.append(text)
        return ""

    def _warning_if(self, condition: str, text: str) -> str:
        if condition == "y":
            self.said.append(f"{self.file}:{self.line}: {text}")
        return ""

    def _error_if(self, condition: str, text: str) -> str:
        if condition == "y":
            raise MacroError(text)
        return ""

    def _filename(self) -> str:
        return self.file

    def _lineno(self) -> str:
        return str(self.line)


_BUILTIN: Final[Mapping[str, tuple[int, Callable[..., str]]]] = {
    "shell": (1, Macros._shell),
    "info": (1, Macros._info),
    "warning-if": (2, Macros._warning_if),
    "error-if": (2, Macros._error_if),
    "filename": (0, Macros._filename),
    "lineno": (0, Macros._lineno),
}


def closing(text: str, at: int) -> int:
    """Where the parenthesis that was opened just before `at` is closed."""
    depth = 1
    for index in range(at, len(text)):
        if text[index] == "(":
            depth += 1
        elif text[index] == ")":
            depth -= 1
            if depth == 0:
                return index
    raise MacroError(f"$({text[at:].strip()} is not closed")


def _split(clause: str) -> list[str]:
    """The parts between the commas that are in no parentheses of their own."""
    parts, depth, start = [], 0, 0
    for index, letter in enumerate(clause):
        if letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(clause[start:index])
            start = index + 1
    return [*parts, clause[start:]]
