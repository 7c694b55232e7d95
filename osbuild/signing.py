"""Signatures over a manifest's digest, as cosign makes and reads them: pure functions, and the door to `cryptography`.

payload    {"critical":{"identity":{"docker-reference":NAME},"image":{"docker-manifest-digest":"sha256:…"},
           "type":"cosign container image signature"},"optional":null}
signature  ECDSA over P-256 and SHA-256 of the payload's bytes, in DER; in base64 where it lies in an annotation

Sources: containers/image, docs/containers-signature.5 ("simple signing"); sigstore cosign, specs/SIGNATURE_SPEC.md. The
nonce follows from key and payload (RFC 6979): the same signature every time.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from osbuild.errors import HostError, InputError
from osbuild.tree import quote

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

TYPE: Final = "cosign container image signature"
PAYLOAD_TYPE: Final = "application/vnd.dev.cosign.simplesigning.v1+json"  # of the layer that holds the payload
ANNOTATION: Final = "dev.cosignproject.cosign/signature"  # of that layer: the signature in base64
PASSWORD: Final = "COSIGN_PASSWORD"  # noqa: S105 - of the environment: what opens a private key
_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
_CURVE: Final = "secp256r1"  # P-256
_PAYLOAD_MAX: Final = 1 << 20
_KEY_MAX: Final = 1 << 16


def payload(digest: str, reference: str) -> bytes:
    """What is signed: that this is the manifest's digest, and which name it was given."""
    if not _DIGEST.fullmatch(digest):
        raise InputError(f"{quote(digest)} is no digest of a manifest", hint="sha256: and 64 digits")
    critical = {
        "identity": {"docker-reference": reference}, "image": {"docker-manifest-digest": digest}, "type": TYPE,
    }  # fmt: skip
    return json.dumps({"critical": critical, "optional": None}, separators=(",", ":")).encode()


def check_payload(data: bytes, digest: str) -> str:
    """The name that a signed payload gives this manifest; InputError when it is about another, or about nothing."""
    document = _document(data)
    try:
        critical = document["critical"]
        kind, signed = critical["type"], critical["image"]["docker-manifest-digest"]
        reference = critical["identity"]["docker-reference"]
    except (KeyError, TypeError):
        raise InputError("the signature's payload does not say what it is about") from None
    if kind != TYPE:
        raise InputError(f"the signature is a {quote(str(kind)[:100])}, not a {TYPE}")
    if signed != digest:
        raise InputError(f"the signature is over {quote(str(signed)[:100])}, not over {digest}")
    return str(reference)


def sign(data: bytes, key: ec.EllipticCurvePrivateKey) -> bytes:
    """The signature of these bytes, in DER: the same every time."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    return key.sign(data, ec.ECDSA(hashes.SHA256(), deterministic_signing=True))


def verify(data: bytes, signature: bytes, key: ec.EllipticCurvePublicKey) -> None:
    """InputError unless the key's owner signed these bytes."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    try:
        key.verify(signature, data, ec.ECDSA(hashes.SHA256()))
    except InvalidSignature:
        raise InputError("the signature is not by this key, or not over this", hint="is it the right key?") from None


def encode_public_key(key: ec.EllipticCurvePublicKey) -> str:
    """In PEM, as parse_public_key takes it."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def hint(key: ec.EllipticCurvePublicKey) -> str:
    """Which key that is, as sigstore's bundles say it: not to be believed, only to find it again."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return encode(hashlib.sha256(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).digest())


def encode(signature: bytes) -> str:
    """As it stands in an annotation."""
    return base64.b64encode(signature).decode()


def decode(text: str) -> bytes:
    """Out of an annotation."""
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise InputError("the signature is not base64") from None


def read_private_key(path: Path, password: bytes | None = None) -> ec.EllipticCurvePrivateKey:
    """A private key in PEM (PKCS #8, or as `openssl ecparam -genkey` writes it), on P-256.

    A password is for an encrypted one: with another it is not asked for.
    """
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    where, data = quote(str(path)), _read(path)
    if b"BEGIN PUBLIC KEY" in data and b"PRIVATE KEY" not in data:
        raise InputError(f"{where} is a public key, which cannot sign", hint="the private one of the two")
    if b"BEGIN ENCRYPTED SIGSTORE PRIVATE KEY" in data or b"BEGIN ENCRYPTED COSIGN PRIVATE KEY" in data:
        raise InputError(
            f"{where} is a key in cosign's own encryption", hint="openssl ecparam -name prime256v1 -genkey"
        )
    try:
        key = load_pem_private_key(data, password if b"ENCRYPTED" in data else None)
    except TypeError:
        raise InputError(
            f"cannot read the private key {where}: it is encrypted, and no password was given", hint=f"{PASSWORD}=…"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{where} holds no private key in PEM, or another password opens it") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != _CURVE:
        raise InputError(f"{where} is no key for ECDSA over P-256", hint="openssl ecparam -name prime256v1 -genkey")
    return key


def read_public_key(path: Path) -> ec.EllipticCurvePublicKey:
    """A public key in PEM, on P-256: cosign.pub is one."""
    _need_cryptography()
    return parse_public_key(_read(path), quote(str(path)))


def parse_public_key(data: bytes, where: str) -> ec.EllipticCurvePublicKey:
    """The same of what stands in such a file."""
    _need_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY-----" in data:
        raise InputError(
            f"{where} is a private key, which nobody else should have", hint="openssl pkey -in KEY -pubout"
        )
    try:
        key = load_pem_public_key(data)
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"{where} holds no public key in PEM", hint="openssl pkey -in KEY -pubout") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != _CURVE:
        raise InputError(f"{where} is no key for ECDSA over P-256", hint="openssl ecparam -name prime256v1 -genkey")
    return key


def _need_cryptography() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise HostError(
            "signatures need the package cryptography", hint="pip install 'CHECKOUT[sign]' (osbuilder's source)"
        ) from None


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_KEY_MAX)
    except OSError as problem:
        raise InputError(f"cannot read the key {quote(str(path))}: {problem.strerror}") from None


def _document(data: bytes) -> Any:  # Any: JSON that others wrote
    if len(data) > _PAYLOAD_MAX:
        raise InputError(f"a signature's payload of {len(data)} bytes; at most {_PAYLOAD_MAX} are read")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise InputError("the signature's payload is not JSON") from None
