"""What a program is by its own bytes: ours, Kata's by rustc and go, and what is no agent at all."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest
from typer.testing import CliRunner

import osbuild
from osbuild import agent_binary
from osbuild.agent_binary import GRPC, KATA, TTRPC, UNKNOWN, ask, identify, read_binary
from osbuild.artifacts import File
from osbuild.cli import app
from osbuild.errors import InputError
from tests.agent_tools import COMMIT, go_agent, rust_agent


def test_our_own_is_known_by_its_marker(agent: File) -> None:
    found = read_binary(agent.path)
    assert (found.name, found.version, found.protocol) == ("osbuilder-agent", osbuild.__version__, TTRPC)
    assert (found.arch, found.interpreter, found.needed, found.wants_policy) == ("x86_64", "", (), False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("-C", "opt-level=0"),
        ("-C", "target-feature=+crt-static"),
        ("-C", "target-feature=+crt-static", "-C", "relocation-model=static"),
        ("-C", "lto=fat", "-C", "strip=symbols"),
    ],
    ids=["dynamic", "without optimisation", "static pie", "static", "stripped"],
)
def test_the_version_of_a_rust_agent_is_found_though_digits_stand_in_front_of_it(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    path = rust_agent(tmp_path, *flags)
    found = read_binary(path)
    assert (found.name, found.version, found.protocol) == (KATA, "4.1.0", TTRPC)
    assert bool(found.interpreter) == ("target-feature=+crt-static" not in flags)


def test_digits_do_stand_in_front_of_it(tmp_path: Path) -> None:
    data = rust_agent(tmp_path, "-C", "opt-level=0").read_bytes()
    assert f"0.0.14.1.0-{COMMIT}".encode() in data


@pytest.mark.parametrize("version", ["2.0.0-alpha1", "3.2.0-rc0", "12.10.3"])
def test_any_version_of_kata_s_is_read_whole(version: str, tmp_path: Path) -> None:
    assert read_binary(rust_agent(tmp_path, version=version)).version == version


def test_a_version_without_a_commit_is_unknown_until_the_program_is_run(tmp_path: Path) -> None:
    path = rust_agent(tmp_path, commit="")
    found = read_binary(path)
    assert (found.name, found.version) == (KATA, UNKNOWN)
    assert any("--run" in line for line in found.evidence)
    assert ask(path, found).version == "4.1.0"


def test_a_version_that_could_begin_anywhere_is_unknown(tmp_path: Path) -> None:
    path = rust_agent(tmp_path)
    data = bytearray(path.read_bytes())
    # Whatever points to it has another length now.
    length = len(f"4.1.0-{COMMIT}")
    at = data.find(struct.pack("<Q", length))
    while at >= 0:
        data[at] = length + 1
        at = data.find(struct.pack("<Q", length))
    data[data.find(f"4.1.0-{COMMIT}".encode()) - 1] = ord("1")
    found = identify(bytes(data), "changed")
    assert found.version == UNKNOWN
    assert any("several readings" in line for line in found.evidence)


def test_an_agent_that_obeys_a_policy_is_known(tmp_path: Path) -> None:
    assert read_binary(rust_agent(tmp_path, policy=True)).wants_policy


@pytest.mark.slow
def test_an_agent_of_1_x_speaks_grpc(tmp_path: Path) -> None:
    found = read_binary(go_agent(tmp_path))
    assert (found.name, found.version, found.protocol) == (KATA, "1.13.1", GRPC)


def test_a_program_that_is_no_agent_is_unknown_in_all() -> None:
    program = shutil.which("true")
    assert program is not None
    found = read_binary(Path(program))
    assert (found.name, found.version, found.protocol) == (UNKNOWN, UNKNOWN, UNKNOWN)
    assert found.interpreter


# --- what is refused ---


def broken(good: bytes, kind: str) -> bytes:
    if kind == "aarch32":
        return good[:4] + b"\1" + good[5:18] + struct.pack("<H", 40) + good[20:]
    if kind == "riscv64":
        return good[:18] + struct.pack("<H", 243) + good[20:]
    if kind == "object":
        return good[:16] + struct.pack("<H", 1) + good[18:]
    return {"empty": b"", "text": b"kata-agent 4.1.0\n", "script": b"#!/bin/sh\n", "half": good[: len(good) // 2],
            "header": good[:40]}[kind]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("empty", "is empty"), ("text", "no ELF file"), ("script", "a script"), ("half", "cut off|behind its end"),
        ("header", "cut short"), ("aarch32", "broken|arm"), ("riscv64", "is for riscv64; guests are"),
        ("object", "an object file"),
    ],
)  # fmt: skip
def test_what_is_no_program_for_a_guest_is_refused_in_one_line(
    kind: str, complaint: str, agent: File, tmp_path: Path
) -> None:
    path = tmp_path / "agent"
    path.write_bytes(broken(agent.path.read_bytes(), kind))
    with pytest.raises(InputError, match=complaint) as caught:
        read_binary(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["absent", "directory"])
def test_what_is_no_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    with pytest.raises(InputError, match=r"not there|no regular file"):
        read_binary(tmp_path / name)


def test_every_prefix_of_an_agent_gives_an_answer_or_a_refusal(agent: File) -> None:
    data = agent.path.read_bytes()
    for size in [*range(0, 1200, 7), *range(1200, len(data), 4001)]:
        with pytest.raises(InputError):
            identify(data[:size], "prefix")


def test_any_byte_of_the_headers_may_be_wrong(agent: File) -> None:
    data = bytearray(agent.path.read_bytes())
    for at in range(4, 64 + 56 * 7):
        kept, data[at] = data[at], data[at] ^ 0xFF
        try:
            identify(bytes(data), "damaged")
        except InputError:
            pass
        finally:
            data[at] = kept


# --- when it is run ---


@pytest.mark.parametrize(
    ("body", "complaint"),
    [("exec sleep 60", "did not end"), ("echo hello", "is no NAME VERSION"), ("exit 3", "exited with 3"),
     ("while :; do echo 12345678901234567890; done", "killed|SIGXFSZ|exited")],
)  # fmt: skip
def test_a_program_that_does_not_say_its_version_is_refused(
    body: str, complaint: str, agent: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_binary, "_RUN_SECONDS", 2.0)
    path = tmp_path / "agent"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    with pytest.raises(InputError, match=complaint):
        ask(path, read_binary(agent.path))


def test_a_program_that_is_run_gets_no_environment_and_no_long_file(
    agent: File, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "open sesame")
    path = tmp_path / "agent"
    path.write_text('#!/bin/sh\n[ -z "$SECRET$HOME" ] && echo "kata-agent version 5.0.0 (limit $(ulimit -f))"\n')
    path.chmod(0o755)
    found = ask(path, read_binary(agent.path))
    assert found.version == "5.0.0"
    assert "limit 128" in found.evidence[0]  # blocks of 512 bytes


def test_nothing_is_run_unless_it_is_said(tmp_path: Path) -> None:
    path = rust_agent(tmp_path)
    result = CliRunner().invoke(app, ["agent", "version", str(path), "--json"])
    said = json.loads(result.output)
    assert (said["name"], said["version"], said["arch"], said["protocol"]) == (KATA, "4.1.0", "x86_64", TTRPC)
    assert not any("it says" in line for line in said["evidence"])
    result = CliRunner().invoke(app, ["agent", "version", str(path), "--run"])
    assert "it says 'kata-agent version 4.1.0 (api version: 0.0.1" in " ".join(result.output.split())
