from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from osbuild import doctor
from osbuild.arch import AARCH64, X86_64, Arch, host_arch
from osbuild.cache import Cache
from osbuild.errors import HostError, SpecError
from osbuild.runtime import accel
from osbuild.runtime.accel import Accel, Count

QEMU = Path("/usr/bin/qemu-system-x86_64")
OTHER: Arch = AARCH64 if host_arch() == X86_64 else X86_64

needs_rom = pytest.mark.skipif(host_arch() != X86_64, reason="the counting guest is x86_64")
needs_qemu = pytest.mark.skipif(not QEMU.exists(), reason=f"{QEMU} is not installed")

FakeQemu = Callable[..., Path]


@pytest.fixture
def fake_qemu(tmp_path: Path) -> FakeQemu:
    """A program that behaves as a QEMU would under TCG and under KVM, and notes each of its runs."""

    def make(*, tcg: str, kvm: str) -> Path:
        path = tmp_path / "fake-qemu"
        path.write_text(
            f'#!/bin/sh\necho run >>{tmp_path}/runs\ncase "$*" in *"-accel kvm"*) {kvm};; *) {tcg};; esac\n'
        )
        path.chmod(0o755)
        return path

    return make


@pytest.fixture
def device(tmp_path: Path) -> Path:
    """A /dev/kvm that opens."""
    path = tmp_path / "kvm"
    path.touch()
    return path


SLOW = r"printf '\001'; sleep 0.3; printf '\002'"
FAST = r"printf '\001\002'"
STUCK = r"printf '\001'; exec sleep 60"


@pytest.mark.parametrize(
    ("tcg", "kvm", "name"),
    [
        pytest.param(Count(seconds=0.1), Count(seconds=0.02), "kvm", id="a real KVM"),
        pytest.param(Count(seconds=0.1), Count(seconds=2.5), "tcg", id="slower than TCG"),
        pytest.param(Count(seconds=0.1), Count(seconds=0.09), "tcg", id="hardly faster"),
        pytest.param(Count(seconds=0.1), Count(seconds=None, trouble="still counting"), "tcg", id="never done"),
        pytest.param(Count(seconds=None, trouble="no TCG"), Count(seconds=0.02), "kvm", id="QEMU without TCG"),
        pytest.param(Count(seconds=None), Count(seconds=None), "tcg", id="neither"),
    ],
)
def test_kvm_is_chosen_only_when_it_counts_clearly_faster(tcg: Count, kvm: Count, name: str) -> None:
    found = accel.decide(tcg, kvm)
    assert found.name == name
    assert "\n" not in found.reason
    assert found.reason


@needs_rom
def test_a_fast_kvm_is_used(fake_qemu: FakeQemu, device: Path) -> None:
    assert accel.probe(X86_64, fake_qemu(tcg=SLOW, kvm=FAST), device=device).name == "kvm"


@needs_rom
def test_an_emulator_in_disguise_is_found_out_before_the_deadline(fake_qemu: FakeQemu, device: Path) -> None:
    began = time.monotonic()
    found = accel.probe(X86_64, fake_qemu(tcg=FAST, kvm=STUCK), device=device)
    assert found.name == "tcg"
    told = r"/dev/kvm is an emulator in disguise: slower than TCG \(>0\.\d\d s against 0\.\d\d s\)"
    assert re.fullmatch(told, found.reason)
    assert time.monotonic() - began < accel.TRIES * accel.DEADLINE_SECONDS


def test_doctor_says_that_kvm_is_one(monkeypatch: pytest.MonkeyPatch, device: Path, tmp_path: Path) -> None:
    qemu = tmp_path / host_arch().qemu
    qemu.write_text("")
    qemu.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(accel, "DEVICE", device)
    found = accel.decide(Count(seconds=0.1), Count(seconds=None, over=0.5))
    monkeypatch.setattr(accel, "choose", lambda *_, **__: found)
    said = doctor._kvm()
    assert said.state == "not used (optional)"
    assert "an emulator in disguise" in said.detail
    assert said.detail.endswith("guests are emulated")


@needs_rom
def test_a_guest_that_never_starts_is_given_up_at_the_deadline(fake_qemu: FakeQemu, device: Path) -> None:
    began = time.monotonic()
    found = accel.probe(X86_64, fake_qemu(tcg=FAST, kvm="exec sleep 60"), device=device)
    assert found.name == "tcg"
    assert "not one instruction" in found.reason
    assert time.monotonic() - began < 2 * accel.DEADLINE_SECONDS


@needs_rom
def test_what_qemu_says_against_kvm_is_the_reason(fake_qemu: FakeQemu, device: Path) -> None:
    qemu = fake_qemu(tcg=FAST, kvm="echo 'qemu: failed to initialize kvm: Operation not permitted' >&2; exit 1")
    assert "failed to initialize kvm: Operation not permitted" in accel.probe(X86_64, qemu, device=device).reason


@needs_rom
def test_the_answer_is_remembered_until_qemu_changes(fake_qemu: FakeQemu, device: Path, tmp_path: Path) -> None:
    cache = Cache(root=tmp_path / "cache")
    qemu = fake_qemu(tcg=SLOW, kvm=FAST)
    first = accel.probe(X86_64, qemu, cache=cache, device=device)
    again = accel.probe(X86_64, qemu, cache=cache, device=device)
    assert again == first
    once = (tmp_path / "runs").read_text().count("run")
    os.utime(qemu, (1, 1))
    accel.probe(X86_64, qemu, cache=cache, device=device)
    assert (tmp_path / "runs").read_text().count("run") == 2 * once


SAME = r"printf '\001'; sleep 0.2; printf '\002'"


@needs_rom
def test_a_draw_is_measured_again_the_next_time(fake_qemu: FakeQemu, device: Path, tmp_path: Path) -> None:
    cache = Cache(root=tmp_path / "cache")
    qemu = fake_qemu(tcg=SAME, kvm=SAME)
    assert accel.probe(X86_64, qemu, cache=cache, device=device).name == "tcg"
    once = (tmp_path / "runs").read_text().count("run")
    accel.probe(X86_64, qemu, cache=cache, device=device)
    assert (tmp_path / "runs").read_text().count("run") == 2 * once


@needs_rom
def test_a_kvm_that_was_slow_once_on_a_busy_host_is_used(fake_qemu: FakeQemu, device: Path, tmp_path: Path) -> None:
    slow_at_first = f"if mkdir {tmp_path}/was 2>/dev/null; then {STUCK}; else {FAST}; fi"
    assert accel.probe(X86_64, fake_qemu(tcg=SLOW, kvm=slow_at_first), device=device).name == "kvm"


@needs_rom
def test_a_tcg_that_was_slow_once_does_not_make_kvm_look_fast(
    fake_qemu: FakeQemu, device: Path, tmp_path: Path
) -> None:
    slow_at_first = f"if mkdir {tmp_path}/was 2>/dev/null; then {SLOW}; else {FAST}; fi"
    assert accel.probe(X86_64, fake_qemu(tcg=slow_at_first, kvm=SLOW), device=device).name == "tcg"


@pytest.mark.parametrize(
    ("tcg", "kvm", "clear"),
    [
        pytest.param(Count(seconds=0.1), Count(seconds=0.02), True, id="a real KVM"),
        pytest.param(Count(seconds=0.1), Count(seconds=None, over=0.4), True, id="an emulator in disguise"),
        pytest.param(Count(seconds=0.35), Count(seconds=None, over=0.4), False, id="given up, and TCG was as slow"),
        pytest.param(Count(seconds=0.1), Count(seconds=0.09), False, id="a draw"),
        pytest.param(Count(seconds=0.1), Count(seconds=0.06), False, id="just enough"),
        pytest.param(Count(seconds=0.1), Count(seconds=None, trouble="EPERM"), True, id="refused"),
        pytest.param(Count(seconds=0.1), Count(seconds=None, trouble="silent", late=True), False, id="silent"),
        pytest.param(Count(seconds=None, trouble="no TCG"), Count(seconds=0.1), True, id="no TCG"),
        pytest.param(Count(seconds=None, over=2.0), Count(seconds=0.1), False, id="TCG given up"),
    ],
)
def test_only_what_is_far_from_a_draw_is_remembered(tcg: Count, kvm: Count, clear: bool) -> None:
    assert accel.is_clear(tcg, kvm) is clear


@needs_rom
@pytest.mark.parametrize(
    "garbage",
    [b"", b"\xff\x00", b"[]", b'{"name": "kvm"}', b'{"name": "hax", "reason": ""}', b'{"name": "kvm", "reason": 7}'],
    ids=["empty", "binary", "list", "half", "unknown name", "wrong type"],
)
def test_a_garbled_memory_is_measured_again(garbage: bytes, fake_qemu: FakeQemu, device: Path, tmp_path: Path) -> None:
    cache = Cache(root=tmp_path / "cache")
    qemu = fake_qemu(tcg=FAST, kvm="exit 1")
    accel.probe(X86_64, qemu, cache=cache, device=device)
    (remembered,) = cache.scratch("accel").iterdir()
    remembered.write_bytes(garbage)
    assert accel.probe(X86_64, qemu, cache=cache, device=device).name == "tcg"
    assert json.loads(remembered.read_text())["name"] == "tcg"


@needs_rom
def test_a_memory_that_cannot_be_written_does_no_harm(fake_qemu: FakeQemu, device: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = Cache(root=tmp_path / "file" / "cache")
    assert accel.probe(X86_64, fake_qemu(tcg=SLOW, kvm=FAST), cache=cache, device=device).name == "kvm"


def test_no_device_means_software_emulation_with_a_reason(tmp_path: Path) -> None:
    found = accel.probe(host_arch(), QEMU, device=tmp_path / "nothing")
    assert found == Accel(name="tcg", reason=f"there is no {tmp_path}/nothing")


@pytest.mark.skipif(os.getuid() != 0, reason="needs to become somebody else")
def test_a_device_that_may_not_be_opened_means_software_emulation(device: Path) -> None:
    device.chmod(0o600)
    for parent in list(device.parents)[:3]:
        parent.chmod(0o755)
    os.seteuid(65534)
    try:
        found = accel.probe(host_arch(), QEMU, device=device)
    finally:
        os.seteuid(0)
    assert found.name == "tcg"
    assert "may not be opened by this user" in found.reason


def test_a_guest_of_another_architecture_is_emulated_without_a_look(tmp_path: Path) -> None:
    found = accel.probe(OTHER, tmp_path / "no-qemu")
    assert found.name == "tcg"
    assert OTHER.name in found.reason


def test_insisting_on_kvm_fails_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="there is no"):
        accel.choose("kvm", host_arch(), QEMU, device=tmp_path / "nothing")


def test_asking_for_tcg_measures_nothing(tmp_path: Path) -> None:
    assert accel.choose("tcg", X86_64, tmp_path / "no-qemu").name == "tcg"


def test_an_unknown_accelerator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="no accelerator 'xen'"):
        accel.choose("xen", X86_64, tmp_path / "no-qemu")


@needs_rom
@needs_qemu
@pytest.mark.boot
def test_the_counting_guest_counts_under_tcg() -> None:
    counted = accel.count(X86_64, QEMU, "tcg")
    assert counted.seconds is not None, counted.trouble
    assert 0.005 < counted.seconds < accel.DEADLINE_SECONDS


@needs_rom
@needs_qemu
@pytest.mark.boot
def test_the_probe_answers_on_this_machine_within_its_deadlines() -> None:
    began = time.monotonic()
    found = accel.probe(X86_64, QEMU)
    assert time.monotonic() - began < 2 * accel.TRIES * accel.DEADLINE_SECONDS + 1
    assert found.name in ("kvm", "tcg")
