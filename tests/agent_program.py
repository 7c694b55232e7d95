"""The agent's program as tests need it: under sanitizers, and in a small root with a busybox."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest

import osbuild
import osbuild.agent as agent_module
from osbuild import command
from osbuild.agent import NAME, install_init, read_agent
from osbuild.artifacts import File, Rootfs
from osbuild.cache import default_cache
from osbuild.resources import resource
from osbuild.tree import regular, symlink
from tests.boot_fixtures import skeleton

SANITIZERS: Final = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
BUSYBOX: Final = Path("/usr/bin/busybox")  # Debian's busybox-static


_FLAGS: Final = ("-std=c11", "-O1", "-g", "-Wall", "-Wextra", "-Werror")


def compile_agent(*flags: str) -> Path:
    """All of agent/*.c by the host's gcc, for debugging; kept in the cache, for under sanitizers it takes a minute."""
    directory = resource("agent")
    gcc = command.run("gcc", "--version").output
    units = sorted(directory.glob("*.c"))
    wanted = (*_FLAGS, f'-DAGENT_VERSION="{osbuild.__version__}"', *flags)
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (*units, *directory.glob("*.h"))}
    key = hashlib.sha256(json.dumps([gcc, wanted, files], sort_keys=True).encode()).hexdigest()

    def make(out: Path) -> None:
        def compile_unit(path: Path) -> str:
            command.run("gcc", *wanted, "-c", str(path), "-o", str(out / f"{path.stem}.o"))
            return f"{path.stem}.o"

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_unit, units))
        command.run("gcc", *wanted, *objects, "-o", NAME, cwd=out)
        for name in objects:
            (out / name).unlink()

    home, _ = default_cache().get("agent", key, make)
    return home / NAME


def toy_agent(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """From now on the agent's sources are one file that compiles at once; returned is the file."""
    home.mkdir()
    source = home / "main.c"
    source.write_text(
        'static const char marker[] = "osbuilder-agent version=" AGENT_VERSION ";";\n'
        "int main(int argc, char **argv) { return argv[argc - 1][0] == marker[argc]; }\n"
    )
    monkeypatch.setattr(agent_module, "resource", lambda name: home)
    return source


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
