from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from osbuild import autopsy, causes
from osbuild.artifacts import Kernel
from osbuild.autopsy import Evidence, Phase
from osbuild.runtime.placing import kernel_end, overlap
from tests import causes_page, recordings
from tests.boot_fixtures import boot_kernel
from tests.injections import INJECTIONS, Injection
from tests.lab import SECONDS

__all__ = ["boot_kernel"]  # a fixture

CONSOLES = Path(__file__).parent / "consoles"

# Recorded from guests of other kernels, of which there is nothing but the console.
CAUSES = {
    "root-missing": "root-missing",
    "root-filesystem": "filesystem-unsupported",
    "dax-unsupported": "dax-unsupported",
    "mount-options": "mount-options",
    "ext4-data-without-journal": "mount-options",
    "init-missing-image": "init-missing",
    "init-missing-initrd": "init-missing",
    "init-exited": "init-exited",
    "init-faulted": "init-crashed",
    "init-not-executable": "init-not-executable",
    "init-other-architecture": "init-architecture",
    "initrd-junk": "initrd-damaged",
    "initrd-compression": "initrd-compression",
    "pmem-alignment": "pmem-alignment",
    "initramfs-panics-early": "initrd-memory",
    "initramfs-panics-while-unpacked": "initrd-memory",
    "restarted": "restarted",
}


# --- The injections, as they were recorded ----------------------------------------------------------------------------


@pytest.mark.parametrize("injected", INJECTIONS, ids=lambda injected: injected.name)
def test_what_was_recorded_of_an_injection_has_its_cause(injected: Injection) -> None:
    evidence = recordings.read(injected.name)
    cause = autopsy.explain(evidence)
    assert (cause.name, cause.certain) == (injected.named or injected.cause, injected.certain)
    assert cause.line in evidence.console + evidence.log + evidence.doubt
    silent = evidence.over_kernel or cause.name in ("triple-fault", "memory-tiny", "silent")
    assert cause.line or silent, "which leave nothing behind"


def test_nine_in_ten_causes_are_named_and_none_wrongly_with_confidence(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [(one, autopsy.explain(recordings.read(one.name)), recordings.seconds(one.name)) for one in INJECTIONS]
    with capsys.disabled():
        if os.environ.get("OSBUILDER_SCORE"):
            for one, said, seconds in rows:
                sure = "certain" if said.certain else "a guess"
                print(f"{one.name:45} {one.cause:24} {said.name:24} {sure:8} {seconds:6.1f} s")  # noqa: T201
    wrong = [one.name for one, said, _ in rows if said.certain and said.name != one.cause]
    assert wrong == []
    causes = {one.cause for one in INJECTIONS}
    missed = {one.cause for one, said, _ in rows if said.name != one.cause}
    assert len(causes) >= 30
    assert len(causes - missed) >= 0.9 * len(causes), missed
    named = sum(said.name == one.cause for one, said, _ in rows)
    assert named >= 0.9 * len(rows)


def test_no_cause_was_waited_for_as_long_as_the_deadline_was() -> None:
    assert max(recordings.seconds(one.name) for one in INJECTIONS if one.certain) < SECONDS


# What no guest of ours can be made to show, or only by another VMM.
_NOT_INJECTED = {"vmm-sandbox", "clock", "systemd-stuck"}


def test_every_cause_has_an_injection_but_these() -> None:
    names = {row.name for row in (*causes.VMM, *causes.GUEST)} | causes.OUTCOMES.keys()
    assert names - {one.cause for one in INJECTIONS} - {one.named for one in INJECTIONS} == _NOT_INJECTED | {"unknown"}


def test_every_cause_says_what_to_do() -> None:
    rows = {row.name: row.hint for row in (*causes.VMM, *causes.GUEST)}
    rows |= {name: outcome.hint for name, outcome in causes.OUTCOMES.items()}
    assert [name for name, hint in rows.items() if not hint] == ["unknown"]


def test_the_page_of_causes_is_that_of_the_table() -> None:
    """OSBUILDER_RECORD=1 writes it."""
    page = causes_page.page()
    if os.environ.get("OSBUILDER_RECORD"):
        causes_page.PATH.write_text(page)
    assert causes_page.PATH.read_text() == page


# --- Consoles ---------------------------------------------------------------------------------------------------------


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


def test_a_guest_without_memory_is_told_of_its_initramfs_only_while_that_is_unpacked() -> None:
    console = recorded("initramfs-panics-while-unpacked")
    cause = autopsy.explain(Evidence(console=console, status=0))
    assert cause.line.endswith("Kernel panic - not syncing: System is deadlocked on memory")
    start = console.index("[    1.616012] workingset")
    freed = f"{console[:start]}[    1.600000] Freeing initrd memory: 82196K\n{console[start:]}"
    assert autopsy.explain(Evidence(console=freed, status=0)).name == "oom"
    older = console.replace("Unpacking initramfs...", "Trying to unpack rootfs image as initramfs...")
    assert autopsy.explain(Evidence(console=older, status=0)).name == "initrd-memory"


@pytest.mark.parametrize(
    "console", ["", "[    0.000000] Linux version 6\n[    0.100000] Oops: general protection fault\n"]
)
@pytest.mark.parametrize("status", [0, None])
def test_an_initramfs_that_lies_over_the_kernel_is_told_whatever_it_has_hit(console: str, status: int | None) -> None:
    left = Evidence(console=console, status=status, stopped=status is None, memory_mib=110)
    assert autopsy.explain(left).name != "initrd-memory"
    cause = autopsy.explain(dataclasses.replace(left, over_kernel=2_621_440))
    assert (cause.name, cause.certain) == ("initrd-memory", True)
    assert cause.sentence == "the initramfs lies at the end of the guest's 110 MiB, and 2560 KiB of it over the kernel"


def test_a_guest_that_came_to_init_or_answered_did_not_die_of_where_its_initramfs_lay() -> None:
    started = "[    1.000000] Run /init as init process\n"
    for left in (Evidence(console=started, over_kernel=4096), Evidence(console="", answered=True, over_kernel=4096)):
        assert autopsy.explain(left).name != "initrd-memory"


def test_an_archive_at_the_end_of_memory_may_reach_into_the_kernel() -> None:
    mib = 1 << 20
    assert overlap(256 * mib, 80 * mib, 33 * mib) == 0
    assert overlap(113 * mib, 80 * mib, 33 * mib) == 0
    assert overlap(113 * mib, 80 * mib + 1, 33 * mib) == 4096
    assert overlap(64 * mib, 80 * mib, 33 * mib) == 49 * mib


def test_a_kernel_ends_where_readelf_says_with_what_is_not_in_the_file(boot_kernel: Kernel) -> None:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed: apt-get install binutils")
    path = boot_kernel.vmlinux.path
    said = subprocess.run(["readelf", "-lW", path], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in said.splitlines() if line.startswith("  LOAD ")]
    assert kernel_end(path) == max(int(row[3], 16) + int(row[5], 16) for row in rows) > path.stat().st_size


@pytest.mark.parametrize("data", [b"", b"\x7fELF", b"\x7fELF" + bytes(200), bytes(4096)])
def test_what_is_no_kernel_ends_nowhere(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(data)
    assert kernel_end(tmp_path / "vmlinux") == 0


def test_every_recording_is_used() -> None:
    used = {*CAUSES, "passed-image", "passed-initrd", "agent-absent", "clock-missing"}
    used |= {one.name for one in INJECTIONS}
    assert {path.stem for path in CONSOLES.glob("*.log")} == used


def test_a_guest_without_a_clock_is_named_but_not_judged() -> None:
    cause = autopsy.explain(Evidence(console=recorded("clock-missing"), status=None))
    assert (cause.name, cause.certain) == ("clock", False)


def test_a_line_that_would_explain_a_death_is_only_a_guess_about_silence() -> None:
    line = "[    0.500000] EXT4-fs (vda1): DAX unsupported by block device.\n"
    started = "[    0.600000] Run /sbin/init as init process\n"
    assert not autopsy.explain(Evidence(console=line + started, status=None)).certain


_JUNK = "[    0.300000] Initramfs unpacking failed: junk within compressed archive\n"
_DAMAGED = "[    0.700000] EXT4-fs error (device pmem0p1): ext4_lookup:1: inode #18: comm sh: bad\n"


@pytest.mark.parametrize(
    ("said", "words", "name", "certain"),
    [
        (_JUNK, "", "initrd-damaged", True),
        (_JUNK.replace("junk within compressed archive", "write error"), "", "initrd-memory", True),
        (_DAMAGED, "root=/dev/pmem0p1", "filesystem-damaged", True),
        (_DAMAGED.replace("pmem0p1", "vdb1"), "root=/dev/pmem0p1", "agent-absent", False),
        (_DAMAGED, "root=PARTUUID=1-2", "filesystem-damaged", False),
        (_JUNK.partition("] ")[2], "", "agent-absent", False),
        ("[    0.300000] BUG: kernel NULL pointer dereference, address: 0\n", "", "oops", False),
    ],
    ids=["initramfs", "half of it", "root", "another disk", "perhaps the root", "quoted", "an oops"],
)
def test_what_is_broken_in_any_guest_is_broken_in_one_that_fell_silent_after_init_started(
    said: str, words: str, name: str, certain: bool
) -> None:
    told = [f"[    0.000001] Kernel command line: {words}\n", "[    0.500000] Run /init as init process\n", said]
    console = "".join(sorted(told))
    for status, stopped in ((None, False), (-9, True)):
        cause = autopsy.explain(Evidence(console=console, status=status, stopped=stopped))
        assert (cause.name, cause.certain) == (name, certain), cause
    cause = autopsy.explain(Evidence(console=console, status=-9, stopped=True, flooded=True))
    assert cause.name != name or not cause.certain, "that is how it ended"


@pytest.mark.parametrize(
    ("console", "phase"),
    [
        ("", Phase.nothing),
        ("\n \n", Phase.nothing),
        ("SeaBIOS (version 1.16.2)\n", Phase.firmware),
        ("[    0.000000] Linux version 6.12.1 (a@b)\n", Phase.kernel),
        ("[    0.000000] Linux\n[    0.600000] Run /init as init process\n", Phase.init),
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


def test_a_guest_that_filled_its_disk_is_not_said_to_have_been_killed_by_somebody() -> None:
    console = "[    0.000000] Linux version 6\n"
    said = f"{causes.BOUND} 32 MiB to its disk: more than 24 MiB"
    cause = autopsy.explain(Evidence(console=console, log=f"qemu: warning: x\n{said}\n", status=-25, doubt="slow"))
    assert (cause.name, cause.certain, cause.line) == ("disk-flood", True, said)
    quoted = Evidence(console=f"{console}{said}\n", log=f"qemu: {said}\n", status=-25)
    assert autopsy.explain(quoted).name == "vmm-killed"


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


@pytest.mark.parametrize("word", ["x.root=abc", "x-root=/dev/vda1", "x.rootfstype=xfs rootflags=root=/dev/vda1"])
def test_the_root_is_the_word_of_that_name_and_no_other(word: str) -> None:
    words = f"[    0.000001] Kernel command line: root=/dev/pmem0p1 rootfstype=ext4 {word}\n"
    console = Evidence(console=words).read
    assert (console.roots, console.tried) == (frozenset({"pmem0p1"}), frozenset({"ext4"}))
    dax = "[    0.500000] EXT4-fs (pmem0p1): DAX unsupported by block device.\n"
    end = '[    0.600000] Kernel panic - not syncing: VFS: Unable to mount root fs on "/dev/pmem0p1"\n'
    cause = autopsy.explain(Evidence(console=words + dax + end, status=0))
    assert (cause.name, cause.certain) == ("dax-unsupported", True)


def test_a_library_that_was_missing_before_other_things_happened_is_not_blamed() -> None:
    missing = "tool: error while loading shared libraries: libx.so: cannot open shared object file\n"
    end = "[    9.000000] Kernel panic - not syncing: Attempted to kill init! exitcode=0x00007f00\n"
    soon = autopsy.explain(Evidence(console=missing + end, status=0))
    assert (soon.name, soon.certain, soon.sentence.split()[-1]) == ("library-missing", True, "libx.so")
    for other in (missing + "and so on\n" + end, missing + end.replace("7f00", "0100")):
        cause = autopsy.explain(Evidence(console=other, status=0))
        assert (cause.name, cause.certain) == ("init-exited", True)


def test_a_full_disk_is_blamed_before_a_guest_that_nobody_saw() -> None:
    console = "[    0.000000] Linux version 6\n[    0.100000] and then no room\n"
    seen = autopsy.unseen(Evidence(console=console, status=0, full=True, answered=True))
    assert seen is not None
    assert seen.name == "console-full"
    assert autopsy.unseen(Evidence(console=console, status=0, answered=True)) is None


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("vmm-failed", {"status": 3, "log": "qemu: something that no table knows\n"}),
        ("vmm-killed", {"status": -9}),
        ("flood", {"status": -9, "stopped": True, "flooded": True}),
        ("panic", {"status": 0, "console": "[    1.000000] Kernel panic - not syncing: of a new kind\n"}),
        ("console-full", {"status": 0}),
        ("console-full", {"status": None}),
        ("console-full", {"status": -15, "stopped": True}),
    ],
)
def test_a_full_disk_hides_no_end_that_was_seen(name: str, more: dict[str, Any]) -> None:
    console = "[    0.000000] Linux version 6\n[    0.100000] and then no room\n"
    assert autopsy.explain(Evidence(**{"console": console, "full": True, **more})).name == name


def test_an_agent_that_listens_where_it_is_asked_is_only_silent() -> None:
    line = '{"msg":"agent started"}\n{"msg":"listening","address":"%s"}\n'
    for address, transport, name in (
        ("virtio-serial:/dev/vport1p1", "serial", "agent-silent"),
        ("vsock://3:1024", "vsock", "agent-silent"),
        ("vsock://-1:1024", "vsock", "vsock-missing"),
        ("vsock://3:1024", "serial", "serial-missing"),
        ("unix:/run/agent", "vsock", "agent-deaf"),
    ):
        cause = autopsy.explain(Evidence(console=line % address, transport=transport))
        assert (cause.name, cause.certain) == (name, False), (address, transport)


def test_another_reason_for_a_panic_is_quoted() -> None:
    cause = autopsy.explain(Evidence(console="[    1.000000] Kernel panic - not syncing: hung_task: blocked tasks\n"))
    assert cause.name == "panic"
    assert cause.sentence.endswith("hung_task: blocked tasks")


def test_braces_in_a_guests_words_are_only_words() -> None:
    cause = autopsy.explain(Evidence(console="[    1.000000] Kernel panic - not syncing: {why} {0} %s\n"))
    assert cause.sentence.endswith("{why} {0} %s")


@pytest.mark.parametrize(
    "garbage",
    [bytes(range(256)) * 40, b"\x1b" * 5000, b"\x1b[" * 5000, b"\x1b]" + b"x" * 100_000, b"\xff\xfe\n" * 100],
    ids=["every byte", "escapes", "half sequences", "endless title", "not text"],
)
def test_garbage_is_read_quickly_and_comes_out_printable(garbage: bytes, tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(garbage)
    began = time.process_time()
    text = autopsy.console_text(path)
    autopsy.explain(Evidence(console=text))
    assert time.process_time() - began < 2
    assert not {chr(code) for code in range(32)} - {"\t", "\n"} & set(text)


def _bytes_read() -> int:
    """By this process, from files and from anything else, since it began."""
    return int(Path("/proc/self/io").read_text().split()[1])


def test_of_a_huge_console_only_both_ends_are_read(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    with path.open("wb") as file:
        file.write(b"[    0.000000] Linux version 6.12\n")
        file.seek(4 << 30)
        file.write(b"\n[    9.000000] Kernel panic - not syncing: the end\n")
    before = _bytes_read()
    text = autopsy.console_text(path)
    assert _bytes_read() - before < 2 * (autopsy.HEAD_BYTES + autopsy.TAIL_BYTES)
    assert len(text) < 4 * (autopsy.HEAD_BYTES + autopsy.TAIL_BYTES) + 1000
    assert autopsy.explain(Evidence(console=text)).name == "panic"
    assert "left out" in text
