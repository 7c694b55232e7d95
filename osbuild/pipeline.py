"""The whole program on one page: an image in; a DAX image, an initramfs, a kernel and the proof that they boot out."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import command, manifest, smoke
from osbuild.agents import BUILTIN, find_agent
from osbuild.arch import MIB
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.bootable import Problem, problems, workload_problems
from osbuild.cache import Cache
from osbuild.console import Show, size_text
from osbuild.errors import InputError
from osbuild.filesystem import FILESYSTEMS
from osbuild.initrd import build_initrd
from osbuild.kernel import build_kernel, default_spec
from osbuild.manifest import NAMES
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.oci import Platform
from osbuild.report import Report, SmokeReport, Verdict
from osbuild.rootfs import Explained, assemble_rootfs, explain
from osbuild.runtime import RUNTIMES
from osbuild.runtime.base import Machine, least_memory
from osbuild.sources import check_apart, find_source, open_image
from osbuild.sources.image import SourceImage, Want
from osbuild.spec import BuildSpec, DiskSpec, GuestSpec
from osbuild.tree import Sparse, Tree
from osbuild.workload import workload
from osbuild.workspace import copy_file, locked, make_room, replace_outputs, workspace

VMM: Final = "qemu"
_LEAST_MEMORY_MIB: Final = 256  # the least Kata gives a guest


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What a build made, and what came of booting it (None when that was not wanted)."""

    out: Path
    manifest: dict[str, Any]  # JSON
    report: Report | None


def build(spec: BuildSpec, cache: Cache, show: Show) -> Build:
    """All of it. The report says whether the guests were right; everything else that goes wrong is raised.

    What an earlier build left in the directory goes when all of this one is there, not before.
    """
    check_apart(spec.image, spec.out)
    with workspace(spec.out) as out:
        if spec.smoke:
            RUNTIMES[VMM].ready(spec.arch, spec.guest.accel)
        if "image" in spec.kinds:
            check_host(spec.disk)
        image = open_source(spec, cache, show)
        rootfs = make_rootfs(spec, image, cache, show)
        kernel = make_kernel(spec, cache, show)
        new = make_room(out)
        kernel = copy_kernel(kernel, new)
        roots: dict[str, DiskImage | Initrd] = {}
        if "image" in spec.kinds:
            roots["image"] = make_image(spec, rootfs, new / NAMES["image"], show)
        if "initrd" in spec.kinds:
            roots["initrd"] = make_initrd(spec, rootfs, new / NAMES["initrd"], show)
        if spec.smoke:
            check_guests(spec.guest, kernel, roots)
        replace_outputs(out)
        kernel, roots = moved(kernel, roots, out)
        report = boot_all(spec.guest, kernel, roots, out, rootfs.agent, show) if spec.smoke else None
        manifest.write_lock(out, spec, rootfs, kernel, image)
        document = manifest.write(out, rootfs, kernel, roots, image)
        return Build(out=spec.out, manifest=document, report=report)


def open_source(spec: BuildSpec, cache: Cache, show: Show) -> SourceImage:
    """The image, checked and flattened."""
    platform = spec.platform or Platform(os="linux", architecture=spec.arch.oci)
    find_source(spec.image)  # before its name is shown: it is refused when it holds a password
    with show.step(f"opening {spec.image}", name="open") as step:
        want = Want(
            platform=platform, cache=cache, limits=spec.limits, registry=spec.registry, progress=step.advance
        )  # fmt: skip
        image = open_image(spec.image, want)
        layers = len(image.config.diff_ids)
        step.note = f"{len(image.tree)} entries" + (f" in {layers} layer{'s' * (layers > 1)}" if layers else "")
    return image


def open_rootfs(spec: BuildSpec, cache: Cache, show: Show) -> Rootfs:
    """The guest's tree, from the image's name."""
    return make_rootfs(spec, open_source(spec, cache, show), cache, show)


def boot_again(out: Path, wishes: GuestSpec, show: Show) -> Report:
    """Boot what an earlier build made. InputError when there is no such build, or its files are not what it wrote."""
    with show.step(f"checking {out}", name="check"):
        kernel, roots, agent = manifest.read(out)
    with locked(out):
        return boot_all(wishes, kernel, roots, out.absolute(), agent, show)


def make_rootfs(spec: BuildSpec, image: SourceImage, cache: Cache, show: Show) -> Rootfs:
    """The guest's tree with the agent in it."""
    epoch = _created(image) if spec.epoch is None else spec.epoch
    own = spec.rootfs.agent == BUILTIN
    with show.step("building the agent" if own else "reading the agent", name="agent") as step:
        agent = find_agent(spec.rootfs.agent, spec.arch, cache)
        step.note = "" if own else str(agent)
    with show.step("assembling the root filesystem", name="rootfs") as step:
        rootfs = assemble_rootfs(image, agent, epoch=epoch, clamp=spec.epoch is not None, wishes=spec.rootfs)
        check_bootable(rootfs, spec)
        step.note = f"{len(rootfs.tree)} entries, {rootfs.agent}"
        if rootfs.dropped_xattrs:
            dropped = ", ".join(f"{name} of {count}" for name, count in rootfs.dropped_xattrs.items())
            step.note += f"; dropped: {dropped}"
    for problem in program_problems(rootfs, image, spec):
        show.say(f"note: {problem.text}")
    return rootfs


def explain_rootfs(spec: BuildSpec, image: SourceImage, cache: Cache) -> tuple[Explained, ...]:
    """What each rule of the policy would do to this image."""
    epoch = _created(image) if spec.epoch is None else spec.epoch
    agent = find_agent(spec.rootfs.agent, spec.arch, cache)
    return explain(image, agent, epoch=epoch, clamp=spec.epoch is not None, wishes=spec.rootfs)


def program_problems(rootfs: Rootfs, image: SourceImage, spec: BuildSpec) -> tuple[Problem, ...]:
    """Why the image's own program could not run in this tree: the guest boots all the same."""
    found = workload(image.config, rootfs.tree.edit())
    if found is None:
        return ()
    path = next((word.removeprefix("PATH=") for word in found.env if word.startswith("PATH=")), "")
    return workload_problems(rootfs.tree, found.args[0], path, spec.arch, workdir=found.cwd)


def check_bootable(rootfs: Rootfs, spec: BuildSpec) -> None:
    """InputError with a sentence for each thing that would keep this tree from booting."""
    found = problems(rootfs.tree, rootfs.init, spec.arch, systemd=spec.rootfs.init == "systemd")
    if found:
        hint = next((problem.hint for problem in found if problem.hint), "")
        raise InputError("this tree would not boot: " + " ".join(problem.text for problem in found), hint=hint)


def make_image(spec: BuildSpec, rootfs: Rootfs, out: Path, show: Show) -> DiskImage:
    """The disk image."""
    disk = spec.disk
    filesystem = FILESYSTEMS[disk.filesystem]
    with show.step(f"writing {out.name}", name="image") as step:
        plan = filesystem.plan(rootfs.tree, start=FILESYSTEM_START, epoch=rootfs.epoch, dax=disk.header, room=disk.room)
        image = build_nvdimm_image(
            filesystem, plan, out, name=disk.filesystem, align=disk.align, total=disk.size, header=disk.header,
            hashed=disk.verity, salt=disk.salt, writable=disk.writable, file_format=disk.format, words=rootfs.words,
            needs=stored_size(rootfs.tree),
        )  # fmt: skip
        step.note = f"{disk.filesystem}, {size_text(image.file.size)}"
        if image.verity is not None:
            step.note += f", root hash {image.verity.root_hash}"
        if image.skipped:
            step.note += f"; without {image.skipped} socket{'s' * (image.skipped > 1)}"
    if disk.header and not image.dax:
        show.say(f"note: {disk.format} cannot be an NVDIMM; this image boots as a disk")
    elif disk.writable and image.dax:
        show.say("note: an NVDIMM is shared by guests and stays read-only; as a disk, a copy of it can be written to")
    return image


def stored_size(tree: Tree) -> int:
    """Bytes of all files, each once, without their holes: what an image of them takes at least."""
    contents = [entry.content for entry in set(tree.values())]
    return sum(
        sum(size for _, _, size in content.pieces) if isinstance(content, Sparse) else content.size
        for content in contents
    )


def check_host(disk: DiskSpec) -> None:
    """HostError, before any work, when a tool that the disk image needs is missing."""
    if disk.format != "raw":
        command.find("qemu-img", package="qemu-utils")


def make_initrd(spec: BuildSpec, rootfs: Rootfs, out: Path, show: Show) -> Initrd:
    """The initramfs."""
    with show.step(f"writing {out.name}", name="initrd") as step:
        initrd = build_initrd(rootfs, out, compress=spec.compress)
        step.note = f"{spec.compress}, {size_text(initrd.file.size)}"
        if initrd.lost_xattrs:  # newc has no place for them
            step.note += f"; without the extended attributes of {initrd.lost_xattrs} of its files"
        if initrd.skipped:
            step.note += f"; without {initrd.skipped} sockets"
    return initrd


def make_kernel(spec: BuildSpec, cache: Cache, show: Show) -> Kernel:
    """The kernel, as it lies in the cache."""
    with show.step("building the kernel", name="kernel") as step:
        wanted = default_spec(spec.arch, features=spec.features, source=spec.kernel_source)
        kernel = build_kernel(wanted, cache, show=step.advance)
        step.note = f"{kernel.release}, {'from the cache' if kernel.cached else 'compiled'}"
    return kernel


def copy_kernel(kernel: Kernel, out: Path) -> Kernel:
    """The same kernel in a directory of the user's."""
    return dataclasses.replace(
        kernel,
        vmlinux=copy_file(kernel.vmlinux, out / "vmlinux"),
        vmlinuz=copy_file(kernel.vmlinuz, out / "vmlinuz"),
        config=copy_file(kernel.config, out / "config"),
    )


def moved(
    kernel: Kernel, roots: Mapping[str, DiskImage | Initrd], out: Path
) -> tuple[Kernel, dict[str, DiskImage | Initrd]]:
    """The same files under their names in another directory."""

    def there(file: File) -> File:
        return dataclasses.replace(file, path=out / file.path.name)

    kernel = dataclasses.replace(
        kernel, vmlinux=there(kernel.vmlinux), vmlinuz=there(kernel.vmlinuz), config=there(kernel.config)
    )
    return kernel, {name: dataclasses.replace(root, file=there(root.file)) for name, root in roots.items()}


def boot_all(
    wishes: GuestSpec, kernel: Kernel, roots: Mapping[str, DiskImage | Initrd], out: Path, agent: str, show: Show
) -> Report:
    """Boot each root in turn; the report and its evidence lie in `out`/smoke afterwards."""
    boots = tuple(boot(wishes, kernel, name, root, out, agent, show) for name, root in ways_to_boot(roots).items())
    report = Report(boots=boots)
    report.write(out / "smoke")
    return report


def ways_to_boot(roots: Mapping[str, DiskImage | Initrd]) -> dict[str, DiskImage | Initrd]:
    """Each root, and an image once more through its hash tree, or as the disk that can be written to."""
    found = dict(roots)
    for name, root in roots.items():
        if isinstance(root, DiskImage) and root.verity is not None:
            found[f"{name}-verity"] = root.through_verity()
        if isinstance(root, DiskImage) and root.writable and root.dax:
            found[f"{name}-disk"] = root.as_disk()
    return found


def boot(
    wishes: GuestSpec, kernel: Kernel, name: str, root: DiskImage | Initrd, out: Path, agent: str, show: Show
) -> SmokeReport:
    """Boot one root and ask its agent; a guest that fails is a report, not an error."""
    machine = dataclasses.replace(machine_for(wishes, kernel, root), agent=agent)
    with show.step(f"booting the {name}", name=f"boot {name}") as step:
        report = smoke.run(machine, out / "smoke" / name, name=name, seconds=wishes.seconds, checks=wishes.checks)
        step.bad = report.verdict is not Verdict.passed
        step.note = str(report.verdict) if step.bad else report.accel.name  # the reason is in the report
    return report


def check_guests(wishes: GuestSpec, kernel: Kernel, roots: Mapping[str, DiskImage | Initrd]) -> None:
    """Everything about the guests that can be known without them; raised while the last build is still there."""
    for root in roots.values():
        RUNTIMES[VMM].refuse_what_cannot_boot(machine_for(wishes, kernel, root))


def machine_for(wishes: GuestSpec, kernel: Kernel, root: DiskImage | Initrd) -> Machine:
    """What to boot, as large as it was asked for, or as it needs."""
    memory = wishes.memory_mib or memory_for(root, kernel)
    return Machine(
        kernel=kernel, root=root, memory_mib=memory, cpus=wishes.cpus, accel=wishes.accel, transport=wishes.transport
    )


def memory_for(root: DiskImage | Initrd, kernel: Kernel) -> int:
    """MiB that a guest gets when nobody says how much: what it cannot do without, and room to breathe."""
    needed = least_memory(root, kernel)
    if isinstance(root, DiskImage):
        return _LEAST_MEMORY_MIB + -(-needed // MIB)
    return max(_LEAST_MEMORY_MIB, -(-needed // (64 * MIB)) * 64 + 64)


def _created(image: SourceImage) -> int:
    """When the image says it was made, in seconds since 1970; 0 when it does not."""
    text = str(image.config.document.get("created", ""))
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError:
        return 0
    return min(max(int(moment.timestamp()), 0), (1 << 32) - 1) if moment.tzinfo else 0
