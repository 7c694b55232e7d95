"""`osbuilder kernel explain`: what a symbol comes to in a kernel of ours, why, and which lines would change it."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from osbuild.errors import InputError, SpecError
from osbuild.kconfig import Request, same
from osbuild.kconfig_lang import reasons, remedy
from osbuild.kconfig_lang.evaluate import Evaluator
from osbuild.kconfig_lang.model import BOOL, HEX, INT, STRING, TRISTATE, Model
from osbuild.resources import resource

PREFIX: Final = "CONFIG_"
_NAME: Final = re.compile(r"(?:CONFIG_)?(\w+)", re.ASCII)
_SETTING: Final = re.compile(r"(?:CONFIG_)?(\w+)=(.*)", re.ASCII | re.DOTALL)
_VALUES: Final[Mapping[str, re.Pattern[str]]] = {
    BOOL: re.compile(r"[yn]"),
    TRISTATE: re.compile(r"[ymn]"),
    INT: re.compile(r"-?\d+", re.ASCII),
    HEX: re.compile(r"0[xX][0-9A-Fa-f]+", re.ASCII),
    STRING: re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL),
}
_NEAR: Final = 3  # names to suggest
_NONE: Final = "no lines of a fragment are enough"
_NO_TIME: Final = "no lines were found in the time there was that are enough"


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One symbol."""

    symbol: str  # with its CONFIG_
    value: str  # as in .config; empty when it is not in it at all
    kind: str
    title: str  # its prompt
    defined: tuple[str, ...]
    asked: str = ""  # what a fragment or --set says
    asked_at: str = ""
    because: tuple[reasons.Fact, ...] = ()
    unmet: tuple[reasons.Unmet, ...] = ()
    fix: tuple[str, ...] = ()  # lines for a fragment, evaluated and found to be enough
    instead: tuple[str, ...] = ()  # the places of lines that the fix contradicts
    smallest: bool = False  # no smaller fix exists
    unfixed: str = ""  # why there is none, where one was looked for
    tolerated: str = ""  # why it may be lost in this series
    note: str = ""  # of a name that this kernel does not have
    near: tuple[str, ...] = ()

    @property
    def kept(self) -> bool:
        """Whether it is what was asked for, if anything was."""
        return not self.asked or same(self.asked, self.value or "n")

    def to_dict(self) -> dict[str, object]:
        """For --json."""
        return {
            "symbol": self.symbol,
            "value": self.value or None,
            "type": self.kind or None,
            "title": self.title,
            "defined": list(self.defined),
            "asked": {"value": self.asked, "place": self.asked_at} if self.asked else None,
            "kept": self.kept,
            "because": [{"text": fact.text, "place": fact.place} for fact in self.because],
            "unmet": [
                {"condition": each.condition, "place": each.place, "value": each.value, "because": list(each.because)}
                for each in self.unmet
            ],
            "fix": {"lines": list(self.fix), "instead": list(self.instead), "smallest": self.smallest}
            if self.fix
            else None,
            "unfixed": self.unfixed,
            "tolerated": self.tolerated,
            "note": self.note,
            "near": list(self.near),
        }


@dataclass(frozen=True, slots=True)
class Renamed:
    """What became of a symbol that older lists still have."""

    symbol: str
    text: str
    source: str
    to: str  # what to ask for instead; empty when there is nothing


class Explainer:
    """One kernel, one architecture, one set of fragments: answers about any symbol."""

    def __init__(
        self,
        model: Model,
        requests: Iterable[Request],
        settings: Mapping[str, str] | None = None,
        tolerated: Mapping[str, str] | None = None,  # CONFIG_ name -> why its loss is known, and where that stands
    ) -> None:
        self.model = model
        self.tolerated = tolerated or {}
        self.requests = {request.symbol.removeprefix(PREFIX): request for request in requests}
        self.settings = dict(settings or {})
        asked = {name: request.value for name, request in self.requests.items() if name not in self.settings}
        self.evaluator = Evaluator(model, asked | self.settings)

    def explain(self, symbol: str, *, wanted: str = "", fix: bool = True) -> Explanation:
        """All about one symbol; `wanted` is a value somebody would like it to have, besides what is asked for."""
        found = self._explain(symbol, wanted, fix=fix)
        return found if found.kept else replace(found, tolerated=self.tolerated.get(found.symbol, ""))

    def _explain(self, symbol: str, wanted: str, *, fix: bool) -> Explanation:
        name = bare(symbol)
        asked, place = self._asked(name)
        if name not in self.model.definitions:
            return self._unknown(name, asked, place)
        definitions = self.model.definitions[name]
        prompts = [line.value for definition in definitions for line in definition.prompts]
        found = Explanation(
            symbol=PREFIX + name,
            value=reasons.value_of(self.evaluator, name),
            kind=self.model.kind(name),
            title=prompts[0] if prompts else "",
            defined=tuple(definition.place for definition in definitions),
            asked=asked,
            asked_at=place,
            because=tuple(reasons.facts(self.evaluator, name)),
        )
        goal, kind = wanted or asked, found.kind
        if wanted and not _fits(kind, wanted):
            raise SpecError(f"--want {wanted}: {PREFIX}{name} is {kind}", hint=_HINTS.get(kind, ""))
        short = bool(goal) and not same(goal, found.value or "n")
        if not short and found.value not in ("", "n"):
            return found
        unmet = tuple(reasons.unmet(self.evaluator, name))
        if short and not _fits(kind, goal):
            article = "an" if kind == INT else "a"
            return replace(found, unmet=unmet, unfixed=f"{goal} is no value of {article} {kind}")
        cure = self._cure(name, goal) if fix and short else None
        if not isinstance(cure, remedy.Remedy):
            why = "" if cure is None else _NONE if cure.complete else _NO_TIME
            return replace(found, unmet=unmet, unfixed=why)
        return replace(
            found, unmet=unmet, fix=tuple(as_line(*setting) for setting in cure.settings), smallest=cure.smallest,
            instead=tuple(place for key, _ in cure.settings if (place := self._asked(key)[1])),
        )  # fmt: skip

    def _cure(self, name: str, goal: str) -> remedy.Remedy | remedy.NoRemedy:
        """The fewest lines besides the symbol's own, which is left out only when it does nothing."""
        if self.evaluator.asked.get(name) == goal:
            return remedy.find(self.evaluator, name, goal, keep=[name])
        with_own = self.evaluator.with_settings({name: goal})
        found = remedy.find(with_own, name, goal, keep=[name])
        if isinstance(found, remedy.NoRemedy):
            return found
        if remedy.reached(self.evaluator.with_settings(dict(found.settings)), name, goal):
            return found
        return replace(found, settings=((name, goal), *found.settings))

    def _asked(self, name: str) -> tuple[str, str]:
        if name in self.settings:
            return self.settings[name], "--set"
        request = self.requests.get(name)
        return (request.value, request.place) if request is not None else ("", "")

    def _unknown(self, name: str, asked: str, place: str) -> Explanation:
        renamed = renamings().get(name)
        note = f"{renamed.text} [{renamed.source}]" if renamed is not None else "this kernel has no such symbol"
        return Explanation(
            symbol=PREFIX + name, value="", kind="", title="", defined=(), asked=asked, asked_at=place, note=note,
            near=tuple(PREFIX + near for near in nearest(name, self.model.definitions)),
        )  # fmt: skip


def _fits(kind: str, value: str) -> bool:
    return kind in _VALUES and _VALUES[kind].fullmatch(value) is not None


def bare(symbol: str) -> str:
    """A symbol's name without CONFIG_; SpecError when it can be none."""
    match = _NAME.fullmatch(symbol)
    if match is None:
        raise SpecError(f"{symbol!r} is no symbol", hint="letters, digits and underscores: CONFIG_EXT4_FS, or EXT4_FS")
    return match[1]


def split_setting(text: str) -> tuple[str, str]:
    """SYMBOL=value, as it stands after --set; SpecError when it is not of that form, whatever the kernel."""
    match = _SETTING.fullmatch(text)
    if match is None:
        raise SpecError(f"--set {text}: not SYMBOL=value")
    return match[1], match[2]


def parse_setting(text: str, model: Model) -> tuple[str, str]:
    """The same with a value that this kernel's symbol can have; strings need no quotes."""
    name, value = split_setting(text)
    kind = model.kind(name)
    if kind == STRING and not value.startswith('"'):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if not kind:
        near = nearest(name, model.definitions)
        raise SpecError(
            f"--set {text}: this kernel has no {PREFIX}{name}", hint=f"near: {', '.join(near)}" if near else ""
        )
    if not _VALUES[kind].fullmatch(value):
        raise SpecError(f"--set {text}: {PREFIX}{name} is {kind}", hint=_HINTS[kind])
    return name, value


_HINTS: Final = {
    BOOL: "y or n", TRISTATE: "y, m or n", INT: "a decimal number", HEX: "a number with 0x", STRING: "a text",
}  # fmt: skip


def as_line(name: str, value: str) -> str:
    """A setting as a fragment has it."""
    return f"# {PREFIX}{name} is not set" if value == "n" else f"{PREFIX}{name}={value}"


def nearest(name: str, known: Iterable[str], most: int = _NEAR) -> list[str]:
    """The names that somebody who wrote this one may have meant."""
    words = frozenset(name.split("_"))
    names = list(known)
    same = [each for each in names if each.upper() == name.upper()]  # fs_dax
    # A prefix or a suffix more is the usual renaming: RETPOLINE became MITIGATION_RETPOLINE.
    grown = [each for each in names if each.endswith(f"_{name}") or each.startswith(f"{name}_")]
    close = [
        each for each in names if abs(len(each) - len(name)) <= 3 and (each[0] == name[0] or words & {*each.split("_")})
    ]
    likely = [*same, *difflib.get_close_matches(name, close, most, 0.8), *sorted(grown, key=len)]
    return list(dict.fromkeys(likely))[:most]


def renamings() -> dict[str, Renamed]:
    """The table of names that lists in the wild still have, and no current kernel does."""
    path = resource("kernel-configs/renamed.toml")
    try:
        entries = tomllib.loads(path.read_text(encoding="utf-8"))["symbol"]
        return {
            name: Renamed(name, entry["became"], entry["source"], entry.get("to", ""))
            for name, entry in entries.items()
        }
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise InputError(f"{path} is damaged: {problem}") from problem


def lines(found: Explanation) -> list[str]:
    """An explanation for people; files below the current directory by their names in it."""
    here = f"{Path.cwd()}/"
    return [line.replace(here, "") for line in _lines(found)]


def _lines(found: Explanation) -> list[str]:
    if not found.kind:
        text = [f"{found.symbol}: {found.note}"]
        text += [f"  asked for: {found.asked} ({found.asked_at})"] if found.asked else []
        text += [f"  tolerated: {found.tolerated}"] if found.tolerated else []
        return text + ([f"  near: {', '.join(found.near)}"] if found.near else [])
    text = [f"{found.symbol}={found.value}" if found.value else f"{found.symbol} is not in .config"]
    title = f'"{found.title}"' if found.title else "no prompt: nobody can set it"
    text.append(f"  {found.kind}, {title} ({', '.join(found.defined)})")
    if found.asked:
        text.append(f"  asked for: {found.asked} ({found.asked_at}){'' if found.kept else ', and not reached'}")
    text += [f"  tolerated: {found.tolerated}"] if found.tolerated else []
    text += [f"  why: {fact}" for fact in found.because]
    text += [f"  not met: {each}" for each in found.unmet]
    if found.unfixed:
        text.append(f"  {found.unfixed}")
    if found.fix:
        text.append(f"  enough, evaluated{' (nothing smaller is)' if found.smallest else ''}:")
        text += [f"    {line}" for line in found.fix]
        text += [f"    instead of {place}" for place in found.instead]
    return text


def reason(found: Explanation) -> str:
    """An explanation in one line, for the error of a build."""
    if not found.kind:
        near = f"; near: {', '.join(found.near)}" if found.near else ""
        return found.note + near
    parts = [str(each) for each in found.unmet] or [str(fact) for fact in found.because]
    text = "; ".join(parts)
    text += f"; {found.unfixed}" if found.unfixed else ""
    if found.fix:
        text += f"; enough: {', '.join(found.fix)}"
        text += f" (instead of {', '.join(found.instead)})" if found.instead else ""
    return text


def lost(wanted: Sequence[Request], explainer: Explainer) -> str:
    """For the requests that a configuration did not keep: a line each, with the reason."""
    return "\n".join(f"{request.symbol}: {reason(explainer.explain(request.symbol))}" for request in wanted)
