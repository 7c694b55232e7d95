"""`osbuilder agent …`: to compile ours, to put another into an image, and to say what one is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from osbuild import console, results
from osbuild.arch import find_arch, host_arch
from osbuild.cache import default_cache
from osbuild.garbage import uncollected
from osbuild.options import ArchName, Force, Json, OutFile, Words, takes
from osbuild.replacing import check_replaceable

app = typer.Typer(help="The guest agent.", no_args_is_help=True)


@app.command("build")
def build(
    out: OutFile = Path("osbuilder-agent"),
    force: Force = False,
    arch: ArchName = "",
    as_json: Json = False,
) -> None:
    """Compile the built-in agent: a static PIE, the same bytes from the same source.

    For another architecture it takes zig (pip install 'CHECKOUT[cross]') or Debian's cross compiler; the first time
    zig compiles its libc, which takes minutes.
    """
    from osbuild.agent import agent_version, build_agent
    from osbuild.artifacts import File
    from osbuild.output import write_whole

    check_replaceable(out, "program", force=force)
    data = build_agent(find_arch(arch) if arch else host_arch(), default_cache()).path.read_bytes()
    write_whole(out, data)
    out.chmod(0o755)
    results.print_file(File.of(out), {"version": agent_version(data)}, as_json=as_json)


@app.command("swap")
@takes("disk")
def swap(
    words: Words,
    image: Annotated[Path, typer.Argument(help="a disk image of osbuilder's: OUT/rootfs.img, or one alone")],
    agent: Annotated[str, typer.Argument(help="builtin, or the path of an agent or of a tarball with one")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="the file to write, instead of the image")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Put another agent into an image: the bytes that a clean build with it would give.

    In a build's directory initrd.img and all the .json files change too, and the smoke test's report goes. For an
    image alone, give the words it was made with (--align, --size, --free, --writable, --salt); the rest is seen.
    """
    from osbuild import swap as swapping
    from osbuild.options import disk_spec

    if out is not None:
        check_replaceable(out, "image", force=force)
    with uncollected():
        done = swapping.swap(image, agent, default_cache(), out=out, disk=disk_spec(words) if words else None)
    if as_json:
        console.print_json(done.to_dict())
    else:
        console.print_lines(swapping.lines(done))


@app.command("version")
def version(
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
