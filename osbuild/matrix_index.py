"""What a registry has of a matrix: each cell at a tag of its own, and indexes of them.

REPO:TAG-CELL      a cell's build, as soon as it is good
REPO:TAG-VARIANT   an index of the cells that differ in nothing but their architecture: what any tool can choose from
REPO:TAG           an index of all of them, each with its name in an annotation; put last, and only when all are good

OCI lets a reader take the first entry for its platform, whatever its annotations say. So an index in which a platform
comes twice is for readers who look at annotations, and the variants have tags of their own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from osbuild import oci, publication, verification
from osbuild.console import Show
from osbuild.distribution import Repository
from osbuild.errands import Errands
from osbuild.errors import InputError, SpecError
from osbuild.manifest import LOCK, MANIFEST
from osbuild.matrix import Cell, Plan
from osbuild.publication import CELL, IMAGE_INDEX, IMAGE_MANIFEST, REF_NAME
from osbuild.registry_spec import RegistrySpec
from osbuild.signatures import Signed, Signer
from osbuild.transport import Patience, Web
from osbuild.tree import quote
from osbuild.uploads import Uploads

AXIS: Final = "vnd.osbuilder.axis."
_TAG_MAX: Final = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class There:
    """A published cell."""

    digest: str
    manifest: str  # sha256 of its manifest.json
    lock: oci.Json
    booted: str  # with which wishes it booted well; empty: it does not say


def parse_target(name: str) -> oci.Reference:
    """REGISTRY/REPO:TAG; SpecError when it is something else."""
    return publication.parse_target(name, hint="--publish REGISTRY/REPO:TAG")


def cell_reference(target: oci.Reference, cell: Cell) -> str:
    """Where a cell's build goes."""
    return f"{target.name}:{target.tag}-{cell.name}"


def check_tags(plan: Plan, target: oci.Reference) -> None:
    """SpecError when a tag would be too long, or would mean two things."""
    cells = {cell.name for cell in plan.cells}
    of_variant: dict[str, Cell] = {}
    for cell in plan.cells:
        if len(f"{target.tag}-{cell.name}") > _TAG_MAX:
            raise SpecError(
                f"the tag {quote(f'{target.tag}-{cell.name}')} would have more than {_TAG_MAX} characters",
                hint='give the values names: image = { small = "oci:…" }',
            )
        if cell.variant != cell.name and cell.variant in cells:
            raise SpecError(
                f"{quote(cell.variant)} is both a cell and what {quote(cell.name)} has in common with others",
                hint="give the values other names",
            )
        other = of_variant.setdefault(cell.variant, cell)
        differ = [axis for axis in cell.values if axis != "arch" and cell.values[axis] != other.values[axis]]
        if differ:
            raise SpecError(
                f"{quote(other.name)} and {quote(cell.name)} would both be {quote(cell.variant)} without their "
                f"architecture, and differ in {', '.join(differ)}",
                hint="give the values other names",
            )


def variants(plan: Plan) -> dict[str, tuple[Cell, ...]]:
    """The cells of each variant, where there are several variants, and architectures to choose from."""
    found: dict[str, tuple[Cell, ...]] = {}
    for cell in plan.cells:
        found[cell.variant] = (*found.get(cell.variant, ()), cell)
    return found if len(found) > 1 and "arch" in plan.axes else {}


@contextlib.contextmanager
def opened(name: str, registry: RegistrySpec) -> Iterator[tuple[oci.Reference, Errands, Uploads]]:
    """A repository to write to."""
    reference = oci.parse_reference(name, frozenset(("docker",)))
    host, repository = oci.registry_of(reference.name)
    web = Web(registry, Patience())
    with contextlib.closing(web), Errands(1, left=web.left, stop=web.stop) as errands:
        yield reference, errands, Uploads(Repository(web, host, repository, registry, actions="pull,push"))


def find_lock(name: str, registry: RegistrySpec, signed_by: str = "") -> There | None:
    """The lock of the build at a tag; None when there is nothing, or no build of ours.

    signed_by: a public key in PEM, whose owner signed it under this name; None when nobody did.
    """
    with opened(name, registry) as (reference, errands, there):
        return errands.do(functools.partial(_find_lock, there, reference, signed_by))


def _find_lock(there: Uploads, reference: oci.Reference, signed_by: str, _stack: contextlib.ExitStack) -> There | None:
    found = there.manifest(reference.tag)
    if found is None:
        return None
    try:
        if signed_by and not verification.is_signed(there.repository, oci.digest(found[0]), signed_by, reference):
            return None
        files = publication.parse(found[0], str(reference)).files()
        if LOCK not in files or MANIFEST not in files:
            return None
        lock = oci.parse_json(there.document(files[LOCK][0].layer), f"{reference}, {LOCK}")
    except InputError:  # something else stands there: it will be replaced
        return None
    return There(
        digest=oci.digest(found[0]), manifest=files[MANIFEST][0].sha256, lock=lock, booted=publication.booted(found[0])
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Indexes:
    """What names the cells."""

    digests: Mapping[str, str]  # by tag, the one of all cells last
    signed: tuple[Signed, ...]  # cells and indexes

    def to_dict(self, target: oci.Reference) -> dict[str, Any]:
        """As JSON."""
        rows = [{"reference": f"{target.name}:{tag}", "digest": digest} for tag, digest in self.digests.items()]
        return {"indexes": rows, "signed": [each.to_dict() for each in self.signed]}


def put_indexes(
    plan: Plan,
    digests: Mapping[str, str],
    target: oci.Reference,
    registry: RegistrySpec,
    show: Show,
    signer: Signer | None = None,
) -> Indexes:
    """Put every index, the one of all cells last. `digests` has each cell's.

    With a signer, cells are signed under their own names before an index has them, and an index before its tag does.
    """
    done: dict[str, str] = {}
    signed: list[Signed] = []

    def sign(tag: str, what: oci.Descriptor) -> None:
        if signer is not None:
            name = verification.full_name(oci.Reference(transport="", name=target.name, tag=tag))
            signed.extend(errands.do(lambda _stack: signer.sign(there, name, [what])))

    with show.step(f"naming it {target.tag}"), opened(str(target), registry) as (_, errands, there):
        described = {
            cell.name: errands.do(functools.partial(_describe, there, cell, digests[cell.name], target))
            for cell in plan.cells
        }
        for cell in plan.cells:
            sign(f"{target.tag}-{cell.name}", described[cell.name])
        groups = {f"{target.tag}-{name}": cells for name, cells in variants(plan).items()}
        for tag, cells in (*groups.items(), (target.tag, plan.cells)):
            data = publication.index_of(described[cell.name] for cell in cells)
            if signer is not None:
                errands.do(functools.partial(_put, there, oci.digest(data), data))
                sign(tag, oci.Descriptor.of(data, IMAGE_INDEX))
            errands.do(functools.partial(_put, there, tag, data))
            done[tag] = oci.digest(data)
    return Indexes(digests=done, signed=tuple(signed))


def _describe(
    there: Uploads, cell: Cell, digest: str, target: oci.Reference, _stack: contextlib.ExitStack
) -> oci.Descriptor:
    found = there.manifest(digest)
    if found is None or oci.digest(found[0]) != digest:
        raise InputError(f"the registry lost {cell.name}, {digest}", hint="run it again")
    about = {CELL: cell.name, REF_NAME: f"{target.tag}-{cell.name}"}
    about |= {f"{AXIS}{axis}": value for axis, value in cell.values.items()}
    return oci.Descriptor(
        media_type=IMAGE_MANIFEST, digest=digest, size=len(found[0]), annotations=about,
        platform=oci.Platform(os="linux", architecture=cell.spec.arch.oci),
    )  # fmt: skip


def _put(there: Uploads, tag: str, data: bytes, _stack: contextlib.ExitStack) -> bool:
    return there.put_manifest(tag, data, IMAGE_INDEX)
