"""A published build out of a registry, into a directory that gets all of it or stays what it was.

What the directory has already is taken from there, part by part; what the cache has, from the cache, where every blob
is kept as soon as it is whole: so a run that was killed goes on where it was. Nothing of it counts before each file is
what the build's manifest.json says.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import agreement, oci, parts, publication, verification
from osbuild.blobs import Blob
from osbuild.borrowed import Borrowed
from osbuild.cache import Cache
from osbuild.console import Show, size_text
from osbuild.content import HOLE, write_all
from osbuild.distribution import Repository
from osbuild.errands import Errands
from osbuild.errors import InputError
from osbuild.manifest import LOCK, MANIFEST, PROVENANCE, RECORDS, SBOM
from osbuild.output import digest as digest_of
from osbuild.output import writing
from osbuild.publication import Piece, Publication
from osbuild.publish import share
from osbuild.registry_spec import RegistrySpec
from osbuild.sources.image import Want
from osbuild.sources.registry import Pull
from osbuild.switch import replacing
from osbuild.transport import Patience, Web
from osbuild.tree import quote
from osbuild.uncompress import uncompressed
from osbuild.verification import Verified

PATIENCE: Final = Patience()
_THREADS: Final = 3
_AHEAD: Final = 6
_CHUNK: Final = 1 << 20
_ZEROS: Final = bytes(HOLE)
_TAGS_SHOWN: Final = 12


@dataclass(slots=True)
class Came:
    """Bytes of layers, by where they came from."""

    fetched: int = 0
    reused: int = 0  # of the build that the directory held
    cached: int = 0

    def to_dict(self) -> dict[str, int]:
        """As JSON."""
        return {"fetched": self.fetched, "reused": self.reused, "cached": self.cached}


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """A build that lies in a directory now."""

    path: Path
    reference: str
    digest: str  # of the build's own manifest, also when the reference is an index
    platform: str
    files: Mapping[str, Came]
    signed: Verified | None = None  # when a key was given

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "path": str(self.path), "reference": self.reference, "digest": self.digest, "platform": self.platform,
            **self._total().to_dict(), "files": {name: came.to_dict() for name, came in self.files.items()},
            "signatures": [each.to_dict() for each in self.signed.signatures] if self.signed else [],
        }  # fmt: skip

    def lines(self) -> list[str]:
        """For people."""
        total = self._total()
        there = total.reused + total.cached
        return [
            f"{self.path}: {self.reference}@{self.digest} ({self.platform})",
            f"fetched {size_text(total.fetched)}; there already {share(there, total.fetched)}",
            *(self.signed.lines() if self.signed else ()),
        ]

    def _total(self) -> Came:
        found = Came()
        for came in self.files.values():
            found.fetched += came.fetched
            found.reused += came.reused
            found.cached += came.cached
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class _Got:
    """A piece's bytes, or the blob that they are in."""

    piece: Piece
    blob: Blob | None = None
    old: tuple[int, int] | None = None  # the open file of the old build that has them, and where
    fetched: int = 0  # bytes that came for it


def pull(
    name: str,
    out: Path,
    registry: RegistrySpec,
    cache: Cache,
    show: Show,
    *,
    platform: oci.Platform | None = None,
    key: Path | None = None,
) -> Pulled:
    """Fetch a build; `out` is absent or empty, or holds a build of ours, which it replaces.

    key: the public key of who must have signed what `name` names.
    """
    public = verification.read_key(key, registry) if key else None
    reference = oci.parse_reference(name, frozenset(("docker",)))
    wanted = platform or _own_platform()
    web = Web(registry, PATIENCE, else_="--mirror HOST=MIRROR")
    with contextlib.ExitStack() as stack:
        new = stack.enter_context(replacing(out))
        stack.enter_context(contextlib.closing(web))
        errands = stack.enter_context(Errands(_THREADS, left=web.left, stop=web.stop))
        roads = Pull(
            reference, Want(platform=wanted, cache=cache, registry=registry), web, artifact=publication.ARTIFACT
        )
        with show.step(f"asking for {roads.where}"):
            top = errands.do(roads.top)
            signed = errands.do(lambda _: verification.check(roads, top[0], reference, public)) if public else None
            digest, found, which = errands.do(functools.partial(_find, roads, top, platform, wanted))
        old = stack.enter_context(_Old.of(out))
        with show.step("fetching what is not here") as step:
            came = _fetch(roads, found, new, old, errands, step.advance)
    return Pulled(path=out, reference=roads.where, digest=digest, platform=str(which), files=came, signed=signed)


def _find(
    roads: Pull,
    top: tuple[str, bytes, bool],
    asked: oci.Platform | None,
    wanted: oci.Platform,
    stack: contextlib.ExitStack,
) -> tuple[str, Publication, oci.Platform]:
    """The build that a reference means, by the digest of its manifest; `top` is what stands there."""
    digest, data, index = top
    if index:
        entries = oci.parse_index(data, roads.where)
        _refuse_several(entries, wanted, roads.where)
        chosen = oci.choose_platform(entries, wanted, roads.where)
        digest, data = chosen.digest, roads.document(stack, chosen, manifest=True)
    found = publication.parse(data, roads.where)
    platform = publication.platform_of(roads.document(stack, found.config, manifest=False), roads.where)
    if (index or asked) and not platform.matches(wanted):
        raise InputError(f"{roads.where} is for {platform}, not for {wanted}", hint=f"--platform {platform}")
    return digest, found, platform


def _refuse_several(entries: Sequence[oci.Descriptor], wanted: oci.Platform, where: str) -> None:
    """InputError when a matrix has several builds for the platform: which of them, its tag says."""
    ours = [each for each in entries if each.platform is not None and each.platform.matches(wanted)]
    tags = [each.annotations[publication.REF_NAME] for each in ours if publication.REF_NAME in each.annotations]
    if len(ours) > 1 and len(tags) == len(ours):
        raise InputError(
            f"{where} is a matrix with {len(ours)} builds for {wanted}",
            hint=f"pull one of them by its own tag: {', '.join(map(quote, tags[:_TAGS_SHOWN]))}"
            + (f", and {len(tags) - _TAGS_SHOWN} more" if len(tags) > _TAGS_SHOWN else ""),
        )


def _fetch(
    roads: Pull, found: Publication, new: Path, old: _Old, errands: Errands, advance: Callable[[int, int], None]
) -> dict[str, Came]:
    """Every file, whole and checked, into `new`."""
    files = found.files()
    came = {name: Came() for name in files}
    document = errands.do(functools.partial(_json, roads, files, MANIFEST, came))
    said = _said(document, files, roads.where)
    if lacks := agreement.missing(files):
        raise InputError(f"{roads.where}: a build without {lacks}", hint="publish it again")
    lock = errands.do(functools.partial(_json, roads, files, LOCK, came))
    agreement.check_lock(lock, document, roads.where)
    if PROVENANCE in files:
        statement = errands.do(functools.partial(_json, roads, files, PROVENANCE, came))
        agreement.check_provenance(statement, lock, said, files[SBOM][0].sha256, roads.where)
    read = {MANIFEST, LOCK, PROVENANCE}  # and counted
    total, done = sum(piece.layer.size for piece in found.pieces), 0
    jobs = (functools.partial(_get, roads, old, piece) for each in files.values() for piece in each)
    with contextlib.closing(errands.in_order(jobs, ahead=_AHEAD)) as results:
        for name, pieces in files.items():
            size = sum(piece.size for piece in pieces)
            stored = sum(piece.size for piece in pieces if not piece.packed or piece.layer.size > piece.size >> 8)
            with writing(new / name, needs=stored) as descriptor:
                os.ftruncate(descriptor, size)
                for _ in pieces:
                    got = next(results)
                    _write(descriptor, got, roads.where)
                    if name not in read:
                        _count(came[name], got)
                    done += got.piece.layer.size
                    advance(done, total)
                _check_file(descriptor, name, pieces, said.get(name), roads.where)
    return came


def _get(roads: Pull, old: _Old, piece: Piece, stack: contextlib.ExitStack) -> _Got:
    """A piece from where it is nearest."""
    here = old.find(piece)
    if here is not None:
        return _Got(piece=piece, old=here)
    came = 0

    def seen(position: int) -> None:
        nonlocal came
        came = position

    def fetch(road: Repository) -> Any:  # a blobs.Fetch
        return road.blob_fetch(piece.layer, seen)

    blob = roads.open(stack, piece.layer, fetch)
    return _Got(piece=piece, blob=blob, fetched=came)


def _count(came: Came, got: _Got) -> None:
    if got.blob is None:
        came.reused += got.piece.layer.size
    elif got.fetched:
        came.fetched += got.piece.layer.size
    else:
        came.cached += got.piece.layer.size


def _write(descriptor: int, got: _Got, where: str) -> None:
    """Put a piece's bytes in their place; zeros stay holes."""
    piece = got.piece
    done = 0
    for data in _bytes(got, where):
        if done + len(data) > piece.size:
            break
        for start in range(0, len(data), HOLE):
            block = data[start : start + HOLE]
            if block != _ZEROS[: len(block)]:
                write_all(descriptor, block, piece.offset + done + start)
        done += len(data)
    else:
        if done == piece.size:
            return
    raise InputError(
        f"{where}: {piece.layer.digest} is not the {piece.size} bytes of {piece.file} that it should be",
        hint="publish the build again",
    )


def _bytes(got: _Got, where: str) -> Iterator[bytes]:
    if got.blob is None:
        assert got.old is not None
        return _read(*got.old, got.piece.size)
    return uncompressed(got.blob.chunks(), "zstd", where) if got.piece.packed else got.blob.chunks()


def _read(descriptor: int, offset: int, size: int) -> Iterator[bytes]:
    while size > 0:
        data = os.pread(descriptor, min(_CHUNK, size), offset)
        if not data:
            return
        yield data
        offset += len(data)
        size -= len(data)


def _json(
    roads: Pull, files: Mapping[str, Sequence[Piece]], name: str, came: Mapping[str, Came], stack: contextlib.ExitStack
) -> oci.Json:
    """One of the two files that say what the others are: into the cache, whatever the directory holds."""
    if name not in files:
        raise InputError(f"{roads.where}: a build without {name}", hint="publish it again")
    (piece,) = files[name]
    if piece.size > oci.JSON_MAX:
        raise InputError(f"{roads.where}: its {name} has {piece.size} bytes, more than {oci.JSON_MAX}")
    got = _get(roads, _Old(), piece, stack)
    assert got.blob is not None
    _count(came[name], got)
    return oci.parse_json(got.blob.read(), f"{roads.where}, {name}")


def _said(document: oci.Json, files: Mapping[str, Sequence[Piece]], where: str) -> dict[str, str]:
    """What manifest.json says each file's sha256 is. InputError when these are not the files of one build."""
    outputs = document.get("outputs")
    if not isinstance(outputs, dict) or not all(isinstance(about, dict) for about in outputs.values()):
        raise InputError(f"{where}: its {MANIFEST} is not one of ours")
    if outputs.keys() != files.keys() - set(RECORDS):
        odd = sorted(outputs.keys() ^ (files.keys() - set(RECORDS)))
        raise InputError(f"{where}: its files are not those of its {MANIFEST}: {', '.join(map(quote, odd))}")
    for name, about in outputs.items():
        pieces = files[name]
        size = sum(piece.size for piece in pieces)
        whole = pieces[0].sha256 if not pieces[0].packed else about.get("sha256")
        if (about.get("size"), about.get("sha256")) != (size, whole):
            raise agreement.mixed(name, where)
    return {name: str(about["sha256"]) for name, about in outputs.items()}


def _check_file(descriptor: int, name: str, pieces: Sequence[Piece], said: str | None, where: str) -> None:
    """Whether a file became what manifest.json says; those that it does not name, what the manifest says."""
    if digest_of(descriptor) != (said or pieces[0].sha256):
        raise agreement.mixed(name, where)


def _own_platform() -> oci.Platform:
    from osbuild.arch import host_arch

    return oci.Platform(os="linux", architecture=host_arch().oci)


class _Old:
    """The files that a directory holds already, open, by the sha256 of their parts."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[int, int]] = {}  # sha256 -> descriptor, offset

    @classmethod
    @contextlib.contextmanager
    def of(cls, out: Path) -> Iterator[_Old]:
        """Those of ours in `out`."""
        old = cls()
        with contextlib.ExitStack() as stack:
            for name in (*publication.FILES, *publication.PARTED):
                try:
                    file = Borrowed(out / name)
                except (OSError, InputError):
                    continue
                descriptor = os.dup(file.descriptor)
                stack.callback(os.close, descriptor)
                if name in publication.PARTED:
                    for sha256, cut in parts.known(file, name).items():
                        old._parts[sha256] = (descriptor, cut.offset)
                else:
                    old._parts[digest_of(descriptor)] = (descriptor, 0)
            yield old

    def find(self, piece: Piece) -> tuple[int, int] | None:
        """The open file that has these bytes, and where."""
        return self._parts.get(piece.sha256)
