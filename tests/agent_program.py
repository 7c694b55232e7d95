"""The agent's program as tests need it: under sanitizers, and in a small root with a busybox."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import osbuild
from osbuild import command
from osbuild.agent import install_init, read_agent
from osbuild.artifacts import File, Rootfs
from osbuild.resources import resource
from osbuild.tree import regular, symlink
from tests.boot_fixtures import skeleton

SANITIZERS: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
BUSYBOX: Final = Path("/usr/bin/busybox")  # Debian's busybox-static


def compile_agent(out: Path, *flags: str) -> Path:
    """All of agent/*.c by the host's gcc, for debugging."""
    sources = sorted(str(path) for path in resource("agent").glob("*.c"))
    version = f'-DAGENT_VERSION="{osbuild.__version__}"'
    command.run(
        "gcc", "-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", version, *flags, *sources, "-o", str(out)
    )
    return out


def busybox_root(agent: File) -> Rootfs:
    """The agent as init, and a static busybox under the name of each of its applets."""
    draft = skeleton()
    draft.put("/bin/busybox", regular(BUSYBOX.read_bytes(), 0o755))
    for applet in subprocess.run([BUSYBOX, "--list"], check=True, capture_output=True, text=True).stdout.split():
        if applet not in ("busybox", "init"):
            draft.put(f"/bin/{applet}", symlink("busybox"))
    draft.put("/etc/passwd", regular(b"root:x:0:0:root:/:/bin/sh\n", 0o644))
    found = read_agent(agent)
    install_init(draft, found, now=0)
    return Rootfs(tree=draft.tree(), init="/sbin/init", epoch=0, agent=str(found), agent_sha256=found.sha256)
