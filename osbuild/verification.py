"""Whether a key's owner signed what a reference names: every place is asked where a signature of it may lie.

Nothing here is believed but the key: a registry can hide a signature, and cannot make one. It can also name another
build that the same key signed, by moving a tag; so the name that was signed is told, and a digest in the reference
leaves no choice. As cosign does it, a different name is no refusal: images are copied from registry to registry.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from osbuild import bundles, oci, publication, referrers, signing
from osbuild.cache import Cache
from osbuild.console import Show
from osbuild.distribution import Repository
from osbuild.errands import Errands
from osbuild.errors import InputError, SpecError
from osbuild.registry_spec import RegistrySpec
from osbuild.sources.image import Want
from osbuild.sources.registry import Pull
from osbuild.transport import Patience, Web
from osbuild.tree import quote

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec

PATIENCE: Final = Patience()
SIGNATURES_MAX: Final = 64  # looked at in each place, the newest: a build that stays the same may have many names
_BYTES_MAX: Final = 1 << 20  # of a payload or a bundle
_BUNDLES: Final = "application/vnd.dev.sigstore.bundle"  # what the types of all versions begin with
_PREDICATE: Final = "dev.sigstore.bundle.predicateType"
_REASONS_MAX: Final = 3
_HINT: Final = "osbuilder publish --sign KEY, or cosign sign --key KEY"


@dataclass(frozen=True, slots=True, kw_only=True)
class Signature:
    """A good one."""

    road: str  # where it was
    name: str  # under which this was signed; empty when the signature says none
    other: bool  # … which is not the one that was asked for

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"road": self.road, "name": self.name, "other_name": self.other}


@dataclass(frozen=True, slots=True, kw_only=True)
class Verified:
    """What a key's owner signed."""

    reference: str
    digest: str
    signatures: tuple[Signature, ...]
    problems: tuple[str, ...] = ()  # of other signatures

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "reference": self.reference, "digest": self.digest,
            "signatures": [each.to_dict() for each in self.signatures], "problems": list(self.problems),
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        about = {True: ", which is another name than the one asked for", False: ""}
        return [
            f"{self.reference} is signed: {self.digest}",
            *(
                f"  {each.road}: as {each.name}{about[each.other]}" if each.name else f"  {each.road}: under no name"
                for each in self.signatures
            ),
        ]


@dataclass(slots=True)
class _Looked:
    """What was found so far."""

    names: list[tuple[str, str]] = field(default_factory=list)  # road, name
    problems: dict[str, None] = field(default_factory=dict)  # in order, each once

    def attempt(self, road: str, check: Callable[[], str]) -> None:
        """Look at one signature: what is wrong with it says nothing about the others."""
        try:
            self.names.append((road, check()))
        except InputError as problem:
            self.problems[f"{road}: {problem}"] = None


def verify(name: str, key: Path, registry: RegistrySpec, cache: Cache, show: Show) -> Verified:
    """Find a good signature of this key over what a reference names; InputError when there is none."""
    public = read_key(key, registry)
    reference = oci.parse_reference(name, frozenset(("docker",)))
    want = Want(platform=oci.Platform(os="linux", architecture=""), cache=cache, registry=registry)
    web = Web(registry, PATIENCE, else_="--mirror HOST=MIRROR")
    with contextlib.closing(web), Errands(1, left=web.left, stop=web.stop) as errands:
        roads = Pull(reference, want, web, artifact=publication.ARTIFACT)
        with show.step(f"asking for {roads.where}"):
            return errands.do(lambda stack: check(roads, roads.top(stack)[0], reference, public))


def read_key(key: Path, registry: RegistrySpec) -> ec.EllipticCurvePublicKey:
    """The key, before anything else is done; SpecError when it could not be used."""
    if registry.offline:
        raise SpecError("--offline asks no registry, and signatures are nowhere else", hint="leave one of the two out")
    return signing.read_public_key(key)


def check(roads: Pull, digest: str, reference: oci.Reference, key: ec.EllipticCurvePublicKey) -> Verified:
    """The same for what was found already: of mirrors and registry, the first that has a good signature is enough."""
    asked = full_name(reference)
    return roads.any_road(lambda road: look(road, digest, roads.where, key, asked))


def look(
    road: Repository, digest: str, where: str, key: ec.EllipticCurvePublicKey, asked: str = ""
) -> Verified:  # fmt: skip
    """Every good signature of this key over a manifest that one registry has; InputError when there is none."""
    found, seen = _Looked(), set[str]()
    for place, rows in (("referrers", _listed), ("referrers tag", _tagged)):
        for row in _last(found, place, _fresh(rows(road, digest, place, found), seen)):
            found.attempt(place, functools.partial(_bundle, road, row, digest, key))
    place = "signature tag"
    for layer in _last(found, place, _expected_last(_layers(road, digest, place, found), digest, asked)):
        found.attempt(place, functools.partial(_payload, road, layer, digest, key))
    if not found.names:
        raise _refused(digest, where, tuple(found.problems))
    signatures = tuple(
        Signature(road=each, name=name, other=bool(name and asked) and not _same(name, asked))
        for each, name in dict.fromkeys(found.names)
    )
    return Verified(reference=where, digest=digest, signatures=signatures, problems=tuple(found.problems))


def look_for(road: Repository, digest: str, key: ec.EllipticCurvePublicKey, name: str) -> Verified:
    """As look, and InputError unless one of them is under this name, or under none.

    Whoever can write to the registry could have put something there that was signed under another name.
    """
    found = look(road, digest, str(road), key, name)
    if all(each.other for each in found.signatures):
        names = ", ".join(dict.fromkeys(quote(each.name[:200]) for each in found.signatures[:3]))
        raise InputError(f"{found.reference}: {found.digest} is signed as {names}, not as {quote(name)}")
    return found


def is_signed(road: Repository, digest: str, key: str, reference: oci.Reference) -> bool:
    """Whether the owner of a public key (in PEM) signed it under the name of this reference, or under none."""
    public = signing.parse_public_key(key.encode(), "the key of --sign")
    try:
        look_for(road, digest, public, full_name(reference))
    except InputError:
        return False
    return True


def full_name(reference: oci.Reference) -> str:
    """HOST/REPOSITORY:TAG, or only HOST/REPOSITORY: what a signature calls it."""
    host, repository = oci.registry_of(reference.name)
    return f"{host}/{repository}" + (f":{reference.tag}" if reference.tag and not reference.digest else "")


def check_layer(layer: oci.Json, payload: bytes, key: ec.EllipticCurvePublicKey) -> None:
    """InputError unless the layer's annotation is this key's signature of its payload."""
    annotations = layer.get("annotations")
    text = annotations.get(signing.ANNOTATION) if isinstance(annotations, dict) else None
    if not isinstance(text, str):
        raise InputError("a payload without a signature")
    signing.verify(payload, signing.decode(text), key)


def _listed(road: Repository, digest: str, place: str, found: _Looked) -> Iterator[oci.Json]:
    with _noted(found, place):
        yield from filter(_is_signature, referrers.listed(road, digest) or ())


def _tagged(road: Repository, digest: str, place: str, found: _Looked) -> Iterator[oci.Json]:
    with _noted(found, place):
        yield from filter(_is_signature, (referrers.tagged(road, digest) or ({}, []))[1])


def _layers(road: Repository, digest: str, place: str, found: _Looked) -> Iterator[oci.Json]:
    with _noted(found, place):
        layers = (referrers.signatures(road, digest) or ({}, []))[1]
        yield from (layer for layer in layers if layer.get("mediaType") == signing.PAYLOAD_TYPE)


@contextlib.contextmanager
def _noted(found: _Looked, place: str) -> Iterator[None]:
    """A place that cannot be read is no reason not to look into the others."""
    try:
        yield
    except InputError as problem:
        found.problems[f"{place}: {problem}"] = None


def _last(found: _Looked, place: str, rows: Iterable[oci.Json]) -> list[oci.Json]:
    """From the end: who signs adds there, and so do registries mostly."""
    newest = list(rows)[::-1]
    if len(newest) > SIGNATURES_MAX:
        found.problems[f"{place}: {len(newest)} signatures, of which the {SIGNATURES_MAX} newest were looked at"] = None
    return newest[:SIGNATURES_MAX]


def _expected_last(layers: Iterable[oci.Json], digest: str, asked: str) -> list[oci.Json]:
    """With those behind all others that are what `publish` signs under this name, however old they are."""
    names = (asked,) if _split(asked)[1] else (asked, f"{asked}:latest")
    payloads = [f"sha256:{hashlib.sha256(signing.payload(digest, name)).hexdigest()}" for name in names]
    return sorted(layers, key=lambda layer: layer.get("digest") in payloads)


def _fresh(rows: Iterable[oci.Json], seen: set[str]) -> Iterator[oci.Json]:
    for row in rows:
        if (digest := str(row.get("digest"))) not in seen:
            seen.add(digest)
            yield row


def _is_signature(row: oci.Json) -> bool:
    """By what the row says of itself: what is called an attestation is not fetched."""
    annotations = row.get("annotations")
    said = annotations.get(_PREDICATE) if isinstance(annotations, dict) else None
    return str(row.get("artifactType")).startswith(_BUNDLES) and said in (None, bundles.PREDICATE)


def _bundle(road: Repository, row: oci.Json, digest: str, key: ec.EllipticCurvePublicKey) -> str:
    manifest = _document(road, "manifests", row, oci.JSON_MAX)
    layers = oci.parse_json(manifest, "the bundle's manifest").get("layers")
    if not isinstance(layers, list) or len(layers) != 1:
        raise InputError("a bundle's manifest without one layer")
    return bundles.check(_document(road, "blobs", layers[0], _BYTES_MAX), digest, key)


def _payload(road: Repository, layer: oci.Json, digest: str, key: ec.EllipticCurvePublicKey) -> str:
    payload = _document(road, "blobs", layer, _BYTES_MAX)
    check_layer(layer, payload, key)
    return signing.check_payload(payload, digest)


def _document(road: Repository, kind: str, described: object, most: int) -> bytes:
    """A manifest or blob of a descriptor, when it is what that says."""
    found = oci.parse_descriptor(described, "a signature")
    if found.size > most:
        raise InputError(f"{found.digest} has {found.size} bytes, more than {most}")
    data = referrers.fetch(road, f"{kind}/{found.digest}", f"signature {found.digest}", most, found.digest)
    if data is None:
        raise InputError(f"{found.digest} is not there")
    return data


def _same(name: str, asked: str) -> bool:
    """Whether that is the name, or as much of it as both say: cosign signs a repository, without a tag."""
    said, wanted = (_split(each) for each in (name, asked))
    return said[0] == wanted[0] and (said[1] == wanted[1] or not (said[1] and wanted[1]))


def _split(name: str) -> tuple[str, str]:
    repository, _, tag = name.partition("@")[0].rpartition(":")
    if not repository or "/" in tag:
        repository, tag = name.partition("@")[0], ""
    return "/".join(oci.registry_of(repository)), tag


def _refused(digest: str, where: str, problems: tuple[str, ...]) -> InputError:
    if not problems:
        return InputError(f"{where}: {digest} has no signature", hint=_HINT)
    more = f", and {len(problems) - _REASONS_MAX} more" if len(problems) > _REASONS_MAX else ""
    return InputError(
        f"{where}: {digest} has no good signature of this key ({'; '.join(problems[:_REASONS_MAX])}{more})",
        hint="is it the right key?",
    )
