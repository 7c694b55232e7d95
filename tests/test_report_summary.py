"""Reports as Markdown, read by markdown-it (which rich brings along), and what a guest says stays text."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Final

import pytest
from markdown_it import MarkdownIt

from osbuild import cli_matrix
from osbuild.matrix_job import FAILED, Result
from osbuild.report_page import Change
from osbuild.report_summary import escaped, fenced, markdown, markdown_of
from tests.test_cli import one_line, run
from tests.test_matrix import FULL, plan_of
from tests.test_matrix_run import carried_out, good
from tests.test_report_page import boot, report

EVIL: Final = "| a `b` <img src=x> [c](http://d) *e* @f #1 \x1b[31m\n# g & ~~h~~ _i_ \\ ```"


def html(text: str) -> str:
    return str(MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(text))


def tokens(text: str) -> list[str]:
    found = []
    for token in MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text):
        found += [token.type, *(child.type for child in token.children or ())]
    return found


def with_manifest(home: Path) -> Path:
    document = {
        "image": "sha256:" + "4" * 64, "agent": "osbuilder-agent 0.1.0", "kernel": {"release": "6.12.117"},
        "outputs": {"rootfs.img": {"size": 10485760, "sha256": "b" * 64}},
    }  # fmt: skip
    (home / "manifest.json").write_text(json.dumps(document))
    (home / "smoke").mkdir()
    return home / "smoke"


def test_a_report_is_a_heading_two_tables_and_no_more_when_all_passed(tmp_path: Path) -> None:
    text = markdown(report(boot()), with_manifest(tmp_path))
    shown = html(text)
    assert shown.count("<table>") == 2
    assert "<h2>osbuilder: ✅ passed</h2>" in shown
    assert "<code>rootfs.img</code></td>\n<td>10.0 MiB</td>\n<td><code>bbbbbbbbbbbb</code>" in shown
    assert "6.12.117" in shown
    assert "<h3>" not in shown


def test_a_matrix_is_a_row_for_each_cell_with_the_reason_and_damage_is_one_line(tmp_path: Path) -> None:
    plan = plan_of(FULL, tmp_path)
    outcome, _ = carried_out(
        plan,
        lambda job: (
            dataclasses.replace(good(job), digest="a" * 64, seconds=1.5)
            if "erofs" not in job.name
            else Result(kind=job.kind, name=job.name, verdict=FAILED, reason=EVIL, code=6)
        ),
    )
    named = {"indexes": [{"reference": "r.example/all:1", "digest": "sha256:" + "b" * 64}], "error": "no room"}
    table = tmp_path / "matrix.json"
    table.write_text(json.dumps(cli_matrix._document(outcome, plan, named)))
    done = run("report", str(tmp_path), "--markdown")
    assert done.returncode == 0, done.stderr
    shown = html(done.stdout)
    assert "<h2>osbuilder matrix: 6 built, 6 failed</h2>" in shown
    assert shown.count("<tr>") == 1 + 12 + 1 + 1
    assert shown.count("✅ built</td>\n<td>1.50 s</td>\n<td><code>aaaaaaaaaaaa</code>") == 6
    assert shown.count("❌ failed") == 6
    assert "<td>r.example/all:1</td>\n<td><code>bbbbbbbbbbbb</code>" in shown
    assert "no room" in shown
    assert "<img" not in shown
    table.write_text('{"cells": [1]}')
    done = run("report", str(tmp_path), "--markdown")
    assert done.returncode == 3
    assert "damaged" in one_line(done.stderr)


@pytest.mark.parametrize(
    "spoil", ["{", "[]", "{}", '{"outputs": {"a": 1}, "image": "", "kernel": {"release": ""}}', None]
)
def test_without_a_manifest_that_can_be_read_the_boots_are_still_told(spoil: str | None, tmp_path: Path) -> None:
    home = with_manifest(tmp_path)
    if spoil is None:
        (tmp_path / "manifest.json").unlink()
    else:
        (tmp_path / "manifest.json").write_text(spoil)
    assert html(markdown(report(boot()), home)).count("<table>") == 1


def test_a_guest_that_failed_shows_its_reason_the_line_and_the_end_of_its_console(tmp_path: Path) -> None:
    home = with_manifest(tmp_path)
    cause = {"name": "panic", "sentence": "s", "line": "Kernel panic", "hint": "give it a root", "certain": True}
    failed = boot(verdict="failed", reason="the kernel panicked", cause=cause)
    (home / failed["console"]).parent.mkdir(exist_ok=True)
    (home / failed["console"]).write_bytes(b"old\n" * 9000 + b"Kernel panic - not syncing\n")
    text = markdown(report(failed) | {"verdict": "failed"}, home)
    shown = html(text)
    assert "❌ failed" in shown
    assert "the kernel panicked" in shown
    assert "What to do: give it a root" in shown
    assert "Kernel panic - not syncing\n</code>" in shown
    assert len(text) < 20_000


def test_nothing_that_a_guest_says_becomes_markup(tmp_path: Path) -> None:
    home = with_manifest(tmp_path)
    check = {"name": "root", "verdict": "failed", "detail": EVIL, "seconds": 0.1, "facts": {}}
    failed = boot(name="image", verdict="failed", reason=EVIL, checks=[check])
    failed["cause"] = {"name": "x", "sentence": EVIL, "line": EVIL, "hint": EVIL, "certain": True}
    (home / failed["console"]).parent.mkdir(exist_ok=True)
    (home / failed["console"]).write_text(f"{EVIL}\n````\n</details>\n")
    text = markdown(report(failed), home)
    found = tokens(text)
    assert not {"html_inline", "link_open", "image", "em_open", "s_open"} & set(found)
    assert found.count("code_inline") == 3, "ours: the image's digest, a file's name, its digest"
    assert found.count("html_block") == 2, "ours: what folds the console away, and its end"
    assert found.count("fence") == 2
    assert found.count("heading_open") == 2
    assert "\x1b" not in text


def test_two_reports_are_one_table() -> None:
    changes = [Change(boot="image", what="check dax", before="passed", after="failed|x", worse=True)]
    assert "<td>failed|x</td>\n<td>worse</td>" in html(markdown_of(changes))
    assert "1 worse: image: check dax" in html(markdown_of(changes))


@pytest.mark.parametrize("text", ["", "`", "```\n", "a````b", EVIL])
def test_a_fence_holds_whatever_is_in_it(text: str) -> None:
    (token,) = MarkdownIt().parse("\n".join(fenced(text)))
    assert token.type == "fence"
    assert token.content.rstrip("\n") == text.rstrip("\n")


def test_escaped_text_is_shown_as_it_was() -> None:
    text = "| a `b` <i> [c](http://d) *e* @f #1 & ~~h~~ _i_ \\ - +"
    (token,) = [token for token in MarkdownIt().parse(escaped(text)) if token.type == "inline"]
    assert "".join(child.content for child in token.children or ()) == text


def test_a_report_of_two_boots_has_a_row_for_each(tmp_path: Path) -> None:
    boots: list[dict[str, Any]] = [boot(name="image"), boot(name="initrd", verdict="unknown", reason="silent")]
    shown = html(markdown(report(*boots), with_manifest(tmp_path)))
    assert shown.count("<td>initrd</td>") == 1
    assert "❔ unknown" in shown
