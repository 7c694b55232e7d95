"""Smoke tests of guests that are not there: a program in QEMU's place plays them."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from osbuild import checks, results, smoke, watcher
from osbuild.agent_compiler import NoCompilerError
from osbuild.artifacts import DiskImage, File, Initrd, Kernel
from osbuild.checks import (
    CHECKS,
    ON_REQUEST,
    PROBING,
    agent_details,
    agent_version,
    base,
    nonce,
    poweroff,
    root,
    select,
    share,
)
from osbuild.checks.base import Session
from osbuild.checks.root import judge_root
from osbuild.errors import BuildError, SpecError
from osbuild.findings import NotHere, Wrong
from osbuild.probe import Refused
from osbuild.report import Check, Event, Report, SmokeReport, Verdict
from osbuild.report_page import write_page
from osbuild.runtime.base import Machine
from tests.boot_fixtures import guests_alive

REPOSITORY = Path(__file__).parents[1]

_FAKE = """#!{python}
import contextlib, os, re, signal, sys, threading, time
if "-version" in sys.argv:
    sys.exit(0)
sys.path.insert(0, {repository!r})
text = " ".join(sys.argv)
console = open(re.search(r"id=console,path=(\\S+)", text)[1], "ab", buffering=0)
agent = re.search(r"id=agent,path=([^,]+)", text)[1]
nonce = re.search(r"osbuilder.nonce=(\\w+)", text)[1]
def say(line):
    console.write(line.encode() + b"\\n")
def boot(nonce=nonce, root='"fstype":"rootfs","device":"rootfs","options":"rw"'):
    say("[    0.000000] Linux version 6.12")
    say("[    0.500000] Run /init as init process")
    say('{{"msg":"root mounted","level":"INFO",%s}}' % root)
    say('{{"msg":"agent started","nonce":"%s","uptime_seconds":0.51}}' % nonce)
def serving(behaviour=None):
    from tests import fake_agent
    return fake_agent.fake_agent(__import__("pathlib").Path(agent), behaviour or fake_agent.serve)
{body}
"""

# What powers off: answers everything, and ends when it is told to.
_GOOD = """
from tests import fake_agent
serve = fake_agent.serve_probe()
def behave(peer, batch):
    serve(peer, batch)
    if batch[-1].method.endswith("DestroySandbox"):
        say("[    0.800000] reboot: Power down")
        os._exit(0)
{boot}
with serving(behave):
    time.sleep(60)
"""

USUAL = ("agent.check", "agent.version", "agent.details", "root", "nonce", "entropy", "clock", "metrics", "poweroff")
Boot = Callable[..., SmokeReport]


@pytest.fixture
def boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Boot:
    """Run a smoke test against a fake QEMU with this body."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("vmlinux", "vmlinuz", "root"):
        (tmp_path / name).write_bytes(b"x")
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def run(body: str, *, seconds: float = 20.0, **more: Any) -> SmokeReport:
        program = programs / "qemu-system-x86_64"
        program.write_text(_FAKE.format(python=sys.executable, repository=str(REPOSITORY), body=body))
        program.chmod(0o755)
        report = smoke.run(make_machine(tmp_path), tmp_path / "work", seconds=seconds, **more)
        assert guests_alive(tmp_path) == []
        return report

    return run


def make_machine(home: Path, root: DiskImage | Initrd | None = None) -> Machine:
    def file(name: str) -> File:
        return File(path=home / name, size=1, sha256="")

    kernel = Kernel(
        vmlinux=file("vmlinux"), vmlinuz=file("vmlinuz"), config=file("vmlinux"), release="6.12", arch="x86_64",
        key="", cached=True,
    )  # fmt: skip
    made = root or Initrd(file=file("root"), compression="none", unpacked=1)
    return Machine(kernel=kernel, root=made, accel="tcg")


def check(report: SmokeReport, name: str) -> Check:
    (found,) = [check for check in report.checks if check.name == name]
    return found


def test_a_guest_that_does_everything_right_passes(boot: Boot) -> None:
    seen: list[Event] = []
    report = boot(_GOOD.format(boot="boot()"), on_event=seen.append)
    assert report.verdict is Verdict.passed, report
    assert report.cause is None
    assert [check.name for check in report.checks] == [*USUAL, "console", "files"]
    assert report.calls == ()
    names = [event.name for event in report.timeline]
    assert names[0] == "vmm started"
    assert names[-3] == "agent answered"
    assert set(names[-2:]) == {"leaving", "powered off"}, "the console is read a moment after the end is seen"
    assert {event.name for event in seen} == set(names)
    guest_times = {event.name: event.guest for event in report.timeline}
    assert (guest_times["init"], guest_times["agent started"]) == (0.5, 0.51)


@pytest.mark.parametrize(
    ("start", "name", "detail"),
    [
        ("boot(nonce='dead')", "nonce", "another run"),
        ("""boot(root='"fstype":"ext4","device":"/dev/sda","options":"ro"')""", "root", "not the initramfs"),
    ],
)
def test_an_agent_that_says_the_wrong_thing_fails(start: str, name: str, detail: str, boot: Boot) -> None:
    report = boot(_GOOD.format(boot=start))
    assert report.verdict is Verdict.failed
    assert check(report, name).verdict is Verdict.failed
    assert detail in report.reason


def test_an_agent_whose_log_is_not_seen_leaves_it_unknown(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonce, "LINE_SECONDS", 0.1)
    monkeypatch.setattr(root, "LINE_SECONDS", 0.1)
    report = boot(_GOOD.format(boot=""))
    assert report.verdict is Verdict.unknown
    assert check(report, "agent.check").verdict is Verdict.passed
    assert check(report, "nonce").verdict is Verdict.unknown


@pytest.mark.parametrize(
    ("start", "name", "cause"),
    [
        ("boot(nonce='other')", "nonce", None),
        (
            'boot(); say("[    0.600000] BUG: unable to handle page fault for address: 0000000000001000")',
            "console",
            "oops",
        ),
        ("", "nonce", "console-full"),
    ],
    ids=["a wrong run", "an oops", "what was not seen"],
)
def test_a_full_console_hides_nothing_that_was_seen(
    start: str, name: str, cause: str | None, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nonce, "LINE_SECONDS", 0.1)
    monkeypatch.setattr(root, "LINE_SECONDS", 0.1)
    monkeypatch.setattr(watcher, "_is_full", lambda console: True)
    silent = '        say("[    0.800000] reboot: Power down")\n'
    report = boot(_GOOD.replace(silent, "").format(boot=start))
    found = check(report, name)
    assert report.cause is None if cause is None else report.cause is not None and report.cause.name == cause
    unseen = cause == "console-full"
    assert (found.verdict, report.verdict) == ((Verdict.unknown if unseen else Verdict.failed),) * 2
    assert found.detail in report.reason
    assert ("console could not be kept" in found.detail) is unseen
    end = check(report, "poweroff")
    assert (end.verdict, "could not be kept" in end.detail) == (Verdict.unknown, True), "its line may have been lost"


def test_what_was_wrong_before_a_guest_was_lost_keeps_its_own_words(boot: Boot) -> None:
    dying = _GOOD.replace("DestroySandbox", "CreateContainer").replace(
        "reboot: Power down", "Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b"
    )
    report = boot(dying.format(boot="boot(nonce='dead')"))
    assert report.cause is not None
    assert "another run" in check(report, "nonce").detail
    told = [found for found in report.checks if found.detail == report.cause.sentence]
    assert len(told) == 1, "the check that lost it says why"
    assert told[0].verdict is Verdict.failed


def test_an_agent_that_does_not_power_off_fails(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poweroff, "_POWEROFF_SECONDS", 0.3)
    report = boot("boot()\nwith serving():\n    time.sleep(60)")
    assert report.verdict is Verdict.failed
    assert "still there" in check(report, "poweroff").detail


def test_a_vmm_that_ends_without_a_word_of_the_kernel_has_not_powered_off(boot: Boot) -> None:
    report = boot(_GOOD.replace('        say("[    0.800000] reboot: Power down")\n', "").format(boot="boot()"))
    assert report.verdict is Verdict.failed
    assert "never said" in check(report, "poweroff").detail


@pytest.mark.parametrize(
    "line",
    [
        "[    0.300000] Initramfs unpacking failed: write error",
        "[    0.300000] Initramfs unpacking failed: ZSTD-compressed data is truncated",
        "[    0.700000] EXT4-fs error (device pmem0p1): ext4_lookup:1855: inode #12: comm sh: bad extra_isize",
        "[    0.700000] BUG: unable to handle page fault for address: 0000000000001000",
    ],
)
def test_a_guest_that_answers_well_but_whose_kernel_complained_fails(line: str, boot: Boot) -> None:
    report = boot(_GOOD.format(boot=f"boot()\nsay({line!r})"))
    assert report.verdict is Verdict.failed
    assert check(report, "agent.check").verdict is Verdict.passed
    assert check(report, "console").verdict is Verdict.failed
    assert line.partition("] ")[2] in report.reason


_WORDS = "[    0.100000] Kernel command line: console=ttyS0 root=/dev/pmem0p1"
_KILLED = "[    0.700000] Out of memory: Killed process 99 (java) total-vm:1kB, anon-rss:1kB, file-rss:0kB"


@pytest.mark.parametrize(
    ("line", "verdict", "certain"),
    [
        ("[    0.700000] EXT4-fs error (device pmem0p1): ext4_lookup:1: inode #12: comm sh: bad", "failed", True),
        ("[    0.700000] EXT4-fs error (device vdb1): ext4_lookup:1: inode #12: comm sh: bad", "passed", None),
        ("[    0.700000] device-mapper: verity: 254:1: data block 1 is corrupted", "passed", None),
        (_KILLED, "failed", False),
        (f"{_KILLED}\n[    0.710000] BUG: unable to handle page fault for address: 0000000000001000", "failed", True),
    ],
    ids=["its root", "another disk", "another disk with verity", "a program without memory", "that, and more"],
)
def test_what_a_kernel_says_of_others_is_no_cause_of_a_guests_that_answers(
    line: str, verdict: str, certain: bool | None, boot: Boot
) -> None:
    report = boot(_GOOD.format(boot=f"boot()\nsay({_WORDS!r})\nsay({line!r})"))
    assert check(report, "console").verdict == report.verdict == verdict, report
    assert (report.cause.certain if report.cause else None) is certain
    assert report.cause is None or report.cause.line == line.rpartition("\n")[2]


def test_a_panic_of_a_kernel_that_says_who_writes_is_seen_when_it_happens(boot: Boot) -> None:
    said = ("Linux version 6.12", "Run /init as init process", "Kernel panic - not syncing: of a new kind")
    lines = [f"[    0.{number}00000][    T{number}] {words}" for number, words in enumerate(said)]
    report = boot("".join(f"say({line!r})\n" for line in lines) + "time.sleep(60)")
    seen = {event.name: event.guest for event in report.timeline}
    assert (seen["kernel"], seen["init"], seen["panic"]) == (0.0, 0.1, 0.2)
    assert report.seconds < 20, "the deadline was not waited for"
    assert report.cause is not None
    assert (report.cause.name, report.cause.certain) == ("panic", True)


def test_a_machine_that_can_only_halt_has_powered_off(boot: Boot) -> None:
    body = _GOOD.replace("os._exit(0)", 'say("[    0.9] reboot: x"); say("[    0.900000] reboot: System halted")')
    report = boot(body.format(boot="boot()"))
    assert report.verdict is Verdict.passed, report
    assert "halted" in check(report, "poweroff").detail


def test_a_panic_on_the_way_out_is_no_power_off(boot: Boot) -> None:
    body = _GOOD.replace("os._exit(0)", 'say("[    0.900000] Kernel panic - not syncing: oh"); os._exit(0)')
    report = boot(body.format(boot="boot()"))
    assert report.verdict is Verdict.failed
    assert "panic" in check(report, "poweroff").detail


def test_a_qemu_that_refuses_is_reported_in_its_own_words(boot: Boot) -> None:
    began = time.monotonic()
    report = boot('sys.exit("qemu-system-x86_64: -nonsense: invalid option")')
    assert report.verdict is Verdict.failed
    assert report.cause is not None
    assert report.cause.line == "qemu-system-x86_64: -nonsense: invalid option"
    assert time.monotonic() - began < 5


def test_a_qemu_that_ends_without_a_word_fails(boot: Boot) -> None:
    report = boot("sys.exit(0)")
    assert (report.verdict, report.cause and report.cause.name) == (Verdict.failed, "triple-fault")


def test_a_qemu_that_makes_its_channel_and_dies_is_not_waited_for(boot: Boot) -> None:
    began = time.monotonic()
    report = boot("import socket\nsocket.socket(socket.AF_UNIX).bind(agent)\nsys.exit('qemu: nobody knows')")
    assert report.verdict is Verdict.failed
    assert report.cause is not None
    assert report.cause.line == "qemu: nobody knows"
    assert time.monotonic() - began < 5


def test_a_qemu_that_somebody_kills_says_nothing_about_the_guest(boot: Boot) -> None:
    report = boot("boot()\nos.kill(os.getpid(), signal.SIGKILL)")
    assert (report.verdict, report.cause and report.cause.name) == (Verdict.unknown, "vmm-killed")


def test_a_qemu_that_hangs_and_ignores_sigterm_is_unknown_and_gone(boot: Boot) -> None:
    began = time.monotonic()
    report = boot("signal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(60)", seconds=1.0)
    assert (report.verdict, report.cause and report.cause.name) == (Verdict.unknown, "silent")
    assert time.monotonic() - began < 7


@pytest.mark.parametrize(
    ("say", "phase"),
    [
        ("", "nothing"),
        ('say("SeaBIOS (version 1)")', "firmware"),
        ('say("[    0.000000] Linux version 6.12")', "kernel"),
        ('say("[    0.000000] Linux"); say("[    0.500000] Run /init as init process")', "init"),
        ("boot()", "agent"),
    ],
)
def test_silence_is_unknown_with_the_phase_reached(say: str, phase: str, boot: Boot) -> None:
    body = f"{say}\nimport socket\nlistening = socket.socket(socket.AF_UNIX)\nlistening.bind(agent)\n"
    report = boot(body + "listening.listen()\ntime.sleep(60)", seconds=1.0)
    assert report.verdict is Verdict.unknown
    assert f"seen: {phase}" in report.reason
    assert [c.detail for c in report.checks[1:-1]] == ["not reached"] * len(USUAL)


def test_a_panic_is_reported_within_a_second_even_if_qemu_stays(boot: Boot) -> None:
    body = """
from tests import fake_agent
with serving(fake_agent.be_silent):
    time.sleep(0.3)
    say("[    1.000000] Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)")
    time.sleep(60)
"""
    report = boot(body)
    ended = report.seconds
    (panic,) = [event for event in report.timeline if event.name == "panic"]
    assert ended - panic.seconds < 1.0
    assert (report.verdict, report.cause and report.cause.name) == (Verdict.failed, "root-missing")


def test_a_console_without_end_is_cut_off(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watcher, "CONSOLE_LIMIT", 1 << 20)
    body = "from tests import fake_agent\nwith serving(fake_agent.be_silent):\n    while True: say('x' * 5000)"
    report = boot(body)
    assert (report.verdict, report.cause and report.cause.name) == (Verdict.failed, "flood")
    assert report.console.stat().st_size < 512 << 20


@pytest.mark.parametrize(
    ("behaviour", "verdict", "detail"),
    [
        ("fake_agent.say(b'HTTP/1.1 400 Bad Request\\r\\n\\r\\n')", Verdict.failed, "bytes is announced"),
        ("fake_agent.say(b'\\xff\\xff\\xff\\xff\\0\\0\\0\\1\\2\\0')", Verdict.failed, "4194304 are allowed"),
        ("fake_agent.say_and_hang_up(b'')", Verdict.failed, "closed the connection"),
        (
            "lambda peer, batch: len(batch) < 2 and peer.send(half.pop())",
            Verdict.unknown,
            "of the 10 bytes of a header",
        ),
        ("fake_agent.refuse(12, 'never heard of it')", Verdict.failed, "never heard of it"),
    ],
    ids=["http", "four gigabytes", "hangs up", "half a header", "refuses"],
)
def test_an_agent_that_answers_garbage_is_told_apart_from_a_silent_one(
    behaviour: str, verdict: Verdict, detail: str, boot: Boot
) -> None:
    start = "from tests import fake_agent\nboot()\nhalf = [b''] * 99 + [b'\\0\\0\\0\\7\\0']\n"
    seconds = 20.0 if verdict is Verdict.failed else 4.0  # only the silent one is waited for
    report = boot(f"{start}with serving({behaviour}):\n    time.sleep(60)", seconds=seconds)
    assert report.verdict is verdict
    assert detail in check(report, "agent.check").detail


def test_a_guest_that_changes_its_image_fails(boot: Boot, tmp_path: Path) -> None:
    body = _GOOD.format(boot=f"boot()\nopen({str(tmp_path / 'root')!r}, 'wb').write(b'y')")
    report = boot(body)
    assert report.verdict is Verdict.failed
    assert str(tmp_path / "root") in check(report, "files").detail


def test_an_unknown_vmm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no VMM 'bochs'"):
        smoke.run(make_machine(tmp_path), tmp_path, vmm="bochs")


IMAGE = DiskImage(
    file=File(path=Path("/i"), size=1, sha256=""), filesystem="ext4", dax=True, words=("root=/dev/pmem0p1",)
)
INITRD = Initrd(file=IMAGE.file, compression="none", unpacked=1)
DISK = dataclasses.replace(IMAGE, dax=False)
WRITABLE = dataclasses.replace(DISK, words=("root=/dev/pmem0p1", "rw"), writable=True)
VERIFIED = dataclasses.replace(IMAGE, words=("root=/dev/dm-0", "ro"))  # an NVDIMM behind verity is not mapped


@pytest.mark.parametrize(
    ("root", "kind", "options", "right"),
    [
        (IMAGE, "ext4", "ro,relatime,dax=always", True),
        (IMAGE, "ext4", "ro,dax", True),
        (IMAGE, "ext4", "ro,dax=inode", False),
        (IMAGE, "ext4", "ro,dax=never", False),
        (IMAGE, "ext4", "ro,relatime", False),
        (IMAGE, "ext4", "rw,dax=always", False),
        (IMAGE, "ext4", "errors=remount-ro,dax", False),
        (IMAGE, "xfs", "ro,dax=always", False),
        (DISK, "ext4", "ro,relatime", True),
        (DISK, "ext4", "rw,relatime", False),
        (WRITABLE, "ext4", "rw,relatime", True),
        (WRITABLE, "ext4", "ro,relatime", False),
        (INITRD, "rootfs", "rw,size=1k", True),
        (INITRD, "tmpfs", "rw", True),
        (INITRD, "ext4", "ro", False),
    ],
)
def test_the_root_must_be_what_was_booted(root: DiskImage | Initrd, kind: str, options: str, right: bool) -> None:
    fields = {"fstype": kind, "device": "/dev/pmem0p1", "options": options}
    if right:
        assert kind in judge_root(root, fields)
    else:
        with pytest.raises(Wrong):
            judge_root(root, fields)


def test_a_root_on_another_device_is_wrong() -> None:
    with pytest.raises(Wrong, match="not on /dev/pmem0p1"):
        judge_root(IMAGE, {"fstype": "ext4", "device": "/dev/vda1", "options": "ro,dax=always"})


@pytest.mark.parametrize(("device", "right"), [("/dev/dm-0", True), ("/dev/pmem0p1", False), ("/dev/root", False)])
def test_a_root_behind_verity_must_be_the_device_that_checks(device: str, right: bool) -> None:
    fields = {"fstype": "ext4", "device": device, "options": "ro,relatime"}
    if right:
        assert "/dev/dm-0" in judge_root(VERIFIED, fields)
    else:
        with pytest.raises(Wrong, match="not on /dev/dm-0"):
            judge_root(VERIFIED, fields)


@pytest.mark.parametrize("fields", [{}, {"fstype": 7, "options": None}, {"options": ["ro", "dax"]}])
def test_strange_fields_are_wrong_and_not_a_crash(fields: dict[str, Any]) -> None:
    with pytest.raises(Wrong):
        judge_root(IMAGE, fields)


LINE = json.dumps({"msg": "agent started", "nonce": "n", "note": "a { and a } and \\ and €"}, separators=(",", ":"))


@pytest.mark.parametrize(
    "lines",
    [
        [LINE],
        [f"[    0.500000] {LINE}"],
        [f"\x1b[0m{LINE} trailing"],
        [f"{LINE[:20]}[    0.612345] random: crng init done", LINE[20:]],
        [f"{LINE[:20]}[    0.612345] one", f"{LINE[20:40]}[    0.612346] two", LINE[40:]],
    ],
    ids=["plain", "through the kernel's log", "amid garbage", "torn once", "torn twice"],
)
def test_an_agents_line_is_found_whatever_the_kernel_wrote_into_it(lines: list[str]) -> None:
    log = watcher.AgentLog()
    for line in ["[    0.1] before", *lines, "after"]:
        log.feed(line.encode())
    assert log.messages["agent started"]["nonce"] == "n"


@pytest.mark.parametrize(
    "line", [b'{"msg":', b'{"msg":"a"', b'{"msg":' * 5000, b'{"msg":[' + b"[" * 100_000, b'{"msg":\xff\xfe}', b"{}"]
)
def test_a_line_that_is_no_message_is_none(line: bytes) -> None:
    log = watcher.AgentLog()
    assert log.feed(line) is None
    assert log.feed(b"next") is None
    assert log.messages == {}


def test_an_agent_cannot_make_us_remember_without_end() -> None:
    log = watcher.AgentLog()
    for number in range(10_000):
        log.feed(b'{"msg":"%d"}' % number)
    assert len(log.messages) <= 64


def test_a_line_without_an_end_is_cut() -> None:
    lines = watcher.Lines()
    cut = [line for _ in range(100) for line in lines.feed(b"x" * 10_000)]
    assert all(len(line) <= lines.LONGEST for line in cut)
    assert len(lines._rest) <= lines.LONGEST


# Which checks, and the walk over every call


def test_without_a_wish_everything_is_looked_at_that_takes_no_time() -> None:
    assert set(select((), make_machine(Path(), IMAGE))) == CHECKS.keys() - ON_REQUEST
    assert {"agent", "verity"} <= ON_REQUEST


@pytest.mark.parametrize("other", ["INITRD", "DISK", "VERIFIED"])
def test_without_a_wish_nobody_looks_for_dax_where_nothing_is_to_be_mapped(other: str) -> None:
    found = select((), make_machine(Path(), globals()[other]))
    assert set(found) == CHECKS.keys() - ON_REQUEST - {"dax"}
    assert "dax" in select(("dax",), make_machine(Path(), globals()[other])), "who asks is told"


@pytest.mark.parametrize(
    ("names", "selected"),
    [
        (("root",), ["agent.check", "root"]),
        (("nonce", "agent.version"), ["agent.check", "agent.version", "nonce"]),
        (("agent",), ["agent.check", "agent", "poweroff"]),
    ],
)
def test_checks_are_selected_by_name_and_keep_their_order(names: tuple[str, ...], selected: list[str]) -> None:
    assert list(select(names, make_machine(Path()))) == selected


def test_a_check_nobody_knows_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no check 'wings'"):
        smoke.run(make_machine(tmp_path), tmp_path / "work", checks=("wings",))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("other", sorted(PROBING))
def test_a_walk_and_a_check_with_a_container_are_not_for_one_guest(other: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=f"--check agent cannot share a guest with {other}: the walk begins"):
        smoke.run(make_machine(tmp_path), tmp_path / "work", checks=("agent", other))
    assert not (tmp_path / "work").exists()
    with pytest.raises(SpecError, match=f"cannot share a guest with {other}"):
        select(("agent",), make_machine(tmp_path), asked=(other,))


def test_what_starts_a_container_is_known_to_the_walk() -> None:
    """By its module's own words, so that a new check is not forgotten."""
    uses = re.compile(r"session\.(?:probe|start_probe|begin_sandbox)\b|\.probe\.")
    files = {path.stem: path.read_text() for path in Path(checks.__file__).parent.glob("*.py")}
    assert {name for name in CHECKS if uses.search(files.get(name, ""))} == PROBING


def test_only_what_was_selected_is_in_the_report(boot: Boot) -> None:
    report = boot(_GOOD.format(boot="boot()"), checks=("nonce",))
    assert [check.name for check in report.checks] == ["agent.check", "nonce", "console", "files"]
    assert report.verdict is Verdict.passed


def test_an_agent_that_has_few_calls_fails_the_walk_call_by_call(boot: Boot, tmp_path: Path) -> None:
    report = boot(_GOOD.replace("serve_probe()", "serve").format(boot="boot()"), checks=("agent",))
    assert report.verdict is Verdict.failed
    assert "steps passed" in check(report, "agent").detail
    assert check(report, "poweroff").verdict is Verdict.passed, "the walk's last call has ended the guest"
    calls = {(call["call"], call["about"]): call for call in report.to_dict()["calls"]}
    serves = calls["grpc.Health/Check", "it serves"]
    assert (serves["verdict"], serves["calls"]) == ("passed", 1)
    assert 0 < serves["call_seconds"] <= serves["seconds"] + 1e-4
    failed = next(call for call in calls.values() if call["call"] == "grpc.AgentService/StartContainer")
    assert failed["verdict"] == "failed"
    assert "UNIMPLEMENTED" in failed["detail"]
    assert {call["verdict"] for call in calls.values()} == {"passed", "failed", "skipped"}
    Report(boots=(report,)).write(tmp_path / "report")
    written = json.loads((tmp_path / "report" / "report.json").read_text())
    assert written["boots"][0]["calls"] == report.to_dict()["calls"]


def test_what_a_check_lacks_is_skipped_and_what_it_measured_is_kept(
    boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacks(session: Session) -> str:
        session.facts["tried"] = 1
        raise NotHere("this host has none")

    monkeypatch.setattr(agent_version, "look", lacks)
    report = boot(_GOOD.format(boot="boot()"))
    found = check(report, "agent.version")
    assert (found.verdict, found.detail, found.facts) == (Verdict.skipped, "this host has none", {"tried": 1})
    assert check(report, "agent.details").facts == {}
    assert report.verdict is Verdict.passed


@pytest.mark.parametrize(
    ("answer", "verdict", "detail"),
    [
        ("b'garbage\\n'", Verdict.failed, "answers b'garbage"),
        ("b'x' * 100", Verdict.failed, "answers b'xxxx"),
        ("b'+999999999\\n'", Verdict.failed, "answers b'+999999999"),
        ("b'-2\\nno'", Verdict.unknown, "the guest refuses it: no"),
        ("b'+12\\nrealtime now'", Verdict.unknown, "not to be understood: ValueError"),
        ("b'+1\\nx'", Verdict.unknown, "not to be understood: KeyError"),
    ],
)
def test_a_probe_that_answers_nonsense_is_in_the_report(
    answer: str, verdict: Verdict, detail: str, boot: Boot, tmp_path: Path
) -> None:
    start = f"fake_agent.FakeProbe._read = lambda self, request: {{{{'data': {answer}}}}}\nserve = "
    body = _GOOD.replace("serve = ", start)
    report = boot(body.format(boot="boot()"), checks=("clock", "poweroff"))
    found = check(report, "clock")
    assert (found.verdict, detail in found.detail) == (verdict, True), found
    assert check(report, "poweroff").verdict is Verdict.passed
    assert report.verdict is verdict
    Report(boots=(report,)).write(tmp_path / "report")


@pytest.mark.parametrize(
    "problem", [UnicodeEncodeError("utf-8", "\udcff", 0, 1, "no"), Refused("\udcff\x07")], ids=["asked", "refused"]
)
def test_a_name_that_no_text_has_is_in_the_report(
    problem: Exception, boot: Boot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(session: Session) -> str:
        session.facts["path"] = "/\udcff"
        raise problem

    monkeypatch.setattr(agent_version, "look", look)
    report = boot(_GOOD.format(boot="boot()"), checks=("agent.version",))
    assert check(report, "agent.version").verdict is Verdict.unknown
    home = tmp_path / "report"
    Report(boots=(report,)).write(home, page=lambda: write_page(home, Report(boots=(report,)).to_dict(), []))
    assert "udcff" in (home / "report.json").read_text()


@pytest.mark.parametrize("end", [None, NotHere("no"), Wrong("no")], ids=["well", "lacking", "wrong"])
def test_a_check_that_takes_long_takes_nothing_of_the_next_ones_time(
    end: Exception | None, boot: Boot, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = []

    def dawdle(session: Session) -> str:
        left.append(session.left)
        time.sleep(1.5)
        if end is not None:
            raise end
        return "slow"

    def look(session: Session) -> str:
        left.append(session.left)
        return "quick"

    monkeypatch.setattr(agent_version, "look", dawdle)
    monkeypatch.setattr(agent_details, "look", look)
    report = boot(_GOOD.format(boot="boot()"), checks=("agent.version", "agent.details", "poweroff"))
    assert left[1] > left[0] - 0.5
    assert check(report, "poweroff").verdict is Verdict.passed


def test_what_was_asked_for_by_name_and_is_not_there_is_unknown_with_its_reason(boot: Boot) -> None:
    report = boot(_GOOD.format(boot="boot()"), checks=("dax", "poweroff"))
    found = check(report, "dax")
    assert (found.verdict, found.detail) == (Verdict.unknown, "this guest's root is not an NVDIMM that is mapped")
    assert (report.verdict, report.verdict.code) == (Verdict.unknown, 7)
    assert report.reason == f"dax: {found.detail}"


def test_only_a_missing_compiler_leaves_the_probe_out(boot: Boot, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(problem: Exception) -> Callable[..., Path]:
        def fail(*_: Any) -> Path:
            raise problem

        return fail

    monkeypatch.setattr(base, "build_probe", build(NoCompilerError("there is none", hint="get one")))
    report = boot(_GOOD.format(boot="boot()"))
    assert check(report, "clock").verdict is Verdict.skipped
    assert "there is none: get one" in check(report, "clock").detail
    assert boot(_GOOD.format(boot="boot()"), checks=("clock",)).verdict is Verdict.unknown
    monkeypatch.setattr(base, "build_probe", build(BuildError("gcc exited with 1")))
    with pytest.raises(BuildError, match="gcc exited"):
        boot(_GOOD.format(boot="boot()"))


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        ((), {"image": (), "verity": (), "initrd": ()}),
        (("dax",), {"image": ("dax",), "verity": ("agent.check",), "initrd": ("agent.check",)}),
        (("verity", "nonce"), {"image": ("nonce",), "verity": ("verity", "nonce"), "initrd": ("nonce",)}),
        (("wings",), {"image": ("wings",), "verity": ("wings",), "initrd": ("wings",)}),
    ],
)
def test_a_named_check_is_asked_of_the_roots_that_it_is_for(
    names: tuple[str, ...], shared: dict[str, tuple[str, ...]]
) -> None:
    assert share(names, {"image": IMAGE, "verity": VERIFIED, "initrd": INITRD}) == shared


def test_a_named_check_that_no_root_is_for_is_asked_of_all() -> None:
    assert share(["verity"], {"disk": DISK, "initrd": INITRD}) == {"disk": ("verity",), "initrd": ("verity",)}


def test_a_guest_that_dies_in_the_walk_leaves_the_rest_unknown(boot: Boot) -> None:
    body = """
from tests import fake_agent
def behave(peer, batch):
    if batch[-1].method.endswith("ListInterfaces"):
        say("[    0.900000] Kernel panic - not syncing: it was asked for its links")
        os._exit(1)
    fake_agent.serve(peer, batch)
boot()
with serving(behave):
    time.sleep(60)
"""
    report = boot(body, checks=("agent",))
    assert report.verdict is Verdict.failed
    assert report.calls[-1].verdict == "unknown"
    assert report.calls[-1].detail == "the agent has gone"
    assert report.cause is not None
    assert report.cause.name == "panic"


def test_a_walk_is_a_table_for_people(boot: Boot, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    report = boot(_GOOD.replace("serve_probe()", "serve").format(boot="boot()"), checks=("agent",))
    results.print_boots(Report(boots=(report,)), tmp_path)
    shown = capsys.readouterr().out
    assert re.search(r"^Check +it serves +[0-9.]+ +0\.[0-9]+ +passed *$", shown, re.MULTILINE), shown
    assert "failed: CreateSandbox, a sandbox begins: " in shown.replace("\n  ", " ")
