"""Credentials: found where Docker, podman and skopeo keep them, and shown to nobody."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from osbuild.credentials import Credentials, find_credentials, places
from osbuild.errors import HostError
from tests.fake_registry import Access, running
from tests.test_distribution import SURROUNDINGS

SECRET = "very-Secret:Password"  # a colon in it, as some have


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in SURROUNDINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".docker").mkdir()
    return tmp_path


def packed(user: str = "me", password: str = SECRET) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(path: Path, **document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def helper(home: Path, monkeypatch: pytest.MonkeyPatch, script: str, name: str = "stub") -> None:
    path = home / "bin" / f"docker-credential-{name}"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent), prepend=":")


def user_of(found: Credentials | None) -> str:
    return found.user if found is not None else "nobody"


@pytest.mark.parametrize(
    ("key", "host", "known"),
    [
        ("reg.io", "reg.io", True),
        ("reg.io:5000", "reg.io:5000", True),
        ("https://reg.io", "reg.io", True),
        ("https://reg.io/v1/", "reg.io", True),
        ("http://reg.io/anything", "reg.io", True),
        ("reg.io/v2/", "reg.io", True),
        ("reg.io/", "reg.io", True),
        ("reg.io/a", "reg.io", True),
        ("reg.io/a/b", "reg.io", True),
        ("https://index.docker.io/v1/", "docker.io", True),
        ("index.docker.io", "docker.io", True),
        ("docker.io", "docker.io", True),
        ("reg.io", "reg.io:5000", False),
        ("reg.io:5000", "reg.io", False),
        ("reg.io/other", "reg.io", False),
        ("reg.io/a/b/c", "reg.io", False),
        ("evil.reg.io", "reg.io", False),
        ("reg.io.evil", "reg.io", False),
        ("https://index.docker.io/v1/", "reg.io", False),
    ],
)
def test_an_entry_is_for_the_registry_that_it_names(home: Path, key: str, host: str, known: bool) -> None:
    write(home / ".docker/config.json", auths={key: packed()})
    found = find_credentials(host, "a/b")
    assert (found is not None and found.password == SECRET) is known


def test_the_longest_name_counts(home: Path) -> None:
    auths = {"r.io": packed("host"), "r.io/a/b": packed("exact"), "r.io/a": packed("part")}
    write(home / ".docker/config.json", auths=auths)
    assert [user_of(find_credentials("r.io", name)) for name in ("a/b", "a/c", "x")] == ["exact", "part", "host"]


@pytest.mark.parametrize(
    ("entry", "user", "token"),
    [
        ({"username": "me", "password": SECRET}, "me", ""),
        (packed() | {"identitytoken": "t"}, "me", "t"),
        ({"identitytoken": "t"}, "", "t"),
        (packed(), "me", ""),
    ],
)
def test_an_entry_may_be_of_three_kinds(home: Path, entry: dict[str, str], user: str, token: str) -> None:
    write(home / ".docker/config.json", auths={"r.io": entry})
    found = find_credentials("r.io", "a")
    assert found is not None
    assert (found.user, found.identity_token) == (user, token)
    assert token or found.basic() == f"Basic {packed()['auth']}"


@pytest.mark.parametrize("entry", [{}, {"auth": ""}, {"username": "me"}, None, 5, {"email": "a@b"}])
def test_an_entry_that_says_nothing_is_none(home: Path, entry: object) -> None:
    write(home / ".docker/config.json", auths={"r.io": entry})
    assert find_credentials("r.io", "a") is None


@pytest.mark.parametrize("document", [{}, {"auths": []}, {"auths": None}, {"credHelpers": 1, "credsStore": 3}])
def test_a_file_without_credentials_has_none(home: Path, document: dict[str, object]) -> None:
    write(home / ".docker/config.json", **document)
    assert find_credentials("r.io", "a") is None


def test_files_have_an_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_credentials("r.io", "a") is None
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    write(home / "run/containers/auth.json", auths={"r.io": packed("podman")})
    assert user_of(find_credentials("r.io", "a")) == "podman"
    write(home / ".docker/config.json", auths={"r.io": packed("docker")})
    assert user_of(find_credentials("r.io", "a")) == "docker"
    assert user_of(find_credentials("other.io", "a")) == "nobody"
    monkeypatch.setenv("DOCKER_CONFIG", str(home / "elsewhere"))
    write(home / "elsewhere/config.json", auths={"r.io": packed("elsewhere")})
    assert user_of(find_credentials("r.io", "a")) == "elsewhere"
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(write(home / "named.json", auths={"r.io": packed("named")})))
    assert user_of(find_credentials("r.io", "a")) == "named"
    spec = write(home / "spec.json", auths={"r.io": packed("spec")})
    assert user_of(find_credentials("r.io", "a", spec)) == "spec"


def test_without_a_home_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    assert find_credentials("r.io", "a") is None


def test_a_file_that_was_asked_for_must_be_there(home: Path) -> None:
    with pytest.raises(HostError, match="no file") as caught:
        find_credentials("r.io", "a", home / "nosuch.json")
    assert "docker login" in caught.value.hint


def test_the_places_are_those_that_are_read_in_their_order(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(home / "run"))
    found = list(places())
    assert found == [home / ".docker/config.json", home / "run/containers/auth.json"]
    for number, path in reversed(list(enumerate(found))):
        write(path, auths={"r.io": packed(str(number))})
        assert user_of(find_credentials("r.io", "a")) == str(number)
    assert list(places(home / "mine.json")) == [home / "mine.json"]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        f'{{"{SECRET}',
        '{"auths": {"r.io": {"auth": "***"}}}',
        '{"auths": {"r.io": {"auth": "//8="}}}',
        "\xff",
    ],
)
def test_a_file_that_cannot_be_read_is_named_without_what_is_in_it(home: Path, text: str) -> None:
    path = home / ".docker/config.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(HostError, match=r"config\.json") as caught:
        find_credentials("r.io", "a")
    assert SECRET not in str(caught.value)


def test_a_directory_is_no_file(home: Path) -> None:
    (home / ".docker/config.json").mkdir()
    with pytest.raises(HostError, match="Is a directory"):
        find_credentials("r.io", "a")


def test_no_secret_is_shown_by_repr(home: Path) -> None:
    write(home / ".docker/config.json", auths={"r.io": packed() | {"identitytoken": SECRET}})
    assert SECRET not in repr(find_credentials("r.io", "a"))


# Helpers

ANSWER = f"""printf '{{"ServerURL":"x","Username":"%s","Secret":"{SECRET}"}}' "$(cat)" """


@pytest.mark.parametrize("document", [{"credHelpers": {"r.io": "stub"}}, {"credsStore": "stub"}])
def test_a_helper_is_asked_for_the_registry(
    document: dict[str, object], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(home, monkeypatch, ANSWER)
    write(home / ".docker/config.json", auths={"r.io": {}}, **document)
    found = find_credentials("r.io", "a")
    assert found is not None
    assert (found.user, found.password, found.source) == ("r.io", SECRET, "docker-credential-stub")


def test_a_helper_knows_docker_hub_by_dockers_own_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(home, monkeypatch, ANSWER)
    write(home / ".docker/config.json", credHelpers={"https://index.docker.io/v1/": "stub"})
    assert user_of(find_credentials("docker.io", "a")) == "https://index.docker.io/v1/"
    assert find_credentials("r.io", "a") is None


def test_a_registrys_own_helper_goes_before_the_store(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(home, monkeypatch, ANSWER)
    write(home / ".docker/config.json", credHelpers={"r.io": "stub"}, credsStore="nosuch")
    assert user_of(find_credentials("r.io", "a")) == "r.io"


def test_a_helper_may_give_an_identity_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(home, monkeypatch, """cat >/dev/null; echo '{"Username":"<token>","Secret":"t"}'""")
    write(home / ".docker/config.json", credsStore="stub")
    assert find_credentials("r.io", "a") == Credentials(source="docker-credential-stub", identity_token="t")


def test_a_helper_gets_the_users_variables(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "mine")
    helper(home, monkeypatch, """echo '{"Username":"'$AWS_PROFILE'","Secret":"t"}'""")
    write(home / ".docker/config.json", credsStore="stub")
    assert user_of(find_credentials("r.io", "a")) == "mine"


def test_a_helper_that_knows_nothing_is_no_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helper(home, monkeypatch, "echo credentials not found in native keychain; exit 1")
    write(home / ".docker/config.json", credsStore="stub")
    assert find_credentials("r.io", "a") is None
    write(home / ".docker/config.json", credsStore="stub", auths={"r.io": packed()})
    assert user_of(find_credentials("r.io", "a")) == "me"


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (f"echo {SECRET}; echo {SECRET} >&2; exit 3", "docker-credential-stub exited with 3"),
        (f"echo {SECRET}", "does not answer in JSON"),
        (f"""echo '{{"Password":"{SECRET}"}}'""", "without a user name and a secret"),
        ("""echo '{"Username":"me","Secret":""}'""", "without a user name and a secret"),
        ("kill -SEGV $$", "SIGSEGV"),
        ("head -c 5000000 /dev/zero", "does not answer in JSON"),
    ],
)
def test_a_helper_that_fails_is_named_and_not_quoted(
    script: str, reason: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper(home, monkeypatch, script)
    write(home / ".docker/config.json", credsStore="stub")
    with pytest.raises(HostError, match=reason) as caught:
        find_credentials("r.io", "a")
    assert SECRET not in f"{caught.value} {caught.value.hint}"
    assert "\n" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    ("name", "reason"), [("nosuch", "docker-credential-nosuch is not installed"), ("x/../../sh", "cannot be the name")]
)
def test_a_helper_that_is_missing_or_no_name_is_refused(name: str, reason: str, home: Path) -> None:
    write(home / ".docker/config.json", credsStore=name)
    with pytest.raises(HostError, match=reason):
        find_credentials("r.io", "a")


@pytest.mark.parametrize("script", ["exit 3", "echo no JSON", "echo {}", ""])
@pytest.mark.parametrize("key", ["credHelpers", "credsStore"])
def test_the_file_that_asks_for_a_helper_is_named(
    key: str, script: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if script:
        helper(home, monkeypatch, script)
    path = write(home / ".docker/config.json", **{key: "stub" if key == "credsStore" else {"r.io": "stub"}})
    with pytest.raises(HostError, match=f"; '{path}' asks for it as {key}$") as caught:
        find_credentials("r.io", "a")
    if not script:
        assert caught.value.hint == "install it, or take it out of that file"


def test_what_skopeo_login_writes_is_read(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("skopeo") is None:
        pytest.skip("skopeo is not installed")
    with running() as server:
        server.access = Access(scheme="Basic", user="me", password=SECRET)
        server.documents[""] = (b"{}", "application/json")
        subprocess.run(
            ["skopeo", "login", "--tls-verify=false", "--authfile", str(home / "a.json"), "-u", "me",
             "--password-stdin", server.address],
            input=SECRET.encode(), check=True, capture_output=True,
        )  # fmt: skip
        found = find_credentials(server.address, "a", home / "a.json")
    assert found is not None
    assert (found.user, found.password) == ("me", SECRET)
