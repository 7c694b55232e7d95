"""Whether a tarball was signed by one of the keys that versions.toml names: gpgv does the mathematics.

gpgv takes any key of its keyring, says which primary key it was (VALIDSIG), and only that decides here: a keyring
with other keys in it proves nothing more.
"""

from __future__ import annotations

import base64
import binascii
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.errors import HostError, InputError
from osbuild.kernel_pins import KEYS, VERSIONS, Key
from osbuild.resources import resource

_ARMOR: Final = re.compile(
    r"-----BEGIN PGP PUBLIC KEY BLOCK-----\r?\n(?:[^\n]*: [^\n]*\n)*\s*\n(.*?)(?:^=[^\n]{4}\s*\n)?"
    r"-----END PGP PUBLIC KEY BLOCK-----", re.DOTALL | re.MULTILINE,
)  # fmt: skip
_VALID: Final = re.compile(r"\[GNUPG:\] VALIDSIG .* ([0-9A-F]{40})\s*")
_SAID: Final = re.compile(
    r"^\[GNUPG:\] (BADSIG|ERRSIG|NO_PUBKEY|EXPKEYSIG|REVKEYSIG|EXPSIG|NODATA)\b ?(\S*)", re.MULTILINE
)
_REASONS: Final = {
    "BADSIG": "the signature is not of this file",
    "ERRSIG": "no key here can check the signature",
    "NO_PUBKEY": "no key here can check the signature",
    "EXPKEYSIG": "the key that signed it has expired",
    "REVKEYSIG": "the key that signed it was revoked",
    "EXPSIG": "the signature has expired",
    "NODATA": "the signature file holds no signature",
}  # fmt: skip
_UNPACK: Final = {".xz": "xz", ".gz": "gzip"}


def check(tarball: Path, trusted: tuple[Key, ...], keyring: Path | None) -> Key:
    """Whose valid signature lies beside the tarball; InputError when there is none that counts."""
    unpack = _UNPACK.get(tarball.suffix)
    signed = tarball.with_suffix("") if unpack else tarball
    sign = signed.with_name(f"{signed.name}.sign")
    if not sign.is_file():
        raise InputError(
            f"no signature beside {tarball}: {sign} is missing", hint="kernel.org has it beside the tarball"
        )
    with tempfile.TemporaryDirectory(prefix="osbuilder-keys-") as directory:
        keys = Path(directory) / "keys.gpg"
        keys.write_bytes(b"".join(_keys(keyring, trusted)))
        said = _ask(keys, sign, tarball, unpack)
    valid = _signers(said)
    for key in trusted:
        if key.fingerprint in valid:
            return key
    raise InputError(f"{tarball}: {_reason(said, valid)}", hint=_hint(said, trusted))


def _keys(keyring: Path | None, trusted: Iterable[Key]) -> list[bytes]:
    """What gpgv is to know: binary keys, one after the other."""
    files = [resource(KEYS) / f"{key.fingerprint}.asc" for key in trusted]
    found = [path for path in files if path.is_file()] + ([keyring] if keyring else [])
    if not found:
        raise HostError(
            "there is no public key to check a signature with",
            hint=f"--keyring FILE with the key of one of {', '.join(key.fingerprint for key in trusted)}",
        )
    return [binary(path) for path in found]


def binary(path: Path) -> bytes:
    """The keys of a file, out of their armour if they have one: gpgv reads no other."""
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise InputError(f"cannot read the keyring {path}: {problem.strerror}") from None
    if b"-----BEGIN PGP" not in data:
        return data
    blocks = _ARMOR.findall(data.decode("ascii", errors="replace"))
    try:
        keys = b"".join(base64.b64decode("".join(block.split()), validate=True) for block in blocks)
    except (binascii.Error, ValueError):
        keys = b""
    if not keys:
        raise InputError(f"{path} holds no public key that can be read")
    return keys


def _ask(keys: Path, sign: Path, tarball: Path, unpack: str | None) -> str:
    """What gpgv says, in its words for programs; the tar goes to it through a pipe, unpacked."""
    command.find("gpgv", package="gpgv")
    reader = (unpack, "-dc", str(tarball)) if unpack else ("cat", str(tarball))
    argv = ("gpgv", "--status-fd", "1", "--keyring", str(keys), str(sign), "-")
    with command.start(*reader, pipe=True, merge=False) as source:
        with command.start(*argv, stdin=source.stdout, pipe=True) as process:
            assert process.stdout is not None  # pipe=True
            said = process.stdout.read().decode(errors="replace")
            process.wait()
        if "VALIDSIG" in said and source.wait() != 0:
            raise InputError(f"cannot unpack {tarball}: {reader[0]} exited with {source.returncode}")
    return said


def _signers(said: str) -> set[str]:
    """The primary keys of the good signatures.

    gpgv says VALIDSIG, and exits 0, for keys that were revoked or have expired, too: GOODSIG before it is what counts.
    And a line counts from its start: a key's name, which its owner chose, can hold any of these words.
    """
    found: set[str] = set()
    good = False
    for line in said.splitlines():
        if line.startswith("[GNUPG:] NEWSIG"):
            good = False
        elif line.startswith("[GNUPG:] GOODSIG "):
            good = True
        elif good and (match := _VALID.fullmatch(line)):
            found.add(match[1])
    return found


def _reason(said: str, valid: set[str]) -> str:
    if valid:
        return f"signed by {', '.join(sorted(valid))}, whom {VERSIONS} does not name"
    found = _SAID.search(said)
    if found is None:
        lines = said.strip().splitlines()
        return f"its signature cannot be checked: {lines[-1] if lines else 'gpgv said nothing'}"
    return _REASONS[found[1]] + (f" (key {found[2]})" if found[1] in ("ERRSIG", "NO_PUBKEY") else "")


def _hint(said: str, trusted: Iterable[Key]) -> str:
    if "NO_PUBKEY" in said:
        return "--keyring FILE with the signer's public key: " + ", ".join(f"{k.name} {k.fingerprint}" for k in trusted)
    return ""
