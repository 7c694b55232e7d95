"""Why a symbol has its value: which line decides, and which condition stands in the way."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from osbuild.kconfig_lang.evaluate import Evaluator, State
from osbuild.kconfig_lang.expression import LETTERS, All, Expression, N, Y, parse
from osbuild.kconfig_lang.model import BOOL, TRISTATE, Definition, Line

_FEW: Final = 4  # names in one sentence


@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """A sentence, and the line in the Kconfig files that makes it true."""

    text: str
    place: str = ""

    def __str__(self) -> str:
        return f"{self.text} ({self.place})" if self.place else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmet:
    """A condition that keeps a symbol down."""

    condition: str
    place: str
    value: str  # what it comes to: n, or m where y is needed
    because: tuple[str, ...]  # what each symbol in it is, and why

    def __str__(self) -> str:
        because = "; ".join(self.because)
        if self.condition.isidentifier():
            return f"{because} ({self.place})"
        return f"{self.condition} is {self.value} ({self.place}): {because}"


def value_of(evaluator: Evaluator, name: str) -> str:
    """What .config says: y, m, n, a number, a string in its quotes; empty when a number or string is not in it."""
    state, kind = evaluator.state(name), evaluator.model.kind(name)
    if kind in (BOOL, TRISTATE):
        return state.value
    if not kind or not state.written:
        return ""
    return f'"{state.value}"' if kind == "string" else state.value


def facts(evaluator: Evaluator, name: str) -> list[Fact]:
    """What decides the value, most important first."""
    model, state = evaluator.model, evaluator.state(name)
    if name not in model.definitions:
        return [Fact(text="no Kconfig file of this architecture defines it")]
    found = []
    if state.floor > N and state.floor >= state.tri:
        found += [Fact(text=f"selected by {d.symbol}", place=line.place) for d, line in pushing(evaluator, name)]
        if state.direct < state.floor:
            found.append(Fact(text="although its own dependencies are not met: select does not look at them"))
    number_of = model.choice_of.get(name)
    if number_of is not None and state.visible > N:
        found.append(_of_a_choice(evaluator, name, number_of))
    elif state.asked:
        limits = _limited(evaluator, name, state)
        kept = not limits or evaluator.asked[name] == state.value
        found += [Fact(text="it is what was asked for")] if kept else limits
    elif state.default is not None and not found:
        found.append(Fact(text=_default_text(state.default), place=state.default.place))
        found += _limited(evaluator, name, state)
    if state.implied > N and not state.asked and state.visible == N and state.tri:
        found += [
            Fact(text=f"implied by {d.symbol}", place=line.place) for d, line in pushing(evaluator, name, soft=True)
        ]
    if not found and state.visible > N and state.written:
        found.append(Fact(text="nobody asked for it, and nothing selects it"))
    if not found:
        found.append(_out_of_reach(evaluator, name))
    return found


def pushing(evaluator: Evaluator, name: str, *, soft: bool = False) -> list[tuple[Definition, Line]]:
    """The `select` (or `imply`) lines that are in force."""
    all_of_them = (evaluator.model.impliers if soft else evaluator.model.selectors).get(name, ())
    return [(definition, line) for definition, line in all_of_them if evaluator.push(definition, line) > N]


def unmet(evaluator: Evaluator, name: str) -> list[Unmet]:
    """The conditions that keep anybody from setting it, of the definition that is nearest to being open."""
    model = evaluator.model
    best: list[tuple[str, str, str]] | None = None
    for definition in model.definitions.get(name, ()):
        prompts: list[Line | None] = [*definition.prompts] or [None]
        for prompt in prompts:
            found = list(_closed(evaluator, definition, prompt))
            if best is None or len(found) < len(best):
                best = found
    return [
        Unmet(condition=text, place=place, value=value, because=tuple(_states(evaluator, text)))
        for text, place, value in best or ()
    ]


def _closed(evaluator: Evaluator, definition: Definition, prompt: Line | None) -> Iterator[tuple[str, str, str]]:
    """(condition, place, value) of each part that is less than y."""
    model = evaluator.model
    clauses = [(clause.text, clause.place) for clause in model.clauses(definition)]
    if prompt is not None:
        clauses += [(clause.text, clause.place) for clause in model.gates(definition)]
    if prompt is not None and prompt.condition:
        clauses.append((prompt.condition, prompt.place))
    seen = set()
    for text, place in clauses:
        for part in _parts(parse(text)):
            value = part.tri(evaluator)
            if value < Y and str(part) not in seen and not (value and evaluator.is_switch(definition.symbol)):
                seen.add(str(part))
                yield str(part), place, LETTERS[value]


def _parts(node: Expression) -> Iterator[Expression]:
    if isinstance(node, All):
        for part in node.parts:
            yield from _parts(part)
    else:
        yield node


def _states(evaluator: Evaluator, text: str) -> Iterator[str]:
    names = list(dict.fromkeys(parse(text).names()))
    for name in names[:_FEW]:
        yield brief(evaluator, name)
    if len(names) > _FEW:
        yield f"and {len(names) - _FEW} symbols more"


def brief(evaluator: Evaluator, name: str) -> str:
    """One symbol in half a sentence."""
    model = evaluator.model
    if name not in model.definitions:
        return f"{name} is not defined on this architecture"
    value = value_of(evaluator, name) or "not set"
    return f"{name} is {value}, {_briefly(evaluator, name)}"


def _briefly(evaluator: Evaluator, name: str) -> str:
    state = evaluator.state(name)
    if state.asked:
        return "as asked for"
    if state.floor > N:
        pushers = pushing(evaluator, name)
        return f"selected by {_and_more([definition.symbol for definition, _ in pushers])}"
    if state.visible > N:
        if name in evaluator.model.choice_of:
            return f"one of a choice ({evaluator.model.choices[evaluator.model.choice_of[name]].place})"
        return "asked for as n" if evaluator.asked.get(name) == "n" else "not asked for"
    if state.default is not None:
        return f"by default ({state.default.place})"
    return _out_of_reach(evaluator, name).text


def _out_of_reach(evaluator: Evaluator, name: str) -> Fact:
    model = evaluator.model
    definitions = model.definitions[name]
    if any(definition.prompts for definition in definitions):
        return Fact(text="its dependencies are not met", place=definitions[0].place)
    selectors = [definition.symbol for definition, _ in model.selectors.get(name, ())]
    if selectors:
        return Fact(
            text=f"it has no prompt, and is only selected: by {_and_more(selectors)}", place=definitions[0].place
        )
    if any(definition.defaults for definition in definitions):
        return Fact(text="it has no prompt, and no default of it is met", place=definitions[0].place)
    return Fact(text="it has no prompt, no default, and nothing selects it", place=definitions[0].place)


def _and_more(names: list[str]) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return ", ".join(names[:_FEW]) + more


def _default_text(line: Line) -> str:
    return f"its default is {line.value}" + (f", because {line.condition}" if line.condition else "")


def _limited(evaluator: Evaluator, name: str, state: State) -> list[Fact]:
    kind = evaluator.model.kind(name)
    if kind in (BOOL, TRISTATE):
        return []
    found = evaluator.range_line(name)
    if found is None or state.value not in found[1:]:
        return []
    line, low, high = found
    return [Fact(text=f"it must lie between {low} and {high}", place=line.place)]


def _of_a_choice(evaluator: Evaluator, name: str, number_of: int) -> Fact:
    choice, winner = evaluator.model.choices[number_of], evaluator.chosen(number_of)
    if winner != name:
        how = "as asked for" if evaluator.asked_tri(winner) == Y else "by default"
        return Fact(text=f"one of a choice, in which {winner} is y {how}", place=choice.place)
    if evaluator.state(name).asked:
        return Fact(text="one of a choice, and the one that was asked for", place=choice.place)
    return Fact(text="one of a choice, and the default of it", place=choice.place)
