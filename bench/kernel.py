"""The guest kernel, compiled cold, again after one option, and booted; beside another set of fragments if one is named.

$BENCH_FRAGMENTS may name a directory with *.conf files of somebody else's, such as Kata's common and x86_64 fragments.
They are merged as they are; what Kconfig makes of them is then built with our source, compiler and recipe.
Processor seconds count: they hardly depend on what else the machine does.
"""

from __future__ import annotations

import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from bench.boots import busybox_rootfs
from bench.measuring import Run, run
from osbuild.arch import X86_64
from osbuild.artifacts import DiskImage, Kernel, Rootfs
from osbuild.cache import Cache, default_cache
from osbuild.filesystem import FILESYSTEMS
from osbuild.kernel import KernelSpec, build_kernel, default_spec, prepared_tree
from osbuild.kernel_cost import configurator
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.runtime import qemu
from osbuild.runtime.base import Machine
from osbuild.tree import regular

MEMORY_MIB: Final = 256
SECONDS: Final = 60.0
ONE_OPTION: Final = ("CONFIG_MACVTAP=y", "CONFIG_XFS_FS=y")  # a small driver; a hundred objects more

_BUILD: Final = """
import os, sys
from pathlib import Path
from osbuild.arch import X86_64
from osbuild.cache import Cache
from osbuild.kernel import KernelSpec, build_kernel
from osbuild.resources import resource
spec = KernelSpec(arch=X86_64, fragments=tuple(map(Path, sys.argv[2:])), patches=resource("patches"))
os.environ["PATH"] = os.environ.get("BENCH_PATH", os.environ["PATH"])
print(build_kernel(spec, Cache(root=Path(sys.argv[1]))).key)
"""

# The first process of a guest that only says how much memory it has.
_MEASURE: Final = b"#!/bin/busybox sh\n/bin/busybox mount -t proc proc /proc\n/bin/busybox cat /proc/meminfo\n"
_INIT: Final = re.compile(r"\[ *([\d.]+)\] Run /\S+ as init process")
_MEMORY: Final = re.compile(r"MemTotal: +(\d+) kB")


def measure_kernel(work: Path, rounds: int) -> list[dict[str, object]]:
    """Ours, and theirs when there is one: seconds, sizes, boots."""
    ours = default_spec(X86_64)
    specs = {"ours": ours.fragments}
    if theirs := os.environ.get("BENCH_FRAGMENTS"):
        specs["theirs"] = (merged(Path(theirs), work / "theirs.conf", ours),)
    rows: list[dict[str, object]] = []
    rootfs = busybox_rootfs(work)
    for name, fragments in specs.items():
        built = compile_cold(work, name, fragments, ccache=False)
        kernel = _kernel(work / f"cache-{name}", fragments)
        rows.append({"what": f"{name}, cold, without ccache", "seconds": built.seconds, "processor": built.processor})
        rows += [
            {"what": f"{name}, {file}", "bytes": path.size}
            for file, path in (("vmlinux", kernel.vmlinux), ("vmlinuz", kernel.vmlinuz))
        ]
        rows += boots(work, name, kernel, rootfs, rounds)
    rows += warm(work, ours.fragments)
    return rows


def merged(directory: Path, out: Path, ours: KernelSpec) -> Path:
    """Everything that Kconfig sets when all fragments of a directory are asked for: a fragment that can be kept."""
    wanted: dict[str, str] = {}
    for path in sorted(directory.rglob("*.conf")):
        for line in path.read_text().splitlines():
            if found := re.match(r"(?:# )?(CONFIG_\w+)(?:=(.*)| is not set)", line):
                wanted[found[1]] = (found[2] or "n").strip()
    raw = out.with_suffix(".raw")
    raw.write_text("# why: theirs\n" + "".join(f"{name}={value}\n" for name, value in wanted.items()))
    _, configure = configurator(ours, default_cache())
    kept = configure([raw])
    print(f"theirs: {sum(kept.get(n, 'n') != v for n, v in wanted.items())} of {len(wanted)} not kept", file=sys.stderr)
    out.write_text("# why: theirs\n" + "".join(f"{name}={value}\n" for name, value in kept.items()))
    return out


def compile_cold(work: Path, name: str, fragments: tuple[Path, ...], *, ccache: bool) -> Run:
    cache = work / f"cache-{name}"
    unpacked(cache, fragments)
    if not ccache:
        os.environ["BENCH_PATH"] = str(without_ccache(work))
    try:
        return run([sys.executable, "-c", _BUILD, str(cache), *map(str, fragments)], work)
    finally:
        os.environ.pop("BENCH_PATH", None)


def unpacked(root: Path, fragments: tuple[Path, ...]) -> None:
    """The source lies unpacked before anything is measured."""
    spec = KernelSpec(arch=X86_64, fragments=fragments, patches=default_spec(X86_64).patches)
    prepared_tree(spec, Cache(root=root))


def without_ccache(work: Path) -> Path:
    home = work / "bin"
    if not home.is_dir():
        home.mkdir()
        for directory in ("/usr/bin", "/usr/sbin"):
            for path in Path(directory).iterdir():
                if path.name != "ccache" and path.exists() and not (home / path.name).exists():
                    (home / path.name).symlink_to(path)
    return home


def warm(work: Path, fragments: tuple[Path, ...]) -> list[dict[str, object]]:
    """With ccache: all of it, and once more with one option changed, then with another one instead."""
    cold = compile_cold(work, "warm", fragments, ccache=True)
    rows: list[dict[str, object]] = [
        {"what": "ours, cold, filling ccache", "seconds": cold.seconds, "processor": cold.processor}
    ]
    for number, line in enumerate(ONE_OPTION):
        option = work / f"option-{number}.conf"
        option.write_text(f"# why: touched\n{line}\n")
        again = compile_cold(work, "warm", (*fragments, option), ccache=True)
        rows.append({
            "what": f"ours with {line}, after that", "seconds": again.seconds, "processor": again.processor,
            "ratio": again.processor / cold.processor,
        })  # fmt: skip
    return rows


def boots(work: Path, name: str, kernel: Kernel, rootfs: Rootfs, rounds: int) -> list[dict[str, object]]:
    """q35 with the image as an NVDIMM, so with maxmem: the guest's clock at its first process, and its memory."""
    draft = rootfs.tree.edit()
    draft.put("/measure", regular(_MEASURE, 0o755))
    filesystem = FILESYSTEMS["ext4"]
    plan = filesystem.plan(draft.tree(), start=FILESYSTEM_START, epoch=0)
    image = build_nvdimm_image(filesystem, plan, work / "measure.img", name="ext4")
    seen = [boot(work, kernel, image) for _ in range(rounds)]
    rows: list[dict[str, object]] = [
        {"what": f"{name}, guest's clock at init, DAX image on q35", "seconds": statistics.median(s for s, _ in seen)}
    ]
    if memory := [m for _, m in seen if m]:
        rows.append({"what": f"{name}, MemTotal of {MEMORY_MIB} MiB with maxmem", "kB": statistics.median(memory)})
    return rows


def boot(work: Path, kernel: Kernel, image: DiskImage) -> tuple[float, int]:
    """Seconds until its first process, and the kB that it has; 0 of a kernel that runs no scripts and so cannot say."""
    # One that knows no DAX (Kata's fragments come to that on 6.12) reads its root from the NVDIMM as from a disk.
    plain = () if "CONFIG_FS_DAX=y\n" in kernel.config.path.read_text() else ("rootflags=data=ordered",)
    words = ("init=/measure", "panic=-1", *plain)
    machine = Machine(kernel=kernel, root=image, memory_mib=MEMORY_MIB, accel="tcg", words=words)
    with tempfile.TemporaryDirectory(dir=work) as home, qemu.start(machine, Path(home)) as guest:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            said = guest.console.read_text(errors="replace")
            memory, init = _MEMORY.search(said), _INIT.search(said)
            if init and (memory or "Requested init /measure failed" in said):
                return float(init[1]), int(memory[1]) if memory else 0
            time.sleep(0.05)
    raise SystemExit(f"bench: a guest did not say how much memory it has:\n{said[-2000:]}")


def _kernel(root: Path, fragments: tuple[Path, ...]) -> Kernel:
    spec = KernelSpec(arch=X86_64, fragments=fragments, patches=default_spec(X86_64).patches)
    return build_kernel(spec, Cache(root=root))


def show_kernel(rows: list[dict[str, object]]) -> None:
    for row in rows:
        numbers = [f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" for value in list(row.values())[1:]]
        print(f"{row['what']:60} {'  '.join(f'{n} {k}' for n, k in zip(numbers, list(row)[1:], strict=True))}")
