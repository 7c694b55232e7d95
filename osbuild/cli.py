"""Words in, one call, an exit code out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import osbuild
from osbuild import console, program, results
from osbuild.arch import Arch, find_arch, host_arch
from osbuild.cache import default_cache
from osbuild.errors import SpecError
from osbuild.options import Words, build_spec, guest_spec, image_of, recipe_words, takes
from osbuild.output import check_output

if TYPE_CHECKING:  # what is slow to import is imported by the command that needs it
    from osbuild.artifacts import File
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
kernel_app = typer.Typer(help="The guest kernel.", no_args_is_help=True)
agent_app = typer.Typer(help="The guest agent.", no_args_is_help=True)
cache_app = typer.Typer(help="What is kept between runs: pulled images, kernels, agents.", no_args_is_help=True)
app.add_typer(kernel_app, name="kernel")
app.add_typer(agent_app, name="agent")
app.add_typer(cache_app, name="cache")

Image = Annotated[
    str,
    typer.Argument(
        help="docker-daemon:NAME, docker://NAME, docker-archive:FILE, oci:PATH[:TAG], dir:PATH, or a NAME: the Docker "
        "daemon's if one answers, else a registry's"
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="the directory for all that is made")]
OutFile = Annotated[Path, typer.Option("--out", "-o", help="the file to write")]
ArchName = Annotated[str, typer.Option("--arch", help="x86_64 is the only one yet")]
Json = Annotated[bool, typer.Option("--json", help="the result as JSON on standard output")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress on standard error")]


@app.callback(invoke_without_command=True)
def start(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        sys.stdout.write(f"osbuilder {osbuild.__version__}\n")
        raise typer.Exit


@app.command()
@takes("image", "recipe", "output", "disk", "initramfs", "rootfs", "kernel", "guest", "registry")
def build(
    words: Words, image: Image = "", out: Out = Path("osbuilder-out"), as_json: Json = False, quiet: Quiet = False
) -> None:
    """Make everything, and boot it: the main command.

    A root filesystem with the agent in it, as a DAX image and as an initramfs; a kernel; and a boot of each.

    Exit code: 0 every guest passed (or none was booted); 6 a guest was wrong; 7 a guest was silent; 2 usage; 3 the
    image was refused; 4 this machine lacks something; 5 a build step failed.
    """
    from osbuild import pipeline

    show = console.Show(quiet=quiet)
    result = pipeline.build(build_spec(_image(image, words, show), out, words), default_cache(), show)
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
    explain: Annotated[bool, typer.Option("--explain", help="what each rule of the policy does, and why")] = False,
    render: Annotated[bool, typer.Option("--render", help="only print the recipe's Dockerfile")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
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
        results.check_tar(tar)
    show = console.Show(quiet=quiet)
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
    words: Words, image: Image = "", out: OutFile = Path("guest.img"), as_json: Json = False, quiet: Quiet = False
) -> None:
    """Only the disk image, with the agent in it.

    An NVDIMM that guests map with DAX and an ordinary disk: the same bytes, two views.
    JSON: {"path", "size", "sha256", "filesystem", "dax", "format", "writable", "skipped", "words", "disk_words",
    "verity"}: words boot it as an NVDIMM when it can be one, disk_words and verity.words as a disk; verity.params is
    Kata's kernel_verity_params.
    """
    from osbuild import manifest, pipeline
    from osbuild.sources import check_apart

    show = console.Show(quiet=quiet)
    check_output(out)
    spec = build_spec(_image(image, words, show), out.parent, words, kinds=("image",), smoke=False)
    check_apart(spec.image, out)
    pipeline.check_host(spec.disk)
    disk = pipeline.make_image(spec, pipeline.open_rootfs(spec, default_cache(), show), out, show)
    _print_file(disk.file, manifest.about_disk(disk) | {"words": list(disk.words)}, as_json=as_json)
    if disk.verity is not None and not as_json:
        console.print_lines([disk.verity.params])


@app.command()
@takes("image", "recipe", "initramfs", "rootfs", "registry")
def initrd(
    words: Words, image: Image = "", out: OutFile = Path("guest.initrd"), as_json: Json = False, quiet: Quiet = False
) -> None:
    """Only the initramfs, with the agent in it.

    JSON: {"path", "size", "sha256", "compression", "unpacked", "entries", "memory", "skipped", "lost_xattrs"}: memory
    is what a guest needs to unpack it, in bytes; skipped are sockets; lost_xattrs, inodes with attributes that it
    cannot hold.
    """
    from osbuild import pipeline
    from osbuild.sources import check_apart

    show = console.Show(quiet=quiet)
    check_output(out)
    spec = build_spec(_image(image, words, show), out.parent, words, kinds=("initrd",), smoke=False)
    check_apart(spec.image, out)
    made = pipeline.make_initrd(spec, pipeline.open_rootfs(spec, default_cache(), show), out, show)
    about = {
        "compression": made.compression, "unpacked": made.unpacked, "entries": made.entries, "memory": made.memory,
        "skipped": made.skipped, "lost_xattrs": made.lost_xattrs,
    }  # fmt: skip
    _print_file(made.file, about, as_json=as_json)


@app.command()
@takes("guest")
def smoke(
    words: Words,
    out: Annotated[Path, typer.Argument(help="the directory of a build")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Boot what a build made once more.

    --check agent takes one step after the other through the agent's calls, instead of the usual checks, and says of
    each what came of it: ms is the call itself (the median of several), seconds all that the step took.

    Exit code: 0 every agent answered and every check passed; 6 a guest was wrong; 7 a guest was silent.
    """
    from osbuild import pipeline

    report = pipeline.boot_again(out, guest_spec(words), console.Show(quiet=quiet))
    if as_json:
        console.print_json(_report_json(report))
    else:
        results.print_boots(report, out)
    raise typer.Exit(report.code)


@kernel_app.command("build")
@takes("kernel")
def kernel_build(
    words: Words,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="a directory to copy the kernel to")] = None,
    arch: ArchName = "",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build the guest kernel, or find it built."""
    from osbuild import pipeline

    spec = build_spec("", out or Path(), {"arch": arch, **words} if arch else words, smoke=False)
    show = console.Show(quiet=quiet)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    made = pipeline.make_kernel(spec, default_cache(), show)
    if out is not None:
        made = pipeline.copy_kernel(made, out.absolute())
    about = {"release": made.release, "arch": made.arch, "key": made.key, "cached": made.cached}
    files = {name: getattr(made, name) for name in ("vmlinux", "vmlinuz", "config")}
    if as_json:
        console.print_json(about | {name: _file_json(file) for name, file in files.items()})
        return
    rows = [(name, console.size_text(file.size), file.sha256[:12], str(file.path)) for name, file in files.items()]
    console.print_table(f"Linux {made.release}", ("file", "size", "sha256", "where"), rows)


@kernel_app.command("config")
@takes("kernel")
def kernel_config(words: Words, arch: ArchName = "") -> None:
    """Print the .config that the fragments come to; fails when an option asked for is not in it."""
    from osbuild.kernel import configure, default_spec

    wanted = default_spec(_arch(arch), features=words.get("with", ()), source=words.get("source"))
    sys.stdout.write(configure(wanted, default_cache()))


@agent_app.command("build")
def agent_build(
    out: OutFile = Path("osbuilder-agent"),
    arch: Annotated[str, typer.Option("--arch", help="x86_64 or aarch64; this machine's when not given")] = "",
    as_json: Json = False,
) -> None:
    """Compile the built-in agent: a static PIE, the same bytes from the same source.

    For another architecture it takes zig (pip install 'osbuilder[cross]') or Debian's cross compiler; the first time
    zig compiles its libc, which takes minutes.
    """
    from osbuild.agent import agent_version, build_agent
    from osbuild.artifacts import File
    from osbuild.output import write_whole

    check_output(out)
    data = build_agent(_arch(arch), default_cache()).path.read_bytes()
    write_whole(out, data)
    out.chmod(0o755)
    _print_file(File.of(out), {"version": agent_version(data)}, as_json=as_json)


@agent_app.command("swap")
@takes("disk")
def agent_swap(
    words: Words,
    image: Annotated[Path, typer.Argument(help="a disk image of osbuilder's: OUT/rootfs.img, or one alone")],
    agent: Annotated[str, typer.Argument(help="builtin, or the path of an agent or of a tarball with one")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the file to write, instead of the image")] = None,
    as_json: Json = False,
) -> None:
    """Put another agent into an image: the bytes that a clean build with it would give.

    In a build's directory initrd.img, manifest.json and lock.json change too, and the smoke test's report goes. For an
    image alone, give the words it was made with (--align, --size, --free, --writable, --salt); the rest is seen.
    """
    from osbuild import swap
    from osbuild.options import disk_spec

    if out is not None:
        check_output(out)
    done = swap.swap(image, agent, default_cache(), out=out, disk=disk_spec(words) if words else None)
    if as_json:
        console.print_json(done.to_dict())
    else:
        console.print_lines(swap.lines(done))


@agent_app.command("version")
def agent_version_of(
    file: Annotated[Path, typer.Argument(help="an agent's binary")],
    run: Annotated[bool, typer.Option("--run", help="also run it with --version, and take its word")] = False,
    as_json: Json = False,
) -> None:
    """Say which agent a program is, from its bytes; nothing is run without --run.

    Name, version, architecture, whether it is static, the protocol, and how each was found out. What its bytes do not
    say is "unknown". With --run it gets no environment, five seconds, and limits on memory and output.

    Exit code: 0 it is a program for a guest; 3 it is not.
    """
    from osbuild import agent_binary

    found = agent_binary.read_binary(file)
    if run:
        found = agent_binary.ask(file, found)
    if as_json:
        console.print_json(found.to_dict())
    else:
        results.print_agent(found)


@cache_app.command("ls")
def cache_ls(
    everything: Annotated[bool, typer.Option("--all", help="locks and logs too")] = False, as_json: Json = False
) -> None:
    """What is there: kind, size, last use.

    \b
    agent, kernel  made once from the same source
    tag            what an image's name meant when it was pulled
    blob           a part of an image that was pulled
    partial        the beginning of one, to go on from
    tree           the list of an archive's files
    base-image     Debian or busybox, made by scripts/base-image
    scratch        kernel sources and ccache; goes with prune --all only
    damaged        set aside, and made again when it is needed
    leftover       of a run that was killed
    """
    from osbuild.housekeeping import survey

    items = survey(default_cache())
    if as_json:
        console.print_json([item.to_dict() for item in items])
    else:
        results.print_cache(default_cache().root, items, everything=everything)


@cache_app.command("verify")
def cache_verify(as_json: Json = False) -> None:
    """Read everything again, set aside what is damaged.

    It is made or pulled again when it is needed.

    Exit code 3 when something was damaged.
    """
    from osbuild.housekeeping import verify

    found = verify(default_cache())
    bad = [each for each in found if each.problem]
    if as_json:
        console.print_json([each.to_dict() for each in found])
    else:
        console.print_lines(f"{each.kind} {each.key}: {each.problem}" for each in bad)
        console.print_lines([f"{len(found)} checked, {len(bad)} damaged"])
    raise typer.Exit(3 if bad else 0)


@cache_app.command("prune")
def cache_prune(
    days: Annotated[float, typer.Option("--days", help="keep what was used within so many days")] = 30.0,
    most: Annotated[int | None, typer.Option("--most", metavar="MIB", help="keep at most so many MiB")] = None,
    kinds: Annotated[list[str] | None, typer.Option("--kind", help="only this kind; may be given again")] = None,
    everything: Annotated[bool, typer.Option("--all", help="everything that no process uses")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only say what would go")] = False,
    as_json: Json = False,
) -> None:
    """Remove what was not used for long.

    And what killed runs left; never what a process is using.
    """
    from osbuild.housekeeping import prune

    done = prune(
        default_cache(), keep_days=days, most_bytes=None if most is None else most << 20, everything=everything,
        dry_run=dry_run, kinds=frozenset(kinds) if kinds else None,
    )  # fmt: skip
    if as_json:
        console.print_json(done.to_dict())
    else:
        word = "would go" if dry_run else "gone"
        console.print_lines(f"{word}: {results.name(item)}" for item in done.removed)
        console.print_lines(f"kept, in use: {results.name(item)}" for item in done.in_use)
        console.print_lines(f"kept: {results.name(item)}: {reason}" for item, reason in done.failed)
        console.print_lines([f"{console.size_text(done.size)} {word}"])
    raise typer.Exit(4 if done.failed else 0)


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


def _arch(name: str) -> Arch:
    return find_arch(name) if name else host_arch()


def _image(argument: str, words: Words, show: console.Show) -> str:
    """The image to start from; a recipe is built first."""
    name = image_of(argument, words)
    if name:
        return name
    from osbuild import recipe

    return recipe.build(_dockerfile(words), show=show, fresh=words.get("fresh", False))


def _dockerfile(words: Words) -> Dockerfile:
    from osbuild import recipe

    if "recipe" not in words:
        raise SpecError("no recipe is named", hint=f"--recipe {', '.join(recipe.RECIPES)}")
    return recipe.render(words["recipe"], **recipe_words(words))


def _file_json(file: File) -> dict[str, Any]:
    return {"path": str(file.path), "size": file.size, "sha256": file.sha256}


def _print_file(file: File, about: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        console.print_json(_file_json(file) | about)
    else:
        sys.stdout.write(f"{file.path}  {console.size_text(file.size)}  sha256:{file.sha256}\n")


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
