"""Reads a kernel tree's Kconfig files into a Model.

A line's first word says what it is; `help` goes on for as long as lines are indented like its first; a backslash at
the end goes on with the next line. Macros are expanded token by token: what one expands to is one word, never several.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from osbuild.errors import InputError
from osbuild.kconfig_lang.expression import ExpressionError, parse, quoted
from osbuild.kconfig_lang.macros import MacroError, Macros, closing
from osbuild.kconfig_lang.model import BOOL, HEX, INT, STRING, TRISTATE, Choice, Clause, Definition, Line, Model, Scope

_STATEMENT: Final = re.compile(r"\s*([\w-]+)(.*)", re.ASCII | re.DOTALL)
_ASSIGNMENT: Final = re.compile(r"\s*([\w-]+)\s*(:=|\+=|=)\s*(.*)", re.ASCII | re.DOTALL)
_QUOTED: Final = re.compile(r'\s*"((?:[^"\\]|\\.)*)"\s*(?:if\b\s*(.*))?', re.DOTALL)
_WORD: Final = re.compile(r"[\w-]+", re.ASCII)
_PLAIN: Final = re.compile(r"""[^#$'\\"]*(?:"[^$\\"]*"[^#$'\\"]*)*""")  # nothing in it that needs a closer look
_IF: Final = re.compile(r"\bif\b")
_SYMBOL: Final = re.compile(r"\s*(\w+)\s*", re.ASCII)
_TWO: Final = re.compile(r'\s*((?:"[^"]*"|[\w.-]+)\s+(?:"[^"]*"|[\w.-]+))\s*(?:if\b\s*(.*))?', re.ASCII)

_TYPES: Final = frozenset((BOOL, TRISTATE, STRING, INT, HEX))
_TYPED_DEFAULTS: Final = {"def_bool": BOOL, "def_tristate": TRISTATE}
_SOURCES: Final = frozenset(("source", "rsource", "osource", "orsource"))
_ENDS: Final = {"endif": "if", "endmenu": "menu", "endchoice": "choice"}
_DEEPEST: Final = 100  # of files in files: one that reads itself never ends

Where = Definition | Choice | Scope | None


def read_tree(
    tree: Path,
    environment: Mapping[str, str],
    ask: Callable[[str], str],
    *,
    seen: Callable[[str], None] | None = None,
    top: str = "Kconfig",
    old: bool = False,
) -> Model:
    """The model of a tree; `environment` is what the kernel's makefiles would set, `ask` answers shell commands.

    `seen` hears the name of each file that is read; `old` is for kernels before 6.11 (see Model).
    """
    reader = _Reader(tree=tree, macros=Macros(environment=environment, ask=ask), seen=seen)
    reader.read_file(top, after="")
    if reader.open:
        scope = reader.model.scopes[reader.scope]
        raise InputError(f"{scope.place}: this {scope.kind} has no end")
    reader.model.old = old
    reader.model.messages = reader.macros.said
    return reader.model.link()


@dataclass(slots=True)
class _Reader:
    tree: Path
    macros: Macros
    seen: Callable[[str], None] | None
    model: Model = field(default_factory=Model)
    scope: int = 0
    open: list[int] = field(default_factory=list)  # the scopes that are open
    entry: Where = None  # what attributes belong to
    ignoring: bool = False  # the attributes of a comment
    files: list[str] = field(default_factory=list)
    place: str = ""

    def read_file(self, name: str, *, after: str) -> None:
        """One file, and those that it names."""
        path = self.tree / name
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as problem:
            raise InputError(f"{after or self.tree}: cannot read {name}: {problem.strerror}") from None
        if len(self.files) >= _DEEPEST:
            raise InputError(f"{after}: {name} reads itself")
        if self.seen is not None:
            self.seen(name)
        self.files.append(name)
        depth = len(self.open)
        self._read_lines(name, lines)
        if len(self.open) > depth:
            scope = self.model.scopes[self.scope]
            raise InputError(f"{scope.place}: this {scope.kind} has no end in its file")
        self.entry, self.ignoring = None, False
        self.files.pop()

    def _read_lines(self, name: str, lines: list[str]) -> None:
        number, count = 0, len(lines)
        while number < count:
            line, first = lines[number], number + 1
            number += 1
            while line.endswith("\\") and number < count:
                line = line[:-1].rstrip() + " " + lines[number].strip()
                number += 1
            text = line.strip()
            if not text or text[0] == "#":
                continue
            if text in ("help", "---help---"):
                number = _after_help(lines, number)
                continue
            self.place = f"{name}:{first}"
            self.macros.file, self.macros.line = name, first
            try:
                self._statement(text)
            except (MacroError, ExpressionError) as problem:
                raise InputError(f"{self.place}: {problem}") from None

    def _statement(self, text: str) -> None:
        match = _STATEMENT.match(text)
        if match is None or "=" in text:
            assignment = _ASSIGNMENT.fullmatch(text)
            if assignment is not None and assignment[1] not in _ATTRIBUTES:
                self.macros.assign(assignment[1], assignment[2], assignment[3])
                return
        if match is None:
            if text.startswith("$(") and not self.macros.expand(text).strip():
                return  # asked for what it does, such as $(error-if,…)
            raise InputError(f"{self.place}: not a statement: {text}")
        word, rest = match[1], match[2]
        if word in _SOURCES:
            self._source(word, self._tokens(rest))
        elif word in _BLOCKS:
            self._block(word, self._tokens(rest))
        elif word in _ATTRIBUTES:
            if not self.ignoring:
                self._attribute(word, self._tokens(rest))
        elif word == "mainmenu":
            self._leave()
        else:
            raise InputError(f"{self.place}: no statement {word!r}")

    def _tokens(self, text: str) -> str:
        """The rest of a line without its comment, macros expanded, constants in double quotes."""
        if _PLAIN.fullmatch(text):
            return text.strip()
        pieces, at = [], 0
        while at < len(text):
            letter = text[at]
            if letter == "#":
                break
            if letter in "\"'":
                value, at = self._string(text, at)
                pieces.append(quoted(value))
            elif letter == "$" or _WORD.match(letter):
                value, at = self._word(text, at)
                pieces.append(value if _WORD.fullmatch(value) else quoted(value))
            else:
                pieces.append(letter)
                at += 1
        return "".join(pieces).strip()

    def _string(self, text: str, at: int) -> tuple[str, int]:
        quote, at, found = text[at], at + 1, []
        while at < len(text) and text[at] != quote:
            if text[at] == "\\" and at + 1 < len(text):
                found.append(text[at + 1])
                at += 2
            elif text.startswith("$(", at):
                end = closing(text, at + 2)
                found.append(self.macros.expand(text[at : end + 1]))
                at = end + 1
            else:
                found.append(text[at])
                at += 1
        if at >= len(text):
            raise InputError(f"{self.place}: a quotation mark is not closed")
        return "".join(found), at + 1

    def _word(self, text: str, at: int) -> tuple[str, int]:
        found = []
        while at < len(text):
            if text.startswith("$(", at):
                end = closing(text, at + 2)
                found.append(self.macros.expand(text[at : end + 1]))
                at = end + 1
            elif match := _WORD.match(text, at):
                found.append(match[0])
                at = match.end()
            elif text[at] == "$":
                found.append("$")
                at += 1
            else:
                break
        return "".join(found), at

    # Statements that begin or end an entry.

    def _leave(self) -> None:
        self.entry, self.ignoring = None, False

    def _source(self, word: str, rest: str) -> None:
        self._leave()
        match = _QUOTED.fullmatch(rest)
        name = match[1] if match is not None else rest
        if word in ("rsource", "orsource"):  # relative to the file that says so
            name = str(Path(self.files[-1]).parent / name) if self.files else name
        place = self.place
        optional = word in ("osource", "orsource")  # and perhaps a pattern
        names = sorted(str(path.relative_to(self.tree)) for path in self.tree.glob(name)) if optional else [name]
        for each in names:
            self.read_file(each, after=place)

    def _config(self, rest: str) -> None:
        self._leave()
        match = _SYMBOL.fullmatch(rest)
        if match is None:
            raise InputError(f"{self.place}: config {rest}: a symbol is letters, digits and underscores")
        entry = Definition(match[1], self.place, self.scope)
        self.model.definitions.setdefault(match[1], []).append(entry)
        self.model.kinds.setdefault(match[1], "")
        self.entry = entry
        choice = self._choice_around()
        if choice is not None and match[1] not in choice.members:
            choice.members.append(match[1])

    def _choice_around(self) -> Choice | None:
        scope = self.model.scopes[self.scope]
        while scope.kind == "if":
            scope = self.model.scopes[scope.parent]
        return self.model.choices[scope.choice] if scope.kind == "choice" else None

    def _begin(self, kind: str) -> Scope:
        self._leave()
        scope = Scope(parent=self.scope, kind=kind, place=self.place)
        self.model.scopes.append(scope)
        self.scope = len(self.model.scopes) - 1
        self.open.append(self.scope)
        return scope

    def _block(self, word: str, rest: str) -> None:
        """A line that begins an entry or a block, or ends one."""
        if word in ("config", "menuconfig"):
            self._config(rest)
        elif word == "if":
            self._begin("if").depends.append(self._clause(rest))
        elif word == "menu":
            self.entry = self._begin("menu")
        elif word == "choice":
            scope = self._begin("choice")
            scope.choice = len(self.model.choices)
            self.entry = Choice(place=self.place, scope=self.scope)
            self.model.choices.append(self.entry)
        elif word == "comment":
            self._leave()
            self.ignoring = True
        else:
            self._end(word)

    def _end(self, word: str) -> None:
        self._leave()
        scope = self.model.scopes[self.scope]
        if not self.open or scope.kind != _ENDS[word]:
            raise InputError(f"{self.place}: {word} without its {_ENDS[word]}")
        if scope.place.rpartition(":")[0] != self.place.rpartition(":")[0]:
            raise InputError(f"{self.place}: {word} for the {scope.kind} of another file, {scope.place}")
        self.open.pop()
        self.scope = scope.parent

    # Attributes.

    def _clause(self, text: str) -> Clause:
        parse(text)  # now, where the line is known
        return Clause(text, self.place)

    def _conditional(self, rest: str) -> tuple[str, str]:
        """VALUE [if CONDITION]."""
        quoted_value = _QUOTED.fullmatch(rest)
        if quoted_value is not None:
            value, condition = f'"{quoted_value[1]}"', quoted_value[2] or ""
        else:
            parts = _IF.split(rest, maxsplit=1) if '"' not in rest else _outside_quotes(rest)
            value, condition = parts[0].strip(), (parts[1].strip() if len(parts) > 1 else "")
        if condition:
            parse(condition)
        return value, condition

    def _attribute(self, word: str, rest: str) -> None:
        entry = self.entry
        if entry is None:
            raise InputError(f"{self.place}: {word} belongs to no entry")
        if word == "depends":
            if not rest.startswith("on"):
                raise InputError(f"{self.place}: depends {rest}: `on` is missing")
            scope = self.model.scopes[entry.scope] if isinstance(entry, Choice) else entry
            scope.depends.append(self._clause(rest[2:].strip()))
        elif word == "visible" and isinstance(entry, Scope):
            entry.visible.append(self._clause(rest.removeprefix("if").strip()))
        elif isinstance(entry, Scope):
            raise InputError(f"{self.place}: a menu has no {word}")
        elif word in _TYPES or word == "prompt":
            self._typed(entry, word, rest)
        elif word == "default" or word in _TYPED_DEFAULTS:
            self._set_type(entry, _TYPED_DEFAULTS.get(word, ""))
            value, condition = self._conditional(rest)
            parse(value)
            entry.defaults.append(Line(value, condition, self.place))
        elif isinstance(entry, Choice):
            if word != "optional":
                raise InputError(f"{self.place}: a choice has no {word}")
            entry.optional = True
        else:
            self._of_a_symbol(entry, word, rest)

    def _of_a_symbol(self, entry: Definition, word: str, rest: str) -> None:
        if word in ("select", "imply"):
            value, condition = self._conditional(rest)
            if not _SYMBOL.fullmatch(value):
                raise InputError(f"{self.place}: {word} {value}: not a symbol")
            (entry.selects if word == "select" else entry.implies).append(Line(value, condition, self.place))
        elif word == "range":
            match = _TWO.fullmatch(rest)
            if match is None:
                raise InputError(f"{self.place}: range {rest}: two values are needed")
            if match[2]:
                parse(match[2])
            entry.ranges.append(Line(match[1], match[2] or "", self.place))
        elif word == "modules" or (word == "option" and rest == "modules"):
            self.model.modules = entry.symbol
        elif word not in ("option", "transitional", "optional"):
            raise InputError(f"{self.place}: a symbol has no {word}")

    def _typed(self, entry: Definition | Choice, word: str, rest: str) -> None:
        if word != "prompt":
            self._set_type(entry, word)
            if not rest:
                return
        match = _QUOTED.fullmatch(rest)
        if match is None:  # one word needs no quotation marks
            value, condition = self._conditional(rest)
        else:
            value, condition = match[1], (match[2] or "").strip()
        if condition:
            parse(condition)
        entry.prompts.append(Line(value, condition, self.place))

    def _set_type(self, entry: Definition | Choice, kind: str) -> None:
        if not kind:
            return
        if isinstance(entry, Choice):
            entry.kind = kind
        elif not self.model.kinds.get(entry.symbol):
            self.model.kinds[entry.symbol] = kind


def _outside_quotes(text: str) -> list[str]:
    """A text cut at the first `if` that is in no quotation marks."""
    inside = False
    for match in re.finditer(r'\\.|"|\bif\b', text):
        if match[0] == '"':
            inside = not inside
        elif match[0] == "if" and not inside:
            return [text[: match.start()], text[match.end() :]]
    return [text]


def _after_help(lines: list[str], number: int) -> int:
    """The number of the first line that is no longer help."""
    indent = -1
    while number < len(lines):
        line = lines[number]
        text = line.lstrip()
        if text:
            width = len(line[: len(line) - len(text)].expandtabs(8))
            if indent < 0:
                indent = width
            if width < indent or width == 0:
                break
        number += 1
    return number


_ATTRIBUTES: Final = frozenset(
    (
        *_TYPES, *_TYPED_DEFAULTS, "prompt", "default", "depends", "select", "imply", "range", "visible", "modules",
        "option", "optional", "transitional",
    )
)  # fmt: skip

_BLOCKS: Final = frozenset(("config", "menuconfig", "if", "menu", "choice", "comment", *_ENDS))
