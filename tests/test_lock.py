"""lock.json: everything that went into a build; and what is refused because it is not in it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import osbuild
from osbuild import lock
from osbuild.arch import X86_64
from osbuild.errors import InputError
from osbuild.spec import BuildSpec
from tests.elsewhere import need_root
from tests.fake_registry import serving
from tests.layer_tools import archive, folder, member, write_layout
from tests.test_cli import OSBUILDER, one_line, run

ROOT = Path(__file__).parent.parent
FILES = (folder("etc"), member("etc/hello", b"hello"))
NO_DOCKER = {"DOCKER_HOST": "unix:///nonexistent"}


def build(image: object, out: Path, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return run("build", str(image), "-o", str(out), "--no-smoke", "--quiet", *words, **more)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "layout"
    write_layout(path, [archive(*FILES)])
    return path


@pytest.fixture(scope="module")
def built(layout: Path, kernel: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    done = build(f"oci:{layout}", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def locked(built: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((built / "lock.json").read_text())
    return found


# --- what is in it ---


def test_the_image_is_there_with_manifest_config_and_layers(layout: Path, locked: dict[str, Any]) -> None:
    (top,) = json.loads((layout / "index.json").read_text())["manifests"]
    manifest = json.loads((layout / "blobs/sha256" / top["digest"].removeprefix("sha256:")).read_text())
    assert locked["image"]["manifest"] == locked["image"]["digest"] == top["digest"]
    assert locked["image"]["config"] == manifest["config"]["digest"]
    assert [layer["digest"] for layer in locked["image"]["layers"]] == [one["digest"] for one in manifest["layers"]]


def test_the_agents_source_and_compiler_are_there(locked: dict[str, Any]) -> None:
    sources = {path.name: path for path in (ROOT / "agent").iterdir() if path.suffix in (".c", ".h")}
    assert locked["agent"]["inputs"]["sources"] == {
        name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sources.items()
    }
    assert locked["agent"]["inputs"]["compiler"][1]


def test_the_kernels_source_patches_fragments_and_compiler_are_there(locked: dict[str, Any], built: Path) -> None:
    kernel = locked["kernel"]
    manifest = json.loads((built / "manifest.json").read_text())
    assert kernel["key"] == manifest["kernel"]["key"]
    assert len(kernel["inputs"]["source"]) == 64
    assert {name for name, _ in kernel["inputs"]["patches"]} >= {
        path.name for path in (ROOT / "patches/6.12").iterdir()
    }
    assert "gcc" in kernel["inputs"]["tools"]
    for name, digest in kernel["fragments"].items():
        assert hashlib.sha256((ROOT / "kernel-configs" / name).read_bytes()).hexdigest() == digest
    assert any(name.startswith("common/") for name in kernel["fragments"])


def test_another_line_in_the_program_is_another_digest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "osbuild", tmp_path / "osbuild", ignore=shutil.ignore_patterns("__pycache__"))
    before = lock.code_digest()
    monkeypatch.setattr(osbuild, "__file__", str(tmp_path / "osbuild/__init__.py"))
    assert lock.code_digest() == before
    with (tmp_path / "osbuild/sources/image.py").open("a") as file:
        file.write("# one more\n")
    assert lock.code_digest() != before


# --- what differs ---

CHANGES = {
    "a layer": (("image", "layers", 0, "digest"), "image.layers[0]"),
    "only the configuration": (("image", "config"), "image.config"),
    "only the manifest": (("image", "digest"), "image.digest"),
    "an agent's source": (("agent", "inputs", "sources", "main.c"), "agent.inputs.sources.main.c"),
    "a foreign agent": (("agent", "sha256"), "agent.sha256"),
    "the kernel's source": (("kernel", "inputs", "source"), "kernel.inputs.source"),
    "a compiler": (("kernel", "inputs", "tools", "gcc"), "kernel.inputs.tools.gcc"),
    "a patch": (("kernel", "inputs", "patches", 1, 1), "kernel.inputs.patches.0002-9p"),
    "osbuilder": (("osbuilder", "code"), "osbuilder.code"),
    "an option": (("options", "disk", "align"), "options.disk.align"),
    "the epoch": (("options", "epoch"), "options.epoch"),
}


def changed(document: dict[str, Any], *places: tuple[str | int, ...]) -> dict[str, Any]:
    document = copy.deepcopy(document)
    for *above, last in places:
        inner: Any = document
        for step in above:
            inner = inner[step]
        inner[last] = "another"
    return document


@pytest.mark.parametrize("what", CHANGES)
def test_each_input_that_differs_has_one_line(what: str, locked: dict[str, Any]) -> None:
    place, name = CHANGES[what]
    found = lock.differences(locked, changed(locked, place))
    assert len(found) == 1, found
    assert found[0].startswith(name)


def test_what_follows_from_another_input_is_not_said(locked: dict[str, Any]) -> None:
    layer = ("image", "layers", 0, "digest")
    follows = [("image", "config"), ("image", "digest"), ("options", "epoch")]
    assert len(lock.differences(locked, changed(locked, layer, *follows))) == 1
    fragment = next(iter(locked["kernel"]["fragments"]))
    settings = [("kernel", "fragments", fragment), ("kernel", "inputs", "settings"), ("kernel", "key")]
    (line,) = lock.differences(locked, changed(locked, *settings))
    assert line.startswith(f"kernel.fragments.{fragment}")


def test_a_fragment_that_is_only_worded_anew_is_no_difference(locked: dict[str, Any]) -> None:
    fragment = next(iter(locked["kernel"]["fragments"]))
    assert lock.differences(locked, changed(locked, ("kernel", "fragments", fragment))) == ()


def test_where_inputs_lie_is_no_difference(locked: dict[str, Any]) -> None:
    assert lock.differences(locked, changed(locked, ("given", "image"), ("given", "agent"))) == ()


# --- --locked ---


def test_the_same_inputs_are_built(built: Path, layout: Path, tmp_path: Path) -> None:
    shutil.copytree(built, tmp_path / "out")
    done = build(f"oci:{layout}", tmp_path / "out", "--locked")
    assert done.returncode == 0, done.stderr
    for name in ("manifest.json", "lock.json", "sbom.cdx.json", "provenance.json"):
        assert (tmp_path / "out" / name).read_bytes() == (built / name).read_bytes(), name


def test_what_is_not_in_the_lock_is_named_and_nothing_is_written(built: Path, layout: Path, tmp_path: Path) -> None:
    write_layout(tmp_path / "other", [archive(*FILES, member("etc/more", b"more"))])
    shutil.copytree(built, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    done = build(f"oci:{tmp_path}/other", tmp_path / "out", "--locked", "--compress", "gzip")
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "image.layers[0]", "options.compress", "osbuilder.tools.zlib", "osbuilder.tools.zstd", "error", "hint",
    ]  # fmt: skip
    assert {path: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    done = build(f"oci:{tmp_path}/other", tmp_path / "new", "--lock", str(built / "lock.json"), "--json")
    assert done.returncode == 3
    assert len(json.loads(done.stdout)["details"]) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "No such file"),
        ("{", "JSON"),
        ("{}", "osbuilder.lock"),
        ('{"schema": "osbuilder.lock", "version": 1}', "'1'"),
        ('{"schema": "osbuilder.lock", "version": 2}', "says nothing of osbuilder, image"),
    ],
    ids=["none", "cut short", "something else", "an older one", "an empty one"],
)
def test_a_lock_that_is_none_is_refused_in_one_line(
    text: str | None, complaint: str, layout: Path, tmp_path: Path
) -> None:
    if text is not None:
        (tmp_path / "lock").write_text(text)
    done = build(f"oci:{layout}", tmp_path / "out", "--lock", str(tmp_path / "lock"))
    assert done.returncode == 3
    assert complaint in one_line(done.stderr)


@pytest.mark.parametrize(
    ("image", "taken"),
    [
        ("docker://debian:12", True),
        ("docker.io/library/debian:12", True),
        ("docker://debian:13", False),
        ("docker://other/debian:12", False),
        ("oci:debian", False),
        ("docker-archive:/a/debian:12", False),
        (f"docker://debian@sha256:{'1' * 64}", False),
    ],
)
def test_a_tag_means_what_it_meant_when_it_was_locked(image: str, taken: bool) -> None:
    pinned = f"docker://debian:12@sha256:{'0' * 64}"
    spec = BuildSpec(image=image, out=Path("out"), arch=X86_64)
    assert lock.pin(spec, {"given": {"image": pinned}}).image == (pinned if taken else image)


def test_a_lock_asks_for_the_build_that_it_is_of(locked: dict[str, Any], layout: Path) -> None:
    spec = lock.spec_from(locked, Path("out"), "here")
    wanted = BuildSpec(image=f"oci:{layout}", out=Path("out"), arch=X86_64, smoke=False, epoch=None)
    assert dataclasses.asdict(spec) == dataclasses.asdict(wanted)


@pytest.mark.parametrize(
    "place",
    [
        ("options", "disk"), ("options", "epoch"), ("options", "arch"), ("options", "kinds"), ("options", "features"),
        ("options", "compress"), ("given", "add"), ("given", "limits"), ("given", "image"), ("rootfs", "init"),
        ("options", "disk", "align"), ("options", "disk", "salt"),
    ],
    ids=lambda place: ".".join(place),
)  # fmt: skip
@pytest.mark.parametrize("value", ["another", 5, None, ["x"], {"x": "y"}], ids=["text", "5", "null", "list", "object"])
def test_a_lock_that_asks_for_nothing_that_can_be_is_refused(
    place: tuple[str, ...], value: object, locked: dict[str, Any]
) -> None:
    *above, last = place
    inner = locked
    for step in above:
        inner = inner[step]
    inner[last] = value
    try:
        lock.spec_from(locked, Path("out"), "here")
    except InputError as problem:
        assert str(problem).startswith("here is not one of ours")  # noqa: PT017 - some of them can be meant


# --- --offline ---


def test_without_a_network_a_build_works(layout: Path, kernel: object, tmp_path: Path) -> None:
    need_root()
    words = (*OSBUILDER, "build", f"oci:{layout}", "-o", str(tmp_path / "out"), "--no-smoke", "--quiet", "--offline")
    done = subprocess.run(["unshare", "--net", *words], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_offline_nobody_is_asked_over_a_network(layout: Path, kernel: object, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    with serving(layout) as server:
        image = f"docker://{server.address}/some/image:latest"
        cache = {"OSBUILDER_CACHE": str(tmp_path / "cache")}
        pulled = run("rootfs", image, "--raw", "--json", "--quiet", env=cache)
        assert pulled.returncode == 0, pulled.stderr
        trace = ("strace", "-f", "-qq", "-e", "trace=connect,sendto,sendmsg", "-o", str(tmp_path / "calls"))
        done = run("rootfs", image, "--raw", "--json", "--quiet", "--offline", env=cache, before=trace)
        assert done.returncode == 0, done.stderr
        assert done.stdout == pulled.stdout
        asked = (tmp_path / "calls").read_text()
        assert "AF_INET" not in asked
        run("rootfs", image, "--raw", "--json", "--quiet", env=cache, before=trace)
        assert "AF_INET" in (tmp_path / "calls").read_text(), "the trace would have shown it"


@pytest.mark.parametrize(
    ("words", "env", "complaint", "code"),
    [
        (("--recipe", "debian"), NO_DOCKER, "--offline touches none", 2),
        (("docker-daemon:app:1",), {"DOCKER_HOST": "tcp://192.0.2.1:2375"}, "--offline asks nobody over a network", 4),
        (("docker://registry.invalid/app:1",), NO_DOCKER, "is not in the cache", 3),
        (("registry.invalid/app:1",), NO_DOCKER, "is not in the cache", 3),
    ],
    ids=["a recipe", "a daemon elsewhere", "an image that is not in the cache", "a name alone"],
)
def test_offline_what_would_need_a_network_is_said(
    words: tuple[str, ...], env: dict[str, str], complaint: str, code: int, tmp_path: Path
) -> None:
    env = env | {"OSBUILDER_CACHE": str(tmp_path / "cache")}
    done = run("build", *words, "-o", str(tmp_path / "out"), "--no-smoke", "--quiet", "--offline", env=env)
    assert done.returncode == code, done.stderr
    assert complaint in one_line(done.stderr)
    assert not (tmp_path / "out").exists()
