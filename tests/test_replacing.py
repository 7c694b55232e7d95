"""Which files an output may take the place of: our own, empty ones, and any with --force."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from osbuild import cli, depfile, nvdimm_image, program, tar_writer
from osbuild.arch import X86_64
from osbuild.artifacts import Rootfs
from osbuild.errors import OsbuilderError, SpecError
from osbuild.initrd import COMPRESSIONS, build_initrd
from osbuild.nvdimm_image import Layout
from osbuild.replacing import KINDS, check_replaceable
from osbuild.spec import BuildSpec
from osbuild.tree import Tree, directory, regular
from tests.test_cli import run

COMMANDS = {
    "image": ("image", "oci:/nowhere", "-o"),
    "initrd": ("initrd", "oci:/nowhere", "-o"),
    "rootfs": ("rootfs", "oci:/nowhere", "--tar"),
    "build": ("build", "oci:/nowhere", "--depfile"),
    "seed": ("seed", "--user-data", "/nowhere", "-o"),
    "agent build": ("agent", "build", "--arch", "z80", "-o"),
    "agent swap": ("agent", "swap", "/nowhere", "builtin", "-o"),
}
TREE = Tree({"/": directory(), "/init": regular(b"#!/bin/sh\n", 0o755)})


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_no_command_replaces_what_it_did_not_write_unless_forced(words: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "precious.txt"
    path.write_text("years of work\n")
    with pytest.raises(SpecError, match=r"precious.txt' exists and is no ") as caught:
        program._command(cli.app, [*words, str(path)])
    assert caught.value.hint == "--force replaces it; or name another file"
    with pytest.raises(OsbuilderError, match=r"nowhere|z80"):  # it gets as far as looking for what goes in
        program._command(cli.app, [*words, str(path), "--force"])
    assert path.read_text() == "years of work\n"


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_even_when_forced_only_a_regular_file_is_replaced(words: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "target").write_text("years of work\n")
    (tmp_path / "link").symlink_to("target")
    for name in ("link", "."):
        with pytest.raises(SpecError, match="exists and is not a regular file"):
            program._command(cli.app, [*words, str(tmp_path / name), "--force"])
    assert (tmp_path / "link").is_symlink()


def _images(path: Path) -> None:
    for header in (True, False):
        layout = Layout.around(1 << 20, header=header)
        path.write_bytes(nvdimm_image.mbr(layout.partitions, b"osbd"))
        check_replaceable(path, "image", force=False)
    path.write_bytes(b"QFI\xfb\0\0\0\3")


def _initramfs(path: Path) -> None:
    for compress in COMPRESSIONS:
        build_initrd(Rootfs(tree=TREE, init="/init", epoch=0), path, compress=compress)
        check_replaceable(path, "initramfs", force=False)


def _rules(path: Path) -> None:
    depfile.write(path, BuildSpec(image=f"oci:{path.parent}", out=Path("out"), arch=X86_64), [Path("out/x y")], None)


WRITERS: dict[str, Callable[[Path], object]] = {
    "image": _images,
    "initramfs": _initramfs,
    "tar": lambda path: path.write_bytes(b"".join(tar_writer.archive(TREE))),
    "iso": lambda path: run("seed", "--user-data", str(_user_data(path)), "-o", str(path)),
    "program": lambda path: path.write_bytes(b"\x7fELF" + bytes(60)),
    "rules": _rules,
}


def _user_data(path: Path) -> Path:
    found = path.with_name("user-data")
    found.write_text("#cloud-config\n")
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_command_wrote_and_an_empty_file_are_replaced_without_a_word(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "f"
    check_replaceable(path, kind, force=False)
    path.touch()
    check_replaceable(path, kind, force=False)
    WRITERS[kind](path)
    check_replaceable(path, kind, force=False)
    for other in KINDS.keys() - {kind}:
        with pytest.raises(SpecError):
            check_replaceable(path, other, force=False)


def test_a_disk_of_another_system_is_no_image_of_ours(tmp_path: Path) -> None:
    ours = nvdimm_image.mbr(Layout.around(1 << 20).partitions, b"osbd")
    for sector in (b"\xeb" + ours[1:], ours[:454] + (63).to_bytes(4, "little") + ours[458:], ours[:-2] + b"\0\0"):
        (tmp_path / "disk").write_bytes(sector)
        with pytest.raises(SpecError):
            check_replaceable(tmp_path / "disk", "image", force=False)


def test_a_seed_is_written_again_and_again_and_over_another_file_when_forced(tmp_path: Path) -> None:
    out, words = tmp_path / "s", ("seed", "--user-data", str(_user_data(tmp_path / "s")), "-o", str(tmp_path / "s"))
    assert [run(*words).returncode for _ in range(2)] == [0, 0]
    written = out.read_bytes()
    out.write_text("years of work\n")
    done = run(*words)
    assert (done.returncode, done.stdout, out.read_text()) == (2, "", "years of work\n")
    assert len(done.stderr.splitlines()) == 2
    kept = os.open(out, os.O_RDONLY)
    assert run(*words, "--force").returncode == 0
    assert out.read_bytes() == written
    assert os.read(kept, 100) == b"years of work\n"  # it was replaced, not written into
    os.close(kept)
