"""A table of modules, each imported when its row is wanted: a command pays for what it uses, and no more."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

Row = TypeVar("Row")


class Modules(Mapping[str, Row]):
    """Rows by their names, in the order given; each is a module that has what `Row` asks for."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """names: what a row is called -> the module's full name."""
        self._names = names

    def __getitem__(self, row: str) -> Row:
        module: Any = importlib.import_module(self._names[row])
        return module  # type: ignore[no-any-return]

    def __contains__(self, row: object) -> bool:
        return row in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
