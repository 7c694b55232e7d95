"""The probe's network verbs as an ordinary program of this machine."""

from __future__ import annotations

import ipaddress
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from osbuild.arch import host_arch
from osbuild.cache import default_cache
from osbuild.errors import HostError
from osbuild.findings import Wrong
from osbuild.network import probe
from osbuild.network.namespace import CAP_NET_ADMIN, CAP_NET_RAW, CAP_SYS_ADMIN, Namespace, missing_capabilities
from osbuild.probe import build_probe


@pytest.fixture(scope="module")
def program() -> Path:
    try:
        return build_probe(host_arch(), default_cache())
    except HostError as problem:
        pytest.skip(f"{problem}: {problem.hint}")


class Asked:
    """The program, with its questions and answers."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def __call__(self, *words: str) -> str:
        """Whether it is good, and what it says."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(b"".join(word.encode() + b"\0" for word in words) + b"\0")
        stdin.flush()
        return self._answer(stdout)

    def _answer(self, stdout: IO[bytes]) -> str:
        head = stdout.readline()
        return head[:1].decode() + stdout.read(int(head[1:])).decode().strip()


def start(program: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)


@pytest.fixture
def ask(program: Path) -> Iterator[Asked]:
    with start(program) as process:
        yield Asked(process)
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_it_is_answered_by_who_answers_pings(ask: Asked, address: str) -> None:
    if missing_capabilities(CAP_NET_RAW):
        pytest.skip("echo requests need CAP_NET_RAW")
    for size in ("0", "1", "1001"):
        assert ask("ping", address, "2", size) == "+answered 2"


def test_nobody_answers_where_nobody_is(program: Path) -> None:
    if missing := missing_capabilities(CAP_NET_RAW, CAP_SYS_ADMIN, CAP_NET_ADMIN):
        pytest.skip(f"a network of its own needs {' and '.join(missing)}")
    space = Namespace()
    try:
        with space.do(start, program) as process:
            said = Asked(process)("ping", "192.0.2.1", "1", "10")
            process.kill()
    finally:
        space.close()
    assert said in ("-ping: Network unreachable", "-ping: Network is unreachable")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_what_it_sends_comes_back_whole(ask: Asked, address: str) -> None:
    with probe.echoing(probe.Loopback()) as port:
        assert ask("talk", address, str(port), "300001") == "+bytes 300001"


@pytest.mark.parametrize(("at", "said"), [(500, "-talk: Bad message"), (None, "+bytes 1000")], ids=["changed", "whole"])
def test_bytes_that_come_back_changed_are_noticed(ask: Asked, at: int | None, said: str) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                data = bytearray(connection.recv(1000))
                if at is not None:
                    data[at] ^= 1
                connection.sendall(data)

        thread = threading.Thread(target=answer)
        thread.start()
        assert ask("talk", "127.0.0.1", str(listener.getsockname()[1]), "1000") == said
        thread.join()


def test_a_port_where_nobody_listens_is_told(ask: Asked) -> None:
    assert ask("talk", "127.0.0.1", "1", "10") == "-connect: Connection refused"


def test_it_gives_back_what_it_is_sent_and_answers_beside_that(ask: Asked) -> None:
    said = ask("serve", "0")
    port = int(said.removeprefix("+port "))
    for address in ("127.0.0.1", "::1"):
        with probe.connect(probe.Loopback(), ipaddress.ip_address(address), port) as connection:
            assert ask("host").startswith(f"+affinity {len(os.sched_getaffinity(0))}")
            probe.talk(connection, 200_000)


def test_who_serves_ends_with_the_program(program: Path) -> None:
    with start(program) as process:
        port = int(Asked(process)("serve", "0").removeprefix("+port "))
        process.kill()
        process.wait()
    for _ in range(100):
        try:
            probe.connect(probe.Loopback(), ipaddress.ip_address("127.0.0.1"), port).close()
        except Wrong:
            return
        threading.Event().wait(0.05)
    pytest.fail("somebody still listens")


@pytest.mark.parametrize("words", [("ping",), ("talk", "::1"), ("serve",)])
def test_a_question_without_its_words_is_refused(ask: Asked, words: tuple[str, ...]) -> None:
    assert ask(*words) == f"-{words[0]}: Invalid argument"


@pytest.mark.parametrize("words", [("ping", "localhost", "1", "1"), ("talk", "host", "7", "1")])
def test_a_name_is_no_address(ask: Asked, words: tuple[str, ...]) -> None:
    assert ask(*words) == f"-{words[1]}: Invalid argument"


@pytest.mark.parametrize("said", [b"", b"said"], ids=["ECONNRESET", "EPIPE"])
def test_an_echo_survives_who_hangs_up_without_reading(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            theirs.sendall(said)
            ours.sendall(b"nobody reads this")
        probe.give_back(ours, threading.Event())
