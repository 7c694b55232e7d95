"""`osbuilder cache …`: what is kept between runs."""

from __future__ import annotations

from typing import Annotated

import typer

from osbuild import console, results
from osbuild.cache import default_cache
from osbuild.options import Json

app = typer.Typer(help="What is kept between runs: pulled images, kernels, agents.", no_args_is_help=True)


@app.command("ls")
def ls(
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


@app.command("verify")
def verify(as_json: Json = False) -> None:
    """Read everything again, set aside what is damaged.

    It is made or pulled again when it is needed.

    Exit code 3 when something was damaged.
    """
    from osbuild import housekeeping

    found = housekeeping.verify(default_cache())
    bad = [each for each in found if each.problem]
    if as_json:
        console.print_json([each.to_dict() for each in found])
    else:
        console.print_lines(f"{each.kind} {each.key}: {each.problem}" for each in bad)
        console.print_lines([f"{len(found)} checked, {len(bad)} damaged"])
    raise typer.Exit(3 if bad else 0)


@app.command("prune")
def prune(
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
    from osbuild import housekeeping

    done = housekeeping.prune(
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
