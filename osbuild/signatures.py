"""Signatures put into a registry, beside what they are over: in cosign's first form, and as a sigstore bundle.

Readers of today know one or the other: containers/image (skopeo, podman) and cosign before 3 the first, cosign from 3
on the second. What others signed stays where it is; what is there already is not put again. Two who sign the same
manifest at the same moment may lose one signature of the two: a tag cannot be changed on a condition.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from osbuild import bundles, oci, referrers, signing, verification
from osbuild.distribution import Repository
from osbuild.errors import InputError
from osbuild.publication import IMAGE_INDEX, IMAGE_MANIFEST
from osbuild.uploads import InMemory, Uploads

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

_CONFIG_TYPE: Final = "application/vnd.oci.image.config.v1+json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signed:
    """A manifest with our signatures."""

    digest: str
    changed: bool  # there was a signature to put

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"digest": self.digest, "changed": self.changed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Signer:
    """Who signs."""

    key: ec.EllipticCurvePrivateKey

    @classmethod
    def of(cls, path: Path) -> Signer:
        """The owner of a private key in a file; COSIGN_PASSWORD opens an encrypted one."""
        password = os.environ.get(signing.PASSWORD)
        return cls(key=signing.read_private_key(path, password.encode() if password else None))

    @property
    def public(self) -> str:
        """What tells others whose signature it is, in PEM."""
        return signing.encode_public_key(self.key.public_key())

    def check(self, there: Repository, name: str, others: Sequence[oci.Descriptor]) -> None:
        """InputError unless this key signed all of these under this name, or under none: an index vouches for them."""
        for each in others:
            try:
                verification.look_for(there, each.digest, self.key.public_key(), name)
            except InputError as problem:
                raise InputError(
                    f"{each.platform} of this index would be vouched for, too: {problem}",
                    hint="publish all of its builds at once, without --add, or this one with --sign first",
                ) from None

    def sign(self, uploads: Uploads, name: str, manifests: Sequence[oci.Descriptor]) -> tuple[Signed, ...]:
        """Manifests that are there, under the name that they will have; one that is named twice, once."""
        once = {each.digest: each for each in manifests}
        return tuple(self._sign(uploads, name, each) for each in once.values())

    def _sign(self, uploads: Uploads, name: str, manifest: oci.Descriptor) -> Signed:
        attached = self._put_payload(uploads, name, manifest.digest)
        referring = self._put_bundle(uploads, name, manifest)
        return Signed(digest=manifest.digest, changed=attached or referring)

    def _put_payload(self, uploads: Uploads, name: str, digest: str) -> bool:
        """cosign's first form: one layer more in the manifest of signatures."""
        payload = signing.payload(digest, name)
        found = referrers.signatures(uploads.repository, digest)
        document, layers = found or ({"schemaVersion": 2, "mediaType": IMAGE_MANIFEST}, [])
        if any(self._is_mine(layer, payload) for layer in layers):
            return False
        layer = oci.Descriptor.of(payload, signing.PAYLOAD_TYPE)
        uploads.put(layer, InMemory(payload))
        signature = signing.encode(signing.sign(payload, self.key))
        layers = [*layers, layer.to_dict() | {"annotations": {signing.ANNOTATION: signature}}]
        config = _config(layers)
        described = oci.Descriptor.of(config, _CONFIG_TYPE)
        uploads.put(described, InMemory(config))
        document |= {"config": described.to_dict(), "layers": layers}
        kind = str(document.get("mediaType", IMAGE_MANIFEST))
        return uploads.put_manifest(referrers.signature_tag(digest), oci.encode(document), kind)

    def _is_mine(self, layer: oci.Json, payload: bytes) -> bool:
        """Whether a layer is this payload, with a signature of this key: not always the one that we would make."""
        if layer.get("digest") != oci.digest(payload):
            return False
        try:
            verification.check_layer(layer, payload, self.key.public_key())
        except InputError:
            return False
        return True

    def _put_bundle(self, uploads: Uploads, name: str, manifest: oci.Descriptor) -> bool:
        """The bundle, and its manifest; registries that keep no account of referrers get it told by a tag."""
        bundle = bundles.make(manifest.digest, name, self.key)
        data = bundles.referrer(bundle, manifest)
        row = bundles.row(data)
        if _has(referrers.listed(uploads.repository, manifest.digest), row):
            return False
        document, rows = referrers.tagged(uploads.repository, manifest.digest) or (
            {"schemaVersion": 2, "mediaType": IMAGE_INDEX, "manifests": []}, [],
        )  # fmt: skip
        if _has(rows, row):
            return False
        uploads.put(bundles.layer_of(bundle), InMemory(bundle))
        uploads.put(bundles.config(), InMemory(bundles.EMPTY))
        if not uploads.put_referrer(row["digest"], data, IMAGE_MANIFEST):
            index = oci.encode(document | {"manifests": [*rows, row]})
            uploads.put_manifest(referrers.referrers_tag(manifest.digest), index, IMAGE_INDEX)
        return True


def _has(rows: list[oci.Json] | None, row: oci.Json) -> bool:
    return any(each.get("digest") == row["digest"] for each in rows or ())


def _config(layers: Sequence[oci.Json]) -> bytes:
    """The config that image tools ask for; as cosign makes it, without a date."""
    return oci.encode({
        "architecture": "", "created": "0001-01-01T00:00:00Z", "os": "", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [layer.get("digest") for layer in layers]},
    })  # fmt: skip
