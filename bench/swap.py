"""Another agent into an image of some 250 MiB: seconds and processor seconds of the whole command, start-up included.

The image is a build's, whose manifest.json knows its root hash, and goes to a new file, as the copy beside it does.

Python's bytecode is kept where the bench says, as it is where osbuilder is installed: without it, a third of a second
more goes into compiling our own modules.
"""

from __future__ import annotations

import shutil
import statistics
import sys
from pathlib import Path
from typing import Final

from bench.measuring import Run, run
from bench.writers import MIB, make_content
from osbuild.agent import build_agent
from osbuild.arch import X86_64
from osbuild.cache import default_cache

FILES: Final = (2_000, 10_000)
SIZE: Final = 240 * MIB


def measure_swap(work: Path, rounds: int) -> list[dict[str, object]]:
    """Rows of what, seconds and processor seconds: each swap, and a copy of the same file that is flushed.

    What each made is removed before the next, outside of what is timed: some disks take long for that.
    """
    other = work / "other-agent"
    other.write_bytes(build_agent(X86_64, default_cache()).path.read_bytes() + bytes(64))
    rows = []
    for files in FILES:
        root = work / "root"
        make_content(root, files, SIZE)
        for verity in ([], ["--verity"]):
            built = ["build", f"dir:{root}", "--make", "image", "--no-smoke", "-q", "-o", "build", *verity]
            run([*_osbuilder(work), *built], work)
            image = "build/rootfs.img"
            programs = {
                f"agent swap, {files:,} files{', verity' if verity else ''}": [
                    *_osbuilder(work), "agent", "swap", image, str(other), "-o", "b.img", "--json",
                ],
                "  cp of the image": ["bash", "-ec", f"cp {image} b.img; sync b.img"],
            }  # fmt: skip
            found: dict[str, list[Run]] = {what: [] for what in programs}
            for _ in range(rounds):
                for what, argv in programs.items():
                    found[what].append(run(argv, work))
                    (work / "b.img").unlink()
            rows += [
                {
                    "what": what,
                    "seconds": statistics.median(each.seconds for each in runs),
                    "processor": statistics.median(each.processor for each in runs),
                }
                for what, runs in found.items()
            ]
        shutil.rmtree(root)
    return rows


def _osbuilder(work: Path) -> list[str]:
    cached = f"PYTHONPYCACHEPREFIX={work}/bytecode"
    return ["env", "-u", "PYTHONDONTWRITEBYTECODE", cached, sys.executable, "-m", "osbuild"]


def show_swap(rows: list[dict[str, object]]) -> None:
    """A line for each."""
    for row in rows:
        print(f"{row['what']:48} {row['seconds']:8.2f} s {row['processor']:8.2f} s of processors")
    print()
