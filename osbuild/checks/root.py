"""The guest's root is what was booted: by the agent's word, or the kernel's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from osbuild.artifacts import DiskImage, Initrd
from osbuild.checks.base import LINE_SECONDS, Session
from osbuild.findings import Unclear, Wrong
from osbuild.report import tail

_CONSOLE_BYTES: Final = 1 << 20  # in which the kernel has said what its root is


def look(session: Session) -> str:
    if not session.logs_as_ours:
        console = tail(session.guest.console, _CONSOLE_BYTES)
        return judge_kernel(session.machine.root, console.decode(errors="replace"))
    fields = session.watcher.message("root mounted", min(LINE_SECONDS, session.left))
    if fields is None:
        raise Unclear("no log line of the agent's on the console says what its root is")
    return judge_root(session.machine.root, fields)


def judge_kernel(root: DiskImage | Initrd, console: str) -> str:
    """The same from what the kernel says: which filesystem, on a disk; of an initramfs, that it starts /init of one."""
    if isinstance(root, Initrd):
        if not re.search(r"\] Run /init as init process", console):
            raise Unclear("the kernel does not say that it starts /init of an initramfs")
        return "initramfs, by the kernel's word"
    found = re.search(r"\] VFS: Mounted root \((\w+) filesystem\)( readonly)? on device (\d+:\d+)", console)
    if found is None:
        raise Unclear("the kernel does not say what it mounted as root")
    said = f"{found[1]} on device {found[3]}, {'read-only' if found[2] else 'writable'}, by the kernel's word"
    if found[1] != root.filesystem:
        raise Wrong(f"the root is not {root.filesystem} but {said}")
    if bool(found[2]) is ("rw" in root.words):
        raise Wrong(f"the root is mounted in the wrong way: {said}")
    return said


def judge_root(root: DiskImage | Initrd, fields: Mapping[str, Any]) -> str:
    """What the guest's root is, when it is what was booted; Wrong otherwise."""
    kind, device = str(fields.get("fstype", "")), str(fields.get("device", ""))
    options = str(fields.get("options", "")).split(",")
    said = f"{kind} on {device} ({','.join(options)})"
    if isinstance(root, Initrd):
        if kind not in ("rootfs", "tmpfs", "ramfs"):
            raise Wrong(f"the root is not the initramfs but {said}")
        return said
    if kind != root.filesystem:
        raise Wrong(f"the root is not {root.filesystem} but {said}")
    wanted = next((word.partition("=")[2] for word in root.words if word.startswith("root=/dev/")), "")
    names = (wanted,) if root.verified else (wanted, "/dev/root")
    if wanted and device.startswith("/dev/") and device not in names:
        raise Wrong(f"the root is not on {wanted} but {said}")
    if "rw" in root.words:
        if "rw" not in options:
            raise Wrong(f"the root cannot be written to: {said}")
    elif "ro" not in options:
        raise Wrong(f"the root can be written to: {said}")
    if root.dax and not root.verified and not {"dax", "dax=always"} & set(options):
        raise Wrong(f"the root is mounted without DAX: {said}")
    return said
