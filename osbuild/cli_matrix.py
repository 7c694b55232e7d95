"""`osbuilder matrix`: many builds from one file."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from osbuild import console, program
from osbuild.errors import OsbuilderError, SpecError
from osbuild.options import Json, Progress, Quiet, Words, registry_spec, takes
from osbuild.output import write_whole

if TYPE_CHECKING:
    from osbuild import oci
    from osbuild.matrix import Plan
    from osbuild.matrix_job import Result
    from osbuild.matrix_run import Crew, Outcome, Wishes
    from osbuild.signatures import Signer

_SHOWN = 12  # characters of a digest
_PLAN_HELP = "only print what would be done: cells, and the stages that they share; nothing is opened or built"
_PUBLISH_HELP = "put every cell at TAG-CELL and, when all are good, indexes of them at TAG"
_SIGN_HELP = "sign all that --publish names, with this private key in PEM; COSIGN_PASSWORD opens it"
_SCHEDULER_HELP = "build on the workers of this Dask scheduler, tcp://HOST:PORT; needs --publish"


@takes("registry")
def matrix(
    words: Words,
    file: Annotated[Path, typer.Argument(metavar="MATRIX.TOML", help="axes and their values: docs/matrix.md")],
    out: Annotated[Path, typer.Option("--out", "-o", help="the directory for all that is made")] = Path("matrix-out"),
    plan: Annotated[bool, typer.Option("--plan", help=_PLAN_HELP)] = False,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, metavar="N", help="so many at a time, here")] = 1,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="end with the first that fails")] = False,
    target: Annotated[
        str, typer.Option("--publish", metavar="REGISTRY/REPO:TAG", help=_PUBLISH_HELP, show_default=False)
    ] = "",
    sign: Annotated[Path | None, typer.Option("--sign", metavar="KEY", help=_SIGN_HELP, show_default=False)] = None,
    scheduler: Annotated[
        str, typer.Option("--scheduler", metavar="URL", help=_SCHEDULER_HELP, show_default=False)
    ] = "",
    as_json: Json = False,
    quiet: Quiet = False,
    progress: Progress = console.AUTO,
) -> None:
    """Build images x architectures x kernels x filesystems: what changed, with what they share made once.

    The file's words are those of osbuild.toml, and [axes] beside them. A cell that is what it should be already is not
    built again; one that fails does not stop the others. A run that was killed goes on where it was.

    JSON: {"cells": [{"name", "verdict", "reason", "hint", "code", "seconds", "digest", "published", "note", "where",
    "lost"}], "kernels": the same, "indexes": [{"reference", "digest"}], "signed": [{"digest", "changed"}], "code"},
    and "error", "hint" when indexes could not be put; with --plan {"cells", "stages", …}.

    Exit code: 0 every cell is there; else that of the worst: 2 to 7 as in osbuilder build.
    """
    from osbuild.matrix import read_plan
    from osbuild.matrix_index import check_tags, parse_target
    from osbuild.spec import source_date_epoch

    epoch = source_date_epoch()
    found = read_plan(file, words, epoch=epoch)
    wanted = parse_target(target) if target else None
    if wanted is not None:
        check_tags(found, wanted)
    _check_words(found, target, scheduler, sign=sign, jobs=jobs)
    if plan:
        _print_plan(found, as_json=as_json)
        return
    from osbuild.matrix_run import Wishes
    from osbuild.signatures import Signer

    signer = Signer.of(sign) if sign else None
    show = console.Show(quiet=quiet, progress=progress)
    wishes = Wishes(
        epoch=epoch, target=str(wanted or ""), share_kernels=bool(scheduler), fail_fast=fail_fast,
        signed_by=signer.public if signer else "",
    )  # fmt: skip
    outcome, named, problem = _run(found, out, wishes, wanted, signer, scheduler, jobs, show)
    if as_json:
        console.print_json(_document(outcome, found, named))
    else:
        _print(outcome, found, named, out, remote=bool(scheduler))
    if problem:
        program.say(problem)  # the table is the one document on standard output, and has it too
    raise typer.Exit(problem.code if problem else outcome.code)


def _check_words(plan: Plan, target: str, scheduler: str, *, sign: Path | None, jobs: int) -> None:
    """SpecError when they contradict each other."""
    words = plan.cells[0].words
    if target and words.get("offline"):
        raise SpecError("--publish sends to a registry, and --offline touches no network", hint="leave one of them out")
    if sign and not target:
        raise SpecError("--sign is for what --publish puts into a registry", hint="--publish REGISTRY/REPO:TAG")
    if not scheduler:
        return
    from osbuild import fleet

    fleet.check_url(scheduler)
    if not target:
        raise SpecError(
            "--scheduler needs --publish: what workers make comes back by way of a registry",
            hint="--publish REGISTRY/REPO:TAG",
        )
    if "authfile" in words:
        raise SpecError(
            "'authfile' is a file of this machine, and no password goes to a worker",
            hint="leave it out, and run docker login (or write ~/.docker/config.json) on each worker",
        )
    if jobs > 1:
        raise SpecError(
            "--jobs is for this machine: a scheduler's workers have as many threads as they were given",
            hint="leave it out; dask worker --nthreads N",
        )


def _run(
    plan: Plan,
    out: Path,
    wishes: Wishes,
    target: oci.Reference | None,
    signer: Signer | None,
    scheduler: str,
    jobs: int,
    show: console.Show,
) -> tuple[Outcome, dict[str, Any], OsbuilderError | None]:
    from osbuild import matrix_run

    with matrix_run.place(out) as home, contextlib.ExitStack() as stack:
        crew: Crew
        if scheduler:
            from osbuild import fleet

            crew = stack.enter_context(fleet.hired(scheduler, home))
        else:
            crew = matrix_run.Local(home, jobs)
        write_whole(home / matrix_run.PLAN, _encode(plan.to_dict()))
        show.say(plan.summary())
        outcome = matrix_run.run(plan, crew, wishes, show)
        if outcome.good(plan):
            matrix_run.clean(home)
        return outcome, *_finish(plan, outcome, home / matrix_run.TABLE, target, signer, show)


def _finish(
    plan: Plan, outcome: Outcome, table: Path, target: oci.Reference | None, signer: Signer | None, show: console.Show
) -> tuple[dict[str, Any], OsbuilderError | None]:
    """Write what came of the cells, then name those of a matrix that is all there; and why that did not work."""
    named: dict[str, Any] = {"indexes": [], "signed": []}
    write_whole(table, _encode(_document(outcome, plan, named)))
    if target is None or not outcome.good(plan):
        return named, None
    from osbuild import matrix_index

    digests = {name: result.published for name, result in outcome.cells.items()}
    registry = registry_spec(plan.cells[0].words)
    problem = None
    try:
        named = matrix_index.put_indexes(plan, digests, target, registry, show, signer).to_dict(target)
    except OsbuilderError as found:
        problem = found
        named |= {"code": problem.code, "error": str(problem), "hint": problem.hint}
    write_whole(table, _encode(_document(outcome, plan, named)))
    return named, problem


def _document(outcome: Outcome, plan: Plan, named: dict[str, Any]) -> dict[str, Any]:
    return {
        "code": outcome.code,
        "cells": [
            outcome.cells[cell.name].to_dict() | {"values": dict(cell.values), "variant": cell.variant}
            for cell in plan.cells
        ],
        "kernels": [
            outcome.kernels[stage.key].to_dict() | {"title": stage.title}
            for stage in plan.stages("kernel") if stage.key in outcome.kernels
        ],
    } | named  # fmt: skip


def _encode(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()


def _print_plan(plan: Plan, *, as_json: bool) -> None:
    if as_json:
        console.print_json(plan.to_dict())
        return
    kinds = ("kernel", "tree", "image", "initrd")
    names = dict(zip(kinds, ("kernel", "tree", "disk image", "initramfs"), strict=True))
    rows = [
        (cell.name, *(cell.stages[kind].key if kind in cell.stages else "" for kind in kinds)) for cell in plan.cells
    ]
    console.print_table(plan.summary(), ("cell", *names.values()), rows)
    stages = [
        (names[kind], stage.key, stage.title, str(len(cells)))
        for kind in kinds
        for stage, cells in plan.stages(kind).items()
    ]
    console.print_table("stages, each made once", ("stage", "key", "of", "cells"), stages)


def _print(outcome: Outcome, plan: Plan, named: dict[str, Any], out: Path, *, remote: bool) -> None:
    results = [outcome.cells[cell.name] for cell in plan.cells]
    counts = {verdict: sum(each.verdict == verdict for each in results) for verdict in _ORDER}
    title = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    columns = ["cell", "verdict", "seconds", "digest", *(["worker"] if remote else []), ""]
    rows = [_row(each, remote=remote) for each in results]
    console.print_table(title, columns, rows)
    lines = [f"{index['reference']}: {index['digest']}" for index in named["indexes"]]
    if named["signed"]:
        lines.append(f"signed: {len(named['signed'])} manifests")
    for each in results:
        if each.verdict == "failed":
            lines += console.fold(f"{each.name}: {each.reason}", hanging="  ")
            lines += console.fold(f"{each.hint}", indent="  hint: ", hanging="  ") if each.hint else []
            lines.append(f"  log: {out / 'cells' / each.name / 'log'}")
    console.print_lines(lines)


_ORDER = ("built", "unchanged", "failed", "skipped")


def _row(each: Result, *, remote: bool) -> tuple[str, ...]:
    digest = (each.published or each.digest).removeprefix("sha256:")[:_SHOWN]
    seconds = f"{each.seconds:.2f}" if each.seconds else ""
    notes = [each.note, f"{each.lost} lost" if each.lost else ""]
    where = (each.where,) if remote else ()
    return (each.name, each.verdict, seconds, digest, *where, ", ".join(filter(None, notes)))
