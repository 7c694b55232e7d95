"""References and JSON documents: parsed exactly, or refused."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from osbuild import oci
from osbuild.errors import InputError, SpecError
from osbuild.oci import Reference, parse_reference
from osbuild.sources import SOURCES

DIGEST = "sha256:" + "a" * 64
WORDS = frozenset(SOURCES) | {"docker"}


@pytest.mark.parametrize(
    ("text", "reference"),
    [
        ("docker-daemon:debian:12", Reference(transport="docker-daemon", name="debian", tag="12")),
        ("docker-daemon:debian", Reference(transport="docker-daemon", name="debian", tag="latest")),
        ("docker://debian", Reference(transport="docker", name="debian", tag="latest")),
        ("docker://[::1]:5000/a:1", Reference(transport="docker", name="[::1]:5000/a", tag="1")),
        (f"docker://h.io/a/b:1@{DIGEST}", Reference(transport="docker", name="h.io/a/b", tag="1", digest=DIGEST)),
        ("debian", Reference(transport="", name="debian", tag="latest")),
        ("docker:27-dind", Reference(transport="", name="docker", tag="27-dind")),
        ("reg.io:5000/a/b:1", Reference(transport="", name="reg.io:5000/a/b", tag="1")),
        (f"a@{DIGEST}", Reference(transport="", name="a", digest=DIGEST)),
        ("oci:dir", Reference(transport="oci", name="dir")),
        ("oci:/a/dir:tag", Reference(transport="oci", name="/a/dir", tag="tag")),
        ("oci:/a:b/dir", Reference(transport="oci", name="/a:b/dir")),
        ("docker-archive:/x y,z.tar", Reference(transport="docker-archive", name="/x y,z.tar")),
    ],
)
def test_the_words_of_skopeo_are_understood(text: str, reference: Reference) -> None:
    assert parse_reference(text, WORDS) == reference


@pytest.mark.parametrize(
    "text",
    [
        "",
        " a",
        "oci:",
        "A/B",
        "a:b:c",
        "a:-x",
        "http://a/b",
        "nope:/x",
        "/a/path",
        "./dir",
        "a\0b",
        "a@sha256:zz",
        "-",
        "docker://",
        "docker:/a",
        "docker:",
        "a:",
        "a@",
        "h.io/a:",
        "docker:///a",
        "docker://../a",
        "docker://-h.io/a",
        "docker://h.io:x/a",
        "docker://h.io/",
        "docker://u:p@h.io/a",
        "docker://h.io/a?b",
        "docker://[::1/a",
        "docker://h.io/a/../b",
    ],
)
def test_what_names_no_image_is_refused(text: str) -> None:
    with pytest.raises(SpecError):
        parse_reference(text, WORDS)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("docker-deamon:foo", "docker-daemon:foo? (an image really called that: docker://docker-deamon:foo)"),
        ("docker-deamon:debian:12", "docker-daemon:debian:12?"),
        ("docker-demon:me/foo", "docker-daemon:me/foo?"),
        ("docker_daemon:foo", "docker-daemon:foo?"),
        ("Docker-Daemon:foo", "docker-daemon:foo?"),
        ("docker-archiv:./a.tar", "docker-archive:./a.tar?"),
        ("oci-archive:a.tar", "oci:a.tar?"),
        ("OCI:layout", "oci:layout?"),
        ("dirs:root", "dir:root?"),
        ("docker:foo", "docker://foo? (an image really called that: docker://docker:foo)"),
        ("docker:debian:12", "docker://debian:12?"),
        ("docker:me/foo", "docker://me/foo?"),
        ("docker:/foo", "docker://foo?"),
        ("dokcer-daemon:a\x1bb", "docker-daemon:'a\\x1bb'?"),
    ],
)
def test_a_misspelt_source_is_no_image_name(text: str, meant: str) -> None:
    with pytest.raises(SpecError, match=r"' is no source$") as caught:
        parse_reference(text, WORDS)
    assert caught.value.hint.startswith(f"did you mean {meant}")


@pytest.mark.parametrize(
    "text",
    [
        "docker:27", "docker:27.3.1-dind", "docker:dind", "docker:cli", "docker:latest", "docker:git", "docker:rc-cli",
        "docker", "docker:5000/foo", "docker-registry:edge", "registry:stable", "dockers:1.0", "dirs:5000/a:b",
        "debian:bookworm", "redis:alpine", "me/docker-deamon:foo",
    ],
)  # fmt: skip
def test_an_image_with_a_name_of_its_own_is_no_misspelt_source(text: str) -> None:
    assert parse_reference(text, WORDS).transport == ""


def test_only_the_sources_there_are_can_be_misspelt() -> None:
    assert parse_reference("docker:foo", frozenset(("docker-daemon",))).tag == "foo"
    with pytest.raises(SpecError) as caught:
        parse_reference("docker-deamon:foo", frozenset(("docker-daemon",)))
    assert caught.value.hint == "did you mean docker-daemon:foo?"


@pytest.mark.parametrize("host", ["127.0.0.1:5059", "localhost:5000", "localhost", "quay.io", "[::1]:5000", "R.io:1"])
@pytest.mark.parametrize("end", ["", "/", f"@{DIGEST}"], ids=["", "slash", "digest"])
def test_a_registry_alone_is_no_image(host: str, end: str) -> None:
    with pytest.raises(SpecError, match="is a registry, and no image") as caught:
        parse_reference(f"docker://{host}{end}", WORDS)
    assert caught.value.hint == f"docker://{host}/NAME"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("docker-daemon:NAME:TAG", "docker-daemon:name:TAG"),
        ("127.0.0.1:5050/Team/Busybox:1.0", "127.0.0.1:5050/team/busybox:1.0"),
        (f"docker://R.io/Team/a@{DIGEST}", f"docker://R.io/team/a@{DIGEST}"),
        ("Debian", "debian"),
    ],
)
def test_a_name_in_capitals_is_shown_in_lower_case(text: str, right: str) -> None:
    with pytest.raises(SpecError, match="names are lower case") as caught:
        parse_reference(text, WORDS)
    assert caught.value.hint == right
    assert parse_reference(right, WORDS)


def test_a_wrong_tag_is_named() -> None:
    with pytest.raises(SpecError, match="'-x' is no tag"):
        parse_reference("debian:-x", WORDS)


@pytest.mark.parametrize("word", ["", "docker://", "docker-daemon:"])
@pytest.mark.parametrize("digest", ["sha256:123", "sha256:" + "A" * 64, "sha512:" + "a" * 128, "SHA256:" + "a" * 64])
def test_a_wrong_digest_in_a_name_is_the_users_mistake(word: str, digest: str) -> None:
    with pytest.raises(SpecError, match="is no digest") as caught:
        parse_reference(f"{word}debian@{digest}", WORDS)
    assert "64 hex digits" in caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "docker://joe:PASS@h.io/a", "docker://joe:PASS@127.0.0.1:5051/a:1", "joe:PASS@h.io/a", "docker://joe:PA@PASS@h.io/a",
        "docker://joe:x@sha1:PASS@h.io/a", f"docker://joe:PASS@h.io/a@{DIGEST}", "docker://joe:PASS@h.io",
        "docker:joe:PASS@h.io/a", "docker-deamon:joe:PASS@h.io/a", "https://joe:PASS@h.io/a", "docker://PASS@h.io/a",
        "docker://joe:PASS@", "docker://joe:PASS@H.io/A",
    ],
)  # fmt: skip
def test_a_password_in_a_name_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(SpecError, match="no user name and no password") as caught:
        parse_reference(text, WORDS)
    assert "PASS" not in f"{caught.value} {caught.value.hint}"
    assert "docker login" in caught.value.hint
    assert "--authfile" in caught.value.hint


def test_a_name_in_spaces_is_refused_and_not_repeated() -> None:
    with pytest.raises(SpecError, match="no space") as caught:
        parse_reference(" docker://joe:PASS@h.io/a", WORDS)
    assert "PASS" not in str(caught.value)


def test_a_password_in_a_mirrors_name_is_not_repeated() -> None:
    with pytest.raises(SpecError, match="is no mirror") as caught:
        oci.parse_mirror("https://joe:PASS@h.io")
    assert "PASS" not in str(caught.value)


def test_a_path_may_hold_an_at_sign() -> None:
    assert parse_reference("dir:/home/joe@h.io/root", WORDS).name == "/home/joe@h.io/root"
    with pytest.raises(SpecError, match="is a path"):
        parse_reference("./joe@h.io", WORDS)


def test_what_is_no_source_at_all_gets_the_list_of_them() -> None:
    with pytest.raises(SpecError, match="no source 'ftp'") as caught:
        parse_reference("ftp://h.io/a", WORDS)
    assert caught.value.hint == "one of dir: docker:// docker-archive: docker-daemon: oci:"


@pytest.mark.parametrize(
    ("name", "registry", "repository"),
    [
        ("debian", "docker.io", "library/debian"),
        ("me/debian", "docker.io", "me/debian"),
        ("docker.io/debian", "docker.io", "library/debian"),
        ("index.docker.io/me/x", "docker.io", "me/x"),
        ("registry-1.docker.io/debian", "docker.io", "library/debian"),
        ("quay.io/debian", "quay.io", "debian"),
        ("localhost/debian", "localhost", "debian"),
        ("localhost:5000/a/b", "localhost:5000", "a/b"),
        ("[::1]:5000/a/b", "[::1]:5000", "a/b"),
        ("host/a/b", "docker.io", "host/a/b"),
    ],
)
def test_a_name_without_a_registry_is_docker_hubs(name: str, registry: str, repository: str) -> None:
    assert oci.registry_of(name) == (registry, repository)


@pytest.mark.parametrize("text", ["docker://h.io/a:1", "docker-daemon:a:1", "a:1", f"docker://a@{DIGEST}", "oci:d:t"])
def test_a_reference_is_written_as_it_was_read(text: str) -> None:
    assert str(parse_reference(text, WORDS)) == text


def test_a_path_without_a_transport_gets_a_hint() -> None:
    with pytest.raises(SpecError) as caught:
        parse_reference("./dir", WORDS)
    assert caught.value.hint == "say what it is: dir:./dir, oci:./dir, docker-archive:./dir"


@pytest.mark.parametrize(
    "digest", ["sha256:" + "A" * 64, "sha256:" + "a" * 63, "sha512:" + "a" * 128, "sha256:../" + "a" * 61, None, 5,
               "sha256:" + "a" * 64 + "\n"],
)  # fmt: skip
def test_only_a_digest_that_is_one_is_believed(digest: object) -> None:
    with pytest.raises(InputError, match="not a sha256 digest"):
        oci.check_digest(digest, "here")


def manifest(**changes: Any) -> bytes:
    descriptor = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": DIGEST, "size": 1}
    config = {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": DIGEST, "size": 1}
    return json.dumps({"schemaVersion": 2, "config": config, "layers": [descriptor]} | changes).encode()


def test_a_plain_manifest_is_read() -> None:
    parsed = oci.parse_manifest(manifest(), "here")
    assert parsed.config.digest == parsed.layers[0].digest == DIGEST


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"schemaVersion": 1}, "schemaVersion"),
        ({"layers": []}, "without layers"),
        ({"layers": None}, "without layers"),
        ({"layers": [1]}, "descriptor is missing"),
        ({"manifests": []}, "both an index and a manifest"),
        ({"mediaType": "application/vnd.oci.image.index.v1+json"}, "calls itself 'application/vnd.oci.image.index"),
        ({"mediaType": ["application/vnd.oci.image.manifest.v1+json"]}, "calls itself"),
        ({"Layers": []}, "differ in capitals only"),
        ({"config": {"mediaType": "x/y", "digest": DIGEST, "Digest": DIGEST, "size": 1}}, "differ in capitals only"),
        ({"config": {"mediaType": "x/y", "digest": DIGEST, "size": 1}}, "not an image's config"),
        ({"layers": [{"mediaType": "x/y", "digest": DIGEST, "size": 1}]}, "unknown layer type"),
        ({"layers": [{"mediaType": "x/y", "digest": DIGEST, "size": -1}]}, "size"),
        ({"layers": [{"mediaType": "x/y", "digest": DIGEST, "size": True}]}, "size"),
        ({"layers": [{"digest": DIGEST, "size": 1}]}, "media type"),
    ],
)
def test_an_odd_manifest_is_refused_by_its_rule(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        oci.parse_manifest(manifest(**changes), "here")


@pytest.mark.parametrize(
    ("data", "rule"),
    [
        (b"[1]", "not a JSON object"),
        (b"{", "not JSON"),
        (b'{"a":' + b"[" * 101 + b"]" * 101 + b"}", "nested"),
        (b"\xff\xfe", "not JSON: byte 0"),
        ('{"a":"\u2200","b":'.encode("utf-16-le") + b"[\0" * 150_000, "not JSON"),
        ('{"a":1}'.encode("utf-16"), "not JSON: byte 0"),
        (b'{"a":"' + b'\\"' * 2_000_000, "not JSON: Unterminated"),
        (b'{"a":"' + b'\\"' * 2_000_000 + b"\\", "not JSON: Unterminated"),
        (b'{"a":' + b'"[' * 2_000_000, "nested"),
        (b" " * (oci.JSON_MAX + 1), "more than"),
    ],
    ids=["a list", "cut", "deep", "no text", "UTF-16, deep", "UTF-16", "quotes", "quotes, odd", "brackets", "huge"],
)
def test_json_is_bounded(data: bytes, rule: str) -> None:
    with pytest.raises(InputError, match=rule):
        oci.parse_json(data, "here")


@pytest.mark.parametrize(
    "rootfs", [None, {"type": "layers"}, {"type": "x", "diff_ids": [DIGEST]}, {"type": "layers", "diff_ids": []}]
)
def test_a_config_without_layers_is_refused(rootfs: object) -> None:
    with pytest.raises(InputError, match="layers"):
        oci.parse_config(json.dumps({"rootfs": rootfs}).encode(), "here")


@pytest.mark.parametrize("data", [b'{"a":1}', b"[1]", b'[{}],"b":[]', b"", b'["x",{}]'])
def test_a_list_of_objects_is_one_and_nothing_besides(data: bytes) -> None:
    assert oci.parse_json_objects(b'[{"a":1}, {}]', "here") == [{"a": 1}, {}]
    with pytest.raises(InputError, match="here: not"):
        oci.parse_json_objects(data, "here")


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 1}}', "'c' stands twice in an object"),
        ('{"\\u0061\\u001b": 1, "a\\u001b": 1}', r"'a\\x1b' stands twice"),
        ('{"a": NaN}', "NaN is no number"),
        ('{"a": [-Infinity]}', "-Infinity is no number"),
        ('{"a": 1e999}', "1e999 is no number"),
        ('{"a": ' + "9" * 5000 + "}", "limit"),
        ("\ufeff{}", "BOM"),
        ("{} x", "Extra data"),
    ],
)
def test_what_parsers_do_not_agree_about_is_refused(text: str, rule: str) -> None:
    with pytest.raises(InputError, match=rule) as caught:
        oci.parse_json(text.encode(), "here")
    assert str(caught.value).isprintable()


def test_a_name_twice_among_many_is_found_in_linear_time() -> None:
    names = ",".join(f'"{n}":0' for n in range(300_000))
    began = time.process_time()
    with pytest.raises(InputError, match="'299999' stands twice"):
        oci.parse_json(f'{{{names},"299999":0}}'.encode(), "here")
    assert time.process_time() - began < 20


def test_an_index_that_calls_itself_a_manifest_is_refused() -> None:
    kind = "application/vnd.oci.image.manifest.v1+json"
    with pytest.raises(InputError, match="calls itself"):
        oci.parse_index(json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": []}).encode(), "here")


def test_labels_may_differ_in_capitals_only() -> None:
    document = {"rootfs": {"type": "layers", "diff_ids": [DIGEST]}, "config": {"Labels": {"a": "1", "A": "2"}}}
    assert oci.parse_config(json.dumps(document).encode(), "here").document == document
    with pytest.raises(InputError, match="capitals"):
        oci.parse_config(json.dumps(document | {"RootFS": {}}).encode(), "here")


def test_brackets_inside_strings_are_no_depth() -> None:
    line = json.dumps({"created_by": '\\033[1;32m \\" [[[{{{ ' * 60}).encode()
    assert oci.parse_json(line, "here")["created_by"].count("[") == 240
