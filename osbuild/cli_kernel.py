"""`osbuilder kernel …`: to build one, and to say what its configuration comes to, which compiles nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from osbuild import console, results
from osbuild.cache import default_cache
from osbuild.errors import SpecError
from osbuild.options import ArchName, Json, Progress, Quiet, Words, build_spec, takes

if TYPE_CHECKING:  # what is slow to import is imported by the command that needs it
    from osbuild.kernel import KernelSpec

app = typer.Typer(help="The guest kernel.", no_args_is_help=True)


@app.command("build")
@takes("kernel")
def build(
    words: Words,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="a directory to copy the kernel to")] = None,
    arch: ArchName = "",
    as_json: Json = False,
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """Build the guest kernel, or find it built.

    vmlinux is what VMMs start as it is (on aarch64 the Image), vmlinuz the compressed image, config, System.map, and
    kernel.json: what it is and what went in. JSON: {"release", "arch", "key", "cached", and for each file its path,
    size and sha256}.
    """
    from osbuild import kernel_steps

    spec = _spec(words, arch)
    show = console.Show(quiet=quiet, progress=progress)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    made = kernel_steps.make_kernel(spec, default_cache(), show)
    if out is not None:
        made = kernel_steps.copy_kernel(made, out.absolute(), extras=True)
    about = {"release": made.release, "arch": made.arch, "key": made.key, "cached": made.cached}
    files = {"vmlinux": made.vmlinux, "vmlinuz": made.vmlinuz, "config": made.config}
    files |= {file.path.name: file for file in made.extras}
    if as_json:
        console.print_json(about | {name: file.to_dict() for name, file in files.items()})
        return
    rows = [(name, console.size_text(file.size), file.sha256[:12], str(file.path)) for name, file in files.items()]
    console.print_table(f"Linux {made.release}", ("file", "size", "sha256", "where"), rows)


@app.command("config")
@takes("kernel")
def config_text(words: Words, arch: ArchName = "") -> None:
    """Print the .config that the fragments come to; fails when an option asked for is not in it."""
    from osbuild.kernel import configure

    sys.stdout.write(configure(_spec(words, arch), default_cache()))


@app.command("cost")
@takes("kernel")
def cost(
    words: Words, arch: ArchName = "", as_json: Json = False, quiet: Quiet = False, progress: Progress = console.AUTO
) -> None:
    """Say what each fragment costs: the objects that would not be compiled without it.

    With their bytes (text, data and bss, before linking) and the processor seconds that the compiler took for them
    when it last ran. Rows may overlap, and need not come to the whole: what needs two fragments is gone without either.
    What a setting adds to objects that are compiled anyway is not seen. The kernel is built first, if it is not there;
    then its configuration is worked out once for each fragment, about a second each.
    """
    from osbuild import kernel_cost, kernel_steps

    spec = _spec(words, arch)
    show = console.Show(quiet=quiet, progress=progress)
    made = kernel_steps.make_kernel(spec, default_cache(), show)
    with show.step("leaving out each fragment in turn") as step:
        found = kernel_cost.measure(spec, made, default_cache(), step.advance)
    if as_json:
        console.print_json(found.to_dict())
    else:
        results.print_costs(found)


@app.command("explain")
@takes("kernel")
def explain(
    words: Words,
    symbols: Annotated[list[str], typer.Argument(metavar="SYMBOL...", help="with or without CONFIG_")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SYMBOL=VALUE", help="as if a fragment said so; may be repeated"),
    ] = None,
    want: Annotated[str, typer.Option("--want", help="a value it should have: say what that would take")] = "",
    arch: ArchName = "",
    as_json: Json = False,
) -> None:
    """Say what a symbol comes to with our fragments, and why.

    Who asked for it (file and line), what selects it, which default counts, which dependency is not met and where it
    stands; and for one that was asked for and not reached, the fewest lines that would change that, tried out. It reads
    the tree's own Kconfig files, and compiles nothing; the first time it takes some seconds.

    Exit code: 0 each is what was asked for, or nobody asked, or its loss is tolerated; 3 one is not, or does not exist.
    """
    from osbuild import kernel_config, kernel_explain

    explainer = kernel_config.explainer(_spec(words, arch), settings or [], default_cache())
    found = [explainer.explain(symbol, wanted=want) for symbol in symbols]
    if as_json:
        console.print_json([each.to_dict() for each in found])
    else:
        console.print_lines(line for each in found for line in kernel_explain.lines(each))
    raise typer.Exit(0 if all(each.tolerated or (each.kind and each.kept) for each in found) else 3)


@app.command("check")
@takes("kernel")
def check(
    words: Words,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG", help="a .config, a directory that has one, or a vmlinux; our fragments when not given"
        ),
    ] = None,
    vmm: Annotated[list[str] | None, typer.Option("--vmm", help="qemu, microvm, firecracker, cloud-hypervisor")] = None,
    agent: Annotated[list[str] | None, typer.Option("--agent", help="kata or builtin")] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", help="dax-ext4, dax-erofs, disk-ext4, verity, initrd, …; commas are fine"),
    ] = None,
    arch: ArchName = "",
    as_json: Json = False,
) -> None:
    """Check a configuration against what monitors, agents and images need.

    JSON: {"config", "release", "checked", "unmet": [{"for", "need", "values", "why"}]}.

    Exit code: 0 every need is met; 3 one is not.
    """
    from osbuild import kernel_check

    contract = kernel_check.read_contract()
    wanted = kernel_check.Wanted(
        vmms=kernel_check.split(vmm or ()), agents=kernel_check.split(agent or ()),
        images=kernel_check.split(image or ()),
    )  # fmt: skip
    if file is not None:
        if arch or any(words.get(word) for word in ("with", "source", "keyring")):
            raise SpecError("--with, --source and --arch are for our fragments", hint="leave them out, or CONFIG")
        name, text = str(file), kernel_check.read_config(file)
    else:
        from osbuild import kernel_config

        spec = _spec(words, arch)
        name, text = f"our fragments for {spec.arch.name}", kernel_config.expected(spec, default_cache())
    found = kernel_check.check(name, text, wanted, contract)
    if as_json:
        console.print_json(found.to_dict())
    else:
        console.print_lines(kernel_check.lines(found))
    raise typer.Exit(3 if found.unmet else 0)


def _spec(words: Words, arch: str) -> KernelSpec:
    """The kernel that a build with these words takes: a file's `fs` counts, too."""
    from osbuild.kernel_steps import kernel_spec

    return kernel_spec(build_spec("", Path(), {**words, "arch": arch} if arch else words, smoke=False))
