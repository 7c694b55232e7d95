"""docs/causes.md, made from the table of causes and from recordings of guests that were wrong in these ways."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from osbuild import autopsy, causes
from tests import recordings
from tests.injections import INJECTIONS

PATH: Final = Path(__file__).parents[1] / "docs" / "causes.md"
_LINE: Final = 110
_INTRODUCTION: Final = """# Why a guest did not boot: the causes that osbuilder names

A guest that failed or fell silent has a `cause` in `report.json`: its name, a sentence, the line that shows it, and
what to do. A cause is certain when such a line was seen and explains how the guest ended: it is the kernel's own line
(those have its time in front; programs may quote what they like), it is about the root's device where it names one, and
what it explains is such an end, soon after. Of two such lines the first is the cause. Otherwise it is a guess, and the
verdict stays `unknown`; what nobody can name is `unknown, last seen: …`. A stall of a processor after which the guest
went on, or a program killed for want of memory, explains nothing for certain. It is told within ten seconds of the
event, not at the deadline, unless nothing happens at all.

A guest that falls silent fails, however far it came, when its kernel says that its initramfs is damaged, or half of it
missing, or the root filesystem damaged. A guest that answered fails all the same when its kernel complains of itself,
of its initramfs or of its root: that is then the cause. A complaint about another disk is none; a program that was
killed for want of memory fails it, too, and is a guess.

`tests/injections.py` makes each of these happen for real (all but those marked with a star, which no guest of ours can
be made to show); the lines below are from there. The VMM's own complaints come first, then what a console shows, then
what is known from how it ended. This page is made by `tests/causes_page.py`.

| name | what it means | a line that shows it | what to do |
| --- | --- | --- | --- |
"""


def page() -> str:
    """The page as it should be."""
    return _INTRODUCTION + "".join(f"| {' | '.join(row)} |\n" for row in _rows())


def _rows() -> Iterator[tuple[str, ...]]:
    shown = _examples()
    told: set[str] = set()
    rows = [(row.name, row.sentence, row.hint) for row in (*causes.VMM, causes.TERMINATED, *causes.GUEST)]
    rows += [(name, outcome.sentence, outcome.hint) for name, outcome in causes.OUTCOMES.items()]
    for name, sentence, hint in rows:
        if name not in told:
            told.add(name)
            line = f"`{shown[name]}`" if shown.get(name) else ""
            star = "" if name in shown else " *"
            yield f"`{name}`{star}", _cell(re.sub(r"\{(\w+?)_*\}", r"…", sentence)), line, _cell(hint)


def _examples() -> dict[str, str]:
    """The first recorded line of each cause, without the kernel's time."""
    found: dict[str, str] = {}
    for one in INJECTIONS:
        cause = autopsy.explain(recordings.read(one.name))
        found.setdefault(cause.name, _cell(re.sub(r"^\[ *[\d.]+\] +", "", cause.line)[:_LINE].replace("`", "'")))
    return found


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
