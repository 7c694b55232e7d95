"""What a build says about itself, written in this order: lock.json, sbom.cdx.json, provenance.json, manifest.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from osbuild import manifest, provenance, sbom
from osbuild.errors import InputError
from osbuild.manifest import LOCK, MANIFEST, PROVENANCE, SBOM, encode
from osbuild.output import write_whole
from osbuild.tree import Tree, quote

if TYPE_CHECKING:
    from osbuild.kernel_patches import Patch
    from osbuild.oci import Json


def write(out: Path, document: Json, lock: Json, tree: Tree, patches: tuple[Patch, ...]) -> None:
    """All of a build that is there; `tree` is the image's own, whose databases name its packages."""
    from osbuild.packages import installed_packages  # whose databases need sqlite

    _save(out, document, lock, encode(sbom.describe(document, lock, installed_packages(tree), patches)))


def change_agent(out: Path, document: Json, lock: Json) -> None:
    """The same of a build whose agent was swapped: both documents speak of the new one already."""
    try:
        text = (out / SBOM).read_bytes()
    except FileNotFoundError:  # of a build that had none
        manifest.save(out, document, lock)
        return
    except OSError as problem:
        raise InputError(f"cannot read {quote(str(out / SBOM))}: {problem.strerror}") from None
    _save(out, document, lock, encode(sbom.with_agent(sbom.read(text, quote(str(out / SBOM))), document, lock)))


def _save(out: Path, document: Json, lock: Json, bill: bytes) -> None:
    write_whole(out / LOCK, encode(lock))
    write_whole(out / SBOM, bill)
    write_whole(out / PROVENANCE, encode(provenance.describe(document, lock, {SBOM: bill})))
    write_whole(out / MANIFEST, encode(document))
