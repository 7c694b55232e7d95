"""The blob store: fetched once, resumed, verified on every use, whoever is killed."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from osbuild import housekeeping
from osbuild.blobs import Blobs, Fetch
from osbuild.cache import Cache
from osbuild.errors import HostError, InputError, Interrupted
from osbuild.oci import Descriptor

DATA = random.Random(3).randbytes(3_000_000)  # three chunks when it is read
HEX = hashlib.sha256(DATA).hexdigest()
PIECE = 100_000
CONTEXT = multiprocessing.get_context("forkserver")
NOBODY = 65534


def describe(data: bytes = DATA, size: int | None = None) -> Descriptor:
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return Descriptor(media_type="x", digest=digest, size=len(data) if size is None else size, annotations={})


class Server:
    """Gives the bytes from any offset, and remembers which were asked for."""

    def __init__(self, data: bytes = DATA, *, ranges: bool = True, stop: int | None = None) -> None:
        self.data, self.ranges, self.stop = data, ranges, stop
        self.asked: list[int] = []
        self.sent = 0

    def __call__(self, offset: int) -> tuple[int, Iterator[bytes]]:
        self.asked.append(offset)
        start = offset if self.ranges else 0
        return start, self._pieces(start)

    def _pieces(self, start: int) -> Iterator[bytes]:
        for at in range(start, len(self.data) if self.stop is None else self.stop, PIECE):
            self.sent += PIECE
            yield self.data[at : at + PIECE]


def broken(offset: int, problem: BaseException, data: bytes = DATA) -> Fetch:
    """A connection that breaks at this byte."""

    def fetch(start: int) -> tuple[int, Iterator[bytes]]:
        def pieces() -> Iterator[bytes]:
            yield data[start:offset]
            raise problem

        return start, pieces()

    return fetch


def get(root: Path, fetch: Fetch | None, wanted: Descriptor | None = None) -> bytes:
    with Blobs(cache=Cache(root=root)).open(wanted or describe(), fetch, "here") as blob:
        return blob.read()


def never(offset: int) -> tuple[int, Iterator[bytes]]:
    pytest.fail(f"fetched from {offset}")


def place(root: Path) -> Path:
    return root / "v1/blobs/sha256" / HEX


def partial(root: Path) -> Path:
    return root / "v1/partial" / HEX


def assert_clean(root: Path) -> None:
    """One good blob, nothing half-done, no lock held."""
    items = housekeeping.survey(Cache(root=root))
    assert [item.kind for item in items if item.kind not in ("leftover", "lock")] == ["blob"]
    assert not any(item.in_use for item in items)
    assert [checked.problem for checked in housekeeping.verify(Cache(root=root))] == [""]
    assert get(root, None) == DATA


# --- One process


def test_a_blob_is_fetched_once_and_then_found(tmp_path: Path) -> None:
    os_umask = os.umask(0o077)
    try:
        assert get(tmp_path, Server()) == DATA
    finally:
        os.umask(os_umask)
    assert get(tmp_path, never) == DATA
    assert get(tmp_path, None) == DATA
    assert place(tmp_path).stat().st_mode & 0o7777 == 0o644
    assert os.listdir(tmp_path / "v1/locks") == os.listdir(tmp_path / "v1/partial") == []


def test_the_chunks_of_a_blob_are_its_bytes(tmp_path: Path) -> None:
    with Blobs(cache=Cache(root=tmp_path)).open(describe(), Server(), "here") as blob:
        chunks = list(blob.chunks())
        assert list(blob.chunks()) == chunks
    assert b"".join(chunks) == DATA
    assert max(map(len, chunks)) == 1 << 20


def test_a_blob_of_no_bytes_needs_no_server(tmp_path: Path) -> None:
    assert get(tmp_path, never, describe(b"")) == b""


@pytest.mark.parametrize("problem", [ConnectionResetError("gone"), ValueError("odd"), Interrupted(signal.SIGTERM)])
def test_a_fetch_that_breaks_is_resumed_where_it_broke(problem: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(problem)):
        get(tmp_path, broken(1_234_567, problem))
    assert partial(tmp_path).stat().st_size == 1_234_567
    assert not any(item.in_use for item in housekeeping.survey(Cache(root=tmp_path)))
    server = Server()
    assert get(tmp_path, server) == DATA
    assert server.asked == [1_234_567]
    assert_clean(tmp_path)


def test_a_server_that_ignores_the_range_is_believed_from_its_start(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        get(tmp_path, broken(1000, TimeoutError()))
    server = Server(ranges=False)
    assert get(tmp_path, server) == DATA
    assert server.asked == [1000]


def test_a_server_that_starts_elsewhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="from byte 7"):
        get(tmp_path, lambda offset: (7, iter([DATA])))


def test_a_body_that_ends_early_is_asked_for_its_rest(tmp_path: Path) -> None:
    asked = []

    def fetch(offset: int) -> tuple[int, Iterator[bytes]]:
        asked.append(offset)
        return offset, iter([DATA[offset : offset + 1_500_000]])

    assert get(tmp_path, fetch) == DATA
    assert asked == [0, 1_500_000]


def test_a_body_that_never_comes_to_its_end_is_an_error_and_can_be_resumed(tmp_path: Path) -> None:
    server = Server(stop=5 * PIECE)
    with pytest.raises(InputError, match=f"{5 * PIECE} bytes of {len(DATA)} came"):
        get(tmp_path, server)
    assert server.asked == [0, 5 * PIECE, 5 * PIECE]
    server = Server()
    assert get(tmp_path, server) == DATA
    assert server.asked == [5 * PIECE]


def test_wrong_bytes_are_fetched_once_more_and_then_refused(tmp_path: Path) -> None:
    server = Server(b"x" + DATA[1:])
    with pytest.raises(InputError, match="another digest") as caught:
        get(tmp_path, server)
    assert HEX in str(caught.value)
    assert server.asked == [0, 0]
    assert not place(tmp_path).exists()
    assert not partial(tmp_path).exists()


class Endless:
    """A body without an end, and how much of it was read before it was closed."""

    read = 0
    closed = False

    def __iter__(self) -> Endless:
        return self

    def __next__(self) -> bytes:
        self.read += PIECE
        return bytes(PIECE)

    def close(self) -> None:
        self.closed = True


def test_an_endless_body_is_left_after_its_size_and_closed(tmp_path: Path) -> None:
    bodies = [Endless(), Endless()]
    left = iter(bodies)
    with pytest.raises(InputError, match=f"more came than the {len(DATA)} bytes"):
        get(tmp_path, lambda offset: (offset, next(left)))
    assert [(body.read, body.closed) for body in bodies] == [(len(DATA) + PIECE, True)] * 2


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
def test_a_descriptor_that_lies_about_the_size_is_refused_and_the_blob_stays(size: int, tmp_path: Path) -> None:
    get(tmp_path, Server())
    with pytest.raises(InputError, match=f"has {len(DATA)} bytes, but its descriptor says {size}"):
        get(tmp_path, never, describe(size=size))
    assert_clean(tmp_path)
    assert len(os.listdir(place(tmp_path).parent)) == 1


def test_a_digest_that_is_a_path_is_refused(tmp_path: Path) -> None:
    wanted = Descriptor(media_type="x", digest="sha256:../../../etc/passwd", size=1, annotations={})
    with pytest.raises(InputError, match="not a sha256 digest"):
        get(tmp_path, never, wanted)


def test_a_blob_cut_while_it_is_read_is_an_error_and_not_a_short_read(tmp_path: Path) -> None:
    with Blobs(cache=Cache(root=tmp_path)).open(describe(), Server(), "here") as blob:
        os.truncate(place(tmp_path), 1_100_000)
        with pytest.raises(HostError, match="lost its end"):
            blob.read()


# --- Damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def link_to_good(path: Path) -> None:
    elsewhere = path.with_name("elsewhere")
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def directory_with(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "inside").write_bytes(DATA)


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "a cut": lambda path: os.truncate(path, len(DATA) - 1),
    "a byte more": lambda path: path.write_bytes(DATA + b"x"),
    "no bytes": lambda path: os.truncate(path, 0),
    "another blob's bytes": lambda path: path.write_bytes(b"another"),
    "a link to good bytes": link_to_good,
    "a link to nothing": link_to_nothing,
    "a directory": directory_with,
    "a fifo": fifo,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_blob_is_never_used_but_set_aside_and_fetched_again(
    damage: Callable[[Path], object], tmp_path: Path
) -> None:
    get(tmp_path, Server())
    damage(place(tmp_path))
    with pytest.raises(InputError, match=f"{HEX} was damaged") as caught:
        get(tmp_path, None)
    assert caught.value.hint
    with pytest.raises(InputError, match=f"{HEX} is not in the cache"):
        get(tmp_path, None)
    assert get(tmp_path, Server()) == DATA
    assert [name for name in os.listdir(place(tmp_path).parent) if name.startswith(f"{HEX}.bad-")]
    assert place(tmp_path).lstat().st_size == len(DATA)


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_partial_file_comes_to_the_right_bytes(damage: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        get(tmp_path, broken(len(DATA) // 2, TimeoutError()))
    damage(partial(tmp_path))
    assert get(tmp_path, Server()) == DATA
    assert_clean_blob(tmp_path)


def assert_clean_blob(root: Path) -> None:
    assert not place(root).is_symlink()
    assert get(root, None) == DATA


def test_a_partial_file_that_is_another_file_too_is_not_written_to(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_bytes(DATA[:1000])
    partial(tmp_path).parent.mkdir(parents=True)
    partial(tmp_path).hardlink_to(mine)
    assert get(tmp_path, Server()) == DATA
    assert mine.read_bytes() == DATA[:1000]


def test_a_run_killed_before_the_last_rename_fetches_nothing_again(tmp_path: Path) -> None:
    partial(tmp_path).parent.mkdir(parents=True)
    partial(tmp_path).write_bytes(DATA)
    assert get(tmp_path, never) == DATA


# --- Names


def test_what_a_name_meant_is_remembered(tmp_path: Path) -> None:
    blobs = Blobs(cache=Cache(root=tmp_path))
    assert blobs.recall("docker://h/r:t") is None
    blobs.remember("docker://h/r:t", f"sha256:{HEX}")
    blobs.remember("docker://h/r:\udcff", f"sha256:{'0' * 64}")
    assert blobs.recall("docker://h/r:t") == f"sha256:{HEX}"
    blobs.remember("docker://h/r:t", f"sha256:{'1' * 64}")
    assert blobs.recall("docker://h/r:t") == f"sha256:{'1' * 64}"
    assert blobs.recall("docker://h/r:\udcff") == f"sha256:{'0' * 64}"


def _record(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


@pytest.mark.parametrize(
    "damage",
    [
        _record(""), _record("[" * 5000), _record("null"), _record(json.dumps({"name": "n"})), flip,
        _record(json.dumps({"name": "n", "digest": "sha256:../x"})),
        _record(json.dumps({"name": "m", "digest": f"sha256:{HEX}"})), link_to_good, directory_with, fifo,
    ],
)  # fmt: skip
def test_a_damaged_record_means_nothing_and_is_made_again(damage: Callable[[Path], object], tmp_path: Path) -> None:
    blobs = Blobs(cache=Cache(root=tmp_path))
    blobs.remember("n", f"sha256:{HEX}")
    damage(tmp_path / "v1/tags" / hashlib.sha256(b"n").hexdigest())
    assert blobs.recall("n") is None
    blobs.remember("n", f"sha256:{HEX}")
    assert blobs.recall("n") == f"sha256:{HEX}"


# --- Several processes, some killed


def _slow(seconds: float, log: Path) -> Fetch:
    def fetch(offset: int) -> tuple[int, Iterator[bytes]]:
        with log.open("a") as file:
            file.write(f"{offset}\n")

        def pieces() -> Iterator[bytes]:
            for at in range(offset, len(DATA), PIECE):
                time.sleep(seconds)
                yield DATA[at : at + PIECE]

        return offset, pieces()

    return fetch


def _fetcher(root: Path, seconds: float) -> None:
    os._exit(0 if get(root / "c", _slow(seconds, root / "log")) == DATA else 9)


def _user(root: Path) -> None:
    with Blobs(cache=Cache(root=root)).open(describe(), Server(), "here"):
        (root / "ready").touch()
        time.sleep(60)


def _run(target: Callable[..., None], *args: object) -> multiprocessing.process.BaseProcess:
    CONTEXT.set_forkserver_preload(["tests.test_blobs"])
    process = CONTEXT.Process(target=target, args=args)
    process.start()
    return process


def test_of_several_processes_one_fetches(tmp_path: Path) -> None:
    racers = [_run(_fetcher, tmp_path, 0.005) for _ in range(6)]
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0
    assert (tmp_path / "log").read_text() == "0\n"
    assert_clean(tmp_path / "c")


@pytest.mark.parametrize("seed", range(4))
def test_whoever_is_killed_the_others_have_the_right_bytes(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    racers = [_run(_fetcher, tmp_path, 0.01) for _ in range(8)]
    killed = chance.sample(racers, 5)
    for racer in killed:
        time.sleep(chance.random() * 0.12)
        racer.kill()
    for racer in racers:
        racer.join(60)
        assert racer.exitcode == 0 or (racer in killed and racer.exitcode == -signal.SIGKILL)
    assert len((tmp_path / "log").read_text().split()) <= 6  # one, and one more for each that was killed at it
    assert_clean(tmp_path / "c")


@pytest.mark.parametrize("there", [False, True], ids=["fetched", "found"])
def test_pruning_keeps_the_blob_that_a_process_reads(there: bool, tmp_path: Path) -> None:
    if there:
        get(tmp_path, Server())
    user = _run(_user, tmp_path)
    try:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        pruned = housekeeping.prune(Cache(root=tmp_path), everything=True)
        assert [item.kind for item in pruned.in_use] == ["blob"]
        assert get(tmp_path, None) == DATA
    finally:
        user.kill()
        user.join(60)
    pruned = housekeeping.prune(Cache(root=tmp_path), everything=True)
    assert [item.kind for item in pruned.removed] == ["blob"]
    assert not place(tmp_path).exists()


STORE = """
import hashlib, sys
from pathlib import Path
from osbuild.blobs import Blobs
from osbuild.cache import Cache
from osbuild.oci import Descriptor
data = bytes(range(256)) * 1024
wanted = Descriptor(media_type="x", digest=f"sha256:{hashlib.sha256(data).hexdigest()}", size=len(data), annotations={})
fetch = lambda offset: (offset, (data[at : at + 65536] for at in range(offset, len(data), 65536)))
blobs = Blobs(cache=Cache(root=Path(sys.argv[1])))
with blobs.open(wanted, fetch, "here") as blob:
    assert blob.read() == data
blobs.remember("name", wanted.digest)
assert blobs.recall("name") == wanted.digest
"""


def _trace(*words: str, root: Path, log: str = "/dev/null") -> subprocess.CompletedProcess[str]:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    argv = ["strace", "-f", "-qq", "-o", log, *words, sys.executable, "-c", STORE, str(root)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, env=environment)


@pytest.mark.parametrize("call", ["flock", "write", "fsync", "rename", "unlink", "linkat"])
def test_a_run_killed_at_any_call_that_changes_something_leaves_nothing_in_the_way(call: str, tmp_path: Path) -> None:
    for number in range(1, 100):
        root = tmp_path / str(number)
        ended = _trace("-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when={number}", root=root)
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        cache = Cache(root=root)
        assert not any(item.in_use for item in housekeeping.survey(cache))
        assert not any(checked.problem for checked in housekeeping.verify(cache))
        again = subprocess.run([sys.executable, "-c", STORE, str(root)], capture_output=True, text=True, timeout=60)
        assert again.returncode == 0, again.stderr
        assert {item.kind for item in housekeeping.survey(cache)} <= {"blob", "tag", "lock", "partial"}
        housekeeping.prune(cache, kinds=frozenset({"lock", "partial"}), keep_days=0)
        assert [item.kind for item in housekeeping.survey(cache)] == ["blob", "tag"]
    assert number > 1, f"{call} is never called"


def test_bytes_are_on_the_disk_before_their_name_and_their_name_before_they_are_used(tmp_path: Path) -> None:
    ended = _trace("-y", "-e", "trace=fsync,rename,flock", root=tmp_path / "c", log=str(tmp_path / "log"))
    assert ended.returncode == 0, ended.stderr
    lines = (tmp_path / "log").read_text().splitlines()
    home = str(tmp_path / "c/v1")
    (at,) = (number for number, line in enumerate(lines) if f'rename("{home}/partial/' in line)
    assert f"fsync(4<{home}/partial/" in lines[at - 1]
    assert f"<{home}/blobs/sha256>" in lines[at + 1]
    assert "LOCK_SH" in lines[at - 2]  # from the first moment of its name


@pytest.mark.parametrize("call", ["fsync", "write", "rename"])
def test_a_disk_that_fails_is_an_error_and_nothing_is_kept(call: str, tmp_path: Path) -> None:
    ended = _trace("-e", f"trace={call}", "-e", f"inject={call}:error=EIO:when=1", root=tmp_path)
    assert "HostError: cannot write to the cache" in ended.stderr
    assert [item.kind for item in housekeeping.survey(Cache(root=tmp_path))] == []


def test_without_locks_blobs_come_all_the_same(tmp_path: Path) -> None:
    ended = _trace("-e", "trace=flock", "-e", "inject=flock:error=EOPNOTSUPP", root=tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert [item.kind for item in housekeeping.survey(Cache(root=tmp_path))] == ["blob", "tag"]


# --- No room, no permission


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    if os.geteuid() != 0:
        pytest.skip("only root mounts a tmpfs")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no tmpfs can be mounted here")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_no_room_is_said_before_the_first_byte(small_disk: Path) -> None:
    with pytest.raises(HostError, match=f"{small_disk}.*: {len(DATA)} bytes are needed") as caught:
        get(small_disk, never)
    assert "OSBUILDER_CACHE" in caught.value.hint


def test_a_disk_that_fills_on_the_way_leaves_room_and_what_was_there(small_disk: Path) -> None:
    get(small_disk, Server(b"small"), describe(b"small"))

    def fetch(offset: int) -> tuple[int, Iterator[bytes]]:
        (small_disk / "hog").write_bytes(bytes(700_000))  # somebody else's
        return Server(DATA[:900_000])(offset)

    with pytest.raises(HostError, match=f"cannot write to the cache.*{small_disk}.*No space left") as caught:
        get(small_disk, fetch, describe(DATA[:900_000]))
    assert "OSBUILDER_CACHE" in caught.value.hint
    assert get(small_disk, None, describe(b"small")) == b"small"
    assert os.listdir(small_disk / "v1/partial") == []
    (small_disk / "hog").unlink()
    assert get(small_disk, Server(DATA[:900_000]), describe(DATA[:900_000])) == DATA[:900_000]


def _limited(root: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    try:
        get(root, Server())
    except HostError as problem:
        os._exit(0 if "File too large" in str(problem) and "OSBUILDER_CACHE" in problem.hint else 8)
    os._exit(9)


def test_a_limit_on_files_is_an_error_like_a_full_disk(tmp_path: Path) -> None:
    limited = _run(_limited, tmp_path)
    limited.join(60)
    assert limited.exitcode == 0
    assert get(tmp_path, Server()) == DATA


def _as_nobody(root: Path) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    blobs = Blobs(cache=Cache(root=root))
    assert get(root, never) == DATA
    assert blobs.recall("n") == f"sha256:{HEX}"
    blobs.remember("n", f"sha256:{'1' * 64}")  # which cannot be kept
    assert {item.in_use for item in housekeeping.survey(Cache(root=root))} == {False}
    try:
        get(root, Server(b"new"), describe(b"new"))
    except HostError as problem:
        os._exit(0 if str(root) in str(problem) and "OSBUILDER_CACHE" in problem.hint else 8)
    os._exit(9)


def test_a_cache_that_others_own_gives_what_it_has_and_says_what_it_cannot() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root becomes somebody else")
    with tempfile.TemporaryDirectory() as name:  # pytest's own directories are root's alone
        root = Path(name)
        root.chmod(0o755)
        get(root, Server())
        Blobs(cache=Cache(root=root)).remember("n", f"sha256:{HEX}")
        before = place(root).stat()
        nobody = _run(_as_nobody, root)
        nobody.join(60)
        assert nobody.exitcode == 0
        now = place(root).stat()
        # Not its time of reading, which is not theirs to keep.
        assert (now.st_ino, now.st_mode, now.st_size) == (before.st_ino, before.st_mode, before.st_size)
        assert (now.st_mtime_ns, now.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
