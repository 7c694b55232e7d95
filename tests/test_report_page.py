"""The page people look at: what is drawn, that nothing of a guest's becomes a part of it, how two reports differ."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from osbuild import report_page
from osbuild.content import Bytes
from osbuild.errors import InputError
from osbuild.report import SCHEMA, SCHEMA_VERSION
from osbuild.tree import Draft, regular
from tests.test_cli import run

EVIL = "<script>alert(1)</script>\"'&"


def event(name: str, seconds: float) -> dict[str, Any]:
    return {"name": name, "seconds": seconds, "guest": None}


def boot(**more: Any) -> dict[str, Any]:
    events = [
        event("vmm started", 0.0), event("first output", 0.2), event("kernel", 0.25), event("init", 1.0),
        event("agent started", 1.1), event("agent answered", 1.25), event("leaving", 1.5), event("powered off", 1.6),
    ]  # fmt: skip
    return {
        "name": "image", "verdict": "passed", "reason": "right", "cause": None, "seconds": 1.75,
        "machine": {
            "vmm": "qemu", "arch": "x86_64", "kernel": "6.12", "root": "/x/rootfs.img", "root_kind": "ext4 with DAX",
            "transport": "serial", "memory_mib": 256, "cpus": 1, "nonce": "0",
        },
        "accel": {"name": "tcg", "reason": "no /dev/kvm"},
        "checks": [{"name": "agent.check", "verdict": "passed", "detail": "it serves", "seconds": 1.25}],
        "calls": [], "timeline": events, "command": ["qemu"], "console": "image/console.log", "log": "image/vmm.log",
        **more,
    }  # fmt: skip


def report(*boots: dict[str, Any]) -> dict[str, Any]:
    return {"schema": SCHEMA, "version": SCHEMA_VERSION, "verdict": "passed", "boots": list(boots)}


def written(home: Path, document: dict[str, Any], images: tuple[Path, ...] = ()) -> str:
    return report_page.write_page(home, document, images).read_text()


class Elements(HTMLParser):
    """Another's reader: the elements, their attributes, and that each is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.values: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.values += [value or "" for _, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_timeline_has_no_gap_and_names_what_took_the_time() -> None:
    bars = list(report_page.bars(boot()))
    assert [bar.label for bar in bars] == ["firmware", "kernel", "agent", "checks", "power off"]
    assert [bar.value for bar in bars] == ["0.25 s", "0.75 s", "0.25 s", "0.25 s", "0.25 s"]
    at = 0.0
    for bar in bars:
        assert bar.left == pytest.approx(at)
        at += bar.width
    assert at == pytest.approx(100)


def test_a_guest_that_panicked_shows_when() -> None:
    bars = list(
        report_page.bars(boot(timeline=[event("vmm started", 0), event("kernel", 1), event("panic", 2)], seconds=4))
    )
    assert [(bar.label, round(bar.width)) for bar in bars] == [("firmware", 25), ("kernel", 25), ("panic", 50)]


def test_a_guest_that_said_nothing_has_a_timeline_too() -> None:
    assert [bar.width for bar in report_page.bars(boot(timeline=[event("vmm started", 0)], seconds=60.0))] == [100]
    assert list(report_page.bars(boot(timeline=[], seconds=0.0))) == []


@pytest.mark.parametrize(
    ("length", "texts"), [(1.75, ["0", "0.5", "1", "1.5"]), (60, ["0", "10", "20", "30", "40", "50", "60"])]
)
def test_ticks_are_round_numbers(length: float, texts: list[str]) -> None:
    assert [text for _, text in report_page.ticks(length)] == texts
    assert all(0 <= left <= 100 for left, _ in report_page.ticks(length))


def test_nothing_of_a_guest_becomes_a_part_of_the_page(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "console.log").write_text(f"{EVIL}\x1b[31mred\x07")
    cause = {"name": EVIL, "sentence": EVIL, "line": EVIL, "hint": EVIL, "certain": True}
    check = {"name": EVIL, "verdict": "failed", "detail": EVIL, "seconds": 0.0}
    call = {
        "call": EVIL,
        "about": EVIL,
        "verdict": "failed",
        "detail": EVIL,
        "seconds": 0.0,
        "calls": 1,
        "call_seconds": 0.1,
    }
    text = written(
        tmp_path, report(boot(reason=EVIL, cause=cause, checks=[check], calls=[call], command=[EVIL], name=EVIL))
    )
    found = Elements(text)
    assert found.open == []
    assert "script" not in found.names
    assert not any(value.startswith("http") for value in found.values)
    assert not set(found.names) & {"img", "link", "iframe", "object"}
    assert "\x1b" not in text
    assert "url(" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_the_largest_directories_come_first_and_links_count_once() -> None:
    draft = Draft()
    draft.put("/usr/lib/a", regular(b"x" * 5000))
    draft.put("/usr/share/b", regular(b"x" * 9000))
    draft.put("/etc/c", regular(b"x" * 10))
    entry = regular(b"y" * 100)
    draft.put("/usr/lib/one", entry)
    draft.put("/usr/share/two", entry)
    draft.put("/top", regular(b"z"))
    bars = list(report_page.directories([draft.tree()]))
    assert [(bar.label, bar.value) for bar in bars] == [
        ("/usr/share", "8.8 KiB"), ("/usr/lib", "5.0 KiB"), ("/etc", "10 B"), ("/", "1 B"),
    ]  # fmt: skip
    assert Bytes(b"").size == 0
    assert list(report_page.directories([])) == []


def test_what_is_wrong_with_an_image_stands_where_its_layout_would(tmp_path: Path) -> None:
    (tmp_path / "rootfs.img").write_bytes(b"nothing")
    assert "is nothing that is known here" in written(tmp_path, report(boot()), (tmp_path / "rootfs.img",))


def test_two_reports_differ_in_verdicts_and_in_times_and_what_is_equal_is_no_row() -> None:
    before, after = report(boot()), copy.deepcopy(report(boot()))
    assert report_page.compare(before, after) == []
    assert report_page.worse_line([]) == ""
    after["boots"][0]["verdict"] = "failed"
    after["boots"][0]["checks"][0]["verdict"] = "failed"
    after["boots"][0]["timeline"][5]["seconds"] = 9.0
    changes = {change.what: change for change in report_page.compare(before, after)}
    assert changes["check agent.check"].worse
    assert changes["verdict"].worse
    assert set(changes) == {"verdict", "check agent.check", "seconds until agent answered"}
    assert report_page.worse_line(list(changes.values())) == "2 worse: image: verdict, image: check agent.check"
    assert (changes["seconds until agent answered"].before, changes["seconds until agent answered"].after) == (
        "1.25",
        "9.00",
    )
    assert not any(change.worse for change in report_page.compare(after, before))


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        ("passed", "failed", True), ("passed", "unknown", True), ("passed", "skipped", True),
        ("passed", "passed", False), ("failed", "unknown", False), ("unknown", "failed", False),
        ("skipped", "failed", False), ("failed", "passed", False),
    ],
)  # fmt: skip
def test_worse_is_what_passed_before_and_does_not_now(before: str, after: str, worse: bool) -> None:
    one, two = report(boot()), report(boot())
    one["boots"][0]["checks"][0]["verdict"] = before
    two["boots"][0]["checks"][0]["verdict"] = after
    assert any(change.worse for change in report_page.compare(one, two)) is worse


def test_a_check_that_nobody_asked_for_is_not_worse_and_a_boot_that_is_gone_is() -> None:
    less = report(boot())
    del less["boots"][0]["checks"][0]
    assert report_page.compare(report(boot()), less) == []
    gone = report_page.compare(report(boot(), boot(name="initrd")), less)
    assert report_page.to_dict(gone) == [
        {"boot": "initrd", "what": "verdict", "before": "passed", "after": "not booted", "worse": True}
    ]
    (silent,) = report_page.compare(report(boot(), boot(name="initrd", verdict="unknown")), less)
    assert not silent.worse


def test_what_a_guest_did_in_one_report_only_never_happened_in_the_other() -> None:
    less = copy.deepcopy(report(boot()))
    gone = less["boots"][0]["timeline"].pop()
    (change,) = report_page.compare(report(boot()), less)
    assert (change.what, change.after) == (f"seconds until {gone['name']}", "never")


def test_a_boot_that_is_in_one_report_only_is_named() -> None:
    changes = report_page.compare(report(boot()), report(boot(), boot(name="initrd")))
    assert [(each.boot, each.before, each.after, each.worse) for each in changes] == [
        ("initrd", "not booted", "passed", False)
    ]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document.update(schema="other"),
        lambda document: document.update(version=2),
        lambda document: document.update(verdict="splendid"),
        lambda document: document["boots"][0].pop("timeline"),
        lambda document: document["boots"][0].update(console="../../etc/passwd"),
        lambda document: document.update(boots=[1]),
    ],
)
def test_what_is_no_report_of_ours_is_refused(spoil: Any, tmp_path: Path) -> None:
    document = report(boot())
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document))
    assert report_page.read_report(tmp_path) == document
    spoil(document)
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match=r"report\.json") as caught:
        report_page.read_report(path)
    assert caught.value.hint


def test_a_directory_without_a_report_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no report at") as caught:
        report_page.read_report(tmp_path)
    assert caught.value.hint == "osbuilder smoke OUT makes one"


@pytest.mark.parametrize(("verdict", "code"), [("passed", 0), ("failed", 6), ("unknown", 7)])
def test_a_check_exits_as_smoke_did_says_which_guest_and_writes_nothing(
    verdict: str, code: int, tmp_path: Path
) -> None:
    guests = (boot(name="image"), boot(name="initrd", verdict=verdict, reason="the kernel panicked"))
    (tmp_path / "report.json").write_text(json.dumps(report(*guests) | {"verdict": verdict}))
    done = run("report", str(tmp_path), "--check")
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout == (f"initrd: {verdict}: the kernel panicked\n" if code else "")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert run("report", str(tmp_path), "--check", "--markdown").returncode == 2
