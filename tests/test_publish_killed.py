"""osbuilder publish and pull: whenever they are killed, the tag and the directory are one whole build, and signed."""

from __future__ import annotations

import functools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from osbuild.artifacts import File
from tests.keys import make_key
from tests.killing import killed
from tests.killing import memory as memory  # a fixture
from tests.published import check_same, get, make, put
from tests.test_distribution import _surroundings as _surroundings  # a fixture
from tests.test_registry import start_registry


@pytest.fixture
def debian(memory: Path) -> Iterator[str]:
    (memory / "registry").mkdir()
    yield from start_registry(memory / "registry", login=False)


def mark_of(out: Path, builds: dict[str, Path]) -> str:
    """Which build that directory holds, every file of it."""
    found = File.of(out / "manifest.json").sha256
    (mark,) = [mark for mark, build in builds.items() if File.of(build / "manifest.json").sha256 == found]
    check_same(builds[mark], out)
    return mark


def kill_publications(times: int, address: str, home: Path, seed: int) -> None:
    """Each is signed, and what the tag names is verified each time."""
    pytest.importorskip("cryptography")
    key = make_key(home / "key.pem")
    builds = {mark: make(home / mark, mark, data=1) for mark in "ab"}
    sign = functools.partial(put, address, sign=key)
    fetch = functools.partial(get, address, home / "out", home / "cache", key=key.with_suffix(".pub"))
    began = time.monotonic()
    sign(builds["a"])
    whole = time.monotonic() - began
    choose = random.Random(seed)
    now, done, number = "a", 0, 0
    while done < times:
        number += 1
        wanted = f"n{number}"
        builds[wanted] = make(home / wanted, wanted, data=1)
        hit = killed(choose.uniform(0, whole), functools.partial(sign, builds[wanted]))
        fetch()
        found = mark_of(home / "out", builds)
        assert found in ({now, wanted} if hit else {wanted})
        done += hit
        sign(builds[wanted])
        now = wanted
        fetch()
        assert mark_of(home / "out", builds) == now
    assert number < 10 * times


def kill_pulls(times: int, address: str, home: Path, seed: int) -> None:
    builds = {mark: make(home / mark, mark, data=1) for mark in "ab"}
    for mark, build in builds.items():
        put(address, build, name=f"guests/{mark}:1")
    out = home / "out/here"
    began = time.monotonic()
    get(address, out, home / "cache", name="guests/a:1")
    whole = time.monotonic() - began
    choose = random.Random(seed)
    now, done, tried = "a", 0, 0
    while done < times:
        tried += 1
        wanted = "ab"[now == "a"]
        cache = home / f"cache-{choose.randrange(3)}"
        act = functools.partial(get, address, out, cache, name=f"guests/{wanted}:1")
        hit = killed(choose.uniform(0, 1.2 * whole), act)
        now = mark_of(out, builds)
        assert now in {"a", "b"} if hit else now == wanted
        done += hit
        if hit and tried % 3 == 0:
            act()
            now = mark_of(out, builds)
            assert now == wanted
            assert os.listdir(out.parent) == [out.name], "nothing is left beside it"
    assert tried < 10 * times


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_dozen_killed_publications_leave_the_tag_at_one_whole_build(debian: str, memory: Path) -> None:
    kill_publications(12, debian, memory, seed=8)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_dozen_killed_pulls_leave_one_whole_build(debian: str, memory: Path) -> None:
    kill_pulls(12, debian, memory, seed=9)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_killed_publications_leave_the_tag_at_one_whole_build(debian: str, memory: Path) -> None:
    kill_publications(100, debian, memory, seed=88)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_hundred_killed_pulls_leave_one_whole_build(debian: str, memory: Path) -> None:
    kill_pulls(100, debian, memory, seed=99)
