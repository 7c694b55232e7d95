"""The causes that autopsy can name: a row each, with the line that shows it where there is one, and what to do.

VMM     lines of the VMM's own log
GUEST   lines of a guest's console
OUTCOMES  what shows in no line: how it ended, who asked, how far it came

docs/causes.md is made from these rows, and from recordings of guests that were wrong in these ways.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from osbuild.last_words import TIME, End, Phase


class Speaker(enum.StrEnum):
    """Whose line shows it."""

    kernel = enum.auto()
    systemd = enum.auto()  # which writes through the kernel, or itself
    anyone = enum.auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptom:
    """A row: a cause, the pattern of the line that shows it, and what to tell. Groups of the pattern fill {names}.

    What a pattern finds may be several lines; the group `shows`, or else the first of them, is the evidence. Groups
    whose names begin with `device` or `filesystem` must be the root's for it to explain anything.
    """

    name: str
    pattern: re.Pattern[str]
    sentence: str
    hint: str = ""
    phase: Phase | None = None  # only of a guest that came so far
    final: bool = False  # where the guest was ended because of such a line, it is the cause
    by: Speaker = Speaker.kernel
    ends: frozenset[End] = frozenset()  # that it explains; every other is a coincidence
    near: bool = False  # many a guest lives with such a line: it explains an end before which nobody says more …
    but: str = ""  # … than this, which somebody must


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A cause that no single line shows."""

    sentence: str
    hint: str = ""


def _row(
    name: str, pattern: str, sentence: str, hint: str = "", *, phase: Phase | None = None, final: bool = False,
    by: Speaker = Speaker.kernel, ends: Iterable[End] = (), near: bool = False, but: str = "",
) -> Symptom:  # fmt: skip
    begin = {Speaker.kernel: rf"^(?:{TIME})?", Speaker.systemd: rf"^(?:{TIME})?systemd\[1\]: ", Speaker.anyone: "^"}
    return Symptom(
        name=name, pattern=re.compile(f"{begin[by]}(?:{pattern})", re.MULTILINE), sentence=sentence, hint=hint,
        phase=phase, final=final, by=by, ends=frozenset(ends), near=near, but=but,
    )  # fmt: skip


_PANIC: Final = r"Kernel panic - not syncing: "
_LOOK: Final = "look at the console's last lines before it for who asked"

# What a QEMU (or another VMM) says before it gives up.
VMM: Final = (
    _row(
        "vmm-lock", r".*[Ff]ailed to get (?:\S+ )?(?:\"\w+\" )?lock.*$",
        "an image file is in use by another process",
        "end the other VMM, or give this one a copy: an image can be shared as long as nobody may write to it",
    ),
    _row(
        "initrd-memory", r".*initrd is too large.*$",
        "the initramfs did not fit in the guest's memory", "give the guest more memory",
    ),
    _row(
        "vmm-memory", r".*(?:[Cc]annot allocate memory|cannot set up guest memory|exceeds? .*maximum).*$",
        "the host has not the memory for this guest",
        "give the guest less memory, or the host's VMM more (ulimit -v, cgroup)",
    ),
    _row(
        "vmm-file", r".*(?:[Cc]ould not open|[Cc]an't open|[Cc]ould not load|[Nn]o such file).*$",
        "the VMM cannot read one of its files", "look at who owns it, and whether the VMM's user may read it",
    ),
    _row(
        "vmm-kvm",
        r".*(?:[Cc]ould not access KVM|failed to initialize kvm|KVM_\w+ failed|kvm run failed|failed to set MSR"
        r"|kvm_\w+: Assertion).*$",
        "KVM failed", "--accel tcg boots without it",
    ),
    _row(
        "vmm-kernel", r".*(?:PVH|linux kernel too old|invalid kernel header|Error loading uncompressed kernel).*$",
        "the VMM cannot start this kernel", "the kernel needs CONFIG_PVH=y, and to be of the VMM's architecture",
    ),
    _row(
        "vmm-sandbox", r".*(?:seccomp|sandbox).*$",
        "the VMM's own sandbox stands in the way", "this VMM was built without seccomp, or the host forbids it",
    ),
    _row(
        "vmm-option",
        r".*(?:: -\w[\w-]*(?: |:)|invalid option|is not a valid device|[Pp]roperty '.*' not found"
        r"|nvdimm is not enabled|unsupported machine type).*$",
        "the VMM refuses one of its options", "is it the version that osbuilder was tested with (7.2)?",
    ),
)  # fmt: skip

# What a VMM says that is ended from outside, whatever its guest did before.
TERMINATED: Final = _row(
    "vmm-killed",
    r"\S+: terminating on signal \d+.*$",
    "somebody ended the VMM",
    "a supervisor, a person or a time limit: boot again",
)

# What a watcher writes into a VMM's log, before it ends that for the sake of its own disk.
BOUND: Final = "osbuilder: the guest was ended, for it had written"

_ROOT: Final = (End.root, End.start)  # what stands between a kernel and its init
_ANY_PANIC: Final = (*_ROOT, End.init, End.memory, End.fault, End.panic)
_INIT_SIGNAL: Final = rf"{_PANIC}Attempted to kill init! exitcode=0x000000(?P<signal>[0-7]?[1-9a-f]|[1-7]0).*$"
_AGENTS: Final = "(?:osbuilder-agent|kata-agent)"

# What a guest's console shows. Of lines that explain an end the first is the cause; of two on one line, the first row.
GUEST: Final = (
    _row(
        "oom", rf"Out of memory: Killed process \d+ \({_AGENTS}\).*$",
        "the guest ran out of memory", "give the guest more memory", final=True,
    ),
    _row(
        "agent-crashed", r"kata-agent\.service: Main process exited, code=(?:killed|dumped).*$",
        "the agent crashed", "is it of the guest's processor (x86-64-v2 …)? keep the console: it is a bug of the agent",
        final=True, by=Speaker.systemd,
    ),
    _row(
        "agent-crashed", rf"(?:{_AGENTS}\[1\]: segfault|traps: {_AGENTS}\[1\]).*$",
        "the agent crashed", "is it of the guest's processor (x86-64-v2 …)? keep the console: it is a bug of the agent",
        ends=[End.init], near=True,
    ),
    _row(
        "clock",
        r"tsc: Marking TSC unstable due to could not calculate TSC khz.*$(?!\n.*\S)"
        rf"|(?:{_PANIC})?IO-APIC \+ timer doesn't work.*$",
        "the guest found no clock that ticks, and stopped",
        "the machine needs a PIT, an HPET or ACPI's timer; under TCG a busy host spoils the calibration",
        ends=[End.panic],
    ),
    _row(
        "image-short",
        r"(?:\S+ \((?P<device>\w+)\): )?bad geometry: block count \d+ exceeds size of device.*$"
        r"|(?P<device_disk>\w+): (?P<device_part>p\d+) size \d+ extends beyond EOD.*$"
        rf"|.*attempt to access beyond end of device.*$(?:\n(?:{TIME})?(?P<device_>\w+): rw=.*$)?",
        "the image ends before its filesystem does",
        "it was cut: copy it again, and compare its sha256 with manifest.json",
        ends=[*_ROOT, End.init], near=True,
    ),
    _row(
        "dax-unsupported",
        r"\S+(?: \((?:device )?(?P<device>\w+)\))?: .*(?:DAX unsupported|dax: (?:error|needs|unsupported)"
        r"|[Cc]an't mount with dax|DAX enabled but|dax options? not supported|device does not support dax).*$"
        r"|(?:ext4|EXT4-fs|XFS|erofs)(?: \((?:device )?(?P<device_>\w+)\))?:? "
        r".*(?:Unrecognized|[Uu]nknown|unsupported).*\bdax\b.*$",
        "the root was to be mounted with DAX, and its device or kernel cannot",
        "the kernel needs CONFIG_FS_DAX=y, and the image a DAX header and an NVDIMM: `osbuilder inspect` shows it",
        ends=[End.root],
    ),
    _row(
        "pmem-alignment",
        r"(?:nd_pmem |nd_region | )?(?P<device>pfn\d+|namespace\d+|region\d+)\S*: "
        r".*(?:misaligned|not aligned|alignment|unable to support|failed to validate).*$",
        "the kernel refuses the NVDIMM's size or alignment",
        "the image must be a multiple of 2 MiB (16 MiB on aarch64)", ends=[End.root],
    ),
    _row(
        "verity",
        r"(?:device-mapper: verity: .*(?:corrupted|mismatch|failed|Invalid)|.*dm-verity device corrupted).*$",
        "dm-verity found bytes that are not those that were hashed",
        "the image was changed, or the root hash is another build's: both stand in manifest.json",
        ends=[*_ROOT, End.init], near=True,
    ),
    _row(
        "initrd-memory",
        r"(?:[Ii]nitramfs unpacking failed: (?:write error|Cannot allocate|.*No space)"
        r"|.{0,40}initrd .*(?:too big|disabling initrd|extends beyond)).*$",
        "the initramfs did not fit in the guest's memory", "give the guest more memory",
        ends=_ROOT,
    ),
    _row(
        # It is unpacked while drivers start, and one of those may be the first to find no memory: the kernel panics
        # before it can say that unpacking failed. What it unpacked from is freed when that is over, however it went.
        "initrd-memory",
        r"(?:Unpacking initramfs|[Tt]rying to unpack rootfs image as initramfs)\.\.\..*\n"
        rf"(?:(?!.*(?:Freeing initrd memory|npacking initramfs|rying to unpack rootfs|{_PANIC})).*\n)*"
        rf"(?P<shows>.*{_PANIC}(?:System is deadlocked on memory|Out of memory).*)$",
        "the initramfs did not fit in the guest's memory", "give the guest more memory", ends=[End.memory],
    ),
    _row(
        "initrd-compression", r".*compression method \w+ not configured.*$",
        "the kernel cannot unpack an initramfs of this compression",
        "the kernel needs the decompressor (CONFIG_RD_ZSTD=y …), or the file another --compress", ends=_ROOT,
    ),
    _row(
        "initrd-damaged",
        r"(?:Initramfs unpacking failed: |.*Decoding failed|rootfs image is not initramfs \().*$",
        "the initramfs is damaged, or is none", "it must be a newc cpio archive, whole: `osbuilder inspect` reads it",
        ends=_ROOT,
    ),
    _row(
        "mount-options",
        r"(?P<filesystem>[\w-]+): [Uu]nknown parameter.*$"
        r"|\S+(?: \((?:device )?(?P<device>\w+)\))?: .*(?:[Uu]nknown mount option|Unrecognized mount option"
        r"|can't mount with data=).*$",
        "the root filesystem refuses rootflags=", "rootflags= and rootfstype= must fit the filesystem in the image",
        ends=[End.root],
    ),
    _row(
        "filesystem-damaged",
        r"(?:EXT4-fs error \(device (?P<device>\w+)\)|erofs: (?:\(device (?P<device_>\w+)\): )?.*(?:corrupted|bogus)"
        r"|XFS(?: \((?P<device__>\w+)\))?: .*[Cc]orruption).*$",
        "the root filesystem is damaged", "build it again, and look for what wrote to the image",
        ends=[*_ROOT, End.init], near=True,
    ),
    _row(
        "init-missing", r"VFS: Cannot open root device \"\".*$",
        "the initramfs has no /init that the kernel could start, and there is no root= to look elsewhere",
        "an initramfs needs an executable /init", ends=[End.root],
    ),
    _row(
        "partition-table",
        # The list of the kernel has the disk that root= wants a partition of, and none of its partitions.
        r'VFS: Cannot open root device "(?:/dev/)?(?P<disk>[a-z]+(?:\d+(?=p))?)p?\d+" or unknown-block\(0,0\).*\n'
        rf".*available partitions:.*\n(?:.*\n){{0,40}}?{TIME}\S+ +\d+ (?P=disk) *\n(?:(?!{TIME}\S).*\n)*?.*driver: .*\n"
        rf"(?!(?:.*\n){{0,2}}?{TIME}  \S+ +\d+ (?P=disk))",
        "the kernel sees {disk}, and no partition on it",
        "the image must begin with a partition table (behind 2 MiB, as an NVDIMM with a DAX header), and the kernel"
        " needs CONFIG_MSDOS_PARTITION=y", ends=[End.root],
    ),
    _row(
        "root-driver",
        rf"VFS: Cannot open root device .*unknown-block\(0,0\).*\n.*available partitions:.*\n(?!{TIME}\S+ +\d+ \w)",
        "the guest's kernel sees no disk at all",
        "it needs the driver built in (NVDIMM: ACPI_NFIT, BLK_DEV_PMEM; disk: VIRTIO_PCI, VIRTIO_BLK):"
        " `osbuilder kernel check` says what is missing", ends=[End.root],
    ),
    _row(
        "root-missing",
        r"(?:VFS: Cannot open root device .*unknown-block\(0,0\)"
        rf"|{_PANIC}VFS: Unable to mount root fs on .*unknown-block\(0,0\)).*$",
        "root= names a device that is not in the guest",
        "the console lists those that are there, below that line", ends=[End.root],
    ),
    _row(
        "filesystem-unsupported", r"VFS: Cannot open root device .*: error -19.*$",
        "the root device is there, and the kernel has not its filesystem",
        "the kernel must have the filesystem of rootfstype= built in: `osbuilder kernel build --with FEATURE`",
        ends=[End.root],
    ),
    _row(
        "root-filesystem",
        rf"(?:VFS: Cannot open root device|{_PANIC}VFS: Unable to mount root fs on) .*$",
        "the root device is there, and what lies on it is not the filesystem that was to be mounted",
        "rootfstype= must fit the image: `osbuilder inspect` says what is in it", ends=[End.root],
    ),
    _row(
        "oom", rf"{_PANIC}(?:System is deadlocked on memory|Out of memory).*$",
        "the guest ran out of memory", "give the guest more memory", ends=[End.memory],
    ),
    _row(
        "init-not-executable",
        r"(?:(?:Failed to execute|Requested init) \S+ (?:failed )?\(error -13\)"
        r"|Starting init: \S+ exists but couldn't execute it \(error -13\)).*$",
        "init is not executable", "chmod +x, in the image", ends=[End.start],
    ),
    _row(
        "init-architecture",
        r"(?:(?:Failed to execute|Requested init) \S+ (?:failed )?\(error -8\)"
        r"|Starting init: \S+ exists but couldn't execute it \(error -8\)).*$",
        "init is not a program of the guest's architecture",
        "build the image for the kernel's architecture: --platform", ends=[End.start],
    ),
    _row(
        "init-interpreter",
        r"(?:Failed to execute|Requested init) \S+ (?:failed )?\(error -2\).*$",
        "init, or the interpreter or loader that it names, is missing",
        "`readelf -l` or its first line (#!) says which; it must be in the image", ends=[End.start],
    ),
    _row(
        "init-not-runnable",
        r"(?:Failed to execute \S+ \(error -\d+\)|Starting init: \S+ exists but couldn't"
        r"|Requested init \S+ failed \(error -\d+\)).*$",
        "the kernel could not start init", "the number is the reason: errno(3)", ends=[End.start],
    ),
    _row(
        "init-missing", rf"{_PANIC}No (?:working )?init found.*$|check access for rdinit=\S+ failed.*$",
        "there is no program for the kernel to start",
        "an initramfs needs /init, an image /sbin/init (or init=)", ends=[End.start],
    ),
    _row(
        "oops",
        r"(?:BUG: unable to handle|BUG: kernel NULL pointer|general protection fault|Oops: |Internal error: Oops"
        r"|Unable to handle kernel).*$",
        "the guest's kernel stumbled over a bug (an oops)",
        "keep the console; another kernel version may have it fixed", ends=[End.fault],
    ),
    _row(
        "panic", rf"{_PANIC}(?!Attempted to kill init!)(?P<why>.*)$", "the guest's kernel panicked: {why}",
        "keep the console; the lines before it say in which function", ends=_ANY_PANIC,
    ),
    _row(
        # The loader gives up with 127, and so does a shell that ends with it.
        "library-missing",
        r"(?P<program>\S+): error while loading shared libraries: (?P<library>[^\s:]+): cannot open.*$"
        r"|Error loading shared library (?P<library_>[^\s:]+): .*$",
        "a program that was started lacks a library: {library}{library_}",
        "put it into the image, or link the program statically", by=Speaker.anyone, ends=[End.init], near=True,
    ),
    _row(
        "cgroup-v1", r"cgroup1?: (?:Disabled controller|Unknown subsys name) .*$",
        "something in the guest wants cgroup version 1, and the kernel gives it none",
        "use what knows version 2; or a kernel with the v1 controllers, and without cgroup_no_v1=all",
        ends=[End.init], near=True, but=r"\bcgroup",
    ),
    _row(
        "run-read-only",
        r".*\"cannot listen\".*Read-only file system.*$",
        "what was started needs to write to /run, and that is read-only",
        "mount a tmpfs on /run before it: our agent does so itself when it is init",
        by=Speaker.anyone, ends=[End.init], near=True, but=r'\{"msg":"ending"',
    ),
    _row(
        "run-read-only", r".*/run\b.*Read-only file system.*$",
        "what was started needs to write to /run, and that is read-only",
        "mount a tmpfs on /run before it: our agent does so itself when it is init", by=Speaker.anyone,
    ),
    _row(
        "agent-crashed", _INIT_SIGNAL,
        "the agent, which is init, died of a signal (0x{signal})",
        "is it of the guest's processor (x86-64-v2 …)? keep the console: it is a bug of the agent", phase=Phase.agent,
        ends=[End.init],
    ),
    _row(
        "init-crashed", _INIT_SIGNAL,
        "init died of a signal (0x{signal})", "the lines before it say where; 0x04: it is for a newer processor",
        ends=[End.init],
    ),
    _row(
        "init-exited", rf"{_PANIC}Attempted to kill init! exitcode=(?P<code>0x[0-9a-f]+).*$",
        "init ended (wait status {code}), which a kernel does not survive",
        "look at the console's last lines before the panic for what init said", ends=[End.init],
    ),
    _row(
        "unit-masked",
        r"Failed to isolate default target: Unit (?P<unit>\S+) is masked\..*$"
        r"|Unit (?P<target>\S+) is masked\..*(?:\n.*){0,40}?\n.*systemd\[1\]: Falling back to .*$",
        "systemd is not to start {unit}{target}: it is masked",
        "it is a link to /dev/null in /etc/systemd/system: remove that", final=True, by=Speaker.systemd,
    ),
    _row(
        "unit-missing",
        r"Failed to isolate default target: Unit (?P<unit>\S+) not found\..*$"
        r"|Unit (?P<target>\S+) not found\..*(?:\n.*){0,40}?\n.*systemd\[1\]: Falling back to .*$",
        "systemd is to reach {unit}{target}, and there is no such unit",
        "systemd.unit= must name a target of the image; `osbuilder rootfs IMAGE --explain` lists the agent's units",
        final=True, by=Speaker.systemd,
    ),
    _row(
        "systemd-stuck", rf"(?:{TIME})?systemd\[1\]: Freezing execution.*$|You are in (?:rescue|emergency) mode.*$",
        "systemd gave up", "the console's lines before it say over what", final=True, by=Speaker.anyone,
    ),
    _row(
        "oom", r"Out of memory: Killed.*$",
        "the guest ran out of memory", "give the guest more memory",
    ),
    _row(
        "restarted", r"(?:reboot: (?:machine restart|Restarting system)|sysrq: Resetting).*$",
        "the guest restarted itself", _LOOK, ends=[End.left],
    ),
    _row(
        "powered-off", r"reboot: (?:Power down|Power off not available|System halted).*$",
        "the guest switched itself off", _LOOK, ends=[End.left],
    ),
    _row(
        "kernel-stuck",
        r"(?:rcu: INFO: rcu_\w+ (?:self-)?detected stall|watchdog: BUG: soft lockup"
        r"|INFO: task \S+ blocked for more than).*$",
        "the guest's kernel says that a processor, or a task, does not come any further",
        "a bug of the kernel's, or a host that gives its guest no time: the trace below that line says where",
    ),
)  # fmt: skip

# A line after which no agent will answer any more, though the guest goes on.
GIVES_UP: Final = re.compile(
    rf"^(?:{TIME})?systemd\[1\]: (?:Freezing execution|Falling back to \S+\.target"
    r"|kata-agent\.service: Main process exited, code=(?:killed|dumped))"
    r"|^You are in (?:rescue|emergency) mode",
    re.MULTILINE,
)
HOPELESS: Final = re.compile(GIVES_UP.pattern.encode())

# Broken in any guest: where nothing else explains its end, or its silence, that is what to look at.
ALWAYS_BAD: Final = frozenset(
    (
        "initrd-memory", "initrd-compression", "initrd-damaged", "filesystem-damaged", "verity", "oops", "panic", "oom",
        "image-short",
    )
)  # fmt: skip

# Of those, what a guest was given, and can be started with: if it falls silent later, it is broken all the same.
HALF_THERE: Final = frozenset(("initrd-memory", "initrd-compression", "initrd-damaged", "filesystem-damaged"))

# What a want of memory looks like, too.
OF_MEMORY: Final = frozenset(("oops", "panic", "oom"))

OUTCOMES: Final[Mapping[str, Outcome]] = {
    "vmm-killed": Outcome(
        sentence="somebody killed the VMM ({signal})",
        hint="SIGKILL: the host's memory may have run out (dmesg says so), or its cgroup's",
    ),
    "vmm-crashed": Outcome(
        sentence="the VMM crashed ({signal})", hint="its log may say over what; --accel tcg, or another version of it"
    ),
    "vmm-failed": Outcome(
        sentence="the VMM exited with {status}{said}",
        hint="its words are all that is known: its log lies beside the console",
    ),
    "triple-fault": Outcome(
        sentence="the guest's processor was reset, and its kernel did not say that it wanted to (a triple fault)",
        hint="too little memory for kernel and initramfs, a damaged kernel, or one for another machine looks like this",
    ),
    "initrd-memory": Outcome(
        sentence="the initramfs lies at the end of the guest's {memory} MiB, and {over} KiB of it over the kernel",
        hint="give the guest more memory",
    ),
    "memory-tiny": Outcome(
        sentence="the guest has {memory} MiB of memory, and its kernel alone takes {kernel}",
        hint="give the guest more memory",
    ),
    "flood": Outcome(
        sentence="the guest wrote to its console without end, and was stopped",
        hint="the console's end says what writes",
    ),
    "disk-flood": Outcome(
        sentence="the guest wrote to its disk without end, and was stopped",
        hint="a smoke test keeps what a guest writes beside its image, and gives it some room: look for what fills it",
    ),
    "console-full": Outcome(
        sentence="the console could not be kept: the disk that it is written to is full",
        hint="make room, or name another directory",
    ),
    "console-wrong": Outcome(
        sentence="the kernel's console is not the port that is watched: nothing is seen of what follows",
        hint="console= must name the first serial port (x86_64: ttyS0, aarch64: ttyAMA0)",
    ),
    "kvm-disguise": Outcome(
        sentence="this host's KVM is an emulator in disguise, too slow for a guest", hint="--accel tcg"
    ),
    "serial-missing": Outcome(
        sentence="the agent runs, and its guest has no serial port of the agent's",
        hint="the kernel needs VIRTIO_CONSOLE=y (and VIRTIO_PCI or VIRTIO_MMIO), the VMM the port agent.channel.0",
    ),
    "vsock-missing": Outcome(
        sentence="the agent runs, and its guest has no vsock",
        hint="the kernel needs VSOCKETS=y and VIRTIO_VSOCKETS=y, the VMM a vsock device; or --transport serial",
    ),
    "agent-deaf": Outcome(
        sentence="the agent runs, and does not listen where it is asked: it listens on {addresses}",
        hint="with --listen it listens there alone; without, on the serial port and on vsock",
    ),
    "agent-silent": Outcome(
        sentence="the agent started, and never answered", hint="--check agent.check again with agent.log=debug"
    ),
    "agent-absent": Outcome(
        sentence="the kernel started init, and no agent was heard of",
        hint="is there an agent in the image, and does init start it?",
    ),
    "silent": Outcome(
        sentence="the guest never wrote anything",
        hint="was the kernel built for this machine, with CONFIG_PVH=y and a serial console?",
    ),
    "unknown": Outcome(sentence="unknown, last seen: {last}"),
}
