"""The wording of provenance.json is promised: what is published is compared with what its lock.json says."""

from __future__ import annotations

from typing import Any

import pytest

from osbuild import agreement, provenance
from osbuild.errors import InputError

A, B, C, D = (letter * 64 for letter in "abcd")
LOCK: dict[str, Any] = {
    "osbuilder": {"version": "0.1.0", "code": A, "tools": {"xz": "xz 5.4.1"}},
    "image": {
        "digest": f"sha256:{B}", "config": f"sha256:{C}",
        "layers": [{"digest": f"sha256:{C}"}, {"diff_id": f"sha256:{D}"}],
    },
    "agent": {
        "name": "builtin", "sha256": A,
        "inputs": {"compiler": ["musl-gcc", "gcc 12\nmore\n"], "sources": {"main.c": B}},
    },
    "rootfs": {"init": "agent", "slim": True, "remove": ["/doc"], "inputs": {"policy.toml": C}},
    "kernel": {
        "inputs": {"source": D, "patches": [["0001-a.patch", A]], "tools": {"gcc": "gcc 12"}},
        "fragments": {"common/a.conf": B},
    },
    "options": {"compress": "zstd"}, "given": {"image": "docker://a.example/x:1"},
}  # fmt: skip
DEFINITION: dict[str, Any] = {
    "buildType": "urn:osbuilder:build:v1",
    "externalParameters": {
        "image": "docker://a.example/x:1", "options": {"compress": "zstd"},
        "rootfs": {"init": "agent", "slim": True, "remove": ["/doc"]},
    },
    "internalParameters": {"tools": {"gcc": "gcc 12", "musl-gcc": "gcc 12", "xz": "xz 5.4.1"}},
    "resolvedDependencies": [
        {"name": "osbuilder", "digest": {"sha256": A}},
        {"name": "image", "digest": {"sha256": B}, "uri": "docker://a.example/x:1"},
        {"name": "image layer 1", "digest": {"sha256": C}}, {"name": "image layer 2", "digest": {"sha256": D}},
        {"name": "agent/main.c", "digest": {"sha256": B}}, {"name": "policy.toml", "digest": {"sha256": C}},
        {"name": "kernel source", "digest": {"sha256": D}},
        {"name": "kernel patch 0001-a.patch", "digest": {"sha256": A}},
        {"name": "kernel-configs/common/a.conf", "digest": {"sha256": B}},
    ],
}  # fmt: skip


def statement(**changed: Any) -> dict[str, Any]:
    """One that an osbuilder of today or before has written."""
    builder = {"id": "urn:osbuilder:local", "version": {"osbuilder": "0.1.0"}}
    return {
        "subject": [{"name": "rootfs.img", "digest": {"sha256": A}}],
        "predicate": {
            "buildDefinition": DEFINITION | changed,
            "runDetails": {"builder": builder, "byproducts": [{"name": "sbom.cdx.json", "digest": {"sha256": B}}]},
        },
    }  # fmt: skip


def check(document: dict[str, Any], lock: dict[str, Any] = LOCK) -> None:
    agreement.check_provenance(document, lock, {"rootfs.img": A}, B, "here")


def test_the_wording_of_this_build_type_never_changes() -> None:
    """Whoever changes it makes a new one, and keeps this for what is published."""
    assert provenance.definition(LOCK) == DEFINITION
    check(statement())


def test_another_kind_of_statement_is_named() -> None:
    with pytest.raises(InputError, match="is a 'urn:osbuilder:build:v9'") as caught:
        check(statement(buildType="urn:osbuilder:build:v9"))
    assert caught.value.hint == "take the osbuilder that made it, or build it again"
    with pytest.raises(InputError, match="is a 'None'"):
        check({"predicate": []})


def test_another_locks_statement_is_refused() -> None:
    with pytest.raises(InputError, match=r"its lock\.json is not the one that its provenance\.json is about"):
        check(statement(), LOCK | {"options": {"compress": "gzip"}})
    with pytest.raises(InputError, match=r"its provenance\.json is not the one that its manifest\.json is about"):
        check(statement() | {"subject": []})
