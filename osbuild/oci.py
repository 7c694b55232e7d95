"""The OCI image specification's words, parsed and checked: references, digests, manifests, configs. No I/O.

Sources: OCI image-spec v1.1 (descriptor.md, manifest.md, image-index.md, config.md), Docker image manifest v2
schema 2, and skopeo's transport words (containers-transports(5)).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from osbuild.errors import InputError, SpecError
from osbuild.tree import quote

JSON_MAX: Final = 4 << 20  # bytes of a manifest, index or config
_JSON_DEPTH: Final = 100

_DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}\Z")
# Brackets, and strings whole. A string may be cut off: so none of it is ever tried as the start of another one.
_STRUCTURE: Final = re.compile(r'[\[\]{}]|"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_REPOSITORY: Final = re.compile(r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*(?:/[a-z0-9]+(?:[._-]+[a-z0-9]+)*)*\Z")
_HOST: Final = re.compile(r"(?:[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?\Z")
_TAG: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_PORT: Final = re.compile(r":[0-9]{1,5}\Z")
_ABOUT_DIGEST: Final = re.compile(r"sha[0-9]+:[^/@]*\Z", re.IGNORECASE)  # right or wrong, it is meant as one
# Behind a word that is nearly a source's: a port, a version, or a tag of Docker's own image (hub.docker.com/_/docker).
_PORT_OR_VERSION: Final = re.compile(r"[0-9]{1,5}/|(?:v?[0-9][\w.-]*|(?:cli|dind|git|latest|rc)(?:-[\w.-]*)?)\Z")
_OTHER_WORDS: Final[Mapping[str, str]] = {
    "oci-archive": "oci",
    "oci-dir": "oci",
    "oci-layout": "oci",
    "directory": "dir",
}

DOCKER_HUB: Final = "docker.io"
HUB_NAMES: Final = frozenset((DOCKER_HUB, "index.docker.io", "registry-1.docker.io"))

INDEX_TYPES: Final = frozenset(
    ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
)
MANIFEST_TYPES: Final = frozenset(
    ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
)
CONFIG_TYPES: Final = frozenset(
    ("application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json")
)
LAYER_TYPES: Final[Mapping[str, str]] = {  # media type -> how it is compressed
    "application/vnd.oci.image.layer.v1.tar": "none",
    "application/vnd.oci.image.layer.v1.tar+gzip": "gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd": "zstd",
    "application/vnd.docker.image.rootfs.diff.tar": "none",
    "application/vnd.docker.image.rootfs.diff.tar.gzip": "gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd": "zstd",
}

_BASE_VARIANTS: Final = {"amd64": "v1", "arm": "v7", "arm64": "v8"}  # containerd's: what no variant stands for

# A JSON document; Any because it comes from outside and every use checks what it finds.
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Where an image is: skopeo's transport word, and what that transport calls the image."""

    transport: str  # a row of sources.SOURCES; empty when the user named none
    name: str  # a repository, or a path
    tag: str = ""
    digest: str = ""  # of two, this one counts

    def __str__(self) -> str:
        text = _spelled(self.transport) + self.name + (f":{self.tag}" if self.tag else "")
        return text + (f"@{self.digest}" if self.digest else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """What an image runs on; an empty variant matches every one."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)

    def matches(self, wanted: Platform) -> bool:
        """Whether an image for this platform is what was asked for."""
        same = (self.os, self.architecture) == (wanted.os, wanted.architecture)
        return same and (not wanted.variant or wanted.variant == self.variant)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descriptor:
    """A blob by type, digest and size."""

    media_type: str
    digest: str
    size: int
    annotations: Mapping[str, str]
    platform: Platform | None = None

    @property
    def blob(self) -> tuple[str, str, int]:
        """Which bytes these are, and how they are to be read."""
        return self.media_type, self.digest, self.size

    @classmethod
    def of(cls, data: bytes, media_type: str) -> Descriptor:
        """Of bytes that are at hand."""
        return cls(media_type=media_type, digest=digest(data), size=len(data), annotations={})

    def to_dict(self) -> Json:
        """As JSON, without annotations and platform."""
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


def digest(data: bytes) -> str:
    """What a registry calls these bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def encode(document: Json) -> bytes:
    """A document as it is put into a registry: the same bytes for the same document."""
    return json.dumps(document, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One image: its config, and its layers from the lowest up."""

    config: Descriptor
    layers: tuple[Descriptor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """The parts of an image's config that we use; `document` is all of it."""

    platform: Platform
    diff_ids: tuple[str, ...]
    document: Json


def parse_platform(text: str) -> Platform:
    """`linux/arm64` or `linux/arm/v7`."""
    parts = text.split("/")
    if len(parts) not in (2, 3) or not all(re.fullmatch(r"[a-z0-9_.-]+", part) for part in parts):
        raise SpecError(f"no platform {quote(text)}", hint="OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT: linux/amd64")
    if parts[0] != "linux":
        raise SpecError(f"no guests for {quote(parts[0])}", hint="linux/ARCHITECTURE")
    return Platform(os=parts[0], architecture=parts[1], variant=parts[2] if len(parts) == 3 else "")


def choose_platform(found: Sequence[Descriptor], wanted: Platform, where: str) -> Descriptor:
    """The descriptor for a platform; InputError says which platforms there are.

    As containerd does it: of several, when no variant is asked for, the first of the architecture's base variant.
    """
    if len(found) == 1 and found[0].platform is None:  # the config will say
        return found[0]
    matching = [(item.platform.variant, item) for item in found if item.platform and item.platform.matches(wanted)]
    if not matching:
        names = sorted({str(item.platform) for item in found if item.platform and item.platform.os != "unknown"})
        raise InputError(
            f"{where}: no image for {wanted} in this index", hint=f"there are: {', '.join(map(quote, names)) or 'none'}"
        )
    base = ("", _BASE_VARIANTS.get(wanted.architecture, ""))
    for variant, item in matching:
        if wanted.variant or variant in base:
            return item
    variants = sorted({variant for variant, _ in matching})
    if len(variants) > 1:
        raise InputError(
            f"{where}: {wanted} comes in {len(variants)} variants, none of them the ordinary one",
            hint=f"--platform {wanted}/VARIANT: {', '.join(map(quote, variants))}",
        )
    return matching[0][1]


def parse_reference(text: str, transports: frozenset[str]) -> Reference:
    """`docker-daemon:debian:12`, `docker://debian:12`, `oci:DIR[:TAG]`, `dir:PATH`; a bare name has no transport."""
    head, colon, rest = text.partition(":")
    if not text:
        raise SpecError("no image is named ''")
    if text != text.strip() or "\0" in text:
        raise SpecError("an image's name has no space at its ends, and no zero byte")
    # docker:27 is Docker's own image on Docker Hub.
    if colon and head in transports and (head != "docker" or not rest or rest.startswith("//")):
        return _of_transport(head, rest.removeprefix("//") if head == "docker" else rest)
    if text in (".", "..") or text.startswith(("/", "./", "../")):
        path = shown(text)
        raise SpecError(
            f"{quote(text)} is a path", hint=f"say what it is: dir:{path}, oci:{path}, docker-archive:{path}"
        )
    _refuse_user(text)
    if colon:
        _refuse_misspelt(head, rest, transports)
    if "://" in text or re.match(r"[a-z-]+:[./]", text):
        raise SpecError(f"no source {quote(head)}", hint=f"one of {' '.join(map(_spelled, sorted(transports)))}")
    return _repository("", text)


def _of_transport(transport: str, rest: str) -> Reference:
    if not rest:
        raise SpecError(f"{_spelled(transport)} names no image", hint=f"write {_spelled(transport)}NAME")
    if transport in ("docker-daemon", "docker"):
        return _repository(transport, rest)
    if transport == "oci":
        path, _, tag = rest.rpartition(":")
        if path and "/" not in tag:
            return Reference(transport=transport, name=path, tag=tag)
    return Reference(transport=transport, name=rest)


def _refuse_misspelt(word: str, rest: str, transports: frozenset[str]) -> None:
    """SpecError for what would be an image name, but begins as a source does, or nearly so."""
    if _PORT_OR_VERSION.match(rest) or "/" in word:
        return
    near = difflib.get_close_matches(word.lower(), sorted(transports), 1, 0.9 if len(word) > 4 else 0.8)
    meant = _OTHER_WORDS.get(word, near[0] if near else "")
    if meant not in transports:
        return
    rest = shown(rest.lstrip("/") if meant == "docker" else rest)
    hint = f"did you mean {_spelled(meant)}{rest}?"
    if "docker" in transports and _REPOSITORY.match(word) and _TAG.match(rest):
        hint += f" (an image really called that: docker://{word}:{rest})"
    raise SpecError(f"{quote(word + ':')} is no source", hint=hint)


def _refuse_user(text: str) -> None:
    """SpecError, which repeats none of it, for a user name or password before a host."""
    _, at, after = text.partition("@")
    if at and not _ABOUT_DIGEST.match(after):
        raise SpecError(
            "no user name and no password can be in an image's name",
            hint="docker login HOST, or --authfile FILE; what may follow an @ is a digest, sha256:…",
        )


def _spelled(transport: str) -> str:
    return {"": "", "docker": "docker://"}.get(transport, f"{transport}:")


def shown(text: str) -> str:
    """The user's own words in a hint: to be copied, unless a terminal would obey them."""
    return text if text.isprintable() else quote(text)


def registry_of(name: str) -> tuple[str, str]:
    """The registry (HOST[:PORT]; docker.io when none is named) and the repository there, by Docker's rules."""
    host, slash, path = name.partition("/")
    if not slash or not _is_host(host):
        host, path = DOCKER_HUB, name
    if host in HUB_NAMES:
        return DOCKER_HUB, path if "/" in path else f"library/{path}"
    return host, path


def names_host(text: str) -> bool:
    """Whether a registry is named, and Docker Hub is not merely what is left."""
    first, slash, _ = text.partition("/")
    return text.startswith("docker://") or (bool(slash) and _is_host(first))


def repository_on(host: str, text: str) -> str:
    """A repository of this registry, named with or without it; SpecError for another's, and for what is no name."""
    _refuse_user(text)
    first, slash, _ = text.partition("/")
    named, path = registry_of(text if slash and _is_host(first) else f"{host}/{text}")
    if named != host:
        raise SpecError(f"{quote(text)} is not of the same registry", hint=f"{host}/REPO, or REPO alone")
    if not _REPOSITORY.match(path):
        raise SpecError(f"{quote(text)} is no repository's name", hint=f"{host}/REPO, or REPO alone, without a tag")
    return path


def parse_mirror(text: str) -> tuple[str, str]:
    """`HOST[:PORT][/PREFIX]`: a registry, and what comes before the names of its repositories."""
    host, _, path = text.removeprefix("https://").rstrip("/").partition("/")
    if not _HOST.match(host) or (path and not _REPOSITORY.match(path)):
        said = "what holds an @" if "@" in text else quote(text)  # a password might stand before it
        raise SpecError(f"{said} is no mirror", hint="HOST[:PORT] or HOST[:PORT]/PREFIX")
    return host, f"{path}/" if path else ""


def _is_host(text: str) -> bool:
    return bool(_HOST.match(text)) and (text == "localhost" or any(mark in text for mark in ".:"))


def _repository(transport: str, text: str) -> Reference:
    _refuse_user(text)
    name, at, digest = text.partition("@")
    if at and not _DIGEST.match(digest):
        raise SpecError(f"{quote(digest)} is no digest", hint="sha256: and 64 hex digits in lower case")
    if transport == "docker" and _is_only_host(name):
        host = name.rstrip("/")
        raise SpecError(f"{quote(host)} is a registry, and no image of it is named", hint=f"docker://{host}/NAME")
    tag = "" if digest else "latest"
    if ":" in name.rpartition("/")[2]:
        name, _, tag = name.rpartition(":")
    host, slash, path = name.partition("/")
    plain = path if slash and _is_host(host) else name
    # An image ID is a name of its own kind to the daemon.
    if not _REPOSITORY.match(plain):
        lower = plain.lower()
        if not _REPOSITORY.match(lower):
            raise SpecError(f"{quote(text)} is no image name", hint="NAME[:TAG] or NAME@sha256:…")
        right = name.removesuffix(plain) + lower + text[len(name) :]
        raise SpecError(
            f"{quote(text)} is no image name: names are lower case", hint=f"{_spelled(transport)}{shown(right)}"
        )
    if not _TAG.match(tag) and not (digest and not tag):
        raise SpecError(
            f"{quote(text)} is no image name: {quote(tag)} is no tag",
            hint="a tag is letters, digits, '_', '.' and '-', at most 128, and begins with none of the last two",
        )
    return Reference(transport=transport, name=name, tag=tag, digest=digest)


def _is_only_host(name: str) -> bool:
    """Whether that is a registry's address without an image: no image on Docker Hub itself has a dot in its name."""
    host = _PORT.sub("", name.rstrip("/"))
    return bool(_HOST.match(host)) and (host == "localhost" or "." in host or host.startswith("["))


def check_digest(text: object, where: str) -> str:
    """A digest that is exactly `sha256:` and 64 lower-case hex digits; it becomes part of paths, so nothing else."""
    if not isinstance(text, str) or not _DIGEST.match(text):
        raise InputError(f"{where}: {quote(str(text)[:100])} is not a sha256 digest")
    return text


def parse_json(data: bytes, where: str) -> Json:
    """A JSON object of bounded size and depth."""
    value = _parsed(data, where)
    if not isinstance(value, dict):
        raise InputError(f"{where}: not a JSON object")
    return value


def parse_json_objects(data: bytes, where: str) -> list[Json]:
    """A JSON list of objects, of bounded size and depth."""
    value = _parsed(data, where)
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise InputError(f"{where}: not a list of JSON objects")
    return value


def _parsed(data: bytes, where: str) -> object:
    """JSON as RFC 8259 has it between machines: in UTF-8 and nothing else, whatever json.loads would make of it."""
    if len(data) > JSON_MAX:
        raise InputError(f"{where}: {len(data)} bytes of JSON are more than {JSON_MAX}")
    try:
        text = data.decode()
    except UnicodeDecodeError as problem:
        raise InputError(f"{where}: not JSON: byte {problem.start} is no UTF-8") from None
    # The parser recurses, so brackets are counted before it starts; those inside strings are none.
    depth = 0
    for found in _STRUCTURE.finditer(text):
        mark = text[found.start()]
        depth += 1 if mark in "[{" else -1 if mark in "]}" else 0
        if depth > _JSON_DEPTH:
            raise InputError(f"{where}: JSON nested more than {_JSON_DEPTH} deep")
    try:
        return json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite)
    except ValueError as problem:
        raise InputError(f"{where}: not JSON: {problem}") from None


def _object(pairs: list[tuple[str, Any]]) -> Json:
    """What a name means that stands twice, parsers do not agree on."""
    found = dict(pairs)
    if len(found) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{quote(twice[:60])} stands twice in an object")
    return found


def _finite(text: str) -> float:
    """A number that can be written as JSON again: CPython would take NaN, Infinity and 1e999."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no number")
    return number


def parse_descriptor(value: object, where: str) -> Descriptor:
    """A descriptor with a digest we know, a size that is one, and a media type."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: a descriptor is missing")
    _refuse_alike(value, where)
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise InputError(f"{where}: size {quote(str(size)[:40])} in a descriptor")
    media_type = value.get("mediaType")
    if not isinstance(media_type, str):
        raise InputError(f"{where}: a descriptor without a media type")
    annotations = value.get("annotations") or {}
    if not isinstance(annotations, dict):
        raise InputError(f"{where}: annotations that are no object")
    platform = value.get("platform")
    found = None
    if isinstance(platform, dict):
        found = Platform(
            os=str(platform.get("os", "")),
            architecture=str(platform.get("architecture", "")),
            variant=str(platform.get("variant", "")),
        )
    return Descriptor(
        media_type=media_type,
        digest=check_digest(value.get("digest"), where),
        size=size,
        annotations={str(key): str(text) for key, text in annotations.items()},
        platform=found,
    )


def _versioned(data: bytes, kinds: frozenset[str], where: str) -> Json:
    """An index or a manifest that does not itself claim to be something else."""
    document = parse_json(data, where)
    if document.get("schemaVersion") != 2:
        raise InputError(f"{where}: schemaVersion is not 2")
    _refuse_alike(document, where)
    kind = document.get("mediaType")
    if kind is not None and not (isinstance(kind, str) and kind in kinds):
        raise InputError(f"{where}: calls itself {quote(str(kind)[:100])}, but was named as something else")
    return document


def _refuse_alike(document: Json, where: str) -> None:
    """Go's parser, which most readers of images use, makes no difference between `layers` and `Layers`."""
    if len({name.lower() for name in document}) < len(document):
        raise InputError(f"{where}: two names in one object that differ in capitals only")


def parse_index(data: bytes, where: str) -> tuple[Descriptor, ...]:
    """The descriptors of an image index."""
    document = _versioned(data, INDEX_TYPES, where)
    if "layers" in document or "config" in document:
        raise InputError(f"{where}: both an index and a manifest")
    manifests = document.get("manifests")
    if not isinstance(manifests, list):
        raise InputError(f"{where}: an index without manifests")
    return tuple(parse_descriptor(item, where) for item in manifests)


def parse_manifest(data: bytes, where: str) -> Manifest:
    """An image manifest whose config and layers are of types we know."""
    document = _versioned(data, MANIFEST_TYPES, where)
    if "manifests" in document:
        raise InputError(f"{where}: both an index and a manifest")
    config = parse_descriptor(document.get("config"), where)
    if config.media_type not in CONFIG_TYPES:
        raise InputError(f"{where}: {quote(config.media_type)} is not an image's config")
    layers = document.get("layers")
    if not isinstance(layers, list) or not layers:
        raise InputError(f"{where}: an image without layers")
    parsed = tuple(parse_descriptor(item, where) for item in layers)
    for layer in parsed:
        if layer.media_type not in LAYER_TYPES:
            raise InputError(f"{where}: unknown layer type {quote(layer.media_type)}")
    return Manifest(config=config, layers=parsed)


def parse_config(data: bytes, where: str) -> ImageConfig:
    """An image's config: platform, and the digests of its layers when uncompressed."""
    document = parse_json(data, where)
    _refuse_alike(document, where)
    rootfs = document.get("rootfs")
    if not isinstance(rootfs, dict) or rootfs.get("type") != "layers":
        raise InputError(f"{where}: a config without rootfs layers")
    diff_ids = rootfs.get("diff_ids")
    if not isinstance(diff_ids, list) or not diff_ids:
        raise InputError(f"{where}: an image without layers")
    return ImageConfig(
        platform=Platform(
            os=str(document.get("os", "")),
            architecture=str(document.get("architecture", "")),
            variant=str(document.get("variant", "")),
        ),
        diff_ids=tuple(check_digest(item, where) for item in diff_ids),
        document=document,
    )
