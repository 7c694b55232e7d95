"""Keys to sign with, as openssl makes them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def openssl(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["openssl", *words], check=check, capture_output=True, text=True)


def make_key(path: Path, curve: str = "prime256v1") -> Path:
    """A private key; beside it its public one, with the suffix .pub."""
    openssl("ecparam", "-name", curve, "-genkey", "-noout", "-out", str(path))
    openssl("pkey", "-in", str(path), "-pubout", "-out", str(path.with_suffix(".pub")))
    return path


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return make_key(tmp_path / "key.pem")


def verified_by_openssl(data: bytes, signature: bytes, public: Path) -> bool:
    """Whether openssl says so."""
    for suffix, content in ((".data", data), (".sig", signature)):
        public.with_suffix(suffix).write_bytes(content)
    words = ("-verify", str(public), "-signature", str(public.with_suffix(".sig")), str(public.with_suffix(".data")))
    return openssl("dgst", "-sha256", *words, check=False).stdout == "Verified OK\n"
