"""Signatures at Debian's docker-registry; skopeo, by its policy, is the other reader, and the other writer."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from osbuild.cache import Cache
from osbuild.console import Show
from osbuild.errors import InputError
from osbuild.registry_spec import RegistrySpec
from osbuild.verification import Verified, verify
from tests.keys import key as key  # a fixture
from tests.keys import make_key, verified_by_openssl
from tests.published import check_same, get, make, put
from tests.test_distribution import _surroundings as _surroundings  # a fixture
from tests.test_registry import debian as debian  # a fixture

pytest.importorskip("cryptography")
ANY = "insecureAcceptAnything"


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A repository of this test's own."""
    return "guests/" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")


def look(address: str, name: str, key: Path, cache: Path) -> Verified:
    return verify(f"{address}/{name}", key.with_suffix(".pub"), RegistrySpec(), Cache(root=cache), Show(quiet=True))


def skopeo(
    home: Path, address: str, key: Path, *words: str, policy: str = "sigstoreSigned"
) -> subprocess.CompletedProcess[str]:
    """skopeo, which takes from that registry only what this key signed."""
    rule = {"type": policy} | ({"keyPath": str(key.with_suffix(".pub"))} if policy == "sigstoreSigned" else {})
    rules = {"default": [{"type": "reject"}], "transports": {"docker": {address: [rule]}}}
    (home / "policy.json").write_text(json.dumps(rules))
    (home / "registries.d").mkdir(exist_ok=True)
    (home / "registries.d/here.yaml").write_text(f"docker:\n  {address}:\n    use-sigstore-attachments: true\n")
    options = ("--policy", str(home / "policy.json"), "--registries.d", str(home / "registries.d"))
    return subprocess.run(["skopeo", *options, *words], capture_output=True, text=True, check=False)


def needs_sigstore(done: subprocess.CompletedProcess[str]) -> None:
    """Debian 12 takes that out of its skopeo: it finds and parses the signature, and then says so."""
    if "sigstore disabled" in done.stderr:
        pytest.skip("skopeo was built without sigstore")


def copied(home: Path, address: str, reference: str, key: Path, *options: str) -> subprocess.CompletedProcess[str]:
    shutil.rmtree(home / "copy", ignore_errors=True)
    words = ("--src-tls-verify=false", "--remove-signatures", f"docker://{address}/{reference}", f"oci:{home}/copy:1")
    return skopeo(home, address, key, "copy", *options, *words)


def test_skopeo_takes_what_the_key_signed_and_nothing_else(debian: str, name: str, key: Path, tmp_path: Path) -> None:
    build = make(tmp_path / "a", data=1)
    put(debian, build, name=f"{name}:unsigned")
    refused = copied(tmp_path, debian, f"{name}:unsigned", key)
    assert "A signature was required, but no signature exists" in refused.stderr
    digest = put(debian, build, name=f"{name}:1", sign=key).digest
    for reference in (f"{name}:1", f"{name}@{digest}"):
        done = copied(tmp_path, debian, reference, key)
        needs_sigstore(done)
        assert done.returncode == 0, done.stderr
    refused = copied(tmp_path, debian, f"{name}:1", make_key(tmp_path / "other.pem"))
    assert refused.returncode != 0
    assert "cryptographic signature verification failed" in refused.stderr
    refused = copied(tmp_path, debian, f"{name}:unsigned", key)
    assert f'for identity "{debian}/{name}:1" is not accepted' in refused.stderr.replace("\\", "").lower()


def test_skopeo_takes_a_whole_signed_index_and_one_build_of_it(
    debian: str, name: str, key: Path, tmp_path: Path
) -> None:
    builds = make(tmp_path / "x", data=1), make(tmp_path / "arm", "b", arch="aarch64", data=1)
    put(debian, *builds, name=f"{name}:1", sign=key)
    for options in (("--all",), ()):
        done = copied(tmp_path, debian, f"{name}:1", key, *options)
        needs_sigstore(done)
        assert done.returncode == 0, done.stderr


def test_skopeo_sees_that_one_is_signed_and_the_other_is_not(debian: str, name: str, key: Path, tmp_path: Path) -> None:
    """What any skopeo can: one without sigstore stops only when it has read a signature."""
    build = make(tmp_path / "a", data=1)
    put(debian, build, name=f"{name}:1")
    complaint = "A signature was required, but no signature exists"
    assert complaint in copied(tmp_path, debian, f"{name}:1", key).stderr
    put(debian, build, name=f"{name}:1", sign=key)
    assert complaint not in copied(tmp_path, debian, f"{name}:1", key).stderr


def test_what_skopeo_copied_with_its_signature_is_verified_there(
    debian: str, name: str, key: Path, tmp_path: Path
) -> None:
    """skopeo parses the manifest of signatures, and writes one of its own; ours is added to that."""
    build = make(tmp_path / "a", data=1)
    put(debian, build, name=f"{name}:1", sign=key)
    words = ("--src-tls-verify=false", "--dest-tls-verify=false", f"docker://{debian}/{name}:1")
    done = skopeo(
        tmp_path, debian, key, "copy", *words, f"docker://{debian}/{name}/copy:1", policy="insecureAcceptAnything"
    )
    assert done.returncode == 0, done.stderr
    (found,) = look(debian, f"{name}/copy:1", key, tmp_path / "cache").signatures
    assert (found.road, found.name, found.other) == ("signature tag", f"{debian}/{name}:1", True)
    other = make_key(tmp_path / "other.pem")
    put(debian, build, name=f"{name}/copy:1", sign=other)
    assert len(look(debian, f"{name}/copy:1", other, tmp_path / "cache").signatures) == 2
    assert len(look(debian, f"{name}/copy:1", key, tmp_path / "cache").signatures) == 1
    words = ("--src-tls-verify=false", "--dest-tls-verify=false", f"docker://{debian}/{name}/copy:1")
    done = skopeo(
        tmp_path, debian, key, "copy", *words, f"docker://{debian}/{name}/third:1", policy="insecureAcceptAnything"
    )
    assert done.returncode == 0, done.stderr
    for each in (key, other):
        assert len(look(debian, f"{name}/third:1", each, tmp_path / "cache").signatures) == 1


def fetched(address: str, path: str) -> Any:
    kinds = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json"
    request = urllib.request.Request(f"http://{address}/v2/{path}", headers={"Accept": kinds})
    with urllib.request.urlopen(request) as answer:
        return answer.read()


def test_openssl_verifies_what_plain_http_brings(debian: str, name: str, key: Path, tmp_path: Path) -> None:
    digest = put(debian, make(tmp_path / "a", data=1), name=f"{name}:1", sign=key).digest
    tag = digest.replace(":", "-")
    (layer,) = json.loads(fetched(debian, f"{name}/manifests/{tag}.sig"))["layers"]
    payload = fetched(debian, f"{name}/blobs/{layer['digest']}")
    signature = base64.b64decode(layer["annotations"]["dev.cosignproject.cosign/signature"])
    assert verified_by_openssl(payload, signature, key.with_suffix(".pub"))
    assert json.loads(payload)["critical"]["image"]["docker-manifest-digest"] == digest
    (row,) = json.loads(fetched(debian, f"{name}/manifests/{tag}"))["manifests"]
    manifest = json.loads(fetched(debian, f"{name}/manifests/{row['digest']}"))
    assert manifest["subject"]["digest"] == digest
    assert manifest["artifactType"] == row["artifactType"]
    envelope = json.loads(fetched(debian, f"{name}/blobs/{manifest['layers'][0]['digest']}"))["dsseEnvelope"]
    statement = base64.b64decode(envelope["payload"])
    signed = f"DSSEv1 {len(envelope['payloadType'])} {envelope['payloadType']} {len(statement)} ".encode() + statement
    signature = base64.b64decode(envelope["signatures"][0]["sig"])
    assert verified_by_openssl(signed, signature, key.with_suffix(".pub"))
    assert json.loads(statement)["subject"][0]["digest"] == {"sha256": digest.removeprefix("sha256:")}


def test_it_is_verified_pulled_and_published_again_for_nothing(
    debian: str, name: str, key: Path, tmp_path: Path
) -> None:
    build = make(tmp_path / "a", data=1)
    first = put(debian, build, name=f"{name}:1", sign=key)
    assert {each.road for each in look(debian, f"{name}:1", key, tmp_path / "cache").signatures} == {
        "referrers tag", "signature tag",
    }  # fmt: skip
    again = put(debian, build, name=f"{name}:1", sign=key)
    assert (again.to_dict()["sent"], again.changed, again.signed[0].changed) == (0, False, False)
    assert again.digest == first.digest
    get(debian, tmp_path / "out", tmp_path / "cache", name=f"{name}:1", key=key.with_suffix(".pub"))
    check_same(build, tmp_path / "out")
    with pytest.raises(InputError, match="no good signature of this key"):
        look(debian, f"{name}:1", make_key(tmp_path / "other.pem"), tmp_path / "cache")
