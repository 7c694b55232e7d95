"""A signature over a manifest's digest as a sigstore bundle, and the manifest that refers to what it signs: pure.

bundle     {"mediaType": BUNDLE, "verificationMaterial": {"publicKey": {"hint": …}, "tlogEntries": []},
           "dsseEnvelope": {"payload": base64, "payloadType": "application/vnd.in-toto+json", "signatures": [{"sig"}]}}
statement  the payload: {"_type", "subject": [{"name": NAME, "digest": {"sha256": HEX}}], "predicateType": PREDICATE,
           "predicate": {}}
signed     "DSSEv1" SP len(type) SP type SP len(payload) SP payload
referrer   an OCI manifest of the artifact type BUNDLE; its layer is the bundle, its `subject` what is signed

No date is in any of it: the same bytes every time. Sources: sigstore protobuf-specs, protos/sigstore_bundle.proto
(v0.3); cosign, specs/BUNDLE_SPEC.md, and what its `sign` writes from 3 on (a statement with an empty predicate, without
a name); DSSE, protocol.md; in-toto attestation spec/v1/statement.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from osbuild import oci, signing
from osbuild.errors import InputError
from osbuild.publication import IMAGE_MANIFEST
from osbuild.tree import quote

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

BUNDLE: Final = "application/vnd.dev.sigstore.bundle.v0.3+json"
PREDICATE: Final = "https://sigstore.dev/cosign/sign/v1"
EMPTY: Final = b"{}"  # the config of what has none
_EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
_STATEMENT: Final = "https://in-toto.io/Statement/v1"
_PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
_SIGNATURES_MAX: Final = 8  # of one envelope; sigstore allows one
_SUBJECTS_MAX: Final = 1024  # of one statement, as sigstore-go has it


def make(digest: str, reference: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The bundle that says: this manifest, under this name."""
    statement = {
        "_type": _STATEMENT,
        "subject": [{"name": reference, "digest": {"sha256": digest.removeprefix("sha256:")}}],
        "predicateType": PREDICATE, "predicate": {},
    }  # fmt: skip
    payload = oci.encode(statement)
    signature = signing.sign(_to_be_signed(_PAYLOAD_TYPE, payload), key)
    return oci.encode({
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": signing.hint(key.public_key())}, "tlogEntries": []},
        "dsseEnvelope": {
            "payload": signing.encode(payload), "payloadType": _PAYLOAD_TYPE,
            "signatures": [{"sig": signing.encode(signature)}],
        },
    })  # fmt: skip


def check(data: bytes, digest: str, key: ec.EllipticCurvePublicKey) -> str:
    """The name that a bundle gives this manifest, or none; InputError unless the key's owner signed that."""
    envelope = oci.parse_json(data, "the bundle").get("dsseEnvelope")
    if not isinstance(envelope, dict):
        raise InputError("a bundle of a kind that is not read here, without a DSSE envelope")
    kind, payload, signatures = (envelope.get(word) for word in ("payloadType", "payload", "signatures"))
    if kind != _PAYLOAD_TYPE or not isinstance(payload, str) or not isinstance(signatures, list) or not signatures:
        raise InputError("the bundle's envelope is not one of an in-toto statement")
    statement = signing.decode(payload)
    _check_signed(_to_be_signed(_PAYLOAD_TYPE, statement), signatures[:_SIGNATURES_MAX], key)
    return _name(oci.parse_json(statement, "the bundle's statement"), digest)


def layer_of(bundle: bytes) -> oci.Descriptor:
    """The bundle, as its manifest names it."""
    return oci.Descriptor.of(bundle, BUNDLE)


def config() -> oci.Descriptor:
    """What a manifest that needs no config has for one."""
    return oci.Descriptor.of(EMPTY, _EMPTY_TYPE)


def referrer(bundle: bytes, subject: oci.Descriptor) -> bytes:
    """The manifest that refers to what was signed."""
    return oci.encode({
        "schemaVersion": 2, "mediaType": IMAGE_MANIFEST, "artifactType": BUNDLE, "config": config().to_dict(),
        "layers": [layer_of(bundle).to_dict()], "subject": subject.to_dict(), "annotations": _annotations(),
    })  # fmt: skip


def row(manifest: bytes) -> dict[str, Any]:
    """How an index of referrers names that manifest."""
    return {
        "mediaType": IMAGE_MANIFEST, "digest": oci.digest(manifest), "size": len(manifest), "artifactType": BUNDLE,
        "annotations": _annotations(),
    }  # fmt: skip


def _check_signed(data: bytes, signatures: list[Any], key: ec.EllipticCurvePublicKey) -> None:
    """InputError unless one of them is this key's."""
    problem = InputError("the bundle's envelope is not signed")
    for each in signatures:
        text = each.get("sig") if isinstance(each, dict) else None
        try:
            signing.verify(data, signing.decode(text if isinstance(text, str) else ""), key)
        except InputError as caught:
            problem = caught
        else:
            return
    raise problem


def _name(statement: oci.Json, digest: str) -> str:
    if statement.get("_type") != _STATEMENT or statement.get("predicateType") != PREDICATE:
        raise InputError(f"a bundle with a {quote(str(statement.get('predicateType'))[:100])}, which is no signature")
    subjects = statement.get("subject")
    over = []
    for each in subjects[:_SUBJECTS_MAX] if isinstance(subjects, list) else []:
        digests = each.get("digest") if isinstance(each, dict) else None
        found = f"sha256:{digests.get('sha256')}" if isinstance(digests, dict) else ""
        if found == digest:
            name = each.get("name")
            return name if isinstance(name, str) else ""
        over.append(found)
    raise InputError(f"the signature is over {quote(str(over[0])[:100]) if over else 'nothing'}, not over {digest}")


def _to_be_signed(kind: str, payload: bytes) -> bytes:
    return b" ".join((b"DSSEv1", b"%d" % len(kind), kind.encode(), b"%d" % len(payload), payload))


def _annotations() -> dict[str, str]:
    return {"dev.sigstore.bundle.content": "dsse-envelope", "dev.sigstore.bundle.predicateType": PREDICATE}
