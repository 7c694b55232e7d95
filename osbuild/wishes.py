"""Rules that apply when somebody wished them: removals, additions, kernel modules, guest hooks, a policy."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from osbuild.agents import BUILTIN
from osbuild.errors import InputError, SpecError
from osbuild.host_files import read_host
from osbuild.rules import Outcome, Setting, applied, idle
from osbuild.spec import RootfsSpec
from osbuild.tree import Draft, Entry, Spool, Tree, quote, regular, symlink
from osbuild.view import lookup

MODULES: Final = "/lib/modules"
HOOKS: Final = "/usr/share/oci/hooks"  # what guest_hook_path of Kata's configuration is set to
HOOK_STAGES: Final = ("prestart", "poststart", "poststop")
POLICIES: Final = "/etc/kata-opa"
DEFAULT_POLICY: Final = "default-policy.rego"  # what Kata's agent opens

_NOT_WISHED: Final = "not wished"
_RELEASE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+~-]*\Z")
_PACKAGE: Final = re.compile(rb"^\s*package\s+\w", re.MULTILINE)
_HOST_LINKS: Final = ("/build", "/source")  # of a kernel's modules: where its sources are on this machine


def removals(draft: Draft, setting: Setting) -> Outcome:
    """What --remove names is gone: first of all, so that nothing a guest needs can go with it."""
    if not setting.wishes.remove:
        return idle(_NOT_WISHED)
    for pattern in setting.wishes.remove:
        found = _matches(draft, pattern)
        if not found:
            raise InputError(f"nothing in the image matches {quote(pattern)}, which was to be removed")
        for path in found:
            draft.remove(path)
    return applied()


def additions(draft: Draft, setting: Setting) -> Outcome:
    """What --add names is there: as root's, with its modes, and no newer than everything else that is added."""
    if not setting.wishes.add:
        return idle(_NOT_WISHED)
    spool = Spool()
    inputs = {}
    for addition in setting.wishes.add:
        target = addition.target
        if target.endswith("/") and not (addition.source.is_dir() and not addition.source.is_symlink()):
            target += addition.source.name
        found = read_host(addition.source, spool, newest=setting.now)
        inputs[f"add {target}"] = lay(draft, found, target.rstrip("/"))
    return applied(inputs=inputs)


def kernel_modules(draft: Draft, setting: Setting) -> Outcome:
    """The kernel's modules are in /lib/modules/RELEASE, where modprobe looks when a runtime asks for one."""
    source = setting.wishes.modules
    if source is None:
        return idle(_NOT_WISHED)
    home = _release(source)
    target = f"{MODULES}/{home.name}"
    draft.remove(target)  # two builds of one release would disagree about symbols
    found = read_host(home, Spool(), newest=setting.now)
    kept = ((name, entry) for name, entry in found if not (name in _HOST_LINKS and entry.is_symlink))
    return applied(home.name, {"modules": lay(draft, kept, target)})


def guest_hooks(draft: Draft, setting: Setting) -> Outcome:
    """The guest's OCI hooks are in /usr/share/oci/hooks: an agent runs them around each container."""
    source = setting.wishes.hooks
    if source is None:
        return idle(_NOT_WISHED)
    found = dict(read_host(source, Spool(), newest=setting.now))
    _check_hooks(source, found)
    return applied(inputs={"hooks": lay(draft, found.items(), HOOKS)})


def agent_policy(draft: Draft, setting: Setting) -> Outcome:
    """The agent's policy is in /etc/kata-opa, and default-policy.rego leads to it: what a host may ask of the guest."""
    source = setting.wishes.policy
    if source is None:
        if setting.agent.wants_policy and lookup(draft, f"{POLICIES}/{DEFAULT_POLICY}") is None:
            raise InputError(
                f"{setting.agent} was built to obey a policy, and ends at once in a guest that has none",
                hint="--policy FILE.rego; Kata's own allow-all.rego forbids nothing",
            )
        return idle(_NOT_WISHED)
    entry = dict(read_host(source.resolve(), Spool(), newest=setting.now))[""]
    if not entry.is_file:
        raise InputError(f"the policy {quote(str(source))} is no file")
    text = b"".join(entry.content.chunks())
    if not _PACKAGE.search(text):
        raise InputError(
            f"{quote(str(source))} is no policy: it has no line that says its package", hint="package agent_policy"
        )
    name = source.name if source.name.endswith(".rego") else f"{source.name}.rego"
    draft.put(f"{POLICIES}/{name}", regular(text, mtime_ns=entry.mtime_ns or 0))
    if name != DEFAULT_POLICY:
        draft.put(f"{POLICIES}/{DEFAULT_POLICY}", symlink(name, mtime_ns=setting.now))
    return applied(name, {"policy": f"sha256:{hashlib.sha256(text).hexdigest()}"})


def check_policy(wishes: RootfsSpec) -> None:
    """SpecError for a policy that nobody would obey."""
    if wishes.policy is not None and wishes.agent == BUILTIN:
        raise SpecError(
            "the built-in agent obeys no policy, and a guest would only look as if it did",
            hint="--agent FILE, a kata-agent with a policy engine; or leave --policy out",
        )


def lay(draft: Draft, found: Iterable[tuple[str, Entry]], target: str) -> str:
    """Put inodes below a target, and give their digest.

    A directory that is there already stays as it is, or a symbolic link to one: so
    an overlay made under a strict umask does not lock the guest's root, and /lib stays a link into /usr.
    """
    given = {}
    for name, entry in found:
        given[name or "/"] = entry
        path = target + name or "/"
        here, there = draft.get(path), lookup(draft, path)
        if entry.is_dir and there is not None and there.is_dir:
            continue
        if here is not None and here.is_dir != entry.is_dir:
            kind = "a directory" if here.is_dir else "no directory"
            raise InputError(
                f"{quote(path)} is {kind} in the image, and other than what was to be added there",
                hint=f"--remove {path} too",
            )
        draft.put(path, entry)
    return f"sha256:{Tree(given).digest()}"


def _matches(draft: Draft, pattern: str) -> list[str]:
    """The paths that a pattern names. Symbolic links on the way are followed inside the tree, the last one is not."""
    children: Mapping[str, list[str]] = _children(draft.tree()) if set("*?") & set(pattern) else {}
    found = [""]
    for part in pattern.split("/")[1:]:
        if not set("*?") & set(part):
            found = [f"{above}/{part}" for above in found]
            continue
        wanted = re.compile(re.escape(part).replace(r"\*", ".*").replace(r"\?", "."), re.DOTALL)
        found = [
            f"{above}/{name}"
            for above in found
            for name in children.get(draft.resolve(above or "/"), ())
            if wanted.fullmatch(name)
        ]
    return [path for path in found if draft.get(path) is not None]


def _children(tree: Tree) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for path in tree:
        above, _, name = path.rpartition("/")
        if name:
            names.setdefault(above or "/", []).append(name)
    return names


def _release(source: Path) -> Path:
    """The directory of one kernel's modules: `source` itself, or the only one in its lib/modules."""
    where = source / "lib" / "modules"
    try:
        homes = sorted(path for path in where.iterdir() if path.is_dir()) if where.is_dir() else [source.absolute()]
    except OSError as problem:
        raise InputError(f"cannot read {quote(str(where))}: {problem.strerror}") from problem
    if len(homes) != 1:
        names = ", ".join(quote(path.name) for path in homes) or "none"
        raise InputError(
            f"{quote(str(where))} should hold the modules of one kernel: {names}", hint="name its directory"
        )
    (home,) = homes
    if not home.is_dir():
        raise InputError(f"{quote(str(source))} is no directory of kernel modules")
    if not (home / "modules.dep").is_file():
        above = home.parents[2] if home.parts[-3:-1] == ("lib", "modules") else home.parent
        raise InputError(
            f"{quote(str(home))} has no modules.dep, without which modprobe finds no module",
            hint=f"depmod -b {above} {home.name}",
        )
    if not _RELEASE.match(home.name):
        raise InputError(f"{quote(home.name)} is no kernel's release")
    return home


def _check_hooks(source: Path, found: Mapping[str, Entry]) -> None:
    where = quote(str(source))
    stages = {name.split("/")[1] for name in found if name}
    if not stages or not stages <= set(HOOK_STAGES):
        wrong = ", ".join(quote(name) for name in sorted(stages - set(HOOK_STAGES))) or "nothing"
        raise InputError(f"{where} holds {wrong}", hint=f"hooks lie in {', '.join(HOOK_STAGES)}")
    for name, entry in found.items():
        if name.count("/") < 2:
            if not entry.is_dir:
                raise InputError(f"{quote(str(source) + name)} is no directory")
        elif entry.is_file and not entry.mode & 0o111:
            raise InputError(f"the hook {quote(str(source) + name)} is not executable", hint="chmod +x")
