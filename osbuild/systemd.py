"""Rules for guests that systemd starts: the agent as its service, the units it needs, and those that nobody does.

    /usr/lib/systemd/system/kata-agent.service           ours; or /lib/…, where the image has its units
    /usr/lib/systemd/system/kata-containers.target       ours; Kata's runtimes pass systemd.unit= with this name
    /etc/systemd/system/basic.target.wants/              kata-containers.target: also started when nobody names it
    /etc/systemd/system/kata-containers.target.wants/    what the image has of dbus and chrony
    /etc/systemd/system-preset/00-osbuilder.preset       keeps `preset-all`, which a first boot does, from undoing that

Sources: kata-contract 4.4, 5.3 and 9.2; systemd.unit(5) for the directories, systemd.preset(5).
"""

from __future__ import annotations

import dataclasses
from typing import Final

from osbuild.agent import Agent
from osbuild.agents import AGENTS
from osbuild.errors import InputError
from osbuild.resources import render
from osbuild.rules import Outcome, Setting, applied, idle
from osbuild.tree import Draft, regular, symlink
from osbuild.view import lookup

SERVICE: Final = "kata-agent.service"
TARGET: Final = "kata-containers.target"
TMP: Final = "tmp.mount"
WORDS: Final = (  # what Kata's runtimes pass for such an image
    f"systemd.unit={TARGET}",
    "systemd.mask=systemd-networkd.service",  # the agent is told about the network
    "systemd.mask=systemd-networkd.socket",
)
ETC: Final = "/etc/systemd/system"
UNITS: Final = (ETC, "/usr/local/lib/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")  # first wins

_HOMES: Final = ("/usr/lib/systemd", "/lib/systemd")  # the second where /lib is no link into /usr
_WANTED: Final = ("dbus.socket", "chronyd.service", "chrony.service")
_PRESET: Final = "/etc/systemd/system-preset/00-osbuilder.preset"
_DISTRIBUTIONS: Final = "/usr/share/systemd/tmp.mount"  # Debian keeps it out of the way, for those who want one
_OVERRIDES: Final = (f"{SERVICE}.d", "kata-.service.d", f"{TARGET}.d", "kata-.target.d")

_SLIM: Final = frozenset((
    "systemd-coredump@.service", "systemd-coredump.socket",
    "systemd-journald.service", "systemd-journald.socket", "systemd-journald-dev-log.socket",
    "systemd-journald-audit.socket", "systemd-journal-flush.service",
    "systemd-random-seed.service",
    "systemd-timesyncd.service",
    "systemd-tmpfiles-setup.service", "systemd-tmpfiles-clean.timer", "systemd-tmpfiles-cleanup.timer",
    "systemd-udevd.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket",
    "systemd-udev-trigger.service",
    "systemd-update-utmp.service",
    "systemd-bless-boot-generator", "systemd-fstab-generator", "systemd-getty-generator",
    "systemd-gpt-auto-generator",
))  # fmt: skip


def find_systemd(draft: Draft) -> str | None:
    """The path of systemd's own program."""
    found = (f"{home}/systemd" for home in _HOMES)
    return next((path for path in found if (entry := lookup(draft, path)) and entry.is_file), None)


def find_units(draft: Draft) -> str | None:
    """The directory of the distribution's units: where basic.target is."""
    found = (f"{home}/system" for home in _HOMES)
    return next((path for path in found if lookup(draft, f"{path}/basic.target")), None)


def find_unit(draft: Draft, name: str) -> str | None:
    """The file of a unit under its own name, neither an alias nor masked."""
    for home in UNITS:
        entry = draft.get(f"{home}/{name}")
        if entry is not None and entry.is_file and entry.content.size:
            return f"{home}/{name}"
    return None


def slim(draft: Draft, setting: Setting) -> Outcome:
    """systemd's units for a machine of one's own are gone: journal, devices, temporary files, gettys, mounts."""
    if not setting.wishes.slim:
        return idle("not wished")
    if find_systemd(draft) is None:
        return idle("there is no systemd in the image")
    for path in list(draft.tree()):
        above, _, name = path.rpartition("/")
        if name in _SLIM and "/systemd/" in above:
            draft.remove(path)
    return applied()


def tmp_mount(draft: Draft, setting: Setting) -> Outcome:
    """tmp.mount is there, so that systemd puts a tmpfs on /tmp: the root is read-only."""
    if not setting.service:
        return idle("the agent is the first process, and mounts what it needs")
    if find_unit(draft, TMP) is not None:
        return applied("the image has one")
    theirs = lookup(draft, _DISTRIBUTIONS)
    if theirs is not None and theirs.is_file:
        unit, note = dataclasses.replace(theirs, mtime_ns=setting.now), "a copy of the distribution's"
    else:
        unit, note = regular(render(f"{TMP}.j2").encode(), mtime_ns=setting.now), ""
    draft.put(f"{ETC}/{TMP}", unit)
    return applied(note)


def agent_as_service(draft: Draft, setting: Setting) -> Outcome:
    """The agent is a service of systemd's, which is /sbin/init: under the names by which Kata's runtimes ask for it."""
    if not setting.service:
        return idle("the agent is the first process")
    systemd, units = find_systemd(draft), find_units(draft)
    if systemd is None or units is None:
        raise InputError(
            "the image has no systemd that could start the agent",
            hint="--init agent needs none; Debian's is in the package systemd-sysv",
        )
    _make_init(draft, systemd, setting.now)
    for kind in AGENTS.values():
        draft.remove(kind.PROGRAM)
    draft.put(AGENTS[setting.agent.kind].PROGRAM, regular(setting.agent.data, 0o755, mtime_ns=setting.now))
    _clear_the_way(draft)
    for name, text in unit_texts(setting.agent).items():
        draft.put(f"{units}/{name}", regular(text.encode(), mtime_ns=setting.now))
    preset = render("osbuilder.preset.j2", service=SERVICE, target=TARGET)
    draft.put(_PRESET, regular(preset.encode(), mtime_ns=setting.now))
    _enable(draft, units, setting.now)
    return applied()


def unit_texts(agent: Agent) -> dict[str, str]:
    """The units of an agent that is a service, by name."""
    values = {"agent": agent, "program": AGENTS[agent.kind].PROGRAM, "service": SERVICE, "target": TARGET}
    return {name: render(f"{name}.j2", **values) for name in (SERVICE, TARGET)}


def _make_init(draft: Draft, systemd: str, now: int) -> None:
    """/sbin/init leads to systemd, and so does /init, for an initramfs: directly, as every kernel can follow that."""
    if draft.resolve("/sbin/init") != draft.resolve(systemd):
        draft.put("/sbin/init", symlink(systemd, mtime_ns=now))
    draft.put("/init", symlink(systemd, mtime_ns=now))


def _clear_the_way(draft: Draft) -> None:
    """What the image says about units of our names is void: masks, other units, drop-ins."""
    for home in UNITS:
        for name in (SERVICE, TARGET, *_OVERRIDES):
            draft.remove(f"{home}/{name}")


def _enable(draft: Draft, units: str, now: int) -> None:
    draft.put(f"{ETC}/basic.target.wants/{TARGET}", symlink(f"{units}/{TARGET}", mtime_ns=now))
    for name in _WANTED:
        path = find_unit(draft, name)
        if path is not None:
            draft.put(f"{ETC}/{TARGET}.wants/{name}", symlink(path, mtime_ns=now))
