"""From an archive of `docker save` to a Tree, each time in a fresh process: seconds, and the most memory it took."""

from __future__ import annotations

import hashlib
import io
import json
import random
import shutil
import statistics
import sys
import tarfile
import time
from pathlib import Path

from bench.measuring import run

_READ = """
import sys
from pathlib import Path
from osbuild.cache import Cache
from osbuild.oci import Platform
from osbuild.sources import open_image
from osbuild.sources.image import Want
want = Want(platform=Platform(os="linux", architecture="amd64"), cache=Cache(root=Path(sys.argv[2])))
print(len(open_image(sys.argv[1], want).tree))
"""


def measure_reading(work: Path, rounds: int) -> list[dict[str, object]]:
    """200 MB in 10,000 files, then ten times that; ours cold and kept, and what unpacks the same to disk."""
    rows = []
    for files, size, repeat in ((10_000, 200_000_000, rounds), (100_000, 2_000_000_000, max(1, rounds // 2))):
        archive = work / f"{files}.tar"
        make_archive(archive, files, size)
        time.sleep(2.1)  # until its times are old enough to tell a later change by
        ours = [sys.executable, "-c", _READ, f"docker-archive:{archive}", str(work / "c")]
        for name, argv, cold in (
            ("archive to Tree (ours)", ours, True),
            ("the same file again (ours)", ours, False),
            ("tar -x twice: archive, then layer", _shell(f"tar -xf {archive} && tar -xf l/layer.tar -C root"), True),
        ):
            seconds, memory = _measure(argv, work, repeat, cold=cold)
            rows.append({"what": f"{name}, {files:,} files", "seconds": seconds, "MiB": memory})
        archive.unlink()
        for left in ("l", "root", "c"):  # the writers have a root of their own
            shutil.rmtree(work / left, ignore_errors=True)
    return rows


def make_archive(out: Path, files: int, size: int) -> None:
    """An image of one layer, fifty files to a directory, as `docker save` writes it."""
    source = random.Random(1)
    noise = source.randbytes(4 << 20)
    each = size // files
    layer = out.with_suffix(".layer")
    with tarfile.open(layer, "w") as tar:
        for number in range(files):
            if number % 50 == 0:
                folder = tarfile.TarInfo(f"usr/lib/package-{number // 50:05}")
                folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(folder)
            start = source.randrange(1 << 20)
            _add(tar, f"usr/lib/package-{number // 50:05}/file-{number:06}", noise[start : start + each])
    with layer.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rootfs = {"type": "layers", "diff_ids": [f"sha256:{digest}"]}
    with tarfile.open(out, "w") as tar:
        _add(tar, "config.json", json.dumps({"os": "linux", "architecture": "amd64", "rootfs": rootfs}).encode())
        _add(tar, "manifest.json", json.dumps([{"Config": "config.json", "Layers": ["l/layer.tar"]}]).encode())
        tar.add(layer, "l/layer.tar")
    layer.unlink()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _shell(text: str) -> list[str]:
    return ["bash", "-ec", f"rm -rf l root; mkdir root; {text}"]


def _measure(argv: list[str], work: Path, rounds: int, *, cold: bool) -> tuple[float, int]:
    """The median of the seconds, and the most memory of any round in MiB."""
    found = []
    for _ in range(rounds):
        if cold:
            shutil.rmtree(work / "c", ignore_errors=True)
        found.append(run(argv, work))
    return statistics.median(each.seconds for each in found), max(each.mebibytes for each in found)
