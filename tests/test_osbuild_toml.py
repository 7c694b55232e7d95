"""docs/osbuild-toml.md against the options themselves: nothing on it is wrong, and nothing is missing."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from osbuild.options import OPTIONS, Size, build_spec, image_of, read_config

PAGE: Final = (Path(__file__).parent.parent / "docs/osbuild-toml.md").read_text()
KINDS: Final = {
    str: "text", int: "whole number", float: "number", bool: "true or false", Path: "path", Size: "size",
    list: "list of texts",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    table: str
    name: str
    kind: str
    default: str
    example: str
    help: str

    def file(self, value: str, home: Path) -> Path:
        """An osbuild.toml with nothing else in it."""
        path = home / "osbuild.toml"
        path.write_text((f"[{self.table}]\n" if self.table else "") + f"{self.name} = {value}\n")
        return path


def rows() -> list[Row]:
    found, table = [], ""
    for line in PAGE.splitlines():
        if heading := re.fullmatch(r"## (?:\[(.+)\]|The top of the file)", line):
            table = heading[1] or ""
        if row := re.fullmatch(r"\| `(.+?)` \| (.+?) \| (.+?) \| `(.+?)` \| (.+) \|", line):
            found.append(Row(table, row[1], row[2], row[3], row[4], row[5]))
    return found


ROWS: Final = rows()


def test_every_option_has_its_row_with_its_type_and_what_help_says() -> None:
    declared = [(option.table, option.name, KINDS[option.kind], option.help) for option in OPTIONS]
    assert sorted((row.table, row.name, row.kind, row.help) for row in ROWS) == sorted(declared)


def test_tables_are_headings_once_each() -> None:
    headings = re.findall(r"^## (.+)$", PAGE, re.MULTILINE)
    tables = {option.table for option in OPTIONS}
    assert sorted(headings) == sorted(f"[{table}]" if table else "The top of the file" for table in tables)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_an_example_is_taken_and_changes_something(row: Row, tmp_path: Path) -> None:
    words = read_config(row.file(row.example, tmp_path))
    assert words.keys() == {row.name}
    if row.table != "recipe" and row.name not in (
        "salt",
        "platform",
        "arch",
        "source",
    ):  # these need more, or the host's
        assert _spec(dict(words)) != _spec({})


@pytest.mark.parametrize("row", [row for row in ROWS if row.default.startswith("`")], ids=lambda row: row.name)
def test_what_holds_when_nothing_is_given_is_what_the_page_says(row: Row, tmp_path: Path) -> None:
    words = read_config(row.file(row.default.strip("`"), tmp_path))
    assert _spec(dict(words)) == _spec({})


def test_the_example_of_a_whole_file_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    path = tmp_path / "osbuild.toml"
    path.write_text(text)
    words = read_config(path)
    document = tomllib.loads(text)
    assert words.keys() == {key for key, value in document.items() if not isinstance(value, dict)} | {
        key for value in document.values() if isinstance(value, dict) for key in value
    }
    spec = build_spec(image_of("", words), tmp_path / "out", words)
    assert spec.image == f"oci:{tmp_path}/build/images/debian"
    assert spec.rootfs.add[0].source == tmp_path / "guest/motd"


def _spec(words: dict[str, Any]) -> Any:
    return build_spec("oci:x", Path("out"), words, epoch=0)
