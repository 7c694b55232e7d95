"""`docker-archive:`: read where it lies, kept when it is the same file, refused when it changes."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from osbuild import tree_index
from osbuild.borrowed import Borrowed
from osbuild.cache import Cache
from osbuild.errors import InputError
from osbuild.layers import flatten
from osbuild.sources import archive as module
from osbuild.tree import Tree, regular
from tests.layer_tools import layer, old_sparse, opened
from tests.test_sources import LAYERS, save


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An archive that was written long enough ago."""
    path = tmp_path / "a.tar"
    path.write_bytes(save())
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting until a file's time is old enough."""
    monkeypatch.setattr(module, "_SETTLED_SECONDS", -1.0)


def test_a_layer_stored_as_a_sparse_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(sparse_manifest() + bytes(1024))
    with pytest.raises(InputError, match=r"'manifest\.json' is stored as a sparse file"):
        opened(f"docker-archive:{path}")


def sparse_manifest() -> bytes:
    """manifest.json as GNU tar's --sparse writes it, were it mostly holes."""
    return old_sparse([(1024, 512)], 8192, name=b"manifest.json") + b"[".ljust(512)


def kept(cache: Cache) -> list[Path]:
    return sorted((cache.root / "v1/tree").glob("*/tree.json"))


def test_an_unchanged_archive_is_not_read_twice(
    saved: Path, settled: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(root=tmp_path / "cache")
    first = opened(f"docker-archive:{saved}", cache=cache)
    monkeypatch.setattr(module, "_read", None)
    second = opened(f"docker-archive:{saved}", cache=cache)
    assert second.tree.digest() == first.tree.digest() == flatten([layer(data) for data in LAYERS]).digest()
    assert (second.digest, second.config) == (first.digest, first.config)
    assert second.tree["/etc/a"] is second.tree["/etc/b"]


def test_an_archive_that_was_just_written_is_not_kept(saved: Path, tmp_path: Path) -> None:
    cache = Cache(root=tmp_path / "cache")
    opened(f"docker-archive:{saved}", cache=cache)
    assert kept(cache) == []


def test_another_file_under_the_same_name_is_read(saved: Path, settled: None, tmp_path: Path) -> None:
    cache = Cache(root=tmp_path / "cache")
    before = saved.stat()
    opened(f"docker-archive:{saved}", cache=cache)
    saved.write_bytes(save(LAYERS[:1]).ljust(before.st_size, b"\0"))
    os.utime(saved, ns=(before.st_atime_ns, before.st_mtime_ns))  # its time of change still differs
    assert len(opened(f"docker-archive:{saved}", cache=cache).config.diff_ids) == 1


def test_a_damaged_record_is_made_again(saved: Path, settled: None, tmp_path: Path) -> None:
    cache = Cache(root=tmp_path / "cache")
    first = opened(f"docker-archive:{saved}", cache=cache)
    (record,) = kept(cache)
    record.write_bytes(record.read_bytes().replace(b"/etc/a", b"/etc/z"))
    assert opened(f"docker-archive:{saved}", cache=cache).tree.digest() == first.tree.digest()


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(saved: Path, settled: None, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no directory")
    with pytest.raises(NotADirectoryError):
        (tmp_path / "cache/v1").mkdir()
    assert opened(f"docker-archive:{saved}", cache=Cache(root=tmp_path / "cache")).tree.digest()


def test_other_limits_are_another_record(saved: Path, settled: None, tmp_path: Path) -> None:
    from osbuild.tar import Limits

    cache = Cache(root=tmp_path / "cache")
    opened(f"docker-archive:{saved}", cache=cache)
    with pytest.raises(InputError, match="2"):
        opened(f"docker-archive:{saved}", cache=cache, limits=Limits(entries=2))


def test_a_compressed_archive_is_not_kept(saved: Path, settled: None, tmp_path: Path) -> None:
    cache = Cache(root=tmp_path / "cache")
    saved.write_bytes(gzip.compress(save()))
    assert opened(f"docker-archive:{saved}", cache=cache).tree.digest()
    assert kept(cache) == []


def test_bytes_that_change_after_they_were_checked_are_refused(saved: Path) -> None:
    tree = opened(f"docker-archive:{saved}").tree
    with saved.open("r+b") as file:
        file.seek(1000)
        file.write(b"!")
    with pytest.raises(InputError, match="changed while it was read"):
        b"".join(tree["/etc/a"].content.chunks())
    with (saved.parent / "out").open("wb") as out, pytest.raises(InputError, match="changed while it was read"):
        tree["/etc/a"].content.copy_to(out.fileno(), 0)


def test_an_archive_comes_through_a_pipe(saved: Path, tmp_path: Path) -> None:
    expected = opened(f"docker-archive:{saved}").tree.digest()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_bytes(gzip.compress(saved.read_bytes())))
    writer.start()
    assert opened(f"docker-archive:{pipe}").tree.digest() == expected
    writer.join()


@pytest.mark.parametrize("reference", ["docker-archive:-", "docker-archive:/dev/stdin"])
def test_an_archive_comes_from_standard_input(reference: str, saved: Path) -> None:
    words = [sys.executable, "-m", "osbuild", "rootfs", reference, "--raw", "--json"]
    with subprocess.Popen(["cat", str(saved)], stdout=subprocess.PIPE) as cat:
        done = subprocess.run(words, stdin=cat.stdout, capture_output=True, check=True, timeout=60)
    assert "/etc/a" in json.loads(done.stdout)["entries"]


@pytest.mark.parametrize("source", ["docker-archive", "oci"])
@pytest.mark.parametrize(
    ("redirect", "says"),
    [
        ("</dev/null", "standard input is not an archive"),
        ("<&-", "standard input is closed"),
        ("< <(true)", "standard input is empty"),
    ],
)
def test_standard_input_that_is_no_archive_is_refused_with_how_to_give_one(
    source: str, redirect: str, says: str
) -> None:
    line = f"{sys.executable} -m osbuild rootfs {source}:- -q {redirect}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=60)
    assert done.returncode == 3, done.stderr
    assert done.stderr.splitlines()[0] == f"error: {says}"
    assert "docker save IMAGE | osbuilder" in done.stderr.splitlines()[1]


def test_an_archive_of_a_file_comes_from_standard_input_too(saved: Path) -> None:
    words = [sys.executable, "-m", "osbuild", "rootfs", "docker-archive:-", "--raw", "--json"]
    with saved.open("rb") as file:
        done = subprocess.run(words, stdin=file, capture_output=True, check=True, timeout=60)
    assert "/etc/a" in json.loads(done.stdout)["entries"]


def test_a_tree_whose_contents_lie_elsewhere_has_no_index(saved: Path) -> None:
    backing = Borrowed(saved)
    assert tree_index.dump(Tree({"/f": regular(b"in memory")}), backing) is None


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file"):
        opened(f"docker-archive:{tmp_path}")
    with pytest.raises(InputError, match="is not a regular file"):
        Borrowed(Path("/dev/null"))
