"""Kconfig's expressions: three values, six comparisons, and what has to change for one of them to become true.

n = 0   m = 1   y = 2      && is the smaller, || the larger, !x is 2 - x; a comparison is y or n
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Protocol

N: Final = 0
M: Final = 1
Y: Final = 2
LETTERS: Final = "nmy"

_TOKEN: Final = re.compile(
    r"""\s*(?:(?P<op>&&|\|\||!=|<=|>=|[=<>!()])|"(?P<string>(?:[^"\\]|\\.)*)"|(?P<word>[\w.$/-]+))""", re.ASCII
)
_COMPARISONS: Final = frozenset(("=", "!=", "<", ">", "<=", ">="))
_UNESCAPE: Final = re.compile(r"\\(.)")


class ExpressionError(ValueError):
    """The text is no expression."""


class Values(Protocol):
    """What an expression needs to know of the symbols it names."""

    def tri(self, name: str) -> int:
        """A symbol as 0, 1 or 2; 0 for what is a number or a string, or is not defined."""

    def text(self, name: str) -> str:
        """A symbol's value as written in .config, without quotes; of a word that is no symbol, the word."""

    def number_base(self, name: str) -> int | None:
        """How the value is read in a comparison: 10, 16, 0 as its prefix says, None for y/m/n."""

    def modules(self) -> int:
        """The value of the symbol that makes m possible."""


class Expression(Protocol):
    """One node; `tri` is its value, `names` the symbols in it."""

    def tri(self, values: Values) -> int: ...

    def names(self) -> Iterator[str]: ...


@dataclass(frozen=True, slots=True)
class Word:
    """A symbol by name, or one of the constants y, m and n."""

    name: str

    def tri(self, values: Values) -> int:
        if self.name == "y":
            return Y
        if self.name == "m":  # without modules nothing can be m, so a condition that asks for it is never met
            return min(M, values.modules())
        return N if self.name == "n" else values.tri(self.name)

    def names(self) -> Iterator[str]:
        if self.name not in ("y", "m", "n"):
            yield self.name

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Text:
    """A constant in quotes."""

    value: str

    def tri(self, values: Values) -> int:
        return Word(self.value).tri(values) if self.value in ("y", "m", "n") else N

    def names(self) -> Iterator[str]:
        yield from ()

    def __str__(self) -> str:
        return quoted(self.value)


@dataclass(frozen=True, slots=True)
class Not:
    """!x"""

    inner: Expression

    def tri(self, values: Values) -> int:
        return Y - self.inner.tri(values)

    def names(self) -> Iterator[str]:
        return self.inner.names()

    def __str__(self) -> str:
        return f"!({self.inner})" if isinstance(self.inner, (All, Any, Compare)) else f"!{self.inner}"


@dataclass(frozen=True, slots=True)
class All:
    """x && y && …"""

    parts: tuple[Expression, ...]

    def tri(self, values: Values) -> int:
        least = Y
        for part in self.parts:
            least = min(least, part.tri(values))
            if least == N:
                break
        return least

    def names(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.names()

    def __str__(self) -> str:
        return " && ".join(f"({part})" if isinstance(part, Any) else str(part) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Any:
    """x || y || …"""

    parts: tuple[Expression, ...]

    def tri(self, values: Values) -> int:
        most = N
        for part in self.parts:
            most = max(most, part.tri(values))
            if most == Y:
                break
        return most

    def names(self) -> Iterator[str]:
        for part in self.parts:
            yield from part.names()

    def __str__(self) -> str:
        return " || ".join(str(part) for part in self.parts)


@dataclass(frozen=True, slots=True)
class Compare:
    """x = y and its like: of numbers where both are numbers, else of what is written."""

    operator: str
    left: Word | Text
    right: Word | Text

    def tri(self, values: Values) -> int:
        left, right = _written(self.left, values), _written(self.right, values)
        numbers = _number(self.left, left, values), _number(self.right, right, values)
        if self.operator in ("=", "!=") and left == right:
            order = 0
        elif numbers[0] is not None and numbers[1] is not None:
            order = (numbers[0] > numbers[1]) - (numbers[0] < numbers[1])
        else:
            order = (left > right) - (left < right)
        met = {
            "=": order == 0, "!=": order != 0, "<": order < 0, ">": order > 0, "<=": order <= 0, ">=": order >= 0,
        }[self.operator]  # fmt: skip
        return Y if met else N

    def names(self) -> Iterator[str]:
        yield from (*self.left.names(), *self.right.names())

    def __str__(self) -> str:
        return f"{self.left}{self.operator}{self.right}"


def _written(side: Word | Text, values: Values) -> str:
    if isinstance(side, Text):
        return side.value
    return side.name if side.name in ("y", "m", "n") else values.text(side.name)


def _number(side: Word | Text, text: str, values: Values) -> int | None:
    base = values.number_base(side.name) if isinstance(side, Word) and side.name not in ("y", "m", "n") else 0
    if base is None or (text in ("y", "m", "n") and base == 0):
        return LETTERS.index(text) if len(text) == 1 and text in LETTERS else None
    return number(text, base)


def number(text: str, base: int) -> int | None:
    """A whole number as C reads it (a leading 0 means octal where the base is open), or None."""
    if base == 0 and re.fullmatch(r"[+-]?0[0-7]+", text):
        base = 8
    try:
        return int(text, base) if "_" not in text else None
    except ValueError:
        return None


def quoted(text: str) -> str:
    """A constant as Kconfig writes it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@functools.cache
def parse(text: str) -> Expression:
    """The expression in a text without macros; ExpressionError when it is none."""
    tokens = _tokens(text)
    found, rest = _either(tokens, 0)
    if rest != len(tokens):
        raise ExpressionError(f"cannot read {text!r} from {tokens[rest][1]!r} on")
    return found


_Token = tuple[str, str]


def _tokens(text: str) -> list[_Token]:
    found: list[_Token] = []
    at = 0
    end = len(text.rstrip())
    while at < end:
        match = _TOKEN.match(text, at)
        if match is None or match.lastgroup is None:
            raise ExpressionError(f"cannot read {text!r} at {text[at:]!r}")
        found.append((match.lastgroup, match[match.lastgroup]))
        at = match.end()
    return found


def _either(tokens: list[_Token], at: int) -> tuple[Expression, int]:
    part, at = _both(tokens, at)
    parts = [part]
    while at < len(tokens) and tokens[at] == ("op", "||"):
        part, at = _both(tokens, at + 1)
        parts.append(part)
    return (parts[0] if len(parts) == 1 else Any(tuple(parts))), at


def _both(tokens: list[_Token], at: int) -> tuple[Expression, int]:
    part, at = _single(tokens, at)
    parts = [part]
    while at < len(tokens) and tokens[at] == ("op", "&&"):
        part, at = _single(tokens, at + 1)
        parts.append(part)
    return (parts[0] if len(parts) == 1 else All(tuple(parts))), at


def _single(tokens: list[_Token], at: int) -> tuple[Expression, int]:
    if at >= len(tokens):
        raise ExpressionError("an expression ends too early")
    if tokens[at] == ("op", "!"):
        inner, at = _single(tokens, at + 1)
        return Not(inner), at
    if tokens[at] == ("op", "("):
        inner, at = _either(tokens, at + 1)
        if at >= len(tokens) or tokens[at] != ("op", ")"):
            raise ExpressionError("a parenthesis is not closed")
        return inner, at + 1
    left = _atom(tokens, at)
    if at + 1 < len(tokens) and tokens[at + 1][0] == "op" and tokens[at + 1][1] in _COMPARISONS:
        if at + 2 >= len(tokens):
            raise ExpressionError("a comparison ends too early")
        return Compare(tokens[at + 1][1], left, _atom(tokens, at + 2)), at + 3
    return left, at + 1


def _atom(tokens: list[_Token], at: int) -> Word | Text:
    kind, text = tokens[at]
    if kind == "word":
        return Word(text)
    if kind == "string":
        return Text(_UNESCAPE.sub(r"\1", text))
    raise ExpressionError(f"{text!r} where a symbol should be")
