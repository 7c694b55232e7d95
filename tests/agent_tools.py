"""Agents for tests: programs by rustc and go that carry what Kata's do, and our own under another name.

None of Kata's own was at hand. The texts, and how they come into the program, are those of its sources; what else is in
a real one (some 20 MB) is not here.
"""

from __future__ import annotations

import functools
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Final

import pytest

import osbuild
import osbuild.agent as agent_module
from osbuild.agent import build_agent
from osbuild.arch import X86_64
from osbuild.cache import default_cache
from osbuild.resources import resource

COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"
FOREIGN: Final = "9.8.7"  # the version of our own agent in Kata's clothes

_RUST: Final = """
const AGENT_VERSION: &str = "{version}";
const API_VERSION: &str = "0.0.1";
const VERSION_COMMIT: &str = "{commit}";
const NAME: &str = "kata-agent";
fn main() {{
    if std::env::args().nth(1).as_deref() == Some("--version") {{
        println!(
            "{{}} version {{}} (api version: {{}}, commit version: {{}}, type: rust)",
            NAME, AGENT_VERSION, API_VERSION, VERSION_COMMIT
        );
        return;
    }}
    println!("{{}} {{}}", "grpc.AgentService", "ttrpc::asynchronous::server");
    {policy}
}}
"""
_POLICY: Final = 'println!("{}", std::path::Path::new("/etc/kata-opa/default-policy.rego").exists());'
_GO: Final = """
package main

import "fmt"

var version = "unknown"

func main() {
	fmt.Println("kata-agent", version, "/grpc.AgentService/CreateContainer", "google.golang.org/grpc")
}
"""


def rust_agent(work: Path, *flags: str, version: str = "4.1.0", commit: str = COMMIT, policy: bool = False) -> Path:
    """A program by rustc with the texts of a kata-agent, version.rs among them."""
    if shutil.which("rustc") is None:
        pytest.skip("rustc is not installed")
    whole = f"{version}-{commit}" if commit else version
    source = work / "main.rs"
    source.write_text(_RUST.format(version=version, commit=whole, policy=_POLICY if policy else ""))
    subprocess.run(["rustc", "-O", *flags, "-o", work / "kata-agent", source], check=True, capture_output=True)
    return work / "kata-agent"


def go_agent(work: Path, version: str = f"1.13.1-{COMMIT}") -> Path:
    """The same by Go, with its version set by the linker as 1.x does it."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed")
    (work / "main.go").write_text(_GO)
    argv = ["go", "build", "-ldflags", f"-X main.version={version}", "-o", "kata-agent", "main.go"]
    env = os.environ | {"GOCACHE": "/tmp/osbuilder-test-go", "GOFLAGS": "", "GO111MODULE": "off"}
    subprocess.run(argv, cwd=work, env=env, check=True, capture_output=True)
    return work / "kata-agent"


def foreign_agent(work: Path, version: str = FOREIGN) -> Path:
    """Our own agent with Kata's name, version and commit in it instead of ours: one that answers as Kata's would."""
    elsewhere = work / "agent-sources"
    shutil.copytree(resource("agent"), elsewhere)
    header = elsewhere / "version.h"
    text = header.read_text()
    marker = '#define AGENT_MARKER "osbuilder-agent version=" AGENT_VERSION ";"'
    assert marker in text
    text = text.replace(marker, f'#define AGENT_MARKER "={version};\\0kata-agent\\0ttrpc\\0{version}-{COMMIT}\\0"')
    text = text.replace(
        "#ifndef AGENT_VERSION\n", f'#undef AGENT_VERSION\n#define AGENT_VERSION "{version}"\n#ifdef NO\n'
    )
    header.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_module, "resource", lambda name: elsewhere)
        patch.setattr(agent_module, "agent_version", lambda data: osbuild.__version__)
        return build_agent(X86_64, default_cache()).path


@functools.cache
def tarball(path: Path, compression: str, *members: tuple[str, bytes]) -> Path:
    """A tar as Kata's Makefiles make them: ./usr/bin/kata-agent and the like."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o755
            archive.addfile(member, io.BytesIO(data))
    argv = {"zstd": ["zstd", "-q", "-c"], "gzip": ["gzip", "-c"], "xz": ["xz", "-c"], "none": ["cat"]}[compression]
    path.write_bytes(subprocess.run(argv, input=plain.getvalue(), capture_output=True, check=True).stdout)
    return path
