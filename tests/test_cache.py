"""The cache: made once, verified on every use, kept as long as somebody uses it."""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from osbuild.cache import Cache, NoLocksError, default_cache, set_aside
from osbuild.errors import HostError, Interrupted

CONTEXT = multiprocessing.get_context("forkserver")
NOBODY = 65534


def fill(directory: Path) -> None:
    (directory / "thing").write_bytes(b"made")


def refuse(directory: Path) -> None:
    pytest.fail("made again")


def run(target: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    CONTEXT.set_forkserver_preload(["tests.test_cache"])
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_second_time_nothing_is_made(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    first, had = cache.get("k", "key", fill)
    second, has = cache.get("k", "key", refuse)
    assert (had, has) == (False, True)
    assert first == second
    assert (second / "thing").read_bytes() == b"made"


def _outside(home: Path) -> None:
    elsewhere = home.parent.parent / "elsewhere"
    home.rename(elsewhere)
    home.symlink_to(elsewhere)


def _link_inside(home: Path) -> None:
    (home / "thing").rename(home.parent / "thing")
    (home / "thing").symlink_to(home.parent / "thing")


def _file(home: Path) -> None:
    shutil.rmtree(home)
    home.write_bytes(b"made")


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda home: (home / "thing").write_bytes(b"mads"),
    "a cut": lambda home: (home / "thing").write_bytes(b"mad"),
    "a missing file": lambda home: (home / "thing").unlink(),
    "a link to good bytes": _link_inside,
    "no record": lambda home: (home / "contents.json").unlink(),
    "an empty record": lambda home: (home / "contents.json").write_bytes(b""),
    "a record of another shape": lambda home: (home / "contents.json").write_bytes(b"[1]"),
    "a record that is too deep": lambda home: (home / "contents.json").write_bytes(b"[" * 100_000),
    "a record in no alphabet": lambda home: (home / "contents.json").write_bytes(b"\xff\xfe"),
    "a link to a good entry": _outside,
    "a file": _file,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_set_aside_and_made_again(damage: Callable[[Path], object], tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    home, _ = cache.get("k", "key", fill)
    damage(home)
    assert cache.have("k", "key") is None
    again, had = cache.get("k", "key", fill)
    assert not had
    assert not again.is_symlink()
    assert (again / "thing").read_bytes() == b"made"
    assert any(name.startswith("key.bad-") for name in os.listdir(home.parent))


def test_what_was_made_again_is_not_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    path.write_bytes(b"bad")
    seen = path.lstat()
    path.rename(tmp_path / "aside")
    path.write_bytes(b"good")
    assert set_aside(path, seen) is None
    assert path.read_bytes() == b"good"
    assert set_aside(path, path.lstat()) is not None
    assert not path.exists()


def test_running_out_of_descriptors_is_no_damage(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    home, _ = cache.get("k", "key", fill)
    limited = run(_without_descriptors, tmp_path)
    limited.join(60)
    assert limited.exitcode == 0
    assert os.listdir(home.parent) == ["key"]


def _without_descriptors(root: Path) -> None:
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, lowest))
    try:
        Cache(root=root).have("k", "key")
    except HostError as problem:
        os._exit(0 if "Too many open files" in str(problem) else 8)
    os._exit(9)


@pytest.mark.parametrize("problem", [RuntimeError(), Interrupted(signal.SIGINT)])
def test_a_maker_that_fails_leaves_nothing(problem: BaseException, tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)

    def fail(directory: Path) -> None:
        fill(directory)
        raise problem

    with pytest.raises(type(problem)):
        cache.get("k", "key", fail)
    assert cache.have("k", "key") is None
    assert os.listdir(tmp_path / "v1/k") == []
    assert os.listdir(tmp_path / "v1/locks") == []


def test_what_a_killed_maker_left_is_swept_by_the_next(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    (tmp_path / "v1/k/staging-key-dead").mkdir(parents=True)
    cache.get("k", "key", fill)
    assert os.listdir(tmp_path / "v1/k") == ["key"]


def _race(root: Path, made: Path) -> None:
    def make(directory: Path) -> None:
        with made.open("a") as file:
            file.write("x")
        time.sleep(0.1)
        fill(directory)

    Cache(root=root).get("k", "key", make)


def test_of_several_processes_one_makes_it_and_all_have_it(tmp_path: Path) -> None:
    racers = [run(_race, tmp_path / "c", tmp_path / "made") for _ in range(4)]
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert (tmp_path / "made").read_text() == "x"


def test_when_the_maker_is_killed_another_makes_it(tmp_path: Path) -> None:
    first = run(_race, tmp_path / "c", tmp_path / "made")
    wait_for(tmp_path / "made")
    others = [run(_race, tmp_path / "c", tmp_path / "made") for _ in range(3)]
    first.kill()
    for racer in (first, *others):
        racer.join(60)
    assert [racer.exitcode for racer in others] == [0, 0, 0]
    assert (tmp_path / "made").read_text() == "xx"
    assert os.listdir(tmp_path / "c/v1/k") == ["key"]


def _count(root: Path) -> None:
    cache = Cache(root=root)
    for _ in range(50):
        with cache.lock("one"):
            value = int((root / "number").read_text())
            time.sleep(0)
            (root / "number").write_text(str(value + 1))


def test_a_lock_whose_file_comes_and_goes_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "number").write_text("0")
    counters = [run(_count, tmp_path) for _ in range(4)]
    for counter in counters:
        counter.join(60)
        assert counter.exitcode == 0
    assert (tmp_path / "number").read_text() == "200"
    assert os.listdir(tmp_path / "v1/locks") == []


def test_a_held_lock_is_not_waited_for_if_one_does_not_want_to(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    with cache.lock("one"), pytest.raises(BlockingIOError), cache.lock("one", wait=False):
        pass
    with cache.lock("one", wait=False):
        pass


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    (tmp_path / "v1/locks").mkdir(parents=True)
    (tmp_path / "v1/locks/one").symlink_to(tmp_path / "mine")
    with pytest.raises(OSError), cache.lock("one"):
        pass
    assert not (tmp_path / "mine").exists()


def test_using_an_entry_is_recorded(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    home, _ = cache.get("k", "key", fill)
    os.utime(home, (1, 1))
    assert cache.have("k", "key") == home
    assert time.time() - home.stat().st_mtime < 60


def test_a_cache_that_cannot_be_made_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(HostError) as caught:
        Cache(root=tmp_path / "file").get("k", "key", fill)
    assert "OSBUILDER_CACHE" in caught.value.hint


def test_a_full_disk_is_named_and_what_was_there_stays(tmp_path: Path) -> None:
    Cache(root=tmp_path).get("k", "key", fill)
    limited = run(_limited, tmp_path)
    limited.join(60)
    assert limited.exitcode == 0
    assert Cache(root=tmp_path).have("k", "key") is not None
    assert os.listdir(tmp_path / "v1/k") == ["key"]


def _fill_much(directory: Path) -> None:
    (directory / "thing").write_bytes(bytes(2000))


def _limited(root: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    try:
        Cache(root=root).get("k", "large", _fill_much)
    except HostError as problem:
        os._exit(0 if str(root) in str(problem) and "OSBUILDER_CACHE" in problem.hint else 8)
    os._exit(9)


def _as_nobody(root: Path) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    cache = Cache(root=root)
    assert cache.get("k", "key", refuse)[1]
    assert cache.scratch("logs") == root / "v1/logs"
    try:
        cache.get("k", "new", fill)
    except HostError as problem:
        os._exit(0 if "OSBUILDER_CACHE" in problem.hint else 8)
    os._exit(9)


def test_a_cache_that_others_own_gives_what_it_has() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root becomes somebody else")
    with tempfile.TemporaryDirectory() as name:  # pytest's own directories are root's alone
        root = Path(name)
        root.chmod(0o755)
        Cache(root=root).get("k", "key", fill)
        Cache(root=root).scratch("logs")
        nobody = run(_as_nobody, root)
        nobody.join(60)
        assert nobody.exitcode == 0


FIND = """
import sys
from pathlib import Path
from osbuild.cache import Cache
cache = Cache(root=Path(sys.argv[1]))
assert cache.have("k", "key") is not None
cache.scratch("logs")
cache.get("k", "other", lambda directory: None)
"""


def test_without_locks_entries_are_found_and_none_is_made(tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    Cache(root=tmp_path).get("k", "key", fill)
    words = ["-f", "-qq", "-o", "/dev/null", "-e", "trace=flock", "-e", "inject=flock:error=ENOLCK"]
    argv = ["strace", *words, sys.executable, "-c", FIND, str(tmp_path)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert ended.stderr.strip().splitlines()[-1].startswith(f"{NoLocksError.__module__}.{NoLocksError.__name__}: ")
    assert os.listdir(tmp_path / "v1/k") == ["key"]


def test_the_setting_moves_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSBUILDER_CACHE", str(tmp_path))
    assert default_cache().root == tmp_path
    monkeypatch.delenv("OSBUILDER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache().root == tmp_path / "x" / "osbuilder"


def test_without_any_setting_the_home_of_the_user_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OSBUILDER_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert default_cache().root == Path("~/.cache/osbuilder").expanduser()  # which asks the password file then
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 5)
    with pytest.raises(HostError) as caught:
        default_cache()
    assert str(caught.value) == "there is no home directory for the cache"
    assert caught.value.hint == "name a directory with --cache-dir DIR or OSBUILDER_CACHE"
