"""osbuilder build --depfile: make builds again when a file that was read changes, comes or goes, and only then."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from osbuild import depfile
from osbuild.arch import X86_64
from osbuild.errors import InputError
from osbuild.options import build_spec, read_config
from osbuild.spec import Addition, BuildSpec, RootfsSpec
from tests.test_cli import one_line, run

OUTPUTS = ("out/manifest.json", "out/rootfs.img")
MAKEFILE = """-include out.d
.DEFAULT_GOAL := image
image: out/rootfs.img
out/manifest.json out/rootfs.img &:
\t@echo made
\t@touch out/manifest.json out/rootfs.img
"""


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "Makefile").write_text(MAKEFILE)


def write(*added: str, config: Path | None = None, **more: Any) -> str:
    """The file for a build that adds these."""
    rootfs = RootfsSpec(add=tuple(Addition(source=Path(name), target="/x") for name in added))
    wanted: dict[str, Any] = {"image": "docker://x", "out": Path("out"), "arch": X86_64, "rootfs": rootfs}
    spec = BuildSpec(**wanted | more)
    depfile.write(Path("out.d"), spec, map(Path, OUTPUTS), config)
    return Path("out.d").read_text()


def made() -> bool:
    done = subprocess.run(("make",), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return "made" in done.stdout


def later(path: str | Path) -> None:
    """As a change does it; make looks at no more than this."""
    now = max(Path(name).stat().st_mtime for name in OUTPUTS)
    os.utime(path, (now + 5, now + 5))


def settled() -> None:
    """Everything is done, and stays so."""
    newest = max(path.stat().st_mtime for path in Path().rglob("*"))
    for name in OUTPUTS:
        os.utime(name, (newest + 5, newest + 5))
    assert not made()


@pytest.mark.parametrize(
    "name",
    [
        "motd",
        "with blank",
        "a#b",
        "a$b",
        "a$$(shell false)b",
        "a:b",
        "a*b",
        "a[b]",
        "a?b",
        "ä",
        "a'b",
        'a"b',
        "a&b",
        "a(b",
        "(b)c",
        "a()",
    ],
)
def test_a_file_of_any_name_that_changes_is_seen(name: str) -> None:
    Path(name).write_text("1")
    write(name)
    assert made()
    settled()
    later(name)
    assert made()
    settled()
    Path(name).unlink()
    assert made(), "and so is one that goes"


@pytest.mark.parametrize("name", ["100%", "a=b", "a|b", "a;b", "a\\b", "a\nb", "a (1)"])
def test_what_make_cannot_write_is_refused_by_name_or_stands_for_its_directory(name: str) -> None:
    Path(name).write_text("1")
    with pytest.raises(InputError, match="make has no way to write"):
        write(name)
    Path("tree").mkdir()
    Path("tree", name).write_text("1")
    assert name not in write("tree")
    assert made()
    settled()
    later("tree")
    assert made()


@pytest.mark.parametrize("out", ["out=1", "100%", "a;b"])
def test_what_make_cannot_build_is_not_written(out: str) -> None:
    """`out=1/manifest.json: …` is a variable."""
    spec = BuildSpec(image="docker://x", out=Path(out), arch=X86_64)
    with pytest.raises(InputError, match="make has no way to write"):
        depfile.write(Path("out.d"), spec, (Path(out, "manifest.json"),), None)
    assert not Path("out.d").exists()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("-o", "out=1"), "out=1/manifest.json"),
        (("--add", "a=b:/etc/motd"), "a=b"),
        (("-f", "ci;1.toml"), "ci;1.toml"),
        (("--keyring", "keys 100%"), "keys 100%"),
    ],
    ids=["the outputs", "what is added", "osbuild.toml", "a keyring"],
)
def test_what_make_cannot_be_told_of_is_refused_before_anything_is_done(words: tuple[str, ...], name: str) -> None:
    """The image is not there, which would be the next thing to be said."""
    for path, text in (("a=b", ""), ("ci;1.toml", 'fs = "ext4"\n'), ("keys 100%", "")):
        Path(path).write_text(text)
    refused = run("build", "docker-archive:absent", "--depfile", "out.d", *words)
    assert refused.returncode == InputError.code, refused.stderr
    assert "make has no way to write" in one_line(refused.stderr)
    assert name in refused.stderr
    assert not Path("out.d").exists()
    refused = run("build", "docker-archive:a=b", "--depfile", "out.d")
    assert "make has no way to write" in one_line(refused.stderr), "an image too"


def test_a_file_that_comes_goes_or_changes_in_a_directory_is_seen() -> None:
    Path("tree/below").mkdir(parents=True)
    Path("tree/below/file").write_text("1")
    write("tree")
    assert made()
    settled()
    later("tree/below/file")
    assert made()
    settled()
    Path("tree/below/more").write_text("1")
    later("tree/below")
    assert made()
    settled()
    Path("tree/below/file").unlink()
    assert made()


def test_everything_that_a_build_reads_is_in_it() -> None:
    for name in ("modules", "hooks", "image", "linux"):
        Path(name).mkdir()
        Path(name, "inside").write_text("")
    for name in ("policy.rego", "keys", "an-agent", "ci.json", "motd"):
        Path(name).write_text("")
    Path("osbuild.toml").write_text(
        'image = "oci:image:tag"\nlock = "ci.json"\n[rootfs]\nadd = ["motd:/etc/motd"]\nagent = "an-agent"\n'
        'modules = "modules"\nhooks = "hooks"\npolicy = "policy.rego"\n'
        '[kernel]\nsource = "dir:linux"\nkeyring = "keys"\n'
    )
    words = read_config(Path("osbuild.toml"))
    spec = build_spec(words["image"], Path("out"), words)
    depfile.write(Path("out.d"), spec, map(Path, OUTPUTS), Path("osbuild.toml"))
    found = set(Path("out.d").read_text().replace("\\\n", "").splitlines()[0].partition(": ")[2].split())
    here = f"{Path().absolute()}/"
    assert {name.removeprefix(here) for name in found} >= {
        "osbuild.toml", "image/inside", "ci.json", "motd", "an-agent", "modules/inside", "hooks/inside", "policy.rego",
        "linux/inside", "keys",
    }  # fmt: skip
    ours = {Path(name).name for name in found if not name.startswith(here)}
    assert ours >= {"contract.toml", "packages.toml", "versions.toml", "__init__.py"}, "and osbuilder's own"


@pytest.mark.parametrize(
    ("image", "source"),
    [("docker://debian:12", "6.12"), ("docker-archive:-", "git:linux#v6.12"), ("debian", None)],
)
def test_what_is_no_file_is_not_in_it(image: str, source: str | None) -> None:
    text = write(image=image, kernel_source=source, lock=Path("out/lock.json"))
    assert str(Path().absolute()) not in text
