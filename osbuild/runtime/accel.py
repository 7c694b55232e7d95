"""Is KVM of use here? A guest of 150 bytes counts under TCG and under KVM; KVM is chosen only if it wins clearly.

A /dev/kvm that opens proves nothing: on some nested hosts it runs guests through an instruction emulator, in which
firmware starts, a kernel prints its first lines, and then nothing happens for minutes. There, counting takes a
hundred times longer than under software emulation; on processors that virtualise, a third of its time or less.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import select
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.arch import Arch, host_arch
from osbuild.cache import Cache
from osbuild.errors import HostError, OsbuilderError, SpecError
from osbuild.runtime import bounds

CHOICES: Final = ("auto", "kvm", "tcg")
DEVICE: Final = Path("/dev/kvm")
TURNS: Final = 50_000_000  # 0.08 s under TCG, some 0.02 s under a real KVM: both far above a scheduler's noise
DEADLINE_SECONDS: Final = 2.0  # for one counting guest, QEMU's own start included
PATIENCE_SECONDS: Final = 0.4  # who counts longer than this, and than TCG did, has lost: no need to wait for the end
ADVANTAGE: Final = 1.5  # how many times faster than TCG is "well before"
CLEAR: Final = 2.0  # times faster, or slower: what is nearer to 1 may be the host's load, and is not remembered
TRIES: Final = 3  # of each; the best counts, for a busy host makes a guest slower and never faster

_BEGIN, _END = 0x01, 0x02  # what the guest writes; QEMU's complaints share the pipe, and have no such bytes
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_MEMORY: Final = "accel"  # the scratch directory that remembers


@dataclass(frozen=True, slots=True, kw_only=True)
class Accel:
    """What guests will run on, and why in one sentence."""

    name: str  # as QEMU spells it
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How one counting guest fared: `seconds` from its first byte to its last, or what stood in the way."""

    seconds: float | None
    trouble: str = ""
    over: float = 0.0  # it was still counting after so many seconds, when we stopped waiting
    late: bool = False  # it had not begun when we stopped waiting


def choose(wish: str, arch: Arch, qemu: Path, *, cache: Cache | None = None, device: Path = DEVICE) -> Accel:
    """The accelerator for guests of `arch`: TCG if that was asked for, else what `probe` says.

    HostError when KVM was insisted on and is of no use.
    """
    if wish not in CHOICES:
        raise SpecError(f"no accelerator {wish!r}", hint=f"one of {', '.join(CHOICES)}")
    if wish == "tcg":
        return Accel(name="tcg", reason="software emulation was asked for")
    found = probe(arch, qemu, cache=cache, device=device)
    if wish == "kvm" and found.name != "kvm":
        raise HostError(f"KVM is of no use here: {found.reason}", hint="leave --accel out to use software emulation")
    return found


def probe(arch: Arch, qemu: Path, *, cache: Cache | None = None, device: Path = DEVICE) -> Accel:
    """Whether KVM is of use for `arch` on this machine; a clear answer is remembered until the machine boots again."""
    if arch != host_arch():
        return Accel(name="tcg", reason=f"KVM runs only {host_arch().name} guests here, and this one is {arch.name}")
    obstacle = _obstacle(device)
    if obstacle:
        return Accel(name="tcg", reason=obstacle)
    if arch.name not in _ROMS:
        return Accel(name="kvm", reason=f"{device} opens (how fast it is cannot be measured on {arch.name} yet)")
    memory = _memory(cache, _key(arch, qemu))
    remembered = _recall(memory)
    if remembered is not None:
        return remembered
    tcg = best(lambda: count(arch, qemu, "tcg"))
    kvm = best(lambda: count(arch, qemu, "kvm", patience=max(PATIENCE_SECONDS, tcg.seconds or 0.0)), tcg)
    answer = decide(tcg, kvm)
    if is_clear(tcg, kvm):
        _remember(memory, answer)
    return answer


def best(run: Callable[[], Count], other: Count | None = None) -> Count:
    """The fastest of TRIES; of fewer where one has won clearly over `other` already, or did not count at all."""
    fastest = run()
    for _ in range(TRIES - 1):
        if fastest.seconds is None and not fastest.over:  # a refusal: three are not truer
            break
        if other is not None and fastest.seconds is not None and is_clear(other, fastest):
            break
        again = run()
        if again.seconds is not None and (fastest.seconds is None or again.seconds < fastest.seconds):
            fastest = again
    return fastest


def is_clear(tcg: Count, kvm: Count) -> bool:
    """Whether it will be the same answer tomorrow: what was seen is far from a draw, and nobody was too slow to start.

    A KVM that was given up has counted for longer than PATIENCE_SECONDS, and TCG must have been far below that.
    """
    if kvm.seconds is None and not kvm.over:
        return not kvm.late  # KVM's own refusal
    if tcg.seconds is None:
        return not tcg.late and not tcg.over
    took = kvm.over if kvm.seconds is None else kvm.seconds
    return took * CLEAR <= tcg.seconds or (took >= tcg.seconds * CLEAR and took > 0)


def doubt(arch: Arch, qemu: Path) -> str:
    """Why KVM is of no use now, whatever was measured before; empty when it is of use.

    For a guest that KVM runs, and that is silent: this machine may have moved to a host without a processor that
    virtualises since it was asked.
    """
    found = probe(arch, qemu)
    return "" if found.name == "kvm" else found.reason


def decide(tcg: Count, kvm: Count) -> Accel:
    """KVM, if it counted and did so well before TCG."""
    if kvm.over and tcg.seconds is not None:
        told = f">{kvm.over:.2f} s against {tcg.seconds:.2f} s"
        return Accel(name="tcg", reason=f"{DEVICE} is an emulator in disguise: slower than TCG ({told})")
    if kvm.seconds is None:
        return Accel(name="tcg", reason=f"{DEVICE} ran no guest to its end: {kvm.trouble}")
    if tcg.seconds is None:
        return Accel(name="kvm", reason=f"{DEVICE} works, and emulation does not: {tcg.trouble}")
    told = f"{kvm.seconds:.2f} s against {tcg.seconds:.2f} s"
    if kvm.seconds * ADVANTAGE >= tcg.seconds:  # 0 and 0: neither was measured
        return Accel(name="tcg", reason=f"{DEVICE} is an emulator in disguise: hardly faster than TCG ({told})")
    return Accel(name="kvm", reason=f"{DEVICE} is faster than emulation ({told})")


def count(arch: Arch, qemu: Path, accel: str, *, patience: float = DEADLINE_SECONDS) -> Count:
    """Let a guest count under `accel`; give up when counting takes longer than `patience`, or all of it too long."""
    with tempfile.TemporaryDirectory(prefix="osbuilder-accel-") as directory:
        rom = Path(directory, "rom")
        rom.write_bytes(_ROMS[arch.name])
        argv = [
            str(qemu),
            "-machine", "microvm,pic=off,pit=off,rtc=off,x-option-roms=off",
            "-accel", accel,
            "-m", "2M",
            "-bios", "rom",
            "-nodefaults",
            "-no-user-config",
            "-display", "none",
            "-chardev", "stdio,id=out,signal=off",
            "-device", "isa-debugcon,chardev=out,iobase=0xe9",
            "-device", "isa-debug-exit,iobase=0xf4,iosize=1",
        ]  # fmt: skip
        with command.start(*argv, cwd=Path(directory), pipe=True, limits=bounds.limits()) as process:
            assert process.stdout is not None  # pipe=True
            try:
                return _listen(process.stdout.fileno(), patience)
            finally:
                process.kill()  # nothing in it deserves a grace period


def _listen(descriptor: int, patience: float) -> Count:
    deadline = time.monotonic() + DEADLINE_SECONDS
    began: float | None = None
    said = bytearray()
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([descriptor], [], [], left)
        now = time.monotonic()
        if not ready:
            break
        data = os.read(descriptor, 4096)
        if not data:
            words = said.decode(errors="replace").replace(chr(_BEGIN), "").strip().splitlines()
            return Count(seconds=None, trouble=words[-1] if words else "QEMU ended without a word")
        said += data[:4096]
        if began is None and _BEGIN in data:
            began = now
            deadline = min(deadline, now + patience)
        if began is not None and _END in data:
            return Count(seconds=now - began)
    if began is None:
        trouble = f"not one instruction was seen to run in {DEADLINE_SECONDS:g} s"
        return Count(seconds=None, trouble=trouble, late=True)
    over = time.monotonic() - began
    return Count(seconds=None, trouble=f"still counting after {over:.1f} s", over=over)


def _obstacle(device: Path) -> str:
    """Why the KVM device cannot be opened, or nothing."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as problem:
        if problem.errno == errno.ENOENT:
            return f"there is no {device}"
        if problem.errno in (errno.EACCES, errno.EPERM):
            return f"{device} may not be opened by this user (who is not in the group that owns it)"
        return f"{device} does not open: {problem.strerror}"
    return ""


# --- What was measured holds until this machine boots again, or QEMU or the user are others ---------------------------


def _key(arch: Arch, qemu: Path) -> str:
    try:
        boot = _BOOT_ID.read_text().strip()
        changed = qemu.stat().st_mtime_ns
    except OSError:
        return ""  # cannot be told apart from other boots: do not remember
    facts = (arch.name, boot, str(qemu), changed, os.getuid(), TURNS)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _memory(cache: Cache | None, key: str) -> Path | None:
    if cache is None or not key:
        return None
    try:
        return cache.scratch(_MEMORY) / f"{key}.json"
    except OsbuilderError:
        return None  # a host without a place to remember in measures each time


def _recall(memory: Path | None) -> Accel | None:
    if memory is None:
        return None
    try:
        said = json.loads(memory.read_bytes()[:4096])
        name, reason = said["name"], said["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if name not in ("kvm", "tcg") or not isinstance(reason, str):
        return None
    return Accel(name=name, reason=reason)


def _remember(memory: Path | None, answer: Accel) -> None:
    if memory is None:
        return
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile("w", dir=memory.parent, prefix="new-", delete=False) as file:
            json.dump({"name": answer.name, "reason": answer.reason}, file)
        Path(file.name).replace(memory)


# --- The guest ------------------------------------------------------------------------------------------------------
#
#     ROM offset   what                           seen by the guest at
#     0xf000       GDT, and how to load it        0xff000 (the ROM's end is also below 1 MiB)
#     0xf030       16 bit code                    0xfffff030
#     0xf060       32 bit code                    0xff060
#     0xf0d0       64 bit code: counts            0xff0d0
#     0xfff0       the processor starts here      0xfffffff0
#
# Page tables: 0x1000 -> 0x2000 -> 0x3000 -> one page of 2 MiB at 0. They are in memory, not in the ROM, because
# processors write "accessed" bits into page tables.

_ROM_BYTES: Final = 64 * 1024

_X86_64: Final[Mapping[int, tuple[str, ...]]] = {
    0xF000: (
        "00000000 00000000",  # the null descriptor
        "FFFF0000 009BCF00",  # 0x08: 32 bit code, everything from 0
        "FFFF0000 0093CF00",  # 0x10: data, everything from 0
        "FFFF0000 009BAF00",  # 0x18: 64 bit code
        "1F00 00F00F00",      # limit and address of the four
    ),
    0xF030: (
        "FA",                 # cli
        "2E 66 0F0116 20F0",  # lgdtl cs:[0xf020]
        "0F20C0",             # mov eax, cr0
        "0C01",               # or al, 1              protected mode
        "0F22C0",             # mov cr0, eax
        "66 EA 60F00F00 0800",  # jmp 0x08:0xff060
    ),
    0xF060: (
        "66 B81000",          # mov ax, 0x10
        "8ED8",               # mov ds, ax
        "C705 00100000 03200000",  # mov dword [0x1000], 0x2000 | present | writable
        "C705 00200000 03300000",  # mov dword [0x2000], 0x3000 | present | writable
        "C705 00300000 83000000",  # mov dword [0x3000], 0 | 2 MiB page | present | writable
        "B8 20000000",        # mov eax, 0x20         physical address extension
        "0F22E0",             # mov cr4, eax
        "B8 00100000",        # mov eax, 0x1000
        "0F22D8",             # mov cr3, eax
        "B9 800000C0",        # mov ecx, 0xc0000080   EFER
        "0F32",               # rdmsr
        "0D 00010000",        # or eax, 0x100         long mode enable
        "0F30",               # wrmsr
        "0F20C0",             # mov eax, cr0
        "0D 00000080",        # or eax, 0x80000000    paging
        "0F22C0",             # mov cr0, eax
        "EA D0F00F00 1800",   # jmp 0x18:0xff0d0
    ),
    0xF0D0: (
        f"B0 {_BEGIN:02X}",   # mov al, begin
        "E6E9",               # out 0xe9, al          the debug console
        f"B9 {TURNS.to_bytes(4, 'little').hex()}",  # mov ecx, turns
        "FFC9",               # dec ecx
        "75FC",               # jnz to the dec
        f"B0 {_END:02X}",     # mov al, end
        "E6E9",               # out 0xe9, al
        "E6F4",               # out 0xf4, al          QEMU ends
        "F4",                 # hlt
        "EBFD",               # jmp to the hlt
    ),
    0xFFF0: (
        "E9 3DF0",            # jmp 0xf030
    ),
}  # fmt: skip


def _assemble(parts: Mapping[int, tuple[str, ...]]) -> bytes:
    rom = bytearray(_ROM_BYTES)
    for offset, lines in parts.items():
        code = bytes.fromhex("".join(lines))
        assert not any(rom[offset : offset + len(code)]), "two parts overlap"
        rom[offset : offset + len(code)] = code
    return bytes(rom)


_ROMS: Final[Mapping[str, bytes]] = {"x86_64": _assemble(_X86_64)}
