"""osbuilder beside what it replaces, on the same content, in one run, as ratios: python -m bench [--rounds N] [--json]

Rows are interleaved and repeated; each number is a median. Some 40 GB are written below $TMPDIR, and removed. Boots use
software emulation, which every machine has.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from bench.agent import measure_agent, show_agent
from bench.boots import base_rootfs
from bench.kernel import measure_kernel, show_kernel
from bench.reading import measure_reading
from bench.swap import measure_swap, show_swap
from bench.writers import measure_writers, show_writers
from osbuild.arch import X86_64
from osbuild.artifacts import DiskImage, Initrd, Rootfs
from osbuild.cache import default_cache
from osbuild.filesystem import FILESYSTEMS
from osbuild.initrd import build_initrd
from osbuild.kernel import build_kernel, default_spec
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.pipeline import memory_for
from osbuild.report import SmokeReport, Verdict
from osbuild.runtime.base import Machine
from osbuild.smoke import run as smoke


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", action="append", choices=tuple(PARTS))
    wishes = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="osbuilder-bench-", dir=os.environ.get("TMPDIR")) as name:
        work = Path(name)
        results = {part: PARTS[part](work, wishes.rounds) for part in wishes.only or USUAL}
    if wishes.json:
        json.dump(results, sys.stdout, indent=2)
    else:
        show(results)


def measure_boots(work: Path, rounds: int) -> list[dict[str, object]]:
    """A whole smoke test of the busybox image and of the Debian image, both ways of booting."""
    cache = default_cache()
    kernel = build_kernel(default_spec(X86_64), cache)
    roots: dict[str, DiskImage | Initrd] = {}
    for name in ("busybox", "debian"):
        roots |= make_roots(work, name, base_rootfs(name, work))
    found: dict[str, list[SmokeReport]] = {name: [] for name in roots}
    for _ in range(rounds):
        for name, root in roots.items():
            machine = Machine(kernel=kernel, root=root, memory_mib=memory_for(root, kernel), accel="tcg")
            report = smoke(machine, work / "smoke", name="bench")
            if report.verdict is not Verdict.passed:
                sys.exit(f"bench: {name}: {report.verdict}: {report.reason}")
            found[name].append(report)
    return [
        {
            "what": name,
            "wall": statistics.median(report.seconds for report in reports),
            "start to answer": statistics.median(moment(report, "agent answered") for report in reports),
            "guest to agent": statistics.median(guest_moment(report) for report in reports),
        }
        for name, reports in found.items()
    ]


def make_roots(work: Path, name: str, rootfs: Rootfs) -> dict[str, DiskImage | Initrd]:
    filesystem = FILESYSTEMS["ext4"]
    plan = filesystem.plan(rootfs.tree, start=FILESYSTEM_START, epoch=0)
    return {
        f"{name}, DAX image on q35": build_nvdimm_image(filesystem, plan, work / f"{name}.img", name="ext4"),
        f"{name}, initramfs on microvm": build_initrd(rootfs, work / f"{name}.initrd"),
    }


def moment(report: SmokeReport, name: str) -> float:
    return next(event.seconds for event in report.timeline if event.name == name)


def guest_moment(report: SmokeReport) -> float:
    """Seconds of the guest's own clock when the agent said that it had started."""
    return next(event.guest for event in report.timeline if event.name == "agent started" and event.guest is not None)


def show(results: dict[str, list[dict[str, object]]]) -> None:
    print(f"{os.cpu_count()} processors; medians\n")
    show_reading(results.get("reading", []))
    show_writers(results.get("writers", []))
    show_boots(results.get("boots", []))
    show_agent(results.get("agent", []))
    show_swap(results.get("swap", []))
    show_kernel(results.get("kernel", []))


def show_reading(rows: list[dict[str, object]]) -> None:
    for row in rows:
        print(f"{row['what']:48} {row['seconds']:8.2f} s {row['MiB']:>6} MiB of memory")
    print()


def show_boots(rows: list[dict[str, object]]) -> None:
    if rows:
        print(f"{'smoke test (software emulation)':34} {'guest clock':>12} {'answered':>9} {'wall':>6}")
    for row in rows:
        print(f"{row['what']:34} {row['guest to agent']:10.2f} s {row['start to answer']:7.2f} s {row['wall']:4.2f} s")


PARTS = {
    "reading": measure_reading, "writers": measure_writers, "boots": measure_boots, "agent": measure_agent,
    "swap": measure_swap, "kernel": measure_kernel,
}  # fmt: skip
USUAL = tuple(part for part in PARTS if part != "kernel")  # which takes half an hour, and is asked for by name

if __name__ == "__main__":
    main()
