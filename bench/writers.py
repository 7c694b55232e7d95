"""From a Tree to an image: our writers beside the tools that start from an unpacked copy, on the same content."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import sys
from pathlib import Path
from typing import Final

from bench.measuring import Run, run
from osbuild.command import find

MIB: Final = 1 << 20
BLOCK: Final = 4096
# name: files, bytes, how much of --rounds
CONTENTS: Final = {"10,000 files": (10_000, 200 * MIB, 1.0), "100,000 files": (100_000, 2000 * MIB, 0.5)}
LARGE: Final = 8 << 30

# What one of our processes does. It prints the seconds from the Tree to the finished, synced and measured file.
_WRITE: Final = """
import sys, time
from pathlib import Path
from osbuild.agent import build_agent
from osbuild.arch import X86_64
from osbuild.cache import default_cache
from osbuild.filesystem import FILESYSTEMS
from osbuild.initrd import build_initrd
from osbuild.limits import Limits
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.oci import Platform
from osbuild.rootfs import assemble_rootfs
from osbuild.sources import open_image
from osbuild.sources.image import Want
what, root, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])
cache = default_cache()
want = Want(platform=Platform(os="linux", architecture=X86_64.oci), cache=cache)
rootfs = assemble_rootfs(open_image(f"dir:{root}", want), build_agent(X86_64, cache), epoch=0)
began = time.monotonic()
if what == "initrd":
    build_initrd(rootfs, out)
else:
    name, _, verity = what.partition("+")
    filesystem = FILESYSTEMS[name]
    plan = filesystem.plan(rootfs.tree, start=FILESYSTEM_START, epoch=0)
    build_nvdimm_image(filesystem, plan, out, name=name, hashed=bool(verity), salt=bytes(32) if verity else b"")
print(time.monotonic() - began)
"""


def measure_writers(work: Path, rounds: int) -> list[dict[str, object]]:
    """Each writer beside what a user would pick instead; rows of one content follow each other in every round."""
    rows: list[dict[str, object]] = []
    for name, (files, size, share) in CONTENTS.items():
        root = work / "root"
        make_content(root, files, size)
        rows += _measure(work, name, root, max(1, round(rounds * share)), _programs(size))
        shutil.rmtree(root)
    root = work / "root"
    root.mkdir()
    make_large(root / "large")
    programs = {what: argv for what, argv in _programs(LARGE).items() if "cpio" not in what and "initramfs" not in what}
    rows += _measure(work, "one file of 8 GiB", root, 1, programs)
    shutil.rmtree(root)
    return rows


def _programs(size: int) -> dict[str, list[str]]:
    """What is measured: ours, and behind each what it is compared with."""
    room = size // MIB * 13 // 10 + 256  # its own estimate of inodes and blocks is small for 100,000 files
    cpio = "cd root; find . | LC_ALL=C sort | cpio -o -H newc --quiet"
    return {
        "DAX image (ours)": _ours("ext4", "ours.img"),
        "  mke2fs -d": _shell(
            f"rm -f theirs.img; {find('mke2fs')} -q -t ext4 -b 4096 -d root theirs.img {room}M >/dev/null;"
            " sync theirs.img"
        ),
        "  cp of the image": _shell("cp ours.img copy.img; sync copy.img; rm copy.img"),
        "DAX image, verity (ours)": _ours("ext4+verity", "verity.img"),
        "DAX image, erofs (ours)": _ours("erofs", "ours.erofs"),
        "  mkfs.erofs": _shell(
            "rm -f theirs.erofs; mkfs.erofs -Enoinline_data theirs.erofs root >/dev/null; sync theirs.erofs"
        ),
        "initramfs, zstd (ours)": _ours("initrd", "ours.cpio"),
        "  find | cpio | zstd -T2 -3": _shell(f"({cpio}) | zstd -q -T2 -3 -f -o theirs.cpio; sync theirs.cpio"),
    }  # fmt: skip


def _ours(what: str, out: str) -> list[str]:
    return [sys.executable, "-c", _WRITE, what, "root", out]


def _shell(text: str) -> list[str]:
    return ["bash", "-o", "pipefail", "-ec", text]


def _measure(
    work: Path, content: str, root: Path, rounds: int, programs: dict[str, list[str]]
) -> list[dict[str, object]]:
    found: dict[str, list[Run]] = {what: [] for what in programs}
    size = sum(-(-path.stat().st_size // BLOCK) * BLOCK for path in root.rglob("*") if path.is_file())
    for _ in range(rounds):
        for what, argv in programs.items():
            found[what].append(run(argv, work))
    rows = []
    ours = 0.0
    for what, runs in found.items():
        seconds = statistics.median(float(each.words[0]) if each.words else each.seconds for each in runs)
        out = work / programs[what][-1]
        is_ours = not what.startswith(" ")
        if is_ours:
            ours = seconds
        rows.append({
            "what": f"{what}, {content}", "seconds": seconds, "MiB": max(each.mebibytes for each in runs),
            "ratio": None if is_ours else ours / seconds,
            "allocated": out.stat().st_blocks * 512 / size if is_ours else None,
        })  # fmt: skip
    for path in work.iterdir():
        if path.is_file():
            path.unlink()
    return rows


def make_content(root: Path, files: int, size: int) -> None:
    """Half words, half noise, sizes as in a distribution's packages, fifty files to a directory."""
    root.mkdir()  # nothing of what was measured before lies in it
    source = random.Random(1)
    words = [bytes(source.randrange(97, 123) for _ in range(source.randrange(2, 11))) for _ in range(4000)]
    text = b" ".join(source.choices(words, k=1_000_000))
    noise = source.randbytes(8 * MIB)
    weights = [min(source.paretovariate(1.1), 400) for _ in range(files)]
    scale = size / sum(weights)
    for number, weight in enumerate(weights):
        path = root / f"usr/lib/package-{number // 50:05}/file-{number:06}"
        path.parent.mkdir(parents=True, exist_ok=True)
        start = source.randrange(MIB)
        length = int(weight * scale)
        body = (text if number % 2 else noise)[start:]
        path.write_bytes((body * (length // len(body) + 1))[:length])


def make_large(path: Path) -> None:
    noise = random.Random(2).randbytes(64 * MIB)
    with path.open("wb") as file:
        for number in range(LARGE // len(noise)):
            file.write(number.to_bytes(8, "little") + noise[8:])
        os.fsync(file.fileno())


def show_writers(rows: list[dict[str, object]]) -> None:
    """A line for each."""
    if rows:
        print(f"{'tree to …':50} {'seconds':>8} {'MiB of memory':>14} {'ours / it':>10} {'on disk / content':>18}")
    for row in rows:
        ratio = f"{row['ratio']:.2f}" if row["ratio"] else ""
        disk = f"{row['allocated']:.3f}" if row["allocated"] else ""
        print(f"{row['what']:50} {row['seconds']:8.2f} {row['MiB']:>14} {ratio:>10} {disk:>18}")
    print()
