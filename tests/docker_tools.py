"""A Docker daemon of a test's own, and what it left."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def left(home: str) -> list[str]:
    """What a daemon that lived in /tmp/NAME has left on this machine: mounts, control groups, processes, files."""
    name = Path(home).name
    assert name.startswith("osbuilder-docker-")
    mounts = [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if name in line]
    groups = [path for path, _, _ in os.walk("/sys/fs/cgroup") if name in path]
    processes = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended while we looked
            processes += [path.read_text(errors="replace")] if name in path.read_text(errors="replace") else []
    return [*mounts, *groups, *processes, *map(str, Path("/tmp").glob(f"{name}*"))]


@contextlib.contextmanager
def private_docker(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Docker daemon of our own, for as long as `cat` has something to wait for."""
    words = ["scripts/with-docker", "--private", "sh", "-c", 'echo "$OSBUILDER_DOCKER $DOCKER_HOST"; cat']
    with subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        kind, _, host = process.stdout.readline().strip().partition(" ")
        try:
            if kind != "private":
                pytest.skip("a Docker daemon of our own needs root and dockerd")
            monkeypatch.setenv("DOCKER_HOST", host)
            yield host
        finally:
            process.stdin.close()
            assert process.wait(60) == 0
    assert left(host.removeprefix("unix://").removesuffix("/sock")) == []
