"""osbuilder beside what it replaces, on the same content, in one run, as ratios: python -m bench [--rounds N] [--json]

Rows are interleaved and repeated; each number is a median. Boots use software emulation, which every machine has.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench.reading import measure_reading
from osbuild.agent import build_agent
from osbuild.arch import X86_64
from osbuild.artifacts import DiskImage, Initrd, Rootfs
from osbuild.cache import default_cache
from osbuild.command import find
from osbuild.filesystem import FILESYSTEMS
from osbuild.initrd import build_initrd
from osbuild.kernel import build_kernel, default_spec
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.oci import Platform
from osbuild.pipeline import memory_for
from osbuild.report import SmokeReport, Verdict
from osbuild.rootfs import assemble_rootfs
from osbuild.runtime.base import Machine
from osbuild.smoke import run as smoke
from osbuild.sources import open_image
from osbuild.sources.image import Want

WANT = Want(platform=Platform(os="linux", architecture=X86_64.oci), cache=default_cache())
FILES = 10_000
BYTES = 200 << 20
ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", action="append", choices=("reading", "writers", "boots"))
    wishes = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="osbuilder-bench-", dir=os.environ.get("TMPDIR")) as name:
        work = Path(name)
        results = {part: PARTS[part](work, wishes.rounds) for part in wishes.only or PARTS}
    if wishes.json:
        json.dump(results, sys.stdout, indent=2)
    else:
        show(results)


def make_content(root: Path) -> None:
    """200 MB in 10,000 files of 200 directories: half words, half noise, sizes as in a distribution's packages."""
    source = random.Random(1)
    words = [bytes(source.randrange(97, 123) for _ in range(source.randrange(2, 11))) for _ in range(4000)]
    noise = source.randbytes(4 << 20)
    weights = [source.paretovariate(1.1) for _ in range(FILES)]
    scale = BYTES / sum(min(weight, 400) for weight in weights)
    for number, weight in enumerate(weights):
        size = int(min(weight, 400) * scale)
        if number % 2:
            data = b" ".join(source.choices(words, k=size // 6 + 1))[:size]
        else:
            start = source.randrange(1 << 20)
            data = (noise[start:] * (size // (3 << 20) + 1))[:size]
        path = root / f"usr/lib/package-{number % 200:03}/file-{number:05}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def measure_writers(work: Path, rounds: int) -> list[dict[str, object]]:
    """Tree to image and tree to initramfs; the others start from an unpacked copy, which they need and we do not."""
    unpacked = work / "unpacked"
    make_content(unpacked)
    with tarfile.open(work / "rootfs.tar", "w") as tar:
        tar.add(unpacked, arcname=".")
    layout = work / "layout"
    subprocess.run(
        [str(ROOT / "scripts/oci-layout"), str(work / "rootfs.tar"), str(layout), "bench:latest"], check=True
    )
    image = open_image(f"oci:{layout}", WANT)
    rootfs = assemble_rootfs(image, build_agent(X86_64, default_cache()), epoch=0)
    filesystem = FILESYSTEMS["ext4"]

    def ours_image() -> None:
        plan = filesystem.plan(rootfs.tree, start=FILESYSTEM_START, epoch=0)
        build_nvdimm_image(filesystem, plan, work / "ours.img", name="ext4")

    def mke2fs() -> None:
        shell(
            f"rm -f theirs.img; {find('mke2fs')} -q -t ext4 -b 4096 -O ^has_journal -d unpacked theirs.img 300M;"
            " sync theirs.img"
        )

    def ours_initrd() -> None:
        build_initrd(rootfs, work / "ours.initrd")

    def shell(text: str) -> None:
        subprocess.run(["bash", "-o", "pipefail", "-ec", text], cwd=work, check=True)

    cpio = "cd unpacked; find . | LC_ALL=C sort | cpio -o -H newc --quiet"
    rows = race(
        {
            "tree to DAX image (ours)": ours_image,
            "mke2fs -d": mke2fs,
            "tree to initramfs, zstd (ours)": ours_initrd,
            "find | cpio | zstd -T2 -3": lambda: shell(f"({cpio}) | zstd -q -T2 -3 -f -o theirs.zst; sync theirs.zst"),
            "find | cpio | gzip -9": lambda: shell(f"({cpio}) | gzip -9 > theirs.gz; sync theirs.gz"),
        },
        rounds,
    )
    sizes = {
        "tree to DAX image (ours)": "ours.img", "mke2fs -d": "theirs.img",
        "tree to initramfs, zstd (ours)": "ours.initrd", "find | cpio | zstd -T2 -3": "theirs.zst",
        "find | cpio | gzip -9": "theirs.gz",
    }  # fmt: skip
    return [
        {"what": what, "seconds": seconds, "bytes": (work / sizes[what]).stat().st_blocks * 512}
        for what, seconds in rows.items()
    ]


def measure_boots(work: Path, rounds: int) -> list[dict[str, object]]:
    """A whole smoke test of the busybox image and of the Debian image, both ways of booting."""
    cache = default_cache()
    kernel = build_kernel(default_spec(X86_64), cache)
    roots: dict[str, DiskImage | Initrd] = {}
    for name in ("busybox", "debian"):
        layout = work / name
        environment = os.environ | {"DOCKER_HOST": "unix:///nonexistent"}
        subprocess.run([str(ROOT / "scripts/base-image"), name, str(layout)], check=True, env=environment)
        rootfs = assemble_rootfs(open_image(f"oci:{layout}", WANT), build_agent(X86_64, cache), epoch=0)
        roots |= make_roots(work, name, rootfs)
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


def race(rows: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Medians of interleaved rounds, after one that warms the caches."""
    times: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + 1):
        for name, action in rows.items():
            began = time.perf_counter()
            action()
            if number:
                times[name].append(time.perf_counter() - began)
    return {name: statistics.median(taken) for name, taken in times.items()}


def show(results: dict[str, list[dict[str, object]]]) -> None:
    print(f"content: {BYTES >> 20} MiB in {FILES} files; {os.cpu_count()} processors; medians\n")
    show_reading(results.get("reading", []))
    show_writers(results.get("writers", []))
    show_boots(results.get("boots", []))


def show_reading(rows: list[dict[str, object]]) -> None:
    for row in rows:
        print(f"{row['what']:48} {row['seconds']:8.2f} s {row['MiB']:>6} MiB of memory")
    print()


def show_writers(rows: list[dict[str, object]]) -> None:
    writers = {str(row["what"]): row for row in rows}
    seconds = {what: float(str(row["seconds"])) for what, row in writers.items()}
    base = {"mke2fs -d": "tree to DAX image (ours)", "find | cpio | zstd -T2 -3": "tree to initramfs, zstd (ours)",
            "find | cpio | gzip -9": "tree to initramfs, zstd (ours)"}  # fmt: skip
    if rows:
        print(f"{'writer':34} {'seconds':>8} {'MiB on disk':>12} {'ours / it':>10}")
    for what, row in writers.items():
        ratio = f"{seconds[base[what]] / seconds[what]:.2f}" if what in base else ""
        print(f"{what:34} {seconds[what]:8.2f} {int(str(row['bytes'])) / (1 << 20):12.1f} {ratio:>10}")
    print()


def show_boots(rows: list[dict[str, object]]) -> None:
    if rows:
        print(f"{'smoke test (software emulation)':34} {'guest clock':>12} {'answered':>9} {'wall':>6}")
    for row in rows:
        print(f"{row['what']:34} {row['guest to agent']:10.2f} s {row['start to answer']:7.2f} s {row['wall']:4.2f} s")


PARTS = {"reading": measure_reading, "writers": measure_writers, "boots": measure_boots}

if __name__ == "__main__":
    main()
