"""What a tree's Kconfig files say, as plain values: nothing here is evaluated, expressions are still text.

A definition lies in a scope; scopes (`if`, `menu`, `choice` blocks) lie in each other, number 0 around everything. All
is kept as JSON between runs: strings, lists and numbers, read back in a fraction of the time that parsing takes.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from osbuild.kconfig_lang import FORMAT

BOOL: Final = "bool"
TRISTATE: Final = "tristate"
STRING: Final = "string"
INT: Final = "int"
HEX: Final = "hex"
UNKNOWN: Final = ""  # named by a `select` or a condition, or `config` without a type


@dataclass(frozen=True, slots=True)
class Clause:
    """A condition and the line it stands in."""

    text: str
    place: str  # file:line, relative to the tree


@dataclass(frozen=True, slots=True)
class Line:
    """An attribute: `default VALUE if CONDITION`, `select VALUE if CONDITION`, a prompt, a range's "LOW HIGH"."""

    value: str
    condition: str  # empty: always
    place: str


@dataclass(slots=True)
class Scope:
    """A block that others lie in."""

    parent: int
    kind: str  # if, menu, choice, or file for the outermost
    place: str
    depends: list[Clause] = field(default_factory=list)
    visible: list[Clause] = field(default_factory=list)
    choice: int = -1  # when it is one: its number


@dataclass(slots=True)
class Definition:
    """One `config` entry; a symbol may have several."""

    symbol: str
    place: str
    scope: int
    depends: list[Clause] = field(default_factory=list)
    prompts: list[Line] = field(default_factory=list)
    defaults: list[Line] = field(default_factory=list)
    selects: list[Line] = field(default_factory=list)
    implies: list[Line] = field(default_factory=list)
    ranges: list[Line] = field(default_factory=list)


@dataclass(slots=True)
class Choice:
    """A group of which one member is y."""

    place: str
    scope: int  # its own, whose parent is what surrounds it
    prompts: list[Line] = field(default_factory=list)
    defaults: list[Line] = field(default_factory=list)
    members: list[str] = field(default_factory=list)
    optional: bool = False
    kind: str = UNKNOWN


@dataclass(slots=True)
class Model:
    """Everything that one architecture's Kconfig files define."""

    scopes: list[Scope] = field(default_factory=lambda: [Scope(parent=-1, kind="file", place="")])
    choices: list[Choice] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)  # symbol -> type
    definitions: dict[str, list[Definition]] = field(default_factory=dict)
    modules: str = ""  # the symbol with `modules`
    old: bool = False  # as conf decides before 6.11: see Evaluator
    messages: list[str] = field(default_factory=list)  # what $(info) and $(warning-if) said
    selectors: dict[str, list[tuple[Definition, Line]]] = field(default_factory=dict)
    impliers: dict[str, list[tuple[Definition, Line]]] = field(default_factory=dict)
    choice_of: dict[str, int] = field(default_factory=dict)

    def link(self) -> Model:
        """Fill in what follows from the definitions: who selects and implies a symbol, and whose member it is."""
        selectors: dict[str, list[tuple[Definition, Line]]] = defaultdict(list)
        impliers: dict[str, list[tuple[Definition, Line]]] = defaultdict(list)
        for definition in self.all_definitions():
            for line in definition.selects:
                selectors[line.value].append((definition, line))
            for line in definition.implies:
                impliers[line.value].append((definition, line))
        self.selectors, self.impliers = dict(selectors), dict(impliers)
        self.choice_of = {name: number for number, choice in enumerate(self.choices) for name in choice.members}
        return self

    def all_definitions(self) -> Iterator[Definition]:
        """Each `config` entry, in the order of the files."""
        for several in self.definitions.values():
            yield from several

    def kind(self, name: str) -> str:
        """A symbol's type, empty when it has none."""
        return self.kinds.get(name, UNKNOWN)

    def around(self, scope: int) -> Iterator[Scope]:
        """A scope and all that it lies in, from the outside in."""
        chain = []
        while scope >= 0:
            chain.append(self.scopes[scope])
            scope = self.scopes[scope].parent
        return reversed(chain)

    def gates(self, definition: Definition) -> list[Clause]:
        """What only a definition's prompts depend on, besides: `visible if`, and in older kernels a choice's prompt."""
        found = []
        for scope in self.around(definition.scope):
            found += scope.visible
            if self.old and scope.choice >= 0:
                prompts = self.choices[scope.choice].prompts
                found += [Clause(line.condition, line.place) for line in prompts if line.condition]
        return found

    def clauses(self, definition: Definition) -> list[Clause]:
        """All that a definition depends on, its own lines last."""
        found = [clause for scope in self.around(definition.scope) for clause in scope.depends]
        return found + definition.depends

    def to_json(self) -> dict[str, object]:
        """As lists, for the cache."""
        return {
            "format": FORMAT,
            "modules": self.modules,
            "old": self.old,
            "messages": self.messages,
            "kinds": self.kinds,
            "scopes": [
                [s.parent, s.kind, s.place, _plain(s.depends), _plain(s.visible), s.choice] for s in self.scopes
            ],
            "choices": [
                [c.place, c.scope, _plain(c.prompts), _plain(c.defaults), c.members, c.optional, c.kind]
                for c in self.choices
            ],
            "definitions": [
                [d.symbol, d.place, d.scope, *(_plain(part) for part in _parts(d))] for d in self.all_definitions()
            ],
        }


def _parts(d: Definition) -> tuple[list[Any], ...]:  # Any: lists of Clause and of Line
    return d.depends, d.prompts, d.defaults, d.selects, d.implies, d.ranges


def _plain(items: list[Clause] | list[Line]) -> list[list[str]] | int:
    if not items:
        return 0  # shorter than [] in the file, and quicker to read
    return [
        [item.text, item.place] if isinstance(item, Clause) else [item.value, item.condition, item.place]
        for item in items
    ]


def from_json(data: Mapping[str, Any]) -> Model:
    """What `to_json` wrote; KeyError, TypeError or ValueError for anything else."""
    if data["format"] != FORMAT:
        raise ValueError("another format")
    definitions: dict[str, list[Definition]] = {}
    for symbol, place, scope, depends, *lines in data["definitions"]:
        entry = Definition(symbol, place, scope, _clauses(depends), *(map(_lines, lines)))
        definitions.setdefault(symbol, []).append(entry)
    return Model(
        scopes=[
            Scope(parent, kind, place, _clauses(depends), _clauses(visible), choice)
            for parent, kind, place, depends, visible, choice in data["scopes"]
        ],
        choices=[
            Choice(place, scope, _lines(prompts), _lines(defaults), members, optional, kind)
            for place, scope, prompts, defaults, members, optional, kind in data["choices"]
        ],
        kinds=data["kinds"],
        definitions=definitions,
        modules=data["modules"],
        old=data["old"],
        messages=data["messages"],
    ).link()


def _clauses(items: Any) -> list[Clause]:
    return [Clause(*item) for item in items] if items else []


def _lines(items: Any) -> list[Line]:
    return [Line(*item) for item in items] if items else []


@functools.cache
def line_number(place: str) -> int:
    """The number in `file:line`."""
    return int(place.rpartition(":")[2])
