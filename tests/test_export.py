"""osbuilder export: skopeo and tar read the image, KubeVirt's schema the machine, and QEMU boots what is in it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from osbuild import smoke
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.errors import InputError, SpecError
from osbuild.export import KINDS, Exported, export
from osbuild.filesystem import ext4
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.report import SmokeReport, Verdict
from osbuild.runtime.base import Machine
from tests.boot_fixtures import boot_kernel, boot_rootfs, good_image, good_initrd, guests_alive
from tests.installable import SYSTEMD, make_build
from tests.test_cli import one_line, run

__all__ = ["boot_kernel", "boot_rootfs", "good_image", "good_initrd"]  # fixtures

yaml = pytest.importorskip("yaml")
NAME = "registry.example/guests/web_1:v2"
SCHEMA = Path(__file__).parents[2] / "shared/data/kubevirt-swagger.json"


def need(program: str) -> str:
    found = shutil.which(program)
    if found is None:
        pytest.skip(f"{program} is not installed: Debian's package of that name")
    return found


def made(home: Path, kind: str, **about: Any) -> Exported:
    return export(make_build(home / "build", epoch=1_700_000_000, **about), home / "out", kind=kind, name=NAME)


def machine_of(done: Exported) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((done.path / "virtual-machine.yaml").read_text())
    return document


def layer_of(done: Exported) -> Path:
    layout = done.path / "image"
    (top,) = json.loads((layout / "index.json").read_text())["manifests"]
    document = json.loads(blob(layout, top["digest"]).read_text())
    (layer,) = document["layers"]
    return blob(layout, layer["digest"])


def blob(layout: Path, digest: str) -> Path:
    return layout / "blobs/sha256" / digest.removeprefix("sha256:")


# --- the container image --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_skopeo_inspects_and_copies_it(tmp_path: Path, kind: str) -> None:
    skopeo, done = need("skopeo"), made(tmp_path, kind)
    source = f"oci:{done.path}/image:v2"
    told = json.loads(subprocess.run([skopeo, "inspect", source], capture_output=True, check=True).stdout)
    assert told["Digest"] == done.digest
    assert (told["Architecture"], told["Os"]) == ("amd64", "linux")
    assert told["Created"] == "2023-11-14T22:13:20Z"
    # It holds every digest against its blob.
    subprocess.run([skopeo, "copy", "--quiet", source, f"dir:{tmp_path / 'copy'}"], capture_output=True, check=True)
    assert (tmp_path / "copy/manifest.json").is_file()


@pytest.mark.parametrize(
    ("kind", "names"),
    [("containerdisk", ["boot/vmlinuz", "disk/rootfs.img"]), ("kernelboot", ["boot/initrd.img", "boot/vmlinuz"])],
)
def test_everything_in_it_is_qemus(tmp_path: Path, kind: str, names: list[str]) -> None:
    done = made(tmp_path, kind)
    with tarfile.open(layer_of(done)) as tar:
        members = [member for member in tar.getmembers() if member.name not in ("", ".")]
        assert [member.name for member in members if member.isfile()] == names
        assert {(member.uid, member.gid, member.mtime) for member in members} == {(107, 107, 1_700_000_000)}
        assert {member.mode for member in members if member.isfile()} == {0o440}
        for name in names:
            file = tar.extractfile(name)
            assert file is not None
            assert file.read() == (tmp_path / "build" / Path(name).name).read_bytes()


def test_the_same_build_gives_the_same_bytes(tmp_path: Path) -> None:
    build = make_build(tmp_path / "build")
    for name in "ab":
        export(build, tmp_path / name, kind="containerdisk", name=NAME)
    for path in sorted((tmp_path / "a").rglob("*")):
        other = tmp_path / "b" / path.relative_to(tmp_path / "a")
        assert path.is_dir() or path.read_bytes() == other.read_bytes()


def test_a_qcow2_image_is_called_so(tmp_path: Path) -> None:
    done = made(tmp_path, "containerdisk", file_format="qcow2", dax=False)
    assert done.files == ("/boot/vmlinuz", "/disk/rootfs.qcow2")


# --- the virtual machine --------------------------------------------------------------------------------------------


def check(value: Any, rule: dict[str, Any], definitions: dict[str, Any], at: str) -> None:
    """Swagger 2.0 as KubeVirt uses it: references, types, required and, unlike it, no property that is not named."""
    if "$ref" in rule:
        rule = definitions[rule["$ref"].rpartition("/")[2]]
    kinds = {"string": str, "integer": int, "number": float, "boolean": bool, "array": list, "object": dict}
    wanted = rule.get("type", "object")
    types = tuple(kinds[kind] for kind in ([wanted] if isinstance(wanted, str) else wanted))
    assert isinstance(value, types), at
    if isinstance(value, dict):
        assert set(rule.get("required", ())) <= set(value), at
        for key, inner in value.items():
            named = rule.get("properties", {}).get(key, rule.get("additionalProperties"))
            assert named is not None, f"{at}.{key} is not in the schema"
            check(inner, named, definitions, f"{at}.{key}")
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            check(inner, rule["items"], definitions, f"{at}[{number}]")


@pytest.mark.parametrize("kind", KINDS)
def test_the_machine_is_one_of_kubevirts(tmp_path: Path, kind: str) -> None:
    if not SCHEMA.is_file():
        pytest.skip(f"there is no {SCHEMA}")
    definitions = json.loads(SCHEMA.read_text())["definitions"]
    machine = machine_of(made(tmp_path, kind))
    check(machine, definitions["v1.VirtualMachine"], definitions, "machine")
    machine["spec"]["template"]["spec"]["domain"]["firmware"]["kernelBoot"]["container"]["kernelPth"] = ""
    with pytest.raises(AssertionError, match="kernelPth is not in the schema"):
        check(machine, definitions["v1.VirtualMachine"], definitions, "machine")


def test_the_machine_names_what_is_in_the_image(tmp_path: Path) -> None:
    for kind in KINDS:
        (tmp_path / kind).mkdir()
        done = made(tmp_path / kind, kind)
        machine = machine_of(done)
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", machine["metadata"]["name"]), "a name of Kubernetes's"
        spec = machine["spec"]["template"]["spec"]
        container = spec["domain"]["firmware"]["kernelBoot"]["container"]
        named = [container["kernelPath"], container.get("initrdPath")]
        images = [container["image"]]
        for volume in spec.get("volumes", ()):
            named.append(volume["containerDisk"]["path"])
            images.append(volume["containerDisk"]["image"])
        assert sorted(filter(None, named)) == sorted(done.files)
        assert set(images) == {NAME}
        disks = [disk["name"] for disk in spec["domain"]["devices"].get("disks", ())]
        assert disks == [volume["name"] for volume in spec.get("volumes", ())]


def test_katas_words_are_left_out_and_the_root_is_a_disk(tmp_path: Path) -> None:
    machine = machine_of(made(tmp_path, "containerdisk", words=(*SYSTEMD, "quiet")))
    words = machine["spec"]["template"]["spec"]["domain"]["firmware"]["kernelBoot"]["kernelArgs"].split()
    assert words[0] == "console=ttyS0"
    assert "quiet" in words
    assert not set(words) & set(SYSTEMD), "nobody would set the network up"


# --- what is refused ------------------------------------------------------------------------------------------------


def test_nothing_is_left_where_nothing_can_be_exported(tmp_path: Path) -> None:
    build = make_build(tmp_path / "build", image=False)
    with pytest.raises(InputError, match="holds no image"):
        export(build, tmp_path / "out", kind="containerdisk", name=NAME)
    (tmp_path / "there").mkdir()
    with pytest.raises(SpecError, match="is there already"):
        export(build, tmp_path / "there", kind="kernelboot", name=NAME)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build", "there"]
    assert list((tmp_path / "there").iterdir()) == []


def test_bad_words_get_one_line_and_their_exit_code(tmp_path: Path) -> None:
    make_build(tmp_path / "build")
    digest = f"a@sha256:{'0' * 64}"
    for kind, name, out, code, says in (
        ("vhd", NAME, "out", 2, "no kind 'vhd'"),
        ("kernelboot", "UPPER", "out", 2, "UPPER"),
        ("kernelboot", digest, "out", 2, "by its digest"),
        ("kernelboot", NAME, "build/vmlinux/out", 4, "cannot write in"),
    ):
        done = run("export", "build", "--as", kind, "--name", name, "-o", out, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert says in one_line(done.stderr)
    done = run("export", "build", "--as", "kernelboot", "--name", NAME, "-o", "out", "--json", cwd=tmp_path)
    told = json.loads(done.stdout)
    assert (told["kind"], told["reference"]) == ("kernelboot", NAME)
    assert Path(tmp_path / told["manifest"]).is_file()


def test_an_initramfs_gets_no_less_memory_than_it_needs_to_be_unpacked(tmp_path: Path) -> None:
    build = make_build(tmp_path / "build")
    document = json.loads((build / "manifest.json").read_text())
    document["outputs"]["initrd.img"]["memory"] = (54 << 20) + 1
    (build / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(SpecError, match="54 MiB are too little: its initramfs needs 55"):
        export(build, tmp_path / "less", kind="kernelboot", name=NAME, memory_mib=54)
    assert not (tmp_path / "less").exists()
    for kind, memory in (("kernelboot", 55), ("containerdisk", 54)):
        export(build, tmp_path / kind, kind=kind, name=NAME, memory_mib=memory)


def test_everybody_may_read_what_is_written_in_a_place_that_was_not_there(tmp_path: Path) -> None:
    make_build(tmp_path / "build")
    before = os.umask(0o077)
    try:
        export(tmp_path / "build", tmp_path / "new/place/out", kind="kernelboot", name=NAME)
    finally:
        os.umask(before)
    made = tmp_path / "new/place/out"
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (made, *made.rglob("*")) if path.is_dir()}
    assert modes == {0o755}


# --- booted ---------------------------------------------------------------------------------------------------------


def through_machine(done: Exported, kernel: Kernel, root: DiskImage | Initrd, home: Path) -> SmokeReport:
    """A boot of the files in the image with the machine's words, on a disk as KubeVirt attaches it."""
    with tarfile.open(layer_of(done)) as tar:
        tar.extractall(home / "root", filter="data")
    words = machine_of(done)["spec"]["template"]["spec"]["domain"]["firmware"]["kernelBoot"]["kernelArgs"].split(" ")
    vmlinuz = File.of(home / "root/boot/vmlinuz")
    kernel = dataclasses.replace(kernel, vmlinux=vmlinuz, vmlinuz=vmlinuz)
    if isinstance(root, DiskImage):
        file = File.of(home / "root/disk/rootfs.img")
        root = dataclasses.replace(root, file=file, dax=False, words=tuple(words[1:]))
    else:
        root = dataclasses.replace(root, file=File.of(home / "root/boot/initrd.img"), words=tuple(words[1:]))
    report = smoke.run(Machine(kernel=kernel, root=root, accel="tcg"), home / "work", seconds=60)
    assert guests_alive(home) == []
    return report


def build_of(home: Path, kernel: Kernel, **roots: Any) -> Path:
    files = {
        "vmlinux": kernel.vmlinux.path, "vmlinuz": kernel.vmlinuz.path, "config": kernel.config.path,
        "rootfs.img": roots["image"].file.path, "initrd.img": roots["initrd"].file.path,
    }  # fmt: skip
    image = roots["image"]
    return make_build(home / "build", files=files, disk_words=image.disk_words, verity=image.verity)


@pytest.mark.boot
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_image_holds_boots_as_the_machine_says(
    kind: str, boot_kernel: Kernel, good_image: DiskImage, good_initrd: Initrd, tmp_path: Path
) -> None:
    build = build_of(tmp_path, boot_kernel, image=good_image, initrd=good_initrd)
    done = export(build, tmp_path / "out", kind=kind, name=NAME)
    root = good_image if kind == "containerdisk" else good_initrd
    report = through_machine(done, boot_kernel, root, tmp_path)
    assert report.verdict is Verdict.passed, report


@pytest.mark.boot
def test_a_disk_that_can_be_checked_is_checked(
    boot_kernel: Kernel, boot_rootfs: Rootfs, good_initrd: Initrd, tmp_path: Path
) -> None:
    plan = ext4.plan(boot_rootfs.tree, start=FILESYSTEM_START, epoch=0)
    image = build_nvdimm_image(ext4, plan, tmp_path / "rootfs.img", name="ext4", hashed=True)
    done = export(
        build_of(tmp_path, boot_kernel, image=image, initrd=good_initrd), tmp_path / "out", kind="containerdisk",
        name=NAME,
    )  # fmt: skip
    report = through_machine(done, boot_kernel, image, tmp_path)
    assert report.verdict is Verdict.passed, report
    assert re.search(r"dm-0|verity", {check.name: check.detail for check in report.checks}["root"])
