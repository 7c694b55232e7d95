"""The cache: made once, verified on every use."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from osbuild.cache import Cache, default_cache
from osbuild.errors import HostError


def fill(directory: Path) -> None:
    (directory / "thing").write_bytes(b"made")


def test_the_second_time_nothing_is_made(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    first, had = cache.get("k", "key", fill)
    second, has = cache.get("k", "key", lambda _: pytest.fail("made again"))
    assert (had, has) == (False, True)
    assert first == second
    assert (second / "thing").read_bytes() == b"made"


@pytest.mark.parametrize("damage", ["a flipped bit", "a cut", "a missing file", "no record"])
def test_a_damaged_entry_is_set_aside_and_made_again(damage: str, tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    home, _ = cache.get("k", "key", fill)
    match damage:
        case "a flipped bit":
            (home / "thing").write_bytes(b"mads")
        case "a cut":
            (home / "thing").write_bytes(b"mad")
        case "a missing file":
            (home / "thing").unlink()
        case _:
            (home / "contents.json").unlink()
    again, had = cache.get("k", "key", fill)
    assert not had
    assert (again / "thing").read_bytes() == b"made"
    assert any(".bad-" in name for name in os.listdir(home.parent))


def test_a_maker_that_fails_leaves_nothing(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)

    def fail(directory: Path) -> None:
        fill(directory)
        raise RuntimeError

    with pytest.raises(RuntimeError):
        cache.get("k", "key", fail)
    assert cache.have("k", "key") is None
    assert os.listdir(tmp_path / "v1/k") == []


def test_what_a_killed_maker_left_is_swept_by_the_next(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    (tmp_path / "v1/k/staging-key-dead").mkdir(parents=True)
    cache.get("k", "key", fill)
    assert os.listdir(tmp_path / "v1/k") == ["key"]


def _race(root: Path, made: Path) -> None:
    def make(directory: Path) -> None:
        with made.open("a") as file:
            file.write("x")
        fill(directory)

    Cache(root=root).get("k", "key", make)


def test_of_several_processes_one_makes_it_and_all_have_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    racers = [context.Process(target=_race, args=(tmp_path / "c", tmp_path / "made")) for _ in range(4)]
    for racer in racers:
        racer.start()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert (tmp_path / "made").read_text() == "x"


def test_a_cache_that_cannot_be_made_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HostError) as caught:
        Cache(root=tmp_path / "file").get("k", "key", fill)
    assert "OSBUILDER_CACHE" in caught.value.hint


def test_the_setting_moves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSBUILDER_CACHE", str(tmp_path))
    assert default_cache().root == tmp_path
    monkeypatch.delenv("OSBUILDER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache().root == tmp_path / "x" / "osbuilder"
