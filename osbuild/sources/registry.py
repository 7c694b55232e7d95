"""`docker://[HOST/]NAME[:TAG][@DIGEST]`: an image of a registry, without a daemon.

A tag is asked for once; from then on everything goes by digest, through the blob store, from whichever of the
registry's mirrors has it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from osbuild import oci
from osbuild.blobs import BLOBS, Blob, Blobs, Fetch
from osbuild.cache import VERSION
from osbuild.distribution import Repository
from osbuild.errands import Errands
from osbuild.errors import HostError, InputError
from osbuild.sources.image import SourceImage, Stack, Want, add_layer, finished, match_layers
from osbuild.transport import Patience, Web
from osbuild.tree import Spool, quote

PATIENCE: Final = Patience()
_THREADS: Final = 3  # layers fetched at a time
_AHEAD: Final = 6  # layers fetched before their turn; each holds a file open
_OTHER_WAYS: Final = "--mirror HOST=MIRROR, --offline, or an image as oci: or docker-archive:"
_NESTING_MAX: Final = 4  # indexes inside indexes

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """An image whose layers are still to be fetched."""

    digest: str  # of the manifest
    manifest: oci.Manifest
    config: oci.ImageConfig


def open_image(reference: oci.Reference, want: Want) -> SourceImage:
    """The image of that name and platform; what the cache has of it is not fetched again."""
    web = Web(want.registry, PATIENCE, else_=_OTHER_WAYS)
    pull = Pull(reference, want, web)
    spool = Spool()
    stack = Stack(where=pull.where, limits=want.limits)
    with contextlib.closing(web), Errands(_THREADS, left=web.left, stop=web.stop) as errands:
        found = errands.do(pull.find)
        jobs = pull.layer_jobs(list({layer.blob: layer for layer in found.manifest.layers}.values()))
        with contextlib.closing(errands.in_order(jobs, ahead=_AHEAD)) as blobs:
            for layer, diff_id in zip(found.manifest.layers, found.config.diff_ids, strict=True):
                if not stack.again(layer.blob, diff_id):
                    data, compression = next(blobs).chunks(), oci.LAYER_TYPES[layer.media_type]
                    stack.add(layer.blob, add_layer(spool, data, compression, diff_id, pull.where, want.limits))
    return finished(pull.where, found.digest, found.config, stack.layers, want, found.manifest)


class Pull:
    """One reference being resolved and fetched, over the roads there are: the mirrors in order, then the registry."""

    def __init__(self, reference: oci.Reference, want: Want, web: Web, *, artifact: str = "") -> None:
        """`artifact`: the type of what is looked for, when it is no image."""
        self.where = str(reference)
        self._reference = reference
        self._want = want
        self._artifact = artifact
        self._blobs = Blobs(cache=want.cache)
        self._host, self._name = oci.registry_of(reference.name)
        self._roads = () if want.registry.offline else self._find_roads(web)
        self._blocked: dict[Repository, str] = {}  # roads that lead nowhere in this run

    def find(self, stack: contextlib.ExitStack) -> _Found:
        """Manifest and config for the platform."""
        digest, data, index = self.top(stack)
        for _ in range(_NESTING_MAX + 1):
            if not index:
                manifest = oci.parse_manifest(data, self.where)
                config = oci.parse_config(self.document(stack, manifest.config, manifest=False), self.where)
                match_layers(manifest.layers, config, self.where)
                return _Found(digest=digest, manifest=manifest, config=config)
            chosen = oci.choose_platform(oci.parse_index(data, self.where), self._want.platform, self.where)
            data = self.document(stack, chosen, manifest=True)
            digest, index = chosen.digest, self._is_index(data, chosen.media_type)
        raise InputError(f"{self.where}: indexes nested more than {_NESTING_MAX} deep")

    def layer_jobs(self, layers: Sequence[oci.Descriptor]) -> list[Callable[[contextlib.ExitStack], Blob]]:
        """What fetches each layer, and keeps it open."""
        meter = _Meter(layers, self._want.progress)
        return [functools.partial(self._layer, meter, index, layer) for index, layer in enumerate(layers)]

    def _layer(self, meter: _Meter, index: int, layer: oci.Descriptor, stack: contextlib.ExitStack) -> Blob:
        seen = functools.partial(meter.set, index)
        blob = self.open(stack, layer, lambda road: road.blob_fetch(layer, seen))
        seen(layer.size)
        return blob

    def top(self, stack: contextlib.ExitStack) -> tuple[str, bytes, bool]:
        """Digest and bytes of what the reference names, and whether it is an index."""
        name = f"{self._host}/{self._name}:{self._reference.tag}"
        digest = self._reference.digest or ("" if self._roads else self._blobs.recall(name) or "")
        if digest:
            known = self._cached(stack, digest)
            if known is not None:
                return digest, known, self._is_index(known, "")
        elif not self._roads:
            raise InputError(
                f"{self.where}: what this tag means is not in the cache {quote(str(self._want.cache.root))}",
                hint="run it once without --offline",
            )
        data, index = self.any_road(lambda road: self._ask(road, digest))
        self.open(stack, _describe(data), lambda _road: lambda _offset: (0, iter((data,))))
        if not digest:
            digest = oci.digest(data)
            self._blobs.remember(name, digest)
        return digest, data, index

    def _ask(self, road: Repository, digest: str) -> tuple[bytes, bool]:
        """The manifest that a registry has at the tag, or the one of that digest, at a second try if need be."""
        for _ in range(2):
            data, said = road.manifest(digest or self._reference.tag)
            if not digest or oci.digest(data) == digest:
                return data, self._is_index(data, said)
        raise InputError(f"{self.where}: {road} answers with a manifest that is {oci.digest(data)}")

    def _is_index(self, data: bytes, said: str) -> bool:
        return is_index(data, said, self.where, artifact=self._artifact)

    def _cached(self, stack: contextlib.ExitStack, digest: str) -> bytes | None:
        """A manifest in the cache; without a registry to ask, it has to be there."""
        # A reference says no size: it is taken from the file, whose digest the store checks.
        path = self._want.cache.root / VERSION / BLOBS / digest.removeprefix("sha256:")
        try:
            size = path.lstat().st_size
        except OSError:
            size = 0
        known = oci.Descriptor(media_type="", digest=digest, size=size, annotations={})
        try:
            _check_document(known, self.where)
            return stack.enter_context(self._blobs.open(known, None, self.where)).read()
        except InputError:
            if not self._roads:
                raise
            return None

    def document(self, stack: contextlib.ExitStack, descriptor: oci.Descriptor, *, manifest: bool) -> bytes:
        _check_document(descriptor, self.where)
        return self.open(
            stack,
            descriptor,
            lambda road: road.manifest_fetch(descriptor.digest) if manifest else road.blob_fetch(descriptor),
        ).read()

    def open(
        self, stack: contextlib.ExitStack, descriptor: oci.Descriptor, fetch: Callable[[Repository], Fetch]
    ) -> Blob:
        """A verified blob, held open on the stack."""
        if not self._roads:
            return stack.enter_context(self._blobs.open(descriptor, None, self.where))
        return self.any_road(lambda road: stack.enter_context(self._blobs.open(descriptor, fetch(road), self.where)))

    def any_road(self, attempt: Callable[[Repository], T]) -> T:
        """What the first road gives that gives anything; the last one's error, with the reasons of those before it."""
        reasons = list(self._blocked.values())
        for road in self._roads:
            if road in self._blocked:
                continue
            try:
                return attempt(road)
            except (HostError, InputError) as problem:
                if road is self._roads[-1]:
                    before = "".join(f"; before that: {reason}" for reason in reasons)
                    raise type(problem)(f"{problem}{before}", hint=problem.hint) from None
                reasons.append(str(problem))
                if isinstance(problem, HostError):
                    self._blocked[road] = str(problem)
        raise AssertionError("the last road is never blocked")

    def _find_roads(self, web: Web) -> tuple[Repository, ...]:
        spec = self._want.registry
        roads = []
        for key, mirrors in spec.mirrors.items():
            if (oci.DOCKER_HUB if key in oci.HUB_NAMES else key) == self._host:
                for host, prefix in map(oci.parse_mirror, mirrors):
                    roads.append(Repository(web, host, prefix + self._name, spec))
        return (*roads, Repository(web, self._host, self._name, spec))


class _Meter:
    """Bytes of all layers that have come, whichever thread they came to."""

    def __init__(self, layers: Sequence[oci.Descriptor], report: Callable[[int, int], None]) -> None:
        self._total = sum(layer.size for layer in layers)
        self._done = [0] * len(layers)
        self._report = report
        self._lock = threading.Lock()

    def set(self, index: int, done: int) -> None:
        with self._lock:
            self._done[index] = done
            self._report(sum(self._done), self._total)


def is_index(data: bytes, said: str, where: str, *, artifact: str = "") -> bool:
    """Whether that is an index, and not a manifest: by its own word, which must not contradict what others `said`.

    artifact: the type that it may have, when it is no image.
    """
    document = oci.parse_json(data, where)
    kind = document.get("mediaType")
    if document.get("schemaVersion") == 1:
        raise InputError(
            f"{where}: a schema 1 manifest, which nobody reads any more", hint="push it with a newer Docker"
        )
    if kind not in (None, *oci.INDEX_TYPES, *oci.MANIFEST_TYPES):
        raise InputError(f"{where}: {quote(str(kind)[:100])} is no image")
    index = kind in oci.INDEX_TYPES if kind else "manifests" in document
    if said in (oci.MANIFEST_TYPES if index else oci.INDEX_TYPES):
        raise InputError(f"{where}: called {said}, but it is {'an index' if index else 'a manifest'}")
    config, kind = document.get("config"), document.get("artifactType")
    of_image = isinstance(config, dict) and str(config.get("mediaType")) in oci.CONFIG_TYPES
    if kind and kind != artifact and not of_image:
        raise InputError(f"{where}: an artifact of type {quote(str(kind)[:100])}, not an image")
    return index


def _check_document(descriptor: oci.Descriptor, where: str) -> None:
    if descriptor.size > oci.JSON_MAX:
        raise InputError(f"{where}: {descriptor.digest} has {descriptor.size} bytes, more than {oci.JSON_MAX}")


def _describe(data: bytes) -> oci.Descriptor:
    return oci.Descriptor.of(data, "")
