"""Publishing to a registry that does wrong, and pulling what is not one build: robustness, rows 14 to 22."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from osbuild import oci, transport, uploads
from osbuild import publish as publishing
from osbuild import pull as pulling
from osbuild.errors import HostError, InputError, SpecError
from osbuild.transport import Patience
from tests.fake_registry import Access, Fault, Handler, always, answering, hang_up, redirect, short, status, wrong_bytes
from tests.published import Uploading, UploadRegistry, check_same, get, make, put
from tests.test_distribution import SECRET, log_in
from tests.test_distribution import _surroundings as _surroundings  # a fixture
from tests.test_registry import start_registry

PATIENCE = Patience(tries=3, first=0.001, silence=2.0, window=0.15, speed=1024, longest=0.01)
HOME = "guests/debian"


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(publishing, "PATIENCE", PATIENCE)
    monkeypatch.setattr(pulling, "PATIENCE", PATIENCE)
    monkeypatch.setattr(uploads, "PIECE", 100_000)


@pytest.fixture
def server() -> Iterator[UploadRegistry]:
    with answering(UploadRegistry()) as running:
        yield running


@pytest.fixture
def build(tmp_path: Path) -> Path:
    return make(tmp_path / "a", data=1, kernel=350_000)


def test_a_build_goes_to_a_tag_that_somebody_named_and_nobody_is_asked_before(
    server: UploadRegistry, build: Path
) -> None:
    with pytest.raises(SpecError, match="names no tag") as caught:
        put(server.address, build, name=HOME)
    assert caught.value.code == 2
    assert "REGISTRY/REPO:TAG" in caught.value.hint
    assert server.asked == []


def test_who_publishes_is_told_of_no_other_kind_of_image(build: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and never listens
        with pytest.raises(HostError, match="refuses connections") as caught:
            put(f"127.0.0.1:{taken.getsockname()[1]}", build)
    assert caught.value.hint == "is it running?"


def lost(handler: Handler, _body: bytes, _kind: str) -> None:
    """What was asked for is done, and the answer gets lost."""
    assert isinstance(handler, Uploading)
    handler.store()
    handler.close_connection = True


def half(handler: Handler, _body: bytes, _kind: str) -> None:
    """Only the half of a piece is kept, and then the connection breaks."""
    assert isinstance(handler, Uploading)
    session = handler._session()
    assert session is not None
    data = handler.server.asked[-1].body
    handler.sessions[session] += data[: len(data) // 2]
    handler.close_connection = True


def forgotten(handler: Handler, _body: bytes, _kind: str) -> None:
    """The session is gone."""
    assert isinstance(handler, Uploading)
    handler.sessions.pop(handler._session() or "")
    handler.answer(404, body=b'{"errors":[{"code":"BLOB_UPLOAD_UNKNOWN"}]}')


def corrupted(handler: Handler, _body: bytes, _kind: str) -> None:
    """A bit falls over on the way."""
    assert isinstance(handler, Uploading)
    asked = handler.server.asked[-1]
    asked.body = bytes([asked.body[0] ^ 1]) + asked.body[1:]
    handler.store()
    assert not handler.stored
    handler.answer(400, body=b'{"errors":[{"code":"DIGEST_INVALID"}]}')


PASSING: dict[str, tuple[str, list[Fault]]] = {
    "500 for the beginning": ("POST /uploads/", [status(500), status(503)]),
    "502 for a piece": ("PATCH /uploads/", [status(502)]),
    "429 for the end": ("PUT /uploads/", [status(429, Retry_After="0")]),
    "a piece that is cut": ("PATCH /uploads/", [half]),
    "two pieces that are cut": ("PATCH /uploads/", [half, half]),
    "a piece whose answer is lost": ("PATCH /uploads/", [hang_up]),
    "an end whose answer is lost": ("PUT /uploads/", [lost]),
    "an end that is lost": ("PUT /uploads/", [hang_up]),
    "a session that is forgotten": ("PATCH /uploads/", [forgotten]),
    "a wrong byte": ("PUT /uploads/", [corrupted]),
    "500 for a question": ("HEAD /blobs/", [status(500)]),
    "a manifest that is lost": ("PUT /manifests/", [hang_up]),
    "a manifest whose answer is lost": ("PUT /manifests/", [lost]),
    "500 for the manifest": ("PUT /manifests/", [status(500), status(500)]),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_borne_with(name: str, server: UploadRegistry, build: Path, tmp_path: Path) -> None:
    where, faults = PASSING[name]
    server.faults[where] = list(faults)
    put(server.address, build)
    assert not server.faults[where]
    get(server.address, tmp_path / "out", tmp_path / "cache")
    check_same(build, tmp_path / "out")


def test_a_piece_goes_on_where_it_was_cut(server: UploadRegistry, build: Path) -> None:
    server.faults["PATCH /uploads/"] = [half]
    put(server.address, build)
    vmlinux = hashlib.sha256((build / "vmlinux").read_bytes()).hexdigest()
    (data, _) = server.documents[f"{HOME}/blobs/sha256:{vmlinux}"]
    assert len(data) == 350_000
    starts = [asked.headers["Content-Range"] for asked in server.asked if asked.method == "PATCH"]
    assert "50000-149999" in starts


def test_retry_after_is_waited_for(server: UploadRegistry, build: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(transport.Web, "pause", lambda _self, seconds: waited.append(seconds))
    server.faults["POST /uploads/"] = [status(429, Retry_After="7")]
    put(server.address, build)
    assert waited == [7.0]


LASTING: dict[str, tuple[str, list[Fault], type[Exception], str]] = {
    "500": ("POST /uploads/", always(status(500)), HostError, "answers 500"),
    "403": ("POST /uploads/", always(status(403)), HostError, "answers 403"),
    "a read-only registry": ("POST /uploads/", always(status(405)), InputError, "answers 405"),
    "too large": ("PUT /uploads/", always(status(413)), InputError, "answers 413"),
    "wrong bytes": ("PUT /uploads/", always(corrupted), InputError, "DIGEST_INVALID"),
    "a refused manifest": ("PUT /manifests/", always(status(400)), InputError, "answers 400"),
    "no place": ("POST /uploads/", always(status(202)), InputError, "does not say where"),
    "another's address": (
        "POST /uploads/", always(status(202, Location="http://169.254.169.254/x")), InputError, "plain HTTP",
    ),
    "an address inside": (
        "POST /uploads/", always(status(202, Location="https://169.254.169.254/x")), InputError, "no business",
    ),
    "half an address": (
        "POST /uploads/", always(status(202, Location="//[")), InputError, "takes uploads is no address",
    ),
    "half an address for the next piece": (
        "PATCH /uploads/", always(status(202, Location="//[")), InputError, "takes uploads is no address",
    ),
    "no address": ("POST /uploads/", always(status(202, Location="ftp://x/")), InputError, "not http"),
}  # fmt: skip


@pytest.mark.parametrize("name", LASTING)
def test_what_does_not_pass_is_named_and_the_tag_stays(
    name: str, server: UploadRegistry, build: Path, tmp_path: Path
) -> None:
    first = put(server.address, build)
    where, faults, kind, words = LASTING[name]
    server.faults[where] = faults
    other = make(tmp_path / "b", "b", data=1, kernel=350_000)
    with pytest.raises(kind, match=words):
        put(server.address, other)
    assert get(server.address, tmp_path / "out", tmp_path / "cache").digest == first.digest
    server.faults.clear()
    put(server.address, other)
    get(server.address, tmp_path / "out", tmp_path / "cache")
    check_same(other, tmp_path / "out")


def test_an_upload_to_another_host_is_not_told_the_password(
    server: UploadRegistry, build: Path, tmp_path: Path
) -> None:
    server.access = Access(scheme="Basic", user="me", password=SECRET)
    log_in(tmp_path / "home", server.address)
    other = server.address.replace("127.0.0.1", "localhost")
    server.faults["POST /uploads/"] = [status(202, Location=f"http://{other}/v2/elsewhere")]
    with pytest.raises((InputError, HostError)):
        put(server.address, build)
    asked = [each for each in server.asked if "elsewhere" in each.path]
    assert asked
    assert all("Authorization" not in each.headers for each in asked)


def test_a_token_covers_both_repositories_of_a_mount(server: UploadRegistry, build: Path, tmp_path: Path) -> None:
    put(server.address, build, name="guests/other:1")
    server.access = Access(user="me", password=SECRET)
    log_in(tmp_path / "home", server.address)
    done = put(server.address, build, mount_from="guests/other")
    assert done.to_dict()["sent"] == 0
    (token, *_) = server.paths("/token")
    assert "scope=repository%3Aguests%2Fdebian%3Apull%2Cpush&scope=repository%3Aguests%2Fother%3Apull" in token


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("r.example/guests/base", "not of the same registry"),
        ("guests/base:1", "no repository's name"),
        ("127.0.0.1:1/guests/base@sha256:0", "no repository's name"),
        ("Guests/base", "no repository's name"),
    ],
)
def test_what_cannot_be_mounted_from_is_said_before_a_registry_is_asked(other: str, says: str, build: Path) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        put("127.0.0.1:1", build, mount_from=other)
    assert "127.0.0.1:1/REPO" in caught.value.hint


def test_a_mount_that_a_registry_does_not_know_is_an_upload(
    server: UploadRegistry, build: Path, tmp_path: Path
) -> None:
    put(server.address, build, mount_from="guests/nosuch")
    get(server.address, tmp_path / "out", tmp_path / "cache")
    check_same(build, tmp_path / "out")


def test_a_publication_that_failed_is_gone_on_with(server: UploadRegistry, build: Path) -> None:
    server.faults["PUT /manifests/"] = always(status(500))
    with pytest.raises(HostError):
        put(server.address, build)
    server.faults.clear()
    assert put(server.address, build).to_dict()["sent"] == 0


def damaged(server: UploadRegistry) -> str:
    """The path of a blob that lost its end."""
    name = max(
        (name for name in server.documents if "/blobs/" in name), key=lambda name: len(server.documents[name][0])
    )
    server.documents[name] = (server.documents[name][0][:-1], server.documents[name][1])
    return name


def test_a_blob_that_lost_its_end_is_sent_again(server: UploadRegistry, build: Path, tmp_path: Path) -> None:
    put(server.address, build)
    name = damaged(server)
    done = put(server.address, build).to_dict()
    assert done["sent"] == len(server.documents[name][0])
    get(server.address, tmp_path / "out", tmp_path / "cache")
    check_same(build, tmp_path / "out")


def test_a_registry_that_says_no_sizes_is_believed(server: UploadRegistry, build: Path) -> None:
    put(server.address, build)

    def silent(handler: Handler, _body: bytes, _kind: str) -> None:
        handler.send_response(200)
        handler.end_headers()

    server.faults["HEAD /blobs/"] = always(silent)
    assert put(server.address, build).to_dict()["sent"] == 0


@pytest.mark.timeout(120)
def test_debians_registry_keeps_a_damaged_blob_and_that_is_said(build: Path, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    for address in start_registry(tmp_path / "home", login=False):
        put(address, build)
        files = [path for path in (tmp_path / "home").rglob("blobs/sha256/*/*/data") if path.stat().st_size > 100_000]
        os.truncate(files[0], 1000)
        with pytest.raises(InputError, match="has 1000 bytes under sha256:") as caught:
            put(address, build)
        assert files[0].parent.name in str(caught.value)
        files[0].unlink()
        assert put(address, build).to_dict()["sent"] > 0
        get(address, tmp_path / "out", tmp_path / "cache")
        check_same(build, tmp_path / "out")


# What is pulled


def layers_of(server: UploadRegistry) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    document = json.loads(server.documents[f"{HOME}/manifests/1"][0])
    return document, document["layers"]


def title_of(layer: dict[str, Any]) -> str:
    return str(layer["annotations"]["org.opencontainers.image.title"])


def republish(server: UploadRegistry, document: dict[str, Any]) -> None:
    server.add_manifest("1", json.dumps(document).encode(), name=HOME)


@pytest.mark.parametrize("name", ["vmlinux", "rootfs.img", "lock.json", "manifest.json", "initrd.img"])
def test_parts_of_two_builds_are_refused(name: str, server: UploadRegistry, build: Path, tmp_path: Path) -> None:
    put(server.address, make(tmp_path / "b", "b", data=1, kernel=350_001))
    theirs = {title_of(each): each for each in layers_of(server)[1]}
    put(server.address, build)
    get(server.address, tmp_path / "out", tmp_path / "cache")
    document, layers = layers_of(server)
    mine = [n for n, each in enumerate(layers) if title_of(each).startswith(name)]
    at = next(n for n in mine if layers[n]["digest"] != theirs[title_of(layers[n])]["digest"])
    layers[at] = theirs[title_of(layers[at])]
    republish(server, document)
    with pytest.raises(InputError, match=r"is not the one that its manifest\.json is about"):
        get(server.address, tmp_path / "out", tmp_path / "cache")
    check_same(build, tmp_path / "out")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lock: lock["osbuilder"].update(code="d" * 64),
        lambda lock: lock["osbuilder"].update(version="1"),
        lambda lock: lock["osbuilder"]["tools"].update(zstd="1.5"),
        lambda lock: lock["options"].update(compress="gzip"),
        lambda lock: lock["image"]["layers"][0].update(diff_id="sha256:3"),
        lambda lock: lock["kernel"]["fragments"].update(base="f" * 64),
        lambda lock: lock["rootfs"]["remove"].append("/etc/shadow"),
        lambda lock: lock.pop("given"),
        lambda lock: lock.update(kernel=lock["kernel"] | {"inputs": {"patches": [[]]}}),
    ],
)
def test_a_lock_that_somebody_changed_is_not_published(spoil: Callable[[Any], None], build: Path) -> None:
    lock = json.loads((build / "lock.json").read_text())
    spoil(lock)
    (build / "lock.json").write_text(json.dumps(lock))
    with pytest.raises(InputError, match=r"its lock\.json is not the one that its provenance\.json is about"):
        put("127.0.0.1:1", build)


def test_a_lock_that_somebody_changed_is_not_pulled(server: UploadRegistry, build: Path, tmp_path: Path) -> None:
    put(server.address, build)
    document, layers = layers_of(server)
    lock = json.loads((build / "lock.json").read_text())
    data = json.dumps(lock | {"options": {"compress": "gzip"}}).encode()
    changed = {"digest": oci.digest(data), "size": len(data)}
    server.documents[f"{HOME}/blobs/{changed['digest']}"] = (data, "application/octet-stream")
    next(layer for layer in layers if title_of(layer) == "lock.json").update(changed)
    republish(server, document)
    with pytest.raises(InputError, match=r"its lock\.json is not the one that its provenance\.json is about"):
        get(server.address, tmp_path / "out", tmp_path / "cache")


ODD: dict[str, tuple[Callable[[Any], Any], str]] = {
    "a part twice": (lambda layers: layers.insert(-1, layers[-1]), "do not join"),
    "a part less": (lambda layers: layers.pop(), "not the one|do not join"),
    "two parts in the wrong order": (lambda layers: layers.insert(-2, layers.pop()), "do not join"),
    "no manifest.json": (lambda layers: layers.pop(0), "without manifest.json"),
    "a file of no name": (lambda layers: layers[1].pop("annotations"), "none we know"),
    "a path": (
        lambda layers: layers[1]["annotations"].update({"org.opencontainers.image.title": "../x"}), "none we know",
    ),
    "a part that says nothing": (lambda layers: layers[-1]["annotations"].pop("vnd.osbuilder.offset"), "which"),
    "a part beyond all disks": (
        lambda layers: layers[-1]["annotations"].update({"vnd.osbuilder.size": str(1 << 50)}), "more than",
    ),
    "a part that is longer": (
        lambda layers: layers[-1]["annotations"].update({"vnd.osbuilder.size": str(1 << 24)}), "not the one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_does_not_join_is_refused(name: str, server: UploadRegistry, build: Path, tmp_path: Path) -> None:
    put(server.address, build)
    document, layers = layers_of(server)
    change, words = ODD[name]
    change(layers)
    republish(server, document)
    with pytest.raises(InputError, match=words):
        get(server.address, tmp_path / "out", tmp_path / "cache")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "fault", [short(50_000), hang_up, status(503), wrong_bytes], ids=["cut", "gone", "503", "wrong"]
)
def test_a_blob_that_comes_badly_is_asked_for_again(
    fault: Fault, server: UploadRegistry, build: Path, tmp_path: Path
) -> None:
    put(server.address, build)
    vmlinux = hashlib.sha256((build / "vmlinux").read_bytes()).hexdigest()
    server.faults[vmlinux] = [fault]
    get(server.address, tmp_path / "out", tmp_path / "cache")
    check_same(build, tmp_path / "out")
    assert not server.faults[vmlinux]


def test_wrong_bytes_change_nothing_and_the_next_pull_goes_on(
    server: UploadRegistry, build: Path, tmp_path: Path
) -> None:
    old = make(tmp_path / "old", "old", data=1)
    put(server.address, build)
    vmlinux = hashlib.sha256((build / "vmlinux").read_bytes()).hexdigest()
    server.faults[vmlinux] = always(wrong_bytes)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with pytest.raises(InputError, match="another digest"):
        get(server.address, old, tmp_path / "cache")
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    server.faults.clear()
    server.asked.clear()
    get(server.address, old, tmp_path / "cache")
    check_same(build, old)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing is left beside it"


def test_an_image_is_no_build_and_a_build_is_no_image(server: UploadRegistry, build: Path, tmp_path: Path) -> None:
    put(server.address, build)
    document, _ = layers_of(server)
    document["artifactType"] = "application/vnd.example.other"
    republish(server, document)
    with pytest.raises(InputError, match=r"no build|an artifact of type"):
        get(server.address, tmp_path / "out", tmp_path / "cache")
    with pytest.raises(InputError, match="no build that osbuilder published"):
        put(server.address, make(tmp_path / "arm", arch="aarch64", data=1), add=True)


def test_a_pull_follows_no_redirect_to_an_address_inside(server: UploadRegistry, build: Path, tmp_path: Path) -> None:
    put(server.address, build)
    vmlinux = hashlib.sha256((build / "vmlinux").read_bytes()).hexdigest()
    server.faults[vmlinux] = always(redirect("https://169.254.169.254/x"))
    with pytest.raises(InputError, match="no business"):
        get(server.address, tmp_path / "out", tmp_path / "cache")
