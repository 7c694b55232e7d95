"""Linux's own `conf` as the reader that ours is held against.

Asking the compiler takes conf seconds each time, so most of the comparing is done on a copy of the tree's Kconfig
files in which every macro is already replaced by what it expands to; that the copy means the same is itself compared.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from osbuild.arch import Arch
from osbuild.cache import Cache, default_cache
from osbuild.kconfig_lang.evaluate import Evaluator
from osbuild.kconfig_lang.macros import Macros, closing
from osbuild.kconfig_lang.model import BOOL, TRISTATE, Model
from osbuild.kconfig_lang.reasons import value_of
from osbuild.kernel_model import Asking, environment
from osbuild.kernel_pins import read_pins
from osbuild.kernel_sources import open_source

ASSIGNMENT = re.compile(r"\s*[\w-]+\s*(:=|\+=|=)")


def linux(name: str = "") -> Path:
    """The unpacked tree of a pinned kernel source, the default one when none is named; skips where it is not."""
    pins = read_pins()
    pin = pins.kernels[name or pins.default]
    if not pin.file.is_file():
        pytest.skip(f"no {pin.file}: apt-get install {pin.package}")
    return open_source(name or None, default_cache()).tree


@functools.cache
def build_conf(tree: Path, work: Path) -> Path:
    """The tree's own configuration program, made in `work`, where it may also write later."""
    nothing = work / "nothing"  # to configure: with the real files it would ask the compiler for seconds
    nothing.write_text("config NOTHING\n\tbool\n")
    argv = ["make", "-s", "-C", str(tree), f"O={work}", "ARCH=x86_64", f"KBUILD_KCONFIG={nothing}", "allnoconfig"]
    subprocess.run(argv, check=True, capture_output=True, env={**os.environ, "CCACHE_DISABLE": "1"})
    return work / "scripts/kconfig/conf"


def allnoconfig(conf: Path, tree: Path, asked: Mapping[str, str], work: Path, variables: Mapping[str, str]) -> str:
    """The .config that conf makes of these settings."""
    given = work / "asked.config"
    given.write_text("".join(f"CONFIG_{name}={value}\n" for name, value in asked.items()))
    out = work / "out.config"
    out.unlink(missing_ok=True)
    env = {
        "PATH": os.environ["PATH"], "LC_ALL": "C", **variables, "srctree": str(tree),
        "KCONFIG_ALLCONFIG": str(given), "KCONFIG_CONFIG": str(out),
    }  # fmt: skip
    done = subprocess.run([conf, "--allnoconfig", "Kconfig"], cwd=work, env=env, capture_output=True, text=True)
    # "A != y" of a bool makes the conf of 6.12 read memory that it has freed; it says so, and then anything.
    assert done.returncode == 0, done.stderr
    assert "Oops!" not in done.stderr, done.stderr
    return out.read_text()


def parse(text: str) -> dict[str, str]:
    """Every symbol that a .config mentions, without CONFIG_."""
    found = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"CONFIG_(\w+)=(.*)", line):
            found[match[1]] = match[2]
        elif match := re.fullmatch(r"# CONFIG_(\w+) is not set", line):
            found[match[1]] = "n"
    return found


def ours(model: Model, asked: Mapping[str, str]) -> dict[str, str]:
    """The same by our own evaluator."""
    evaluator = Evaluator(model, asked)
    found = {}
    for name, state in evaluator.states():
        value = value_of(evaluator, name)
        if (state.written and value != "") or value in ("y", "m"):
            found[name] = value
    return found


def differences(theirs: Mapping[str, str], model: Model, asked: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """What conf and we do not agree on: {symbol: (conf's, ours)}; a switch that is off may be mentioned or not."""
    mine = ours(model, asked)
    found = {}
    for name in sorted({*theirs, *mine}):
        off = "n" if model.kind(name) in (BOOL, TRISTATE) else ""
        pair = theirs.get(name, off), mine.get(name, off)
        if pair[0] != pair[1]:
            found[name] = pair
    return found


def expand(tree: Path, copy: Path, variables: Mapping[str, str], ask: object, files: list[str]) -> None:
    """A copy of these files in which nothing is left to expand."""
    assert callable(ask)
    macros = Macros(environment=variables, ask=ask)
    for name in files:
        lines = (tree / name).read_text(errors="replace").split("\n")
        if name == "scripts/Kconfig.include":
            for line in lines:
                if match := re.fullmatch(r"([\w-]+)\s*(:=|\+=|=)\s*(.*)", line):
                    macros.assign(match[1], match[2], match[3])
            lines = []
        path = copy / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(_expanded(line, macros) for line in lines))


def _expanded(line: str, macros: Macros) -> str:
    if match := re.fullmatch(r"([\w-]+)\s*(:=|\+=|=)\s*(.*)", line):
        macros.assign(match[1], match[2], match[3])
        return ""
    while "$(" in line:
        start = line.index("$(")
        try:
            end = closing(line, start + 2)
            value = macros.expand(line[start : end + 1])
        except ValueError:  # a help text that speaks of macros
            return line.replace("$(", "(")
        line = line[:start] + value.replace("$(", "(") + line[end + 1 :]
    return line


def variables_of(tree: Path, arch: Arch, prefix: str = "") -> dict[str, str]:
    """What the makefiles would hand to conf."""
    versions = [
        subprocess.run(
            [f"{prefix}{tool}", "--version"], capture_output=True, text=True, check=True
        ).stdout.splitlines()[0]
        for tool in ("gcc", "ld", "as")
    ]
    return environment(tree, Asking(arch=arch, prefix=prefix, versions=tuple(versions)))


def cache_in(path: Path) -> Cache:
    """A cache of a test's own."""
    return Cache(root=path / "cache")
