"""Pulling from a registry that does wrong: what passes is borne with, what does not is named, nothing leaks."""

from __future__ import annotations

import base64
import email.utils
import hashlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osbuild import oci, transport
from osbuild.authorization import parse_challenges
from osbuild.cache import Cache
from osbuild.distribution import Repository
from osbuild.errors import HostError, InputError, OsbuilderError
from osbuild.sources import layout as oci_layout
from osbuild.sources import registry
from osbuild.sources.image import SourceImage, Want
from osbuild.spec import RegistrySpec
from osbuild.transport import Patience
from tests import fake_registry
from tests.fake_registry import (
    NAME,
    Access,
    Fault,
    Registry,
    always,
    chunked_cut,
    endless,
    hang_up,
    header,
    make_authority,
    no_length,
    no_range,
    redirect,
    serving,
    short,
    short_and_sure,
    silence,
    status,
    trickle,
    wrong_bytes,
    wrong_range,
)
from tests.layer_tools import archive, folder, member, write_layout

BIG = random.Random(5).randbytes(300_000)  # more than a socket holds at once
LAYERS = (
    archive(folder("etc"), member("etc/a", b"lower")),
    archive(member("etc/a", b"upper"), member("big", BIG)),
)
PLATFORM = oci.Platform(os="linux", architecture="amd64")
SECRET = "very-Secret-Password"
TRIES = 3
SURROUNDINGS = ("REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "XDG_RUNTIME_DIR", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")


@pytest.fixture(autouse=True)
def _surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody's credentials and proxies, and not much patience."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name in SURROUNDINGS:
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        registry, "PATIENCE", Patience(tries=TRIES, first=0.001, silence=2.0, window=0.15, speed=1024, longest=0.01)
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    write_layout(tmp_path / "layout", LAYERS)
    return tmp_path / "layout"


@pytest.fixture
def server(image: Path) -> Iterator[Registry]:
    with serving(image) as running:
        yield running


def blob_digest(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


LAST = f"blobs/{blob_digest(LAYERS[1])}"


def want(tmp_path: Path, **spec: Any) -> Want:
    cache = Cache(root=tmp_path / spec.pop("cache", "cache"))
    progress = spec.pop("progress", lambda _done, _total: None)
    platform = spec.pop("platform", PLATFORM)
    return Want(platform=platform, cache=cache, registry=RegistrySpec(**spec), progress=progress)


def pull(address: str, tmp_path: Path, tag: str = ":latest", name: str = NAME, **spec: Any) -> SourceImage:
    reference = oci.parse_reference(f"docker://{address}/{name}{tag}", frozenset(("docker",)))
    return registry.open_image(reference, want(tmp_path, **spec))


def refused(server: Registry, tmp_path: Path, **spec: Any) -> OsbuilderError:
    """The error of a pull, which is one line and keeps the secret."""
    with pytest.raises((InputError, HostError)) as caught:
        pull(server.address, tmp_path, **spec)
    text = f"{caught.value} {caught.value.hint}"
    assert "\n" not in text
    assert SECRET not in text
    assert SECRET not in repr(caught.value.args)
    return caught.value


def expected(image: Path, tmp_path: Path) -> str:
    reference = oci.Reference(transport="oci", name=str(image))
    return oci_layout.open_image(reference, want(tmp_path)).tree.digest()


def log_in(home: Path, host: str, user: str = "me", password: str = SECRET) -> None:
    directory = home / ".docker"
    directory.mkdir(parents=True, exist_ok=True)
    packed = base64.b64encode(f"{user}:{password}".encode()).decode()
    (directory / "config.json").write_text(json.dumps({"auths": {host: {"auth": packed}}}))


PASSING: dict[str, list[Fault]] = {
    "two bad answers": [status(500), status(503)],
    "a bad gateway and a slow one": [status(502), status(504)],
    "asked to wait no time": [status(429, Retry_After="0"), status(429)],
    "hangs up": [hang_up],
    "body short of its length": [short(100_000)],
    "body short, then again": [short(100_000), short(200_000)],
    "a chunk cut off": [chunked_cut(100_000)],
    "closed without a length": [no_length(100_000)],
    "nothing at all": [no_length(0)],
    "range ignored": [short(100_000), no_range],
    "another range than asked": [short(100_000), wrong_range],
    "range refused": [short(100_000), status(416)],
    "wrong bytes once": [wrong_bytes],
    "a lie about the encoding": [header("Content-Encoding", "gzip")],
    "a lie about the digest": [header("Docker-Content-Digest", "sha256:" + "0" * 64)],
    "a slow moment": [trickle],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING)
def test_what_passes_is_borne_with(faults: list[Fault], server: Registry, image: Path, tmp_path: Path) -> None:
    server.faults[LAST] = list(faults)
    found = pull(server.address, tmp_path)
    assert found.tree.digest() == expected(image, tmp_path)
    assert server.faults[LAST] == []  # they did happen


@pytest.mark.parametrize("part", ["/v2/", "/manifests/", "/blobs/"])
def test_every_request_is_tried_again(part: str, server: Registry, image: Path, tmp_path: Path) -> None:
    server.faults[part] = [status(503), hang_up]
    assert pull(server.address, tmp_path).tree.digest() == expected(image, tmp_path)


LASTING: dict[str, tuple[Fault, type[OsbuilderError], str]] = {
    "always 503": (status(503), HostError, r"answers 503 \(3 tries in 0\.[0-9] s\)"),
    "always hangs up": (hang_up, HostError, "cut|reset"),
    "always wrong bytes": (wrong_bytes, InputError, "another digest"),
    "never ends": (endless, InputError, "more came"),
    "always a byte at a time": (trickle, HostError, "less than 1024 bytes a second"),
    "always cut at once": (short(0), HostError, "cut"),
    "always the same piece, and sure of it": (no_length(0), HostError, "ends after 0 of"),
    "shorter than its descriptor": (short_and_sure(0), InputError, "ends after 0 of"),
    "forbidden": (status(403), HostError, "answers 403"),
    "gone": (status(404), InputError, "has no blob sha256"),
    "a teapot": (status(418), InputError, "answers 418"),
    "redirected in a circle": (redirect("/v2/" + NAME + "/" + LAST), InputError, "more than 5 times"),
    "redirected to a file": (redirect("file:///etc/passwd"), InputError, "not http"),
    "redirected to the cloud's secrets": (redirect("http://169.254.169.254/latest"), InputError, "plain HTTP"),
    "redirected there over https": (redirect("https://0xA9FEA9FE/latest"), InputError, "no business"),
    "redirected to half an address": (redirect("//["), InputError, "where .* redirects to is no address"),
    "redirected with a password": (redirect("https://user:very@example.org/"), InputError, "not http"),
    "redirected to a terminal's reset": (redirect("http://evil\x1bc.example/x"), InputError, r"'evil\\x1bc\.example'"),
    "redirected to a C1 code": (redirect("https://evil\x9b2J.example/x"), InputError, r"'evil\\x9b2J\.example'"),
    "asked to wait an hour": (status(429, Retry_After="3600"), HostError, "asks to wait 3600 s"),
}


@pytest.mark.parametrize(("fault", "kind", "reason"), LASTING.values(), ids=LASTING)
def test_what_does_not_pass_is_named(
    fault: Fault, kind: type[OsbuilderError], reason: str, server: Registry, image: Path, tmp_path: Path
) -> None:
    server.faults[LAST] = always(fault)
    error = refused(server, tmp_path)
    assert type(error) is kind
    assert re.search(reason, str(error)), str(error)
    server.faults.clear()
    assert pull(server.address, tmp_path).tree.digest() == expected(image, tmp_path)  # nothing bad was kept


@pytest.mark.parametrize("code", [401, 403, 404])
def test_an_answer_that_will_not_change_is_asked_for_once(code: int, server: Registry, tmp_path: Path) -> None:
    server.faults["/manifests/"] = always(status(code))
    refused(server, tmp_path)
    assert len(server.paths("/manifests/")) == 1


def test_a_missing_tag_is_named_with_its_registry(server: Registry, tmp_path: Path) -> None:
    error = refused(server, tmp_path, tag=":nosuch")
    assert isinstance(error, InputError)
    assert f"the registry {server.address} has no image {NAME}:nosuch (404 MANIFEST_UNKNOWN)" in str(error)
    assert "check the name and the tag" in error.hint
    assert "docker login" in error.hint
    assert "latest" not in error.hint


def test_a_missing_tag_that_nobody_gave_is_explained(server: Registry, tmp_path: Path) -> None:
    server.faults["/manifests/"] = [status(404)]
    assert "without a tag, latest is asked for" in refused(server, tmp_path, tag="").hint


@pytest.mark.parametrize("kind", ["seconds", "date"])
def test_retry_after_is_waited_for(
    kind: str, server: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(transport.Web, "pause", lambda _self, seconds: waited.append(seconds))
    text = "7" if kind == "seconds" else email.utils.formatdate(time.time() + 8, usegmt=True)
    server.faults["/manifests/"] = [status(429, Retry_After=text)]
    pull(server.address, tmp_path)
    assert len(waited) == 1
    assert 6 <= waited[0] <= 8


def test_the_waits_between_tries_double_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(transport.Web, "pause", lambda _self, seconds: waited.append(seconds))
    tries = transport.Tries(transport.Web(RegistrySpec(), Patience(tries=6, first=1, longest=5)), "here")
    for _ in range(5):
        tries.failed(transport.TransientError("x"))
    assert waited == [1, 2, 4, 5, 5]
    with pytest.raises(HostError, match=r"here: x \(6 tries in "):
        tries.failed(transport.TransientError("x"))


def test_a_silent_server_is_given_up_on_and_asked_again(
    server: Registry, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "PATIENCE", Patience(first=0.001, silence=0.5))
    server.faults[LAST] = [silence(20)]
    began = time.monotonic()
    assert pull(server.address, tmp_path).tree.digest() == expected(image, tmp_path)
    assert 0.5 <= time.monotonic() - began < 10


def test_a_cut_body_goes_on_where_it_was_cut(server: Registry, tmp_path: Path) -> None:
    server.faults[LAST] = [short(200_000)]
    pull(server.address, tmp_path)
    ranges = [asked.headers.get("Range") for asked in server.asked if LAST in asked.path]
    assert ranges == [None, "bytes=200000-"]


def test_the_next_run_goes_on_where_the_last_one_was_cut(server: Registry, image: Path, tmp_path: Path) -> None:
    server.faults[LAST] = [short(200_000), *always(status(500))]
    refused(server, tmp_path)
    server.faults.clear()
    server.asked.clear()
    assert pull(server.address, tmp_path).tree.digest() == expected(image, tmp_path)
    assert [asked.headers.get("Range") for asked in server.asked if LAST in asked.path] == ["bytes=200000-"]


def test_a_pull_has_a_deadline_whatever_the_server_does(server: Registry, tmp_path: Path) -> None:
    server.faults["/manifests/"] = [silence(20)]
    began = time.monotonic()
    error = refused(server, tmp_path, seconds=0.3)
    assert "more than 0.3 s" in str(error)
    assert time.monotonic() - began < 10


def test_a_manifest_cut_without_a_trace_is_asked_for_again(server: Registry, image: Path, tmp_path: Path) -> None:
    server.faults["/manifests/"] = [no_length(50)]
    assert pull(server.address, tmp_path).tree.digest() == expected(image, tmp_path)


def test_a_manifest_without_an_end_is_refused(server: Registry, tmp_path: Path) -> None:
    server.faults["/manifests/"] = always(endless)
    assert "more than" in str(refused(server, tmp_path))


def test_a_tag_that_moves_gives_the_image_that_was_read(server: Registry, image: Path, tmp_path: Path) -> None:
    old = server.documents[f"{NAME}/manifests/latest"][0]

    def move(handler: fake_registry.Handler, body: bytes, kind: str) -> None:
        server.add_manifest("latest", b'{"schemaVersion":2,"moved":true}')
        handler.answer_well(body, kind)

    server.faults["/blobs/"] = [move]
    found = pull(server.address, tmp_path)
    assert found.digest == blob_digest(old)
    assert found.tree.digest() == expected(image, tmp_path)


def test_what_is_cached_is_not_fetched_again(server: Registry, tmp_path: Path) -> None:
    first = pull(server.address, tmp_path)
    server.asked.clear()
    assert pull(server.address, tmp_path).tree.digest() == first.tree.digest()
    assert server.paths("/blobs/") == []
    assert len(server.paths("/manifests/")) == 1
    server.asked.clear()
    pull(server.address, tmp_path, tag=f"@{first.digest}")
    assert server.asked == []


def test_progress_ends_with_everything(server: Registry, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    total = sum(map(len, LAYERS))
    server.faults[LAST] = [short(100_000), no_range, wrong_bytes]
    pull(server.address, tmp_path, progress=lambda done, of: seen.append((done, of)))
    assert seen[-1] == (total, total)
    assert all(of == total and 0 <= done <= total for done, of in seen)
    assert len({done for done, _ in seen}) > 2


# Who may ask


def test_anybody_gets_a_token_where_anybody_may_read(server: Registry, image: Path, tmp_path: Path) -> None:
    server.access = Access()
    assert pull(server.address, tmp_path).tree.digest() == expected(image, tmp_path)
    assert server.access.issued == 1  # one for the whole run
    assert "scope=repository%3Asome%2Fimage%3Apull&" in server.paths("/token")[0] + "&"


@pytest.mark.parametrize("answer", [{}, {"expires_in": 300}, {"expires_in": -1}, {"expires_in": "soon"}])
def test_a_token_may_say_how_long_it_lives(answer: dict[str, object], server: Registry, tmp_path: Path) -> None:
    server.access = Access(answer=answer)
    pull(server.address, tmp_path)
    assert server.access.issued == 1


def test_a_token_that_ends_in_the_middle_is_renewed(server: Registry, image: Path, tmp_path: Path) -> None:
    server.access = Access(lives=2)
    assert pull(server.address, tmp_path).tree.digest() == expected(image, tmp_path)
    assert server.access.issued == 2


def test_a_token_that_is_over_is_not_shown_again(server: Registry, image: Path, tmp_path: Path) -> None:
    server.access = Access(answer={"expires_in": 0.000001})
    assert pull(server.address, tmp_path).tree.digest() == expected(image, tmp_path)
    assert server.access.issued > 1


def test_a_registry_that_never_takes_its_tokens_is_not_asked_for_ever(server: Registry, tmp_path: Path) -> None:
    server.access = Access(lives=0)
    assert "answers 401" in str(refused(server, tmp_path))
    assert server.access.issued == 1


@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
def test_a_password_opens(scheme: str, server: Registry, image: Path, tmp_path: Path) -> None:
    server.access = Access(scheme=scheme, user="me", password=SECRET)
    log_in(tmp_path / "home", server.address)
    assert pull(server.address, tmp_path).tree.digest() == expected(image, tmp_path)


def test_an_identity_token_is_exchanged(server: Registry, image: Path, tmp_path: Path) -> None:
    server.access = Access(user="nobody", identity_token=SECRET)
    config = tmp_path / "auth.json"
    config.write_text(json.dumps({"auths": {server.address: {"identitytoken": SECRET}}}))
    assert pull(server.address, tmp_path, auth_file=config).tree.digest() == expected(image, tmp_path)
    (asked,) = [asked for asked in server.asked if asked.method == "POST"]
    assert b"grant_type=refresh_token" in asked.body
    assert b"scope=repository%3Asome%2Fimage%3Apull" in asked.body


@pytest.mark.parametrize("scheme", ["Bearer", "Basic"])
@pytest.mark.parametrize("known", [True, False], ids=["a wrong password", "no password"])
def test_a_refusal_says_what_was_tried(known: bool, scheme: str, server: Registry, tmp_path: Path) -> None:
    server.access = Access(scheme=scheme, user="me", password="another")
    if known:
        log_in(tmp_path / "home", server.address)
    error = refused(server, tmp_path)
    assert isinstance(error, HostError)
    file = f"{tmp_path}/home/.docker/config.json"
    tried = f"with a user name and password from {file}" if known else f"and no login for it is in '{file}'"
    assert tried in str(error)
    assert str(error).count(server.address) == 1 + known  # once as the name of its entry
    assert f"docker login {server.address}" in error.hint


REALMS = {
    "file:///etc/passwd": "not http",
    "http://169.254.169.254/token": "plain HTTP",
    "https://169.254.169.254/token": "no business",
    "https://2852039166/token": "no business",
    "https://[fe80::1]/token": "no business",
    "https://[::ffff:169.254.169.254]/token": "no business",
    "https://0.0.0.0/token": "no business",
    "http://example.org/token": "plain HTTP",
    "gopher://127.0.0.1/": "not http",
    "https://a:b@127.0.0.1/": "not http",
    "https://[/": "no address",
    "": "not http",
}


@pytest.mark.parametrize(("realm", "reason"), REALMS.items(), ids=[*list(REALMS)[:-1], "none"])
def test_a_strange_realm_gets_no_credentials(realm: str, reason: str, server: Registry, tmp_path: Path) -> None:
    server.faults["/manifests/"] = always(status(401, WWW_Authenticate=f'Bearer realm="{realm}",service="x"'))
    log_in(tmp_path / "home", server.address)
    error = refused(server, tmp_path)
    assert isinstance(error, InputError)
    assert reason in str(error)


@pytest.mark.parametrize(
    ("home", "there", "allowed"),
    [
        ("https://reg.example", "https://127.0.0.1/t", False),
        ("https://reg.example", "https://localhost/t", False),
        ("https://reg.example", "https://[::1]/t", False),
        ("https://reg.example", "http://127.0.0.1/t", False),
        ("https://reg.example", "https://224.0.0.1/t", False),
        ("https://reg.example", "https://10.0.0.1/t", True),
        ("https://169.254.1.1", "https://169.254.1.1/t", True),
        ("https://reg.example", "http://named.example:80/t", True),
        ("http://localhost:5000", "http://127.0.0.1:5001/t", True),
    ],
)
def test_a_registry_may_not_send_us_to_our_own_machine(home: str, there: str, allowed: bool) -> None:
    web = transport.Web(RegistrySpec(insecure=frozenset(("named.example:80",))), Patience())
    call = (transport.parse_url(there, "it"), transport.parse_url(home, "home"), "the token service")
    if allowed:
        web.check_destination(*call)
    else:
        with pytest.raises(InputError, match="no business of its own"):
            web.check_destination(*call)


def test_a_token_that_no_header_can_carry_is_refused(server: Registry, tmp_path: Path) -> None:
    server.access = Access(answer={"token": "a\r\nX-Evil: 1"})
    assert "without a token" in str(refused(server, tmp_path))


def test_what_a_registry_says_in_its_own_words_is_not_repeated(server: Registry, tmp_path: Path) -> None:
    def echo(handler: fake_registry.Handler, body: bytes, kind: str) -> None:
        errors = [{"code": "DENIED", "message": SECRET}, {"code": SECRET}]
        handler.answer(403, body=json.dumps({"errors": errors}).encode())

    server.faults["/manifests/"] = always(echo)
    assert "403 DENIED" in str(refused(server, tmp_path))


def test_a_redirect_to_another_host_takes_no_password_along(image: Path, server: Registry, tmp_path: Path) -> None:
    server.access = Access(scheme="Basic", user="me", password=SECRET)
    log_in(tmp_path / "home", server.address)
    with serving(image) as other:
        server.faults[LAST] = [redirect(f"{other.url}/v2/{NAME}/{LAST}?signature=1")]
        assert pull(server.address, tmp_path).tree.digest() == expected(image, tmp_path)
        assert len(other.asked) == 1
        assert "Authorization" not in other.asked[0].headers
    assert "Authorization" in [asked for asked in server.asked if LAST in asked.path][-1].headers


def test_another_host_that_wants_a_password_gets_none(image: Path, server: Registry, tmp_path: Path) -> None:
    server.access = Access(scheme="Basic", user="me", password=SECRET)
    log_in(tmp_path / "home", server.address)
    with serving(image) as other:
        other.access = Access(scheme="Basic", user="me", password=SECRET)
        server.faults[LAST] = [redirect(f"{other.url}/v2/{NAME}/{LAST}?signature=1")]
        error = refused(server, tmp_path)
        assert f"{other.address}, where {server.address} keeps" in str(error)
        assert "signature" not in str(error)
        assert all("Authorization" not in asked.headers for asked in other.asked)


@pytest.mark.parametrize(
    ("lines", "schemes"),
    [
        (['Bearer realm="https://a/t",service="s",scope="a:b:pull,push"'], ["bearer"]),
        (['Basic realm="x", Bearer realm="y"'], ["basic", "bearer"]),
        (["Basic"], ["basic"]),
        (["Negotiate", 'basic realm="a, b=c"'], ["basic"]),
        ([], []),
        (["," * 100_000, "a" * 100_000, '"' * 100_000], []),
    ],
)
def test_challenges_are_read_as_they_are_written(lines: list[str], schemes: list[str]) -> None:
    found = parse_challenges(lines)
    assert [challenge.scheme for challenge in found] == schemes


def test_commas_inside_quotes_separate_nothing() -> None:
    (found,) = parse_challenges(['Bearer realm="https://a/t?x=1,2",scope="r:n:pull,push" , service=plain'])
    assert found.parameters == {"realm": "https://a/t?x=1,2", "scope": "r:n:pull,push", "service": "plain"}


# https


@pytest.fixture(scope="session")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    return make_authority(tmp_path_factory.mktemp("authority"))


@pytest.mark.parametrize("how", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "certs.d"])
def test_a_certificate_is_trusted_when_its_authority_is(
    how: str, authority: tuple[Path, Any], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate, context = authority
    with serving(image, context) as server:
        if how == "certs.d":
            monkeypatch.setattr(transport, "DOCKER_CERTIFICATES", tmp_path)
            (tmp_path / server.address).mkdir()
            (tmp_path / server.address / "ca.crt").write_bytes(certificate.read_bytes())
        else:
            monkeypatch.setenv(how, str(certificate))
        assert pull(server.address, tmp_path).tree.digest() == expected(image, tmp_path)


def test_a_certificate_that_nobody_vouches_for_is_refused(
    authority: tuple[Path, Any], image: Path, tmp_path: Path
) -> None:
    with serving(image, authority[1]) as server:
        error = refused(server, tmp_path)
        assert isinstance(error, HostError)
        assert "certificate is not trusted" in str(error)
        assert "SSL_CERT_FILE" in error.hint
        assert server.asked == []


def test_https_is_never_left_for_http(
    authority: tuple[Path, Any], image: Path, server: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(authority[0]))
    with serving(image, authority[1]) as secure:
        secure.faults[LAST] = always(redirect(f"{server.url}/v2/{NAME}/{LAST}"))
        assert "from https to plain HTTP" in str(refused(secure, tmp_path))
        assert server.asked == []


@pytest.mark.parametrize(
    ("host", "plain"),
    [
        ("localhost:5000", True), ("127.0.0.1", True), ("127.9.9.9:1", True), ("[::1]:5000", True),
        ("Reg.test:5000", True), ("reg.test", False), ("example.org", False), ("10.0.0.1", False),
        ("localhost.example.org", False), ("127.0.0.1.example.org", False),
    ],
)  # fmt: skip
def test_only_this_machine_and_what_the_user_names_may_be_plain(host: str, plain: bool) -> None:
    web = transport.Web(RegistrySpec(insecure=frozenset(("reg.test:5000",))), Patience())
    assert web.may_be_plain(host) is plain


@pytest.mark.parametrize("insecure", [True, False])
def test_a_registry_by_name_is_plain_only_when_the_user_says_so(
    insecure: bool, server: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = f"registry.test:{server.server_port}"
    real = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo",
        lambda name, *rest, **named: real("127.0.0.1" if name == "registry.test" else name, *rest, **named),
    )  # fmt: skip
    if insecure:
        assert pull(host, tmp_path, insecure=frozenset((host,))).config.platform == PLATFORM
    else:
        with pytest.raises(HostError, match="TLS"):
            pull(host, tmp_path)
        assert server.paths("manifests") == []


def test_a_proxy_is_used_where_no_proxy_does_not_say_otherwise(
    server: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:{SECRET}@{server.address}")
    monkeypatch.setenv("https_proxy", f"http://me:{SECRET}@{server.address}")
    server.faults["http://registry.test"] = always(status(404))
    spec: dict[str, Any] = {"insecure": frozenset(("registry.test",))}
    with pytest.raises(InputError, match="has no image") as caught:
        pull("registry.test", tmp_path, **spec)
    assert SECRET not in str(caught.value)
    expected_header = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
    proxied = [asked for asked in server.asked if asked.path.startswith("http://registry.test/v2/some")]
    assert [asked.headers["proxy-authorization"] for asked in proxied] == [expected_header]
    monkeypatch.setenv("no_proxy", "registry.test")
    server.asked.clear()
    with pytest.raises(HostError, match="name is not known"):
        pull("registry.test", tmp_path, **spec)
    assert server.asked == []


def test_nobody_listening_is_the_hosts_lack(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(HostError, match=rf"^{address} refuses connections \(2 tries in 0\.[0-9] s\)$") as caught:
            pull(address, tmp_path)
    for word in ("is it running?", "--mirror", "--offline", "docker-archive:"):
        assert word in caught.value.hint


def test_an_unknown_name_is_looked_up_twice(tmp_path: Path) -> None:
    with pytest.raises(HostError, match=r"registry.invalid: its name is not known \(2 tries in") as caught:
        pull("registry.invalid", tmp_path)
    assert "--mirror" in caught.value.hint


def test_a_name_that_cannot_be_looked_up_just_now_is_tried_as_often_as_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def busy(*_rest: object, **_named: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", busy)
    with pytest.raises(HostError, match=rf"\({TRIES} tries"):
        pull("registry.test", tmp_path)


def test_a_registry_that_has_answered_may_be_away_for_longer(
    server: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    web = transport.Web(RegistrySpec(), registry.PATIENCE)
    found = Repository(web, server.address, NAME, RegistrySpec())
    found.manifest("latest")
    web.close()
    server.socket.close()
    server.socket = socket.socket()  # which nobody listens at, and which the fixture may close
    with pytest.raises(HostError, match=rf"refuses connections \({TRIES} tries"):
        found.manifest("latest")


def test_a_failure_of_another_kind_before_gives_it_all_its_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport.Web, "pause", lambda _self, _seconds: None)
    tries = transport.Tries(transport.Web(RegistrySpec(), Patience(tries=4)), "here")
    tries.failed(transport.TransientError("x"))
    for _ in range(2):
        tries.failed(transport.TransientError("x", unmet=True))
    with pytest.raises(HostError, match=r"\(4 tries"):
        tries.failed(transport.TransientError("x", unmet=True))


INTERRUPTED = """
import signal, sys
from pathlib import Path
from osbuild import oci
from osbuild.cache import Cache
from osbuild.errors import Interrupted
from osbuild.sources import registry
from osbuild.sources.image import Want
def interrupt(number, frame):
    raise Interrupted(number)
signal.signal(signal.SIGINT, interrupt)
reference = oci.parse_reference(sys.argv[1], frozenset(("docker",)))
try:
    want = Want(platform=oci.parse_platform("linux/amd64"), cache=Cache(root=Path(sys.argv[2])))
    registry.open_image(reference, want)
except Interrupted as interruption:
    sys.exit(interruption.code)
"""


@pytest.mark.parametrize("part", ["/v2/", "/manifests/", "/blobs/"])
def test_an_interruption_ends_a_pull_at_once(part: str, server: Registry, tmp_path: Path) -> None:
    server.faults[part] = always(silence(20))
    argv = [sys.executable, "-c", INTERRUPTED, f"docker://{server.address}/{NAME}", str(tmp_path / "cache")]
    with subprocess.Popen(argv) as process:
        while not server.paths(part):
            time.sleep(0.01)
            assert process.poll() is None
        time.sleep(0.2)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    assert time.monotonic() - began < 2
