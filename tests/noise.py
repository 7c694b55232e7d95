"""What healthy guests, and healthy VMMs, say that sounds like trouble, and where it may stand on a console."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

STAMP: Final = re.compile(r"\[ *(\d+\.\d{6})\] ")
_END: Final = re.compile(r"\] (?:Kernel panic - not syncing|reboot: )")

# A processor that waited for a busy host, and went on; what follows a line of it is as Linux 6.12 writes it.
STALL: Final = """\
rcu: INFO: rcu_sched self-detected stall on CPU
rcu: \t0-....: (2099 ticks this GP) idle=a3c4/1/0x4000000000000000 softirq=91/91 fqs=1050
rcu: \t(t=2100 jiffies g=-1055 q=3 ncpus=1)
CPU: 0 UID: 0 PID: 1 Comm: swapper/0 Not tainted 6.12.117 #1
RIP: 0010:delay_tsc+0x33/0x60
Call Trace:
 <IRQ>
 ? rcu_dump_cpu_stacks+0xb7/0xe0
 </IRQ>
hrtimer: interrupt took 8969439 ns"""
LOCKUP: Final = """\
watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [swapper/0:1]
CPU: 0 UID: 0 PID: 1 Comm: swapper/0 Not tainted 6.12.117 #1
RIP: 0010:delay_tsc+0x33/0x60
clocksource: Long readout interval, skipping watchdog check"""
# Of a thread of the kernel's, which dies of it; all others go on.
OOPS: Final = """\
BUG: kernel NULL pointer dereference, address: 0000000000000000
#PF: supervisor write access in kernel mode
#PF: error_code(0x0002) - not-present page
PGD 0 P4D 0
Oops: Oops: 0002 [#1] SMP NOPTI
CPU: 0 UID: 0 PID: 60 Comm: kworker/0:2 Not tainted 6.12.117 #1
RIP: 0010:process_one_work+0x2/0x240
Call Trace:
 <TASK>
 worker_thread+0xb7/0xe0
 </TASK>
---[ end trace 0000000000000000 ]---"""

KERNEL: Final[Mapping[str, str]] = {
    "a stall that passed": STALL,
    "a lockup that passed": LOCKUP,
    "a task that waited": "INFO: task kworker/0:1:9 blocked for more than 120 seconds.\nrandom: crng init done",
    "a tmpfs with quota": "tmpfs: Unknown parameter 'usrquota'",
    "cgroup2 of another kernel": "cgroup2: Unknown parameter 'memory_recursiveprot'",
    "a loop parameter": "loop: unknown parameter 'max_part_nr' ignored",
    "loop": "loop: module loaded",
    "firmware bug": "[Firmware Bug]: TSC ADJUST: CPU0: -12 force to 0",
    "an ACPI error": "ACPI BIOS Error (bug): Could not resolve symbol [\\_SB.PCI0], AE_NOT_FOUND (20240827/psargs-330)",
    "unarmed": "nfit ACPI0012:00: Error found in NVDIMM nmem0 flags: not_armed",
    "another disk with DAX": "EXT4-fs (vdz1): DAX unsupported by block device.",
    "another disk cut short": "vdz: p1 size 10240 extends beyond EOD, truncated",
    "another damaged disk": "EXT4-fs error (device vdz1): ext4_lookup:1821: inode #18: comm cat: bad",
    "another NVDIMM": " pfn7.1: resource end misaligned",
    "a program that faults": "traps: app[77] general protection fault ip:401000 sp:7ffe0 error:0 in app[401000+1000]",
    "a container without memory": "Memory cgroup out of memory: Killed process 99 (java) total-vm:1kB, anon-rss:1kB",
    "a program without memory": "Out of memory: Killed process 99 (java) total-vm:1kB, anon-rss:1kB, file-rss:0kB",
    "a message of a program's": "app[77]: Kernel panic - not syncing: is what I was told to look for",
    "cgroup v1 refused": "cgroup: Disabled controller 'memory'",
}

QUOTE: Final = "another guest's log"
SAME: Final = {"cgroup v1 refused": "cgroup-v1"}  # what would be a cause by itself

SYSTEMD: Final[Mapping[str, str]] = {
    "systemd complains": "systemd[1]: Failed to start foo.service - Foo.",
    "systemd misses a unit": "systemd[1]: Unit foo.service not found.",
}

USERLAND: Final[Mapping[str, str]] = {
    "a panic quoted": "app: log: Kernel panic - not syncing: Attempted to kill init! exitcode=0x0000000b",
    "a panic that begins a line": "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
    "a panic with its time": "app: seen in dmesg: [99999.000000] Kernel panic - not syncing: Fatal exception",
    "another guest's log": "[    0.000001] Kernel panic - not syncing: Fatal exception",
    "a later guest's log": "[99999.000001] Oops: general protection fault, probably for non-canonical address",
    "triple fault": "qemu-test: triple fault handled as expected",
    "memory": "app: java.lang.OutOfMemoryError: Out of memory: Killed process 12 (java)",
    "a fault": "app: 2026-01-01 BUG: unable to handle page fault, Oops: general protection fault",
    "a journal": "journal: systemd[1]: Freezing execution.",
    "rescue": "motd: You are in rescue mode if you read this",
    "a library of a plugin's": "plugin: error while loading shared libraries: libx.so.1: cannot open",
    "read-only": "touch: cannot touch '/run/x': Read-only file system",
    "goodbye": "app: reboot: Power down is what the kernel says at its end",
    "filesystem": "fsck: EXT4-fs error (device pmem0p1): none; device-mapper: verity: 254:1: data block 1 is corrupted",
    "an agent's log": 'app: log: {\\"msg\\":\\"agent started\\"} kata-agent.service: Main process exited, code=killed',
    "initramfs": "app: Initramfs unpacking failed: write error; VFS: Cannot open root device",
    "a stall quoted": "app: rcu: INFO: rcu_sched self-detected stall on CPU",
}

VMM: Final[Mapping[str, str]] = {
    "a feature": "qemu-system-x86_64: warning: TCG doesn't support requested feature: CPUID.01H:ECX.vmx [bit 5]",
    "kvm": "qemu-system-x86_64: -accel kvm: warning: this KVM is old",
    "no kvm": "qemu-system-x86_64: falling back to tcg",
    "a device": "qemu-system-x86_64: -device nvdimm,memdev=root: warning: unarmed: Permission denied",
    "sound": "qemu-system-x86_64: warning: could not open /dev/snd: No such file or directory",
}


def ends_at(lines: list[str]) -> int:
    """The first line with which the guest's kernel ends, or one behind the last."""
    return next((index for index, line in enumerate(lines) if _END.search(line)), len(lines))


def init_at(lines: list[str]) -> int:
    """The first line that userland can have written behind, or one behind the last."""
    runs = (index for index, line in enumerate(lines) if re.search(r"Run \S+ as init process|systemd\[1\]: ", line))
    return next((index + 1 for index in runs), len(lines))


def put(lines: list[str], at: int, said: str, *, by_kernel: bool) -> list[str]:
    """Before a line, with the kernel's time where it says it: not that of another guest, which is quoted there."""
    quoted = set(USERLAND.values())
    times = [match[0] for line in lines[:at] if line not in quoted and (match := STAMP.match(line))]
    new = [f"{times[-1]}{one}" if by_kernel and times else one for one in said.splitlines()]
    return [*lines[:at], *new, *lines[at:]]
