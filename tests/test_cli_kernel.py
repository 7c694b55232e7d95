"""`osbuilder kernel explain` and `kernel check` as somebody types them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conf_oracle import linux

CONFIG = "# Linux/x86 6.12.7 Kernel Configuration\nCONFIG_TMPFS=y\nCONFIG_VIRTIO_PCI=y\n"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "osbuild", "kernel", *words]
    return subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)


def test_a_check_prints_a_line_for_each_need_not_met_and_exits_with_3(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(CONFIG)
    done = run("check", str(tmp_path), "--vmm", "qemu,firecracker", "--image", "verity")
    assert done.returncode == 3
    assert "not met: image verity: DM_INIT (CONFIG_DM_INIT=n): dm-mod.create=" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("not met")
    assert done.stderr == ""


def test_a_check_for_programs_says_the_same(tmp_path: Path) -> None:
    (tmp_path / "config").write_text(CONFIG)
    done = run("check", str(tmp_path), "--image", "initrd", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 3
    assert {"BLK_DEV_INITRD", "RD_ZSTD"} <= {each["need"] for each in found["unmet"]}


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("check", "/no/such/config"), 3, "cannot read /no/such/config"),
        (("check", "/dev/null"), 3, "nothing is set"),
        (("check", "/dev/null", "--vmm", "xen"), 3, "nothing is set"),
        (("check", "/dev/null", "--with", "xfs"), 2, "are for our fragments"),
        (("explain",), 2, "SYMBOL"),
        (("explain", "NET", "--arch", "z80"), 2, "z80"),
        (("explain", "NET", "--with", "warp"), 2, "warp"),
    ],
)
def test_bad_words_get_one_line_and_their_exit_code(words: tuple[str, ...], code: int, says: str) -> None:
    done = run(*words)
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_symbol_is_explained_and_the_exit_code_says_whether_it_is_what_was_asked_for() -> None:
    linux()
    done = run("explain", "EXT4_FS", "CONFIG_BTRFS_FS", "CRC16")
    assert done.returncode == 0, done.stderr
    assert "CONFIG_EXT4_FS=y\n" in done.stdout
    assert "kernel-configs/common/root.conf:" in done.stdout
    assert "selected by EXT4_FS (fs/ext4/Kconfig:" in done.stdout
    done = run("explain", "NFT_FLOW_OFFLOAD", "--set", "NFT_FLOW_OFFLOAD=y", "--json")
    (found,) = json.loads(done.stdout)
    assert done.returncode == 3
    assert found["fix"]["lines"] == ["CONFIG_NF_FLOW_TABLE=y"]
    assert run("explain", "RETPOLINE").returncode == 3
    done = run("explain", "NET", "--set", "NET=perhaps")
    assert (done.returncode, "y or n" in done.stderr) == (2, True)


def test_a_file_says_which_kernel_is_meant_to_every_command_and_the_command_line_may_say_another(
    tmp_path: Path,
) -> None:
    linux()
    file = tmp_path / "osbuild.toml"
    file.write_text('arch = "aarch64"\nfs = "xfs"\n')
    assert run("check", "--image", "disk-xfs", "--arch", "aarch64").returncode == 3
    done = run("check", "--config", str(file), "--image", "disk-xfs")
    assert (done.returncode, "for aarch64" in done.stdout) == (0, True), done.stdout + done.stderr
    done = run("check", "--config", str(file), "--arch", "x86_64", "--image", "disk-xfs")
    assert (done.returncode, "for x86_64" in done.stdout) == (0, True), done.stdout + done.stderr
    assert run("explain", "--config", str(file), "XFS_FS").returncode == 0
