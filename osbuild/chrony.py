"""The rule for chrony: a guest takes its time from the host's clock, which the kernel shows as /dev/ptp0.

Sources: kata-contract 4.4 and 9.2; chrony.conf(5); systemd.unit(5) and systemd.exec(5) for lists that are set back.
"""

from __future__ import annotations

import re
from typing import Final

from osbuild.resources import render
from osbuild.rules import Outcome, Setting, applied, idle, rewrite
from osbuild.systemd import ETC, find_unit
from osbuild.tree import Draft, regular
from osbuild.view import lookup, read_text

CLOCK: Final = "/dev/ptp0"
LINES: Final = (f"refclock PHC {CLOCK} poll 3 dpoll -2 offset 0", "makestep 1 -1")

_CONFIGS: Final = ("/etc/chrony/chrony.conf", "/etc/chrony.conf")  # Debian's and its heirs', everybody else's
_UNITS: Final = ("chrony.service", "chronyd.service")
_SOURCE: Final = re.compile(r"^(?=[ \t]*(?:server|pool|peer)\b)", re.MULTILINE | re.IGNORECASE)
_USER: Final = re.compile(r"\s+-u\s+\S+")


def chrony(draft: Draft, setting: Setting) -> Outcome:
    """chrony takes the time from the host's clock and no server: a guest that was paused, or has no network, is late.

    Its unit is changed by a drop-in, not in place: that works wherever the unit lies, survives its replacement, and
    leaves the package's file as its database knows it.
    """
    configs = [path for path in _CONFIGS if (entry := lookup(draft, path)) and entry.is_file]
    if not configs:
        return idle("there is no chrony in the image")
    for path in configs:
        text = read_text(draft, path) or ""
        changed = configured(text)
        if changed != text:
            rewrite(draft, path, changed, now=setting.now)
    for name in _UNITS:
        unit = find_unit(draft, name)
        if unit is not None:
            drop_in = render("chrony.conf.j2", clock=CLOCK, **_changes(read_text(draft, unit) or ""))
            draft.put(f"{ETC}/{name}.d/90-osbuilder.conf", regular(drop_in.encode(), mtime_ns=setting.now))
    return applied()


def configured(text: str) -> str:
    """A chrony.conf whose only source is the host's clock; the same text when it is that already."""
    text = _SOURCE.sub("# ", text)
    present = {" ".join(line.split()) for line in text.splitlines()}
    missing = [line for line in LINES if line not in present]
    if missing and text and not text.endswith("\n"):
        text += "\n"
    return text + "".join(f"{line}\n" for line in missing)


def _changes(unit: str) -> dict[str, list[str]]:
    """What of the unit cannot be on a read-only root: directories that systemd would make, a user to become."""
    commands = [line for line in _values(unit, "ExecStart") if _USER.search(line)]
    paths = [path for line in _values(unit, "ReadWritePaths") for path in line.split()]
    return {
        "commands": [_USER.sub("", line) for line in commands],
        "paths": [path if path.startswith(("-", "+-")) else f"-{path}" for path in paths],
    }


def _values(unit: str, name: str) -> list[str]:
    """The values of a setting of [Service], in order; an empty one takes back those before it."""
    section, found = "", list[str]()
    for line in re.sub(r"\\\n", " ", unit).splitlines():
        key, equals, value = line.partition("=")
        if line.startswith("["):
            section = line.strip()
        elif equals and section == "[Service]" and key.strip() == name:
            found = [*found, value.strip()] if value.strip() else []
    return found
