"""osbuilder install: the tree is whole whenever the installer is killed."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from osbuild import install
from osbuild.install import HOME, SHARE, roll_back
from osbuild.kata import CURRENT
from tests.installable import check_whole, make_build
from tests.killing import killed
from tests.killing import memory as memory  # a fixture

SLOW = (pytest.mark.long, pytest.mark.timeout(1800))


def installing_killed(seconds: float, out: Path | None, prefix: Path) -> bool:
    """Whether an installation was killed before its end; with no build it is a rollback."""
    return killed(seconds, lambda: install.install(out, prefix) if out else roll_back(prefix))


def killed_at(number: int, out: Path, prefix: Path) -> bool:
    """The same, killed right before a call that changes the disk: the number-th of them."""
    names = (
        "rename",
        "replace",
        "symlink",
        "link",
        "unlink",
        "rmdir",
        "mkdir",
        "pwrite",
        "fsync",
        "chmod",
        "ftruncate",
    )
    child = os.fork()
    if child == 0:
        left = number

        def count(frame: object, event: str, function: Any) -> None:
            nonlocal left
            if event == "c_call" and function.__name__ in names:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        try:
            install.install(out, prefix)
            os._exit(0)
        except BaseException:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status != 0


@pytest.mark.parametrize("step", [9, pytest.param(1, marks=SLOW)], ids=["some of them", "all of them"])
def test_killed_before_a_change_of_the_disk_the_tree_is_whole(memory: Path, step: int) -> None:
    prefix = memory / "opt"
    builds = {mark: make_build(memory / mark, mark) for mark in "ab"}
    for build in builds.values():
        install.install(build, prefix)
    outcomes = []
    for number in range(0, 2000, step):
        now = check_whole(prefix)
        wanted = "ab"[now == "a"]
        hit = killed_at(number, builds[wanted], prefix)
        found = check_whole(prefix)
        assert found in (now, wanted), number
        outcomes.append(found == wanted)
        if not hit:
            break
    else:
        pytest.fail("it never came to its end")
    assert len(outcomes) > 50 // step
    assert set(outcomes[:-1]) == {True, False}, "it was killed before the switch and after it"


def kill_often(times: int, home: Path, seed: int) -> None:
    """Installations over an existing one, killed; after each the tree is one whole version, and the next succeeds."""
    prefix = home / "opt"
    builds = {mark: make_build(home / mark, mark) for mark in "abc"}
    began = time.monotonic()
    install.install(builds["a"], prefix)
    install.install(builds["b"], prefix)
    whole = (time.monotonic() - began) / 2
    choose = random.Random(seed)
    now, done, seen = "b", 0, set()
    while done < times:
        wanted = choose.choice([mark for mark in builds if mark != now])
        hit = installing_killed(choose.uniform(0, 1.2 * whole), builds[wanted], prefix)
        found = check_whole(prefix)
        assert found in ({now, wanted} if hit else {wanted})
        done += hit
        if hit:
            seen.add(found == now)
        now = choose.choice([mark for mark in builds if mark != found])
        install.install(builds[now], prefix)
        assert check_whole(prefix) == now
        left = [name for name in os.listdir(prefix / SHARE / HOME) if name != CURRENT]
        assert len(left) == 2, left
    # Most of the time is spent before the switch; that it is survived is what counts, and that work goes on after it.
    assert True in seen


def test_kills_leave_the_old_tree_or_the_new_one(memory: Path) -> None:
    kill_often(20, memory, seed=8)


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_two_hundred_kills_leave_the_old_tree_or_the_new_one(memory: Path) -> None:
    kill_often(200, memory, seed=88)


def test_a_first_installation_that_is_killed_leaves_nothing_or_all_of_it(memory: Path) -> None:
    out = make_build(memory / "out")
    choose = random.Random(1)
    for number in range(15):
        prefix = memory / str(number)
        installing_killed(choose.uniform(0, 0.12), out, prefix)
        assert check_whole(prefix) in ("", "a")
        install.install(out, prefix)
        assert check_whole(prefix) == "a"
