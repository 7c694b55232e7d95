"""systemd's unit files, as far as one must read them to know whether a unit starts: where, masked, requiring what.

Sources: systemd.unit(5), systemd.service(5), systemd.syntax(7). /run is not looked at: it is empty when a guest starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from osbuild.errors import InputError
from osbuild.systemd import UNITS
from osbuild.view import View

_REQUIRING: Final = ("Requires", "Requisite", "BindsTo")
_WORD: Final = re.compile(r"\"[^\"]*\"|'[^']*'|\S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """The settings of a unit file: section -> key -> values, in order; an empty value forgets those before it."""

    settings: Mapping[str, Mapping[str, list[str]]]

    def required(self, view: View, name: str) -> list[str]:
        """Units without which this one does not start, besides those that systemd adds itself."""
        section = self.settings.get("Unit", {})
        said = [word for key in _REQUIRING for value in section.get(key, ()) for word in value.split()]
        linked = [one for home in UNITS for one in view.names(f"{home}/{name}.requires")]
        return [one for one in dict.fromkeys((*said, *linked)) if "%" not in one]

    def programs(self) -> list[str]:
        """What a service starts: the first word of each ExecStart=, without what is said by the signs before it."""
        found = []
        for value in self.settings.get("Service", {}).get("ExecStart", ()):
            word = _WORD.match(value.lstrip("@-:+!|"))
            if word is not None and "%" not in word[0]:
                found.append(word[0].strip("\"'"))
        return found


def find_unit(view: View, name: str) -> str | None:
    """The file that has the say on a unit, or on the template that it is an instance of."""
    stem, at, rest = name.partition("@")
    template = f"{stem}@.{rest.rpartition('.')[2]}" if at else name
    for wanted in dict.fromkeys((name, template)):
        for home in UNITS:
            path = f"{home}/{wanted}"
            if view.get(path) is not None or _leads_to_null(view, path):
                return path
    return None


def is_masked(view: View, path: str) -> bool:
    """An empty file, or a link to /dev/null: systemd takes either as "never"."""
    entry = view.get(path)
    return _leads_to_null(view, path) or (entry is not None and entry.is_file and not entry.content.size)


def _leads_to_null(view: View, path: str) -> bool:
    try:
        return view.link(path) is not None and view.real(path) == "/dev/null"
    except InputError:  # in a circle
        return False


def read_unit(view: View, path: str) -> Unit:
    """A unit file. Lines that are no settings have no meaning here."""
    settings: dict[str, dict[str, list[str]]] = {}
    section: dict[str, list[str]] = {}
    text = re.sub(r"\\\n(?:[ \t]*[#;].*\n)*", " ", view.text(path) or "")
    for line in (line.strip() for line in text.splitlines()):
        if line.startswith("[") and line.endswith("]"):
            section = settings.setdefault(line[1:-1], {})
        elif "=" in line and line[0] not in "#;":
            key, _, value = line.partition("=")
            values = section.setdefault(key.strip(), [])
            if value.strip():
                values.append(value.strip())
            else:
                values.clear()
    return Unit(settings=settings)
