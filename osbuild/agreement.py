"""What a build says of itself, held against each other: two files of two builds are found before they are believed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from osbuild import provenance
from osbuild.content import quote
from osbuild.errors import InputError
from osbuild.manifest import LOCK, MANIFEST, PROVENANCE, SBOM

if TYPE_CHECKING:
    from osbuild.oci import Json


def missing(names: Mapping[str, object] | frozenset[str]) -> str | None:
    """Which record a build with these files has not; None when it has all that belong together."""
    if LOCK not in names:
        return LOCK
    if (SBOM in names) != (PROVENANCE in names):  # one vouches for the other
        return SBOM if PROVENANCE in names else PROVENANCE
    return None


def check_lock(lock: Json, document: Json, where: str) -> None:
    """InputError when what went in is not what came out: the two files of two builds."""
    for words in (("kernel", "key"), ("agent", "name"), ("image", "digest")):
        went = _at(lock, words)
        came = _at(document, words if words[0] == "kernel" else words[:1])
        if isinstance(went, str) and isinstance(came, str) and went != came:
            raise mixed(LOCK, where)


def check_provenance(statement: Json, lock: Json, outputs: Mapping[str, str], sbom: str, where: str) -> None:
    """InputError when the statement is about other outputs (name: sha256), another bill, or another lock, or is of a
    kind that this osbuilder cannot compare."""
    kind = _at(statement, ("predicate", "buildDefinition", "buildType"))
    if kind != provenance.BUILD_TYPE:
        raise InputError(
            f"{where}: its {PROVENANCE} is a {quote(str(kind))}, and this osbuilder compares {provenance.BUILD_TYPE}",
            hint="take the osbuilder that made it, or build it again",
        )
    made = _digests(statement.get("subject"))
    beside = _digests(_at(statement, ("predicate", "runDetails", "byproducts")))
    if made != dict(outputs) or beside.get(SBOM) != sbom:
        raise mixed(PROVENANCE, where)
    if not _same_inputs(statement, lock):
        raise mixed(LOCK, where, PROVENANCE)


def _same_inputs(statement: Json, lock: Json) -> bool:
    """Whether a lock is the one that a statement was made of: each of the statement's words follows from it."""
    try:
        wanted = (provenance.definition(lock), provenance.builder(lock))
    except (KeyError, TypeError, AttributeError, ValueError, IndexError):  # a lock that lacks what each of ours has
        return False
    said = (_at(statement, ("predicate", "buildDefinition")), _at(statement, ("predicate", "runDetails", "builder")))
    return json.dumps(wanted, sort_keys=True) == json.dumps(said, sort_keys=True)


def mixed(name: str, where: str, other: str = MANIFEST) -> InputError:
    """The refusal of a file that is another build's."""
    return InputError(
        f"{where}: its {name} is not the one that its {other} is about",
        hint="parts of two builds, or somebody changed it: build it again and publish that",
    )


def _digests(resources: Any) -> dict[str, str]:  # Any: JSON from outside
    """Of in-toto's ResourceDescriptors, by name; what is none of them is left out."""
    found = resources if isinstance(resources, list) else []
    return {str(_at(each, ("name",))): str(_at(each, ("digest", "sha256"))) for each in found}


def _at(document: Any, words: Sequence[str]) -> Any:  # Any: JSON from outside
    for word in words:
        document = document.get(word) if isinstance(document, dict) else None
    return document
