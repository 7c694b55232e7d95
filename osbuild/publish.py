"""Builds into a registry: every blob that is not there, then each build's manifest, and the tag last of all.

Until the tag is put, nobody sees anything of it; what was sent before a run was killed is there for the next one.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from osbuild import agreement, manifest, oci, parts, publication
from osbuild.arch import find_arch
from osbuild.borrowed import Borrowed
from osbuild.console import Show, size_text
from osbuild.distribution import Repository
from osbuild.errands import Errands
from osbuild.errors import InputError, SpecError
from osbuild.manifest import LOCK, PROVENANCE, SBOM
from osbuild.publication import FILES, IMAGE_INDEX, IMAGE_MANIFEST, PARTED, Piece
from osbuild.registry_spec import RegistrySpec
from osbuild.signatures import Signed, Signer
from osbuild.transport import Patience, Web
from osbuild.tree import quote
from osbuild.uploads import MOUNTED, SENT, THERE, InMemory, Source, Uploads
from osbuild.verification import full_name, is_signed

PATIENCE: Final = Patience()
_THREADS: Final = 3
_AHEAD: Final = 6


@dataclass(slots=True)
class Moved:
    """Bytes of layers, by what became of them."""

    sent: int = 0
    reused: int = 0  # they were there
    mounted: int = 0  # another repository of the registry had them

    def add(self, how: str, size: int) -> None:
        """A layer was put."""
        name = {SENT: "sent", THERE: "reused", MOUNTED: "mounted"}[how]
        setattr(self, name, getattr(self, name) + size)

    def to_dict(self) -> dict[str, int]:
        """As JSON."""
        return {"sent": self.sent, "reused": self.reused, "mounted": self.mounted}


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What stands at the tag now."""

    reference: str
    digest: str
    changed: bool  # something else stood there before, or nothing
    platforms: tuple[str, ...]
    files: dict[str, dict[str, Moved]] = field(default_factory=dict)  # platform -> file -> bytes
    signed: tuple[Signed, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        files = {
            platform: {name: moved.to_dict() for name, moved in each.items()} for platform, each in self.files.items()
        }
        return {
            "reference": self.reference, "digest": self.digest, "changed": self.changed,
            "platforms": list(self.platforms), **self._total().to_dict(), "files": files,
            "signed": [each.to_dict() for each in self.signed],
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        total = self._total()
        word = "published" if self.changed else "published already"
        return [
            f"{self.reference} is {word}: {self.digest} ({', '.join(self.platforms)})",
            f"sent {size_text(total.sent)}; there already {share(total.reused + total.mounted, total.sent)}",
            *(f"signed {'' if each.changed else 'already '}{each.digest}" for each in self.signed),
            *(
                f"  {name}: sent {size_text(moved.sent)}; there already "
                f"{share(moved.reused + moved.mounted, moved.sent)}"
                for each in self.files.values()
                for name, moved in each.items()
                if moved.sent and total.reused + total.mounted
            ),
        ]

    def _total(self) -> Moved:
        found = Moved()
        for each in self.files.values():
            for moved in each.values():
                found.sent += moved.sent
                found.reused += moved.reused
                found.mounted += moved.mounted
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Build:
    """A finished build, its files open and checked."""

    document: oci.Json
    platform: oci.Platform
    files: dict[str, Borrowed]
    sha256: dict[str, str]  # of each
    cuts: dict[str, tuple[parts.Cut, ...]]  # of each that is in parts


def share(reused: int, moved: int) -> str:
    """A number of bytes, and which part of all that is."""
    return f"{size_text(reused)} ({100 * reused / (reused + moved or 1):.1f} %)"


def publish(
    builds: Sequence[Path],
    name: str,
    registry: RegistrySpec,
    show: Show,
    *,
    mount_from: str = "",
    add: bool = False,
    sign: Path | None = None,
    booted: str = "",
    signed_by: str = "",
) -> Published:
    """Put builds at a tag: one as it is, several (or, with `add`, one more) as an index of them.

    mount_from: a repository of the same registry. sign: the private key to sign all of it with, before the tag names
    it. booted: with which wishes a matrix booted the only one. signed_by: in PEM the public key of who will sign it
    later.
    """
    reference = _reference(name)
    signer = Signer.of(sign) if sign else None
    vouched = signer.public if signer else signed_by
    host, repository = oci.registry_of(reference.name)
    if registry.offline:
        raise SpecError("--offline asks no registry, and a build is to be published in one", hint="leave it out")
    other = oci.repository_on(host, mount_from) if mount_from else ""
    with show.step("checking what is published"):
        read = _read_all(builds)
    web = Web(registry, PATIENCE)
    with contextlib.closing(web), Errands(_THREADS, left=web.left, stop=web.stop) as errands:
        there = Repository(web, host, repository, registry, actions="pull,push", also=other)
        uploads = Uploads(there, mount_from=other)
        described, files = [], {}
        for build in read:
            with show.step(f"publishing for {build.platform}") as step:
                data, moved = _put_layers(build, uploads, errands, step.advance)
                files[str(build.platform)] = moved
            if len(read) == 1 and not add:
                data = errands.do(functools.partial(_with_word, uploads, reference, data, booted, vouched))
            described.append(_describe(data, build.platform))
            if len(read) > 1 or add:
                errands.do(functools.partial(_put_manifest, uploads, data))
        with show.step(f"naming it {reference.tag}"):
            return errands.do(
                lambda _stack: _put_tag(there, uploads, reference, described, data, files, add=add, signer=signer)
            )


def _with_word(
    uploads: Uploads, reference: oci.Reference, data: bytes, booted: str, vouched: str, _stack: contextlib.ExitStack
) -> bytes:
    """A manifest with word of the boot: ours, or that of the very same build which stands there.

    vouched: what is to be signed takes no word that this key's owner did not sign before.
    """
    if booted or (found := uploads.manifest(reference.tag)) is None:
        return publication.with_booted(data, booted) if booted else data
    word = publication.booted(found[0])
    if not word or publication.with_booted(data, word) != found[0]:
        return data
    if vouched and not is_signed(uploads.repository, oci.digest(found[0]), vouched, reference):
        return data
    return found[0]


def _put_manifest(uploads: Uploads, data: bytes, _stack: contextlib.ExitStack) -> bool:
    return uploads.put_manifest(oci.digest(data), data, IMAGE_MANIFEST)


def _put_tag(
    there: Repository,
    uploads: Uploads,
    reference: oci.Reference,
    described: list[oci.Descriptor],
    data: bytes,
    files: dict[str, dict[str, Moved]],
    *,
    add: bool,
    signer: Signer | None,
) -> Published:
    kind, kept = IMAGE_MANIFEST, list[oci.Descriptor]()
    if add:
        mine = set(map(_guest, described))
        kept = [each for each in _those_at(uploads, reference) if _guest(each) not in mine]
        described = kept + described
    if len(described) > 1 or add:
        data, kind = publication.index_of(described), IMAGE_INDEX
    signed: tuple[Signed, ...] = ()
    if signer:
        signer.check(there, full_name(reference), kept)
        uploads.put_manifest(oci.digest(data), data, kind)
        top = oci.Descriptor.of(data, kind)
        signed = signer.sign(uploads, full_name(reference), [*described, top])
    changed = uploads.put_manifest(reference.tag, data, kind)
    return Published(
        reference=str(reference), digest=oci.digest(data), changed=changed, files=files,
        platforms=tuple(sorted(str(each.platform) for each in described)), signed=signed,
    )  # fmt: skip


def _those_at(uploads: Uploads, reference: oci.Reference) -> list[oci.Descriptor]:
    """The builds that stand at a tag."""
    found = uploads.manifest(reference.tag)
    if found is None:
        return []
    data, where = found[0], str(reference)
    document = oci.parse_json(data, where)
    if document.get("artifactType") != publication.ARTIFACT:
        raise InputError(f"{where} is no build that osbuilder published", hint="name another tag")
    if "manifests" in document:
        return list(oci.parse_index(data, where))
    config = uploads.document(publication.parse(data, where).config)
    return [_describe(data, publication.platform_of(config, where))]


def _guest(each: oci.Descriptor) -> tuple[str, str]:
    """What an index has one build for: of a platform with a variant a reader might take either of two."""
    return (each.platform.os, each.platform.architecture) if each.platform else ("", "")


def _put_layers(
    build: _Build, uploads: Uploads, errands: Errands, advance: Callable[[int, int], None]
) -> tuple[bytes, dict[str, Moved]]:
    """Every layer of a build, and its config; the manifest that names them."""
    total = sum(file.size for file in build.files.values())
    moved = {name: Moved() for name in build.files}
    pieces: list[Piece] = []
    jobs = (functools.partial(_put, uploads, make) for make in _layers(build))
    with contextlib.closing(errands.in_order(jobs, ahead=_AHEAD)) as results:
        for piece, how in results:
            pieces.append(piece)
            moved[piece.file].add(how, piece.layer.size)
            advance(sum(each.size for each in pieces), total)
    config = publication.config_of(build.platform.architecture)
    described = oci.Descriptor.of(config, publication.CONFIG)
    errands.do(lambda _stack: uploads.put(described, InMemory(config)))
    for file in build.files.values():
        file.check()
    return publication.manifest_of(build.document, described, pieces), moved


def _put(uploads: Uploads, make: Callable[[], tuple[Piece, Source]], _stack: contextlib.ExitStack) -> tuple[Piece, str]:
    piece, source = make()
    return piece, uploads.put(piece.layer, source)


def _layers(build: _Build) -> Iterator[Callable[[], tuple[Piece, Source]]]:
    """What makes each layer; the small files first, what is in parts last."""
    for name, file in build.files.items():
        if name in PARTED:
            for number, cut in enumerate(build.cuts[name]):
                yield functools.partial(_part, name, file, cut, number)
        else:
            yield functools.partial(_file, name, build.sha256[name], file)


def _part(name: str, file: Borrowed, cut: parts.Cut, number: int) -> tuple[Piece, Source]:
    piece, packed = parts.pack(file, cut, name, number)
    return piece, InMemory(packed)


def _file(name: str, sha256: str, file: Borrowed) -> tuple[Piece, Source]:
    return publication.whole(name, sha256, file.size), file


def _read_all(builds: Sequence[Path]) -> list[_Build]:
    found: dict[str, tuple[_Build, Path]] = {}
    for out in builds:
        build = _read(out)
        other = found.setdefault(str(build.platform), (build, out))[1]
        if other is not out:
            raise SpecError(
                f"both {quote(str(other))} and {quote(str(out))} are for {build.platform}",
                hint="an index has one build for each architecture",
            )
    return [build for build, _ in found.values()]


def _read(out: Path) -> _Build:
    """A finished build: what is read later is what is checked here against its manifest."""
    names = [name for name in (*FILES, *PARTED) if (out / name).is_file()]
    try:
        files = {name: Borrowed(out / name) for name in names}
    except OSError as problem:
        raise InputError(f"cannot read {quote(str(out))}: {problem.strerror}") from None
    kernel, _, _ = manifest.read(out)  # every file against manifest.json
    document = oci.parse_json((out / manifest.MANIFEST).read_bytes(), quote(str(out / manifest.MANIFEST)))
    said = {name: str(about["sha256"]) for name, about in document["outputs"].items()}
    wanted = {*said, *manifest.RECORDS} & files.keys()
    kept = {name: file for name, file in files.items() if name in wanted}
    for name, file in kept.items():
        if name not in said:
            said[name] = hashlib.sha256(file.read(0, file.size)).hexdigest()
        if not os.path.samestat(os.fstat(file.descriptor), (out / name).stat()):
            raise InputError(f"{quote(str(out / name))} changed while it was read", hint="run it again")
        file.check()
    _check_records(kept, document, said, quote(str(out)))
    platform = oci.Platform(os="linux", architecture=find_arch(kernel.arch).oci)
    cuts = {name: parts.cuts(file, name) for name, file in kept.items() if name in PARTED}
    return _Build(document=document, platform=platform, files=kept, sha256=said, cuts=cuts)


def _check_records(files: Mapping[str, Borrowed], document: oci.Json, said: Mapping[str, str], where: str) -> None:
    """InputError for what nobody could pull: see `pull`, which asks the same."""
    if lacks := agreement.missing(files):
        raise InputError(f"{where} has no {lacks}", hint="build it again")

    def read(name: str) -> oci.Json:
        return oci.parse_json(files[name].read(0, min(files[name].size, oci.JSON_MAX)), f"{where}, {name}")

    lock = read(LOCK)
    agreement.check_lock(lock, document, where)
    if PROVENANCE in files:
        outputs = {name: said[name] for name in document["outputs"]}
        agreement.check_provenance(read(PROVENANCE), lock, outputs, said[SBOM], where)


def _reference(name: str) -> oci.Reference:
    if oci.parse_reference(name, frozenset(("docker",))).digest:
        raise SpecError(f"{quote(name)} names a build by its digest, which is not known yet", hint="give it a tag")
    return publication.parse_target(name, hint="osbuilder publish OUT REGISTRY/REPO:TAG")


def _describe(data: bytes, platform: oci.Platform) -> oci.Descriptor:
    return oci.Descriptor(
        media_type=IMAGE_MANIFEST, digest=oci.digest(data), size=len(data), annotations={}, platform=platform
    )  # fmt: skip
