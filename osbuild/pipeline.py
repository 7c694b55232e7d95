"""The whole program on one page: an image in; a DAX image, an initramfs, a kernel and the proof that they boot out."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import manifest, smoke
from osbuild.agent import build_agent, install_agent
from osbuild.arch import MIB
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.cache import Cache
from osbuild.console import Show, size_text
from osbuild.errors import HostError, SpecError
from osbuild.filesystem import FILESYSTEMS
from osbuild.initrd import build_initrd
from osbuild.kernel import build_kernel, default_spec
from osbuild.manifest import LOCK, MANIFEST, NAMES
from osbuild.nvdimm_image import build_nvdimm_image, filesystem_start
from osbuild.output import sync_directory, writing
from osbuild.report import Report, SmokeReport, Verdict
from osbuild.rootfs import assemble_rootfs
from osbuild.runtime.base import Machine
from osbuild.sources import open_image
from osbuild.sources.image import SourceImage
from osbuild.spec import BuildSpec, GuestSpec
from osbuild.tree import quote

_OURS: Final = frozenset((*NAMES.values(), "vmlinux", "vmlinuz", "config", MANIFEST, LOCK, "smoke"))
_LEAST_MEMORY_MIB: Final = 256  # the least Kata gives a guest


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What a build made, and what came of booting it (None when that was not wanted)."""

    out: Path
    manifest: dict[str, Any]  # JSON
    report: Report | None


def build(spec: BuildSpec, cache: Cache, show: Show) -> Build:
    """All of it. The report says whether the guests were right; everything else that goes wrong is raised."""
    with workspace(spec.out) as out:
        with show.step(f"opening {spec.image}", name="open") as step:
            image = open_image(spec.image, spec.arch)
            step.note = f"{len(image.layers)} layers"
        rootfs = make_rootfs(spec, image, cache, show)
        kernel = make_kernel(spec, cache, show, out)
        roots: dict[str, DiskImage | Initrd] = {}
        if "image" in spec.kinds:
            roots["image"] = make_image(spec, rootfs, out / NAMES["image"], show)
        if "initrd" in spec.kinds:
            roots["initrd"] = make_initrd(spec, rootfs, out / NAMES["initrd"], show)
        report = None
        if spec.smoke:
            boots = tuple(boot(spec.guest, kernel, name, root, out, show) for name, root in roots.items())
            report = Report(boots=boots)
            report.write(out / "smoke")
        manifest.write_lock(out, spec, rootfs, kernel, image)
        document = manifest.write(out, rootfs, kernel, roots, image)
        return Build(out=spec.out, manifest=document, report=report)


def boot_again(out: Path, wishes: GuestSpec, show: Show) -> Report:
    """Boot what an earlier build made. InputError when there is no such build, or its files are not what it wrote."""
    with show.step(f"checking {out}", name="check"):
        kernel, roots = manifest.read(out)
    with locked(out):
        boots = tuple(boot(wishes, kernel, name, root, out.absolute(), show) for name, root in roots.items())
        report = Report(boots=boots)
        report.write(out / "smoke")
    return report


def make_rootfs(spec: BuildSpec, image: SourceImage, cache: Cache, show: Show) -> Rootfs:
    """The guest's tree with the agent in it."""
    epoch = _created(image) if spec.epoch is None else spec.epoch
    with show.step("assembling the root filesystem", name="rootfs") as step:
        rootfs = assemble_rootfs(image, epoch=epoch, clamp=spec.epoch is not None)
        step.note = f"{len(rootfs.tree)} entries"
    with show.step("installing the agent", name="agent") as step:
        rootfs = install_agent(rootfs, build_agent(spec.arch, cache))
        step.note = rootfs.agent
    return rootfs


def make_image(spec: BuildSpec, rootfs: Rootfs, out: Path, show: Show) -> DiskImage:
    """The DAX image."""
    filesystem = FILESYSTEMS[spec.filesystem]
    with show.step(f"writing {out.name}", name="image") as step:
        plan = filesystem.plan(rootfs.tree, start=filesystem_start(), epoch=rootfs.epoch)
        image = build_nvdimm_image(filesystem, plan, out, name=spec.filesystem, align=spec.align)
        step.note = f"{spec.filesystem}, {size_text(image.file.size)}"
    return image


def make_initrd(spec: BuildSpec, rootfs: Rootfs, out: Path, show: Show) -> Initrd:
    """The initramfs."""
    with show.step(f"writing {out.name}", name="initrd") as step:
        initrd = build_initrd(rootfs, out, compress=spec.compress)
        step.note = f"{spec.compress}, {size_text(initrd.file.size)}"
    return initrd


def make_kernel(spec: BuildSpec, cache: Cache, show: Show, out: Path | None = None) -> Kernel:
    """The kernel; with `out`, copied there from the cache."""
    with show.step("building the kernel", name="kernel") as step:
        wanted = default_spec(spec.arch, features=spec.features, source=spec.kernel_source)
        kernel = build_kernel(wanted, cache, show=step.advance)
        step.note = f"{kernel.release}, {'from the cache' if kernel.cached else 'compiled'}"
        if out is None:
            return kernel
        return Kernel(
            vmlinux=_copy(kernel.vmlinux, out / "vmlinux"),
            vmlinuz=_copy(kernel.vmlinuz, out / "vmlinuz"),
            config=_copy(kernel.config, out / "config"),
            release=kernel.release, arch=kernel.arch, key=kernel.key, cached=kernel.cached,
        )  # fmt: skip


def boot(wishes: GuestSpec, kernel: Kernel, name: str, root: DiskImage | Initrd, out: Path, show: Show) -> SmokeReport:
    """Boot one root and ask its agent; a guest that fails is a report, not an error."""
    machine = Machine(
        kernel=kernel, root=root, memory_mib=wishes.memory_mib or memory_for(root, kernel), cpus=wishes.cpus,
        accel=wishes.accel,
    )  # fmt: skip
    with show.step(f"booting the {name}", name=f"boot {name}") as step:
        report = smoke.run(machine, out / "smoke" / name, name=name, seconds=wishes.seconds)
        step.bad = report.verdict is not Verdict.passed
        step.note = f"{report.verdict}: {report.reason}" if step.bad else report.accel.name
    return report


def memory_for(root: DiskImage | Initrd, kernel: Kernel) -> int:
    """MiB that a guest gets when nobody says how much: an initramfs needs room for itself twice while it unpacks."""
    if isinstance(root, DiskImage):
        return _LEAST_MEMORY_MIB
    needed = 2 * root.unpacked + root.file.size + kernel.vmlinux.size
    return max(_LEAST_MEMORY_MIB, -(-needed // (64 * MIB)) * 64 + 64)


@contextlib.contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """The output directory, ours alone for the length of the block, without what an earlier or killed build left."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise SpecError(f"{quote(str(out))} exists and is not a directory", hint="name another with -o") from None
    except OSError as problem:
        raise HostError(f"cannot make {quote(str(out))}: {problem.strerror}", hint="name another with -o") from problem
    with locked(out):
        _sweep(out)
        yield out.absolute()


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Nobody else builds or boots in this directory meanwhile; the lock dies with its process."""
    if not os.access(out, os.W_OK | os.X_OK):
        raise HostError(f"{quote(str(out))} cannot be written to", hint="name another directory")
    handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise HostError(f"another osbuilder is at work in {quote(str(out))}") from None
    finally:
        os.close(handle)


def _sweep(out: Path) -> None:
    names = sorted(os.listdir(out))
    strange = [name for name in names if name not in _OURS and not _is_temporary(name)]
    if strange:
        raise SpecError(
            f"{quote(str(out))} holds {quote(strange[0])}, which is no output of ours",
            hint="name an empty directory, or one of an earlier build, with -o",
        )
    (out / MANIFEST).unlink(missing_ok=True)  # first: from now on nothing here is proof of anything
    sync_directory(out)
    for name in names:
        path = out / name
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
        else:
            shutil.rmtree(path)


def _is_temporary(name: str) -> bool:
    return any(name.startswith(f".{ours}.") for ours in _OURS)


def _copy(file: File, out: Path) -> File:
    with writing(out) as descriptor, file.path.open("rb") as source:
        offset = 0
        while offset < file.size:
            done = os.copy_file_range(source.fileno(), descriptor, file.size - offset)
            if done == 0:
                break
            offset += done
    return File(path=out, size=file.size, sha256=file.sha256)


def _created(image: SourceImage) -> int:
    """When the image says it was made, in seconds since 1970; 0 when it does not."""
    text = str(image.config.document.get("created", ""))
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return 0
    return min(max(int(moment.timestamp()), 0), (1 << 32) - 1) if moment.tzinfo else 0
