"""Which shell lines a tree's Kconfig files will ask, found by a quick look: so that they can be asked all at once.

A guess and no more: what is found here and never asked later costs a moment, and what is overlooked is asked one by
one when it comes up.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from osbuild.kconfig_lang.macros import MacroError, Macros, closing

_LINE: Final = re.compile(
    r"^(?:[ \t]*source[ \t]+(?P<source>\S+)|(?P<name>[\w-]+)[ \t]*(?P<how>:?=)[ \t]*(?P<value>.*))", re.M
)
_FIRST: Final = "scripts/Kconfig.include"  # where the questions have their names


def questions(
    tree: Path, environment: Mapping[str, str], ask: Callable[[str], str], *, top: str = "Kconfig"
) -> list[str]:
    """The shell lines in all files that `top` leads to; `ask` answers the few that others are made of."""
    macros = Macros(environment=environment, ask=ask)
    texts = dict(_texts(tree, top, macros))
    for match in _LINE.finditer(texts.get(_FIRST, "")):
        if match["name"]:
            macros.assign(match["name"], match["how"], match["value"])
    found: dict[str, None] = {}

    def note(script: str) -> str:
        found.setdefault(script)
        return "n"

    macros.ask = note
    for name, text in texts.items():
        if name != _FIRST:
            _expand_all(text, macros)
    return list(found)


def _texts(tree: Path, top: str, macros: Macros) -> Iterator[tuple[str, str]]:
    """Each file and its text, from the top down."""
    waiting, seen = [top], {top}
    while waiting:
        name = waiting.pop()
        try:
            text = (tree / name).read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue  # the reader will say so
        yield name, text
        for match in _LINE.finditer(text):
            if match["source"]:
                other = macros.expand(match["source"].strip('"'))
                if other not in seen:
                    seen.add(other)
                    waiting.append(other)


def _expand_all(text: str, macros: Macros) -> None:
    at = text.find("$(")
    while at >= 0:
        try:
            end = closing(text, at + 2)
            if end - at < 1000:  # else it is a parenthesis in a help text
                macros.expand(text[at : end + 1])
        except MacroError:
            end = at + 1
        at = text.find("$(", max(end, at + 1))
