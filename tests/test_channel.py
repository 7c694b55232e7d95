"""Which way to an agent is taken, and what each needs of the host."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import sys
from pathlib import Path

import pytest

from osbuild.errors import HostError
from osbuild.runtime import channel
from osbuild.runtime.channel import Abilities, Hybrid, Serial, VhostUser, Vsock, choose, claimed, opened
from tests import fake_agent as fake
from tests.fake_agent import fake_agent

OURS, KATA = "osbuilder-agent 0.1.0", "kata-agent 3.2.0"


@pytest.mark.parametrize(
    ("wish", "agent", "vhost", "daemon", "chosen"),
    [
        ("auto", OURS, True, True, "serial"),
        ("auto", "", True, True, "serial"),
        ("auto", KATA, True, True, "vsock"),
        ("auto", KATA, False, True, "vhost-user-vsock"),
        ("serial", KATA, True, True, "serial"),
        ("vsock", OURS, True, False, "vsock"),
        ("vhost-user-vsock", OURS, True, True, "vhost-user-vsock"),
    ],
)
def test_the_way_follows_from_wish_agent_and_host(
    wish: str, agent: str, vhost: bool, daemon: bool, chosen: str
) -> None:
    assert choose(wish, agent, Abilities(vhost=vhost, daemon=daemon)) == chosen


@pytest.mark.parametrize(
    ("wish", "agent", "host", "said"),
    [
        ("auto", KATA, Abilities(vhost=False, daemon=False), "kata-agent 3.2.0 listens on vsock only"),
        ("vsock", OURS, Abilities(vhost=False, daemon=True), "/dev/vhost-vsock cannot be opened"),
        ("vhost-user-vsock", OURS, Abilities(vhost=True, daemon=False), "vhost-device-vsock is not installed"),
    ],
)
def test_what_the_host_lacks_is_named_with_a_remedy(wish: str, agent: str, host: Abilities, said: str) -> None:
    with pytest.raises(HostError, match=said) as caught:
        choose(wish, agent, host)
    assert "--transport" in caught.value.hint or "serial" in caught.value.hint


# /dev/vhost-vsock is not on every machine: a file in its place, and an ioctl that is ours.


class Kernel:
    """Takes or refuses numbers."""

    def __init__(self, *outcomes: int) -> None:
        self.outcomes = list(outcomes)
        self.asked: list[int] = []

    def ioctl(self, descriptor: int, request: int, argument: bytes) -> None:
        assert request == 0x4008AF60
        os.fstat(descriptor)
        (cid,) = struct.unpack("=Q", argument)
        self.asked.append(cid)
        outcome = self.outcomes.pop(0) if self.outcomes else 0
        if outcome:
            raise OSError(outcome, os.strerror(outcome))


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "vhost-vsock"
    path.write_bytes(b"")
    return path


def test_a_number_that_is_taken_is_not_the_end(device: Path) -> None:
    kernel = Kernel(errno.EADDRINUSE, errno.EADDRINUSE)
    numbers = iter([5, 6, 7])
    with claimed(device, pick=lambda: next(numbers), ioctl=kernel.ioctl) as vhost:
        assert vhost.cid == 7
        os.fstat(vhost.descriptor)  # open for as long as the guest may live
    assert kernel.asked == [5, 6, 7]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(vhost.descriptor)


def test_numbers_are_random_and_none_of_those_with_a_meaning(device: Path) -> None:
    kernel = Kernel()
    for _ in range(20):
        with claimed(device, ioctl=kernel.ioctl):
            pass
    assert len(set(kernel.asked)) == 20
    assert all(3 <= cid < (1 << 32) - 1 for cid in kernel.asked)


@pytest.mark.parametrize(
    ("outcomes", "said"), [([errno.EPERM], "takes no guest number"), ([errno.EADDRINUSE] * 99, "every one is taken")]
)
def test_a_host_that_gives_no_number_is_named(outcomes: list[int], said: str, device: Path) -> None:
    with pytest.raises(HostError, match=said), claimed(device, ioctl=Kernel(*outcomes).ioctl):
        pass


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="cannot be opened"), claimed(tmp_path / "none"):
        pass


# The program in the device's place


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    program = programs / channel.DAEMON
    program.write_text(f"#!{sys.executable}\nimport re, socket, sys, time\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")


_LISTEN = """
found = dict(pair.split("=") for pair in sys.argv[sys.argv.index("--vm") + 1].split(","))
assert found["guest-cid"] == "3"
kept = []
for name in ("uds-path", "socket"):
    kept.append(socket.socket(socket.AF_UNIX))
    kept[-1].bind(found[name])
    kept[-1].listen()
time.sleep(60)
"""


def test_the_program_is_there_for_the_block_and_gone_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, monkeypatch, f"print('up', flush=True){_LISTEN}")
    log = tmp_path / "log"
    with opened("vhost-user-vsock", tmp_path / "serial", tmp_path, log) as (way, device):
        assert way == Hybrid(tmp_path / "vsock.sock")
        assert way.ready
        assert device == VhostUser(socket=tmp_path / "vhost.sock")
    assert log.read_text() == "up\n"
    assert not any(channel.DAEMON in path.read_text() for path in _command_lines(tmp_path))


def _command_lines(tmp_path: Path) -> list[Path]:
    """Of processes that were started from here."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(tmp_path) in path.read_text():
                found.append(path)
        except OSError:
            continue
    return found


def test_a_program_that_ends_is_named_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, monkeypatch, "sys.exit('no vhost today')")
    log = tmp_path / "log"
    with pytest.raises(HostError, match="vhost-device-vsock gives no socket") as caught:
        open_and_close(tmp_path, log)
    assert str(log) in caught.value.hint
    assert "no vhost today" in log.read_text()


def open_and_close(tmp_path: Path, log: Path) -> None:
    with opened("vhost-user-vsock", tmp_path / "serial", tmp_path, log):
        pass


@pytest.mark.skipif(shutil.which(channel.DAEMON) is None, reason=f"{channel.DAEMON} is not on PATH")
def test_the_real_program_takes_our_words(tmp_path: Path) -> None:
    with opened("vhost-user-vsock", tmp_path / "serial", tmp_path, tmp_path / "log") as (way, device):
        assert way.ready
        assert isinstance(device, VhostUser)
        assert device.socket.is_socket()


# Speaking through each


def test_a_serial_port_is_a_unix_socket(tmp_path: Path) -> None:
    way = Serial(tmp_path / "s")
    assert not way.ready
    with fake_agent(tmp_path / "s") as agent, way.connect(10) as connection:
        assert Serial(tmp_path / "s").ready
        connection.call("grpc.Health", "Check", b"", 10)
    assert agent.greetings == []


def test_hybrid_vsock_is_greeted_for_the_agents_port(tmp_path: Path) -> None:
    with fake_agent(tmp_path / "s", fake.serve, greeting=b"OK 1073741824\n") as agent:
        with Hybrid(tmp_path / "s").connect(10) as connection:
            connection.call("grpc.Health", "Check", b"", 10)
        assert agent.greetings == [b"CONNECT 1024\n"]


def test_vsock_needs_no_file_and_serial_needs_no_help(tmp_path: Path) -> None:
    assert Vsock(3).ready
    with opened("serial", tmp_path / "s", tmp_path, tmp_path / "log") as (way, device):
        assert (way, device) == (Serial(tmp_path / "s"), None)
