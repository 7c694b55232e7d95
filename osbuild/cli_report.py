"""`osbuilder report`: what came of booting, told again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, NoReturn

import typer

from osbuild import console
from osbuild.errors import SpecError
from osbuild.options import Json


def report(
    out: Annotated[
        Path, typer.Argument(help="a build that was booted, a report.json; with --markdown a matrix's directory, too")
    ],
    other: Annotated[Path | None, typer.Argument(help="a later one, to compare with")] = None,
    check: Annotated[bool, typer.Option("--check", help="only exit as smoke did, and say which guest is why")] = False,
    as_json: Json = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="as Markdown on standard output")] = False,
) -> None:
    """What came of a smoke test, or what differs between two of them.

    With one: where its page is, made again from what lies there now. With two: every verdict that changed, how long
    each boot took where that differs, and what is worse. Exit code: 0, or 6 when something passed before and does not
    now. With --check: 0, 6 or 7, as smoke's was.

    In GitHub's CI: osbuilder report OUT --markdown >> "$GITHUB_STEP_SUMMARY"
    """
    if as_json and as_markdown:
        raise SpecError("--json and --markdown both want standard output", hint="run it once for each")
    if check and (other or as_json or as_markdown):
        raise SpecError("--check is about one report, and only exits", hint="osbuilder report OUT --check")
    if other is not None:
        _print_changes(out, other, as_json=as_json, as_markdown=as_markdown)
    from osbuild import report_page, report_summary
    from osbuild.matrix_run import TABLE

    if as_markdown and (out / TABLE).is_file():
        console.print_text(report_summary.markdown_of_matrix(out / TABLE))
        return
    found = report_page.read_report(out)
    if check:
        console.print_lines(report_page.not_passed(found))
        raise typer.Exit(report_page.verdict_of(found).code)
    if as_markdown:
        console.print_text(report_summary.markdown(found, report_page.report_file(out).parent))
        return
    page = report_page.page_again(out, found)
    console.print_json({"page": str(page)}) if as_json else console.print_lines([str(page)])


def _print_changes(out: Path, other: Path, *, as_json: bool, as_markdown: bool) -> NoReturn:
    from osbuild import report_page, report_summary

    changes = report_page.compare(report_page.read_report(out), report_page.read_report(other))
    if as_json:
        console.print_json({"changes": report_page.to_dict(changes)})
    elif as_markdown:
        console.print_text(report_summary.markdown_of(changes))
    else:
        rows = [(one.boot, one.what, one.before, one.after, "worse" if one.worse else "") for one in changes]
        console.print_table(f"{out} and {other}", ("boot", "what", "before", "after", ""), rows)
        console.print_lines(filter(None, [report_page.worse_line(changes)]))
    raise typer.Exit(6 if any(one.worse for one in changes) else 0)
