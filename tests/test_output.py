"""Files whole or absent."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from osbuild.errors import HostError, SpecError
from osbuild.output import write_whole, writing


def test_a_block_that_ends_badly_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_whole(path, b"old")

    def half() -> None:
        with writing(path) as descriptor:
            os.write(descriptor, b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("kind", ["directory", "link", "fifo"])
def test_what_is_no_regular_file_is_never_replaced(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    else:
        os.mkfifo(path)
    with pytest.raises(SpecError, match="not a regular file"):
        write_whole(path, b"x")
    assert not (tmp_path / "elsewhere").exists()


def test_a_missing_directory_is_the_hosts_lack(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="No such file"):
        write_whole(tmp_path / "no" / "f", b"x")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(HostError, match="cannot write"):
            write_whole(tmp_path / "f", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []
