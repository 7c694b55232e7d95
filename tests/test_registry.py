"""`docker://` against Debian's docker-registry, filled by skopeo; and which image a reference means."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from osbuild import oci
from osbuild.blobs import BLOBS
from osbuild.cache import VERSION
from osbuild.errors import HostError, InputError, SpecError
from osbuild.sources import registry
from tests.fake_registry import INDEX, MANIFEST, NAME, Registry, always, serving, short, status, wrong_bytes
from tests.layer_tools import archive, member, write_layout
from tests.test_distribution import LAYERS, SECRET, _surroundings, expected, image, log_in, pull, server, want

__all__ = ["_surroundings", "image", "server"]  # fixtures

# perl -e 'print crypt("very-Secret-Password", q($2b$05$abcdefghijklmnopqrstuu))'
HTPASSWD = "me:$2b$05$abcdefghijklmnopqrstuun6bg0UBBlzjMm9pdEgyQxWUJFYamX9i"
CONFIG = """
version: 0.1
log: {{level: error}}
storage: {{filesystem: {{rootdirectory: {root}/data}}, delete: {{enabled: true}}}}
http: {{addr: "127.0.0.1:{port}"}}
{auth}
"""
AUTH = "auth: {{htpasswd: {{realm: here, path: {root}/htpasswd}}}}"


def start_registry(root: Path, *, login: bool) -> Iterator[str]:
    for program in ("docker-registry", "skopeo"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    auth = AUTH.format(root=root) if login else ""
    (root / "config.yml").write_text(CONFIG.format(root=root, port=port, auth=auth))
    (root / "htpasswd").write_text(HTPASSWD + "\n")
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", str(root / "config.yml")], stdout=log, stderr=log)
    try:
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, (root / "log").read_text()
            time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from start_registry(tmp_path_factory.mktemp("registry"), login=False)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from start_registry(tmp_path_factory.mktemp("locked"), login=True)


def push(source: str, address: str, *options: str) -> None:
    done = subprocess.run(
        ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", *options, source, f"docker://{address}"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("form", ["oci", "v2s2"])
def test_what_skopeo_pushed_is_what_we_pull(form: str, compress: bool, debian: str, tmp_path: Path) -> None:
    write_layout(tmp_path / "in", LAYERS, compress=compress)
    push(f"oci:{tmp_path}/in:latest", f"{debian}/a/b:{form}", "--format", form)
    assert pull(debian, tmp_path, f":{form}", "a/b").tree.digest() == expected(tmp_path / "in", tmp_path)


def test_a_digest_names_the_image_whatever_the_tag_says(debian: str, tmp_path: Path) -> None:
    manifest = write_layout(tmp_path / "in", LAYERS)
    push(f"oci:{tmp_path}/in:latest", f"{debian}/a/c:1", "--preserve-digests")
    digest = f"sha256:{hashlib.sha256(json.dumps(manifest).encode()).hexdigest()}"
    found = pull(debian, tmp_path, f":nosuch@{digest}", "a/c")
    assert found.digest == digest
    assert found.reference == f"docker://{debian}/a/c:nosuch@{digest}"


def test_of_an_index_the_image_for_the_platform_is_taken(debian: str, tmp_path: Path) -> None:
    write_layout(tmp_path / "in", LAYERS, tag="x")
    write_layout(tmp_path / "in", LAYERS[:1], tag="y", architecture="arm64")
    index = json.loads((tmp_path / "in/index.json").read_text())
    put_index(tmp_path / "in", index, "all")
    push(f"oci:{tmp_path}/in:all", f"{debian}/a/multi:1", "--all")
    arm = oci.Platform(os="linux", architecture="arm64")
    assert list(pull(debian, tmp_path, ":1", "a/multi").tree) == ["/", "/big", "/etc", "/etc/a"]
    assert list(pull(debian, tmp_path, ":1", "a/multi", platform=arm).tree) == ["/", "/etc", "/etc/a"]
    with pytest.raises(InputError, match="no image for linux/s390x") as caught:
        pull(debian, tmp_path, ":1", "a/multi", platform=oci.Platform(os="linux", architecture="s390x"))
    assert "there are: 'linux/amd64', 'linux/arm64'" in caught.value.hint


def put_index(layout: Path, index: Mapping[str, Any], tag: str) -> None:
    """An index as one image of a layout."""
    data = json.dumps(dict(index) | {"mediaType": INDEX}).encode()
    digest = hashlib.sha256(data).hexdigest()
    (layout / "blobs/sha256" / digest).write_bytes(data)
    top = {"mediaType": INDEX, "digest": f"sha256:{digest}", "size": len(data)}
    top["annotations"] = {"org.opencontainers.image.ref.name": tag}
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [top]}))


def test_a_missing_image_is_named(debian: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"the registry {debian} has no image no/such:1 .404 MANIFEST_UNKNOWN"):
        pull(debian, tmp_path, ":1", "no/such")


def test_a_registry_with_passwords_opens_for_the_right_one(locked: str, tmp_path: Path) -> None:
    write_layout(tmp_path / "in", LAYERS)
    push(f"oci:{tmp_path}/in:latest", f"{locked}/x:1", "--dest-creds", f"me:{SECRET}")
    with pytest.raises(
        HostError, match=r"wants a login for x, and no login for it is in .*/home/\.docker/config\.json"
    ):
        pull(locked, tmp_path, ":1", "x")
    log_in(tmp_path / "home", locked, password="wrong")
    with pytest.raises(HostError, match="answers 401 UNAUTHORIZED for image x:1, with a user name and password from"):
        pull(locked, tmp_path, ":1", "x")
    log_in(tmp_path / "home", locked)
    assert pull(locked, tmp_path, ":1", "x").tree.digest() == expected(tmp_path / "in", tmp_path)


# Which image


def descriptor(*platform: str) -> oci.Descriptor:
    found = oci.parse_platform("/".join(platform)) if platform else None
    return oci.Descriptor(media_type=MANIFEST, digest=f"sha256:{'0' * 64}", size=1, annotations={}, platform=found)


@pytest.mark.parametrize(
    ("there", "wanted", "taken"),
    [
        (["linux/amd64", "linux/arm64/v8"], "linux/arm64", 1),
        (["linux/arm64/v9", "linux/arm64/v8"], "linux/arm64", 1),
        (["linux/arm64", "linux/arm64/v8"], "linux/arm64", 0),
        (["linux/amd64/v3", "linux/amd64"], "linux/amd64", 1),
        (["linux/arm/v6", "linux/arm/v7"], "linux/arm", 1),
        (["linux/arm/v6", "linux/arm/v7"], "linux/arm/v6", 0),
        (["linux/arm/v5"], "linux/arm", 0),
        (["linux/amd64", "linux/amd64"], "linux/amd64", 0),
        ([""], "linux/amd64", 0),
    ],
)
def test_of_several_variants_the_ordinary_one_is_taken(there: list[str], wanted: str, taken: int) -> None:
    found = [descriptor(*text.split("/")) if text else descriptor() for text in there]
    assert oci.choose_platform(found, oci.parse_platform(wanted), "here") is found[taken]


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["linux/arm64/v9", "linux/arm64/v10"], "linux/arm64"),
        (["linux/arm64"], "linux/arm64/v9"),
        (["linux/amd64"], "linux/arm64"),
        (["", ""], "linux/arm64"),
        ([], "linux/arm64"),
    ],
)
def test_no_variant_is_guessed(there: list[str], wanted: str) -> None:
    found = [descriptor(*text.split("/")) if text else descriptor() for text in there]
    with pytest.raises(InputError, match=wanted):
        oci.choose_platform(found, oci.parse_platform(wanted), "here")


def test_an_index_may_lie_in_an_index_but_not_for_ever(server: Registry, image: Path, tmp_path: Path) -> None:
    data, kind = server.documents[f"{NAME}/manifests/latest"]
    for depth in range(1, 6):
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        server.add_manifest(digest, data, kind)
        item = {"mediaType": kind, "digest": digest, "size": len(data)}
        data, kind = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [item]}).encode(), INDEX
        server.add_manifest(f"depth-{depth}", data, kind)
    assert pull(server.address, tmp_path, ":depth-4").tree.digest() == expected(image, tmp_path)
    with pytest.raises(InputError, match="nested more than 4 deep"):
        pull(server.address, tmp_path, ":depth-5")


def changed(server: Registry, **fields: Any) -> bytes:
    document = json.loads(server.documents[f"{NAME}/manifests/latest"][0])
    return json.dumps({key: value for key, value in (document | fields).items() if value is not None}).encode()


OTHER_LAYER = {"mediaType": "application/vnd.oci.image.layer.nondistributable.v1.tar", "digest": "sha256:" + "0" * 64}
ODD: dict[str, tuple[dict[str, Any], str, str]] = {
    "schema 1": ({"schemaVersion": 1, "mediaType": None}, "application/vnd.docker.distribution.manifest.v1+prettyjws",
                 "schema 1"),
    "an artifact": ({"artifactType": "application/x-sbom",
                     "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": "sha256:" + "0" * 64,
                                "size": 2}}, MANIFEST, "an artifact of type 'application/x-sbom'"),
    "an artifact with a config of no kind": ({"artifactType": "x", "config": {"mediaType": []}}, MANIFEST,
                                             "an artifact of type 'x'"),
    "a kind that is a list": ({"mediaType": []}, MANIFEST, "is no image"),
    "a chart": ({"config": {"mediaType": "application/vnd.cncf.helm.config.v1+json", "digest": "sha256:" + "0" * 64,
                            "size": 2}}, MANIFEST, "not an image's config"),
    "not for handing on": ({"layers": [OTHER_LAYER | {"size": 1}]}, MANIFEST, "nondistributable"),
    "another thing altogether": ({"mediaType": "text/html"}, "text/html", "'text/html' is no image"),
    "a manifest called an index": ({}, INDEX, "but it is a manifest"),
    "both": ({"manifests": []}, MANIFEST, "both an index and a manifest"),
    "a lie about a size": ({"config": {"mediaType": "application/vnd.oci.image.config.v1+json", "size": 5 << 20,
                                       "digest": "sha256:" + "0" * 64}}, MANIFEST, "more than"),
    "one layer too few": ({"layers": []}, MANIFEST, "without layers"),
}  # fmt: skip


@pytest.mark.parametrize(("fields", "kind", "rule"), ODD.values(), ids=ODD)
def test_what_is_no_image_is_refused_by_name(
    fields: dict[str, Any], kind: str, rule: str, server: Registry, tmp_path: Path
) -> None:
    server.add_manifest("odd", changed(server, **fields), kind)
    with pytest.raises(InputError, match=rule):
        pull(server.address, tmp_path, ":odd")


def test_a_layer_that_is_not_its_diff_id_is_refused(tmp_path: Path) -> None:
    diff_ids = {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}
    write_layout(tmp_path / "in", [archive(member("a"))], rootfs=diff_ids)
    with serving(tmp_path / "in") as lying, pytest.raises(InputError, match="but the config says"):
        pull(lying.address, tmp_path)


@pytest.mark.parametrize("times", [1, 2])
def test_a_manifest_by_digest_must_be_that_one(times: int, server: Registry, tmp_path: Path) -> None:
    data = server.documents[f"{NAME}/manifests/latest"][0]
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    other = changed(server, other=1)
    server.faults["/manifests/"] = [lambda handler, _body, kind: handler.answer_well(other, kind)] * times
    if times == 1:
        assert pull(server.address, tmp_path, f"@{digest}").digest == digest
    else:
        with pytest.raises(InputError, match="answers with a manifest that is sha256:"):
            pull(server.address, tmp_path, f"@{digest}")


def test_the_same_layer_twice_is_fetched_once(tmp_path: Path) -> None:
    layers = [LAYERS[1], LAYERS[0], LAYERS[1]] * 3
    write_layout(tmp_path / "in", layers)
    with serving(tmp_path / "in") as running:
        assert pull(running.address, tmp_path).tree.digest() == expected(tmp_path / "in", tmp_path)
        assert len(running.paths("/blobs/")) == 3  # with the config


def test_many_layers_keep_their_order(tmp_path: Path) -> None:
    write_layout(tmp_path / "in", [archive(member("f", b"%d" % index), member(f"n{index}")) for index in range(40)])
    with serving(tmp_path / "in") as running:
        assert pull(running.address, tmp_path).tree.digest() == expected(tmp_path / "in", tmp_path)


# Without a network


def test_offline_the_cache_is_enough(server: Registry, tmp_path: Path) -> None:
    found = pull(server.address, tmp_path)
    server.asked.clear()
    assert pull(server.address, tmp_path, offline=True).tree.digest() == found.tree.digest()
    assert pull(server.address, tmp_path, f"@{found.digest}", offline=True).digest == found.digest
    assert server.asked == []


def test_offline_what_the_cache_has_not_is_one_clear_line(server: Registry, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="what this tag means is not in the cache") as caught:
        pull(server.address, tmp_path, offline=True)
    assert "--offline" in caught.value.hint
    with pytest.raises(InputError, match=r"sha256:0+ is not in the cache"):
        pull(server.address, tmp_path, f"@sha256:{'0' * 64}", offline=True)
    assert server.asked == []


@pytest.mark.parametrize("damage", [b"", b"x", b"x" * 400], ids=["empty", "short", "long"])
def test_a_damaged_manifest_in_the_cache_is_fetched_again(damage: bytes, server: Registry, tmp_path: Path) -> None:
    found = pull(server.address, tmp_path)
    path = tmp_path / "cache" / VERSION / BLOBS / found.digest.removeprefix("sha256:")
    path.write_bytes(damage)
    assert pull(server.address, tmp_path, f"@{found.digest}").tree.digest() == found.tree.digest()


# Mirrors


@pytest.fixture
def mirror(image: Path) -> Iterator[Registry]:
    with serving(image) as running:
        yield running


def test_a_mirror_is_asked_first_and_is_enough(server: Registry, mirror: Registry, tmp_path: Path) -> None:
    pull(server.address, tmp_path, mirrors={server.address: (mirror.address,)})
    assert server.asked == []
    assert mirror.asked != []


def test_a_mirror_may_have_a_prefix(server: Registry, mirror: Registry, image: Path, tmp_path: Path) -> None:
    mirror.documents.clear()
    mirror.add_layout(image, f"proxy/hub/{NAME}")
    pull(server.address, tmp_path, mirrors={server.address: (f"https://{mirror.address}/proxy/hub/",)})
    assert server.asked == []


@pytest.mark.parametrize(
    "part", ["/v2/", "/manifests/latest", "/blobs/"], ids=["dead", "lacks the tag", "lacks the blobs"]
)
@pytest.mark.parametrize("fault", [status(503), status(404), status(403), wrong_bytes, short(10)])
def test_a_mirror_that_fails_costs_nothing_but_time(
    fault: Any, part: str, server: Registry, mirror: Registry, image: Path, tmp_path: Path
) -> None:
    mirror.faults[part] = always(fault)
    found = pull(server.address, tmp_path, mirrors={server.address: ("127.0.0.1:1", mirror.address)})
    assert found.tree.digest() == expected(image, tmp_path)


def test_a_mirror_that_is_dead_is_not_asked_for_every_layer(tmp_path: Path) -> None:
    write_layout(tmp_path / "in", [archive(member(f"n{index}")) for index in range(20)])
    with serving(tmp_path / "in") as running, serving(tmp_path / "in") as dead:
        dead.faults["/blobs/"] = always(status(503))
        pull(running.address, tmp_path, mirrors={running.address: (dead.address,)})
        assert len(dead.paths("/blobs/")) < 15


def test_when_all_fail_every_reason_is_given(server: Registry, mirror: Registry, tmp_path: Path) -> None:
    mirror.faults["/manifests/"] = always(status(503))
    server.faults["/manifests/"] = always(status(404))
    with pytest.raises(InputError) as caught:
        pull(server.address, tmp_path, mirrors={server.address: (mirror.address,)})
    text = str(caught.value)
    assert text.index(f"{server.address} has no image") < text.index(f"{mirror.address} answers 503")
    assert "\n" not in text


def test_docker_hub_goes_by_all_its_names(mirror: Registry, image: Path, tmp_path: Path) -> None:
    mirror.add_layout(image, "library/debian")
    for key, name in (("docker.io", "debian"), ("index.docker.io", "docker.io/debian"),
                      ("registry-1.docker.io", "index.docker.io/library/debian")):  # fmt: skip
        reference = oci.parse_reference(f"docker://{name}", frozenset(("docker",)))
        wishes = want(tmp_path, cache=key, mirrors={key: (mirror.address,)})
        assert registry.open_image(reference, wishes).reference == f"docker://{name}:latest"


@pytest.mark.parametrize("text", ["", "a b", "file:///x", "http://a", "a/../b", "A/B"])
def test_a_mirror_that_is_none_is_refused(text: str, server: Registry, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="is no mirror"):
        pull(server.address, tmp_path, mirrors={server.address: (text,)})
