"""osbuilder install: Kata's layout, one switch, and back."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from osbuild import install, manifest
from osbuild.errors import HostError, InputError, SpecError
from osbuild.install import HOME, SHARE, roll_back
from osbuild.kata import CURRENT, NAMES
from osbuild.oci import Json
from tests.installable import check_whole, make_build
from tests.test_cli import one_line, run

# --- what is installed ----------------------------------------------------------------------------------------------


def test_katas_names_lead_to_the_files_of_the_build(tmp_path: Path) -> None:
    out = make_build(tmp_path / "out")
    install.install(out, tmp_path / "opt")
    assert check_whole(tmp_path / "opt") == "a"
    current = tmp_path / "opt" / SHARE / HOME / CURRENT
    targets = {name: str((current / name).readlink()) for name in NAMES}
    assert re.fullmatch(r"kata-debian-12-[0-9a-f]{12}\.image", targets["kata-containers.img"])
    assert re.fullmatch(r"kata-debian-12-[0-9a-f]{12}\.initrd", targets["kata-containers-initrd.img"])
    assert re.fullmatch(r"vmlinux-6\.12\.117-[0-9a-f]{12}", targets["vmlinux.container"])
    assert re.fullmatch(r"vmlinuz-6\.12\.117-[0-9a-f]{12}", targets["vmlinuz.container"])
    (config,) = current.glob("config-6.12.117-*")
    assert config.read_bytes() == (out / "config").read_bytes()


@pytest.mark.parametrize(
    ("distribution", "name"),
    [
        ({}, r"kata-osbuilder-[0-9a-f]{12}\.image"),
        ({"name": "arch"}, r"kata-arch-[0-9a-f]{12}\.image"),
        ({"name": "../../etc", "version": "1\n2"}, r"kata-osbuilder-[0-9a-f]{12}\.image"),
    ],
    ids=["nobody knows it", "it has no version", "it is hostile"],
)
def test_an_image_is_named_after_its_distribution(tmp_path: Path, distribution: Json, name: str) -> None:
    install.install(make_build(tmp_path / "out", distribution=distribution), tmp_path / "opt")
    link = tmp_path / "opt" / SHARE / HOME / CURRENT / "kata-containers.img"
    assert re.fullmatch(name, str(link.readlink()))


def test_holes_stay_holes(tmp_path: Path) -> None:
    install.install(make_build(tmp_path / "out"), tmp_path / "opt")
    found = (tmp_path / "opt" / SHARE / "kata-containers.img").stat()
    assert found.st_size > 1 << 20
    assert found.st_blocks * 512 < 512 << 10


@pytest.mark.parametrize("name", ['a "b" \\c', "ünï'codé", "sp ace"])
def test_any_prefix_that_can_be_printed_is_quoted(tmp_path: Path, name: str) -> None:
    install.install(make_build(tmp_path / "out"), tmp_path / name)
    assert check_whole(tmp_path / name) == "a"


def test_the_same_build_again_changes_nothing(tmp_path: Path) -> None:
    out = make_build(tmp_path / "out")
    first = install.install(out, tmp_path / "opt")
    before = sorted((path, path.lstat().st_mtime_ns) for path in (tmp_path / "opt").rglob("*"))
    again = install.install(out, tmp_path / "opt")
    assert (first.changed, again.changed, again.version) == (True, False, first.version)
    assert sorted((path, path.lstat().st_mtime_ns) for path in (tmp_path / "opt").rglob("*")) == before


@pytest.mark.parametrize("name", ["kata-containers.img", "go/qemu/config.d/50-osbuilder.toml"])
def test_a_damaged_installation_is_made_again(tmp_path: Path, name: str) -> None:
    for mark in "ab":
        install.install(make_build(tmp_path / mark, mark), tmp_path / "opt")
    path = (tmp_path / "opt" / SHARE / HOME / CURRENT / name).resolve()
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))  # of the same size
    again = install.install(tmp_path / "b", tmp_path / "opt")
    assert again.changed
    assert check_whole(tmp_path / "opt") == "b"
    assert again.before.startswith("0001-"), "nobody goes back to what is damaged"
    roll_back(tmp_path / "opt")
    assert check_whole(tmp_path / "opt") == "a"


def test_what_somebody_took_away_is_installed_again(tmp_path: Path) -> None:
    out = make_build(tmp_path / "out")
    first = install.install(out, tmp_path / "opt")
    shutil.rmtree(first.home / first.version)
    again = install.install(out, tmp_path / "opt")
    assert (again.changed, again.before) == (True, "")
    assert check_whole(tmp_path / "opt") == "a"


def test_another_prefix_is_another_version(tmp_path: Path) -> None:
    # A tree that was moved names files that are not there any more.
    out = make_build(tmp_path / "out")
    install.install(out, tmp_path / "opt")
    (tmp_path / "opt").rename(tmp_path / "moved")
    assert install.install(out, tmp_path / "moved").changed
    assert check_whole(tmp_path / "moved") == "a"


# --- back and forth -------------------------------------------------------------------------------------------------


def test_rollback_goes_to_what_was_in_use_before_and_not_to_what_was_left(tmp_path: Path) -> None:
    prefix = tmp_path / "opt"
    for mark in "ab":
        install.install(make_build(tmp_path / mark, mark), prefix)
    assert roll_back(prefix).changed
    assert check_whole(prefix) == "a"
    with pytest.raises(InputError, match="nothing is left to go back to"):
        roll_back(prefix)
    install.install(make_build(tmp_path / "c", "c"), prefix)
    assert check_whole(prefix) == "c"
    roll_back(prefix)
    assert check_whole(prefix) == "a"


def test_two_versions_are_kept(tmp_path: Path) -> None:
    for mark in "abcd":
        install.install(make_build(tmp_path / mark, mark), tmp_path / "opt")
    versions = [name for name in os.listdir(tmp_path / "opt" / SHARE / HOME) if name != CURRENT]
    assert len(versions) == 2
    roll_back(tmp_path / "opt")
    assert check_whole(tmp_path / "opt") == "c"


def test_a_damaged_version_is_not_gone_back_to(tmp_path: Path) -> None:
    for mark in "ab":
        install.install(make_build(tmp_path / mark, mark), tmp_path / "opt")
    home = tmp_path / "opt" / SHARE / HOME
    (old,) = (path for path in home.iterdir() if path.name.startswith("0001-"))
    (old / "vmlinux.container").resolve().unlink()
    with pytest.raises(InputError, match="is damaged"):
        roll_back(tmp_path / "opt")
    assert check_whole(tmp_path / "opt") == "b"


# --- what is refused ------------------------------------------------------------------------------------------------


def test_a_changed_file_is_refused_and_nothing_is_installed(tmp_path: Path) -> None:
    out = make_build(tmp_path / "out")
    (out / "vmlinux").write_bytes(b"other")
    with pytest.raises(InputError, match=r"vmlinux' is not what manifest\.json says"):
        install.install(out, tmp_path / "opt")
    assert not (tmp_path / "opt").exists()


def test_a_file_that_changes_after_it_was_checked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install.install(make_build(tmp_path / "a", "a"), tmp_path / "opt")
    out = make_build(tmp_path / "b", "b")
    read = manifest.read

    def read_then_change(path: Path) -> Any:
        found = read(path)
        (out / "rootfs.img").write_bytes(b"other")
        return found

    monkeypatch.setattr(manifest, "read", read_then_change)
    with pytest.raises(InputError, match="changed while it was read"):
        install.install(out, tmp_path / "opt")
    assert check_whole(tmp_path / "opt") == "a"
    assert len(os.listdir(tmp_path / "opt" / SHARE / HOME)) == 2, "something was left"


def test_katas_own_files_are_not_replaced(tmp_path: Path) -> None:
    out = make_build(tmp_path / "out")
    (tmp_path / "opt" / SHARE).mkdir(parents=True)
    (tmp_path / "opt" / SHARE / "kata-containers.img").symlink_to("kata-ubuntu-4.1.0.image")
    with pytest.raises(SpecError, match="is there, and not ours"):
        install.install(out, tmp_path / "opt")
    assert str((tmp_path / "opt" / SHARE / "kata-containers.img").readlink()) == "kata-ubuntu-4.1.0.image"
    assert not (tmp_path / "opt" / SHARE / "vmlinux.container").is_symlink()


def test_a_place_where_nothing_can_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match=r"cannot install: .*Not a directory"):
        install.install(make_build(tmp_path / "out"), tmp_path / "file")


def test_a_qcow2_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is qcow2"):
        install.install(make_build(tmp_path / "out", file_format="qcow2", dax=False), tmp_path / "opt")


def test_bad_words_get_one_line_and_their_exit_code(tmp_path: Path) -> None:
    make_build(tmp_path / "out", image=False)
    prefix = ("--prefix", str(tmp_path / "opt"))
    for words, code, says in (
        (("install", *prefix), 2, "no build is named"),
        (("install", str(tmp_path / "none"), *prefix), 3, "holds no finished build"),
        (("install", str(tmp_path / "out"), *prefix, "--root", "disk"), 2, "no root 'disk'"),
        (("install", str(tmp_path / "out"), *prefix, "--root", "image"), 3, "holds no image"),
        (("install", str(tmp_path / "out"), "--prefix", "a\tb"), 2, "cannot stand in a configuration"),
        (("install", str(tmp_path / "out"), *prefix, "--rollback"), 2, "--rollback installs nothing"),
        (("install", *prefix, "--rollback"), 3, "nothing of ours is installed"),
    ):
        done = run(*words)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert says in one_line(done.stderr)


def test_json_names_what_was_written(tmp_path: Path) -> None:
    make_build(tmp_path / "out")
    done = run("install", str(tmp_path / "out"), "--prefix", str(tmp_path / "opt"), "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["changed"] is True
    assert told["before"] is None
    paths = [Path(path) for group in told["configurations"].values() for path in group.values()]
    assert len(paths) == 6
    assert all(path.is_file() for path in (*paths, *map(Path, told["containerd"].values())))
