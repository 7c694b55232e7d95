"""A build made again from its lock: identical, or each difference by its name, and the input that changed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from osbuild.artifacts import Kernel
from osbuild.borrowed import Borrowed
from osbuild.kernel_sections import sections
from tests.layer_tools import archive, folder, member, write_layout
from tests.test_cli import one_line, run
from tests.test_registry import debian as debian  # a fixture

FILES = (folder("etc"), member("etc/hello", b"hello " * 2000))


@pytest.fixture(scope="module")
def built(kernel: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an image, a file to add, and a build of both with words of all kinds."""
    home = tmp_path_factory.mktemp("built")
    write_layout(home / "layout", [archive(*FILES)])
    (home / "motd").write_text("welcome")
    words = ("--add", "motd:/etc/motd", "--remove", "/etc/hello2", "--verity", "--salt", "00ff", "--free", "3M")
    write_layout(home / "layout", [archive(*FILES, member("etc/hello2"))], tag="two")
    done = run("build", "oci:layout:two", "-o", "out", "--no-smoke", "--quiet", *words, cwd=home)
    assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    """The build alone, in another place; the image and the file are where they were."""
    shutil.copytree(built / "out", tmp_path / "copy")
    return tmp_path / "copy"


def rebuilt(directory: Path, *words: str, code: int = 0, **more: Any) -> dict[str, Any]:
    done = run("rebuild", str(directory), "--json", "--quiet", *words, **more)
    assert done.returncode == code, done.stderr + done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def of(found: dict[str, Any], name: str) -> dict[str, Any]:
    return next(file for file in found["files"] if file["name"] == name)


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        was = file.read(1)
        file.seek(offset)
        file.write(bytes([was[0] ^ 1]))


def test_the_same_inputs_give_the_same_bytes_and_nothing_stays(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    found = rebuilt(copy, env={"TMPDIR": str(tmp_path / "tmp"), "SOURCE_DATE_EPOCH": "5"})
    assert found["identical"] is True
    assert found["inputs"] == []
    assert {file["name"] for file in found["files"]} == {
        "vmlinux", "vmlinuz", "config", "rootfs.img", "initrd.img", "manifest.json", "sbom.cdx.json", "provenance.json",
    }  # fmt: skip
    assert list((tmp_path / "tmp").iterdir()) == []


def test_people_are_told_in_one_word(copy: Path) -> None:
    done = run("rebuild", str(copy), "--quiet")
    assert done.stdout.splitlines()[-1] == "identical"


def test_what_somebody_changed_is_named_by_inode_section_and_setting(copy: Path) -> None:
    image = (copy / "rootfs.img").read_bytes()
    damage(copy / "rootfs.img", image.index(b"hello hello"))
    damage(copy / "vmlinux", sections_of(copy / "vmlinux")[".rodata"])
    config = (copy / "config").read_text()
    (copy / "config").write_text(config.replace("CONFIG_FUSE_FS=y\n", "CONFIG_FUSE_FS=m\n"))
    found = rebuilt(copy, code=3)
    assert found["identical"] is False
    assert found["inputs"] == []
    (difference,) = of(found, "rootfs.img")["differences"]
    assert "partition 1 ext4" in difference
    assert "/etc/hello" in difference
    (difference,) = of(found, "vmlinux")["differences"]
    assert "section '.rodata'" in difference
    assert of(found, "config")["differences"] == ["CONFIG_FUSE_FS: m and y"]
    assert {file["name"] for file in found["files"] if file["changed"]} == {"rootfs.img", "vmlinux", "config"}
    assert of(found, "initrd.img")["same"] is True


def test_the_input_that_changed_is_named_with_what_came_of_it(built: Path, copy: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "layout", tmp_path / "layout")
    (tmp_path / "motd").write_text("goodbye")
    lock = json.loads((copy / "lock.json").read_text())
    lock["given"]["add"] = [[str(tmp_path / "motd"), "/etc/motd"]]
    (copy / "lock.json").write_text(json.dumps(lock))
    found = rebuilt(copy, code=3)
    (line,) = found["inputs"]
    assert line.startswith("rootfs.inputs.add /etc/motd: ")
    for name in ("rootfs.img", "initrd.img"):
        assert of(found, name)["because"] == ["rootfs.inputs.add /etc/motd"]
        assert any("'/etc/motd'" in difference for difference in of(found, name)["differences"])
    assert of(found, "vmlinux")["same"] is True
    assert not any(file["changed"] for file in found["files"])


def test_an_image_that_has_moved_is_named_by_hand(copy: Path, built: Path, tmp_path: Path) -> None:
    shutil.copytree(built / "layout", tmp_path / "there")
    lock = json.loads((copy / "lock.json").read_text())
    lock["given"]["image"] = "oci:/no/such/layout"
    (copy / "lock.json").write_text(json.dumps(lock))
    done = run("rebuild", str(copy), "--quiet")
    assert done.returncode == 3
    assert "/no/such/layout" in one_line(done.stderr)
    kept = tmp_path / "kept"
    assert rebuilt(copy, "--image", f"oci:{tmp_path}/there:two", "-o", str(kept))["identical"] is True
    assert (kept / "rootfs.img").read_bytes() == (copy / "rootfs.img").read_bytes()


@pytest.mark.parametrize("name", ["lock.json", "manifest.json", "rootfs.img"])
def test_a_build_that_is_not_whole_is_refused_in_one_line(name: str, copy: Path) -> None:
    (copy / name).unlink()
    done = run("rebuild", str(copy), "--quiet")
    assert done.returncode == 3
    assert name in one_line(done.stderr)


@pytest.mark.parametrize(
    "outputs",
    [[], {"../vmlinux": {"sha256": ""}}, {"vmlinux": {}}, {"vmlinux": []}],
    ids=["list", "path", "none", "odd"],
)
def test_a_manifest_that_names_no_files_of_the_build_is_refused(outputs: object, copy: Path) -> None:
    document = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(document | {"outputs": outputs}))
    done = run("rebuild", str(copy), "--quiet")
    assert done.returncode == 3
    assert "manifest.json" in one_line(done.stderr)


def test_the_sections_of_a_kernel_are_those_that_readelf_lists(kernel: Kernel) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("binutils is not installed")
    wanted = sections_of(kernel.vmlinux.path)
    assert set(sections(Borrowed(kernel.vmlinux.path))) == set(wanted)
    assert ".text" in wanted


def test_what_is_no_kernel_has_no_sections(tmp_path: Path) -> None:
    for number, data in enumerate((b"", b"\x7fELF\x02\x01", b"\x7fELF\x02\x01" + b"\xff" * 80, b"x" * 100)):
        (tmp_path / str(number)).write_bytes(data)
        assert sections(Borrowed(tmp_path / str(number))) == {}


def sections_of(path: Path) -> dict[str, int]:
    """Name and offset of each section that has bytes, by readelf."""
    done = subprocess.run(["readelf", "-S", "-W", str(path)], capture_output=True, text=True, check=True)
    rows = (line.partition("]")[2].split() for line in done.stdout.splitlines() if line.lstrip().startswith("["))
    return {
        row[0]: int(row[3], 16)
        for row in rows
        if len(row) > 4 and row[0] != "NULL" and row[1] not in ("NOBITS", "Type")
    }


def test_one_in_a_registry_is_pulled_and_made_again(built: Path, debian: str, tmp_path: Path) -> None:
    name = f"{debian}/guests/plain:1"
    done = run("build", "oci:layout:two", "-o", str(tmp_path / "plain"), "--no-smoke", "--quiet", cwd=built)
    assert done.returncode == 0, done.stderr
    assert run("publish", str(tmp_path / "plain"), name, "--quiet").returncode == 0
    done = run("rebuild", name, "--image", "oci:layout:two", "--json", "--quiet", cwd=built)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert (found["directory"], found["identical"]) == (name, True)


def test_a_lock_of_somebody_elses_has_no_file_of_this_machine_read(built: Path, debian: str) -> None:
    name = f"{debian}/guests/rebuilt:1"
    assert run("publish", str(built / "out"), name, "--quiet").returncode == 0
    done = run("rebuild", name, "--quiet", cwd=built)
    assert done.returncode == 3
    assert "was made of what lay on another machine (add, image)" in one_line(done.stderr)


@pytest.mark.parametrize("out", [".", "deeper", ".."])
def test_a_build_is_not_made_again_over_itself(out: str, copy: Path) -> None:
    before = sorted(path.name for path in copy.iterdir())
    done = run("rebuild", str(copy), "-o", str(copy / out), "--quiet")
    assert done.returncode == 2
    assert "are in one another" in one_line(done.stderr)
    assert sorted(path.name for path in copy.iterdir()) == before


@pytest.mark.parametrize("name", ["nosuch", "nosuch/dir", "./nosuch", "/no/such"])
@pytest.mark.parametrize("more", [(), ("--key", "k.pub")], ids=["", "with a key"])
def test_what_is_not_here_and_names_no_registry_is_not_looked_for_at_docker_hub(
    name: str, more: tuple[str, ...], tmp_path: Path
) -> None:
    done = run("rebuild", name, *more, "--quiet", cwd=tmp_path)
    assert done.returncode == 3
    assert one_line(done.stderr) == f"error: there is no '{name}' here"
    assert "REGISTRY/REPO:TAG" in done.stderr


def test_a_registry_without_it_is_one_line(debian: str) -> None:
    done = run("rebuild", f"{debian}/guests/none:1", "--quiet")
    assert done.returncode == 3
    assert "none" in one_line(done.stderr)
