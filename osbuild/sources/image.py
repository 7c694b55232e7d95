"""What every source ends in: an image that has been checked against its config, and what it comes to."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from osbuild import oci
from osbuild.cache import Cache
from osbuild.errors import HostError, InputError
from osbuild.layers import Layer, flatten
from osbuild.limits import more
from osbuild.registry_spec import RegistrySpec
from osbuild.tar import Limits
from osbuild.tree import Backing, Spool, Tree
from osbuild.uncompress import check_ratio, uncompressed


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """What is asked of a source, besides which image."""

    platform: oci.Platform
    cache: Cache
    limits: Limits = field(default_factory=Limits)
    registry: RegistrySpec = field(default_factory=RegistrySpec)
    progress: Callable[[int, int], None] = lambda _done, _total: None  # bytes fetched, of how many


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceImage:
    """A checked image, flattened."""

    reference: str  # as the user would write it
    digest: str  # of the manifest where the source has one, else of the config, else of the tree
    config: oci.ImageConfig
    tree: Tree  # the layers laid over each other, before any policy
    config_digest: str = ""  # empty where there is no config
    manifest: oci.Manifest | None = None  # where the source has one


def unreadable(where: str, problem: OSError, *, hint: str = "") -> HostError | InputError:
    """The error for what cannot be read: the host's when it is only that we may not, which no other hint helps."""
    said = f"cannot read {where}: {problem.strerror or problem}"
    if isinstance(problem, PermissionError):
        return HostError(said, hint="run as its owner, as root, or make it readable")
    return InputError(said, hint=hint)


def finished(
    reference: str, digest: str, config: oci.ImageConfig, layers: Sequence[Layer], want: Want,
    manifest: oci.Manifest | None = None,
) -> SourceImage:  # fmt: skip
    """The image that these checked layers, lowest first, come to."""
    return SourceImage(
        reference=reference, digest=digest, config=config, tree=flatten(layers, want.limits), manifest=manifest,
        config_digest=manifest.config.digest if manifest else digest,
    )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class Stack:
    """The layers of one image while they are read: each once, however often it is mentioned."""

    where: str
    limits: Limits
    layers: list[Layer] = field(default_factory=list)  # lowest first
    _known: dict[Hashable, Layer] = field(default_factory=dict)
    _size: int = 0

    def again(self, key: Hashable, diff_id: str) -> bool:
        """Whether what has this key was added before: then it is taken once more."""
        layer = self._known.get(key)
        if layer is None:
            return False
        checked_layer(layer.spool, layer.offset, layer.size, layer.diff_id.removeprefix("sha256:"), diff_id, self.where)
        self.add(key, layer)
        return True

    def add(self, key: Hashable, layer: Layer) -> None:
        """Put one on top."""
        self.check_room(layer.size)
        self._size += layer.size
        self._known[key] = layer
        self.layers.append(layer)

    def check_room(self, size: int) -> None:
        """InputError when a layer of that size makes the image too large."""
        if self._size + size > self.limits.image_bytes:
            raise InputError(
                f"{self.where}: all layers have more than {self.limits.image_bytes} bytes", hint=more("image_bytes")
            )


def add_layer(
    spool: Spool, chunks: Iterable[bytes], compression: str, diff_id: str, where: str, limits: Limits
) -> Layer:
    """Uncompress a layer into the spool, and believe it only if its sha256 is the diff_id."""
    start = spool.size
    digest = hashlib.sha256()
    for data in uncompressed(_counted(spool, chunks), compression, where, limits):
        digest.update(data)
        spool.append(data)
        if spool.size > limits.image_bytes:
            raise InputError(
                f"{where}: all layers have more than {limits.image_bytes} bytes when uncompressed",
                hint=more("image_bytes"),
            )
        check_ratio(spool.taken, spool.size, where, limits)  # of all layers: many small bombs are a large one
    return checked_layer(spool, start, spool.size - start, digest.hexdigest(), diff_id, where)


def _counted(spool: Spool, chunks: Iterable[bytes]) -> Iterator[bytes]:
    for data in chunks:
        spool.taken += len(data)
        yield data


def checked_layer(spool: Backing, offset: int, size: int, sha256: str, diff_id: str, where: str) -> Layer:
    """A layer that lies in the spool already, when its digest is what the config says."""
    if f"sha256:{sha256}" != diff_id:
        raise InputError(f"{where}: a layer's content is sha256:{sha256}, but the config says {diff_id}")
    return Layer(spool=spool, offset=offset, size=size, diff_id=diff_id)


def match_layers(found: Sequence[object], config: oci.ImageConfig, where: str) -> None:
    """Refuse a config that speaks of more or fewer layers than there are."""
    if len(found) != len(config.diff_ids):
        raise InputError(f"{where}: {len(found)} layers, but the config names {len(config.diff_ids)}")
