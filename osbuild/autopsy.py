"""Why a guest did not do what it should: a table of causes, matched on what it left behind.

A cause is named only by a line that shows it; "unknown, last seen: …" is the honest rest. The first row that fits
wins: a panic often follows from something said earlier, so what explains comes before what merely ends.
"""

from __future__ import annotations

import dataclasses
import enum
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild.report import Cause, printable, tail

HEAD_BYTES: Final = 64 * 1024  # of a console: what a kernel says before anything goes wrong
TAIL_BYTES: Final = 256 * 1024  # and of its end; a guest may write gigabytes in between
LINE_CHARACTERS: Final = 400


class Phase(enum.StrEnum):
    """How far a guest came, as far as its console shows."""

    nothing = enum.auto()
    firmware = enum.auto()
    kernel = enum.auto()
    init = enum.auto()
    agent = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is left of a guest."""

    console: str  # printable
    log: str = ""  # the VMM's own words, printable
    status: int | None = None  # the VMM's exit status; None: it was still running when we stopped waiting
    answered: bool = False  # the agent did, at least once
    stopped: bool = False  # we ended the VMM, so that its status says nothing
    flooded: bool = False  # … because the console would not end

    @property
    def ended(self) -> bool:
        """The guest is over, by its own doing."""
        return "Kernel panic - not syncing" in self.console or (self.status is not None and not self.stopped)

    @property
    def phase(self) -> Phase:
        """The furthest that the console shows."""
        return _phase(self.console)


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """A row: a cause, the pattern of the line that shows it, and what to tell. Groups of the pattern fill {names}."""

    name: str
    pattern: re.Pattern[str]
    sentence: str
    hint: str = ""


def _row(name: str, pattern: str, sentence: str, hint: str = "") -> Symptom:
    return Symptom(name=name, pattern=re.compile(pattern, re.MULTILINE), sentence=sentence, hint=hint)


_PANIC: Final = r"Kernel panic - not syncing: "

# What a QEMU (or another VMM) says before it gives up.
VMM: Final = (
    _row("vmm-lock", r"^.*[Ff]ailed to get \S*\"?\w*\"? ?lock.*$", "an image file is in use by another process"),
    _row(
        "vmm-memory", r"^.*(?:[Cc]annot allocate memory|cannot set up guest memory|exceeds? .*maximum).*$",
        "the host has not the memory for this guest", "give the guest less memory",
    ),
    _row(
        "vmm-file", r"^.*(?:[Cc]ould not open|can't open|could not load|[Nn]o such file).*$",
        "the VMM cannot read one of its files",
    ),
    _row(
        "vmm-kvm", r"^.*(?:[Cc]ould not access KVM|failed to initialize kvm|KVM_\w+ failed|kvm run failed).*$",
        "KVM failed", "--accel tcg boots without it",
    ),
    _row(
        "vmm-kernel", r"^.*(?:PVH|linux kernel too old|invalid kernel header|Error loading uncompressed kernel).*$",
        "the VMM cannot start this kernel", "the kernel needs CONFIG_PVH=y, and to be of the VMM's architecture",
    ),
    _row(
        "vmm-sandbox", r"^.*(?:seccomp|sandbox).*$",
        "the VMM's own sandbox stands in the way",
    ),
    _row(
        "vmm-option",
        r"^.*(?:: -\w[\w-]*(?: |:)|invalid option|is not a valid device|[Pp]roperty '.*' not found"
        r"|nvdimm is not enabled|unsupported machine type).*$",
        "the VMM refuses one of its options",
    ),
)  # fmt: skip

# What a guest's console shows. Specific before general.
GUEST: Final = (
    _row(
        "agent-fault", r"^.*\bosbuilder-agent\[\d+\]: segfault.*$|^.*traps: osbuilder-agent\[\d+\].*$",
        "the agent crashed",
    ),
    _row(
        "clock", r"^.*tsc: Marking TSC unstable due to could not calculate TSC khz.*$(?!\n.*\S)",
        "the guest found no clock that ticks, and stopped",
        "the machine needs a PIT, an HPET or ACPI's timer; under TCG a busy host spoils the calibration",
    ),
    _row(
        "triple-fault", r"^.*\btriple fault\b.*$",
        "the processor gave up (a triple fault): the kernel was damaged or is for another processor",
    ),
    _row(
        "dax-unsupported",
        r"^.*(?:DAX unsupported|dax: (?:error|needs|unsupported)|[Cc]an't mount with dax|DAX enabled but"
        r"|dax option not supported|device does not support dax"
        r"|(?:ext4|EXT4-fs|XFS|erofs).*(?:Unrecognized|[Uu]nknown|unsupported).*\bdax\b).*$",
        "the root was to be mounted with DAX, and its device or kernel cannot",
        "the kernel needs CONFIG_FS_DAX=y, and the image a DAX header and an NVDIMM: `osbuilder inspect` shows it",
    ),
    _row(
        "pmem-alignment",
        r"^.*(?:nd_pmem|nd_region|pfn\d).*(?:misaligned|not aligned|alignment|unable to support|failed to validate).*$",
        "the kernel refuses the NVDIMM's size or alignment",
        "the image must be a multiple of 2 MiB (16 MiB on aarch64)",
    ),
    _row(
        "verity",
        r"^.*(?:device-mapper: verity: .*(?:corrupted|mismatch|failed|Invalid)|dm-verity device corrupted).*$",
        "dm-verity found bytes that are not those that were hashed",
    ),
    _row(
        "initrd-memory",
        r"^.*(?:[Ii]nitramfs unpacking failed: (?:write error|Cannot allocate|.*No space)"
        r"|initrd .*(?:too big|disabling initrd|extends beyond)).*$",
        "the initramfs did not fit in the guest's memory", "give the guest more memory",
    ),
    _row(
        "initrd-compression",
        r"^.*(?:compression method \w+ not configured|Decoding failed|rootfs image is not initramfs \("
        r"|Initramfs unpacking failed: (?:invalid magic|no cpio magic|compression)).*$",
        "the kernel cannot unpack this initramfs",
        "the kernel needs the decompressor (CONFIG_RD_ZSTD=y …), and the file must be a newc cpio archive, whole",
    ),
    _row(
        "initrd-damaged", r"^.*Initramfs unpacking failed: .*$",
        "the initramfs is damaged",
    ),
    _row(
        "mount-options",
        r"^.*(?:[Uu]nknown (?:parameter|mount option)|Unrecognized mount option|can't mount with data=).*$",
        "the root filesystem refuses rootflags=", "rootflags= must fit the filesystem in the image",
    ),
    _row(
        "init-missing", r"^.*VFS: Cannot open root device \"\".*$",
        "the initramfs has no /init that the kernel could start, and there is no root= to look elsewhere",
        "an initramfs needs an executable /init",
    ),
    _row(
        "root-missing",
        rf"^.*(?:VFS: Cannot open root device .*unknown-block\(0,0\)"
        rf"|{_PANIC}VFS: Unable to mount root fs on .*unknown-block\(0,0\)).*$",
        "there is no root device in the guest",
        "the kernel needs the driver (NVDIMM: ACPI_NFIT, BLK_DEV_PMEM), the image a partition table, root= the name",
    ),
    _row(
        "root-filesystem",
        rf"^.*(?:VFS: Cannot open root device|{_PANIC}VFS: Unable to mount root fs on) .*$",
        "the root device is there, but no filesystem of this kernel can be mounted from it",
        "rootfstype= and rootflags= must fit the image, and the kernel must have that filesystem built in",
    ),
    _row(
        "oom",
        r"^.*(?:Kernel panic - not syncing: (?:System is deadlocked on memory|Out of memory)|Out of memory: Killed).*$",
        "the guest ran out of memory", "give the guest more memory",
    ),
    _row(
        "init-not-runnable",
        r"^.*(?:Failed to execute \S+ \(error -\d+\)|Starting init: \S+ exists but couldn't"
        r"|Requested init \S+ failed \(error -\d+\)).*$",
        "the kernel could not start init",
        "error -2: it or its interpreter is missing; -13: not executable; -8: not a program of this architecture;"
        " -26: the initramfs ends in the middle of it",
    ),
    _row(
        "init-missing", rf"^.*{_PANIC}No (?:working )?init found.*$|^.*check access for rdinit=\S+ failed.*$",
        "there is no program for the kernel to start",
        "an initramfs needs /init, an image /sbin/init (or init=)",
    ),
    _row(
        "init-exited", rf"^.*{_PANIC}Attempted to kill init! exitcode=(?P<code>0x[0-9a-f]+).*$",
        "init ended (wait status {code}), which a kernel does not survive",
        "look at the console's last lines before the panic for what init said",
    ),
    _row("panic", rf"^.*{_PANIC}(?P<why>.*)$", "the guest's kernel panicked: {why}"),
    _row(
        "filesystem-damaged", r"^.*(?:EXT4-fs error|erofs: .*(?:corrupted|bogus)|XFS.*[Cc]orruption).*$",
        "the root filesystem is damaged", "build it again, and look for what wrote to the image",
    ),
    _row(
        "oops", r"^.*(?:BUG: unable to handle|BUG: kernel NULL pointer|general protection fault|Oops: ).*$",
        "the guest's kernel stumbled over a bug (an oops)",
    ),
    _row(
        "restarted", r"^.*reboot: (?:machine restart|Restarting system).*$",
        "the guest restarted itself", "look at the console's last lines before it for who asked",
    ),
    _row(
        "powered-off", r"^.*reboot: (?:Power down|Power off not available|System halted).*$",
        "the guest switched itself off", "look at the console's last lines before it for who asked",
    ),
)  # fmt: skip

_ALWAYS_BAD: Final = frozenset(
    ("initrd-memory", "initrd-compression", "initrd-damaged", "filesystem-damaged", "verity", "oops", "panic", "oom")
)

_PHASES: Final[Mapping[Phase, re.Pattern[str]]] = {
    Phase.agent: re.compile(r'"msg":"agent started"'),
    Phase.init: re.compile(r"Run \S+ as init process|systemd\[1\]:"),
    Phase.kernel: re.compile(r"Linux version \d|^\[ *\d+\.\d{6}\] ", re.MULTILINE),
    Phase.firmware: re.compile(r"\S"),
}  # furthest first


def explain(evidence: Evidence) -> Cause:
    """The cause, as far as the evidence goes."""
    early = evidence.phase is Phase.nothing
    if early and not evidence.stopped and evidence.status is not None:
        said = _first(VMM, evidence.log)
        if said is not None:
            return said
    shown = _first(GUEST, evidence.console)
    if shown is None:
        return _by_outcome(evidence)
    # In a guest that still runs, a line that would explain its end is a guess about its silence.
    return shown if evidence.ended else dataclasses.replace(shown, certain=False)


def trouble(evidence: Evidence) -> Cause | None:
    """What a kernel says only when something is broken, even if the guest went on."""
    return _first(tuple(row for row in GUEST if row.name in _ALWAYS_BAD), evidence.console)


def console_text(path: Path) -> str:
    """A console as text: its head and its end when it is long, nothing in it that a terminal would act on."""
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
            rest = path.stat().st_size - len(head)
    except OSError:
        return ""
    if rest <= 0:
        return printable(head)
    end = tail(path, min(rest, TAIL_BYTES))
    gap = f"\n[… {rest - len(end)} bytes left out …]\n" if rest > len(end) else ""
    return printable(head + end) if not gap else printable(head) + gap + printable(end)


def last_lines(text: str, count: int = 40) -> list[str]:
    """The last lines that say something, cut to a readable length."""
    return [line[:LINE_CHARACTERS] for line in text.splitlines() if line.strip()][-count:]


def _first(table: tuple[Symptom, ...], text: str) -> Cause | None:
    for symptom in table:
        match = symptom.pattern.search(text)
        if match is not None:
            groups = {name: (value or "").strip() for name, value in match.groupdict().items()}
            return Cause(
                name=symptom.name,
                sentence=symptom.sentence.format_map(groups),
                line=match[0].strip()[:LINE_CHARACTERS],
                hint=symptom.hint,
            )
    return None


def _by_outcome(evidence: Evidence) -> Cause:
    """No line explains it: what can be said from how it ended, and how far it came."""
    last = (last_lines(evidence.console, 1) or [""])[0]
    if evidence.flooded:
        return Cause(name="flood", sentence="the guest wrote to its console without end, and was stopped", line=last)
    if evidence.status is not None and not evidence.stopped:
        return _by_status(evidence, evidence.status, (last_lines(evidence.log, 1) or [last])[0])
    return _by_phase(evidence, last)


def _by_status(evidence: Evidence, status: int, line: str) -> Cause:
    if status < 0:
        number = signal.Signals(-status).name if -status in signal.valid_signals() else str(-status)
        return Cause(name="vmm-killed", sentence=f"somebody killed the VMM ({number})", line=line)
    if status > 0:
        return Cause(
            name="vmm-failed",
            sentence=f"the VMM exited with {status}: {line}" if line else f"the VMM exited with {status}",
            line=line,
        )
    if evidence.phase is Phase.nothing:
        hint = "too little memory for the kernel and the initramfs, or a kernel for another machine, looks like this"
        return Cause(name="vmm-exited", sentence="the VMM ended before a guest was seen", line=line, hint=hint)
    return Cause(
        name="guest-ended", sentence="the guest restarted or powered off, and its console does not say why", line=line
    )


def _by_phase(evidence: Evidence, last: str) -> Cause:
    """It lives, or did when we stopped waiting: nothing is certain."""
    if evidence.phase is Phase.nothing:
        hint = "was the kernel built for this machine, with CONFIG_PVH=y and a serial console?"
        return Cause(name="silent", sentence="the guest never wrote anything", hint=hint, certain=False)
    if evidence.phase is Phase.agent and not evidence.answered:
        return Cause(name="agent-silent", sentence="the agent started, and never answered", line=last, certain=False)
    if evidence.phase is Phase.init:
        return Cause(
            name="agent-absent", sentence="the kernel started init, and no agent was heard of", line=last,
            hint="is there an agent in the image, and does init start it?", certain=False,
        )  # fmt: skip
    sentence = f"unknown, last seen: {last}" if last else "unknown"
    return Cause(name="unknown", sentence=sentence, line=last, certain=False)


def _phase(console: str) -> Phase:
    for phase, pattern in _PHASES.items():
        if pattern.search(console):
            return phase
    return Phase.nothing
