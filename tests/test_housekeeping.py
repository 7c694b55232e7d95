"""What is in the cache is listed; what is bad is found; what goes is ours, old and unused."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from osbuild import housekeeping
from osbuild.blobs import Blobs
from osbuild.cache import Cache, NoLocksError, flock
from osbuild.errors import HostError, SpecError
from osbuild.housekeeping import KINDS, CacheItem, prune, survey, verify
from osbuild.oci import Descriptor

CONTEXT = multiprocessing.get_context("forkserver")
KEY = "a" * 64
OTHER = "b" * 64
DAY = 86400


def run(target: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    CONTEXT.set_forkserver_preload(["tests.test_housekeeping"])
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def fill(directory: Path) -> None:
    (directory / "thing").write_bytes(bytes(10_000))


def blob(cache: Cache, data: bytes) -> Path:
    hexed = hashlib.sha256(data).hexdigest()
    wanted = Descriptor(media_type="x", digest=f"sha256:{hexed}", size=len(data), annotations={})
    with Blobs(cache=cache).open(wanted, lambda offset: (offset, iter([data[offset:]])), "here"):
        pass
    return cache.root / "v1/blobs/sha256" / hexed


def age(path: Path, days: float) -> Path:
    then = time.time() - days * DAY
    os.utime(path, (then, then), follow_symlinks=False)
    return path


def _populate(root: Path) -> None:
    """In a process of its own: what it uses, it keeps until it ends."""
    cache = Cache(root=root)
    for kind in housekeeping.ENTRIES:
        cache.get(kind, KEY, fill)
    blob(cache, bytes(20_000))
    Blobs(cache=cache).remember("docker://h/r:t", f"sha256:{KEY}")
    (cache.scratch("ccache") / "0").mkdir()
    (cache.scratch("logs") / "kernel-aaaa.log").write_text("log")
    (cache.scratch("accel") / f"{'c' * 32}.json").write_text("{}")
    (cache.scratch("kernel-build") / "steps-x86_64").write_text("7")
    source = cache.scratch("kernel-source") / KEY
    source.mkdir()
    (source / "Makefile").write_text("x")
    patched = source.with_name(f"{KEY}-{'d' * 16}")
    patched.mkdir()
    (patched / "Makefile").hardlink_to(source / "Makefile")
    (source.parent / f"{'e' * 16}.json").write_text("{}")
    _base_image(root / "images/debian-1")


def _base_image(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "manifest.json").write_text('[{"RepoTags": ["osbuilder-demo/debian:latest"]}]')


def _leave(root: Path) -> None:
    """What runs leave that were killed, and what was damaged."""
    home = root / "v1"
    for name in (
        f"kernel/staging-{KEY}-x1_y2z3w", f"agent/{KEY}.bad-0123abcd", f"kernel-build/{OTHER}",
        "kernel-build/config-77", f"kernel-source/staging-{OTHER}", f"kernel-source/{OTHER}.gone-0123abcd",
        "ccache.gone-0123abcd",
    ):  # fmt: skip
        (home / name).mkdir()
        (home / name / "0").write_bytes(b"left")
    (home / f"blobs/sha256/{OTHER}.bad-0123abcd").write_bytes(b"bad")
    (home / f"blobs/sha256/{KEY}.bad-0123abcd").symlink_to("/etc/passwd")
    (home / f"partial/{OTHER}").write_bytes(b"half")
    (home / f"locks/kernel-{OTHER}").write_bytes(b"")
    (home / "logs/kernel-config-77.log").write_text("one for each process, once")
    (root / "images/.making-x1Y2z3").mkdir()


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """One of everything, used by nobody."""
    filler = run(_populate, tmp_path / "c")
    filler.join(60)
    assert filler.exitcode == 0
    _leave(tmp_path / "c")
    return Cache(root=tmp_path / "c")


def kinds(items: list[CacheItem] | tuple[CacheItem, ...]) -> dict[str, int]:
    return {kind: sum(item.kind == kind for item in items) for kind in sorted({item.kind for item in items})}


LEFT = {"damaged": 3, "leftover": 8, "lock": 1}
FRESH = {"agent": 1, "base-image": 1, "blob": 1, "kernel": 1, "log": 2, "partial": 1, "probe": 1, "tag": 1, "tree": 1}
SCRATCH = {"scratch": 5}


# --- ls


def test_everything_in_the_cache_is_listed(cache: Cache) -> None:
    items = survey(cache)
    assert kinds(items) == dict(sorted((LEFT | FRESH | SCRATCH).items()))
    assert not any(item.in_use for item in items)
    assert all(abs(item.used - time.time()) < 60 for item in items)
    assert {item.key for item in items if item.kind in ("kernel", "agent", "tree")} == {KEY}
    assert json.loads(json.dumps([item.to_dict() for item in items]))[0]["kind"] in KINDS
    assert set(kinds(items)) == KINDS


def test_sizes_are_what_du_says(cache: Cache) -> None:
    home = cache.root / "v1"
    for item in survey(cache):
        if item.kind in ("kernel", "blob") or item.key == "ccache":
            said = subprocess.run(["du", "-s", "-B1", str(item.path)], capture_output=True, text=True, check=True)
            assert item.size == int(said.stdout.split()[0])
    # Two trees that share a file: together they are what du counts for both.
    trees = [item for item in survey(cache) if item.path.parent == home / "kernel-source" and item.path.is_dir()]
    both = [item for item in trees if item.kind == "scratch"]
    assert len(both) == 2
    said = subprocess.run(
        ["du", "-c", "-s", "-B1", *(str(item.path) for item in both)], capture_output=True, text=True, check=True
    )
    assert sum(item.size for item in both) == int(said.stdout.splitlines()[-1].split()[0])


def test_a_cache_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert survey(Cache(root=tmp_path / "none")) == []
    assert verify(Cache(root=tmp_path / "none")) == []
    assert prune(Cache(root=tmp_path / "none"), everything=True).removed == ()
    assert not (tmp_path / "none").exists()


def test_what_other_versions_left_is_listed_and_stays(cache: Cache) -> None:
    (cache.root / f"v2/kernel/{KEY}").mkdir(parents=True)
    (cache.root / "v1/future").mkdir()
    strange = [item.key for item in survey(cache) if item.kind == "unknown"]
    assert strange == ["future", "v2"]
    prune(cache, everything=True)
    assert [item.key for item in survey(cache) if item.kind == "unknown"] == ["future", "v2"]
    assert (cache.root / f"v2/kernel/{KEY}").is_dir()


def test_all_that_the_program_keeps_has_a_row() -> None:
    text = "\n".join(path.read_text() for path in Path(housekeeping.__file__).parent.rglob("*.py"))
    made = set(re.findall(r"cache\.(?:get|have)\(\s*\"([a-z-]+)\"", text))
    assert {"kernel", "agent"} <= made <= set(housekeeping.ENTRIES)
    scratch = set(re.findall(r"cache\.scratch\(\s*\"([a-z-]+)\"", text))
    known = {row.directory for row in housekeeping._ROWS} | {"ccache"}
    assert {"ccache", "kernel-source"} <= scratch <= known


def test_things_have_the_names_that_people_gave_them(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    layer, config = blob(cache, b"layer"), blob(cache, b"{}")
    manifest = {"config": {"digest": f"sha256:{config.name}"}, "layers": [{"digest": f"sha256:{layer.name}"}]}
    made = blob(cache, json.dumps(manifest).encode())
    index = blob(cache, json.dumps({"manifests": [{"digest": f"sha256:{made.name}"}, 7]}).encode())
    lost, odd = blob(cache, b"of nobody"), blob(cache, b'{"layers": 7, "config": [], "manifests": {}}')
    Blobs(cache=cache).remember("docker.io/library/debian:12", f"sha256:{index.name}")
    Blobs(cache=cache).remember("h/odd:1", f"sha256:{odd.name}")

    def agent(out: Path) -> None:
        (out / "osbuilder-agent").write_bytes(b"osbuilder-agent version=1.2.3;")

    def kernel(out: Path) -> None:
        (out / "kernel.json").write_text('{"release": "6.12.9", "arch": "x86_64"}')

    home, _ = cache.get("agent", KEY, agent)
    cache.get("kernel", KEY, kernel)
    cache.get("kernel", OTHER, fill)
    named = {item.path: item.about for item in survey(cache)}
    image = "docker.io/library/debian:12"
    assert named[index] == f"index of {image}"
    assert named[made] == f"manifest of {image}"
    assert named[config] == f"configuration of {image}"
    assert named[layer] == f"layer 1 of {image}"
    assert named[lost] == "of no name that is known"
    assert named[home] == "osbuilder-agent 1.2.3"
    assert named[tmp_path / "v1/kernel" / KEY] == "Linux 6.12.9, x86_64"
    assert named[tmp_path / "v1/kernel" / OTHER] == ""
    assert {item.about for item in survey(cache) if item.kind == "tag"} == {image, "h/odd:1"}


def test_base_images_alone_are_a_cache_and_go_when_nobody_copies_them(tmp_path: Path) -> None:
    image = tmp_path / "images/debian-1"
    _base_image(image)
    assert kinds(survey(Cache(root=tmp_path))) == {"base-image": 1}
    copying = os.open(image, os.O_RDONLY)
    try:
        assert flock(copying, fcntl.LOCK_SH)
        assert kinds(prune(Cache(root=tmp_path), everything=True).in_use) == {"base-image": 1}
    finally:
        os.close(copying)
    assert kinds(prune(Cache(root=tmp_path), kinds=frozenset({"base-image"}), keep_days=0).removed) == {"base-image": 1}
    assert os.listdir(tmp_path / "images") == []


# --- verify


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


def _to_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _to_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("where", "damage"),
    [
        ("blobs/sha256", _flip), ("blobs/sha256", _to_link), ("blobs/sha256", _to_directory),
        ("kernel", lambda path: _flip(path / "thing")), ("kernel", _to_link),
        ("agent", lambda path: (path / "contents.json").unlink()), ("tags", _flip), ("tags", _to_directory),
    ],
)  # fmt: skip
def test_what_is_damaged_is_found_and_set_aside(where: str, damage: Callable[[Path], None], cache: Cache) -> None:
    assert [checked.problem for checked in verify(cache)] == [""] * 6
    (path,) = (item.path for item in survey(cache) if item.path.parent == cache.root / "v1" / where
               and item.kind in ("blob", "tag", *housekeeping.ENTRIES))  # fmt: skip
    damage(path)
    (bad,) = (checked for checked in verify(cache) if checked.problem)
    assert bad.key == path.name
    assert bad.moved_to is not None
    assert bad.moved_to.is_symlink() or bad.moved_to.exists()
    assert json.dumps(bad.to_dict())
    assert not any(checked.problem for checked in verify(cache))
    assert len(prune(cache, kinds=frozenset({"damaged"})).removed) == LEFT["damaged"] + 1
    assert not bad.moved_to.is_symlink()
    assert not bad.moved_to.exists()


def test_verifying_is_no_use(cache: Cache) -> None:
    (path,) = (item.path for item in survey(cache) if item.kind == "kernel")
    age(path, 9)
    verify(cache)
    assert time.time() - path.stat().st_mtime > 8 * DAY


# --- prune


def test_pruning_takes_what_killed_runs_left_and_nothing_that_is_fresh(cache: Cache) -> None:
    pruned = prune(cache)
    assert kinds(pruned.removed) == LEFT
    assert (pruned.in_use, pruned.failed) == ((), ())
    assert kinds(survey(cache)) == dict(sorted((FRESH | SCRATCH).items()))
    assert Path("/etc/passwd").exists()


def test_a_dry_run_says_what_would_go_and_removes_nothing(cache: Cache) -> None:
    before = sorted(str(path) for path in cache.root.rglob("*"))
    dry = prune(cache, keep_days=0, dry_run=True)
    assert sorted(str(path) for path in cache.root.rglob("*")) == before
    wet = prune(cache, keep_days=0)
    assert [item.path for item in dry.removed] == [item.path for item in wet.removed]
    assert dry.size == wet.size > 0
    assert json.dumps(dry.to_dict()) != json.dumps(wet.to_dict())


def test_what_was_not_used_for_long_goes(cache: Cache) -> None:
    for item in survey(cache):
        if item.kind in ("kernel", "blob"):
            age(item.path, 31)
        if item.kind in ("agent", "tree"):
            age(item.path, 29)
        if item.kind == "partial":
            age(item.path, 1.1)
    assert kinds(prune(cache).removed) == dict(sorted((LEFT | {"kernel": 1, "blob": 1, "partial": 1}).items()))
    assert kinds(prune(cache, keep_days=28).removed) == {"agent": 1, "tree": 1}


def test_without_a_limit_on_days_only_leftovers_go(cache: Cache) -> None:
    for item in survey(cache):
        age(item.path, 1000)
    assert kinds(prune(cache, keep_days=None).removed) == LEFT


def test_beyond_the_most_bytes_the_longest_unused_go_first(cache: Cache) -> None:
    prune(cache)
    paths = {item.kind: age(item.path, days / 100) for days, item in enumerate(survey(cache)) if item.kind in FRESH}
    age(paths["tree"], 20)
    age(paths["kernel"], 19)
    sizes = {item.kind: item.size for item in survey(cache)}
    total = sum(item.size for item in survey(cache) if item.kind != "scratch")
    assert prune(cache, most_bytes=total).removed == ()
    assert kinds(prune(cache, most_bytes=total - 1).removed) == {"tree": 1}
    assert kinds(prune(cache, most_bytes=total - sizes["tree"] - sizes["kernel"]).removed) == {"kernel": 1}
    assert kinds(prune(cache, most_bytes=0).in_use) == {}
    assert set(kinds(survey(cache))) == {"scratch"}


def test_scratch_goes_only_when_it_is_meant(cache: Cache) -> None:
    for item in survey(cache):
        age(item.path, 1000)
        age(item.path.parent, 1000)
    prune(cache, keep_days=0)
    assert kinds(survey(cache)) == SCRATCH
    assert kinds(prune(cache, kinds=frozenset({"scratch"})).removed) == SCRATCH


def test_everything_is_everything_that_is_ours(cache: Cache) -> None:
    assert kinds(prune(cache, everything=True).removed) == dict(sorted((LEFT | FRESH | SCRATCH).items()))
    assert survey(cache) == []
    assert not [path for path in cache.root.rglob("*") if not path.is_dir()]


def test_everything_of_one_kind_is_only_that(cache: Cache) -> None:
    assert kinds(prune(cache, everything=True, kinds=frozenset({"blob"})).removed) == {"blob": 1}


@pytest.mark.parametrize(
    ("days", "most", "only"), [(-1.0, None, None), (float("nan"), None, None), (1.0, -1, None), (1.0, 0, "kernels")]
)
def test_nonsense_is_refused(days: float, most: int | None, only: str | None, cache: Cache) -> None:
    with pytest.raises(SpecError):
        prune(cache, keep_days=days, most_bytes=most, kinds=None if only is None else frozenset({only}))
    assert kinds(survey(cache)) == dict(sorted((LEFT | FRESH | SCRATCH).items()))


# --- In use


def _use(root: Path, ready: Path) -> None:
    cache = Cache(root=root)
    assert cache.have("kernel", KEY)
    cache.scratch("kernel-source")
    cache.scratch("kernel-build")
    cache.scratch("ccache")
    cache.get("agent", OTHER, fill)

    def make(directory: Path) -> None:
        fill(directory)
        (root / f"v1/kernel-build/{OTHER}/thing").write_bytes(b"object")
        ready.touch()
        time.sleep(60)

    cache.get("kernel", OTHER, make)


@pytest.fixture
def user(cache: Cache, tmp_path: Path) -> Iterator[multiprocessing.process.BaseProcess]:
    """A process that uses one kernel and makes another, and has made an agent."""
    process = run(_use, cache.root, tmp_path / "ready")
    wait_for(tmp_path / "ready")
    yield process
    process.kill()
    process.join(60)


def test_what_a_process_uses_or_makes_stays(cache: Cache, user: multiprocessing.process.BaseProcess) -> None:
    home = cache.root / "v1"
    (staging,) = home.glob(f"kernel/staging-{OTHER}-*")
    used = {
        *(home / "kernel-source").iterdir(), *(home / "kernel-build").iterdir(), home / "ccache",
        home / "kernel" / KEY, home / "agent" / OTHER, staging, home / "locks" / f"kernel-{OTHER}",
    }  # fmt: skip
    assert {item.path for item in survey(cache) if item.in_use} == used
    dry = prune(cache, everything=True, dry_run=True)
    wet = prune(cache, everything=True)
    assert {item.path for item in wet.in_use} == {item.path for item in dry.in_use} == used
    assert {item.path for item in survey(cache)} == used
    assert wet.failed == ()
    user.kill()
    user.join(60)
    assert {item.path for item in prune(cache, everything=True).removed} == used
    assert survey(cache) == []


def test_what_is_in_use_is_not_taken_for_its_bytes(cache: Cache, user: multiprocessing.process.BaseProcess) -> None:
    pruned = prune(cache, keep_days=None, most_bytes=0)
    assert "kernel" in kinds(pruned.in_use)
    assert (cache.root / f"v1/kernel/{KEY}/thing").exists()


def _fetch_slowly(root: Path, ready: Path) -> None:
    data = b"x" * 1000

    def fetch(offset: int) -> tuple[int, Iterator[bytes]]:
        def pieces() -> Iterator[bytes]:
            yield data[:10]
            ready.touch()
            time.sleep(60)

        return offset, pieces()

    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    wanted = Descriptor(media_type="x", digest=digest, size=1000, annotations={})
    with Blobs(cache=Cache(root=root)).open(wanted, fetch, "here"):
        pass


def test_a_blob_that_is_being_fetched_stays(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path / "c")
    fetcher = run(_fetch_slowly, cache.root, tmp_path / "ready")
    try:
        wait_for(tmp_path / "ready")
        assert kinds(prune(cache, everything=True).in_use) == {"lock": 1, "partial": 1}
    finally:
        fetcher.kill()
        fetcher.join(60)
    assert kinds(survey(cache)) == {"lock": 1, "partial": 1}
    assert kinds(prune(cache, everything=True).removed) == {"lock": 1, "partial": 1}


def _make_again_and_again(root: Path, until: float) -> None:
    cache = Cache(root=root)
    data = bytes(50_000)
    while time.time() < until:
        number = os.urandom(1).hex() + "0" * 62
        home, _ = cache.get("kernel", number, fill)
        assert (home / "thing").read_bytes() == bytes(10_000)  # we hold it until we end
        blob(cache, data)
        with cache.lock("kernel-" + KEY):
            pass
    os._exit(0)


def test_pruning_while_others_work_disturbs_nobody(tmp_path: Path) -> None:
    cache = Cache(root=tmp_path)
    workers = [run(_make_again_and_again, tmp_path, time.time() + 1.5) for _ in range(3)]
    while any(worker.is_alive() for worker in workers):
        if (tmp_path / "v1/kernel").exists():
            assert prune(cache, keep_days=0).failed == ()
            survey(cache)
            assert not any(checked.problem for checked in verify(cache))
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    prune(cache, keep_days=0)
    assert survey(cache) == []


def test_what_took_the_place_of_an_old_thing_is_not_taken_for_it(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    path = cache.root / "v1/kernel" / KEY

    def replace_first(descriptor: int, operation: int) -> bool:
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            shutil.rmtree(path)  # as a faster process would, and another makes it again
            path.mkdir()
        return flock(descriptor, operation)

    age(path, 31)
    with monkeypatch.context() as patch:
        patch.setattr(housekeeping, "_busy", lambda path: False)
        patch.setattr(housekeeping, "flock", replace_first)
        prune(cache)
    assert path.is_dir()


# --- Not ours


def test_a_home_directory_named_as_the_cache_loses_nothing(tmp_path: Path) -> None:
    mine = [
        "v1/kernel/notes.txt", "v1/logs/app.log", "v1/ccache/letter.txt", f"v1/blobs/{KEY}", "v1/blobs/sha256/x",
        f"v2/kernel/{KEY}/file", "kernel/x", "v1/.partial/x", "v1/kernel-build/object", "v1/locks/mine", "v1/tags/one",
        "blobs/sha256/x", "v1/kernel-source/linux/Makefile", "v1/accel/a.json", "v1/partial/ab",
        "images/debian-12/manifest.json", "images/debian-12/oci-layout", "images/holiday.jpg",
    ]  # fmt: skip
    for name in mine:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    pruned = prune(Cache(root=tmp_path), everything=True)
    assert pruned.removed == ()
    assert all((tmp_path / name).read_text() == "mine" for name in mine)


@pytest.mark.parametrize("name", ["letter.txt", "v1/letter.txt", "v2/kernel"])
def test_a_directory_that_is_no_cache_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(SpecError, match="no cache of osbuilder") as caught:
        prune(Cache(root=tmp_path), everything=True)
    assert "OSBUILDER_CACHE" in caught.value.hint
    with pytest.raises(HostError):
        prune(Cache(root=tmp_path / name), everything=True)


@pytest.mark.parametrize("name", ["v1", "v1/kernel", "v1/blobs", "v1/blobs/sha256", "v1/partial", "v1/logs"])
def test_a_link_in_the_cache_is_not_followed(name: str, cache: Cache, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (cache.root / name).rename(elsewhere)
    (cache.root / name).symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    if name == "v1":
        with pytest.raises(SpecError):
            prune(cache, everything=True)
    else:
        prune(cache, everything=True)
    assert sorted(elsewhere.rglob("*")) == before


def test_links_inside_what_goes_are_not_followed(cache: Cache, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter.txt").write_text("mine")
    for place in (f"kernel/{KEY}", "ccache/0", f"kernel-source/{KEY}"):
        (cache.root / "v1" / place / "link").symlink_to(tmp_path / "mine")
    (cache.root / f"v1/agent/{OTHER}").symlink_to(tmp_path / "mine")
    prune(cache, everything=True)
    assert survey(cache) == []
    assert (tmp_path / "mine/letter.txt").read_text() == "mine"


def test_without_locks_nothing_is_pruned(cache: Cache) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    before = sorted(cache.root.rglob("*"))
    script = (
        "import sys; from pathlib import Path; from osbuild.cache import Cache; from osbuild import housekeeping;"
        "cache = Cache(root=Path(sys.argv[1])); print({item.in_use for item in housekeeping.survey(cache)});"
        "housekeeping.prune(cache, everything=True)"
    )
    words = ["-f", "-qq", "-o", "/dev/null", "-e", "trace=flock", "-e", "inject=flock:error=EOPNOTSUPP"]
    argv = ["strace", *words, sys.executable, "-c", script, str(cache.root)]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert NoLocksError.__name__ in ended.stderr
    assert "True" in ended.stdout
    assert sorted(cache.root.rglob("*")) == before
