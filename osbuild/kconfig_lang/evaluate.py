"""What every symbol comes to, the way `make allnoconfig` with KCONFIG_ALLCONFIG decides it.

Of a symbol that somebody may set (its prompt is visible): what was asked for, or n. Of any other, and of numbers and
strings that nobody asked for: its default. Then never less than what selects it. Symbols are worked out when they are
wanted and not before, so that one answer does not cost a whole configuration; and what used what is remembered, so
that the same question with one more line asked for costs only what that line changes.

Before 6.11 (`Model.old`) a choice whose prompt is hidden has no member that is y, a member that is asked to be n may
still be the default of its choice, and a number without a value is empty rather than 0. Choices of tristate symbols,
which those kernels have too, are taken for choices of y: nothing can be m where there are no modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from osbuild.kconfig_lang.expression import LETTERS, M, N, Y, number, parse
from osbuild.kconfig_lang.model import BOOL, HEX, INT, STRING, TRISTATE, UNKNOWN, Definition, Line, Model

_UNESCAPE: Final = re.compile(r"\\(.)")
_BASES: Final[Mapping[str, int | None]] = {BOOL: None, TRISTATE: None, INT: 10, HEX: 16, STRING: 0, UNKNOWN: 0}
_EMPTY: Final[Mapping[str, str]] = {INT: "0", HEX: "0x0"}  # of a number that nothing gives a value
_INT: Final = re.compile(r"-?(?:0|[1-9][0-9]*)", re.ASCII)
_HEX: Final = re.compile(r"(?:0[xX])?[0-9A-Fa-f]+", re.ASCII)

Key = str | int  # a symbol by name, a scope by number, a choice by -1 - number


@dataclass(frozen=True, slots=True)
class State:
    """One symbol, worked out."""

    value: str  # as in .config, without quotes: y, m, n, a number, a string
    tri: int
    visible: int = N  # how far somebody may raise it
    direct: int = Y  # what its dependencies allow
    floor: int = N  # what selects it
    implied: int = N
    written: bool = False  # whether it is in .config at all ("is not set" counts as being there)
    asked: bool = False  # whether it is what was asked for that counts
    default: Line | None = None  # the default that counts


class Evaluator:
    """The values of one model's symbols, for one set of settings that are asked for."""

    def __init__(self, model: Model, asked: Mapping[str, str]) -> None:
        self.model = model
        self.asked: dict[str, str] = dict(asked)  # symbol without CONFIG_ -> as in .config
        self._known: dict[Key, State | tuple[int, int] | str] = {}
        self._users: dict[Key, set[Key]] = {}  # what was worked out with it
        self._stack: list[Key] = []
        self._open: set[Key] = set()

    def with_settings(self, more: Mapping[str, str | None]) -> Evaluator:
        """The same with some settings more, others or (None) less; shares all that they do not touch."""
        # New ones come first: of several members of a choice the last counts, and nobody knows where a line will stand.
        fresh = {name: value for name, value in more.items() if value is not None and name not in self.asked}
        changed = {name: more.get(name, value) for name, value in self.asked.items()}
        other = Evaluator(self.model, fresh | {name: value for name, value in changed.items() if value is not None})
        stale: set[Key] = set()
        for name in more:
            self._spread(name, stale)
            if name in self.model.choice_of:
                self._spread(-1 - self.model.choice_of[name], stale)
        other._known = {key: known for key, known in self._known.items() if key not in stale}
        other._users = {key: {user for user in users if user not in stale} for key, users in self._users.items()}
        return other

    def _spread(self, key: Key, stale: set[Key]) -> None:
        waiting = [key]
        while waiting:
            key = waiting.pop()
            if key not in stale:
                stale.add(key)
                waiting += self._users.get(key, ())

    # What expressions ask.

    def tri(self, name: str) -> int:
        """A symbol as 0, 1 or 2."""
        return self.state(name).tri if name in self.model.kinds else N

    def text(self, name: str) -> str:
        """A symbol's value; of a word that is no symbol, the word."""
        return self.state(name).value if self.model.kind(name) else name

    def number_base(self, name: str) -> int | None:
        """How its value is read in a comparison."""
        return _BASES[self.model.kind(name)]

    def modules(self) -> int:
        """Whether anything can be m."""
        return self.tri(self.model.modules) if self.model.modules else N

    def met(self, condition: str) -> int:
        """A condition's value; an empty one is always met."""
        return parse(condition).tri(self) if condition else Y

    # Symbols.

    def state(self, name: str) -> State:
        """All about one symbol."""
        known = self._look(name)
        if known is None:
            known = self._work_out(name)
        if not isinstance(known, State):
            raise TypeError(name)
        return known

    def states(self) -> Iterator[tuple[str, State]]:
        """Every symbol that the model defines."""
        for name in self.model.definitions:
            yield name, self.state(name)

    def _look(self, key: Key) -> State | tuple[int, int] | str | None:
        if self._stack:
            self._users.setdefault(key, set()).add(self._stack[-1])
        return self._known.get(key)

    def _work_out(self, name: str) -> State:
        if name in self._open:  # a symbol that hangs on itself; trees that ship have none
            return State(value="n", tri=N)
        self._open.add(name)
        self._stack.append(name)
        try:
            kind = self.model.kind(name)
            if kind in (BOOL, TRISTATE):
                found = self._switch(name)
            elif kind == UNKNOWN:
                found = State(value=name, tri=N)
            else:
                found = self._valued(name, kind)
        finally:
            self._stack.pop()
            self._open.discard(name)
        self._known[name] = found
        return found

    def is_switch(self, name: str) -> bool:
        """Whether y and n is all that it can be."""
        kind = self.model.kind(name)
        return kind == BOOL or (kind == TRISTATE and self.modules() == N)

    def _rounded(self, name: str, value: int) -> int:
        return Y if value == M and self.is_switch(name) else value

    def _switch(self, name: str) -> State:
        definitions = self.model.definitions.get(name, ())
        visible = self._rounded(name, self._visible(definitions))
        direct = self._rounded(name, max((self.direct(each) for each in definitions), default=N))
        floor = self._rounded(name, self._pushed(self.model.selectors.get(name, ())))
        implied = self._rounded(name, self._pushed(self.model.impliers.get(name, ())))
        default: Line | None = None
        asked = False
        written = visible > N or floor > N
        if visible > N and name in self.model.choice_of:
            value = Y if self.chosen(self.model.choice_of[name]) == name else N
            asked = value == Y and self.asked_tri(name) == Y
        elif visible > N:
            wanted = self.asked_tri(name)
            value, asked = min(visible, wanted or N), wanted is not None
        else:
            default, value = self._default(definitions)
            written = written or default is not None or implied > N
            value = min(max(value, implied), direct) if implied > N else value
        value = self._rounded(name, max(value, floor))
        return State(
            value=LETTERS[value], tri=value, visible=visible, direct=direct, floor=floor, implied=implied,
            written=written, asked=asked, default=default,
        )  # fmt: skip

    def asked_tri(self, name: str) -> int | None:
        """What was asked for as 0, 1 or 2; None when nothing was, or nothing that this symbol can be."""
        wanted = self.asked.get(name)
        if wanted == "m" and self.model.kind(name) == BOOL:
            return None
        return LETTERS.index(wanted) if wanted in ("n", "m", "y") else None

    def _valued(self, name: str, kind: str) -> State:
        definitions = self.model.definitions.get(name, ())
        visible = Y if self._visible(definitions) > N else N
        direct = Y if any(self.direct(each) > N for each in definitions) else N
        wanted = _readable(self.asked.get(name), kind)
        default: Line | None = None
        asked = visible > N and wanted is not None
        if asked and wanted is not None:
            value = wanted
        else:
            default = self.default_line(definitions)
            value = self._atom(default.value) if default is not None else self._empty(kind)
        if kind in (INT, HEX):
            value = self._within(definitions, value, kind)
        written = visible > N or default is not None
        return State(value=value, tri=N, visible=visible, direct=direct, written=written, asked=asked, default=default)

    def _empty(self, kind: str) -> str:
        return "" if self.model.old else _EMPTY.get(kind, "")

    def range_line(self, name: str) -> tuple[Line, str, str] | None:
        """The range that counts, and its two ends."""
        for definition in self.model.definitions.get(name, ()):
            for line in definition.ranges:
                if min(self.direct(definition), self.met(line.condition)) > N:
                    low, high = (self._atom(word) for word in line.value.split())
                    return line, low, high
        return None

    def _within(self, definitions: Iterable[Definition], value: str, kind: str) -> str:
        base = 16 if kind == HEX else 10
        for definition in definitions:
            found = self.range_line(definition.symbol) if definition.ranges else None
            if found is None:
                continue
            low, high = (number(end, base) or 0 for end in found[1:])
            now = number(value, base) or 0
            if low <= now <= high:
                return value
            nearest = low if now < low else high
            return f"{nearest:#x}" if kind == HEX else str(nearest)
        return value

    def _atom(self, word: str) -> str:
        """The text that a default or a range names: a constant, or a symbol's value."""
        if word.startswith('"'):
            return _UNESCAPE.sub(r"\1", word[1:-1])
        return word if word in ("y", "m", "n") else self.text(word)

    # Parts of a symbol.

    def direct(self, definition: Definition) -> int:
        """What a definition's own and surrounding dependencies allow."""
        least = self._scope(definition.scope)[0]
        for clause in definition.depends:
            if least == N:
                break
            least = min(least, self.met(clause.text))
        return least

    def _visible(self, definitions: Iterable[Definition]) -> int:
        most = N
        for definition in definitions:
            for prompt in definition.prompts:
                most = max(most, self.prompt_visible(definition, prompt))
        return most

    def prompt_visible(self, definition: Definition, prompt: Line) -> int:
        """How far this prompt of a definition lets somebody raise the symbol."""
        if (allowed := self.direct(definition)) == N:
            return N
        return min(allowed, self._scope(definition.scope)[1], self.met(prompt.condition))

    def _scope(self, number_of: int) -> tuple[int, int]:
        """What a block and all around it allow: for dependencies, and for prompts besides."""
        known = self._look(number_of)
        if isinstance(known, tuple):
            return known
        self._stack.append(number_of)
        try:
            scope = self.model.scopes[number_of]
            depends, visible = self._scope(scope.parent) if scope.parent >= 0 else (Y, Y)
            for clause in scope.depends:
                depends = min(depends, self.met(clause.text))
            for clause in scope.visible:
                visible = min(visible, self.met(clause.text))
            if scope.choice >= 0 and self.model.old:
                prompts = self.model.choices[scope.choice].prompts
                visible = min(visible, max((self.met(prompt.condition) for prompt in prompts), default=Y))
        finally:
            self._stack.pop()
        self._known[number_of] = depends, visible
        return depends, visible

    def _pushed(self, pushers: Iterable[tuple[Definition, Line]]) -> int:
        most = N
        for definition, line in pushers:
            most = max(most, self.push(definition, line))
            if most == Y:
                break
        return most

    def push(self, definition: Definition, line: Line) -> int:
        """What one `select` or `imply` line comes to."""
        if (value := self.tri(definition.symbol)) == N:
            return N
        return min(value, self.direct(definition), self.met(line.condition))

    def default_line(self, definitions: Iterable[Definition]) -> Line | None:
        """The first default whose condition is met."""
        for definition in definitions:
            for line in definition.defaults:
                if min(self.direct(definition), self.met(line.condition)) > N:
                    return line
        return None

    def _default(self, definitions: Iterable[Definition]) -> tuple[Line | None, int]:
        for definition in definitions:
            for line in definition.defaults:
                allowed = min(self.direct(definition), self.met(line.condition))
                if allowed > N:
                    # m on its own is m here, also where nothing can be a module: y is what comes of it.
                    return line, min(allowed, M if line.value == "m" else self.met(line.value))
        return None, N

    # Choices.

    def chosen(self, number_of: int) -> str:
        """The member of a choice that is y, or nothing."""
        key = -1 - number_of
        known = self._look(key)
        if isinstance(known, str):
            return known
        self._stack.append(key)
        try:
            found = self._choose(number_of)
        finally:
            self._stack.pop()
        self._known[key] = found
        return found

    def _choose(self, number_of: int) -> str:
        choice = self.model.choices[number_of]
        visible = [name for name in choice.members if self._visible(self.model.definitions[name]) > N]
        asked = [name for name in self.asked if name in visible]
        wanted = [name for name in asked if self.asked_tri(name) == Y]
        if wanted:
            return wanted[-1]
        refused = set() if self.model.old else {name for name in asked if self.asked_tri(name) == N}
        for line in choice.defaults:
            if min(self._scope(choice.scope)[0], self.met(line.condition)) > N and line.value in visible:
                if line.value not in refused:
                    return line.value
                break
        rest = [name for name in visible if name not in refused]
        if rest or not visible:
            return rest[0] if rest else ""
        return asked[0]


def _readable(wanted: str | None, kind: str) -> str | None:
    """A number or string that was asked for, without its quotes; None when it is none of that kind."""
    if wanted is None:
        return None
    if kind == STRING:
        return _UNESCAPE.sub(r"\1", wanted[1:-1]) if len(wanted) > 1 and wanted[0] == wanted[-1] == '"' else None
    pattern = _INT if kind == INT else _HEX
    return wanted if pattern.fullmatch(wanted) else None
