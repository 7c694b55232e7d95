"""What osbuilder install writes for Kata's runtimes and for containerd, and that it boots."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from osbuild import install, smoke
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Verity
from osbuild.errors import InputError
from osbuild.install import HOME, SHARE
from osbuild.kata import CURRENT
from osbuild.report import Verdict
from osbuild.runtime.base import Machine
from tests.boot_fixtures import boot_kernel, boot_rootfs, good_image, good_initrd, guests_alive
from tests.installable import SYSTEMD, VERITY, configurations, make_build

__all__ = ["boot_kernel", "boot_rootfs", "good_image", "good_initrd"]  # fixtures

KATA = tomllib.loads(Path(__file__).with_name("kata-keys.toml").read_text())
TYPES = {"string": str, "boolean": bool, "integer": int}


@pytest.mark.parametrize("root", ["image", "initrd"])
@pytest.mark.parametrize("verity", [None, VERITY], ids=["plain", "verity"])
def test_every_key_is_one_of_katas_and_of_its_type(tmp_path: Path, root: str, verity: Verity | None) -> None:
    install.install(make_build(tmp_path / "out", verity=verity), tmp_path / "opt", root=root)
    found = configurations(tmp_path / "opt")
    assert set(found) == {
        ("go", "qemu"), ("go", "clh"), ("go", "firecracker"),
        ("runtime-rs", "qemu"), ("runtime-rs", "cloud-hypervisor"), ("runtime-rs", "firecracker"),
    }  # fmt: skip
    for (runtime, _), section in found.items():
        # An older Go runtime takes no drop-in with a key that it does not know.
        known = KATA[runtime] | (KATA["go-newer"] if runtime == "go" and verity and root == "image" else {})
        for key, value in section.items():
            assert type(value) is TYPES[known[key]], key
        assert section.get("vm_rootfs_driver", "virtio-scsi") in KATA["drivers"]["vm_rootfs_driver"]
        assert ("image" in section) != ("initrd" in section), "image and initrd exclude each other"


def test_an_image_with_verity_is_attached_as_each_runtime_can(tmp_path: Path) -> None:
    install.install(make_build(tmp_path / "out", verity=VERITY), tmp_path / "opt")
    found = configurations(tmp_path / "opt")
    for (runtime, _), section in found.items():
        assert ("vm_rootfs_driver" in section) == (runtime == "runtime-rs")
        assert section["rootfs_type"] == "ext4"
        params = dict(pair.split("=") for pair in section["kernel_verity_params"].split(","))
        assert set(params) == {"root_hash", "salt", "data_blocks", "data_block_size", "hash_block_size"}
    drivers = {name: section["vm_rootfs_driver"] for (runtime, name), section in found.items() if runtime != "go"}
    assert drivers == {
        "qemu": "virtio-pmem", "cloud-hypervisor": "virtio-blk-pci", "firecracker": "virtio-blk-mmio",
    }  # fmt: skip
    assert found["go", "qemu"]["disable_image_nvdimm"] is False
    assert found["go", "clh"]["disable_image_nvdimm"] is True
    text = (tmp_path / "opt" / SHARE / HOME / CURRENT / "root_hash_osbuilder.txt").read_text()
    assert text == f"{VERITY.params}\n"


@pytest.mark.parametrize(
    ("dax", "arch", "driver"), [(False, "x86_64", "virtio-blk-pci"), (True, "aarch64", "virtio-blk-pci")]
)
def test_an_image_that_the_runtime_does_not_map_is_a_disk(tmp_path: Path, dax: bool, arch: str, driver: str) -> None:
    install.install(make_build(tmp_path / "out", dax=dax, arch=arch), tmp_path / "opt")
    found = configurations(tmp_path / "opt")
    assert found["runtime-rs", "qemu"]["vm_rootfs_driver"] == driver
    assert found["go", "qemu"]["disable_image_nvdimm"] is not dax


def test_only_words_that_the_runtime_does_not_add_are_given(tmp_path: Path) -> None:
    words = (*SYSTEMD, "cgroup_no_v1=all")
    install.install(make_build(tmp_path / "out", words=words, verity=VERITY), tmp_path / "opt")
    for section in configurations(tmp_path / "opt").values():
        assert section["kernel_params"] == "cgroup_no_v1=all"
    install.install(tmp_path / "out", tmp_path / "opt", root="initrd")
    for section in configurations(tmp_path / "opt").values():
        assert section["kernel_params"].split() == list(words), "with an initramfs the Go runtime adds none of them"
        assert set(section) == {"kernel", "initrd", "kernel_params"}


def test_containerds_handlers_lead_to_what_is_in_use(tmp_path: Path) -> None:
    install.install(make_build(tmp_path / "out"), tmp_path / "opt")
    for path in (tmp_path / "opt" / SHARE / HOME / CURRENT).glob("*/containerd.toml"):
        document = tomllib.loads(path.read_text())
        runtimes = document["plugins"]["io.containerd.grpc.v1.cri"]["containerd"]["runtimes"]
        assert set(runtimes) == {"osbuilder-qemu", "osbuilder-clh", "osbuilder-firecracker"}
        for handler in runtimes.values():
            assert handler["runtime_type"] == "io.containerd.kata.v2"
            named = Path(handler["options"]["ConfigPath"])
            assert named.is_file()
            assert CURRENT in named.parts, "it would stay with one version"


# --- Kata's own configurations --------------------------------------------------------------------------------------

BASE = """# Kata's own
[hypervisor.{section}]
path = "/opt/kata/bin/vmm"
kernel = "/theirs"
image = "/theirs"
rootfs_type = "erofs"
kernel_params = "theirs"
kernel_verity_params = "root_hash=theirs"
default_memory = 2048
shared_fs = "virtio-fs"
virtio_fs_daemon = "/opt/kata/libexec/virtiofsd"

[runtime]
hypervisor_name = "{section}"
"""


def make_kata(home: Path, **names: str) -> Path:
    """A prefix of Kata's with configurations: section -> name."""
    defaults = home / "share/defaults/kata-containers"
    (defaults / "runtime-rs").mkdir(parents=True)
    for section, name in names.items():
        (defaults / name).write_text(BASE.format(section=section))
    return home


def test_katas_own_configurations_are_completed(tmp_path: Path) -> None:
    kata = make_kata(
        tmp_path / "kata", qemu="configuration-qemu.toml", clh="runtime-rs/configuration-clh-runtime-rs.toml"
    )
    done = install.install(make_build(tmp_path / "out"), tmp_path / "opt", kata=kata)
    found = configurations(tmp_path / "opt")
    assert set(found) == {("go", "qemu"), ("runtime-rs", "clh")}, "the section is called as theirs is"
    for section in found.values():
        assert section["virtio_fs_daemon"] == "/opt/kata/libexec/virtiofsd"
        assert Path(section["kernel"]).is_file()
        assert Path(section["image"]).is_file()
        assert (section["rootfs_type"], section["kernel_params"]) == ("ext4", "")
        assert section["kernel_verity_params"] == "", "theirs would be held against our image"
    told = done.to_dict()
    assert {name: set(vmms) for name, vmms in told["configurations"].items()} == {"go": {"qemu"}, "runtime-rs": {"clh"}}
    handlers = tomllib.loads(Path(told["containerd"]["go"]).read_text())["plugins"]["io.containerd.grpc.v1.cri"]
    assert set(handlers["containerd"]["runtimes"]) == {"osbuilder-qemu"}


def test_their_image_does_not_stay_beside_our_initramfs(tmp_path: Path) -> None:
    kata = make_kata(tmp_path / "kata", qemu="configuration-qemu.toml")
    install.install(make_build(tmp_path / "out"), tmp_path / "opt", root="initrd", kata=kata)
    section = configurations(tmp_path / "opt")["go", "qemu"]
    assert (section["image"], section["kernel_verity_params"]) == ("", "")
    assert Path(section["initrd"]).is_file()


def test_another_configuration_of_katas_is_another_version(tmp_path: Path) -> None:
    out, kata = make_build(tmp_path / "out"), make_kata(tmp_path / "kata", qemu="configuration-qemu.toml")
    install.install(out, tmp_path / "opt", kata=kata)
    assert not install.install(out, tmp_path / "opt", kata=kata).changed
    path = kata / "share/defaults/kata-containers/configuration-qemu.toml"
    path.write_text(path.read_text().replace("2048", "4096"))
    assert install.install(out, tmp_path / "opt", kata=kata).changed
    assert configurations(tmp_path / "opt")["go", "qemu"]["default_memory"] == 4096


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "no configuration of Kata's"),
        ("[hypervisor.acrn]\n", r"no section \[hypervisor.qemu\]"),
        ("a", "no TOML"),
    ],
)
def test_what_is_no_configuration_of_katas_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    kata = make_kata(tmp_path / "kata")
    if text is not None:
        (kata / "share/defaults/kata-containers/configuration-qemu.toml").write_text(text)
    with pytest.raises(InputError, match=says):
        install.install(make_build(tmp_path / "out"), tmp_path / "opt", kata=kata)
    assert not (tmp_path / "opt").exists()


# A host's own.
CONTAINERD = """version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "registry.example/pause:1"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""


@pytest.mark.parametrize("runtime", ["go", "runtime-rs"])
def test_containerd_reads_the_handlers(tmp_path: Path, runtime: str) -> None:
    containerd = shutil.which("containerd")
    if containerd is None:
        pytest.skip("containerd is not installed: Debian's package containerd")
    done = install.install(make_build(tmp_path / "out"), tmp_path / "opt")
    ours = done.to_dict()["containerd"][runtime]
    (tmp_path / "config.toml").write_text(CONTAINERD + Path(ours).read_text())
    told = subprocess.run(
        [containerd, "--config", str(tmp_path / "config.toml"), "config", "dump"], capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    plugin = tomllib.loads(told.stdout)["plugins"]["io.containerd.grpc.v1.cri"]
    assert plugin["sandbox_image"] == "registry.example/pause:1", "the host's own configuration counts no more"
    read = plugin["containerd"]["runtimes"]
    assert set(read) >= {"runc", "osbuilder-qemu", "osbuilder-clh", "osbuilder-firecracker"}
    for name, handler in read.items():
        if name.startswith("osbuilder-"):
            assert handler["runtime_type"] == "io.containerd.kata.v2"
            assert handler["privileged_without_host_devices"] is True
            assert Path(handler["options"]["ConfigPath"]).is_file()


# The words that the Go runtime makes for an NVDIMM of ext4: kata-contract 5.1.
ROOT_WORDS = ("root=/dev/pmem0p1", "rootflags=dax,data=ordered,errors=remount-ro", "ro", "rootfstype=ext4")


@pytest.mark.boot
@pytest.mark.parametrize("root", ["image", "initrd"])
def test_what_a_configuration_names_boots_with_katas_words_and_ours(
    root: str, boot_kernel: Kernel, good_image: DiskImage, good_initrd: Initrd, tmp_path: Path
) -> None:
    files = {
        "vmlinux": boot_kernel.vmlinux.path, "vmlinuz": boot_kernel.vmlinuz.path, "config": boot_kernel.config.path,
        "rootfs.img": good_image.file.path, "initrd.img": good_initrd.file.path,
    }  # fmt: skip
    install.install(make_build(tmp_path / "out", files=files), tmp_path / "opt", root=root)
    section = configurations(tmp_path / "opt")["go", "qemu"]
    params = tuple(section["kernel_params"].split())
    file = File.of(Path(section[root]))
    booted: DiskImage | Initrd
    if root == "image":
        assert section["disable_image_nvdimm"] is False
        booted = dataclasses.replace(good_image, file=file, words=(*ROOT_WORDS, *params))
    else:
        booted = dataclasses.replace(good_initrd, file=file, words=params)
    kernel = dataclasses.replace(boot_kernel, vmlinux=File.of(Path(section["kernel"])))
    report = smoke.run(Machine(kernel=kernel, root=booted, accel="tcg"), tmp_path / "work", seconds=60)
    assert report.verdict is Verdict.passed, report
    assert guests_alive(tmp_path) == []
