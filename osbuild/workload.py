"""What an image would have run as a container, kept in the guest for its agent to start.

    Config.Entrypoint + Config.Cmd      process.args
    Config.Env                          process.env: of a name's values the last, and a PATH where it has none
    Config.WorkingDir                   process.cwd
    Config.User                         process.user: numbers, looked up in the image's /etc/passwd and /etc/group
    Config.StopSignal, ExposedPorts …   annotations org.opencontainers.image.*; Config.Labels win over them
    Config.Volumes                      annotation osbuilder.volumes: what backs a volume is the agent's to decide

Sources: image-spec v1.1 conversion.md and config.md, runtime-spec v1.0.2 config.md; containerd and Docker for numeric
users, whom conversion.md leaves without groups and config.md does not, and for the user's own group among the
supplementary ones: without it a program could leave it, and with it what is forbidden to it (CVE-2022-36109).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from osbuild.errors import InputError
from osbuild.oci import ImageConfig, Json
from osbuild.rules import Outcome, Setting, applied, idle
from osbuild.tree import ID_MAX, Draft, quote, regular
from osbuild.view import read_text

PATH: Final = "/var/lib/osbuilder/workload/config.json"
VERSION: Final = "1.0.2"  # of the runtime-spec
DEFAULT_PATH: Final = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"  # Docker's and containerd's
_IMAGE: Final = "org.opencontainers.image."
_VOLUMES: Final = "osbuilder.volumes"  # there is none of OCI's


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """Who a process is, in numbers."""

    uid: int
    gid: int
    additional_gids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A process to start, and what its image says about it."""

    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: User
    annotations: Mapping[str, str]

    def to_dict(self) -> Json:
        """The runtime-spec configuration that this is; its root is the guest's own, so it names none."""
        user: Json = {"uid": self.user.uid, "gid": self.user.gid}
        if self.user.additional_gids:
            user["additionalGids"] = list(self.user.additional_gids)
        return {
            "ociVersion": VERSION,
            "process": {
                "terminal": False,
                "user": user,
                "args": list(self.args),
                "env": list(self.env),
                "cwd": self.cwd,
            },
            "annotations": dict(self.annotations),
        }


def workload_description(draft: Draft, setting: Setting) -> Outcome:
    """The image's ENTRYPOINT, CMD, ENV, WORKDIR, USER and STOPSIGNAL are in a file, for the agent to start it."""
    draft.remove(PATH)  # an image may have been a guest before
    found = workload(setting.image.config, draft)
    if found is None:
        return idle("the image names nothing to start")
    text = json.dumps(found.to_dict(), indent=2, sort_keys=True) + "\n"
    draft.put(PATH, regular(text.encode(), mtime_ns=setting.now))
    return applied(" ".join(quote(word) for word in found.args))


def workload(config: ImageConfig, draft: Draft) -> Workload | None:
    """What the image would run; None when it names no program. InputError for a user that the image does not have."""
    image = _mapping(config.document.get("config"), "config")
    args = (*_strings(image, "Entrypoint"), *_strings(image, "Cmd"))
    env, cwd, user = _environment(_strings(image, "Env")), _text(image, "WorkingDir"), _text(image, "User")
    annotations = _annotations(config.document, image)
    if not args:  # what is of the wrong kind was refused all the same
        return None
    if not any(word.startswith("PATH=") for word in env):
        env = (*env, DEFAULT_PATH)
    return Workload(
        args=args,
        env=env,
        cwd=cwd if cwd.startswith("/") else f"/{cwd}",
        user=find_user(user, draft),
        annotations=annotations,
    )


def find_user(text: str, draft: Draft) -> User:
    """`name`, `uid`, `name:group`, `uid:gid` and the mixtures, as the passwd and group files of the tree know them."""
    name, _, group = text.partition(":")
    uid, gid, login = _passwd(draft, name, text)
    groups = list(_groups(draft))
    if group:
        gid = _group(groups, group, text)
        return User(uid=uid, gid=gid, additional_gids=(gid,))
    also = {gid} | {number for _, number, members in groups if login in members}
    return User(uid=uid, gid=gid, additional_gids=tuple(sorted(also)))


def _environment(words: tuple[str, ...]) -> tuple[str, ...]:
    """What has no value is none: Docker leaves it out, and runc does not start what has it."""
    values = {name: value for name, equals, value in (word.partition("=") for word in words) if name and equals}
    return tuple(f"{name}={value}" for name, value in values.items())


def _passwd(draft: Draft, name: str, text: str) -> tuple[int, int, str]:
    """uid, gid and name of a user. A number needs no entry: its group is then 0."""
    wanted = _number(name or "0")
    for row in _rows(draft, "/etc/passwd", 4):
        uid, gid = _number(row[2]), _number(row[3])
        if uid is not None and gid is not None and (row[0] == name if wanted is None else uid == wanted):
            return uid, gid, row[0]
    if wanted is None:
        raise InputError(
            f"the image is to run as USER {quote(text)}, and its /etc/passwd has no {quote(name)}",
            hint="no engine could start it either: add the user to the image, or name a number",
        )
    return wanted, 0, ""


def _group(groups: list[tuple[str, int, list[str]]], group: str, text: str) -> int:
    number = _number(group)
    if number is not None:
        return number
    for name, gid, _ in groups:
        if name == group:
            return gid
    raise InputError(
        f"the image is to run as USER {quote(text)}, and its /etc/group has no {quote(group)}",
        hint="no engine could start it either: add the group to the image, or name a number",
    )


def _groups(draft: Draft) -> Iterator[tuple[str, int, list[str]]]:
    for row in _rows(draft, "/etc/group", 3):
        gid = _number(row[2])
        if gid is not None:
            yield row[0], gid, row[3].split(",") if len(row) > 3 else []


def _rows(draft: Draft, path: str, least: int) -> Iterator[list[str]]:
    for line in (read_text(draft, path) or "").splitlines():
        row = line.split(":")
        if len(row) >= least and row[0]:
            yield row


def _number(text: str) -> int | None:
    """A user or group by number; None for what is a name."""
    if not (text.isascii() and text.isdigit()) or len(text) > 10 or int(text) > ID_MAX:
        return None
    return int(text)


def _annotations(document: Json, image: Json) -> dict[str, str]:
    said = {name: document.get(name) for name in ("os", "architecture", "variant", "os.version", "author", "created")}
    found = {f"{_IMAGE}{name}": value for name, value in said.items() if isinstance(value, str) and value}
    lists = {f"{_IMAGE}os.features": _strings(document, "os.features")}
    lists[f"{_IMAGE}exposedPorts"] = tuple(sorted(_mapping(image.get("ExposedPorts"), "ExposedPorts")))
    lists[_VOLUMES] = tuple(sorted(_mapping(image.get("Volumes"), "Volumes")))
    found |= {name: ",".join(values) for name, values in lists.items() if values}
    stop = _text(image, "StopSignal")
    if stop:
        found[f"{_IMAGE}stopSignal"] = stop
    labels = _mapping(image.get("Labels"), "Labels")
    return found | {name: _string(value, "Labels") for name, value in labels.items()}


def _mapping(value: object, name: str) -> Json:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"the image's config: {name} is no object")
    return value


def _strings(holder: Json, name: str) -> tuple[str, ...]:
    value = holder.get(name)
    if value is None:
        return ()
    if not isinstance(value, list):
        raise InputError(f"the image's config: {name} is no list")
    return tuple(_string(item, name) for item in value)


def _text(holder: Json, name: str) -> str:
    return _string(holder.get(name) or "", name)


def _string(value: Any, name: str) -> str:  # Any: JSON, which this checks
    if not isinstance(value, str) or "\0" in value:
        raise InputError(f"the image's config: {name} holds something that is no text")
    return value
