"""What boots need: a kernel, an agent, and roots that are right or wrong in one way each."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from osbuild.agent import INIT, install_init, read_agent
from osbuild.arch import X86_64, Arch
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.cache import default_cache
from osbuild.errors import HostError
from osbuild.filesystem import ext4
from osbuild.initrd import archive, build_initrd
from osbuild.kernel import default_spec, find_kernel
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.runtime import qemu
from osbuild.tree import Draft, Tree, device, directory, regular, symlink

DIRECTORIES: Final = ("proc", "sys", "dev", "run", "tmp", "etc", "sbin", "var")

# Programs of a few hundred bytes, so that what is wrong with them is all that they are. {} is the body of main.
_PROGRAM: Final = """
static long call(long number, long a, long b, long c)
{{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return result;
}}
void _start(void) {{ {body} call(60, 3, 0, 0); }}
"""
BODIES: Final = {
    "exits": "",
    "ends badly": 'call(1, 2, (long)"usage: none\\n", 12); call(60, 2, 0, 0);',
    "sleeps": "for (;;) call(34, 0, 0, 0);",
    "floods": 'for (;;) call(1, 1, (long)"\\033[2Jmore and more and more and more and more\\n", 44);',
    "says": 'call(1, 1, (long)"\\033]0;owned\\007hello \\033[31mred\\n", 24); for (;;) call(34, 0, 0, 0);',
    "faults": "*(volatile int *)8 = 1;",
    "restarts": "call(169, 0xfee1dead, 672274793, 0x1234567);",
}


@pytest.fixture(scope="session")
def boot_kernel(kernel: Kernel) -> Kernel:
    """The repository's kernel, where there is a QEMU to boot it."""
    if shutil.which(X86_64.qemu) is None:
        pytest.skip(f"{X86_64.qemu} is not installed")
    return kernel


def other_kernel(arch: Arch = X86_64, *features: str) -> Kernel:
    """A kernel besides the default one if it was built before: to compile one takes minutes, and a test does not."""
    if shutil.which(arch.qemu) is None:
        pytest.skip(f"{arch.qemu} is not installed: apt-get install {arch.qemu_package}")
    try:
        found = find_kernel(default_spec(arch, features=features), default_cache())
    except HostError as problem:
        pytest.skip(f"{problem}: {problem.hint}")
    if found is None:
        pytest.skip(f"no kernel for {arch.name}{''.join(f' with {name}' for name in features)} is built: make kernels")
    return found


@pytest.fixture(scope="session")
def boot_rootfs(agent: File) -> Rootfs:
    """Nothing but the agent."""
    draft = skeleton()
    found = read_agent(agent)
    install_init(draft, found, now=0)
    return Rootfs(tree=draft.tree(), init=INIT, epoch=0, agent=str(found), agent_sha256=found.sha256)


@pytest.fixture(scope="session")
def good_initrd(boot_rootfs: Rootfs, tmp_path_factory: pytest.TempPathFactory) -> Initrd:
    return build_initrd(boot_rootfs, tmp_path_factory.mktemp("initrd") / "initrd.img")


@pytest.fixture(scope="session")
def good_image(boot_rootfs: Rootfs, tmp_path_factory: pytest.TempPathFactory) -> DiskImage:
    plan = ext4.plan(boot_rootfs.tree, start=FILESYSTEM_START, epoch=0)
    return build_nvdimm_image(ext4, plan, tmp_path_factory.mktemp("image") / "rootfs.img", name="ext4")


@pytest.fixture(scope="session")
def compile_init(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    """A static program with one of BODIES."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    home = tmp_path_factory.mktemp("programs")

    def make(body: str) -> bytes:
        source, program = home / f"{body}.c", home / body
        if not program.exists():
            source.write_text(_PROGRAM.format(body=BODIES[body]))
            flags = ("-static", "-nostdlib", "-fno-stack-protector", "-fcf-protection=none", "-O1", "-s")
            subprocess.run(["gcc", *flags, "-o", program, source], check=True)
        return program.read_bytes()

    return make


def tree_with_init(program: bytes, permissions: int = 0o755) -> Tree:
    """A root whose /init and /sbin/init are this program, and which has no agent."""
    draft = skeleton()
    for path in ("/init", "/sbin/init"):
        draft.put(path, regular(program, permissions))
    return draft.tree()


def initrd_of(tree: Tree, path: Path) -> Initrd:
    """An initramfs of any tree, right or wrong."""
    data = b"".join(archive(tree))
    path.write_bytes(data)
    return Initrd(file=File.of(path), compression="none", unpacked=len(data))


def initrd_of_bytes(data: bytes, path: Path) -> Initrd:
    """What claims to be an initramfs."""
    path.write_bytes(data)
    return Initrd(file=File.of(path), compression="none", unpacked=len(data))


def image_of(tree: Tree, path: Path, *, header: bool = True) -> DiskImage:
    """An image of any tree."""
    plan = ext4.plan(tree, start=FILESYSTEM_START, epoch=0)
    return build_nvdimm_image(ext4, plan, path, name="ext4", header=header)


def guests_alive(work: Path) -> list[int]:
    """QEMUs whose console is in `work`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            argv = (process / "cmdline").read_bytes()
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if qemu.CHANNEL.encode() in argv and os.fsencode(work) in argv and state != "Z":
            found.append(int(process.name))
    return found


def skeleton() -> Draft:
    """The directories that every root needs, and a console."""
    draft = Draft()
    for name in DIRECTORIES:
        draft.put(f"/{name}", directory(mtime_ns=0))
    draft.put("/var/run", symlink("/run"))  # where agents keep a sandbox's namespaces
    draft.put("/dev/console", device(stat.S_IFCHR, 0o600, 5, 1))
    return draft
