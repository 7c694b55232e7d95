"""The least memory that boots: by halves, of guests that are not there and of one that is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from osbuild import least_memory, manifest
from osbuild.artifacts import Kernel
from tests.boot_fixtures import boot_kernel

__all__ = ["boot_kernel"]  # a fixture


@pytest.mark.parametrize("least", [20, 24, 60, 61, 64, 255, 256])
def test_the_least_that_boots_is_found_with_few_boots(least: int) -> None:
    found, tried = least_memory.find(16, 256, lambda memory: memory >= least)
    assert found == -(-least // 4) * 4
    assert len(tried) <= 8
    assert all(one.booted is (one.memory_mib >= least) for one in tried)
    assert [one.booted for one in tried if one.memory_mib == found] == [True, True], "it booted twice"
    assert not any(one.booted for one in tried if one.memory_mib == found - 4)


def test_a_guest_that_never_boots_has_no_least_memory() -> None:
    found, tried = least_memory.find(16, 256, lambda memory: False)
    assert (found, len(tried)) == (0, 1)


def test_what_booted_once_by_luck_is_not_the_answer() -> None:
    times: dict[int, int] = {}

    def boots(memory: int) -> bool:
        times[memory] = times.get(memory, 0) + 1
        return memory >= 100 or (memory == 96 and times[memory] == 1)

    assert least_memory.find(16, 256, boots)[0] == 100


@pytest.mark.boot
@pytest.mark.long
def test_the_manifest_keeps_the_least_memory_of_a_guest(boot_kernel: Kernel, tmp_path: Path) -> None:
    from tests.test_boot_console import build

    out = build(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "osbuild", "smoke", str(out), "--find-min-memory", "--json", "--quiet", "--accel", "tcg",
         "--timeout", "200"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["least_memory_mib"]
    document = json.loads((out / "manifest.json").read_text())
    assert document["outputs"]["initrd.img"]["least_memory_mib"] == found["initrd"]
    assert 32 <= found["initrd"] <= 96
    assert manifest.read(out), "it is still a build"
