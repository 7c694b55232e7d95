from __future__ import annotations

import time
from pathlib import Path

import pytest

from osbuild import autopsy
from osbuild.autopsy import Evidence, Phase

CONSOLES = Path(__file__).parent / "consoles"

# Recorded from real guests that were wrong in one way each.
CAUSES = {
    "root-missing": "root-missing",
    "root-filesystem": "root-filesystem",
    "dax-unsupported": "dax-unsupported",
    "mount-options": "mount-options",
    "ext4-data-without-journal": "mount-options",
    "init-missing-image": "init-missing",
    "init-missing-initrd": "init-missing",
    "init-exited": "init-exited",
    "init-faulted": "init-exited",
    "init-not-executable": "init-not-runnable",
    "init-other-architecture": "init-not-runnable",
    "initrd-junk": "initrd-compression",
    "initrd-compression": "initrd-compression",
    "pmem-alignment": "pmem-alignment",
    "oom": "oom",
    "restarted": "restarted",
}


def recorded(name: str) -> str:
    return autopsy.console_text(CONSOLES / f"{name}.log")


@pytest.mark.parametrize("name", CAUSES)
def test_a_recorded_death_has_its_cause_and_the_line_that_shows_it(name: str) -> None:
    console = recorded(name)
    cause = autopsy.explain(Evidence(console=console, status=0))
    assert cause.name == CAUSES[name]
    assert cause.certain
    assert cause.line in console
    assert cause.line


@pytest.mark.parametrize("name", ["passed-image", "passed-initrd"])
def test_nothing_is_found_on_the_console_of_a_guest_that_was_right(name: str) -> None:
    console = recorded(name)
    still_running = console[: console.index('"msg":"powering off"')]
    cause = autopsy.explain(Evidence(console=still_running, status=None))
    assert cause.name == "agent-silent"
    assert not cause.certain


def test_every_recording_is_used() -> None:
    used = {*CAUSES, "passed-image", "passed-initrd", "agent-absent", "clock-missing"}
    assert {path.stem for path in CONSOLES.glob("*.log")} == used


def test_a_guest_without_a_clock_is_named_but_not_judged() -> None:
    cause = autopsy.explain(Evidence(console=recorded("clock-missing"), status=None))
    assert (cause.name, cause.certain) == ("clock", False)


def test_a_line_that_would_explain_a_death_is_only_a_guess_about_silence() -> None:
    line = "[    0.5] EXT4-fs (vda1): DAX unsupported by block device.\n[    0.6] Run /sbin/init as init process\n"
    assert not autopsy.explain(Evidence(console=line, status=None)).certain


@pytest.mark.parametrize(
    ("console", "phase"),
    [
        ("", Phase.nothing),
        ("\n \n", Phase.nothing),
        ("SeaBIOS (version 1.16.2)\n", Phase.firmware),
        ("[    0.000000] Linux version 6.12.1 (a@b)\n", Phase.kernel),
        ("[    0.000000] Linux\n[    0.6] Run /init as init process\n", Phase.init),
        ('{"msg":"agent started","level":"INFO"}\n', Phase.agent),
    ],
)
def test_the_phase_is_the_furthest_that_the_console_shows(console: str, phase: Phase) -> None:
    assert Evidence(console=console).phase is phase


@pytest.mark.parametrize(
    ("log", "name"),
    [
        ("qemu-system-x86_64: -device nvdimm,x=1: Property 'nvdimm.x' not found\n", "vmm-option"),
        ("qemu-system-x86_64: -foo: invalid option\n", "vmm-option"),
        ('qemu-system-x86_64: unsupported machine type: "q36"\n', "vmm-option"),
        ("qemu: could not load kernel '/nope': No such file or directory\n", "vmm-file"),
        ("qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory\n", "vmm-memory"),
        ("Could not access KVM kernel module: Permission denied\nqemu: failed to initialize kvm\n", "vmm-kvm"),
        ("qemu: Error loading uncompressed kernel without PVH ELF Note\n", "vmm-kernel"),
        ("qemu: linux kernel too old to load a ram disk\n", "vmm-kernel"),
        ("something nobody has seen before\n", "vmm-failed"),
    ],
)
def test_what_qemu_refuses_is_told_in_its_own_words(log: str, name: str) -> None:
    cause = autopsy.explain(Evidence(console="", log=log, status=1))
    assert cause.name == name
    assert cause.line in log


def test_a_warning_of_qemus_explains_nothing_once_a_guest_ran() -> None:
    log = "qemu-system-x86_64: warning: -something: invalid option\n"
    cause = autopsy.explain(Evidence(console=recorded("init-exited"), log=log, status=0))
    assert cause.name == "init-exited"


def test_a_killed_qemu_is_told_with_the_signal() -> None:
    cause = autopsy.explain(Evidence(console="[    0.000000] Linux version 6\n", status=-9))
    assert cause.name == "vmm-killed"
    assert "SIGKILL" in cause.sentence


def test_silence_from_the_start_is_not_called_anything_else() -> None:
    cause = autopsy.explain(Evidence(console="", status=None))
    assert (cause.name, cause.certain) == ("silent", False)


def test_what_nobody_knows_is_unknown_with_the_last_line() -> None:
    cause = autopsy.explain(Evidence(console="[    0.000000] Linux version 6\n[    0.2] hm\n", status=None))
    assert cause.sentence == "unknown, last seen: [    0.2] hm"
    assert not cause.certain


def test_init_without_an_agent_is_told_so() -> None:
    cause = autopsy.explain(Evidence(console=recorded("agent-absent"), status=None))
    assert (cause.name, cause.certain) == ("agent-absent", False)


def test_another_reason_for_a_panic_is_quoted() -> None:
    cause = autopsy.explain(Evidence(console="[    1.0] Kernel panic - not syncing: hung_task: blocked tasks\n"))
    assert cause.name == "panic"
    assert cause.sentence.endswith("hung_task: blocked tasks")


def test_braces_in_a_guests_words_are_only_words() -> None:
    cause = autopsy.explain(Evidence(console="[    1.0] Kernel panic - not syncing: {why} {0} %s\n"))
    assert cause.sentence.endswith("{why} {0} %s")


@pytest.mark.parametrize(
    "garbage",
    [bytes(range(256)) * 40, b"\x1b" * 5000, b"\x1b[" * 5000, b"\x1b]" + b"x" * 100_000, b"\xff\xfe\n" * 100],
    ids=["every byte", "escapes", "half sequences", "endless title", "not text"],
)
def test_garbage_is_read_quickly_and_comes_out_printable(garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(garbage)
    began = time.monotonic()
    text = autopsy.console_text(path)
    autopsy.explain(Evidence(console=text))
    assert time.monotonic() - began < 2
    assert not {chr(code) for code in range(32)} - {"\t", "\n"} & set(text)


def test_of_a_huge_console_only_both_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    with path.open("wb") as file:
        file.write(b"[    0.000000] Linux version 6.12\n")
        file.seek(4 << 30)
        file.write(b"\n[    9.000000] Kernel panic - not syncing: the end\n")
    began = time.monotonic()
    text = autopsy.console_text(path)
    assert time.monotonic() - began < 2
    assert len(text) < 4 * (autopsy.HEAD_BYTES + autopsy.TAIL_BYTES) + 1000
    assert autopsy.explain(Evidence(console=text)).name == "panic"
    assert "left out" in text
