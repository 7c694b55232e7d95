"""Signatures over a manifest's digest; openssl is the other reader, and the other writer."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from osbuild import signing
from osbuild.errors import InputError
from tests.keys import key as key  # a fixture
from tests.keys import openssl

pytest.importorskip("cryptography")
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")

DIGEST = f"sha256:{'ab' * 32}"
PAYLOAD = signing.payload(DIGEST, "registry.example.com/guest:1")


def test_openssl_verifies_what_we_sign(key: Path, tmp_path: Path) -> None:
    (tmp_path / "payload").write_bytes(PAYLOAD)
    (tmp_path / "signature").write_bytes(signing.sign(PAYLOAD, signing.read_private_key(key)))
    words = ("dgst", "-sha256", "-verify", str(tmp_path / "key.pub"), "-signature", str(tmp_path / "signature"))
    assert openssl(*words, str(tmp_path / "payload")).stdout == "Verified OK\n"
    (tmp_path / "payload").write_bytes(PAYLOAD + b" ")
    assert openssl(*words, str(tmp_path / "payload"), check=False).returncode != 0


def test_we_verify_what_openssl_signs(key: Path, tmp_path: Path) -> None:
    (tmp_path / "payload").write_bytes(PAYLOAD)
    openssl("dgst", "-sha256", "-sign", str(key), "-out", str(tmp_path / "signature"), str(tmp_path / "payload"))
    signature, public = (tmp_path / "signature").read_bytes(), signing.read_public_key(tmp_path / "key.pub")
    signing.verify(PAYLOAD, signing.decode(signing.encode(signature)), public)
    for data, wrong in ((PAYLOAD + b" ", signature), (PAYLOAD, signature[:-1]), (PAYLOAD, b"")):
        with pytest.raises(InputError, match="not by this key"):
            signing.verify(data, wrong, public)


def test_the_same_payload_has_the_same_signature(key: Path) -> None:
    private = signing.read_private_key(key)
    assert signing.sign(PAYLOAD, private) == signing.sign(PAYLOAD, private)


@pytest.mark.parametrize("form", [("pkcs8", "-topk8", "-nocrypt"), ("ec",)], ids=["PKCS 8", "SEC 1"])
def test_both_forms_of_a_key_are_read(form: tuple[str, ...], key: Path, tmp_path: Path) -> None:
    openssl(*form, "-in", str(key), "-out", str(tmp_path / "other"))
    one, two = (signing.read_private_key(path) for path in (key, tmp_path / "other"))
    assert one.private_numbers() == two.private_numbers()


def test_a_key_with_a_password_takes_the_right_one(key: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    openssl("pkcs8", "-topk8", "-in", str(key), "-passout", "pass:right", "-out", str(locked))
    assert signing.read_private_key(locked, b"right").private_numbers()
    for password, complaint in ((None, "no password was given"), (b"wrong", "another password")):
        with pytest.raises(InputError, match=complaint):
            signing.read_private_key(locked, password)
    assert signing.read_private_key(key, b"any").private_numbers(), "one that is not locked needs none"


def test_of_two_keys_the_wrong_one_is_called_what_it_is(key: Path) -> None:
    public = key.with_suffix(".pub")
    with pytest.raises(InputError, match="is a public key, which cannot sign"):
        signing.read_private_key(public)
    with pytest.raises(InputError, match="is a private key"):
        signing.read_public_key(key)
    with pytest.raises(InputError, match="cannot read the key"):
        signing.read_public_key(key.with_name("absent"))


def test_the_payload_is_what_cosign_writes() -> None:
    assert json.loads(PAYLOAD) == {
        "critical": {
            "identity": {"docker-reference": "registry.example.com/guest:1"},
            "image": {"docker-manifest-digest": DIGEST},
            "type": "cosign container image signature",
        },
        "optional": None,
    }
    assert signing.check_payload(PAYLOAD, DIGEST) == "registry.example.com/guest:1"
    with pytest.raises(InputError, match="no digest"):
        signing.payload("sha256:ab", "name")


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (signing.payload(f"sha256:{'cd' * 32}", "x"), "not over"),
        (PAYLOAD.replace(b"cosign container", b"another"), "not a cosign"),
        (b"{}", "does not say"),
        (b"[]", "does not say"),
        (b'{"critical": []}', "does not say"),
        (b"{", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff", "not JSON"),
        (b" " * (2 << 20), "at most"),
    ],
    ids=["another image", "another type", "empty", "a list", "a list inside", "cut short", "deep", "bytes", "huge"],
)
def test_a_payload_about_something_else_is_refused(data: bytes, complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        signing.check_payload(data, DIGEST)


@pytest.mark.parametrize("text", ["", "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", "P-384", "RSA"])
def test_what_is_no_p256_key_is_refused(text: str, tmp_path: Path) -> None:
    private, public = tmp_path / "private", tmp_path / "public"
    made = {
        "P-384": ("ecparam", "-name", "secp384r1", "-genkey", "-noout", "-out", str(private)),
        "RSA": ("genrsa", "-out", str(private), "1024"),
    }
    if text in made:
        openssl(*made[text])
        openssl("pkey", "-in", str(private), "-pubout", "-out", str(public))
    else:
        private.write_text(text)
        public.write_text(text)
    for read, path in ((signing.read_private_key, private), (signing.read_public_key, public)):
        with pytest.raises(InputError, match=str(path)):
            read(path)


def test_a_key_in_cosigns_encryption_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "cosign.key").write_text("-----BEGIN ENCRYPTED SIGSTORE PRIVATE KEY-----\nAAAA\n")
    with pytest.raises(InputError, match="cosign's own encryption"):
        signing.read_private_key(tmp_path / "cosign.key")


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from pathlib import Path; from osbuild import errors, signing\n"
        "try: signing.read_public_key(Path('key.pub'))\n"
        "except errors.HostError as problem: print(problem.hint)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "pip install 'CHECKOUT[sign]' (osbuilder's source)\n"
