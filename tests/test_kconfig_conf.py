"""Our values against those of the kernel's own `conf`: for random files, for our fragments, for random fragments."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import pytest

from osbuild.arch import ARCHES, X86_64, Arch, cross_prefix
from osbuild.cache import default_cache
from osbuild.kconfig_lang.model import BOOL, HEX, INT, STRING, TRISTATE, Model
from osbuild.kconfig_lang.parser import read_tree
from osbuild.kernel import default_spec, feature_files, prepared_tree, requests_for
from osbuild.kernel_config import asked
from osbuild.kernel_model import load_model
from osbuild.resources import resource
from tests.conf_oracle import allnoconfig, build_conf, differences, expand, linux, parse, variables_of
from tests.kconfig_random import random_case

pytestmark = pytest.mark.xdist_group("conf")  # what one worker has built, the other would build again


@dataclass(frozen=True)
class Linux:
    """The real tree, its conf, and a place to work."""

    tree: Path
    conf: Path
    work: Path


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Linux:
    tree, work = linux(), tmp_path_factory.mktemp("conf")
    return Linux(tree, build_conf(tree, work), work)


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Linux:
    tree, work = linux("6.1"), tmp_path_factory.mktemp("conf-6.1")
    return Linux(tree, build_conf(tree, work), work)


@pytest.mark.slow
@pytest.mark.parametrize("series", ["real", "older"])
def test_random_files_come_to_what_conf_says(series: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    linux_there: Linux = request.getfixturevalue(series)
    for seed in range(250):
        text, settings = random_case(seed)
        (tmp_path / "Kconfig").write_text(text)
        model = read_tree(tmp_path, {}, lambda script: "", old=series == "older")
        theirs = parse(allnoconfig(linux_there.conf, tmp_path, settings, tmp_path, {}))
        assert differences(theirs, model, settings) == {}, f"seed {seed}: {settings}\n{text}"


def test_our_fragments_come_to_what_the_conf_of_an_older_kernel_says(older: Linux) -> None:
    spec = default_spec(X86_64, source="6.1", features=["xfs", "virtiofs"])
    tree, settings = prepared_tree(spec, default_cache()), asked(requests_for(spec, default_cache()))
    model = load_model(tree, X86_64, cross_prefix(X86_64), default_cache())
    theirs = parse(
        allnoconfig(older.conf, tree, settings, older.work, variables_of(tree, X86_64, cross_prefix(X86_64)))
    )
    assert len(theirs) > 1000
    assert differences(theirs, model, settings) == {}


def have_compiler(arch: Arch) -> None:
    """Skips where there is no compiler for it."""
    from osbuild import command
    from osbuild.errors import HostError

    try:
        command.find(f"{cross_prefix(arch)}gcc")
    except HostError:
        pytest.skip(
            f"no {cross_prefix(arch)}gcc: apt-get install gcc-{arch.cross_compile.rstrip('-').replace('_', '-')}"
        )


@pytest.mark.parametrize("arch", [name for name in ARCHES if resource("kernel-configs").joinpath(name).is_dir()])
def test_our_fragments_with_every_feature_come_to_what_conf_says(real: Linux, arch: str) -> None:
    which = ARCHES[arch]
    have_compiler(which)
    spec = default_spec(which, features=feature_files(which))
    tree, settings = prepared_tree(spec, default_cache()), asked(requests_for(spec, default_cache()))
    model = load_model(tree, which, cross_prefix(which), default_cache())
    theirs = parse(allnoconfig(real.conf, tree, settings, real.work, variables_of(tree, which, cross_prefix(which))))
    assert len(theirs) > 1000
    assert differences(theirs, model, settings) == {}


@pytest.fixture(scope="module")
def expanded(real: Linux, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Model]:
    """A copy of the files with every question to the compiler answered, which conf then reads in a moment."""
    files: list[str] = []
    variables = variables_of(real.tree, ARCHES["x86_64"])
    model = load_model(real.tree, ARCHES["x86_64"], "", default_cache())
    known: dict[str, str] = {}
    for answers in default_cache().scratch("kconfig").glob("answers-*.json"):
        known |= json.loads(answers.read_bytes())
    read_tree(real.tree, variables, known.__getitem__, seen=files.append)
    copy = tmp_path_factory.mktemp("expanded")
    expand(real.tree, copy, variables, known.__getitem__, files)
    return copy, model


def random_fragment(model: Model, seed: int) -> dict[str, str]:
    """Settings for some of the symbols, wherever they are."""
    chance = random.Random(seed)
    names = chance.sample(sorted(name for name, kind in model.kinds.items() if kind), chance.choice((5, 50, 400, 3000)))
    values = {
        BOOL: ("y", "y", "n"), TRISTATE: ("y", "m", "n"), INT: ("0", "7", "250"), HEX: ("0x1", "0x1000"),
        STRING: ('"text"',),
    }  # fmt: skip
    found = {name: chance.choice(values[model.kind(name)]) for name in names}
    return found | ({"MODULES": "y"} if chance.random() < 0.5 else {})


def _compare(real: Linux, expanded: tuple[Path, Model], seeds: range) -> None:
    copy, model = expanded
    for seed in seeds:
        settings = random_fragment(model, seed)
        theirs = parse(allnoconfig(real.conf, copy, settings, real.work, {"ARCH": "x86_64"}))
        assert differences(theirs, model, settings) == {}, f"seed {seed}"


@pytest.mark.slow
def test_a_few_random_fragments_come_to_what_conf_says(real: Linux, expanded: tuple[Path, Model]) -> None:
    _compare(real, expanded, range(2))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_thirty_random_fragments_come_to_what_conf_says(real: Linux, expanded: tuple[Path, Model]) -> None:
    _compare(real, expanded, range(2, 32))
