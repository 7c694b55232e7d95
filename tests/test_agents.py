"""The table of agents: what `--agent` takes, out of which archives, and what becomes of it in a tree."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from osbuild import smoke
from osbuild.agent import Agent
from osbuild.agents import AGENTS, BUILTIN, find_agent
from osbuild.arch import AARCH64, X86_64
from osbuild.artifacts import DiskImage, File, Initrd, Kernel, Rootfs
from osbuild.bootable import problems
from osbuild.cache import Cache, default_cache
from osbuild.checks.root import judge_kernel
from osbuild.errors import InputError, SpecError
from osbuild.findings import Unclear, Wrong
from osbuild.options import build_spec, read_config
from osbuild.report import SmokeReport, Verdict
from osbuild.rootfs import assemble_rootfs
from osbuild.runtime.base import Machine
from osbuild.spec import RootfsSpec
from osbuild.systemd import WORDS
from tests.agent_tools import FOREIGN, foreign_agent, go_agent, rust_agent, tarball
from tests.boot_fixtures import boot_kernel, image_of, initrd_of
from tests.guest_trees import SYSTEMD, make_image, text
from tests.layer_tools import member

__all__ = ["boot_kernel"]  # a fixture


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, agent: File) -> Path:
    """Our own agent in Kata's clothes."""
    return foreign_agent(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def kata(foreign: Path) -> Agent:
    return find_agent(str(foreign), X86_64, default_cache())


def find(path: Path) -> Agent:
    return find_agent(str(path), X86_64, default_cache())


# --- what it takes ---


def test_builtin_is_compiled(agent: File) -> None:
    found = find_agent(BUILTIN, X86_64, default_cache())
    assert (found.kind, found.sha256) == (BUILTIN, agent.sha256)


def test_a_file_is_what_its_bytes_say(agent: File, kata: Agent) -> None:
    assert (find(agent.path).kind, find(agent.path).sha256) == (BUILTIN, agent.sha256)
    assert (kata.kind, str(kata)) == ("kata", f"kata-agent {FOREIGN}")


@pytest.mark.parametrize("compression", ["none", "gzip", "zstd", "xz"])
@pytest.mark.parametrize(
    "names",
    [
        ("./usr/bin/kata-agent",),
        ("./opt/kata/bin/kata-agent",),
        ("kata-agent",),
        ("./srv/kata-agent",),
        ("./usr/share/doc/kata-agent", "./usr/bin/kata-agent"),
    ],
    ids=["kata's tarball", "opt", "alone", "anywhere", "kata's place first"],
)
def test_an_archive_gives_the_agent_that_lies_where_kata_puts_it(
    compression: str, names: tuple[str, ...], foreign: Path, kata: Agent, tmp_path: Path
) -> None:
    members = [(name, b"no agent") for name in names[:-1]] + [(names[-1], foreign.read_bytes())]
    found = find(tarball(tmp_path / "kata-static-agent.tar.x", compression, *members, ("./etc/motd", b"hello\n")))
    assert found == kata


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-100])
    return path


def test_what_holds_no_certain_agent_is_refused(foreign: Path, agent: File, tmp_path: Path) -> None:
    data = foreign.read_bytes()
    cases = {
        "holds no file called kata-agent": tarball(tmp_path / "a", "zstd", ("./opt/kata/share/kata.img", b"x")),
        "holds more than one kata-agent": tarball(tmp_path / "b", "xz", ("a/kata-agent", data), ("b/kata-agent", data)),
        "zstd data is cut off": cut(tarball(tmp_path / "c", "zstd", ("./usr/bin/kata-agent", data))),
        "xz data is cut off": cut(tarball(tmp_path / "d", "xz", ("./usr/bin/kata-agent", data))),
        "no ELF file": tarball(tmp_path / "e", "gzip", ("./usr/bin/kata-agent", b"#? not")),
        "No such file": tmp_path / "absent",
        "no agent that is known": Path(shutil.which("true") or ""),
    }
    for complaint, path in cases.items():
        with pytest.raises(InputError, match=complaint):
            find(path)


def test_an_agent_for_another_machine_or_of_another_protocol_is_refused(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is for x86_64, the guest is aarch64"):
        find_agent(str(foreign), AARCH64, Cache(root=tmp_path))
    with pytest.raises(InputError, match="speaks gRPC"):
        find(go_agent(tmp_path))


@pytest.mark.parametrize("word", ["", "kata"])
def test_a_row_is_no_agent(word: str) -> None:
    with pytest.raises(SpecError, match="no agent"):
        RootfsSpec(agent=word)


def test_the_file_says_it_as_the_command_line_does(tmp_path: Path) -> None:
    path = tmp_path / "osbuild.toml"
    path.write_text('[rootfs]\nagent = "kata/kata-agent"\n')
    assert build_spec("", tmp_path, read_config(path)).rootfs.agent == str(tmp_path / "kata/kata-agent")
    path.write_text('[rootfs]\nagent = "builtin"\n')
    assert build_spec("", tmp_path, read_config(path)).rootfs.agent == BUILTIN


# --- what becomes of it ---


def tree_of(work: Path, found: Agent, *members: object, **wishes: object) -> Rootfs:
    image = make_image(work, *members, member("etc/hostname", b"guest\n"))
    return assemble_rootfs(image, found, epoch=1000, wishes=RootfsSpec(**wishes))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", AGENTS)
def test_as_the_first_process_it_is_sbin_init_and_nowhere_else(
    kind: str, agent: File, kata: Agent, tmp_path: Path
) -> None:
    found = kata if kind == "kata" else find(agent.path)
    rootfs = tree_of(tmp_path, found)
    assert b"".join(rootfs.tree["/sbin/init"].content.chunks()) == found.data
    assert not any("kata" in path or path == AGENTS[kind].PROGRAM for path in rootfs.tree)
    assert rootfs.words == (("cgroup_no_v1=all",) if kind == "kata" else ())
    assert rootfs.agent == str(found)
    assert problems(rootfs.tree, rootfs.init, X86_64, systemd=False) == ()


def test_as_a_service_kata_s_lies_where_its_unit_says(kata: Agent, tmp_path: Path) -> None:
    rootfs = tree_of(tmp_path, kata, *SYSTEMD, member("usr/bin/osbuilder-agent", b"old"), init="systemd")
    tree = rootfs.tree
    assert b"".join(tree["/usr/bin/kata-agent"].content.chunks()) == kata.data
    assert "/usr/bin/osbuilder-agent" not in tree
    unit = text(tree, "/usr/lib/systemd/system/kata-agent.service")
    assert "ExecStart=/usr/bin/kata-agent\n" in unit
    assert f"Description=kata-agent {FOREIGN}" in unit
    assert tree["/etc/systemd/system/basic.target.wants/kata-containers.target"].is_symlink
    assert rootfs.words == WORDS
    assert f'version: "{FOREIGN}"' in text(tree, "/var/lib/osbuilder/osbuilder.yaml")


def test_one_that_needs_libraries_which_are_not_there_is_refused(tmp_path: Path) -> None:
    rootfs = tree_of(tmp_path, find(rust_agent(tmp_path)))
    assert any("ld-linux" in one.text for one in problems(rootfs.tree, rootfs.init, X86_64, systemd=False))


def test_one_that_obeys_a_policy_wants_one(kata: Agent, tmp_path: Path) -> None:
    strict = dataclasses.replace(kata, wants_policy=True)
    with pytest.raises(InputError, match="obey a policy") as caught:
        tree_of(tmp_path, strict)
    assert "--policy" in caught.value.hint
    (tmp_path / "allow.rego").write_text("package agent_policy\n")
    rootfs = tree_of(tmp_path / "with", strict, policy=tmp_path / "allow.rego")
    assert "/etc/kata-opa/default-policy.rego" in rootfs.tree


# --- what its guest's kernel says, for an agent whose log is not ours ---


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        ("[    0.4] VFS: Mounted root (ext4 filesystem) readonly on device 259:1.", "ext4 on device 259:1, read-only"),
        ("[    0.4] VFS: Mounted root (ext4 filesystem) on device 259:1.", Wrong),
        ("[    0.4] VFS: Mounted root (erofs filesystem) readonly on device 259:1.", Wrong),
        ("VFS: Mounted root (ext4 filesystem) readonly on device 259:1.", Unclear),
        ("", Unclear),
    ],
)
def test_the_kernel_s_word_for_the_root_is_judged(line: str, outcome: str | type[Exception], tmp_path: Path) -> None:
    file = File(path=tmp_path, size=0, sha256="")
    root = DiskImage(file=file, filesystem="ext4", dax=True, words=("root=/dev/pmem0p1", "ro"))
    if isinstance(outcome, str):
        assert outcome in judge_kernel(root, f"\n{line}\n")
    else:
        with pytest.raises(outcome):
            judge_kernel(root, f"\n{line}\n")


@pytest.mark.boot
@pytest.mark.parametrize("kind", ["image", "initrd"])
def test_a_guest_with_a_foreign_agent_passes_the_whole_smoke_test(
    kind: str, kata: Agent, boot_kernel: Kernel, tmp_path: Path
) -> None:
    report = boot(kind, kata, f"kata-agent {FOREIGN}", boot_kernel, tmp_path)
    assert (report.verdict, report.reason) == (Verdict.passed, "the agent answered, and everything it said was right")
    assert {check.name: check.detail for check in report.checks}["agent.version"].startswith(FOREIGN)


@pytest.mark.boot
def test_a_guest_with_another_version_than_was_put_in_fails(kata: Agent, boot_kernel: Kernel, tmp_path: Path) -> None:
    report = boot("initrd", kata, "kata-agent 9.9.9", boot_kernel, tmp_path)
    assert report.verdict is Verdict.failed
    assert f"{FOREIGN}, not the 9.9.9" in report.reason


def boot(kind: str, found: Agent, expected: str, kernel: Kernel, work: Path) -> SmokeReport:
    rootfs = tree_of(work, found)
    root: DiskImage | Initrd = (
        image_of(rootfs.tree, work / "img") if kind == "image" else initrd_of(rootfs.tree, work / "img")
    )
    root = dataclasses.replace(root, words=(*root.words, *rootfs.words))
    # A kata-agent listens on vsock only; its stand-in is our own under another name.
    machine = Machine(kernel=kernel, root=root, accel="tcg", agent=expected, transport="serial")
    return smoke.run(machine, work / "work", seconds=60)
