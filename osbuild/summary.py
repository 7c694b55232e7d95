"""/var/lib/osbuilder/osbuilder.yaml: what is in a guest, for whoever finds one. Kata's collect script looks for it.

Source of the keys: kata-contract 5.7; `image` and `changes` are ours. Strings are written as JSON writes them, which
YAML reads as its own double-quoted ones.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import osbuild
from osbuild.agent import Agent
from osbuild.arch import ARCHES
from osbuild.rules import Outcome, Setting, applied
from osbuild.tree import Draft, regular
from osbuild.wishes import HOOKS, MODULES, POLICIES

if TYPE_CHECKING:
    from osbuild.packages import Inventory
    from osbuild.spec import RootfsSpec

PATH: Final = "/var/lib/osbuilder/osbuilder.yaml"
FORMAT: Final = "0.0.2"
_NOT_STRINGS: Final = frozenset(("y", "n", "yes", "no", "on", "off", "true", "false", "null"))  # to YAML 1.1
_URL: Final = "unknown"  # Kata's word for what it does not know: this project has no address yet

_AGENT: Final = re.compile(
    r'(?P<head>^agent:\n  url: "[^"\n]*"\n)  name: "(?P<name>[^"\n]*)"\n  version: "(?P<version>[^"\n]*)"\n'
    r'(?P<tail>  agent-is-init-daemon: "(?P<init>yes|no)"$)',
    re.MULTILINE,
)

Yaml = str | int | Sequence["Yaml"] | Mapping[str, "Yaml"]


def summary(draft: Draft, setting: Setting) -> Outcome:
    """/var/lib/osbuilder/osbuilder.yaml says what is inside: distribution, packages with versions, agent, changes."""
    from osbuild.packages import installed_packages  # whose databases need sqlite

    # The image's packages: that --remove took their database away does not make them unknown.
    found = installed_packages(setting.image.tree)
    draft.put(PATH, regular(to_yaml(describe(setting, found)).encode(), mtime_ns=setting.now))
    return applied("; ".join(found.notes))


def describe(setting: Setting, found: Inventory) -> Mapping[str, Yaml]:
    """What the summary says, before it is spelled."""
    agent, wishes = setting.agent, setting.wishes
    platform = setting.image.config.platform
    return {
        "osbuilder": {"url": _URL, "version": osbuild.__version__},
        "rootfs-creation-time": creation_time(setting.epoch),
        "description": "osbuilder rootfs",
        "file-format-version": FORMAT,
        "architecture": next((arch.name for arch in ARCHES.values() if arch.oci == platform.architecture), "unknown"),
        "base-distro": {
            "name": found.distro or "unknown",
            "version": found.distro_version or "unknown",
            "packages": {
                "default": list(dict.fromkeys(f"{package.name}={package.version}" for package in found.packages)),
                "extra": [],
            },
        },
        "agent": {
            "url": _URL,
            "name": agent.name,
            "version": agent.version,
            "agent-is-init-daemon": "no" if setting.service else "yes",
        },
        "image": {"digest": setting.image.digest, "package-manager": found.manager or "unknown"},
        "changes": {
            "added": _added(wishes),
            "removed": sorted(wishes.remove),
            "slim": "yes" if wishes.slim else "no",
            "dropped-xattrs": dict(sorted(setting.dropped_xattrs.items())),
        },
    }


def with_agent(text: str, agent: Agent) -> str | None:
    """A summary that names another agent; None when it is none of ours."""
    name, version = f"  name: {_scalar(agent.name)}\n", f"  version: {_scalar(agent.version)}\n"
    changed, count = _AGENT.subn(lambda match: match["head"] + name + version + match["tail"], text)
    return changed if count == 1 else None


def agent_of(text: str) -> tuple[str, str, bool] | None:
    """Name and version of the agent that a summary names, and whether it is a service; None when it names none."""
    found = _AGENT.search(text)
    return (found["name"], found["version"], found["init"] == "no") if found else None


def _added(wishes: RootfsSpec) -> list[str]:
    kinds = ((MODULES, wishes.modules), (HOOKS, wishes.hooks), (POLICIES, wishes.policy))
    return sorted([addition.target for addition in wishes.add] + [path for path, wish in kinds if wish is not None])


def creation_time(epoch: int) -> str:
    """Seconds since 1970 as date(1) prints `%Y-%m-%dT%T.%N%zZ` in UTC, which is how Kata writes it."""
    import datetime

    moment = datetime.datetime.fromtimestamp(epoch, tz=datetime.UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.000000000+0000Z"


def to_yaml(document: Mapping[str, Yaml]) -> str:
    """A document of mappings, lists, strings and whole numbers."""
    return "\n".join(["---", *_block(document, "")]) + "\n"


def _block(value: Mapping[str, Yaml], indent: str) -> list[str]:
    lines = []
    for key, item in value.items():
        plain = re.fullmatch(r"[a-z][a-z-]*", key) and key not in _NOT_STRINGS
        name = key if plain else _scalar(key)
        if isinstance(item, Mapping) and item:
            lines += [f"{indent}{name}:", *_block(item, f"{indent}  ")]
        elif isinstance(item, Sequence) and not isinstance(item, str) and item:
            lines += [f"{indent}{name}:", *(f"{indent}  - {_scalar(one)}" for one in item)]
        else:
            lines.append(f"{indent}{name}: {_scalar(item)}")
    return lines


def _scalar(value: Yaml) -> str:
    if isinstance(value, str):
        return _string(value)
    return str(value) if isinstance(value, int) else "{}" if isinstance(value, Mapping) else "[]"


def _string(text: str) -> str:
    """JSON escapes what is beyond 16 bits in two halves, and leaves DEL alone; YAML wants neither."""
    safe = text.encode(errors="backslashreplace").decode()  # bytes that were no UTF-8
    wide = re.sub(r"[\U00010000-\U0010ffff\x7f]", lambda match: f"\0{ord(match[0]):08x}", safe.replace("\0", " "))
    return json.dumps(wide).replace("\\u0000", "\\U")
