"""A seed read by a real cloud-init: Debian's, in a guest that systemd starts, which is then logged in to."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from osbuild.artifacts import DiskImage, File, Kernel
from osbuild.autopsy import console_text
from osbuild.filesystem import ext4
from osbuild.filesystem.base import Room
from osbuild.nvdimm_image import FILESYSTEM_START, build_nvdimm_image
from osbuild.rootfs import assemble_rootfs
from osbuild.runtime import RUNTIMES
from osbuild.runtime.base import Guest, Machine
from osbuild.seed import Seed, write_seed
from osbuild.spec import RootfsSpec
from tests.boot_fixtures import boot_kernel, guests_alive
from tests.layer_tools import opened

__all__ = ["boot_kernel"]  # a fixture

pytestmark = [pytest.mark.boot, pytest.mark.long, pytest.mark.timeout(1800)]

CLOUD = Path.home() / ".cache/osbuilder/images/cloud-1"
SECONDS = 1500.0  # Python is slow to start where it is emulated, and cloud-init starts it four times
MAC = "52:54:00:12:34:56"
ADDRESS = "192.0.2.20"
# QEMU with a seed and a network beside what the runtime asks for: a connection to the host's port arrives at the
# guest's ssh if the guest has taken the address that the seed gives it.
WRAPPER = """#!/bin/sh
exec {qemu} "$@" \\
  -drive if=none,id=seed,file={seed},format=raw,readonly=on -device virtio-blk-pci,drive=seed \\
  -netdev user,id=lan,net=192.0.2.0/24,restrict=on,hostfwd=tcp:127.0.0.1:{port}-{address}:22 \\
  -device virtio-net-pci,netdev=lan,mac={mac},romfile=
"""
META = "instance-id: seed-1\nlocal-hostname: seeded\n"
# Two modules that cannot work here: resize2fs does not take a root that was mounted without an initramfs (/proc/mounts
# calls it /dev/root), and Debian's package locales is not in the image. To cloud-init both are errors.
USER = """#cloud-config
resize_rootfs: false
locale: false
users:
  - name: joe
    gecos: made by the seed
    shell: /bin/bash
    lock_passwd: true
    ssh_authorized_keys: ["{key}"]
write_files:
  - path: /etc/seeded
    content: "from user-data\\n"
runcmd: ["touch /run/seeded"]
"""
NETWORK = """version: 2
ethernets:
  lan:
    match: {{macaddress: "{mac}"}}
    addresses: [{address}/24]
"""


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for program in ("ssh", "ssh-keygen"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: Debian's package openssh-client")
    path = tmp_path_factory.mktemp("key") / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", path], check=True)
    return path


@pytest.fixture(scope="module")
def seed(key: Path, tmp_path_factory: pytest.TempPathFactory) -> Seed:
    home = tmp_path_factory.mktemp("seed")
    (home / "u").write_text(USER.format(key=key.with_suffix(".pub").read_text().strip()))
    (home / "m").write_text(META)
    (home / "n").write_text(NETWORK.format(mac=MAC, address=ADDRESS))
    return write_seed(home / "seed.iso", home / "u", meta_data=home / "m", network_config=home / "n")


@pytest.fixture(scope="module")
def image(agent: File, tmp_path_factory: pytest.TempPathFactory) -> DiskImage:
    """A disk that a guest may write to, with a cloud-init; the words are a virtual machine's, not those of Kata."""
    if not CLOUD.is_dir():
        pytest.skip(f"there is no {CLOUD}: scripts/base-image cloud makes it")
    rootfs = assemble_rootfs(opened(f"oci:{CLOUD}"), agent, epoch=0, wishes=RootfsSpec(init="systemd"))
    plan = ext4.plan(rootfs.tree, start=FILESYSTEM_START, epoch=0, dax=False, room=Room(writable=True, free=128 << 20))
    path = tmp_path_factory.mktemp("image") / "disk.img"
    return build_nvdimm_image(ext4, plan, path, name="ext4", header=False, writable=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def asked(key: Path, port: int, words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            "ssh", "-F", "none", "-i", str(key), "-p", str(port), "-o", "BatchMode=yes", "-o", "ConnectTimeout=20",
            "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
            "joe@127.0.0.1", words,
        ],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def wait_for_login(key: Path, port: int, guest: Guest) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        done = asked(key, port, "true")
        if done.returncode == 0:
            return
        assert guest.process.poll() is None, console_text(guest.console)[-4000:]
        assert time.monotonic() < deadline, f"{done.stderr}\n{console_text(guest.console)[-4000:]}"
        time.sleep(2)


@pytest.fixture(scope="module")
def login(
    image: DiskImage, seed: Seed, key: Path, boot_kernel: Kernel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """The port at which a guest that was started with the seed lets its user in."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        pytest.skip("qemu-system-x86_64 is not installed")
    home, port = tmp_path_factory.mktemp("boot"), free_port()
    (home / "bin").mkdir()
    wrapper = home / "bin/qemu-system-x86_64"
    wrapper.write_text(WRAPPER.format(qemu=qemu, seed=seed.file.path, port=port, mac=MAC, address=ADDRESS))
    wrapper.chmod(0o755)
    machine = Machine(kernel=boot_kernel, root=image, memory_mib=768, accel="tcg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{home / 'bin'}:{os.environ['PATH']}")
        with RUNTIMES["qemu"].start(machine, home / "work") as guest:
            wait_for_login(key, port, guest)
            yield port
    assert guests_alive(home) == []


def told(key: Path, port: int, words: str) -> str:
    done = asked(key, port, words)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_cloud_init_took_this_seed_and_is_done(login: int, key: Path) -> None:
    assert "/dev/root / ext4 rw" in told(key, login, "cat /proc/mounts")
    status = told(key, login, "cloud-init status --wait --long")
    assert "status: done" in status
    assert "DataSourceNoCloud" in status
    assert re.search(r"seed=/dev/vd[a-z]", status), "it was another seed"
    assert told(key, login, "cat /var/lib/cloud/data/instance-id") == "seed-1\n"


def test_the_user_is_there_with_the_key(login: int, key: Path) -> None:
    line = told(key, login, "getent passwd joe").strip().split(":")
    assert (line[4], line[6]) == ("made by the seed", "/bin/bash")
    keys = told(key, login, "cat ~/.ssh/authorized_keys")
    assert key.with_suffix(".pub").read_text().strip() in keys


def test_the_address_is_the_seeds(login: int, key: Path) -> None:
    # That the connection arrives says so already.
    assert re.search(rf"\binet {ADDRESS}/24 ", told(key, login, "ip -4 address"))


def test_files_commands_and_the_name_are_the_seeds(login: int, key: Path) -> None:
    told(key, login, "cloud-init status --wait")
    assert told(key, login, "cat /etc/seeded; ls /run/seeded; hostname").split("\n")[:3] == [
        "from user-data", "/run/seeded", "seeded",
    ]  # fmt: skip
