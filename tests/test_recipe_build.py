"""Recipes for real: Debian, built by a Docker daemon of our own that leaves nothing; and the script that starts it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from osbuild import recipe
from osbuild.arch import X86_64
from osbuild.cache import Cache
from osbuild.console import Show
from osbuild.errors import CommandError
from osbuild.recipe import RECIPES, render
from osbuild.tree import Tree
from tests.docker_tools import ROOT, left, private_docker
from tests.layer_tools import opened


def build(name: str = "debian", *, fresh: bool = False, **wishes: Any) -> str:
    return recipe.build(render(name, **wishes), show=Show(quiet=True), fresh=fresh)


def installed(tree: Tree) -> set[str]:
    """The packages that dpkg's own database calls installed."""
    text = b"".join(tree["/var/lib/dpkg/status"].content.chunks()).decode()
    paragraphs = [paragraph for paragraph in text.split("\n\n") if "Status: install ok installed" in paragraph]
    return {found[1] for paragraph in paragraphs if (found := re.search(r"^Package: (.+)$", paragraph, re.MULTILINE))}


def contents(tree: Tree) -> dict[str, tuple[int, int, int, str, bytes]]:
    return {
        path: (entry.mode, entry.uid, entry.gid, entry.target, b"".join(entry.content.chunks()))
        for path, entry in tree.items()
    }


@pytest.mark.slow
def test_debian_is_built_twice_alike_from_a_base_of_this_machine_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(root=tmp_path / "cache")
    monkeypatch.setenv("no_proxy", "nobody.example")
    with private_docker(monkeypatch):
        made = subprocess.run(["scripts/base-image", "debian", tmp_path / "base"], cwd=ROOT, check=False)
        if made.returncode != 0:
            pytest.skip("no Debian base: mmdebstrap, or Debian's packages, are missing")
        reference = "docker-daemon:osbuilder-demo/debian:latest"
        base = opened(reference, X86_64, cache=cache).tree
        # The archive's own address, from the base: the mirror's road is tried where it certainly leads somewhere.
        source = b"".join(base["/etc/apt/sources.list"].content.chunks()).decode().split()
        first = opened(build(init="systemd", base=reference, packages=["jq"]), X86_64, cache=cache)
        again = opened(build(init="systemd", base=reference, packages=["jq"], fresh=True), X86_64, cache=cache)
        mirrored = opened(build(base=reference, mirror=source[1]), X86_64, cache=cache)
        wrong = {}
        for name in RECIPES:  # the daemon parses a Dockerfile to its end before it looks for the base
            with pytest.raises(CommandError) as caught:
                build(name, base="localhost:1/none")
            wrong[name] = str(caught.value)

    assert {"chrony", "dbus", "e2fsprogs", "iptables", "jq", "kmod", "systemd", "systemd-sysv"} <= installed(first.tree)
    assert {"e2fsprogs", "iptables", "kmod"} <= installed(mirrored.tree)
    assert not {"chrony", "dbus", "jq"} & installed(mirrored.tree)
    for path in ("/usr/sbin/chronyd", "/usr/bin/dbus-daemon", "/lib/systemd/systemd", "/usr/sbin/iptables-restore"):
        assert any(there.endswith(path) for there in first.tree), path
    assert contents(first.tree) == contents(again.tree)
    litter = re.compile(
        r"/var/lib/apt/lists/.|/var/cache/apt/.|/tmp/.|.*/policy-rc\.d|/usr/share/man/.*jq|.*/machine-id$"
    )
    added = (set(first.tree) | set(mirrored.tree)) - set(base)
    assert [path for path in sorted(added) if litter.match(path)] == []
    assert not [path for path, entry in first.tree.items() if path.startswith("/var/log/") and entry.is_file]
    assert "nobody.example" not in json.dumps(first.config.document)
    assert set(wrong) == set(RECIPES)
    assert all(text.startswith("cannot have the base localhost:1/none:latest: ") for text in wrong.values())


@pytest.mark.slow
def test_with_docker_takes_the_daemon_that_answers_and_gives_back_the_commands_own_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with private_docker(monkeypatch) as host:
        words = ["scripts/with-docker", "sh", "-c", 'echo "$OSBUILDER_DOCKER $DOCKER_HOST"; exit 7']
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (7, f"here {host}\n")


def test_with_docker_runs_the_command_without_one_where_none_can_be_had(tmp_path: Path) -> None:
    broken = tmp_path / "dockerd"
    broken.write_text(f"#!/bin/sh\necho $2 >{tmp_path}/host\necho no daemon today >&2\nexit 1\n")
    broken.chmod(0o755)
    words = ["scripts/with-docker", "sh", "-c", 'echo "$OSBUILDER_DOCKER"; exit 7']
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DOCKER_HOST": "unix:///nonexistent"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "none\n")
    if os.getuid() == 0:
        assert "dockerd did not start: no daemon today" in done.stderr
        assert left((tmp_path / "host").read_text().strip().removeprefix("unix://").removesuffix("/sock")) == []
