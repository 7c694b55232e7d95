"""The steps of a build that are about the kernel; `osbuilder kernel build` takes no others, and imports no others."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from osbuild.artifacts import Kernel
from osbuild.cache import Cache
from osbuild.console import Show
from osbuild.errors import SpecError
from osbuild.kernel import KernelSpec, build_kernel, default_spec, read_fragments
from osbuild.spec import BuildSpec
from osbuild.workspace import copy_file


def kernel_spec(spec: BuildSpec) -> KernelSpec:
    """The kernel that a build takes."""
    return default_spec(spec.arch, features=spec.features, source=spec.kernel_source, keyring=spec.keyring)


def check_modules(spec: BuildSpec) -> None:
    """SpecError for a guest that is given modules and a kernel that loads none."""
    if spec.rootfs.modules is None:
        return
    asked = read_fragments(kernel_spec(spec).fragments)
    if not any((one.symbol, one.value) == ("CONFIG_MODULES", "y") for one in asked):
        raise SpecError(
            "the kernel of this build loads no modules (CONFIG_MODULES is not set)",
            hint="--with gpu gives one that does; or leave --modules out",
        )


def make_kernel(wanted: KernelSpec, cache: Cache, show: Show) -> Kernel:
    """The kernel, as it lies in the cache."""
    with show.step("building the kernel", name="kernel") as step:
        kernel = build_kernel(wanted, cache, show=step.advance)
        step.note = f"{kernel.release}, {'from the cache' if kernel.cached else 'compiled'}"
    return kernel


def copy_kernel(kernel: Kernel, out: Path, *, extras: bool = False) -> Kernel:
    """The same kernel in a directory of the user's; with `extras` also System.map and kernel.json."""
    return dataclasses.replace(
        kernel,
        vmlinux=copy_file(kernel.vmlinux, out / "vmlinux"),
        vmlinuz=copy_file(kernel.vmlinuz, out / "vmlinuz"),
        config=copy_file(kernel.config, out / "config"),
        extras=tuple(copy_file(file, out / file.path.name) for file in kernel.extras) if extras else (),
    )
