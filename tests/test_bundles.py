"""Sigstore bundles; openssl, securesystemslib, sigstore-models and in-toto-attestation are the other readers."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from osbuild import bundles, oci, signing
from osbuild.errors import InputError
from tests.keys import key as key  # a fixture
from tests.keys import make_key, openssl, verified_by_openssl

pytest.importorskip("cryptography")

HEX = "ab" * 32
DIGEST = f"sha256:{HEX}"
NAME = "registry.example.com/guests/debian:1"


@pytest.fixture
def bundle(key: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bundles.make(DIGEST, NAME, signing.read_private_key(key)))
    return found


def check(bundle: dict[str, Any], key: Path, digest: str = DIGEST) -> str:
    return bundles.check(json.dumps(bundle).encode(), digest, signing.read_public_key(key.with_suffix(".pub")))


def signed(key: Path, statement: Any, kind: str = "application/vnd.in-toto+json") -> dict[str, Any]:
    """Another statement, well signed: its bytes are joined here as DSSE's protocol.md says."""
    payload = statement if isinstance(statement, bytes) else json.dumps(statement).encode()
    data = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    signature = signing.sign(data, signing.read_private_key(key))
    texts = [base64.b64encode(each).decode() for each in (payload, signature)]
    return {"dsseEnvelope": {"payload": texts[0], "payloadType": kind, "signatures": [{"sig": texts[1]}]}}


def test_the_same_manifest_has_the_same_bundle(key: Path) -> None:
    private = signing.read_private_key(key)
    assert bundles.make(DIGEST, NAME, private) == bundles.make(DIGEST, NAME, private)
    assert bundles.make(DIGEST, NAME, private) != bundles.make(DIGEST, NAME + "2", private)


def test_openssl_verifies_what_the_envelope_signs(bundle: dict[str, Any], key: Path) -> None:
    envelope = bundle["dsseEnvelope"]
    payload, signature = (base64.b64decode(text) for text in (envelope["payload"], envelope["signatures"][0]["sig"]))
    kind = envelope["payloadType"]
    data = f"DSSEv1 {len(kind)} {kind} {len(payload)} ".encode() + payload
    assert verified_by_openssl(data, signature, key.with_suffix(".pub"))
    assert not verified_by_openssl(payload, signature, key.with_suffix(".pub"))


def test_securesystemslib_verifies_the_envelope(bundle: dict[str, Any], key: Path, tmp_path: Path) -> None:
    dsse = pytest.importorskip("securesystemslib.dsse")
    signer = pytest.importorskip("securesystemslib.signer")
    error = pytest.importorskip("securesystemslib.exceptions").VerificationError
    ours, others = (
        signer.SSlibKey.from_crypto(signing.read_public_key(each.with_suffix(".pub")), keyid="one")
        for each in (key, make_key(tmp_path / "other.pem"))
    )
    bundle["dsseEnvelope"]["signatures"][0]["keyid"] = "one"  # which that library wants, and DSSE does not
    envelope = dsse.Envelope.from_dict(bundle["dsseEnvelope"])
    assert envelope.verify([ours], 1) == {"one": ours}
    with pytest.raises(error):
        envelope.verify([others], 1)


def test_sigstores_own_models_read_the_bundle(bundle: dict[str, Any], key: Path) -> None:
    models = pytest.importorskip("sigstore_models.bundle.v1")
    read = models.Bundle.from_json(json.dumps(bundle))
    assert read.media_type == bundles.BUNDLE
    der = key.with_suffix(".der")
    openssl("pkey", "-pubin", "-in", str(key.with_suffix(".pub")), "-outform", "DER", "-out", str(der))
    told = base64.b64encode(hashlib.sha256(der.read_bytes()).digest()).decode()
    assert read.verification_material.public_key.hint == told, "cosign's way to name a key"
    assert read.dsse_envelope.payload_type == "application/vnd.in-toto+json"


def test_in_totos_own_reader_accepts_the_statement(bundle: dict[str, Any]) -> None:
    statement = pytest.importorskip("in_toto_attestation.v1.statement").Statement
    from google.protobuf import json_format
    from in_toto_attestation.v1 import statement_pb2

    document = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
    read = statement.copy_from_pb(json_format.ParseDict(document, statement_pb2.Statement()))
    assert dict(read.pb.subject[0].digest) == {"sha256": HEX}
    assert read.pb.subject[0].name == NAME
    assert read.pb.predicate_type == "https://sigstore.dev/cosign/sign/v1"


def test_the_referrer_names_its_subject_and_nothing_that_changes(bundle: dict[str, Any]) -> None:
    subject = oci.Descriptor(media_type="application/x", digest=DIGEST, size=7, annotations={"a": "b"})
    data = json.dumps(bundle).encode()
    manifest = json.loads(bundles.referrer(data, subject))
    assert manifest["subject"] == {"mediaType": "application/x", "digest": DIGEST, "size": 7}
    assert manifest["artifactType"] == manifest["layers"][0]["mediaType"] == bundles.BUNDLE
    assert manifest["config"]["digest"] == f"sha256:{hashlib.sha256(b'{}').hexdigest()}"
    assert manifest["layers"][0]["digest"] == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert "org.opencontainers.image.created" not in manifest["annotations"]


def test_a_good_bundle_says_under_which_name(bundle: dict[str, Any], key: Path) -> None:
    assert check(bundle, key) == NAME


def test_what_cosign_3_signs_is_verified_and_has_no_name(key: Path) -> None:
    subject = {"digest": {"sha256": HEX}, "annotations": {}}
    statement: dict[str, Any] = {
        "_type": "https://in-toto.io/Statement/v1", "subject": [subject], "predicateType": bundles.PREDICATE,
        "predicate": {},
    }  # fmt: skip
    assert check(signed(key, statement), key) == ""
    statement["subject"] = [{"digest": {"sha256": "cd" * 32}}, {"digest": None}, 7, subject]
    assert check(signed(key, statement), key) == "", "of several subjects one is enough"


STATEMENT: dict[str, Any] = {
    "_type": "https://in-toto.io/Statement/v1", "subject": [{"digest": {"sha256": HEX}}],
    "predicateType": bundles.PREDICATE,
}  # fmt: skip
ODD: dict[str, tuple[Any, str]] = {
    "another manifest": (STATEMENT | {"subject": [{"digest": {"sha256": "cd" * 32}}]}, "over 'sha256:cdcd.*, not over"),
    "nothing": (STATEMENT | {"subject": []}, "over nothing"),
    "subjects that are none": (STATEMENT | {"subject": {"digest": {"sha256": HEX}}}, "over nothing"),
    "an attestation": (STATEMENT | {"predicateType": "https://slsa.dev/provenance/v1"}, "slsa.*which is no signature"),
    "a statement of another kind": (STATEMENT | {"_type": "x"}, "no signature"),
    "no JSON": (b"{", "the bundle's statement: not JSON"),
    "a list": ([], "not a JSON object"),
    "deep": (b"[" * 5000, "nested more than"),
}


@pytest.mark.parametrize(("statement", "complaint"), ODD.values(), ids=ODD)
def test_a_statement_about_something_else_is_refused(statement: Any, complaint: str, key: Path) -> None:
    with pytest.raises(InputError, match=complaint):
        check(signed(key, statement), key)


def test_a_bundle_that_was_changed_is_refused(bundle: dict[str, Any], key: Path, tmp_path: Path) -> None:
    other = make_key(tmp_path / "other.pem")
    with pytest.raises(InputError, match="not by this key"):
        check(bundle, other)
    with pytest.raises(InputError, match=r"over 'sha256:ab.*, not over sha256:cd"):
        check(bundle, key, f"sha256:{'cd' * 32}")
    envelope = bundle["dsseEnvelope"]
    text = base64.b64decode(envelope["payload"])
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"payload": base64.b64encode(text.replace(b":1", b":2")).decode()}, "not by this key"),
        ({"payload": "%"}, "not base64"),
        ({"payload": None}, "not one of an in-toto statement"),
        ({"payloadType": "text/plain"}, "not one of an in-toto statement"),
        ({"signatures": []}, "not one of an in-toto statement"),
        ({"signatures": [7]}, "not by this key"),
        ({"signatures": [{"sig": "%"}]}, "not base64"),
        ({"signatures": [{"sig": ""}] * 20 + envelope["signatures"]}, "not by this key"),
    ]
    for fields, complaint in wrong:
        with pytest.raises(InputError, match=complaint):
            check(bundle | {"dsseEnvelope": envelope | fields}, key)
    assert check(bundle | {"dsseEnvelope": envelope | {"signatures": [{"sig": ""}, *envelope["signatures"]]}}, key)
    with pytest.raises(InputError, match="without a DSSE envelope"):
        check({"messageSignature": {}}, key)
