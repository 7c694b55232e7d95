"""What the fragments of a kernel come to, from its Kconfig files alone: values, reasons, and losses that are known.

kernel-configs/tolerated.toml     settings that a series does not keep, each with a reason; one that is kept after all
                                  is an error, so that the list says what is true
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from osbuild import kconfig
from osbuild.arch import Arch, cross_prefix
from osbuild.cache import Cache
from osbuild.errors import BuildError, HostError, InputError, SpecError
from osbuild.kernel_model import kernel_version, load_model, model_digest
from osbuild.kernel_source import series_of
from osbuild.output import write_whole
from osbuild.resources import resource

if TYPE_CHECKING:  # a configuration that is remembered needs none of them
    from osbuild.kconfig_lang.evaluate import Evaluator
    from osbuild.kconfig_lang.model import Model
    from osbuild.kernel import KernelSpec
    from osbuild.kernel_explain import Explainer

_PREFIX: Final = "CONFIG_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerated:
    """A setting that a series is known not to keep."""

    symbol: str
    why: str
    place: str


def explainer(spec: KernelSpec, settings: Sequence[str], cache: Cache) -> Explainer:
    """Answers about the kernel that a spec's fragments give, with some settings (SYMBOL=value) more or others."""
    from osbuild.kernel import prepared_tree, requests_for
    from osbuild.kernel_explain import Explainer, parse_setting, split_setting

    names = [split_setting(text)[0] for text in settings]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise SpecError(f"--set {settings[index]}: {_PREFIX}{name} is set twice")
    requests, tree = requests_for(spec, cache), prepared_tree(spec, cache)
    model = load_model(tree, spec.arch, cross_prefix(spec.arch), cache)
    more = dict(parse_setting(text, model) for text in settings)
    known = {entry.symbol: f"{entry.why} ({entry.place})" for entry in tolerated(series_of(tree), spec.arch)}
    return Explainer(model, requests, more, known)


def expected(spec: KernelSpec, cache: Cache) -> str:
    """The .config that a spec's fragments give, worked out here; remembered for as long as nothing changes."""
    from osbuild.kernel import prepared_tree, requests_for

    requests = requests_for(spec, cache)
    tree = prepared_tree(spec, cache)
    settings = "".join(sorted(f"{request.symbol}={request.value}\n" for request in requests))
    name = hashlib.sha256("\0".join((str(tree), spec.arch.name, settings)).encode()).hexdigest()[:16]
    record = cache.scratch("kconfig") / f"config-{name}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(record.read_bytes())
        if known["digest"] and known["digest"] == model_digest(tree, spec.arch, cross_prefix(spec.arch), cache):
            return str(known["config"])
    from osbuild.kconfig_lang.evaluate import Evaluator

    model = load_model(tree, spec.arch, cross_prefix(spec.arch), cache)
    text = as_config(Evaluator(model, asked(requests)), kernel_version(tree), spec.arch)
    digest = model_digest(tree, spec.arch, cross_prefix(spec.arch), cache)
    with contextlib.suppress(HostError):
        write_whole(record, json.dumps({"digest": digest, "config": text}).encode())
    return text


def as_config(evaluator: Evaluator, version: str, arch: Arch) -> str:
    """All values as .config has them."""
    from osbuild.kconfig_lang.reasons import value_of

    lines = [f"# Linux/{arch.kernel} {version} Kernel Configuration"]
    for name, state in evaluator.states():
        value = value_of(evaluator, name)
        if value == "n":
            lines += [f"# {_PREFIX}{name} is not set"] if state.written else []
        elif value:
            lines.append(f"{_PREFIX}{name}={value}")
    return "\n".join(lines) + "\n"


def asked(requests: Iterable[kconfig.Request]) -> dict[str, str]:
    """What fragments ask for, by name without CONFIG_."""
    return {request.symbol.removeprefix(_PREFIX): request.value for request in requests}


def check_kept(
    requests: Sequence[kconfig.Request],
    final: str,
    *,
    tree: Path,
    arch: Arch,
    cache: Cache,
    losses: Path | None = None,  # another tolerated.toml
) -> None:
    """Every request is in the final .config, but for the losses that are known; BuildError with a reason for each."""
    series = series_of(tree)
    known = {entry.symbol: entry for entry in tolerated(series, arch, losses)}
    dropped = kconfig.dropped(requests, final)
    gone = {entry.request.symbol for entry in dropped}
    kept = [known[request.symbol] for request in requests if request.symbol in known and request.symbol not in gone]
    if kept:
        raise BuildError(
            "losses that are tolerated, and are none:\n"
            + "\n".join(f"  {entry.symbol} is kept by {series} ({entry.place})" for entry in kept),
            hint="delete these entries",
        )
    unknown = [entry for entry in dropped if entry.request.symbol not in known]
    if not unknown:
        return
    raise BuildError(
        "settings that did not stick:\n" + "\n".join(f"  {entry}" for entry in unknown),
        hint=_reasons([entry.request for entry in unknown], requests, tree, arch, cache),
    )


def _reasons(
    wanted: Sequence[kconfig.Request], requests: Sequence[kconfig.Request], tree: Path, arch: Arch, cache: Cache
) -> str:
    from osbuild.kernel_explain import Explainer, lost

    try:
        model: Model = load_model(tree, arch, cross_prefix(arch), cache)
    except InputError as problem:  # the tree's files are not what we can read: the error above is the one that counts
        return f"no reasons: {problem}"
    return lost(wanted, Explainer(model, requests))


def tolerated(series: str, arch: Arch, path: Path | None = None) -> tuple[Tolerated, ...]:
    """The losses that are known for a series on an architecture."""
    path = path or resource("kernel-configs/tolerated.toml")
    try:
        text = path.read_text(encoding="utf-8")
        entries = tomllib.loads(text)["loss"]
        return tuple(
            Tolerated(symbol=entry["symbol"], why=entry["why"], place=_place(path, text, entry))
            for entry in entries
            if entry["series"] == series and entry.get("arch", arch.name) == arch.name
        )
    except (OSError, ValueError, KeyError, TypeError) as problem:
        raise InputError(f"{path} is damaged: {problem}") from problem


def _place(path: Path, text: str, entry: dict[str, str]) -> str:
    lines = text.splitlines()
    mark = f'symbol = "{entry["symbol"]}"'
    series = f'series = "{entry["series"]}"'
    for number, line in enumerate(lines, start=1):
        if line == mark and series in lines[max(0, number - 3) : number + 2]:
            return f"{path}:{number}"
    return str(path)
