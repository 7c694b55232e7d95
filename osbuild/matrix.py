"""matrix.toml: many builds in one file, and the plan that they come to; nothing here touches more than that file.

    compress = "zstd"                       any word of osbuild.toml: for all cells
    [axes]
    image = ["oci:images/busybox"]          or names of your own: image = { small = "oci:images/busybox" }
    arch = ["x86_64", "aarch64"]
    filesystem = ["ext4", "erofs"]
    [axes.kernel]
    plain = {}
    old = { source = "6.1", features = ["xfs"] }
    [[exclude]]
    arch = "aarch64"
    filesystem = "erofs"

A cell is one value of each axis; its name is the values' names, joined by "-", in the order of AXES. docs/matrix.md.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import options
from osbuild.errors import SpecError
from osbuild.kernel import check_features
from osbuild.options import Words
from osbuild.sources import find_source
from osbuild.spec import BuildSpec
from osbuild.tree import quote

AXES: Final = ("image", "arch", "kernel", "filesystem", "agent", "kind")
CELLS_MAX: Final = 1000  # more than that is a mistake in a file, and not a wish
# axis -> the word of osbuild.toml that its values set, and that word's table
_WORDS: Final = {
    "image": ("image", ""), "arch": ("arch", ""), "filesystem": ("fs", ""), "agent": ("agent", "rootfs"),
    "kind": ("make", ""),
}  # fmt: skip
_KERNEL_WORDS: Final = {"source": "source", "features": "with"}
_NOT_HERE: Final = {
    "recipe": "a recipe is built once: osbuilder build --recipe, and its image's name goes into the matrix",
    "lock": "each cell has the lock of its last build", "locked": "each cell has the lock of its last build",
}  # fmt: skip
_CELL_NAME_MAX: Final = 200  # a file's name has up to 255 bytes, and others add to it
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}\Z")
_UNSAFE: Final = re.compile(r"[^A-Za-z0-9._]+")
_TRANSPORT: Final = re.compile(r"(?:docker-daemon|docker-archive|docker|oci|dir):(?://)?")
_KEY_CHARACTERS: Final = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One value of an axis."""

    name: str  # safe in a path and in a tag
    text: str  # as the file has it
    words: Words


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Something that cells have in common, by what is asked for."""

    kind: str  # kernel, tree, image or initrd
    key: str
    title: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One build of a matrix."""

    name: str
    variant: str  # the same without the architecture: cells that differ in nothing else
    values: Mapping[str, str]  # axis -> the value's name
    words: Words
    spec: BuildSpec
    stages: Mapping[str, Stage]  # kind -> stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a matrix comes to."""

    path: Path
    axes: tuple[str, ...]
    cells: tuple[Cell, ...]

    def stages(self, kind: str) -> dict[Stage, list[Cell]]:
        """The stages of a kind, each with the cells that need it."""
        found: dict[Stage, list[Cell]] = {}
        for cell in self.cells:
            if kind in cell.stages:
                found.setdefault(cell.stages[kind], []).append(cell)
        return found

    def shared(self, cell: Cell) -> list[str]:
        """Which of a cell's roots another cell has, too."""
        roots = [kind for kind in ("image", "initrd") if kind in cell.stages]
        return [kind for kind in roots if len(self.stages(kind)[cell.stages[kind]]) > 1]

    def summary(self) -> str:
        """4 cells, 2 kernels, 1 tree, 4 disk images."""
        kinds = {"kernel": "kernel", "tree": "tree", "image": "disk image", "initrd": "initramfs"}
        counts = [(kinds[kind], len(self.stages(kind))) for kind in kinds]
        said = [("cell", len(self.cells)), *(each for each in counts if each[1])]
        return ", ".join(f"{count} {word}{'s' * (count > 1 and word != 'initramfs')}" for word, count in said)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "matrix": str(self.path), "axes": list(self.axes),
            "cells": [
                {"name": cell.name, "variant": cell.variant, "values": dict(cell.values), "image": cell.spec.image,
                 "stages": {kind: stage.key for kind, stage in cell.stages.items()}}
                for cell in self.cells
            ],
            "stages": [
                {"kind": kind, "key": stage.key, "title": stage.title, "cells": [cell.name for cell in cells]}
                for kind in ("kernel", "tree", "image", "initrd") for stage, cells in self.stages(kind).items()
            ],
        }  # fmt: skip


def read_plan(path: Path, given: Words, *, epoch: int | None) -> Plan:
    """The plan of a matrix.toml; SpecError in one line with what is wrong, where, and what to do.

    given: words of the command line, which win over the file's. epoch: SOURCE_DATE_EPOCH, the same for every cell.
    """
    path = path.absolute()  # a worker is somewhere else
    document = options.read_toml(path)
    axes, excluded = document.pop("axes", None), document.pop("exclude", [])
    common = options.merged(options.words_in(document, path), given)
    where = quote(str(path))
    if not isinstance(axes, dict) or not axes:
        raise SpecError(f"{where} has no [axes]", hint=f"[axes] with some of {', '.join(AXES)}, each a list of values")
    values = _axes(axes, path)
    _check_common(common, values, where)
    rules = _exclusions(excluded, values, where)
    cells = tuple(_cells(values, common, rules, where, epoch))
    if not cells:
        raise SpecError(f"{where}: [[exclude]] leaves no cell", hint="take one of them away")
    _check_names(cells, where)
    return Plan(path=path, axes=tuple(values), cells=cells)


# --- axes ---------------------------------------------------------------------------------------------------------


def _axes(found: Mapping[str, Any], path: Path) -> dict[str, tuple[Value, ...]]:
    for name in found:
        if name not in AXES:
            hint = options.near(name, AXES)
            raise SpecError(
                f"{quote(str(path))}: [axes] {quote(name)} is no axis of ours",
                hint=f"did you mean {hint[0]}?" if hint else f"there are: {', '.join(AXES)}",
            )
    return {name: _axis(name, found[name], path) for name in AXES if name in found}


def _axis(axis: str, found: Any, path: Path) -> tuple[Value, ...]:  # Any: from a file
    where = f"{quote(str(path))}: [axes] {quote(axis)}"
    if axis == "kernel":
        shape = isinstance(found, dict) and all(isinstance(value, dict) for value in found.values())
        hint = '[axes.kernel] and in it NAME = { source = "6.12", features = ["xfs"] }'
    elif isinstance(found, dict):
        shape = all(isinstance(value, str) for value in found.values())
        hint = f'{axis} = {{ NAME = "…" }}'
    else:
        shape = isinstance(found, list) and all(isinstance(value, str) for value in found)
        hint = f'{axis} = ["…", "…"]'
    if not shape:
        raise SpecError(f"{where} is not what this axis takes", hint=hint)
    if not found:
        raise SpecError(f"{where} has no values", hint="name one, or leave the axis out")
    if axis == "kernel":
        return tuple(_kernel(name, row, path, where) for name, row in found.items())
    pairs = found.items() if isinstance(found, dict) else [(_slug(text, axis), text) for text in found]
    values = tuple(_value(axis, name, text, path, where) for name, text in pairs)
    for name, count in Counter(value.name for value in values).items():
        if count > 1:
            texts = ", ".join(quote(value.text) for value in values if value.name == name)
            hint = f'say them once, or give them names: {axis} = {{ one = "…", two = "…" }}'
            raise SpecError(f"{where}: {texts} would all be called {quote(name)}", hint=hint)
    return values


def _value(axis: str, name: str, text: str, path: Path, where: str) -> Value:
    word, table = _WORDS[axis]
    checked = options.checked(word, text, table, path, f"{where}: {quote(text)}")
    return Value(name=_checked_name(name, where), text=text, words={word: checked})


def _kernel(name: str, row: Mapping[str, Any], path: Path, where: str) -> Value:
    words = {}
    for key, value in row.items():
        if key not in _KERNEL_WORDS:
            raise SpecError(f"{where}: {quote(name)}: {quote(key)} is no word of ours", hint="source and features")
        words[_KERNEL_WORDS[key]] = options.checked(
            _KERNEL_WORDS[key], value, "kernel", path, f"{where}: {quote(name)}: {quote(key)}"
        )
    return Value(name=_checked_name(name, where), text=name, words=words)


def _checked_name(name: str, where: str) -> str:
    if not _NAME.match(name):
        raise SpecError(
            f"{where}: no value can be called {quote(name)}",
            hint="it becomes part of a path and of a tag: up to 64 letters, digits, '.', '_' and '-', a letter first",
        )
    return name


def _slug(text: str, axis: str) -> str:
    """A name for a value that has none: what tells it apart, with nothing that a path or a tag cannot have."""
    if axis == "agent" and "/" in text:
        text = Path(text).name
    return _UNSAFE.sub("-", _TRANSPORT.sub("", text, count=1)).strip("-.")[-64:].lstrip("-.") or "x"


def _check_common(common: Words, values: Mapping[str, tuple[Value, ...]], where: str) -> None:
    for word, hint in _NOT_HERE.items():
        if word in common:
            raise SpecError(f"{where}: {quote(word)} is not for a matrix", hint=hint)
    for axis in values:
        for word in _KERNEL_WORDS.values() if axis == "kernel" else (_WORDS[axis][0],):
            if word in common:
                raise SpecError(
                    f"{where}: {quote(word)} is said for all cells, and {axis} is an axis", hint="leave one of them out"
                )


# --- cells --------------------------------------------------------------------------------------------------------


def _exclusions(
    found: Any, values: Mapping[str, tuple[Value, ...]], where: str
) -> list[dict[str, frozenset[str]]]:  # Any: from a file
    if not isinstance(found, list) or not all(isinstance(rule, dict) and rule for rule in found):
        raise SpecError(f"{where}: 'exclude' is not a list of tables", hint='[[exclude]], and arch = "aarch64"')
    return [{axis: _excluded(axis, wanted, values, where) for axis, wanted in rule.items()} for rule in found]


def _excluded(axis: str, wanted: Any, values: Mapping[str, tuple[Value, ...]], where: str) -> frozenset[str]:
    place = f"{where}: [[exclude]] {quote(axis)}"
    if axis not in values:
        raise SpecError(f"{place} is no axis of this matrix", hint=f"there are: {', '.join(values)}")
    texts = wanted if isinstance(wanted, list) else [wanted]
    names = set()
    for text in texts:
        found = [value.name for value in values[axis] if text in (value.name, value.text)]
        if not found:
            there = ", ".join(value.name for value in values[axis])
            raise SpecError(f"{place}: {quote(str(text))} is no value of it", hint=f"there are: {there}")
        names.update(found)
    return frozenset(names)


def _cells(
    values: Mapping[str, tuple[Value, ...]], common: Words, rules: Sequence[Mapping[str, frozenset[str]]], where: str,
    epoch: int | None,
) -> Iterator[Cell]:  # fmt: skip
    number = 1
    for each in values.values():
        number *= len(each)
    if number > CELLS_MAX:
        raise SpecError(f"{where} has {number} cells, more than {CELLS_MAX}", hint="several files, one after the other")
    for chosen in itertools.product(*values.values()):
        names = {axis: value.name for axis, value in zip(values, chosen, strict=True)}
        if any(all(names[axis] in wanted for axis, wanted in rule.items()) for rule in rules):
            continue
        words = dict(common)
        for value in chosen:
            words |= value.words
        yield _cell(names, words, where, epoch)


def _cell(names: Mapping[str, str], words: Words, where: str, epoch: int | None) -> Cell:
    name = "-".join(names.values())
    try:
        spec = options.build_spec(options.image_of("", words), Path(), words, epoch=epoch)
        check_features(spec.arch, spec.features)
        find_source(spec.image)
    except SpecError as problem:
        hint = f"{problem.hint}; or [[exclude]] it" if problem.hint else "[[exclude]] it"
        raise SpecError(f"{where}: cell {quote(name)}: {problem}", hint=hint) from None
    variant = "-".join(value for axis, value in names.items() if axis != "arch")
    return Cell(name=name, variant=variant, values=names, words=words, spec=spec, stages=_stages(spec, names))


def _stages(spec: BuildSpec, names: Mapping[str, str]) -> dict[str, Stage]:
    arch = spec.arch.name
    source = spec.kernel_source or "default"
    kernel = _stage(
        "kernel", [arch, source, sorted(spec.features), str(spec.keyring)],
        " ".join([arch, source, *(f"+{feature}" for feature in sorted(set(spec.features)))]),
    )  # fmt: skip
    tree = _stage(
        "tree", [spec.image, str(spec.platform), arch, repr(spec.rootfs), repr(spec.limits), spec.epoch],
        " ".join([spec.image, arch, *([names["agent"]] if "agent" in names else [])]),
    )  # fmt: skip
    found = {"kernel": kernel, "tree": tree}
    if "image" in spec.kinds:
        found["image"] = _stage("image", [tree.key, repr(spec.disk)], spec.disk.filesystem)
    if "initrd" in spec.kinds:
        found["initrd"] = _stage("initrd", [tree.key, spec.compress], spec.compress)
    return found


def _stage(kind: str, asked: Sequence[object], title: str) -> Stage:
    key = hashlib.sha256(json.dumps([kind, *asked], sort_keys=True).encode()).hexdigest()
    return Stage(kind=kind, key=key[:_KEY_CHARACTERS], title=title)


def _check_names(cells: Sequence[Cell], where: str) -> None:
    seen: dict[str, Cell] = {}
    for cell in cells:
        if len(cell.name) > _CELL_NAME_MAX:
            raise SpecError(
                f"{where}: the name of cell {quote(cell.name)} has {len(cell.name)} characters, more than "
                f"{_CELL_NAME_MAX}",
                hint='give the values shorter names: image = { small = "oci:…" }',
            )
        other = seen.setdefault(cell.name.lower(), cell)  # on some file systems these are one name
        if other is not cell:
            differ = [axis for axis in cell.values if cell.values[axis] != other.values[axis]]
            raise SpecError(
                f"{where}: two cells are called {quote(cell.name)}; they differ in {', '.join(differ)}",
                hint="give the values other names",
            )
