"""A kernel from one machine's cache into another's, by way of a registry: compiled once for a whole fleet.

An OCI artifact without a tag: whoever is to have it is told its digest, so that nobody else's kernel can take its
place. What arrives has to be the kernel of exactly the inputs that this machine would take, or it compiles its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from osbuild import oci
from osbuild.artifacts import File, Kernel
from osbuild.borrowed import Borrowed
from osbuild.cache import Cache
from osbuild.console import Show
from osbuild.content import write_all
from osbuild.errands import Errands
from osbuild.errors import InputError
from osbuild.kernel import KernelSpec, find_inputs
from osbuild.matrix_index import opened
from osbuild.output import writing
from osbuild.publication import IMAGE_MANIFEST
from osbuild.registry_spec import RegistrySpec
from osbuild.sources.image import Want
from osbuild.sources.registry import Pull
from osbuild.transport import Patience, Web
from osbuild.uploads import InMemory, Uploads

ARTIFACT: Final = "application/vnd.osbuilder.kernel.cached.v1"
FILE: Final = "application/vnd.osbuilder.kernel.file.v1"
FILES: Final = ("vmlinux", "vmlinuz", "config", "System.map", "kernel.json", "objects.json")
_EMPTY: Final = b"{}"  # OCI image-spec, "Guidance for an empty descriptor"
_EMPTY_TYPE: Final = "application/vnd.oci.empty.v1+json"
_TITLE: Final = "org.opencontainers.image.title"
_FILE_MAX: Final = 2 << 30


def put(kernel: Kernel, repository: str, registry: RegistrySpec, show: Show) -> str:
    """See that a repository has a kernel of the cache; the reference, by digest."""
    home = kernel.vmlinux.path.parent
    with show.step(f"sharing the kernel in {repository}"), opened(repository, registry) as (reference, errands, there):
        layers = []
        for name in FILES:
            if (home / name).exists():
                blob = _descriptor(File.of(home / name), name)
                layers.append(blob)
                errands.do(functools.partial(_put_file, there, blob, home / name))
        config = oci.Descriptor.of(_EMPTY, _EMPTY_TYPE)
        errands.do(lambda _stack: there.put(config, InMemory(_EMPTY)))
        data = _manifest(config, layers, kernel.key)
        errands.do(lambda _stack: there.put_manifest(oci.digest(data), data, IMAGE_MANIFEST))
    return f"{reference.name}@{oci.digest(data)}"


def get(road: Mapping[str, str], wanted: KernelSpec, registry: RegistrySpec, cache: Cache, show: Show) -> None:
    """See that the cache has the kernel that is wanted, if the one that a registry has is that kernel."""
    key = find_inputs(wanted, cache).key
    if key != road["key"]:
        show.say("note: this machine would make another kernel (its compilers are others): it takes its own")
        return
    with show.step("looking for the kernel") as step:
        _, there = cache.get("kernel", key, functools.partial(_fetch, road["reference"], key, registry, cache))
        step.note = "the cache has it" if there else "fetched"


def _fetch(name: str, key: str, registry: RegistrySpec, cache: Cache, home: Path) -> None:
    reference = oci.parse_reference(name, frozenset(("docker",)))
    web = Web(registry, Patience())
    want = Want(platform=oci.Platform(os="linux", architecture=""), cache=cache, registry=registry)
    pull = Pull(reference, want, web, artifact=ARTIFACT)
    with contextlib.closing(web), Errands(1, left=web.left, stop=web.stop) as errands:
        errands.do(functools.partial(_fetch_all, pull, home))
    _check(home, key, pull.where)


def _fetch_all(pull: Pull, home: Path, stack: contextlib.ExitStack) -> None:
    _, data, _ = pull.top(stack)
    document = oci.parse_json(data, pull.where)
    layers = document.get("layers")
    if document.get("artifactType") != ARTIFACT or not isinstance(layers, list):
        raise InputError(f"{pull.where} is no kernel that osbuilder put there")
    for each in layers:
        layer = oci.parse_descriptor(each, pull.where)
        name = layer.annotations.get(_TITLE)
        if name not in FILES or layer.size > _FILE_MAX or (home / name).exists():
            raise InputError(f"{pull.where} is no kernel that osbuilder put there")
        _fetch_file(pull, layer, home / name)


def _fetch_file(pull: Pull, layer: oci.Descriptor, path: Path) -> None:
    with contextlib.ExitStack() as stack, writing(path, needs=layer.size) as descriptor:
        blob = pull.open(stack, layer, lambda road: road.blob_fetch(layer))
        at = 0
        for data in blob.chunks():
            write_all(descriptor, data, at)
            at += len(data)


def _check(home: Path, key: str, where: str) -> None:
    """InputError unless it says of itself that it was made of these inputs, and has all its files."""
    try:
        record: dict[str, Any] = oci.parse_json((home / "kernel.json").read_bytes(), where)
        made_of = hashlib.sha256(json.dumps(record["inputs"], sort_keys=True).encode()).hexdigest()
    except (OSError, KeyError) as problem:
        raise InputError(f"{where}: a kernel that does not say what it is: {problem!r}") from None
    missing = [name for name in FILES[:5] if not (home / name).exists()]
    if (record.get("key"), made_of) != (key, key) or missing:
        raise InputError(f"{where} is not the kernel that it should be", hint="run it again: it is compiled here")


def _put_file(there: Uploads, blob: oci.Descriptor, path: Path, _stack: contextlib.ExitStack) -> str:
    return there.put(blob, Borrowed(path))


def _descriptor(file: File, name: str) -> oci.Descriptor:
    return oci.Descriptor(
        media_type=FILE, digest=f"sha256:{file.sha256}", size=file.size, annotations={_TITLE: name}
    )  # fmt: skip


def _manifest(config: oci.Descriptor, layers: list[oci.Descriptor], key: str) -> bytes:
    document = {
        "schemaVersion": 2, "mediaType": IMAGE_MANIFEST, "artifactType": ARTIFACT,
        "config": config.to_dict(),
        "layers": [{**layer.to_dict(), "annotations": dict(layer.annotations)} for layer in layers],
        "annotations": {"vnd.osbuilder.kernel.key": key},
    }  # fmt: skip
    return oci.encode(document)
