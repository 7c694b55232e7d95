"""A kernel without CONFIG_FS_DAX, and an image that is to be mounted with it: the cause is named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Final

import pytest

from osbuild import autopsy, smoke
from osbuild.arch import X86_64
from osbuild.artifacts import Kernel, Rootfs
from osbuild.cache import default_cache
from osbuild.errors import HostError
from osbuild.filesystem import FILESYSTEMS
from osbuild.kernel import KernelSpec, build_kernel, configure, default_spec
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.report import Verdict
from osbuild.runtime.base import Machine
from tests.boot_fixtures import boot_rootfs

__all__ = ["boot_rootfs"]  # a fixture

OFF: Final = ("CONFIG_FS_DAX", "CONFIG_FUSE_DAX")  # the second wants the first


def spec_without_dax(home: Path) -> KernelSpec:
    """The default kernel, of which two fragments are changed: one that asks for the contrary is refused."""
    spec = default_spec(X86_64)
    fragments = []
    for path in spec.fragments:
        text = path.read_text()
        for symbol in OFF:
            text = text.replace(f"{symbol}=y\n", f"# {symbol} is not set\n")
        if text != path.read_text():
            path = home / path.name
            path.write_text(text)
        fragments.append(path)
    assert sum(path.parent == home for path in fragments) == 2
    return dataclasses.replace(spec, fragments=tuple(fragments))


@pytest.mark.slow
def test_dax_can_be_turned_off_in_our_configuration(kernel: Kernel, tmp_path: Path) -> None:
    try:
        config = configure(spec_without_dax(tmp_path), default_cache())
    except HostError as problem:
        pytest.skip(f"{problem}: {problem.hint}")
    assert "# CONFIG_FS_DAX is not set\n" in config
    assert "CONFIG_FS_DAX=y\n" in kernel.config.path.read_text()


@pytest.mark.compiles
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kind", ["ext4", "erofs"])
def test_a_kernel_without_dax_is_named_as_the_cause(kind: str, boot_rootfs: Rootfs, tmp_path: Path) -> None:
    spec = spec_without_dax(tmp_path)
    kernel = build_kernel(spec, default_cache())
    filesystem = FILESYSTEMS[kind]
    plan = filesystem.plan(boot_rootfs.tree, start=FILESYSTEM_START, epoch=0)
    root = build_nvdimm_image(filesystem, plan, tmp_path / "root.img", name=kind)
    machine = Machine(kernel=kernel, root=root, accel="tcg")
    report = smoke.run(machine, tmp_path / "work", checks=("dax",), seconds=120)
    assert report.verdict is Verdict.failed
    assert report.cause is not None
    assert (report.cause.name, report.cause.certain) == ("dax-unsupported", True), report.cause


@pytest.mark.parametrize(
    "said",
    [
        "EXT4-fs: dax option not supported",  # fs/ext4/super.c
        "erofs: dax options not supported",  # fs/erofs/super.c
        "XFS (pmem0p1): unknown mount option [dax].",  # fs/xfs/xfs_super.c
    ],
)
def test_what_each_filesystem_says_without_dax_is_known(said: str) -> None:
    """As Linux 6.12 words it where CONFIG_FS_DAX is off."""
    console = f"[    0.900000] {said}\n[    0.910000] Kernel panic - not syncing: VFS: Unable to mount root fs\n"
    cause = autopsy.explain(autopsy.Evidence(console=console, status=0))
    assert cause.name == "dax-unsupported"
