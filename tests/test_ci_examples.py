"""docs/ci: read by other people's readers, held against our command line, and the makefile run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from osbuild.resources import resource
from tests.test_build import busybox
from tests.test_cli import OSBUILDER, run
from tests.test_report_page import boot, report

__all__ = ["busybox"]  # a fixture

HOME: Final = Path(__file__).parent.parent / "docs/ci"
GITHUB, GITLAB = HOME / "github.yml", HOME / "gitlab.yml"
_RULES: Final = "{extends: default, rules: {line-length: {max: 130}, document-start: disable, truthy: disable}}"


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, f"{name} is a development dependency"
    return found


def clean(*words: str) -> None:
    done = subprocess.run((tool(words[0]), *words[1:]), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_workflow_is_one_by_githubs_schema_and_the_other_by_gitlabs() -> None:
    clean("check-jsonschema", "--builtin-schema", "vendor.github-workflows", str(GITHUB))
    transform = ("--data-transform", "gitlab-ci")
    clean("check-jsonschema", "--builtin-schema", "vendor.gitlab-ci", *transform, str(GITLAB))


def test_both_are_tidy_and_the_workflow_has_no_known_weakness() -> None:
    clean("yamllint", "--strict", "-d", _RULES, str(HOME))
    clean("zizmor", "--offline", "--no-progress", str(GITHUB))


def test_a_compiled_kernel_is_kept_also_when_a_guest_did_not_boot() -> None:
    assert yaml.safe_load(GITLAB.read_text())["default"]["cache"]["when"] == "always"
    steps = yaml.safe_load(GITHUB.read_text())["jobs"]["guest"]["steps"]
    used = [step.get("uses", "").partition("@")[0] for step in steps]
    assert "actions/cache" not in used, "it saves only after a job that went well"
    restore, save = (steps[used.index(f"actions/cache/{name}")] for name in ("restore", "save"))
    built = next(step for step in steps if " build " in step.get("run", ""))
    assert steps.index(restore) < steps.index(built) < steps.index(save)
    assert save["if"].startswith("always()")
    assert save["with"]["path"] == restore["with"]["path"]


def scripts(document: Any) -> str:
    """All that is run: strings below `run`, `script`, `before_script` and `after_script`."""
    found: list[str] = []
    for key, value in document.items() if isinstance(document, dict) else enumerate(document):
        if key in ("run", "script", "before_script", "after_script"):
            found += [value] if isinstance(value, str) else value
        elif isinstance(value, dict | list):
            found.append(scripts(value))
    return "\n".join(found)


def commands(text: str) -> set[tuple[str, ...]]:
    return {
        tuple(found.split()) for found in re.findall(r"(?:^|[/ ;])osbuilder ([a-z].*?)(?: >>.*)?$", text, re.MULTILINE)
    }


def makefile() -> str:
    return re.sub(r"\$\(OSBUILDER\)", "osbuilder", (HOME / "guest.mk").read_text().replace("\t", ""))


@pytest.mark.parametrize("name", ["github.yml", "gitlab.yml", "guest.mk"])
def test_every_word_is_one_that_the_command_line_has(name: str) -> None:
    text = makefile() if name == "guest.mk" else scripts(yaml.safe_load((HOME / name).read_text()))
    found = commands(text)
    assert {words[0] for words in found} >= {"build", "publish"}
    for words in found:
        command = [word for word in words[:2] if re.fullmatch("[a-z]+", word)][: 2 if words[0] == "kernel" else 1]
        said = run(*command, "--help")
        assert said.returncode == 0, f"{words}: {said.stderr}"
        for option in (word for word in words if word.startswith("--")):
            assert re.search(rf"{option}\b", said.stdout), f"{' '.join(command)} has no {option}"


def test_both_install_what_doctor_wants_of_a_machine_that_builds_for_itself() -> None:
    lists = {tuple(sorted(re.search(r"recommends\s+(.*)", text, re.DOTALL)[1].split("python3 -m")[0].split()))  # type: ignore[index]
             for text in (scripts(yaml.safe_load(path.read_text())) for path in (GITHUB, GITLAB))}  # fmt: skip
    (packages,) = lists
    bootstrap = (resource("scripts") / "bootstrap").read_text()
    known = set(re.findall(r"need \S+ (\S+?)(?:;|\n)", bootstrap))
    assert set(packages) - known <= {"ca-certificates", "libc6-dev", "python3-venv"}


def recorded(home: Path, *words: str) -> tuple[int, list[str]]:
    """make with an osbuilder that writes down what is asked of it, and does nothing but `report`; its exit code too."""
    stub = home / "osbuilder"
    real = shlex.join((*OSBUILDER, "report"))
    stub.write_text(f'#!/bin/sh\necho "$*" >> said\nif [ "$1" = report ]; then shift; exec {real} "$@"; fi\n')
    stub.chmod(0o755)
    given = (f"OSBUILDER={stub}", "OUT=out", *words)
    done = subprocess.run(
        ("make", "-f", str(HOME / "guest.mk"), *given), cwd=home, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(HOME.parent.parent)},
    )  # fmt: skip
    said = home / "said"
    return done.returncode, said.read_text().splitlines() if said.exists() else []


def booted(home: Path, verdict: str) -> None:
    """A build, as far as make looks at it, with a report that is newer."""
    (home / "out/smoke").mkdir(parents=True)
    for name in ("manifest.json", "rootfs.img", "initrd.img", "vmlinux", "vmlinuz"):
        (home / "out" / name).touch()
    guest = boot(verdict=verdict, reason="the kernel panicked")
    (home / "out/smoke/report.json").write_text(json.dumps(report(guest) | {"verdict": verdict}))


@pytest.mark.parametrize(("verdict", "goes"), [("passed", True), ("failed", False), ("unknown", False)])
def test_make_publishes_what_booted_well_and_nothing_else(verdict: str, goes: bool, tmp_path: Path) -> None:
    booted(tmp_path, verdict)
    code, said = recorded(tmp_path, "publish", "REGISTRY=r.example/a:1")
    assert (code == 0) is goes
    assert said == ["report out --check", *(["publish out r.example/a:1"] if goes else [])]


def test_make_hands_on_what_publish_and_kernel_are_to_be_told(tmp_path: Path) -> None:
    booted(tmp_path, "passed")
    flags = "--sign guest.key --authfile auth.json"
    assert recorded(tmp_path, "publish", f"PUBLISH_FLAGS={flags}") == (2, []), "there is no REGISTRY"
    assert recorded(tmp_path, "publish", "REGISTRY=r.example/a:1", f"PUBLISH_FLAGS={flags}")[0] == 0
    (tmp_path / "osbuild.toml").write_text("")
    code, said = recorded(tmp_path, "kernel")
    assert (code, said[1:]) == (0, [f"publish out r.example/a:1 {flags}", "kernel build --config osbuild.toml"])


@pytest.mark.boot
@pytest.mark.slow
def test_make_does_what_changed_and_nothing_else(busybox: Path, kernel: object, tmp_path: Path) -> None:
    shutil.copytree(busybox, tmp_path / "image")
    (tmp_path / "osbuild.toml").write_text('fs = "erofs"\n[rootfs]\nadd = ["guest/motd:/etc/motd"]\n')
    (tmp_path / "guest").mkdir()
    (tmp_path / "guest/motd").write_text("1\n")

    def make(*words: str) -> str:
        given = (
            f"OSBUILDER={Path(sys.executable).parent}/osbuilder",
            "IMAGE=oci:image",
            "OUT=out",
            "BUILD_FLAGS=--quiet",
            "SMOKE_FLAGS=--quiet",
        )
        done = subprocess.run(
            ("make", "-f", str(HOME / "guest.mk"), *given, *words),
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert " build oci:image" in make("image", "initrd")
    assert "Nothing to be done" in make("image", "initrd")
    assert " smoke out" in make("smoke")
    assert "Nothing to be done" in make("smoke")
    os.utime(tmp_path / "osbuild.toml")
    again = make("smoke")  # with -n make 4.3 forgets what depends on files that are made together
    assert " build oci:image" in again
    assert " smoke out" in again
    for changed in ("guest/motd", "image/index.json"):
        assert "Nothing to be done" in make("image")
        os.utime(tmp_path / changed)
        assert " build oci:image" in make("image"), changed
    (tmp_path / "out/initrd.img").unlink()
    assert " build oci:image" in make("-n", "initrd")
