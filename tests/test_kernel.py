"""Runs the whole kernel build on tests/toy-kernel, a tree that compiles in a moment."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from osbuild import command
from osbuild.arch import AARCH64, X86_64
from osbuild.artifacts import Kernel
from osbuild.cache import Cache, default_cache
from osbuild.errors import BuildError, CommandError, HostError, InputError, SpecError
from osbuild.kconfig import parse_config
from osbuild.kernel import KernelSpec, build_kernel, configure, default_spec
from osbuild.kernel_pins import default_file

TOY = Path(__file__).parent / "toy-kernel"

PATCH = """\
toy: a comment

Why: a test
Origin: here
Upstream: never

diff --git a/init/main.c b/init/main.c
--- a/init/main.c
+++ b/init/main.c
@@ -11,4 +11,5 @@
\x20
 void _start(void)
 {
+\t/* patched */
 }
"""  # fmt: skip


@pytest.fixture
def fragment(tmp_path: Path) -> Path:
    path = tmp_path / "fragments" / "toy.conf"
    path.parent.mkdir()
    path.write_text('# why: a toy\nCONFIG_PRINTK=y\nCONFIG_NAME="toy"\n# CONFIG_BROKEN is not set\n')
    return path


@pytest.fixture
def spec(tmp_path: Path, fragment: Path) -> KernelSpec:
    tarball = tmp_path / "linux-6.12.7.tar.xz"
    subprocess.run(["tar", "-C", TOY.parent, "-cJf", tarball, TOY.name], check=True)
    return KernelSpec(arch=X86_64, source=tarball, fragments=(fragment.parent,), patches=tmp_path / "patches")


def add_line(fragment: Path, line: str) -> None:
    fragment.write_text(fragment.read_text() + line + "\n")


def write_patch(tmp_path: Path, text: str, name: str = "0001-comment.patch") -> Path:
    path = tmp_path / "patches" / "6.12" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def contents_of(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}


def programs_without(name: str, tmp_path: Path) -> Path:
    directory = tmp_path / "bin"
    directory.mkdir()
    for path in sorted(Path("/usr/bin").iterdir()):
        if path.name != name and path.exists() and path.stat().st_mode & stat.S_IXUSR:
            (directory / path.name).symlink_to(path)
    return directory


def trees_in(cache: Cache) -> list[Path]:
    return [path for path in cache.scratch("kernel-source").iterdir() if path.is_dir()]


def test_a_kernel_comes_out_with_what_it_is_and_what_went_in(spec: KernelSpec, cache: Cache) -> None:
    kernel = build_kernel(spec, cache)
    assert (kernel.release, kernel.arch, kernel.cached) == ("6.12.7", "x86_64", False)
    home = kernel.vmlinux.path.parent
    assert sorted(path.name for path in home.iterdir()) == [
        "System.map", "config", "contents.json", "kernel.json", "objects.json", "vmlinux", "vmlinuz",
    ]  # fmt: skip
    assert 'CONFIG_NAME="toy"\n' in kernel.config.path.read_text()
    assert ".debug_info" not in command.run("readelf", "-S", str(kernel.vmlinux.path)).output


def test_the_second_time_nothing_runs_make(
    spec: KernelSpec, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_kernel(spec, cache)
    fake = tmp_path / "bin" / "make"
    fake.parent.mkdir()
    fake.write_text("#!/bin/sh\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    assert build_kernel(spec, cache) == dataclasses.replace(first, cached=True)


def test_one_line_of_a_fragment_makes_another_kernel(spec: KernelSpec, cache: Cache, fragment: Path) -> None:
    first = build_kernel(spec, cache)
    add_line(fragment, "CONFIG_NET=y")
    second = build_kernel(spec, cache)
    assert second.key != first.key
    assert not second.cached
    assert "CONFIG_NET=y" in second.config.path.read_text()


def test_a_reason_reworded_or_a_file_cut_in_two_is_the_same_kernel(
    spec: KernelSpec, cache: Cache, fragment: Path
) -> None:
    first = build_kernel(spec, cache)
    fragment.write_text('# why: reworded\n\nCONFIG_NAME="toy"\n# CONFIG_BROKEN is not set\n')
    fragment.with_name("other.conf").write_text("# why: apart\nCONFIG_PRINTK=y\n")
    assert build_kernel(spec, cache) == dataclasses.replace(first, cached=True)


def test_two_caches_get_the_same_bytes(spec: KernelSpec, cache: Cache, tmp_path: Path) -> None:
    first = build_kernel(spec, cache)
    second = build_kernel(spec, Cache(root=tmp_path / "elsewhere" / "deeper"))
    assert contents_of(first.vmlinux.path.parent) == contents_of(second.vmlinux.path.parent)


@pytest.mark.skipif(shutil.which("ccache") is None, reason="no ccache: apt-get install ccache")
def test_the_bytes_are_the_same_with_ccache_and_without(
    spec: KernelSpec, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_kernel(spec, cache)
    monkeypatch.setenv("PATH", str(programs_without("ccache", tmp_path)))
    second = build_kernel(spec, Cache(root=tmp_path / "elsewhere"))
    assert first.vmlinux.path.read_bytes() == second.vmlinux.path.read_bytes()


def test_blanks_in_the_names_of_fragments_do_no_harm(spec: KernelSpec, cache: Cache, tmp_path: Path) -> None:
    place = tmp_path / "my fragments" / "a b.conf"
    place.parent.mkdir()
    place.write_text("# why: a test\nCONFIG_NET=y\n")
    assert "CONFIG_NET=y" in configure(dataclasses.replace(spec, fragments=(place,)), cache)


def test_a_cache_where_make_cannot_work_is_said_beforehand(spec: KernelSpec, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no blanks or colons"):
        build_kernel(spec, Cache(root=tmp_path / "my cache"))


def test_a_setting_that_did_not_stick_fails_with_its_name_its_line_and_what_it_needs(
    spec: KernelSpec, cache: Cache, fragment: Path
) -> None:
    add_line(fragment, "CONFIG_VIRTIO_NET=y\nCONFIG_TYPO=y")
    with pytest.raises(BuildError) as caught:
        build_kernel(spec, cache)
    assert f"CONFIG_VIRTIO_NET: wanted y, got n ({fragment}:5)" in str(caught.value)
    assert f"CONFIG_TYPO: wanted y, got n ({fragment}:6)" in str(caught.value)
    assert "CONFIG_VIRTIO_NET: NET is n" in caught.value.hint
    assert "CONFIG_TYPO: this kernel has no such symbol" in caught.value.hint


def test_a_failing_make_shows_the_compilers_error_and_keeps_the_log(
    spec: KernelSpec, cache: Cache, fragment: Path
) -> None:
    fragment.write_text("# why: a test\nCONFIG_BROKEN=y\n")
    with pytest.raises(CommandError, match="error: #error this toy is broken") as caught:
        build_kernel(spec, cache)
    assert caught.value.log is not None
    assert "  CC      init/main.o\n" in caught.value.log.read_text()
    assert str(caught.value.log) in caught.value.hint
    assert list(cache.scratch("kernel-build").glob("*/of")) == []
    fragment.write_text("# why: a test\nCONFIG_PRINTK=y\n")
    assert not build_kernel(spec, cache).cached


def compiled(cache: Cache, kernel: Kernel) -> list[str]:
    log = (cache.scratch("logs") / f"kernel-{kernel.key[:16]}.log").read_text()
    return sorted(line.split()[1] for line in log.splitlines() if line.startswith("  CC "))


def test_the_next_kernel_of_a_tree_compiles_what_its_options_change_and_has_the_bytes_of_one_made_alone(
    spec: KernelSpec, cache: Cache, fragment: Path, tmp_path: Path
) -> None:
    build_kernel(spec, cache)
    add_line(fragment, "CONFIG_NET=y")
    more = build_kernel(spec, cache)
    assert compiled(cache, more) == ["net/net.o"]
    fragment.write_text("# why: less\nCONFIG_BROKEN=n\n")
    less = build_kernel(spec, cache)
    assert compiled(cache, less) == ["init/main.o"]
    alone = build_kernel(spec, Cache(root=tmp_path / "elsewhere"))
    assert contents_of(less.vmlinux.path.parent) == contents_of(alone.vmlinux.path.parent)
    assert len([path for path in cache.scratch("kernel-build").iterdir() if path.is_dir()]) == 1


@pytest.mark.parametrize("why", ["it was killed", "other compilers", "another tree"])
def test_what_another_build_left_is_not_used_when(
    why: str, spec: KernelSpec, cache: Cache, fragment: Path, tmp_path: Path
) -> None:
    build_kernel(spec, cache)
    (of,) = cache.scratch("kernel-build").glob("*/of")
    (of.parent / "linux/out/init/main.o").write_bytes(b"half an object")
    if why == "it was killed":
        of.unlink()
    elif why == "other compilers":
        of.write_text(of.read_text().replace("gcc", "cc"))
    else:
        write_patch(tmp_path, PATCH)
    add_line(fragment, "CONFIG_NET=y")
    kernel = build_kernel(spec, cache)
    assert compiled(cache, kernel) == ["init/main.o", "net/net.o"]
    assert [path.parent.exists() for path in (of,)] == [why != "another tree"]


def test_two_kernels_of_one_tree_at_once_do_not_meet(
    spec: KernelSpec, cache: Cache, fragment: Path, tmp_path: Path
) -> None:
    build_kernel(spec, cache)
    (of,) = cache.scratch("kernel-build").glob("*/of")
    add_line(fragment, "CONFIG_NET=y")
    with cache.lock(f"kernel-build-{of.parent.name}"):
        kernel = build_kernel(spec, cache)
    assert compiled(cache, kernel) == ["init/main.o", "net/net.o"]
    assert [path for path in cache.scratch("kernel-build").iterdir() if path.is_dir()] == [of.parent]
    alone = build_kernel(spec, Cache(root=tmp_path / "elsewhere"))
    assert kernel.vmlinux.path.read_bytes() == alone.vmlinux.path.read_bytes()


def test_progress_counts_every_step_and_knows_how_many_objects_there_will_be(
    spec: KernelSpec, cache: Cache, fragment: Path
) -> None:
    heard: list[tuple[int, int]] = []
    build_kernel(spec, cache, show=lambda done, total: heard.append((done, total)))
    assert [done for done, _ in heard] == [1, 2, 3]
    heard.clear()
    add_line(fragment, "CONFIG_VIRTIO_NET=y\nCONFIG_NET=y")  # the second compiles one object more
    build_kernel(spec, cache, show=lambda done, total: heard.append((done, total)))
    assert heard == [(1, 4), (2, 4), (3, 4)]  # the first object is still good


def test_a_patch_makes_another_kernel_and_leaves_the_clean_tree_clean(
    spec: KernelSpec, cache: Cache, tmp_path: Path
) -> None:
    first = build_kernel(spec, cache)
    write_patch(tmp_path, PATCH)
    assert build_kernel(spec, cache).key != first.key
    clean, patched = sorted(trees_in(cache), key=lambda tree: len(tree.name))
    assert contents_of(clean) == contents_of(TOY)
    assert b"/* patched */" in (patched / "init/main.c").read_bytes()


def test_a_patch_is_applied_also_when_the_cache_is_inside_a_repository(
    spec: KernelSpec, cache: Cache, tmp_path: Path
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    write_patch(tmp_path, PATCH)
    build_kernel(spec, cache)
    assert any(b"/* patched */" in (tree / "init/main.c").read_bytes() for tree in trees_in(cache))


def test_a_patch_that_does_not_apply_leaves_no_tree_and_no_kernel(
    spec: KernelSpec, cache: Cache, tmp_path: Path
) -> None:
    write_patch(tmp_path, PATCH, "0001-good.patch")
    bad = write_patch(tmp_path, PATCH.replace("_start(void)", "_begin(void)"), "0002-bad.patch")
    with pytest.raises(BuildError, match=rf"{bad} does not apply"):
        build_kernel(spec, cache)
    (clean,) = trees_in(cache)
    assert contents_of(clean) == contents_of(TOY)
    assert list(cache.scratch("kernel").iterdir()) == []
    bad.unlink()
    assert not build_kernel(spec, cache).cached


def test_a_patchs_reason_reworded_is_the_same_kernel(spec: KernelSpec, cache: Cache, tmp_path: Path) -> None:
    write_patch(tmp_path, PATCH)
    first = build_kernel(spec, cache)
    write_patch(tmp_path, PATCH.replace("Why: a test", "Why: a better reason"))
    assert build_kernel(spec, cache) == dataclasses.replace(first, cached=True)


def test_patches_of_another_series_are_left_alone(spec: KernelSpec, cache: Cache, tmp_path: Path) -> None:
    first = build_kernel(spec, cache)
    path = tmp_path / "patches" / "6.1" / "0001-old.patch"
    path.parent.mkdir(parents=True)
    path.write_text("nonsense")
    assert build_kernel(spec, cache).key == first.key


def test_every_missing_tool_is_named_at_once_with_the_packages(
    spec: KernelSpec, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = tmp_path / "bin"
    few.mkdir()
    for name in ("make", "gcc", "ld", "as", "tar", "xz", "perl", "strip"):
        (few / name).symlink_to(shutil.which(name) or "/missing")
    monkeypatch.setenv("PATH", str(few))
    with pytest.raises(HostError, match="flex, bison, bc") as caught:
        build_kernel(spec, cache)
    assert (caught.value.code, caught.value.hint) == (4, "apt-get install bc bison flex")


def test_a_compressor_is_needed_only_by_a_kernel_that_asks_for_it(
    spec: KernelSpec, cache: Cache, fragment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(programs_without("lz4", tmp_path)))
    build_kernel(spec, cache)
    add_line(fragment, "CONFIG_KERNEL_LZ4=y")
    with pytest.raises(HostError, match="lz4"):
        build_kernel(spec, cache)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(lambda path: path.write_bytes(b"not a tarball"), "cannot unpack", id="not a tarball"),
        pytest.param(lambda path: None, "no kernel source at", id="nothing there"),
        pytest.param(lambda path: path.mkdir(), "is not a kernel source", id="an empty directory"),
        pytest.param(
            lambda path: subprocess.run(["tar", "-C", TOY, "-cJf", path, "init"], check=True),
            "is not a kernel source",
            id="something else in it",
        ),
    ],
)
def test_what_is_no_kernel_source_is_refused_and_leaves_nothing(
    spec: KernelSpec, cache: Cache, tmp_path: Path, make: object, said: str
) -> None:
    path = tmp_path / "other.tar.xz"
    assert callable(make)
    make(path)
    with pytest.raises(InputError, match=said):
        build_kernel(dataclasses.replace(spec, source=path), cache)
    assert trees_in(cache) == []


def test_a_tarball_replaced_under_the_same_name_is_noticed(spec: KernelSpec, cache: Cache, tmp_path: Path) -> None:
    first = build_kernel(spec, cache)
    other = shutil.copytree(TOY, tmp_path / "toy-kernel")
    (other / "Makefile").write_text((other / "Makefile").read_text().replace("SUBLEVEL = 7", "SUBLEVEL = 8"))
    assert spec.source is not None
    subprocess.run(["tar", "-C", tmp_path, "-cJf", spec.source, other.name], check=True)
    second = build_kernel(spec, cache)
    assert (first.release, second.release) == ("6.12.7", "6.12.8")


def test_an_unknown_feature_and_an_architecture_without_fragments_are_refused_by_name() -> None:
    with pytest.raises(SpecError, match="'warp'"):
        default_spec(X86_64, features=["warp"])
    with pytest.raises(SpecError, match="riscv64"):
        default_spec(dataclasses.replace(AARCH64, name="riscv64"))


@pytest.mark.skipif(not default_file().is_file(), reason=f"no {default_file()}: apt-get install linux-source-6.12")
@pytest.mark.slow
def test_linux_keeps_every_setting_of_ours() -> None:
    config = parse_config(configure(default_spec(X86_64), default_cache()))
    assert {"CONFIG_PVH", "CONFIG_EROFS_FS", "CONFIG_DM_INIT", "CONFIG_VIRTIO_VSOCKETS"} <= config.keys()
    assert config.keys().isdisjoint({"CONFIG_MODULES", "CONFIG_DEVMEM", "CONFIG_USB", "CONFIG_DRM", "CONFIG_SOUND"})
