"""What each fragment of a kernel costs: the objects that would not be compiled without it, their bytes and seconds.

For each fragment the kernel is configured once more without it; objects that are then gone are what it costs. What two
fragments both want, or what needs both, is gone with either one, so rows may overlap, and need not come to the whole.
Bytes are those of the objects (text, data, bss). Seconds are processor seconds of the compiler, from the last time it
ran for that object. What a symbol adds inside objects that are compiled anyway is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osbuild import kbuild, kconfig, kernel_config, kernel_objects
from osbuild.arch import cross_prefix
from osbuild.artifacts import Kernel
from osbuild.cache import Cache
from osbuild.errors import BuildError
from osbuild.kconfig_lang.evaluate import Evaluator
from osbuild.kernel import KernelSpec, fragments_for, prepared_tree, read_fragments, seconds_memory
from osbuild.kernel_model import kernel_version, load_model
from osbuild.kernel_objects import Size
from osbuild.kernel_source import series_of

_TOP: Final = 5  # objects that a row names

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of one fragment, or of all."""

    name: str  # common/network
    objects: int
    bytes: int
    seconds: float  # of the compiler
    unmeasured: int  # objects whose seconds nobody knows
    symbols: int  # that are set because of it
    largest: tuple[str, ...] = ()  # of the objects

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {
            "name": self.name, "objects": self.objects, "bytes": self.bytes, "seconds": round(self.seconds, 3),
            "unmeasured": self.unmeasured, "symbols": self.symbols, "largest": list(self.largest),
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Of a kernel: each fragment, the most expensive first, and the whole."""

    whole: Cost
    fragments: tuple[Cost, ...]

    def to_dict(self) -> dict[str, Any]:
        """The same for JSON."""
        return {"whole": self.whole.to_dict(), "fragments": [cost.to_dict() for cost in self.fragments]}


def measure(spec: KernelSpec, kernel: Kernel, cache: Cache, show: Progress | None = None) -> Costs:
    """The costs of a kernel that was built from `spec`."""
    home = kernel.vmlinux.path.parent
    if not (home / kernel_objects.NAME).is_file():
        raise BuildError(f"nobody measured the objects of {home}", hint="osbuilder kernel build builds it again")
    sizes = kernel_objects.read_sizes(home)
    seconds = kernel_objects.recall_seconds(seconds_memory(cache, spec.arch))
    full = kconfig.parse_config(kernel.config.path.read_text())
    tree, configure = configurator(spec, cache)
    files = fragments_for(spec, series_of(tree))
    whole = kbuild.objects(tree, spec.arch.kernel, full)
    found = []
    for number, file in enumerate(files):
        if show is not None:
            show(number, len(files))
        rest = configure([other for other in files if other != file])
        gone = (whole - kbuild.objects(tree, spec.arch.kernel, rest)) & sizes.keys()
        changed = sum(full.get(symbol) != rest.get(symbol) for symbol in full)
        found.append(cost(name_of(file), gone, sizes, seconds, changed))
    everything = cost("all", frozenset(sizes), sizes, seconds, len(full))
    return Costs(whole=everything, fragments=tuple(sorted(found, key=lambda each: (-each.bytes, each.name))))


def configurator(spec: KernelSpec, cache: Cache) -> tuple[Path, Callable[[Iterable[Path]], dict[str, str]]]:
    """The tree, and what it gives for other fragments: worked out here, and nothing is held against it."""
    tree = prepared_tree(spec, cache)
    model = load_model(tree, spec.arch, cross_prefix(spec.arch), cache)
    version = kernel_version(tree)

    def configure(files: Iterable[Path]) -> dict[str, str]:
        evaluator = Evaluator(model, kernel_config.asked(read_fragments(files)))
        return kconfig.parse_config(kernel_config.as_config(evaluator, version, spec.arch))

    return tree, configure


def cost(
    name: str, objects: frozenset[str] | set[str], sizes: Mapping[str, Size], seconds: Mapping[str, float], symbols: int
) -> Cost:
    """The sum over some objects."""
    largest = sorted(objects, key=lambda each: (-sizes[each].total, each))[:_TOP]
    return Cost(
        name=name, objects=len(objects), bytes=kernel_objects.total(sizes, objects),
        seconds=sum(seconds.get(each, 0.0) for each in objects),
        unmeasured=sum(each not in seconds for each in objects), symbols=symbols, largest=tuple(largest),
    )  # fmt: skip


def name_of(file: Path) -> str:
    """A fragment by its directory and name: common/network, feature/x86_64/systemd."""
    home = file.parent
    return "/".join([*(["feature"] if home.parent.name == "feature" else []), home.name, file.stem])
