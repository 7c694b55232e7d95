"""osbuilder.yaml: the keys that Kata's tools look for, and strings that stay what they are whatever they hold."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import osbuild
from osbuild.summary import PATH, Yaml, creation_time, to_yaml
from tests.guest_trees import add, assemble, text
from tests.layer_tools import member

STATUS = b"""Package: zlib1g
Status: install ok installed
Architecture: amd64
Version: 1:1.2.13.dfsg-1

Package: apt
Status: install ok installed
Architecture: amd64
Version: 2.6.1
"""
RELEASE = b'PRETTY_NAME="Debian"\nID=debian\nVERSION_ID="12"\n'
DEBIAN = (member("var/lib/dpkg/status", STATUS), member("etc/os-release", RELEASE))


def parse(yaml: str) -> Any:
    """Just what to_yaml may write: mappings by two blanks, lists of scalars, scalars that JSON or YAML's \\U spell."""
    lines = yaml.splitlines()
    assert lines.pop(0) == "---"
    root: dict[str, Any] = {}
    stack: list[Any] = [root]
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        indent, rest = re.fullmatch(r"((?:  )*)(\S.*)", line).groups()  # type: ignore[union-attr]
        del stack[len(indent) // 2 + 1 :]
        if rest.startswith("- "):
            stack[-1].append(scalar(rest[2:]))
            continue
        key, value = re.fullmatch(r'([a-z][a-z-]*|"(?:[^"\\]|\\.)*"):(?: (.*))?', rest).groups()  # type: ignore[union-attr]
        name = scalar(key) if key.startswith('"') else key
        if value is None:
            stack[-1][name] = [] if following.lstrip().startswith("- ") else {}
            stack.append(stack[-1][name])
        else:
            stack[-1][name] = scalar(value)
    return root


def scalar(word: str) -> Any:
    halves = lambda match: json.dumps(chr(int(match[1], 16)))[1:-1]  # noqa: E731 - YAML's escape as JSON's
    return json.loads(re.sub(r"\\U([0-9a-f]{8})", halves, word))


def summary_of(work: Path, *members: object, **wishes: Any) -> Any:
    return parse(text(assemble(work, *members, **wishes).tree, PATH))


def test_the_summary_says_what_is_inside(tmp_path: Path) -> None:
    found = summary_of(tmp_path, *DEBIAN)
    assert found["osbuilder"]["version"] == osbuild.__version__
    assert found["rootfs-creation-time"] == "1970-01-01T00:16:40.000000000+0000Z"
    assert (found["description"], found["file-format-version"]) == ("osbuilder rootfs", "0.0.2")
    assert found["architecture"] == "x86_64"
    assert (found["base-distro"]["name"], found["base-distro"]["version"]) == ("debian", "12")
    assert found["base-distro"]["packages"] == {"default": ["apt=2.6.1", "zlib1g=1:1.2.13.dfsg-1"], "extra": []}
    assert found["agent"] == {
        "url": "unknown", "name": "osbuilder-agent", "version": "9.9", "agent-is-init-daemon": "yes",
    }  # fmt: skip


def test_the_summary_says_what_was_wished_and_dropped(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("x")
    gone = member("gone", b"1", pax_headers={"SCHILY.xattr.security.selinux": "x"})
    (tmp_path / "p.rego").write_text("package agent_policy\n")
    wishes = {"add": (add(tmp_path / "x", "/opt/x"),), "remove": ("/gone",), "policy": tmp_path / "p.rego"}
    found = summary_of(tmp_path, gone, **wishes, slim=True)
    assert found["changes"] == {
        "added": ["/etc/kata-opa", "/opt/x"], "removed": ["/gone"], "slim": "yes",
        "dropped-xattrs": {"security.selinux": 1},
    }  # fmt: skip


def test_removed_databases_do_not_make_packages_unknown(tmp_path: Path) -> None:
    found = summary_of(tmp_path, *DEBIAN, remove=("/var/lib/dpkg",))
    assert len(found["base-distro"]["packages"]["default"]) == 2


def test_an_image_of_no_distribution_is_unknown(tmp_path: Path) -> None:
    found = summary_of(tmp_path, member("a"))
    assert (found["base-distro"]["name"], found["base-distro"]["packages"]["default"]) == ("unknown", [])


STRINGS = [
    "",
    "yes",
    "null",
    "1.0",
    "a: b",
    "# no",
    "- x",
    "'",
    '"',
    "\\",
    "\n\t\0\x1b\x7f\x85",
    "é\u2028\ufeff",
    "\U0001f600",
    "!!x",
    "{}",
]


@pytest.mark.parametrize("string", STRINGS, ids=ascii)
def test_any_string_stays_what_it_is(string: str) -> None:
    document: dict[str, Yaml] = {"a": string, "list": [string], "map": {string: string}}
    written = to_yaml(document)
    assert written.isascii()
    assert all(character.isprintable() or character == "\n" for character in written)
    expected = string.replace("\0", " ")
    assert parse(written) == {"a": expected, "list": [expected], "map": {expected: expected}}


READ_YAML = "import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin)))"


def test_a_real_yaml_reader_agrees() -> None:
    python = shutil.which("python3", path="/usr/bin:" + os.environ["PATH"])
    readers = [path for path in (python, shutil.which("python3")) if path and reads_yaml(path)]
    if not readers:
        pytest.skip("no python3 on the PATH has PyYAML")
    strings = [string.replace("\0", " ") for string in STRINGS]
    document: dict[str, Yaml] = {
        "a": {"n": 7, "empty": [], "none": {}},
        "list": strings,
        "map": dict.fromkeys(strings, "x"),
        "no": "no",
    }
    done = subprocess.run(
        [readers[0], "-c", READ_YAML], input=to_yaml(document), text=True, capture_output=True, check=True
    )
    assert json.loads(done.stdout) == document


def reads_yaml(python: str) -> bool:
    return subprocess.run([python, "-c", "import yaml"], capture_output=True, check=False).returncode == 0


def test_bytes_that_are_no_text_are_spelled_out() -> None:
    assert parse(to_yaml({"a": "caf\udce9"})) == {"a": "caf\\udce9"}


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, "1970-01-01T00:00:00.000000000+0000Z"), ((1 << 32) - 1, "2106-02-07T06:28:15.000000000+0000Z")],
)
def test_times_are_utc_as_date_prints_them(epoch: int, expected: str) -> None:
    assert creation_time(epoch) == expected
