"""Words in, one call, an exit code out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import osbuild
from osbuild import (
    cli_agent,
    cli_cache,
    cli_kernel,
    cli_lock,
    cli_matrix,
    cli_publish,
    cli_report,
    console,
    program,
    results,
)
from osbuild.cache import default_cache
from osbuild.errors import SpecError
from osbuild.options import (
    Force,
    Json,
    OutFile,
    Progress,
    Quiet,
    Words,
    build_spec,
    guest_spec,
    image_of,
    recipe_words,
    takes,
)
from osbuild.replacing import check_replaceable

if TYPE_CHECKING:  # what is slow to import is imported by the command that needs it
    from osbuild.pipeline import Build
    from osbuild.recipe import Dockerfile
    from osbuild.report import Report

app = typer.Typer(
    name="osbuilder",
    help="An ordinary Docker image in; a DAX image or an initramfs, a guest kernel, and the proof that they boot out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(cli_kernel.app, name="kernel")
app.add_typer(cli_agent.app, name="agent")
app.add_typer(cli_cache.app, name="cache")
app.command()(cli_lock.rebuild)
app.command()(cli_matrix.matrix)
app.command()(cli_report.report)
cli_publish.register(app)

Image = Annotated[
    str,
    typer.Argument(
        help="docker-daemon:NAME, docker://NAME, docker-archive:FILE, oci:PATH[:TAG], dir:PATH, or a NAME: the Docker "
        "daemon's if one answers, else a registry's"
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="the directory for all that is made")]


@app.callback(invoke_without_command=True)
def start(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        sys.stdout.write(f"osbuilder {osbuild.__version__}\n")
        raise typer.Exit


@app.command()
@takes("image", "recipe", "output", "disk", "initramfs", "rootfs", "kernel", "guest", "registry")
def build(
    words: Words,
    image: Image = "",
    out: Out = Path("osbuilder-out"),
    depfile: Annotated[
        Path | None, typer.Option("--depfile", metavar="FILE", help="write the files that were read, for make")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace the --depfile, whatever it is")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """Make everything, and boot it: the main command.

    A root filesystem with the agent in it, as a DAX image and as an initramfs; a kernel; and a boot of each.

    Exit code: 0 every guest passed (or none was booted); 6 a guest was wrong; 7 a guest was silent; 2 usage; 3 the
    image was refused; 4 this machine lacks something; 5 a build step failed.
    """
    from osbuild import depfile as for_make
    from osbuild import manifest, pipeline

    show = console.Show(quiet=quiet, progress=progress)
    if depfile is not None:
        check_replaceable(depfile, "rules", force=force)
    spec = build_spec(_image(image, words, show), out, words)
    if depfile is not None:
        for_make.check(spec, words.get("config"))
    result = pipeline.build(spec, default_cache(), show)
    if depfile is not None:
        made = (manifest.MANIFEST, *result.manifest["outputs"])
        for_make.write(depfile, spec, (out / name for name in made), words.get("config"))
    if as_json:
        console.print_json(_build_json(result, show))
    else:
        results.print_build(result, show)
    raise typer.Exit(result.report.code if result.report else 0)


@app.command()
@takes("image", "recipe", "rootfs", "registry")
def rootfs(
    words: Words,
    image: Image = "",
    raw: Annotated[bool, typer.Option("--raw", help="the image itself: flattened, before policy and agent")] = False,
    tar: Annotated[Path | None, typer.Option("--tar", help="write the tree as a tar; - for standard output")] = None,
    force: Force = False,
    explain: Annotated[bool, typer.Option("--explain", help="what each rule of the policy does, and why")] = False,
    render: Annotated[bool, typer.Option("--render", help="only print the recipe's Dockerfile")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """What the guest's tree will be: a list, JSON, or a tar.

    JSON: {"digest": …, "config": …, "entries": {path: …}}.
    """
    from osbuild import listing, pipeline
    from osbuild.sources import check_apart
    from osbuild.tar_writer import archive

    if render:
        sys.stdout.write(_dockerfile(words).text)
        return
    if explain and (raw or tar is not None):
        raise SpecError("--explain is about the policy: no --raw and no --tar beside it", hint="run it once for each")
    if tar is not None:
        if as_json and str(tar) == "-":
            raise SpecError("--json and --tar - both want standard output", hint="write the tar to a file")
        results.check_tar(tar, force=force)
    show = console.Show(quiet=quiet, progress=progress)
    spec = build_spec(_image(image, words, show), Path(), words, smoke=False)
    if tar is not None and str(tar) != "-":
        check_apart(spec.image, tar)
    source = pipeline.open_source(spec, default_cache(), show)
    if explain:
        rules = pipeline.explain_rootfs(spec, source, default_cache())
        if as_json:
            console.print_json([rule.to_dict() for rule in rules])
        else:
            results.print_rules(rules)
        return
    tree = source.tree if raw else pipeline.make_rootfs(spec, source, default_cache(), show).tree
    if tar is not None:
        results.write_tar(tar, archive(tree))
    if as_json:
        entries = listing.entries(tree)
        console.print_json({"digest": source.digest, "config": source.config.document, "entries": entries})
    elif tar is None:
        console.print_lines(listing.lines(tree))


@app.command()
@takes("image", "recipe", "disk", "rootfs", "registry")
def image(
    words: Words,
    image: Image = "",
    out: OutFile = Path("guest.img"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """Only the disk image, with the agent in it.

    An NVDIMM that guests map with DAX and an ordinary disk: the same bytes, two views.
    JSON: {"path", "size", "sha256", "filesystem", "dax", "format", "writable", "skipped", "words", "disk_words",
    "verity"}: words boot it as an NVDIMM when it can be one, disk_words and verity.words as a disk; verity.params is
    Kata's kernel_verity_params.
    """
    from osbuild import manifest, pipeline
    from osbuild.sources import check_apart

    show = console.Show(quiet=quiet, progress=progress)
    check_replaceable(out, "image", force=force)
    spec = build_spec(_image(image, words, show), out.parent, words, kinds=("image",), smoke=False)
    check_apart(spec.image, out)
    pipeline.check_host(spec.disk)
    disk = pipeline.make_image(spec, pipeline.open_rootfs(spec, default_cache(), show), out, show)
    results.print_file(disk.file, manifest.about_disk(disk) | {"words": list(disk.words)}, as_json=as_json)
    if disk.verity is not None and not as_json:
        console.print_lines([disk.verity.params])


@app.command()
@takes("image", "recipe", "initramfs", "rootfs", "registry")
def initrd(
    words: Words,
    image: Image = "",
    out: OutFile = Path("guest.initrd"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """Only the initramfs, with the agent in it.

    JSON: {"path", "size", "sha256", "compression", "unpacked", "entries", "memory", "skipped", "lost_xattrs"}: memory
    is what a guest needs to unpack it, in bytes; skipped are sockets; lost_xattrs, inodes with attributes that it
    cannot hold.
    """
    from osbuild import pipeline
    from osbuild.sources import check_apart

    show = console.Show(quiet=quiet, progress=progress)
    check_replaceable(out, "initramfs", force=force)
    spec = build_spec(_image(image, words, show), out.parent, words, kinds=("initrd",), smoke=False)
    check_apart(spec.image, out)
    made = pipeline.make_initrd(spec, pipeline.open_rootfs(spec, default_cache(), show), out, show)
    about = {
        "compression": made.compression, "unpacked": made.unpacked, "entries": made.entries, "memory": made.memory,
        "skipped": made.skipped, "lost_xattrs": made.lost_xattrs,
    }  # fmt: skip
    results.print_file(made.file, about, as_json=as_json)


@app.command()
@takes("guest")
def boot(
    words: Words,
    out: Annotated[Path, typer.Argument(help="the directory of a build")],
    root: Annotated[str, typer.Option("--root", help="image, initrd, image-verity, …; the first when not given")] = "",
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """Boot what a build made with its console on this terminal.

    Ctrl-A x ends it, Ctrl-A h says what else there is; what is typed goes to the guest. Its agent is not asked, and it
    has no network card: --network and what else a test of it takes are said to do nothing.

    Exit code: QEMU's, 0 when the guest or the person ended it.
    """
    from osbuild import pipeline

    show = console.Show(quiet=quiet, progress=progress)
    idle = [word for word in ("network", "check", "guests", "timeout", "transport") if words.get(word)]
    words = {word: value for word, value in words.items() if word not in idle}
    if idle:
        show.say(f"only smoke looks at {', '.join(idle)}: here it does nothing")
    raise typer.Exit(pipeline.boot_here(out, root, guest_spec(words), show))


@app.command()
@takes("guest")
def smoke(
    words: Words,
    out: Annotated[Path, typer.Argument(help="the directory of a build")],
    find_min_memory: Annotated[
        bool, typer.Option("--find-min-memory", help="find the least memory that boots each, for the manifest to keep")
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """Boot what a build made once more.

    --check agent takes one step after the other through the agent's calls, instead of the usual checks, and says of
    each what came of it: ms is the call itself (the median of several), seconds all that the step took.

    Exit code: 0 every agent answered and every check passed; 6 a guest was wrong; 7 a guest was silent.
    """
    from osbuild import pipeline

    if find_min_memory:
        found = pipeline.find_least_memory(out, guest_spec(words), console.Show(quiet=quiet, progress=progress))
        if as_json:
            console.print_json({"least_memory_mib": found})
        else:
            console.print_lines(
                f"{name}: {mib} MiB" if mib else f"{name}: does not boot" for name, mib in found.items()
            )
        raise typer.Exit(0 if all(found.values()) else 6)
    report = pipeline.boot_again(out, guest_spec(words), console.Show(quiet=quiet, progress=progress))
    if as_json:
        console.print_json(_report_json(report))
    else:
        results.print_boots(report, out)
    raise typer.Exit(report.code)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="a disk image, a filesystem, an initramfs, a kernel")],
    root_hash: Annotated[str, typer.Option("--root-hash", metavar="HEX", help="what the hash tree must come to")] = "",
    verity_params: Annotated[
        str, typer.Option("--verity-params", metavar="TEXT", help="the same with salt and size: kernel_verity_params")
    ] = "",
    as_json: Json = False,
) -> None:
    """Say what a file holds, draw where it lies, and check all of it.

    Both MBRs, the nd_pfn superblock, the filesystem with every inode, the hash tree; and what a guest would see of it
    as an NVDIMM, through virtio-pmem and through virtio-blk. Of a qcow2 file its tables, not the disk in it. When a
    manifest.json of ours lies beside the file, size, sha256 and what the hash tree must come to are held against it.

    Exit code: 0 nothing is wrong with it; 3 something is, or it is nothing that is known here.
    """
    from osbuild import hash_check, inspection

    if root_hash and verity_params:
        raise SpecError("--root-hash and --verity-params are two ways to say one thing", hint="give one of them")
    claim = hash_check.parse_params(verity_params) if verity_params else None
    if root_hash:
        claim = hash_check.Claim(root_hash=hash_check.parse_root_hash(root_hash))
    found = inspection.inspect(file, claim)
    if as_json:
        console.print_json(found.to_dict())
    else:
        console.print_lines(inspection.drawing(found))
    raise typer.Exit(0 if found.whole else 3)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="an image, an initramfs or a kernel")],
    second: Annotated[Path, typer.Argument(help="another; an image and an initramfs are compared by their trees")],
    most: Annotated[int, typer.Option("--most", min=1, metavar="N", help="differences to name")] = 20,
    as_json: Json = False,
) -> None:
    """Name the first differences between two files: partition, inode, path and field.

    Exit code: 0 they are the same; 3 they are not, or one of them is nothing that is known here. JSON tells the two
    apart: {"same": false, "differences": …} or {"error": …}.
    """
    from osbuild import comparison

    found = comparison.compare(first, second, most)
    if as_json:
        console.print_json(found.to_dict())
    else:
        console.print_lines(comparison.lines(found))
    raise typer.Exit(0 if found.same else 3)


@app.command()
def install(
    prefix: Annotated[Path, typer.Option("--prefix", help="where share/kata-containers is: /opt/kata for Kata's own")],
    out: Annotated[Path | None, typer.Argument(help="the directory of a build")] = None,
    root: Annotated[str, typer.Option("--root", help="what is booted: image (unless there is none) or initrd")] = "",
    kata: Annotated[
        Path | None, typer.Option("--kata", help="the prefix of Kata's own release: its configurations are completed")
    ] = None,
    rollback: Annotated[bool, typer.Option("--rollback", help="use what was in use before")] = False,
    as_json: Json = False,
) -> None:
    """Put a build where Kata's runtimes look for it, and switch to it in one step.

    Beside it go configurations for QEMU, Cloud Hypervisor and Firecracker, and runtime handlers for containerd. The
    same build again changes nothing.

    JSON: {"path", "version", "before", "changed", "root", "configurations": {runtime: {vmm: path}}, "containerd"}.
    """
    from osbuild import install as installation

    done = installation.command(out, prefix, root=root, kata=kata, rollback=rollback)
    if as_json:
        console.print_json(done.to_dict())
    else:
        console.print_lines(done.lines())


@app.command()
def export(
    build: Annotated[Path, typer.Argument(help="the directory of a build")],
    kind: Annotated[str, typer.Option("--as", help="containerdisk: the image; kernelboot: the initramfs")],
    name: Annotated[str, typer.Option("--name", metavar="REFERENCE", help="where the cluster will find the image")],
    out: Annotated[Path, typer.Option("--out", "-o", help="a directory that is not there yet")],
    memory: Annotated[int, typer.Option("--memory", min=0, help="MiB of the virtual machine; 0: enough")] = 0,
    as_json: Json = False,
) -> None:
    """A build as a container image for KubeVirt (an OCI layout), and the VirtualMachine that boots it.

    JSON: {"path", "kind", "reference", "digest", "size", "image", "manifest", "files"}.
    """
    from osbuild.export import export as write_export

    done = write_export(build, out, kind=kind, name=name, memory_mib=memory)
    if as_json:
        console.print_json(done.to_dict())
    else:
        console.print_lines(done.lines())


@app.command()
def seed(
    user_data: Annotated[Path, typer.Option("--user-data", metavar="FILE", help="what the guest is to do")],
    meta_data: Annotated[Path | None, typer.Option("--meta-data", metavar="FILE", help="with an instance-id")] = None,
    network: Annotated[Path | None, typer.Option("--network-config", metavar="FILE", help="version 1 or 2")] = None,
    out: OutFile = Path("seed.iso"),
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Write a NoCloud seed for cloud-init: an ISO with the volume id cidata, the same bytes every time.

    Without --meta-data the instance-id is made from the content: another content, and cloud-init starts afresh.

    JSON: {"path", "size", "sha256", "volume", "instance_id", "instance_id_made", "yaml_checked", "files"}.
    """
    from osbuild.seed import write_seed

    check_replaceable(out, "iso", force=force)
    done = write_seed(out, user_data, meta_data=meta_data, network_config=network)
    if as_json:
        console.print_json(done.to_dict())
    else:
        console.print_lines(done.lines())


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say which tools are here and which are missing.

    With what each is for and how to get it. Exit code 4 when one is missing that everything needs.
    """
    from osbuild.doctor import examine

    findings = examine()
    if as_json:
        console.print_json([finding.to_dict() for finding in findings])
    else:
        results.print_findings(findings)
    raise typer.Exit(4 if any(finding.state == "missing" for finding in findings) else 0)


def main() -> NoReturn:
    """The program."""
    program.run(app)


def _image(argument: str, words: Words, show: console.Show) -> str:
    """The image to start from; a recipe is built first."""
    name = image_of(argument, words)
    if name:
        return name
    from osbuild import recipe

    if words.get("offline"):
        raise SpecError("a recipe installs packages from a network, and --offline touches none", hint="leave one out")
    return recipe.build(_dockerfile(words), show=show, fresh=words.get("fresh", False))


def _dockerfile(words: Words) -> Dockerfile:
    from osbuild import recipe

    if "recipe" not in words:
        raise SpecError("no recipe is named", hint=f"--recipe {', '.join(recipe.RECIPES)}")
    return recipe.render(words["recipe"], **recipe_words(words))


def _build_json(result: Build, show: console.Show) -> dict[str, Any]:
    return {
        "out": str(result.out),
        "manifest": result.manifest,
        "seconds": {name: round(seconds, 3) for name, seconds in show.seconds.items()},
        "smoke": _report_json(result.report) if result.report else None,
    }


def _report_json(report: Report) -> dict[str, Any]:
    return {
        "verdict": report.verdict,
        "boots": [
            {"name": boot.name, "verdict": boot.verdict, "reason": boot.reason, "accel": boot.accel.name,
             "seconds": round(boot.seconds, 3), "calls": boot.to_dict()["calls"]}
            for boot in report.boots
        ],
    }  # fmt: skip
