"""A guest's console on a terminal: QEMU's options, a terminal that is as it was, and a person at a pty."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from osbuild import boot_console
from osbuild.artifacts import Kernel
from tests.boot_fixtures import boot_kernel
from tests.layer_tools import archive, folder, write_layout

__all__ = ["boot_kernel"]  # a fixture

SECONDS: Final = 240.0


def build(home: Path) -> Path:
    """A build of next to nothing, as an initramfs."""
    write_layout(home / "layout", [archive(folder("etc"))])
    out = home / "out"
    subprocess.run(
        [sys.executable, "-m", "osbuild", "build", f"oci:{home}/layout", "-o", str(out), "--make", "initrd",
         "--no-smoke", "--quiet"],
        check=True, capture_output=True,
    )  # fmt: skip
    return out


@contextlib.contextmanager
def person(*words: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A program with a terminal for its input and output, and the other end of that."""
    here, there = pty.openpty()
    try:
        with subprocess.Popen(
            [sys.executable, "-m", "osbuild", *words], stdin=there, stdout=there, stderr=there, start_new_session=True
        ) as process:
            try:
                yield process, here
            finally:
                if process.poll() is None:
                    process.kill()
    finally:
        os.close(here)
        os.close(there)


def read_until(terminal: int, wanted: bytes, seconds: float = SECONDS) -> bytes:
    deadline, data = time.monotonic() + seconds, b""
    while wanted not in data:
        ready, _, _ = select.select([terminal], [], [], max(deadline - time.monotonic(), 0))
        assert ready, f"{wanted!r} did not come: {data[-2000:]!r}"
        data += os.read(terminal, 65536)
    return data


@pytest.mark.boot
def test_a_person_sees_the_guest_and_ends_it_with_ctrl_a_x(boot_kernel: Kernel, tmp_path: Path) -> None:
    out = build(tmp_path)
    with person("boot", str(out), "--accel", "tcg", "--quiet") as (process, terminal):
        before = termios.tcgetattr(terminal)
        said = read_until(terminal, b'"msg":"agent started"')
        assert b"Linux version" in said
        assert termios.tcgetattr(terminal) != before, "the terminal is raw"
        os.write(terminal, b"\x03")  # Ctrl-C is the guest's
        time.sleep(0.5)
        assert process.poll() is None
        os.write(terminal, b"\x01x")
        read_until(terminal, b"QEMU: Terminated", 30)
        assert process.wait(timeout=30) == 0
        assert termios.tcgetattr(terminal) == before


@pytest.mark.slow
@pytest.mark.boot
def test_a_vmm_that_is_killed_leaves_the_terminal_as_it_was(boot_kernel: Kernel, tmp_path: Path) -> None:
    out = build(tmp_path)
    with person("boot", str(out), "--accel", "tcg", "--quiet") as (process, terminal):
        before = termios.tcgetattr(terminal)
        read_until(terminal, b"Linux version")
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)
        assert process.wait(timeout=30) == 128 + signal.SIGKILL
        assert termios.tcgetattr(terminal) == before


def test_only_the_console_and_the_agents_port_are_others() -> None:
    argv = (
        "-m",
        "256M",
        "-chardev",
        "file,id=console,path=/a",
        "-chardev",
        "socket,id=agent,path=/b",
        "-x",
        "file,id=c",
    )
    assert boot_console.on_terminal(argv) == [
        "-m", "256M", "-chardev", "stdio,id=console,mux=on,signal=off", "-chardev", "null,id=agent", "-x", "file,id=c"
    ]  # fmt: skip


def test_what_only_a_test_looks_at_is_said_to_do_nothing(boot_kernel: Kernel, tmp_path: Path) -> None:
    """Whoever may have no network of this kind is told so, too: none is made."""
    words = ("--network", "bridge=none", "--check", "dax", "--root", "image")
    done = subprocess.run(
        [sys.executable, "-m", "osbuild", "boot", str(build(tmp_path)), *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "only smoke looks at network, check: here it does nothing" in done.stderr
    assert "no 'image' can be booted" in done.stderr
    assert "Ctrl-A" not in done.stderr, "there is no guest to end"


def test_a_root_that_was_not_built_is_refused_by_name(boot_kernel: Kernel, tmp_path: Path) -> None:
    out = build(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "osbuild", "boot", str(out), "--root", "image", "--quiet"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no 'image' can be booted" in done.stderr
    assert "one of initrd" in done.stderr
