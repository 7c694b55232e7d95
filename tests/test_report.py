from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
from lxml import etree

from osbuild import results
from osbuild.report import Cause, Check, Event, Report, SmokeReport, Verdict, printable
from osbuild.runtime import accel
from osbuild.runtime.accel import Accel

NASTY = b'\x1b[31mred\x1b[0m \x1b]0;title\x07 <&"> \x00\x01\xff ]]> \xc3\xa9\r\n'


@pytest.fixture
def boot(tmp_path: Path) -> SmokeReport:
    work = tmp_path / "work"
    work.mkdir()
    (work / "console.log").write_bytes(b"[    0.0] Linux\n" + NASTY)
    (work / "qemu.log").write_bytes(b"")
    return SmokeReport(
        name="image",
        machine={"vmm": "qemu", "memory_mib": 256},
        verdict=Verdict.passed,
        reason="it was right",
        cause=None,
        checks=(Check(name="agent.check", verdict=Verdict.passed, detail="it serves", seconds=0.5),),
        timeline=(Event(name="vmm started", seconds=0.0), Event(name="agent started", seconds=0.8, guest=0.51)),
        seconds=1.25,
        accel=Accel(name="tcg", reason="there is no /dev/kvm"),
        command=("/usr/bin/qemu", "-m", "256M", "-nodefaults", "-append", "console=ttyS0 a='b'", "-x", "it's"),
        console=work / "console.log",
        log=work / "qemu.log",
    )


def with_verdict(boot: SmokeReport, verdict: Verdict, name: str = "image") -> SmokeReport:
    cause = Cause(name="panic", sentence="it <panicked> \x1b[1m", line="Kernel panic \x00", hint="do & so")
    check = Check(name="agent.check", verdict=verdict, detail="no \x07 <answer>")
    return dataclasses.replace(boot, name=name, verdict=verdict, checks=(check,), cause=cause, reason="it was not")


@pytest.mark.parametrize(
    ("verdicts", "over", "code"),
    [
        (["passed"], "passed", 0),
        (["passed", "passed"], "passed", 0),
        (["passed", "unknown"], "unknown", 7),
        (["passed", "skipped"], "passed", 0),
        (["failed", "skipped"], "failed", 6),
        (["skipped"], "unknown", 7),
        (["unknown", "failed", "passed"], "failed", 6),
        ([], "unknown", 7),
    ],
)
def test_one_failure_fails_all_and_nothing_is_no_success(
    verdicts: list[str], over: str, code: int, boot: SmokeReport
) -> None:
    report = Report(boots=tuple(dataclasses.replace(boot, verdict=Verdict(verdict)) for verdict in verdicts))
    assert report.verdict == over
    assert report.code == code


def test_the_json_names_its_schema_and_holds_everything(boot: SmokeReport) -> None:
    said = json.loads(Report(boots=(boot, with_verdict(boot, Verdict.failed, "initrd"))).to_json())
    assert (said["schema"], said["version"], said["verdict"]) == ("osbuilder.smoke", 1, "failed")
    image, initrd = said["boots"]
    assert image["accel"] == {"name": "tcg", "reason": "there is no /dev/kvm"}
    assert image["timeline"][1] == {"name": "agent started", "seconds": 0.8, "guest": 0.51}
    assert image["command"][0] == "/usr/bin/qemu"
    assert image["console"] == "image/console.log"
    assert image["cause"] is None
    assert initrd["cause"]["name"] == "panic"


def test_junit_counts_failures_as_failures_and_silence_as_errors(boot: SmokeReport) -> None:
    boots = (boot, with_verdict(boot, Verdict.failed, "b"), with_verdict(boot, Verdict.unknown, "c"))
    root = ElementTree.fromstring(Report(boots=boots).to_junit())
    assert root.tag == "testsuites"
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("3", "1", "1")
    suites = root.findall("testsuite")
    assert [suite.get("name") for suite in suites] == ["image", "b", "c"]
    assert suites[0].find("testcase/failure") is None
    failure = suites[1].find("testcase/failure")
    assert failure is not None
    assert "<answer>" in (failure.get("message") or "")
    assert "it <panicked>" in (failure.text or "")
    assert suites[2].find("testcase/error") is not None


def test_junit_counts_what_was_left_out_as_skipped_with_its_reason(boot: SmokeReport) -> None:
    checks = (*boot.checks, Check(name="clock", verdict=Verdict.skipped, detail="there is no \x07 clock"))
    root = ElementTree.fromstring(Report(boots=(dataclasses.replace(boot, checks=checks),)).to_junit())
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("2", "0", "0")
    assert [suite.get("skipped") for suite in root.findall("testsuite")] == ["1"]  # of all of them nobody's schema asks
    (skipped,) = root.findall("testsuite/testcase/skipped")
    assert skipped.get("message") == "there is no \\x07 clock"


def test_what_a_check_measured_is_in_the_json(boot: SmokeReport) -> None:
    check = dataclasses.replace(boot.checks[0], facts={"cached_kib": 12, "of": ["a", "b"]})
    said = json.loads(Report(boots=(dataclasses.replace(boot, checks=(check,)),)).to_json())
    assert said["boots"][0]["checks"][0]["facts"] == {"cached_kib": 12, "of": ["a", "b"]}


def test_junit_carries_the_console_with_nothing_a_parser_refuses(boot: SmokeReport) -> None:
    text = Report(boots=(boot,)).to_junit()
    out = ElementTree.fromstring(text).findtext("testsuite/system-out")
    assert out is not None
    assert 'red  <&"> \\x00\\x01\ufffd ]]> é' in out


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"plain\ttext\n", "plain\ttext\n"),
        (b"a\r\nb\rc", "a\nb\nc"),
        (b"\x1b[1;31mred\x1b[0m", "red"),
        (b"\x1b]0;owned\x07ok", "ok"),
        (b"\x1b]8;;http://x\x1b\\link", "link"),
        (b"\x1bcreset", "reset"),
        (b"\x00\x07\x7f\x9b", "\\x00\\x07\\x7f\ufffd"),
        ("\x85\x9b31m\ufffe\udc80".encode("utf-8", "surrogatepass"), "\\x85\\x9b31m\\xfffe\ufffd\ufffd\ufffd"),
        ("größe €".encode(), "größe €"),
    ],
)
def test_text_from_a_guest_is_made_harmless(data: bytes, text: str) -> None:
    assert printable(data) == text


def test_everything_is_written_and_readable(boot: SmokeReport, tmp_path: Path) -> None:
    other = with_verdict(boot, Verdict.unknown, "initrd")
    home = tmp_path / "out" / "smoke"
    assert Report(boots=(boot, other)).write(home) == home / "report.json"
    found = sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())
    each = ["command.txt", "console.log", "qemu.log"]
    boots = [f"{name}/{file}" for name in ("image", "initrd") for file in each]
    assert found == sorted([*boots, "console.log", "junit.xml", "report.json"])
    consoles = (home / "console.log").read_bytes()
    assert consoles.index(b"=== image: passed ===") < consoles.index(b"=== initrd: unknown ===")
    assert consoles.count(NASTY) == 2
    assert {path.stat().st_mode & 0o777 for path in home.rglob("*") if path.is_file()} == {0o644}


def test_a_console_that_is_already_in_its_place_stays_there(boot: SmokeReport, tmp_path: Path) -> None:
    home = tmp_path / "smoke"
    (home / "image").mkdir(parents=True)
    for name in ("console.log", "qemu.log"):
        (home / "image" / name).write_bytes(b"here")
    placed = dataclasses.replace(boot, console=home / "image" / "console.log", log=home / "image" / "qemu.log")
    Report(boots=(placed,)).write(home)
    assert (home / "image" / "console.log").read_bytes() == b"here"


def test_a_second_report_replaces_the_first(boot: SmokeReport, tmp_path: Path) -> None:
    Report(boots=(boot,)).write(tmp_path / "smoke")
    Report(boots=(with_verdict(boot, Verdict.failed),)).write(tmp_path / "smoke")
    assert json.loads((tmp_path / "smoke" / "report.json").read_text())["verdict"] == "failed"


def test_report_json_is_the_last_file_and_an_older_one_the_first_to_go(boot: SmokeReport, tmp_path: Path) -> None:
    home = tmp_path / "smoke"
    Report(boots=(boot,)).write(home)

    def page() -> None:
        assert (home / "junit.xml").exists()
        assert (home / "image" / "console.log").exists()
        assert not (home / "report.json").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Report(boots=(boot,)).write(home, page=page)
    assert not (home / "report.json").exists()


@pytest.mark.parametrize("verdict", list(Verdict))
def test_jenkins_schema_accepts_what_ci_gets(verdict: Verdict, boot: SmokeReport) -> None:
    boots = (boot, with_verdict(boot, verdict, "b"), with_verdict(boot, Verdict.unknown, "c"))
    schema = etree.XMLSchema(etree.parse(Path(__file__).parent / "schemas" / "junit-10.xsd"))
    schema.assertValid(etree.fromstring(Report(boots=boots).to_junit().encode()))


def test_jenkins_schema_refuses_what_is_no_report() -> None:
    schema = etree.XMLSchema(etree.parse(Path(__file__).parent / "schemas" / "junit-10.xsd"))
    assert not schema.validate(etree.fromstring("<testsuites><testsuite/></testsuites>"))


def test_a_kvm_in_disguise_is_said_on_the_terminal(
    boot: SmokeReport, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results.print_boots(Report(boots=(boot,)), tmp_path)
    assert "an emulator in disguise" not in capsys.readouterr().out
    found = accel.decide(accel.Count(seconds=0.1), accel.Count(seconds=None, over=0.5))
    results.print_boots(Report(boots=(dataclasses.replace(boot, accel=found),)), tmp_path)
    assert "emulated: /dev/kvm is an emulator in disguise" in capsys.readouterr().out


def test_the_command_repeats_the_boot_with_its_console_on_the_terminal(boot: SmokeReport, tmp_path: Path) -> None:
    """A shell reads it back, with a program in QEMU's place that prints its arguments."""
    printer = tmp_path / "print arguments"
    printer.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    printer.chmod(0o755)
    console = ("-chardev", "file,id=console,path=/a b/console.log")
    agent = ("-chardev", "socket,id=agent,path=/gone/agent.sock,server=on,wait=off")
    printed = dataclasses.replace(boot, command=(str(printer), *boot.command[1:], *console, *agent))
    script = tmp_path / "command.txt"
    script.write_text(printed.command_text())
    said = subprocess.run(["sh", script], check=True, capture_output=True, text=True).stdout
    terminal = ["-chardev", "stdio,id=console,signal=on", "-chardev", "null,id=agent"]
    assert said.splitlines() == [*boot.command[1:], *terminal]
    assert "  -m 256M \\\n  -nodefaults \\\n" in printed.command_text()


@pytest.mark.parametrize(
    "device",
    [
        ("-device", "vhost-vsock-pci,guest-cid=7,vhostfd=9"),
        ("-chardev", "socket,id=vsock,path=/run/x", "-device", "vhost-user-vsock-pci,chardev=vsock"),
        ("-netdev", "tap,id=network,fd=9", "-device", "virtio-net-device,netdev=network,mac=02:00:00:00:00:01"),
        (
            "-chardev",
            "socket,id=service,fd=9",
            "-netdev",
            "user,id=network,restrict=on",
            "-device",
            "virtio-net-pci,netdev=network,mac=02:00:00:00:00:01",
        ),
        ("-chardev", "socket,id=monitor,fd=9", "-mon", "chardev=monitor,mode=control"),
    ],
    ids=["an open file", "another program", "a tap", "QEMU's network", "a monitor"],
)
def test_the_command_leaves_out_what_was_there_for_one_boot_only(device: tuple[str, ...], boot: SmokeReport) -> None:
    command = ("qemu", "-m", "256M", *device, "-nodefaults")
    text = dataclasses.replace(boot, command=command).command_text()
    assert "vsock" not in text
    assert [line.strip(" \\") for line in text.splitlines()[2:]] == ["qemu", "-m 256M", "-nodefaults"]
    at_the_end = dataclasses.replace(boot, command=("qemu", "-m", "256M", *device)).command_text()
    assert [line.strip(" \\") for line in at_the_end.splitlines()[2:]] == ["qemu", "-m 256M"]
