"""From an image to the guest's tree: layers laid over each other, then what every guest needs, one function each.

Each rule is a function from draft to nothing, with a docstring that says what it does and why; RULES is their order.
"""

from __future__ import annotations

import dataclasses
import stat
from collections.abc import Callable
from typing import Final

from osbuild.artifacts import Rootfs
from osbuild.sources.image import SourceImage
from osbuild.tree import Draft, Entry, Tree, device, directory, regular, symlink

Rule = Callable[[Draft, int], None]


def assemble_rootfs(image: SourceImage, *, epoch: int, clamp: bool = False) -> Rootfs:
    """The guest's tree. `epoch`, in seconds, is the time of all that we add; with `clamp` nothing is newer than it."""
    draft = image.tree.edit()
    for rule in RULES:
        rule(draft, epoch * 1_000_000_000)
    return Rootfs(tree=settle(draft.tree(), epoch=epoch, clamp=clamp), init="", epoch=epoch)


def settle(tree: Tree, *, epoch: int, clamp: bool) -> Tree:
    """Give every inode a time, and drop the attributes that mean something to the machine that made the image only."""
    now = epoch * 1_000_000_000
    settled: dict[Entry, Entry] = {}
    entries = {}
    for path, entry in tree.items():
        if entry not in settled:
            settled[entry] = _settle(entry, now, clamp=clamp)
        entries[path] = settled[entry]
    return Tree(entries)


def _settle(entry: Entry, now: int, *, clamp: bool) -> Entry:
    mtime = now if entry.mtime_ns is None or (clamp and entry.mtime_ns > now) else entry.mtime_ns
    if mtime == entry.mtime_ns and not entry.xattrs:
        return entry
    kept = {name: value for name, value in entry.xattrs.items() if not _foreign(name)}
    return dataclasses.replace(entry, mtime_ns=mtime, xattrs=kept)


def _foreign(xattr: str) -> bool:
    return (
        xattr.startswith("trusted.")
        or ".overlay." in xattr
        or xattr in ("security.selinux", "security.ima", "security.evm")
    )


def mount_points(draft: Draft, now: int) -> None:
    """/proc, /sys, /dev, /run, /tmp and /mnt exist: the root is read-only, so nobody can make them later."""
    for path, permissions in (
        ("/proc", 0o555), ("/sys", 0o555), ("/dev", 0o755), ("/run", 0o755), ("/mnt", 0o755),
        ("/tmp", 0o1777),  # noqa: S108  # the guest's, not ours
    ):  # fmt: skip
        here = draft.get(path)
        if here is None or not here.is_dir:
            draft.put(path, directory(permissions, mtime_ns=now))


def device_nodes(draft: Draft, now: int) -> None:
    """/dev/console, null, tty and zero: in an initramfs the kernel opens the console before devtmpfs is there."""
    for name, permissions, major, minor in (
        ("console", 0o600, 5, 1), ("null", 0o666, 1, 3), ("tty", 0o666, 5, 0), ("zero", 0o666, 1, 5),
    ):  # fmt: skip
        draft.put(f"/dev/{name}", device(stat.S_IFCHR, permissions, major, minor, mtime_ns=now))


def var_run(draft: Draft, now: int) -> None:
    """/var/run leads to /run, where agents keep namespaces and sockets."""
    here = draft.get("/var/run")
    if here is None or not here.is_symlink:
        draft.put("/var/run", symlink("/run", mtime_ns=now))


def machine_id(draft: Draft, now: int) -> None:
    """/etc/machine-id is an empty file: every guest that boots from the image is a machine of its own."""
    draft.put("/etc/machine-id", regular(b"", 0o444, mtime_ns=now))


def resolv_conf(draft: Draft, now: int) -> None:
    """/etc/resolv.conf is a regular file: the agent bind-mounts the sandbox's over it."""
    here = draft.get("/etc/resolv.conf")
    if here is None or not here.is_file:
        draft.put("/etc/resolv.conf", regular(b"", mtime_ns=now))


RULES: Final[tuple[Rule, ...]] = (mount_points, device_nodes, var_run, machine_id, resolv_conf)
