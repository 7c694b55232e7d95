"""publish --sign at registries with a referrers API and without: what they get, in which order, and how often."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from osbuild import publish as publishing
from osbuild import pull as pulling
from osbuild import signing, verification
from osbuild.cache import Cache
from osbuild.console import Show
from osbuild.errors import HostError, InputError, OsbuilderError, SpecError
from osbuild.registry_spec import RegistrySpec
from osbuild.transport import Patience
from osbuild.verification import Verified, verify
from tests.fake_registry import INDEX, MANIFEST, Fault, always, answering, status
from tests.keys import key as key  # a fixture
from tests.keys import make_key, verified_by_openssl
from tests.published import UploadRegistry, check_same, get, make, put
from tests.test_cli import one_line, run
from tests.test_distribution import _surroundings as _surroundings  # a fixture

pytest.importorskip("cryptography")
PATIENCE = Patience(tries=3, first=0.001, silence=2.0, window=0.15, speed=1024, longest=0.01)
HOME = "guests/debian"
ROADS = {True: {"referrers", "signature tag"}, False: {"referrers tag", "signature tag"}}


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (publishing, pulling, verification):
        monkeypatch.setattr(module, "PATIENCE", PATIENCE)
    monkeypatch.delenv(signing.PASSWORD, raising=False)


@pytest.fixture(params=[True, False], ids=["with referrers", "without referrers"])
def server(request: pytest.FixtureRequest) -> Iterator[UploadRegistry]:
    with answering(UploadRegistry(referrers=request.param)) as running:
        yield running


@pytest.fixture
def plain() -> Iterator[UploadRegistry]:
    with answering(UploadRegistry()) as running:
        yield running


@pytest.fixture
def build(tmp_path: Path) -> Path:
    return make(tmp_path / "a", data=1)


def look(address: str, key: Path, cache: Path, reference: str = ":1") -> Verified:
    registry = RegistrySpec()
    public = key if key.suffix == ".pub" else key.with_suffix(".pub")
    return verify(f"{address}/{HOME}{reference}", public, registry, Cache(root=cache), Show(quiet=True))


def written(server: UploadRegistry) -> list[str]:
    """What was put under a name, one after the other."""
    return [asked.path.rpartition("/")[2] for asked in server.asked if asked.method == "PUT" and "/manif" in asked.path]


def json_at(server: UploadRegistry, reference: str) -> Any:
    return json.loads(server.documents[f"{HOME}/manifests/{reference}"][0])


def sig_tag(digest: str) -> str:
    return digest.replace(":", "-") + ".sig"


# What is put


def test_what_is_signed_is_verified_by_both_roads(
    server: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    done = put(server.address, build, sign=key)
    assert [each.to_dict() for each in done.signed] == [{"digest": done.digest, "changed": True}]
    found = look(server.address, key, tmp_path / "cache")
    assert {each.road for each in found.signatures} == ROADS[server.referrers]
    assert {each.name for each in found.signatures} == {f"{server.address}/{HOME}:1"}
    assert not any(each.other for each in found.signatures)
    assert found.digest == done.digest
    assert found.problems == ()


def test_the_tag_moves_when_all_is_signed(server: UploadRegistry, build: Path, key: Path) -> None:
    done = put(server.address, build, sign=key)
    order = written(server)
    assert order[0] == done.digest
    assert order[-1] == "1"
    assert sig_tag(done.digest) in order
    assert (done.digest.replace(":", "-") in order) != server.referrers, "an index only where the registry has none"


def test_a_second_publication_sends_nothing_at_all(server: UploadRegistry, build: Path, key: Path) -> None:
    put(server.address, build, sign=key)
    server.asked.clear()
    again = put(server.address, build, sign=key)
    assert [asked.method for asked in server.asked if asked.method not in ("GET", "HEAD")] == []
    assert (again.to_dict()["sent"], again.changed, again.signed[0].changed) == (0, False, False)
    assert any(line.startswith("signed already sha256:") for line in again.lines())


def test_the_same_build_and_key_give_the_same_bytes(build: Path, key: Path) -> None:
    """The name has the registry's address in it: so it is the same registry, emptied."""
    with answering(UploadRegistry()) as server:
        put(server.address, build, sign=key)
        first = dict(server.documents)
        server.documents.clear()
        put(server.address, build, sign=key)
        assert server.documents == first


@pytest.mark.parametrize("part", ["PUT .sig", "PUT /manifests/sha256-", "POST /uploads/", "PUT /manifests/sha256:"])
def test_a_publication_that_cannot_sign_leaves_the_tag_alone(
    part: str, plain: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    put(plain.address, make(tmp_path / "old", "b", data=1), sign=key)
    before = plain.documents[f"{HOME}/manifests/1"]
    plain.faults[part] = always(status(403))
    with pytest.raises(OsbuilderError):
        put(plain.address, build, sign=key)
    assert plain.documents[f"{HOME}/manifests/1"] == before
    plain.faults.clear()
    put(plain.address, build, sign=key)
    assert look(plain.address, key, tmp_path / "cache").problems == ()


def test_what_is_there_unsigned_is_signed_without_being_sent_again(
    server: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    put(server.address, build)
    with pytest.raises(InputError, match="has no signature"):
        look(server.address, key, tmp_path / "cache")
    done = put(server.address, build, sign=key)
    assert (done.to_dict()["sent"], done.changed, done.signed[0].changed) == (0, False, True)
    look(server.address, key, tmp_path / "cache")


def test_what_others_signed_stays(server: UploadRegistry, build: Path, key: Path, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other.pem")
    done = put(server.address, build, sign=other)
    where = f"{HOME}/manifests/{sig_tag(done.digest)}"
    document = json.loads(server.documents[where][0]) | {"annotations": {"mine": "yes"}}
    document["layers"][0]["annotations"]["dev.sigstore.cosign/bundle"] = "{}"
    server.documents[where] = (json.dumps(document).encode(), MANIFEST)
    put(server.address, build, sign=key)
    for each in (key, other):
        found = look(server.address, each, tmp_path / "cache").signatures
        assert {one.road for one in found} == ROADS[server.referrers]
    after = json_at(server, sig_tag(done.digest))
    assert after["annotations"] == {"mine": "yes"}
    assert after["layers"][0] == document["layers"][0], "also what we do not know"
    assert len(after["layers"]) == 2


def test_what_else_the_referrers_tag_names_stays(plain: UploadRegistry, build: Path, key: Path, tmp_path: Path) -> None:
    done = put(plain.address, build)
    row = {"mediaType": MANIFEST, "digest": done.digest, "size": 7, "artifactType": "text/sbom", "odd": 1}
    index = {"schemaVersion": 2, "mediaType": INDEX, "manifests": [row], "annotations": {"a": "b"}}
    tag = done.digest.replace(":", "-")
    plain.add_manifest(tag, json.dumps(index).encode(), INDEX, HOME)
    put(plain.address, build, sign=key)
    after = json_at(plain, tag)
    assert after["manifests"][0] == row
    assert after["annotations"] == {"a": "b"}
    assert len(after["manifests"]) == 2
    look(plain.address, key, tmp_path / "cache")


@pytest.mark.parametrize("suffix", ["", ".sig"])
def test_a_signature_tag_that_is_something_else_is_not_overwritten(
    suffix: str, plain: UploadRegistry, build: Path, key: Path
) -> None:
    done = put(plain.address, build)
    tag = done.digest.replace(":", "-") + suffix
    plain.add_manifest(tag, b'{"schemaVersion": 2}', MANIFEST, HOME)
    with pytest.raises(InputError, match=f"{tag}: no (manifest|index) of"):
        put(plain.address, build, sign=key)
    assert plain.documents[f"{HOME}/manifests/{tag}"][0] == b'{"schemaVersion": 2}'


def test_another_signature_of_the_same_key_is_enough(plain: UploadRegistry, build: Path, key: Path) -> None:
    """cosign's nonces are random: its signature of this payload is not ours, and as good."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    done = put(plain.address, build, sign=key)
    document = json_at(plain, sig_tag(done.digest))
    payload = signing.payload(done.digest, f"{plain.address}/{HOME}:1")
    theirs = base64.b64encode(signing.read_private_key(key).sign(payload, ec.ECDSA(hashes.SHA256()))).decode()
    assert document["layers"][0]["annotations"][signing.ANNOTATION] != theirs
    document["layers"][0]["annotations"][signing.ANNOTATION] = theirs
    plain.add_manifest(sig_tag(done.digest), json.dumps(document).encode(), MANIFEST, HOME)
    assert not put(plain.address, build, sign=key).signed[0].changed


def test_a_second_name_is_a_second_signature(server: UploadRegistry, build: Path, key: Path, tmp_path: Path) -> None:
    put(server.address, build, sign=key)
    put(server.address, build, sign=key, name=f"{HOME}:2")
    for tag in "12":
        told = {each.name: each.other for each in look(server.address, key, tmp_path / "c", f":{tag}").signatures}
        assert told == {f"{server.address}/{HOME}:{each}": each != tag for each in "12"}


# An index


@pytest.mark.parametrize("later", [False, True], ids=["at once", "one after the other"])
def test_of_an_index_every_part_is_signed(
    later: bool, server: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    arm = make(tmp_path / "arm", "b", arch="aarch64", data=1)
    if later:
        put(server.address, build, sign=key)
        done = put(server.address, arm, sign=key, add=True)
    else:
        done = put(server.address, build, arm, sign=key)
    rows = json_at(server, "1")["manifests"]
    assert [each.digest for each in done.signed][-1] == done.digest
    assert len(done.signed) == 3
    for digest in (done.digest, *(row["digest"] for row in rows)):
        assert look(server.address, key, tmp_path / "c", f"@{digest}").digest == digest
    order = written(server)
    assert order[-1] == "1"


def test_a_build_that_nobody_signed_is_not_vouched_for_with_another(
    server: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    """Whoever can write to the registry could have put it there."""
    put(server.address, build)
    before = server.documents[f"{HOME}/manifests/1"]
    arm = make(tmp_path / "arm", "b", arch="aarch64", data=1)
    with pytest.raises(InputError, match=r"linux/amd64 of this index would be vouched for, too: .* has no signature"):
        put(server.address, arm, sign=key, add=True)
    assert server.documents[f"{HOME}/manifests/1"] == before
    assert not [path for path in written(server) if path.endswith(".sig")]


# What is verified


def test_a_digest_and_a_copy_in_another_repository_are_verified_too(
    server: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    done = put(server.address, build, sign=key)
    found = look(server.address, key, tmp_path / "cache", f"@{done.digest}")
    assert not any(each.other for each in found.signatures), "a digest has no tag to be another one"
    for path, document in list(server.documents.items()):
        server.documents[path.replace(HOME, "copies/debian")] = document
    name = f"{server.address}/copies/debian:1"
    copied = verify(name, key.with_suffix(".pub"), RegistrySpec(), Cache(root=tmp_path / "c"), Show(quiet=True))
    assert all(each.other for each in copied.signatures)
    assert any("another name" in line for line in copied.lines())


def test_cosigns_names_without_a_tag_are_the_same_name(
    plain: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    digest = put(plain.address, build).digest
    for name, other in ((f"{plain.address}/{HOME}", False), (f"{plain.address}/{HOME}@{digest}", False), ("x/y", True)):
        attach(plain, digest, signing.payload(digest, name), key)
        (found,) = look(plain.address, key, tmp_path / "cache").signatures
        assert (found.name, found.other) == (name, other)


def attach(
    server: UploadRegistry, digest: str, payload: bytes, key: Path, fields: dict[str, Any] | None = None
) -> None:
    """A signature of somebody's making at cosign's tag."""
    blob = f"sha256:{hashlib.sha256(payload).hexdigest()}"
    server.documents[f"{HOME}/blobs/{blob}"] = (payload, "application/octet-stream")
    text = signing.encode(signing.sign(payload, signing.read_private_key(key)))
    layer = {
        "mediaType": signing.PAYLOAD_TYPE, "digest": blob, "size": len(payload),
        "annotations": {signing.ANNOTATION: text},
    } | (fields or {})  # fmt: skip
    document = {"schemaVersion": 2, "mediaType": MANIFEST, "layers": [layer]}
    server.add_manifest(sig_tag(digest), json.dumps(document).encode(), MANIFEST, HOME)


def test_each_bad_signature_is_refused_in_one_line_that_says_why(
    plain: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    digest = put(plain.address, build).digest
    other = make_key(tmp_path / "other.pem")
    good = signing.payload(digest, "x")
    zeros = f"sha256:{'0' * 64}"
    cases: list[tuple[bytes, Path, dict[str, Any], str]] = [
        (good, other, {}, "not by this key"),
        (signing.payload(zeros, "x"), key, {}, "over 'sha256:0000.*, not over"),
        (b"{", key, {}, "payload is not JSON"),
        (b"{}", key, {}, "does not say what it is about"),
        (good, key, {"annotations": {signing.ANNOTATION: "%"}}, "not base64"),
        (good, key, {"annotations": {signing.ANNOTATION: 7}}, "a payload without a signature"),
        (good, key, {"annotations": None}, "a payload without a signature"),
        (good, key, {"digest": zeros}, f"{zeros} is not there"),
        (good, key, {"digest": "../../x"}, "is not a sha256 digest"),
        (good, key, {"size": 2 << 20}, "more than 1048576"),
        (good, key, {"mediaType": "text/plain"}, "has no signature"),
    ]  # fmt: skip
    for payload, signer, fields, complaint in cases:
        attach(plain, digest, payload, signer, fields)
        with pytest.raises(InputError, match=complaint) as caught:
            look(plain.address, key, tmp_path / "cache")
        assert "\n" not in str(caught.value)
        assert digest in str(caught.value)
    attach(plain, digest, good, key)
    blob = json_at(plain, sig_tag(digest))["layers"][0]["digest"]
    plain.documents[f"{HOME}/blobs/{blob}"] = (good + b" ", "application/octet-stream")
    with pytest.raises(InputError, match="have another digest"):
        look(plain.address, key, tmp_path / "cache")
    for document in (b"{", b"[]", b'{"layers": 7}', b'{"layers": [7]}'):
        plain.add_manifest(sig_tag(digest), document, MANIFEST, HOME)
        with pytest.raises(InputError, match=r"signature tag: .*\.sig: "):
            look(plain.address, key, tmp_path / "cache")


def test_a_bad_signature_does_not_hide_a_good_one(
    server: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    digest = put(server.address, build, sign=key).digest
    server.add_manifest(sig_tag(digest), b"{", MANIFEST, HOME)
    found = look(server.address, key, tmp_path / "cache")
    assert {each.road for each in found.signatures} == ROADS[server.referrers] - {"signature tag"}
    assert len(found.problems) == 1


def test_only_so_many_signatures_are_looked_at(
    plain: UploadRegistry, build: Path, key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "SIGNATURES_MAX", 3)
    digest = put(plain.address, build).digest
    attach(plain, digest, signing.payload(digest, "x"), make_key(tmp_path / "other.pem"))
    document = json_at(plain, sig_tag(digest))
    document["layers"] *= 5
    plain.add_manifest(sig_tag(digest), json.dumps(document).encode(), MANIFEST, HOME)
    plain.asked.clear()
    with pytest.raises(InputError, match="5 signatures, of which the 3 newest"):
        look(plain.address, key, tmp_path / "cache")
    assert len(plain.paths("/blobs/")) == 3


def test_a_list_of_referrers_in_pages_is_read_to_its_end(build: Path, key: Path, tmp_path: Path) -> None:
    with answering(UploadRegistry(referrers=True)) as server:
        digest = put(server.address, build, sign=key).digest
        where = f"{HOME}/referrers/{digest}"
        rows, kind = server.documents[where]
        server.documents[f"{where}/2"] = (rows, kind)
        del server.documents[f"{HOME}/manifests/{sig_tag(digest)}"]
        empty = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}).encode()
        link = {"Link": f'</v2/{where}/2>; rel="next"'}
        first: Fault = lambda handler, _body, _kind: handler.answer_well(empty, INDEX, link)  # noqa: E731
        server.faults[f"/referrers/{digest}"] = [first]
        (found,) = look(server.address, key, tmp_path / "cache").signatures
        assert found.road == "referrers"
        assert [path.rpartition("/")[2] for path in server.paths("/referrers/")][-2:] == [digest, "2"]


def test_a_mirror_without_the_signature_costs_nothing_but_time(
    server: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    done = put(server.address, build, sign=key)
    with answering(UploadRegistry()) as mirror:
        put(mirror.address, build)
        spec = RegistrySpec(mirrors={server.address: (mirror.address,)})
        name = f"{server.address}/{HOME}:1"
        found = verify(name, key.with_suffix(".pub"), spec, Cache(root=tmp_path / "c"), Show(quiet=True))
        assert found.digest == done.digest


@pytest.mark.parametrize("code", [403, 500])
def test_a_registry_that_does_not_answer_is_not_called_unsigned(
    code: int, plain: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    digest = put(plain.address, build, sign=key).digest
    plain.faults["/manifests/sha256-"] = always(status(code))
    with pytest.raises(OsbuilderError) as caught:
        look(plain.address, key, tmp_path / "cache", f"@{digest}")
    assert "has no signature" not in str(caught.value)
    assert str(code) in str(caught.value)


# pull


def test_only_what_is_signed_is_pulled(server: UploadRegistry, build: Path, key: Path, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other.pem")
    put(server.address, build, sign=key)
    found = get(server.address, tmp_path / "out", tmp_path / "cache", key=key.with_suffix(".pub"))
    check_same(build, tmp_path / "out")
    assert {each["road"] for each in found.to_dict()["signatures"]} == ROADS[server.referrers]
    server.asked.clear()
    with pytest.raises(InputError, match="not by this key"):
        get(server.address, tmp_path / "new", tmp_path / "another", key=other.with_suffix(".pub"))
    assert not (tmp_path / "new").exists()
    layers = {each["digest"] for each in json_at(server, "1")["layers"]}
    assert not [path for path in server.paths("/blobs/") if path.rpartition("/")[2] in layers]


def test_a_tag_that_moves_while_it_is_verified_changes_nothing(
    plain: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    """The tag is asked for once: what was verified is what is fetched."""
    done = put(plain.address, build, sign=key)
    bad = put(plain.address, make(tmp_path / "bad", "b", data=1), name=f"{HOME}:bad")
    unsigned = plain.documents[f"{HOME}/manifests/{bad.digest}"]

    def once(handler: Any, body: bytes, kind: str) -> None:
        plain.documents[f"{HOME}/manifests/1"] = unsigned
        handler.answer_well(body, kind)

    plain.faults["/manifests/1"] = [once]
    assert get(plain.address, tmp_path / "out", tmp_path / "cache", key=key.with_suffix(".pub")).digest == done.digest
    check_same(build, tmp_path / "out")
    assert plain.documents[f"{HOME}/manifests/1"] == unsigned, "it did move"


# Keys and the command line


@pytest.mark.slow
def test_the_command_line_signs_verifies_and_pulls(
    server: UploadRegistry, build: Path, key: Path, tmp_path: Path
) -> None:
    name, env = f"{server.address}/{HOME}:1", {"OSBUILDER_CACHE": str(tmp_path / "cache")}
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "pkcs8", "-topk8", "-in", key, "-passout", "pass:right", "-out", locked], check=True
    )  # fmt: skip
    refused = run("publish", str(build), name, "--sign", str(locked), env=env)
    assert (refused.returncode, "it is encrypted" in one_line(refused.stderr)) == (3, True)
    done = run("publish", str(build), name, "--sign", str(locked), "--json", env=env | {signing.PASSWORD: "right"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["signed"][0]["changed"]
    public = str(key.with_suffix(".pub"))
    told = json.loads(run("verify", name, "--key", public, "--json", env=env).stdout)
    assert {each["road"] for each in told["signatures"]} == ROADS[server.referrers]
    assert run("pull", name, "--key", public, "-o", str(tmp_path / "out"), env=env).returncode == 0
    for words, code, complaint in (
        (("verify", name, "--key", str(make_key(tmp_path / "o.pem").with_suffix(".pub"))), 3, "not by this key"),
        (("verify", name, "--key", str(key)), 3, "is a private key"),
        (("verify", name, "--key", str(tmp_path / "absent")), 3, "cannot read the key"),
        (("verify", name, "--key", str(make_key(tmp_path / "p.pem", "secp384r1").with_suffix(".pub"))), 3, "P-256"),
        (("verify", name, "--key", public, "--offline"), 2, "--offline asks no registry"),
        (("verify", f"{server.address}/{HOME}:absent", "--key", public), 3, "has no image"),
        (("rebuild", str(build), "--key", public), 2, "a directory, which has no signature"),
    ):
        refused = run(*words, env=env)
        assert (refused.returncode, complaint in one_line(refused.stderr)) == (code, True), refused.stderr


def test_without_the_extra_publishing_signed_is_one_clear_line(build: Path, key: Path, plain: UploadRegistry) -> None:
    script = (
        "import sys; sys.modules['cryptography'] = None; sys.argv[0] = 'osbuilder'\n"
        "from osbuild.__main__ import main; sys.exit(main())\n"
    )
    name = f"{plain.address}/{HOME}:1"
    for words in (("publish", str(build), name, "--sign", str(key)), ("verify", name, "--key", str(key))):
        done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
        assert done.returncode == HostError.code, done.stderr
        assert "signatures need the package cryptography" in one_line(done.stderr)
        assert "pip install 'CHECKOUT[sign]'" in done.stderr
    assert plain.asked == [], "before a byte is sent"


def test_offline_nothing_is_verified(tmp_path: Path, key: Path) -> None:
    with pytest.raises(SpecError, match="--offline"):
        get("127.0.0.1:1", tmp_path / "out", tmp_path / "cache", key=key, registry=RegistrySpec(offline=True))


def test_openssl_verifies_what_lies_at_cosigns_tag(server: UploadRegistry, build: Path, key: Path) -> None:
    digest = put(server.address, build, sign=key).digest
    (layer,) = json_at(server, sig_tag(digest))["layers"]
    payload = server.documents[f"{HOME}/blobs/{layer['digest']}"][0]
    signature = base64.b64decode(layer["annotations"]["dev.cosignproject.cosign/signature"])
    assert verified_by_openssl(payload, signature, key.with_suffix(".pub"))
    assert json.loads(payload)["critical"]["image"]["docker-manifest-digest"] == digest
