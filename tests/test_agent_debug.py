"""The debug console and the log for the host, met on unix sockets; and on the guest's console in a real boot."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild import command, ttrpc
from osbuild.agent_client import AgentClient
from osbuild.artifacts import Initrd, Kernel
from tests.agent_guest import booted

_SECONDS: Final = 20.0
_LARGEST_LOG: Final = 64 * 1024  # debug_log.c's MOST


@dataclass(frozen=True, slots=True)
class Debugged:
    """An agent, and where it can be debugged."""

    client: AgentClient
    console: Path
    log: Path
    pid: int  # of the agent


# What root's own .bashrc does (it once waited a minute for a lock) is none of the agent's shells' business.
_NO_HABITS: Final = (
    "sh", "-ec", '[ ! -f /root/.bashrc ] || mount --bind /dev/null /root/.bashrc; exec "$@"', "sh",
)  # fmt: skip


@contextlib.contextmanager
def debugged(program: Path, output: Path, *, wait: bool = True) -> Iterator[Debugged]:
    """In namespaces of processes and mounts of its own, so that its shells are gone with it."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("namespaces for the agent need root and unshare (util-linux)")
    with tempfile.TemporaryDirectory(prefix="debug-") as name:
        home = Path(name)
        options = ("--listen", "--debug-console", "--log")
        paths = [home / option.strip("-") for option in options]
        words = [word for option, path in zip(options, paths, strict=True) for word in (option, f"unix:{path}")]
        argv = ("unshare", "--mount", "--pid", "--ipc", "--uts", "--fork", "--kill-child", "--mount-proc")
        with command.start(*argv, *_NO_HABITS, str(program), *words, log=output) as process:
            with ttrpc.connect_unix(paths[0], _SECONDS) as connection:
                client = AgentClient(connection)
                client.wait(_SECONDS)
                children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
                yield Debugged(client, paths[1], paths[2], int(children[0]))
                client.destroy_sandbox()
            assert process.wait(timeout=_SECONDS) == 0, output.read_text()


@pytest.fixture
def running(sanitized_agent: Path, tmp_path: Path) -> Iterator[Debugged]:
    with debugged(sanitized_agent, tmp_path / "output.log") as found:
        yield found


def connect(path: Path) -> socket.socket:
    stream = socket.socket(socket.AF_UNIX)
    stream.settimeout(_SECONDS)
    deadline = time.monotonic() + _SECONDS
    try:
        while True:
            with contextlib.suppress(BlockingIOError):  # as many as the agent lets wait are waiting
                stream.connect(str(path))
                return stream
            assert time.monotonic() < deadline
            time.sleep(0.01)
    except BaseException:
        stream.close()
        raise


def read_until(stream: socket.socket, text: bytes) -> bytes:
    read = b""
    while text not in read:
        piece = stream.recv(65536)
        assert piece, read
        read += piece
    return read


def lines_of(stream: socket.socket, *, until: str) -> list[dict[str, Any]]:
    text = read_until(stream, f'"{until}"'.encode())
    while not text.endswith(b"\n"):
        text += stream.recv(65536)
    return [json.loads(line) for line in text.splitlines()]


def descriptors(running: Debugged) -> int:
    return len(list(Path(f"/proc/{running.pid}/fd").iterdir()))


def eventually(expected: Any, measure: Any) -> None:
    deadline = time.monotonic() + _SECONDS
    while (seen := measure()) != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    assert seen == expected


# --- the console ---


def test_a_connection_is_a_shell_on_a_terminal_of_its_own(running: Debugged) -> None:
    with connect(running.console) as console:
        console.sendall(b"tty; stty size; id -u\n")
        said = read_until(console, b"\r\n0\r\n")
        console.sendall(b"exit\n")
        while piece := console.recv(65536):  # the shell's end is the connection's
            said += piece
    assert b"/dev/pts/" in said
    assert b"24 80" in said


def test_what_a_shell_has_said_is_not_lost_when_it_ends(running: Debugged) -> None:
    with connect(running.console) as console:
        console.sendall(b"exec seq 1 20000\n")
        said = b""
        while piece := console.recv(65536):
            said += piece
    assert said.endswith(b"\r\n20000\r\n")


def test_a_host_that_ends_its_input_gets_the_answer(running: Debugged) -> None:
    with connect(running.console) as console:
        console.sendall(b"sleep 0.2; echo don''e; exit\n")
        console.shutdown(socket.SHUT_WR)
        said = b""
        while piece := console.recv(65536):
            said += piece
    assert b"done\r\n" in said


def test_a_host_that_leaves_takes_its_shell_and_its_descriptors_along(running: Debugged) -> None:
    before = descriptors(running)
    with connect(running.console) as console:
        console.sendall(b"trap '' HUP; echo pi''d=$$\n")
        read_until(console, b"pid=")
        assert descriptors(running) == before + 2
    eventually(before, lambda: descriptors(running))
    children = Path(f"/proc/{running.pid}/task/{running.pid}/children")
    eventually([], lambda: children.read_text().split())


def test_a_host_that_does_not_read_stops_its_shell_and_nobody_else(running: Debugged) -> None:
    with connect(running.console) as console:
        console.sendall(b"yes\n")
        time.sleep(0.3)
        assert running.client.check()
        rss = Path(f"/proc/{running.pid}/statm").read_text().split()[1]
        time.sleep(0.3)
        assert Path(f"/proc/{running.pid}/statm").read_text().split()[1] == rss
        read_until(console, b"y\r\ny\r\n")
        console.sendall(b"\x03echo hal''t\n")
        read_until(console, b"halt")


def answers_at_all(path: Path) -> bool:
    with connect(path) as console:
        return console.recv(1) != b""


def test_a_ninth_console_is_refused_until_one_is_free(running: Debugged) -> None:
    with contextlib.ExitStack() as stack:
        consoles = [stack.enter_context(connect(running.console)) for _ in range(8)]
        assert not answers_at_all(running.console)
        consoles[0].close()
        eventually(True, lambda: answers_at_all(running.console))


# --- the log ---


def test_the_log_begins_with_the_first_line_whenever_the_host_comes(running: Debugged) -> None:
    with connect(running.log) as log:
        lines = lines_of(log, until="listening")
    assert "agent started" in [line["msg"] for line in lines]
    assert all(line["name"] == "osbuilder-agent" and line["version"] for line in lines)


def test_lines_go_to_the_output_as_well(sanitized_agent: Path, tmp_path: Path) -> None:
    output = tmp_path / "output.log"
    with debugged(sanitized_agent, output) as agent, connect(agent.log) as log:
        lines = lines_of(log, until="listening")
        written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written[: len(lines)] == lines


def test_there_is_one_reader_of_the_log_at_a_time_and_another_may_follow(running: Debugged) -> None:
    with connect(running.log) as first:
        lines_of(first, until="listening")
        with connect(running.log) as second:
            assert second.recv(1) == b""
    with connect(running.console) as console:  # something to log
        console.recv(1)
    with connect(running.log) as third:
        assert lines_of(third, until="a debug console was opened")


def test_without_a_reader_the_last_lines_are_kept_and_no_more(sanitized_agent: Path, tmp_path: Path) -> None:
    with debugged(sanitized_agent, tmp_path / "output.log") as agent:
        before = int(Path(f"/proc/{agent.pid}/statm").read_text().split()[1])
        for _ in range(60):
            with connect(agent.console) as console:
                console.recv(1)
        after = int(Path(f"/proc/{agent.pid}/statm").read_text().split()[1])
        with connect(agent.log) as log:
            text = b""
            log.settimeout(0.5)
            with contextlib.suppress(TimeoutError):
                while piece := log.recv(65536):
                    text += piece
    assert len(text) <= _LARGEST_LOG
    assert after - before < 1024  # pages
    assert all(json.loads(line) for line in text.splitlines())


@pytest.mark.parametrize("words", [("--log",), ("--log", "vsock:1025"), ("--debug", "unix:x")], ids=" ".join)
def test_an_option_that_is_none_is_answered_with_the_usage(sanitized_agent: Path, words: tuple[str, ...]) -> None:
    found = subprocess.run([sanitized_agent, *words], capture_output=True, text=True, timeout=_SECONDS, check=False)
    assert found.returncode == 2
    assert "--debug-console unix:PATH" in found.stderr


# --- in a guest ---


def console_says(log: Path, *words: str) -> None:
    eventually([], lambda: [word for word in words if word not in log.read_text(errors="replace")])


@pytest.mark.boot
def test_the_bare_word_gives_the_guests_console_a_shell(kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path) -> None:
    with booted(kernel, busybox_initrd, tmp_path / "guest", words=("agent.debug_console",)) as client:
        console_says(tmp_path / "guest/console.log", "a debug console was opened", "# ")
        client.destroy_sandbox()


@pytest.mark.boot
def test_ports_are_listened_on_as_the_words_say(kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path) -> None:
    words = ("agent.debug_console", "agent.debug_console_vport=1026", "agent.log_vport=1025")
    with booted(kernel, busybox_initrd, tmp_path / "guest", words=words) as client:
        console_says(tmp_path / "guest/console.log", '"what":"debug console"', '"what":"log"')
        client.destroy_sandbox()
    text = (tmp_path / "guest/console.log").read_text(errors="replace")
    assert "a debug console was opened" not in text
    assert "cannot listen" not in text


@pytest.mark.boot
def test_words_that_are_not_served_are_warned_of(kernel: Kernel, busybox_initrd: Initrd, tmp_path: Path) -> None:
    words = ("agent.server_addr=vsock://-1:2048", "agent.passfd_listener_port=0", "agent.container_pipe_size=4096")
    with booted(kernel, busybox_initrd, tmp_path / "guest", words=words) as client:
        client.destroy_sandbox()
    text = (tmp_path / "guest/console.log").read_text(errors="replace")
    warned = [name for name in ("server_addr", "passfd_listener_port", "container_pipe_size")
              if f'"word":"agent.{name}"' in text]  # fmt: skip
    assert warned == ["server_addr", "container_pipe_size"]
    assert "is not served" in text
