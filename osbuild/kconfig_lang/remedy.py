"""The fewest lines that give a symbol the value that was asked for.

From what is missing now follow the settings that could help next: to be met, the first unmet part of an `&&` has to
change, whatever else does, and of an `||` any part may. So every sufficient set of lines can be reached by adding one
helpful line after the other, and trying all sets of one line, then of two, and so on finds a smallest one. Each set is
evaluated, none is believed. The search is bounded; a set that was found first by taking the most likely line each time
is then the answer, and is said to be perhaps not the smallest.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from osbuild.kconfig_lang.evaluate import Evaluator
from osbuild.kconfig_lang.expression import (
    LETTERS,
    All,
    Any,
    Compare,
    Expression,
    M,
    N,
    Not,
    Text,
    Word,
    Y,
    number,
    parse,
)
from osbuild.kconfig_lang.model import BOOL, HEX, INT, STRING, TRISTATE, Definition, Line

SECONDS: Final = 2.0
_DEEPEST: Final = 12  # lines in one remedy
_MOST: Final = 400  # helpful lines to look at for one set

# Kinds of kernels, not features: what is reached through one of these is reached last.
_LAST: Final = re.compile(
    r"COMPILE_TEST|BROKEN|STAGING|.*_DEBUG|DEBUG_.*|EXPERT|.*_KUNIT_TEST|KUNIT|TEST_.*|.*_TEST|UML"
)

Setting = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Remedy:
    """Settings that were evaluated and found to be enough."""

    settings: tuple[Setting, ...]
    smallest: bool  # every smaller set was tried
    tried: int


@dataclass(frozen=True, slots=True)
class NoRemedy:
    """No settings were found."""

    complete: bool  # there are none; else there was no time to try everything


def find(
    evaluator: Evaluator, name: str, wanted: str, *, seconds: float = SECONDS, keep: Iterable[str] = ()
) -> Remedy | NoRemedy:
    """The fewest settings that give `name` the value.

    What `keep` names is not set to anything else.
    """
    search = _Search(evaluator, name, wanted, time.monotonic() + seconds, frozenset(keep))
    likely = search.dive()
    smaller = search.widen(len(likely) - 1 if likely is not None else _DEEPEST)
    best = smaller if smaller is not None else likely
    if best is None:
        return NoRemedy(complete=not search.stopped)
    return Remedy(settings=best, smallest=not search.stopped, tried=search.tried)


def reached(evaluator: Evaluator, name: str, wanted: str) -> bool:
    """Whether a symbol has the value."""
    state = evaluator.state(name)
    if evaluator.model.kind(name) in (BOOL, TRISTATE):
        return state.value == wanted or (wanted == "m" and state.value == "y" and evaluator.is_switch(name))
    plain = wanted[1:-1] if wanted[:1] == '"' else wanted
    return state.value == plain and (state.written or wanted == "n")


class _Search:
    def __init__(self, evaluator: Evaluator, name: str, wanted: str, until: float, keep: frozenset[str]) -> None:
        self.base, self.name, self.wanted, self.until, self.keep = evaluator, name, wanted, until, keep
        self.tried = 0
        self.stopped = False

    def dive(self) -> tuple[Setting, ...] | None:
        """A set found by taking what looks most likely, made as small as leaving lines out makes it."""
        found = self._dive((), self.base, set())
        if found is None:
            return None
        for setting in found:
            fewer = tuple(other for other in found if other != setting)
            if self._enough(self._with(fewer)):
                found = fewer
        return found

    def _dive(
        self, chosen: tuple[Setting, ...], now: Evaluator, dead: set[frozenset[Setting]]
    ) -> tuple[Setting, ...] | None:
        if self._enough(now):
            return chosen
        if len(chosen) >= _DEEPEST:
            return None
        for setting in self._helpful(now, chosen):
            more = (*chosen, setting)
            if frozenset(more) in dead:
                continue
            dead.add(frozenset(more))
            if self._late():
                return None
            found = self._dive(more, now.with_settings(dict([setting])), dead)
            if found is not None:
                return found
        return None

    def widen(self, most: int) -> tuple[Setting, ...] | None:
        """A smallest set of at most so many lines."""
        level: list[tuple[Setting, ...]] = [()]
        for _ in range(most):
            following: dict[frozenset[Setting], tuple[Setting, ...]] = {}
            for chosen in level:
                now = self._with(chosen)
                for setting in self._helpful(now, chosen):
                    more = (*chosen, setting)
                    if frozenset(more) in following:
                        continue
                    if self._late():
                        return None
                    if self._enough(now.with_settings(dict([setting]))):
                        return more
                    following[frozenset(more)] = more
            level = list(following.values())
            if not level:
                return None
        return None

    def _late(self) -> bool:
        self.stopped = self.stopped or time.monotonic() > self.until
        return self.stopped

    def _with(self, settings: tuple[Setting, ...]) -> Evaluator:
        return self.base.with_settings(dict(settings)) if settings else self.base

    def _enough(self, now: Evaluator) -> bool:
        self.tried += 1
        return reached(now, self.name, self.wanted)

    def _helpful(self, now: Evaluator, chosen: tuple[Setting, ...]) -> list[Setting]:
        taken = {name for name, _ in chosen} | self.keep
        found: dict[Setting, None] = {}
        for setting in helpful(now, self.name, self.wanted):
            if setting[0] not in taken and now.asked.get(setting[0]) != setting[1]:
                found.setdefault(setting)
            if len(found) >= _MOST:
                self.stopped = True
                break
        return sorted(found, key=lambda setting: bool(_LAST.fullmatch(setting[0])))


def helpful(evaluator: Evaluator, name: str, wanted: str) -> Iterator[Setting]:
    """The settings of which at least one is in every set of settings that gives `name` the value."""
    ways = _Ways(evaluator)
    if evaluator.model.kind(name) in (BOOL, TRISTATE):
        have, want = evaluator.tri(name), LETTERS.index(wanted)
        yield from ways.lift(name, want) if have < want else ways.lower(name, want)
        if want == M and evaluator.model.modules:
            yield from ways.lower(evaluator.model.modules, N)  # where nothing can be m, y is what is meant
    else:
        yield from ways.give(name, wanted)


class _Ways:
    """One walk over what keeps a symbol where it is; each symbol is looked at once for each direction."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.now = evaluator
        self.model = evaluator.model
        self.seen: set[tuple[str, int, bool]] = set()

    # Symbols.

    def lift(self, name: str, want: int) -> Iterator[Setting]:
        """Towards at least `want`, of a symbol that is less."""
        kind = self.model.kind(name)
        if kind not in (BOOL, TRISTATE) or self._been(name, want, up=True):
            return
        switch = self.now.is_switch(name)
        want = Y if want == M and switch else want
        need = M if switch else want  # of what it hangs on: m makes a switch y
        state = self.now.state(name)
        if state.visible >= want:
            yield from self._set(name, want)
        else:
            for definition, prompt in self._prompts(name):
                yield from self._see(definition, prompt, need)
        for definition, line in self.model.selectors.get(name, ()):
            yield from self._push(definition, line, need)
        if state.visible == N:
            yield from self._lift_unseen(name, need)
        else:
            yield from self._hide_for_default(name)
        if kind == TRISTATE and self.model.modules and want == Y and state.tri == M:
            yield from self.lower(self.model.modules, N)  # then what is m is y

    def _been(self, name: str, value: int, *, up: bool) -> bool:
        before = len(self.seen)
        self.seen.add((name, value, up))
        return len(self.seen) == before

    def _prompts(self, name: str) -> Iterator[tuple[Definition, Line]]:
        for definition in self.model.definitions.get(name, ()):
            for prompt in definition.prompts:
                yield definition, prompt

    def _set(self, name: str, want: int) -> Iterator[Setting]:
        """What can be set is set; also against other members of its choice."""
        yield name, LETTERS[want]
        if want == M:
            yield name, "y"
        if name in self.model.choice_of:
            for other in self.model.choices[self.model.choice_of[name]].members:
                if other != name and self.now.asked_tri(other) == Y:
                    yield other, "n"

    def _lift_unseen(self, name: str, want: int) -> Iterator[Setting]:
        """What nobody can set: by what implies it and by its defaults, as far as its dependencies allow."""
        definitions = self.model.definitions.get(name, [])
        for definition, line in self.model.impliers.get(name, ()):
            yield from self._push(definition, line, want)
        yield from self._by_default(definitions, want)
        if self.now.state(name).direct < want:
            for definition in definitions:
                yield from self._allow(definition, want)

    def _hide_for_default(self, name: str) -> Iterator[Setting]:
        """A symbol whose prompt goes has its default."""
        defaults = any(definition.defaults for definition in self.model.definitions.get(name, ()))
        if defaults or name in self.model.impliers:
            for definition, prompt in self._prompts(name):
                yield from self._hide(definition, prompt)

    def lower(self, name: str, most: int) -> Iterator[Setting]:
        """Towards at most `most`, of a symbol that is more."""
        if self._been(name, most, up=False):
            return
        state = self.now.state(name)
        if most == M and self.now.is_switch(name):
            if self.model.kind(name) == TRISTATE and self.model.modules:
                yield from self.lift(self.model.modules, Y)
            most = N
        if state.floor > most:
            yield from self._release_all(self.model.selectors.get(name, ()), most)
        elif state.visible > most:
            yield from self._unset(name, most)
        else:
            yield from self._lower_default(name, most)
            yield from self._release_all(self.model.impliers.get(name, ()), most)

    def _unset(self, name: str, most: int) -> Iterator[Setting]:
        if name in self.model.choice_of:
            for other in self.model.choices[self.model.choice_of[name]].members:
                if other != name:
                    yield from self.lift(other, Y)
        yield name, LETTERS[most]
        for definition, prompt in self._prompts(name):
            yield from self._hide(definition, prompt)

    def _lower_default(self, name: str, most: int) -> Iterator[Setting]:
        """Of what nobody can set, the default that counts goes, or another one comes before it, or a prompt opens."""
        for definition in self.model.definitions.get(name, ()):
            for line in definition.defaults:
                if min(self.now.direct(definition), self.now.met(line.condition)) > most:
                    yield from self._forbid(definition, most)
                    for text in (line.condition, line.value):
                        if text not in ("", "y", "m", "n"):
                            yield from self.falsify(parse(text), most)
                    break
                if line.condition:
                    yield from self._first([*self._conditions(definition), line.condition], Y)
            for prompt in definition.prompts:
                yield from self._see(definition, prompt, Y)

    def _release_all(self, pushers: Iterable[tuple[Definition, Line]], most: int) -> Iterator[Setting]:
        for definition, line in pushers:
            if self.now.push(definition, line) > most:
                yield from self._release(definition, line, most)

    def give(self, name: str, wanted: str) -> Iterator[Setting]:
        """Towards a number or a text."""
        if self._been(name, N, up=True):
            return
        if self.now.state(name).visible > N:
            yield name, wanted
        for definition, prompt in self._prompts(name):
            if self.now.prompt_visible(definition, prompt) == N:
                yield from self._see(definition, prompt, Y)
        yield from self._widen_range(name, wanted)
        yield from self._other_default(name)

    def _widen_range(self, name: str, wanted: str) -> Iterator[Setting]:
        found = self.now.range_line(name)
        if found is None:
            return
        if found[0].condition:
            yield from self.falsify(parse(found[0].condition), N)
        for end in found[0].value.split():
            if end in self.model.kinds:  # an end that moves with other settings
                yield from self.give(end, wanted)

    def _other_default(self, name: str) -> Iterator[Setting]:
        for definition in self.model.definitions.get(name, ()):
            for line in definition.defaults:
                if min(self.now.direct(definition), self.now.met(line.condition)) == N:
                    yield from self._first([*self._conditions(definition), line.condition], Y)
                elif line.condition:
                    yield from self.falsify(parse(line.condition), N)

    # Parts of symbols.

    def _conditions(self, definition: Definition) -> list[str]:
        return [clause.text for clause in self.model.clauses(definition)]

    def _see(self, definition: Definition, prompt: Line, want: int) -> Iterator[Setting]:
        """Towards a prompt that lets somebody set the symbol."""
        texts = [clause.text for clause in self.model.gates(definition)]
        texts += [*self._conditions(definition), prompt.condition]
        yield from self._first(texts, want)

    def _hide(self, definition: Definition, prompt: Line) -> Iterator[Setting]:
        for text in (*self._conditions(definition), prompt.condition):
            if text:
                yield from self.falsify(parse(text), N)

    def _allow(self, definition: Definition, want: int) -> Iterator[Setting]:
        yield from self._first(self._conditions(definition), want)

    def _forbid(self, definition: Definition, most: int) -> Iterator[Setting]:
        for text in self._conditions(definition):
            yield from self.falsify(parse(text), most)

    def _first(self, texts: Iterable[str], want: int) -> Iterator[Setting]:
        """Towards the first of these that is not met: all have to be."""
        unmet = [node for text in texts if text and (node := parse(text)).tri(self.now) < want]
        if unmet and not any(self._hopeless(node) for node in unmet):
            yield from self.satisfy(unmet[0], want)

    def _hopeless(self, node: Expression) -> bool:
        """What no setting can ever meet: a symbol that is not defined, or n."""
        if isinstance(node, All):
            return any(self._hopeless(part) for part in node.parts)
        return isinstance(node, Word) and node.name not in self.model.kinds and node.name not in ("y", "m")

    def _push(self, definition: Definition, line: Line, want: int) -> Iterator[Setting]:
        if self.now.tri(definition.symbol) < want:
            yield from self.lift(definition.symbol, want)
        else:
            yield from self._first([*self._conditions(definition), line.condition], want)

    def _release(self, definition: Definition, line: Line, most: int) -> Iterator[Setting]:
        yield from self.lower(definition.symbol, most)
        yield from self._forbid(definition, most)
        if line.condition:
            yield from self.falsify(parse(line.condition), most)

    def _by_default(self, definitions: Iterable[Definition], want: int) -> Iterator[Setting]:
        for definition in definitions:
            for line in definition.defaults:
                if line.value != "n":
                    value = "" if line.value == "m" else line.value
                    yield from self._first([*self._conditions(definition), line.condition, value], want)
                elif line.condition and min(self.now.direct(definition), self.now.met(line.condition)) > N:
                    yield from self.falsify(parse(line.condition), N)  # it stands before one that would do

    # Expressions.

    def satisfy(self, node: Expression, want: int) -> Iterator[Setting]:
        """Towards at least `want`."""
        if node.tri(self.now) >= want:
            return
        if isinstance(node, Word):
            yield from self._lift_word(node.name, want)
        elif isinstance(node, Not):
            yield from self.falsify(node.inner, Y - want)
        elif isinstance(node, All):
            for part in node.parts:
                if part.tri(self.now) < want:
                    yield from self.satisfy(part, want)
                    return
        elif isinstance(node, Any):
            for part in node.parts:
                yield from self.satisfy(part, want)
        elif isinstance(node, Compare):
            yield from self._compare(node, met=True)

    def falsify(self, node: Expression, most: int) -> Iterator[Setting]:
        """Towards at most `most`."""
        if node.tri(self.now) <= most:
            return
        if isinstance(node, Word):
            name = self.model.modules if node.name == "m" else node.name
            if name in self.model.kinds:
                yield from self.lower(name, N if node.name == "m" else most)
        elif isinstance(node, Not):
            yield from self.satisfy(node.inner, Y - most)
        elif isinstance(node, All):
            for part in node.parts:
                yield from self.falsify(part, most)
        elif isinstance(node, Any):
            for part in node.parts:
                if part.tri(self.now) > most:
                    yield from self.falsify(part, most)
                    return
        elif isinstance(node, Compare):
            yield from self._compare(node, met=False)

    def _lift_word(self, name: str, want: int) -> Iterator[Setting]:
        if name == "m" and self.model.modules:
            yield from self.lift(self.model.modules, Y)
        elif name in self.model.kinds:
            yield from self.lift(name, want)

    def _compare(self, node: Compare, *, met: bool) -> Iterator[Setting]:
        """Towards a comparison that is met, or not: each side that is a symbol may move."""
        operator = node.operator if met else _OPPOSITE[node.operator]
        yield from self._move(node.left, operator, node.right)
        yield from self._move(node.right, _MIRRORED[operator], node.left)

    def _move(self, side: Word | Text, operator: str, other: Word | Text) -> Iterator[Setting]:
        if not isinstance(side, Word) or side.name not in self.model.kinds:
            return
        text = other.value if isinstance(other, Text) else other.name
        if text not in ("y", "m", "n"):
            text = self.now.text(text) if isinstance(other, Word) else text
        kind = self.model.kind(side.name)
        if kind in (BOOL, TRISTATE):
            if text in ("y", "m", "n"):
                yield from self._move_switch(side.name, operator, LETTERS.index(text))
        elif kind in (INT, HEX):
            limit = number(text, 16 if kind == HEX else 10)
            if limit is not None:
                value = limit + {"<": -1, ">": 1, "!=": 1}.get(operator, 0)
                yield from self.give(side.name, f"{value:#x}" if kind == HEX else str(value))
        elif kind == STRING and operator == "=":
            yield from self.give(side.name, f'"{text}"')

    def _move_switch(self, name: str, operator: str, limit: int) -> Iterator[Setting]:
        have = self.now.tri(name)
        for value in (Y, M, N):
            met = {
                "=": value == limit, "!=": value != limit, "<": value < limit, ">": value > limit,
                "<=": value <= limit, ">=": value >= limit,
            }[operator]  # fmt: skip
            if met and value == M and self.now.is_switch(name):
                if self.model.modules and self.model.kind(name) == TRISTATE:
                    yield from self.lift(self.model.modules, Y)
            elif met and value > have:
                yield from self.lift(name, value)
            elif met and value < have:
                yield from self.lower(name, value)


_OPPOSITE: Final[Mapping[str, str]] = {"=": "!=", "!=": "=", "<": ">=", ">": "<=", "<=": ">", ">=": "<"}
_MIRRORED: Final[Mapping[str, str]] = {"=": "=", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
