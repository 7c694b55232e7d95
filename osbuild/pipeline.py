"""The whole program on one page: an image in; a DAX image, an initramfs, a kernel and the proof that they boot out."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import command, lock, manifest, records, smoke
from osbuild.agents import BUILTIN, check_agent, find_agent
from osbuild.arch import MIB, find_arch
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.bootable import Problem, problems, workload_problems
from osbuild.cache import Cache
from osbuild.checks import GUESTS, prepare, select, share
from osbuild.console import Seen, Show, size_text
from osbuild.errors import InputError, SpecError
from osbuild.filesystem import FILESYSTEMS
from osbuild.initrd import build_initrd
from osbuild.kernel import KernelInputs, check_features
from osbuild.kernel import find_inputs as find_kernel_inputs
from osbuild.kernel_steps import check_modules, copy_kernel, kernel_spec, make_kernel
from osbuild.least_memory import find as find_in_memory
from osbuild.manifest import NAMES
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.oci import Platform
from osbuild.report import REPORT, Check, Report, SmokeReport, Verdict
from osbuild.report_page import write_page
from osbuild.rootfs import Explained, assemble_rootfs, explain
from osbuild.runtime import RUNTIMES
from osbuild.runtime.base import Machine, least_memory, make_nonce
from osbuild.shared_roots import SharedRoots
from osbuild.sources import check_apart, find_source, open_image
from osbuild.sources.image import SourceImage, Want
from osbuild.spec import BuildSpec, DiskSpec, GuestSpec
from osbuild.tree import quote
from osbuild.wishes import check_policy
from osbuild.workload import workload
from osbuild.workspace import locked, make_room, replace_outputs, workspace

VMM: Final = "qemu"
_LEAST_MEMORY_MIB: Final = 256  # the least Kata gives a guest
_NO_GUEST_MIB: Final = 16  # in which no kernel of ours gets as far as its first process


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """What a build made, and what came of booting it (None when that was not wanted)."""

    out: Path
    manifest: dict[str, Any]  # JSON
    lock: dict[str, Any]  # JSON
    compiled: bool  # the kernel; else it was in the cache
    report: Report | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Everything that goes into a build, known before anything is compiled or written."""

    image: SourceImage
    rootfs: Rootfs
    kernel: KernelInputs
    lock: dict[str, Any]  # JSON


def build(
    spec: BuildSpec, cache: Cache, show: Show, *, inputs: Inputs | None = None, shared: SharedRoots | None = None
) -> Build:
    """All of it. The report says whether the guests were right; everything else that goes wrong is raised.

    What an earlier build left in the directory goes when all of this one is there, not before.
    inputs: what `find_inputs` found for the same spec. shared: where roots lie that other builds have, too.
    """
    shared = shared or SharedRoots()
    check_apart(spec.image, spec.out)
    check_features(spec.arch, spec.features)
    check_modules(spec)
    locked_inputs = lock.read(spec.lock) if spec.lock is not None else None
    if locked_inputs is not None:
        spec = lock.pin(spec, locked_inputs)
    with workspace(spec.out) as out:
        if spec.smoke:
            RUNTIMES[VMM].ready(spec.arch, spec.guest.accel)
        if "image" in spec.kinds:
            check_host(spec.disk)
        inputs = inputs or find_inputs(spec, cache, show)
        image, rootfs = inputs.image, inputs.rootfs
        if locked_inputs is not None and spec.lock is not None:
            lock.refuse_what_differs(locked_inputs, inputs.lock, spec.lock)
        kernel = make_kernel(kernel_spec(spec), cache, show)
        new = make_room(out)
        kernel = copy_kernel(kernel, new)
        roots: dict[str, DiskImage | Initrd] = {}
        if "image" in spec.kinds:
            roots["image"] = shared.root(
                "image", inputs.lock, new / NAMES["image"], show, lambda path: make_image(spec, rootfs, path, show)
            )
        if "initrd" in spec.kinds:
            roots["initrd"] = shared.root(
                "initrd", inputs.lock, new / NAMES["initrd"], show, lambda path: make_initrd(spec, rootfs, path, show)
            )
        if spec.smoke:
            check_guests(spec.guest, kernel, roots, rootfs.agent)
        replace_outputs(out)
        kernel, roots = moved(kernel, roots, out)
        report = boot_all(spec.guest, kernel, roots, out, rootfs.agent, show) if spec.smoke else None
        document = manifest.describe(rootfs, kernel, roots, image)
        records.write(out, document, inputs.lock, image.tree, inputs.kernel.patches)
        compiled = not kernel.cached
        return Build(out=spec.out, manifest=document, lock=inputs.lock, compiled=compiled, report=report)


def find_inputs(spec: BuildSpec, cache: Cache, show: Show) -> Inputs:
    """What a build would take."""
    image = open_source(spec, cache, show)
    rootfs = make_rootfs(spec, image, cache, show)
    kernel = find_kernel_inputs(kernel_spec(spec), cache)
    return Inputs(image=image, rootfs=rootfs, kernel=kernel, lock=lock.describe(spec, image, rootfs, kernel))


def open_source(spec: BuildSpec, cache: Cache, show: Show) -> SourceImage:
    """The image, checked and flattened."""
    check_policy(spec.rootfs)
    check_agent(spec.rootfs.agent)
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
    RUNTIMES[VMM].ready(find_arch(kernel.arch), wishes.accel)
    check_guests(wishes, kernel, roots, agent)
    with locked(out):
        return boot_all(wishes, kernel, roots, out.absolute(), agent, show)


def boot_here(out: Path, name: str, wishes: GuestSpec, show: Show) -> int:
    """Boot one of them with its console on this terminal; the VMM's exit code."""
    from osbuild import boot_console

    with show.step(f"checking {out}", name="check"):
        kernel, roots, _ = manifest.read(out)
    ways = ways_to_boot(roots, kernel.arch, wishes)
    if name and name not in ways:
        raise SpecError(f"no {quote(name)} can be booted", hint=f"one of {', '.join(ways)}")
    machine = machine_for(wishes, kernel, ways[name or next(iter(ways))])
    return boot_console.attach(machine, lambda: show.say("Ctrl-A x ends the guest"))


def find_least_memory(out: Path, wishes: GuestSpec, show: Show) -> dict[str, int]:
    """The least MiB with which each root boots; 0 where what it usually gets is not enough. The manifest keeps it."""
    with show.step(f"checking {out}", name="check"):
        kernel, roots, agent = manifest.read(out)
    check_guests(wishes, kernel, roots, agent)
    ways = ways_to_boot(roots, kernel.arch, wishes)
    found: dict[str, int] = {}
    with locked(out):
        for name, root in ((name, ways[name]) for name in roots):
            machine = dataclasses.replace(machine_for(wishes, kernel, root), agent=agent)
            low = max(-(-least_memory(root, kernel) // MIB), _NO_GUEST_MIB)
            with show.step(f"booting the {name} with less and less memory", name=f"memory {name}") as step:
                found[name], tried = find_in_memory(
                    low, machine.memory_mib, _booter(machine, out, name, wishes.seconds)
                )
                step.bad = not found[name]
                step.note = f"{found[name]} MiB, after {len(tried)} boots"
        manifest.remember(out, {name: {"least_memory_mib": mib} for name, mib in found.items() if mib})
    return found


def _booter(machine: Machine, out: Path, name: str, seconds: float) -> Callable[[int], bool]:
    """Whether the machine boots with so many MiB. After the first boot, silence is waited for a few times that long."""
    patience = [seconds]

    def boots(memory_mib: int) -> bool:
        tried = dataclasses.replace(machine, memory_mib=memory_mib, nonce=make_nonce())
        try:
            report = smoke.run(
                tried, out / "smoke" / f"{name}-memory", name=name, seconds=patience[0], checks=("agent.details",)
            )
        except SpecError:  # it is known before it starts
            return False
        if report.verdict is Verdict.passed:
            patience[0] = min(seconds, 4 * report.seconds + 2)
        return report.verdict is Verdict.passed

    return boots


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
        raise InputError("this tree would not boot: " + "; ".join(problem.text for problem in found), hint=hint)


def make_image(spec: BuildSpec, rootfs: Rootfs, out: Path, show: Show) -> DiskImage:
    """The disk image."""
    disk = spec.disk
    filesystem = FILESYSTEMS[disk.filesystem]
    with show.step(f"writing {out.name}", name="image") as step:
        plan = filesystem.plan(rootfs.tree, start=FILESYSTEM_START, epoch=rootfs.epoch, dax=disk.header, room=disk.room)
        image = build_nvdimm_image(
            filesystem, plan, out, name=disk.filesystem, align=disk.align, total=disk.size, header=disk.header,
            hashed=disk.verity, salt=disk.salt, writable=disk.writable, file_format=disk.format, words=rootfs.words,
            needs=rootfs.tree.stored_size(),
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
            step.note += f"; without {initrd.skipped} socket{'s' * (initrd.skipped > 1)}"
    return initrd


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
    ways = ways_to_boot(roots, kernel.arch, wishes)
    if package := _demoted(roots, kernel.arch, wishes):
        show.say(f"note: without {package} there is no NVDIMM for {kernel.arch} here: the image boots as a disk")
    (out / "smoke" / REPORT).unlink(missing_ok=True)  # what lies beside it is about to change
    each = wishes_of_each(wishes, ways)
    boots = tuple(boot(each[name], kernel, name, root, out, agent, show) for name, root in ways.items())
    if any(one.machine.get("sandbox") == "off" for one in boots):
        show.say("note: this QEMU was built without seccomp: it ran these guests without a sandbox")
    report = Report(boots=boots)
    images = [root.file.path for root in roots.values()]
    report.write(out / "smoke", page=lambda: write_page(out / "smoke", report.to_dict(), images))
    return report


def ways_to_boot(
    roots: Mapping[str, DiskImage | Initrd], arch: str, wishes: GuestSpec
) -> dict[str, DiskImage | Initrd]:  # fmt: skip
    """Each root, and an image once more through its hash tree, or as the disk that can be written to."""
    if wishes.attach in ("nvdimm", "virtio-pmem") and any(
        isinstance(root, DiskImage) and not root.dax for root in roots.values()
    ):
        raise SpecError(
            f"this image is a disk, and cannot be attached by {wishes.attach}",
            hint="leave --attach out; or build it raw, without --no-dax-header",
        )
    disk = wishes.as_disk or bool(_demoted(roots, arch, wishes))
    found = {name: root.as_disk() if disk and isinstance(root, DiskImage) else root for name, root in roots.items()}
    for name, root in roots.items():
        if isinstance(root, DiskImage) and root.verity is not None:
            found[f"{name}-verity"] = root.through_verity()
        if isinstance(root, DiskImage) and root.writable and root.dax and not disk:
            found[f"{name}-disk"] = root.as_disk()
    return found


def wishes_of_each(wishes: GuestSpec, ways: Mapping[str, DiskImage | Initrd]) -> dict[str, GuestSpec]:
    """What is asked of each: its share of the checks, and of several guests."""
    shares, several = share(wishes.checks, ways), share((GUESTS,), ways)
    return {
        name: dataclasses.replace(wishes, checks=shares[name], guests=wishes.guests if GUESTS in several[name] else 1)
        for name in ways
    }


def _demoted(roots: Mapping[str, DiskImage | Initrd], arch: str, wishes: GuestSpec) -> str:
    """The package that is missing for an image to be the NVDIMM that it could be; empty when none is."""
    wanted = any(isinstance(root, DiskImage) and root.dax for root in roots.values())
    if not wanted or wishes.as_disk or wishes.attach == "virtio-pmem":
        return ""
    return RUNTIMES[VMM].missing_for_nvdimm(find_arch(arch))


def boot(
    wishes: GuestSpec, kernel: Kernel, name: str, root: DiskImage | Initrd, out: Path, agent: str, show: Show
) -> SmokeReport:
    """Boot one root and ask its agent; a guest that fails is a report, not an error."""
    machine = dataclasses.replace(machine_for(wishes, kernel, root), agent=agent)
    with show.step(f"booting the {name}", name=f"boot {name}") as step:

        def checked(check: Check, at: float) -> None:
            step.seen(Seen(what=check.name, at=at, verdict=str(check.verdict), detail=check.detail))

        report = smoke.run(
            machine, out / "smoke" / name, name=name, seconds=wishes.seconds, checks=wishes.checks,
            guests=wishes.guests, on_event=lambda event: step.seen(Seen(what=event.name, at=event.seconds)),
            on_check=checked,
        )  # fmt: skip
        step.bad = report.verdict is not Verdict.passed
        step.note = str(report.verdict) if step.bad else report.accel.name  # the reason is in the report
    return report


def check_guests(wishes: GuestSpec, kernel: Kernel, roots: Mapping[str, DiskImage | Initrd], agent: str) -> None:
    """Everything about the guests that can be known without them; raised while the last build is still there, and
    the last report."""
    ways = ways_to_boot(roots, kernel.arch, wishes)
    for name, each in wishes_of_each(wishes, ways).items():
        machine = dataclasses.replace(machine_for(each, kernel, ways[name]), agent=agent)
        selected = select(each.checks, machine, asked=(GUESTS,) if each.guests > 1 else ())
        RUNTIMES[VMM].refuse_what_cannot_boot(prepare(machine, selected))


def machine_for(wishes: GuestSpec, kernel: Kernel, root: DiskImage | Initrd) -> Machine:
    """What to boot, as large as it was asked for, or as it needs."""
    memory = wishes.memory_mib or memory_for(root, kernel)
    return Machine(
        kernel=kernel, root=root, memory_mib=memory, cpus=wishes.cpus, accel=wishes.accel, transport=wishes.transport,
        network=wishes.network, board=wishes.machine,
        attach=wishes.attach if isinstance(root, DiskImage) and root.dax else "auto",
    )  # fmt: skip


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
