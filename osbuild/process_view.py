"""What a process in a container is given, as our probe sees it from inside, and how two of them differ.

One is in a guest of ours, the other under Docker on this host. Not compared, since an engine or a machine chooses them:
the host's name, /etc/hosts and its like, control groups, limits (Docker's are its daemon's), and system calls that are
forbidden (a guest has a kernel of its own, and Kata's runtime sends a filter only with disable_guest_seccomp=false).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

QUESTIONS: Final = (
    ("file", "/proc/self/status"), ("file", "/proc/self/environ"), ("link", "/proc/self/cwd"),
    ("file", "/proc/self/cmdline"), ("file", "/proc/self/limits"), ("file", "/proc/self/mountinfo"),
    ("list", "/dev"), ("list", "/proc"), ("list", "/sys"),
)  # fmt: skip

_CAPABILITIES: Final = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
_MKNOD: Final = 1 << 27  # container.CAPABILITIES says why a guest's have it not
_ENGINES: Final = frozenset(("HOSTNAME",))  # a variable that an engine makes up
_MOUNTED: Final = ("/proc", "/dev", "/dev/pts", "/dev/shm", "/dev/mqueue", "/sys")  # noqa: S108 - names only
_OPTIONS: Final = frozenset(("ro", "rw", "nosuid", "nodev", "noexec"))
_OF_KIND: Final = ("size=", "mode=", "gid=", "ptmxmode=")  # of a tmpfs or devpts
_HIDING: Final = re.compile(r"/(?:proc|sys)/([^/]+)")  # a mount that hides or protects something
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")
_LIMIT: Final = re.compile(r"^(Max [a-z -]+?)  +(\S+) +(\S+)", re.MULTILINE)


def view(answers: Sequence[bytes]) -> dict[str, Any]:
    """The answers to QUESTIONS; JSON."""
    status, environ, cwd, cmdline, limits, mounts, *listed = (text.decode(errors="surrogateescape") for text in answers)
    lines = dict(re.findall(r"^(\w+):[ \t]*(.*?)[ \t]*$", status, re.MULTILINE))
    dev, proc, sys = ({line.split(" ")[0]: line for line in text.splitlines()} for text in listed)
    return {
        "uid": int(lines["Uid"].split()[0]), "gid": int(lines["Gid"].split()[0]),
        "ids": [*map(int, lines["Uid"].split()), *map(int, lines["Gid"].split())],
        "groups": sorted(int(group) for group in lines["Groups"].split()),
        "cwd": cwd, "env": sorted(word for word in environ.split("\0") if word), "args": cmdline.split("\0")[:-1],
        "umask": lines["Umask"], "capabilities": {name: int(lines[name], 16) for name in _CAPABILITIES},
        "no_new_privs": int(lines["NoNewPrivs"]), "seccomp": int(lines.get("Seccomp", 0)),
        "limits": {name: [soft, hard] for name, soft, hard in _LIMIT.findall(limits)},
        "mounts": _mounts(mounts), "dev": dev,
        "there": sorted((*map("/proc/{}".format, proc), *map("/sys/{}".format, sys))),
    }  # fmt: skip


def _mounts(text: str) -> dict[str, list[str]]:
    """By where they are: the kind of filesystem, and the options that we know; the last one hides those below it."""
    found = {}
    for line in text.splitlines():
        words = line.split(" ")
        dash = words.index("-")
        path = _ESCAPE.sub(lambda code: chr(int(code[1], 8)), words[4])
        special = [option for option in words[dash + 3].split(",") if option.startswith(_OF_KIND)]
        found[path] = [words[dash + 1], *sorted(_OPTIONS & set(words[5].split(","))), *sorted(special)]
    return found


def differences(guest: Mapping[str, Any], docker: Mapping[str, Any], *, ours: Collection[str] = ()) -> list[str]:
    """What a process in the guest is given otherwise than under Docker; `ours` are nodes that we put in /dev."""
    pairs = {name: (guest[name], docker[name]) for name in ("args", "ids", "groups", "cwd", "umask", "no_new_privs")}
    pairs["env"] = (_variables(guest), _variables(docker))
    for name, held in docker["capabilities"].items():
        pairs[name] = (guest["capabilities"][name], held & ~_MKNOD)
    nodes = (guest["dev"].keys() | docker["dev"].keys()) - set(ours)
    pairs |= {f"/dev/{name}": (guest["dev"].get(name), docker["dev"].get(name)) for name in nodes}
    pairs |= {f"mount of {path}": (guest["mounts"].get(path), docker["mounts"].get(path)) for path in _MOUNTED}
    said = [f"{name}: {_shown(one)}, under Docker {_shown(two)}" for name, (one, two) in pairs.items() if one != two]
    return sorted((*said, *_open(guest, docker)))


def _variables(found: Mapping[str, Any]) -> list[str]:
    return [word for word in found["env"] if word.partition("=")[0] not in _ENGINES]


def _open(guest: Mapping[str, Any], docker: Mapping[str, Any]) -> list[str]:
    """What Docker hides or protects, and the guest, which has it too, does not."""
    said = []
    for path, (kind, *options) in docker["mounts"].items():
        if not _HIDING.fullmatch(path) or path not in guest["there"] or path.startswith("/sys/fs"):
            continue
        mounted = guest["mounts"].get(path)
        if mounted is None or (kind == "proc" and "ro" in options and "ro" not in mounted):
            said.append(f"{path}: open, under Docker {'read-only' if kind == 'proc' else 'hidden'}")
    return said


def _shown(value: object) -> str:
    return "nothing" if value is None else value if isinstance(value, str) else repr(value)
