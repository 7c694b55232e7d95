"""report.json is what its JSON Schema says, with nothing beside it, by somebody else's reader."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from osbuild import smoke
from osbuild.artifacts import Initrd, Kernel
from osbuild.report import Call, Cause, Report, Verdict
from osbuild.runtime.base import Machine
from tests.boot_fixtures import boot_kernel

__all__ = ["boot_kernel"]  # a fixture

DOCS = Path(__file__).parent.parent / "docs"
SCHEMA: dict[str, Any] = json.loads((DOCS / "report.schema.json").read_text())
CAUSE = Cause(name="silent", sentence="nothing was heard", certain=False)
CALL = Call(call="a.B/C", about="it", verdict="skipped", detail="not here", seconds=0.1, calls=2, call_seconds=0.05)


def closed(schema: Any) -> Any:
    """The same with all that it names and nothing beside: what this osbuilder writes. Older ones wrote less."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: closed(value) for name, value in schema.items()}
    if "properties" in schema:
        found |= {"additionalProperties": False, "required": list(schema["properties"])}
    return found


def validator(schema: Any) -> Any:
    import jsonschema  # seconds, that every collection of tests would wait for

    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture
def document(busybox_initrd: Initrd, boot_kernel: Kernel, tmp_path: Path) -> dict[str, Any]:
    """Of one real boot, and of one more that failed with all that a report can have."""
    machine = Machine(kernel=boot_kernel, root=busybox_initrd, accel="tcg")
    good = smoke.run(machine, tmp_path / "work", name="initrd", seconds=120)
    bad = dataclasses.replace(good, name="image", verdict=Verdict.failed, cause=CAUSE, calls=(CALL,))
    home = tmp_path / "smoke"
    found: dict[str, Any] = json.loads(Report(boots=(good, bad)).write(home).read_text())
    assert found["boots"][0]["verdict"] == "passed", found["boots"][0]["reason"]
    return found


def test_a_real_report_is_what_the_schema_says_and_no_more(document: dict[str, Any]) -> None:
    validator(closed(SCHEMA)).validate(document)
    validator(SCHEMA).validate(document)


def spoilt(document: dict[str, Any]) -> list[dict[str, Any]]:
    """It once without each thing that it has, and once with something more in each place."""
    found = []

    def walk(path: list[Any], value: Any) -> None:
        if isinstance(value, dict) and not {"facts", "data"} & set(path):
            for name in [*value, None]:
                other = copy.deepcopy(document)
                place: Any = other
                for step in path:
                    place = place[step]
                if name is None:
                    place["more"] = 1
                else:
                    del place[name]
                found.append(other)
            for name, each in value.items():
                walk([*path, name], each)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            walk([*path, 0], value[0])

    walk([], document)
    return found


def test_what_lacks_a_field_or_has_another_is_refused(document: dict[str, Any]) -> None:
    others = spoilt(document)
    strict = validator(closed(SCHEMA))
    assert len(others) > 40
    for other in others:
        assert not strict.is_valid(other)


def test_the_table_for_people_names_every_field_of_the_schema() -> None:
    text = (DOCS / "report.md").read_text()
    named = set(re.findall(r"`(?:boots\[\]\.)?([a-z_]+)(?:\[\])?(?:\.name|\.verdict)?`", text))
    fields = {name for each in SCHEMA["$defs"].values() for name in each.get("properties", {})} | set(
        SCHEMA["properties"]
    )
    assert fields - {"boots"} <= named
