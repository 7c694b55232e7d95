"""A build made again from its lock, and held against what it was: identical, or where it is not, and why."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import comparison, kconfig, lock, manifest, pipeline
from osbuild.artifacts import File
from osbuild.cache import Cache
from osbuild.console import Show
from osbuild.errors import InputError, SpecError
from osbuild.manifest import LOCK, MANIFEST, PROVENANCE, SBOM
from osbuild.spec import RegistrySpec
from osbuild.tree import quote

_KERNEL: Final = frozenset(("vmlinux", "vmlinuz", "config"))
_RECORDS: Final = (SBOM, PROVENANCE)
# Which inputs an output is made of: what their names in the lock begin with.
_OF_KERNEL: Final = ("kernel.", "options.arch", "options.features")
_OF_ROOT: Final = ("image.", "agent.", "rootfs.", "options.", "osbuilder.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Remade:
    """One file of the build, then and now."""

    name: str
    same: bool
    differences: tuple[str, ...] = ()
    more: bool = False  # there are differences beyond those
    because: tuple[str, ...] = ()  # inputs that it is made of, and that are not what they were
    changed: bool = False  # the file in the directory is not what its own manifest says

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "name": self.name, "same": self.same, "differences": list(self.differences), "more": self.more,
            "because": list(self.because), "changed": self.changed,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuilt:
    """What came of making a build again."""

    directory: Path
    inputs: tuple[str, ...]  # a line for each that is not what the lock has
    files: tuple[Remade, ...]
    compiled: bool  # the kernel; else it came from the cache, by the digest of its inputs

    @property
    def identical(self) -> bool:
        """Every output has the same bytes."""
        return all(file.same for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "directory": str(self.directory), "identical": self.identical, "inputs": list(self.inputs),
            "files": [file.to_dict() for file in self.files], "kernel_compiled": self.compiled,
        }  # fmt: skip


def rebuild(
    directory: Path, cache: Cache, show: Show, *, registry: RegistrySpec, image: str = "", out: Path | None = None,
    most: int = comparison.MOST,
) -> Rebuilt:  # fmt: skip
    """Make again what lies in `directory`, in `out` or where it goes afterwards, and compare the two.

    image: where the image is now, when not where it was.
    """
    if out is not None:
        one, other = directory.resolve(), out.resolve()
        if one == other or one in other.parents or other in one.parents:
            raise SpecError(
                f"{quote(str(out))} and the build {quote(str(directory))} are in one another", hint="another -o"
            )
    document = _manifest(directory)
    locked = lock.read(directory / LOCK)
    with _place(out) as place:
        spec = lock.spec_from(locked, place, quote(str(directory / LOCK)))
        spec = dataclasses.replace(spec, registry=registry, image=image or spec.image)
        made = pipeline.build(spec, cache, show)
        inputs = lock.differences(locked, made.lock)
        with show.step("comparing", name="compare") as step:
            files = tuple(_compared(directory, place, document, made.manifest, inputs, most))
            step.bad = not all(file.same for file in files)
    return Rebuilt(directory=directory, inputs=inputs, files=files, compiled=made.compiled)


def _manifest(directory: Path) -> Mapping[str, Any]:
    """What came out then; InputError unless it names files of this directory, each with its digest."""
    document, _ = manifest.load(directory)
    outputs = document["outputs"]
    whole = isinstance(outputs, dict) and all(
        "/" not in name and isinstance(about, dict) and isinstance(about.get("sha256"), str)
        for name, about in outputs.items()
    )
    if not whole:
        raise InputError(f"{quote(str(directory / MANIFEST))} is not one of ours", hint="build it again")
    return document


@contextlib.contextmanager
def _place(out: Path | None) -> Iterator[Path]:
    if out is not None:
        yield out
        return
    with tempfile.TemporaryDirectory(prefix="osbuilder-rebuild-") as name:
        yield Path(name) / "out"


def _compared(
    old: Path, new: Path, before: Mapping[str, Any], after: Mapping[str, Any], inputs: tuple[str, ...], most: int
) -> Iterator[Remade]:
    for name in dict.fromkeys((*before["outputs"], *after["outputs"])):
        if name not in before["outputs"] or name not in after["outputs"]:
            only = "was not made now" if name in before["outputs"] else "was not made then"
            yield Remade(name=name, same=False, differences=(only,), because=_because(name, inputs))
            continue
        yield _one(name, old / name, new / name, before["outputs"][name], inputs, most)
    if not inputs:  # they name their inputs, and so differ with them
        yield from (_record(name, old / name, new / name, most) for name in _RECORDS if (old / name).exists())
        yield _documents(MANIFEST, _lasting(before), _lasting(after), most)


def _one(name: str, old: Path, new: Path, said: Mapping[str, Any], inputs: tuple[str, ...], most: int) -> Remade:
    try:
        first, second = File.of(old), File.of(new)
    except OSError as problem:
        where = quote(str(problem.filename))
        raise InputError(f"cannot read {where}: {problem.strerror}", hint="copy the whole build") from None
    changed = first.sha256 != said["sha256"]
    if first.sha256 == second.sha256:
        return Remade(name=name, same=True, changed=changed)
    because = _because(name, inputs)
    if name == "config":
        found = list(_settings(old.read_text(errors="replace"), new.read_text(errors="replace")))
        differences, more = tuple(found[:most]), len(found) > most
    else:
        try:
            compared = comparison.compare(old, new, most)
            differences, more = tuple(map(str, compared.differences)), compared.more
        except InputError as problem:  # the one that lies there has become nothing that is known
            differences, more = (str(problem),), False
    return Remade(name=name, same=False, differences=differences, more=more, because=because, changed=changed)


def _because(name: str, inputs: tuple[str, ...]) -> tuple[str, ...]:
    parts = _OF_KERNEL if name in _KERNEL else _OF_ROOT
    return tuple(line.partition(":")[0] for line in inputs if line.startswith(parts))


def _settings(one: str, two: str) -> Iterator[str]:
    first, second = kconfig.parse_config(one), kconfig.parse_config(two)
    for symbol in sorted(first.keys() | second.keys()):
        if first.get(symbol) != second.get(symbol):
            yield f"{symbol}: {first.get(symbol, kconfig.UNSET)} and {second.get(symbol, kconfig.UNSET)}"
    if first == second:
        yield "what it says beside its settings"


def _record(name: str, old: Path, new: Path, most: int) -> Remade:
    from osbuild.oci import parse_json

    one, two = (parse_json(path.read_bytes(), quote(str(path))) for path in (old, new))
    return _documents(name, one, two, most)


def _documents(name: str, one: Mapping[str, Any], two: Mapping[str, Any], most: int) -> Remade:
    found = [f"{place}: {first} and {second}" for place, first, second in lock.unequal(one, two)]
    return Remade(name=name, same=not found, differences=tuple(found[:most]), more=len(found) > most)


def _lasting(document: Mapping[str, Any]) -> Mapping[str, Any]:
    """A manifest without what smoke tests added to it."""
    outputs = {
        name: {key: value for key, value in about.items() if key != "least_memory_mib"}
        for name, about in document["outputs"].items()
    }
    return {**document, "outputs": outputs}


def lines(found: Rebuilt) -> Iterator[str]:
    """For people."""
    for line in found.inputs:
        yield f"input {line}"
    for file in found.files:
        if file.changed:
            yield f"{file.name}: is not what {MANIFEST} says: somebody changed it since it was built"
        for difference in file.differences:
            yield f"{file.name}: {difference}"
        if file.more:
            yield f"{file.name}: … and more: --most names more of them"
        if file.because:
            yield f"{file.name}: made of what is another now: {', '.join(file.because)}"
    if not found.compiled:
        yield "the kernel was not compiled again: the cache has it, by the digest of the same inputs"
    yield "identical" if found.identical else "not identical"
