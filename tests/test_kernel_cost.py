"""What a kernel's fragments cost: what make would compile, foretold; what was measured of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from osbuild import kernel_cost, kernel_objects
from osbuild.arch import ARCHES, X86_64, Arch
from osbuild.cache import Cache, default_cache
from osbuild.errors import HostError
from osbuild.kbuild import objects
from osbuild.kconfig import parse_config
from osbuild.kernel import KernelSpec, build_kernel, default_spec, find_kernel, prepared_tree, seconds_memory

TOY = Path(__file__).parent / "toy-kernel"


def tree_of(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("makefile", "config", "wanted"),
    [
        pytest.param("obj-y := a.o b.o", "", "fs/a.o fs/b.o", id="always"),
        pytest.param("obj-$(CONFIG_X) += a.o\nobj-$(CONFIG_Y) += b.o", "X", "fs/a.o", id="for a symbol"),
        pytest.param("obj-y += t.o\nt-y := a.o\nt-$(CONFIG_X) += b.o", "X", "fs/a.o fs/b.o", id="a composite"),
        pytest.param("obj-y += t.o\nt-objs := a.o b.o", "", "fs/a.o fs/b.o", id="a composite, as it was written"),
        pytest.param("ifdef CONFIG_X\nobj-y += a.o\nelse\nobj-y += b.o\nendif", "", "fs/b.o", id="ifdef and else"),
        pytest.param("ifeq ($(CONFIG_X),y)\nobj-y += a.o\nendif", "X", "fs/a.o", id="ifeq"),
        pytest.param("ifneq ($(CONFIG_X)$(CONFIG_Y),)\nobj-y += a.o\nendif", "Y", "fs/a.o", id="ifneq"),
        pytest.param(
            "ifdef CONFIG_X\nifdef CONFIG_Y\nobj-y += a.o\nelse\nobj-y += b.o\nendif\nendif", "X", "fs/b.o", id="nested"
        ),
        pytest.param("obj-y += t.o\nt-$(subst m,y,$(CONFIG_X)) += a.o", "X", "fs/a.o", id="subst in a name"),
        pytest.param(
            "list = a.o \\\n  b.o # not c.o\nobj-y += $(list)", "", "fs/a.o fs/b.o", id="a variable, continued"
        ),
        pytest.param("obj-y += $(if $(CONFIG_X),a.o,b.o)", "X", "fs/a.o", id="if"),
        pytest.param("names := a b\nobj-y += $(addsuffix .o,$(names))", "", "fs/a.o fs/b.o", id="addsuffix"),
        pytest.param("obj-y += ext4/", "", "fs/ext4/inner.o", id="a directory"),
        pytest.param("obj-$(CONFIG_X) += ext4/", "", "", id="a directory that is off"),
        pytest.param("lib-y += a.o", "", "fs/a.o", id="a library"),
        pytest.param("a.o: b.c\n\tcmd = obj-y += b.o", "", "", id="a recipe"),
        pytest.param("obj-y += $(shell echo a.o)", "", "", id="what is not run"),
        pytest.param("a = $(a)\nobj-y += $(a) b.o", "", "fs/b.o", id="a variable that names itself"),
    ],
)
def test_what_a_makefile_compiles_is_foretold(tmp_path: Path, makefile: str, config: str, wanted: str) -> None:
    tree = tree_of(tmp_path, {"fs/Makefile": makefile + "\n", "fs/ext4/Makefile": "obj-y := inner.o\n"})
    found = objects(tree, "x86_64", {f"CONFIG_{name}": "y" for name in config.split()})
    assert found == set(wanted.split())


@pytest.mark.boot  # takes the real kernel
@pytest.mark.parametrize("arch", ARCHES.values(), ids=ARCHES)
def test_nearly_every_object_of_the_real_kernel_is_foretold_and_none_that_make_did_not_compile(arch: Arch) -> None:
    spec = default_spec(arch)
    try:
        kernel = find_kernel(spec, default_cache())
    except HostError as problem:
        pytest.skip(f"{problem}: {problem.hint}")
    if kernel is None:
        pytest.skip(f"the kernel for {arch.name} is not built: osbuilder kernel build --arch {arch.name}")
    made = kernel_objects.read_sizes(kernel.vmlinux.path.parent).keys()
    config = parse_config(kernel.config.path.read_text())
    foretold = objects(prepared_tree(spec, default_cache()), arch.kernel, config)
    library = re.compile(r"lib/|arch/\w+/(lib|entry/vdso)/")  # what nothing refers to is not linked
    assert {name for name in foretold - made if not library.match(name)} == set()
    assert len(made - foretold) <= len(made) // 100


@pytest.fixture
def spec(tmp_path: Path) -> KernelSpec:
    tarball = tmp_path / "linux-6.12.7.tar.xz"
    subprocess.run(["tar", "-C", TOY.parent, "-cJf", tarball, TOY.name], check=True)
    common = tmp_path / "common"
    tree_of(common, {
        "base.conf": "# why: a toy\nCONFIG_PRINTK=y\n", "net.conf": "# why: a toy\nCONFIG_NET=y\n",
        "virtio.conf": "# why: a toy\nCONFIG_VIRTIO_NET=y\n",
    })  # fmt: skip
    return KernelSpec(arch=X86_64, source=tarball, fragments=(common,))


@pytest.mark.parametrize("ccache", [True, False])
def test_a_fragment_costs_the_objects_that_are_gone_without_it(
    spec: KernelSpec, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ccache: bool
) -> None:
    if not ccache:
        monkeypatch.setenv("PATH", str(_without_ccache(tmp_path)))
    kernel = build_kernel(spec, cache)
    found = kernel_cost.measure(spec, kernel, cache)
    costs = {cost.name: cost for cost in found.fragments}
    assert (costs["common/net"].objects, costs["common/net"].largest) == (1, ("net/net.o",))
    assert costs["common/net"].bytes > 1000  # its buffer
    assert costs["common/net"].symbols == 2  # itself, and what depends on it
    assert (costs["common/base"].objects, costs["common/virtio"].objects) == (0, 0)
    assert next(cost.name for cost in found.fragments) == "common/net"
    assert (found.whole.objects, found.whole.unmeasured) == (2, 0)
    assert found.whole.seconds > 0
    text = json.dumps(found.to_dict())
    assert json.loads(text)["whole"]["objects"] == 2


def _without_ccache(tmp_path: Path) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    for path in sorted(Path("/usr/bin").iterdir()):
        if path.name != "ccache" and path.exists():
            (directory / path.name).symlink_to(path)
    return directory


def test_what_ccache_had_keeps_the_seconds_of_the_time_when_a_compiler_ran(spec: KernelSpec, cache: Cache) -> None:
    build_kernel(spec, cache)
    memory = seconds_memory(cache, X86_64)
    known = kernel_objects.recall_seconds(memory)
    assert known.keys() == {"init/main.o", "net/net.o"}
    memory.write_text(json.dumps(known | {"init/main.o": 77.0}))
    for path in (cache.root / "v1/kernel").iterdir():
        path.rename(path.with_name("gone"))
    assert not build_kernel(spec, cache).cached
    if any(Path(part, "ccache").is_file() for part in os.environ["PATH"].split(":")):
        assert kernel_objects.recall_seconds(memory)["init/main.o"] == 77.0


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"a.o": "x"}'])
def test_a_damaged_memory_of_seconds_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "seconds"
    path.write_text(text)
    assert kernel_objects.recall_seconds(path) == {}


def test_the_timed_compiler_ends_as_the_compiler_does_and_says_what_it_took(tmp_path: Path) -> None:
    timed = str(kernel_objects.write_timed(tmp_path))
    assert subprocess.run([timed, "sh", "-c", "exit 7"], check=False).returncode == 7
    busy = "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done"
    subprocess.run([timed, "sh", "-c", busy, "x", "-o", "a b.o"], check=True, cwd=tmp_path)
    (found,) = tmp_path.glob("*.seconds")
    assert found.name == "a b.o.seconds"
    assert 0 < (kernel_objects._seconds(found) or 0) < 5
