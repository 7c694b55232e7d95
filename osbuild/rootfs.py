"""From an image to the guest's tree: the image's own, then what was wished, then what every guest needs.

Each rule is a function that edits a draft and says whether it applied; the first sentence of its docstring is what
`osbuilder rootfs --explain` prints. RULES is their order: what a guest needs comes after wishes, and wins.
"""

from __future__ import annotations

import dataclasses
import stat
from collections import Counter
from dataclasses import dataclass
from typing import Final

from osbuild.agent import INIT, Agent, install_init, read_agent
from osbuild.agents import init_words
from osbuild.artifacts import File, Rootfs
from osbuild.chrony import chrony
from osbuild.oci import Json
from osbuild.rules import Outcome, Rule, Setting, applied, below, idle
from osbuild.sources.image import SourceImage
from osbuild.spec import RootfsSpec
from osbuild.summary import summary
from osbuild.systemd import WORDS, agent_as_service, slim, tmp_mount
from osbuild.tree import Draft, Entry, Tree, device, directory, regular, symlink
from osbuild.wishes import additions, agent_policy, guest_hooks, kernel_modules, removals
from osbuild.workload import workload_description

FIRST: Final = 5  # paths that an explanation names of each kind, or all of them when it is one more


# --- Rules for every guest ------------------------------------------------------------------------------------------


def mount_points(draft: Draft, setting: Setting) -> Outcome:
    """/proc, /sys, /dev, /run, /tmp and /mnt exist: the root is read-only, so nobody can make them later."""
    for path, permissions in (
        ("/proc", 0o555), ("/sys", 0o555), ("/dev", 0o755), ("/run", 0o755), ("/mnt", 0o755),
        ("/tmp", 0o1777),  # noqa: S108  # the guest's, not ours
    ):  # fmt: skip
        here = draft.get(path)
        if here is None or not here.is_dir:
            draft.put(path, directory(permissions, mtime_ns=setting.now))
    return applied()


def device_nodes(draft: Draft, setting: Setting) -> Outcome:
    """/dev/console, null, tty and zero: in an initramfs the kernel opens the console before devtmpfs is there."""
    # No /dev/fd or /dev/stdin: devtmpfs covers whatever lies here before any program could use them.
    for name, permissions, major, minor in (
        ("console", 0o600, 5, 1), ("null", 0o666, 1, 3), ("tty", 0o666, 5, 0), ("zero", 0o666, 1, 5),
    ):  # fmt: skip
        draft.put(f"/dev/{name}", device(stat.S_IFCHR, permissions, major, minor, mtime_ns=setting.now))
    return applied()


def var_run(draft: Draft, setting: Setting) -> Outcome:
    """/var/run leads to /run, where agents keep namespaces and sockets; what lay in a directory there is dropped."""
    return _lead(draft, "/var/run", "/run", setting.now)


def var_tmp(draft: Draft, setting: Setting) -> Outcome:
    """/var/tmp leads to /tmp, where systemd mounts a tmpfs; what lay in a directory there is dropped."""  # noqa: S108
    return _lead(draft, "/var/tmp", "/tmp", setting.now)  # noqa: S108


def machine_id(draft: Draft, setting: Setting) -> Outcome:
    """/etc/machine-id is an empty file, and D-Bus has none of its own: every guest is a machine of its own."""
    draft.put("/etc/machine-id", regular(b"", 0o444, mtime_ns=setting.now))
    if draft.get("/var/lib/dbus/machine-id") is not None:
        draft.put("/var/lib/dbus/machine-id", symlink("/etc/machine-id", mtime_ns=setting.now))
    return applied()


def resolv_conf(draft: Draft, setting: Setting) -> Outcome:
    """/etc/resolv.conf is a regular file: the agent bind-mounts the sandbox's over it."""
    here = draft.get("/etc/resolv.conf")
    if here is None or not here.is_file:
        draft.put("/etc/resolv.conf", regular(b"", mtime_ns=setting.now))
    return applied()


def agent_as_init(draft: Draft, setting: Setting) -> Outcome:
    """The agent is /sbin/init, and /init leads there: the first process of an image, and of an initramfs."""
    if setting.service:
        return idle("systemd is the first process")
    install_init(draft, setting.agent, now=setting.now)
    return applied(str(setting.agent))


def _lead(draft: Draft, path: str, target: str, now: int) -> Outcome:
    here = draft.get(path)
    if here is not None and here.is_symlink and draft.resolve(path) == draft.resolve(target):
        return applied()
    lost = len(below(draft, path)) if here is not None and here.is_dir else 0
    draft.put(path, symlink(target, mtime_ns=now))
    return applied(f"{lost} entries of a directory there are dropped" if lost else "")


RULES: Final[tuple[Rule, ...]] = (
    # What was wished, …
    removals, additions, kernel_modules, guest_hooks, agent_policy,
    # … what a guest needs, …
    mount_points, device_nodes, var_run, var_tmp, machine_id, resolv_conf,
    slim, tmp_mount, chrony, agent_as_init, agent_as_service,
    # … and what is said about it.
    workload_description, summary,
)  # fmt: skip


# --- All of them ----------------------------------------------------------------------------------------------------


def assemble_rootfs(
    image: SourceImage, agent: File | Agent, *, epoch: int, clamp: bool = False, wishes: RootfsSpec | None = None
) -> Rootfs:
    """The guest's tree, with its agent. `epoch`, in seconds, is the time of all that we add; with `clamp` nothing is
    newer than it."""
    setting = _setting(image, agent, epoch, wishes)
    draft = settle(image.tree, epoch=epoch, clamp=clamp).edit()
    inputs: dict[str, str] = {}
    for rule in RULES:
        inputs |= rule(draft, setting).inputs
    return Rootfs(
        tree=_dated(draft.tree(), setting.now),
        init=INIT,
        epoch=epoch,
        agent=str(setting.agent),
        agent_sha256=setting.agent.sha256,
        agent_inputs=setting.agent.inputs,
        words=WORDS if setting.service else init_words(setting.agent, service=False),
        dropped_xattrs=setting.dropped_xattrs,
        inputs=inputs,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """Paths of one kind: how many, and the first few."""

    count: int
    first: tuple[str, ...]

    @classmethod
    def of(cls, paths: list[str]) -> Changed:
        # "and 1 more" would be longer than the path.
        return cls(count=len(paths), first=tuple(paths if len(paths) == FIRST + 1 else paths[:FIRST]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """A rule, and what it did to one image."""

    name: str
    why: str
    applied: bool
    note: str
    added: Changed
    changed: Changed
    removed: Changed

    def to_dict(self) -> Json:
        """As JSON; a byte of a path that is no UTF-8 is a lone surrogate."""
        return dataclasses.asdict(self)


def explain(
    image: SourceImage, agent: File | Agent, *, epoch: int, clamp: bool = False, wishes: RootfsSpec | None = None
) -> tuple[Explained, ...]:
    """What each rule does to this image, in order; called like assemble_rootfs."""
    setting = _setting(image, agent, epoch, wishes)
    before = settle(image.tree, epoch=epoch, clamp=clamp)
    dropped = ", ".join(f"{name} of {count}" for name, count in setting.dropped_xattrs.items())
    rows = [_explained(settle, applied(f"dropped: {dropped}" if dropped else ""), image.tree, before)]
    draft = before.edit()
    for rule in RULES:
        outcome = rule(draft, setting)
        after = draft.tree()
        rows.append(_explained(rule, outcome, before, after))
        before = after
    return tuple(rows)


def _setting(image: SourceImage, agent: File | Agent, epoch: int, wishes: RootfsSpec | None) -> Setting:
    return Setting(
        image=image,
        agent=agent if isinstance(agent, Agent) else read_agent(agent),
        wishes=wishes or RootfsSpec(),
        epoch=epoch,
        dropped_xattrs=foreign_xattrs(image.tree),
    )


def _explained(function: object, outcome: Outcome, before: Tree, after: Tree) -> Explained:
    name, text = str(getattr(function, "__name__", "")), str(getattr(function, "__doc__", ""))
    return Explained(
        name=name,
        why=" ".join(text.partition("\n\n")[0].split()),
        applied=outcome.applied,
        note=outcome.note,
        added=Changed.of([path for path in after if path not in before]),
        changed=Changed.of([path for path in after if path in before and not _same(before[path], after[path])]),
        removed=Changed.of([path for path in before if path not in after]),
    )


def _same(one: Entry, other: Entry) -> bool:
    """Whether nobody could tell two inodes apart."""
    if one is other:
        return True
    fields = ("mode", "uid", "gid", "mtime_ns", "target", "major", "minor")
    if any(getattr(one, name) != getattr(other, name) for name in fields) or dict(one.xattrs) != dict(other.xattrs):
        return False
    same = one.content is other.content or one.content.size == other.content.size == 0
    return same or b"".join(one.content.chunks()) == b"".join(other.content.chunks())


# --- Times and attributes -------------------------------------------------------------------------------------------


def settle(tree: Tree, *, epoch: int, clamp: bool) -> Tree:
    """Every inode has a time, and attributes that mean something to the machine that made the image only are dropped:
    trusted.*, *.overlay.*, security.selinux, .ima and .evm."""
    now = epoch * 1_000_000_000
    settled: dict[Entry, Entry] = {}
    entries = {}
    for path, entry in tree.items():
        if entry not in settled:
            settled[entry] = _settle(entry, now, clamp=clamp)
        entries[path] = settled[entry]
    return Tree(entries)


def foreign_xattrs(tree: Tree) -> dict[str, int]:
    """What settle() drops: each attribute's name, and how many inodes have it."""
    inodes = {entry for entry in tree.values() if entry.xattrs}
    return dict(sorted(Counter(name for entry in inodes for name in entry.xattrs if _foreign(name)).items()))


def _settle(entry: Entry, now: int, *, clamp: bool) -> Entry:
    mtime = now if entry.mtime_ns is None or (clamp and entry.mtime_ns > now) else entry.mtime_ns
    foreign = any(_foreign(name) for name in entry.xattrs)
    if mtime == entry.mtime_ns and not foreign:
        return entry
    kept = {name: value for name, value in entry.xattrs.items() if not _foreign(name)} if foreign else entry.xattrs
    return dataclasses.replace(entry, mtime_ns=mtime, xattrs=kept)


def _dated(tree: Tree, now: int) -> Tree:
    """The directories that rules made on the way to something get the time of what they were made for."""
    if all(entry.mtime_ns is not None for entry in tree.values()):
        return tree
    dated = ((path, entry) for path, entry in tree.items() if entry.mtime_ns is None)
    return Tree({**tree, **{path: dataclasses.replace(entry, mtime_ns=now) for path, entry in dated}})


def _foreign(xattr: str) -> bool:
    return (
        xattr.startswith("trusted.")
        or ".overlay." in xattr
        or xattr in ("security.selinux", "security.ima", "security.evm")
    )
