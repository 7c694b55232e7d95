"""A commit of a git repository, which is only read: `git archive` writes neither an index nor a work tree."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.errors import CommandError, InputError
from osbuild.kernel_source import GIT, KernelSource
from osbuild.kernel_sources.base import Wish, check_tree, tree_named

_OBJECT: Final = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")
_FORMATS: Final = {40: "sha1", 64: "sha256"}  # digits -> how objects are named


def fetch(wish: Wish) -> KernelSource:
    """PATH[#REF]: the tree of that commit, HEAD when no ref is named. Its key is the tree, whatever the commit says."""
    path, _, ref = wish.text.partition("#")
    repository = Path(path).absolute()
    ref = ref or "HEAD"
    if not repository.is_dir():
        raise InputError(f"no git repository at {repository}")
    if ref.startswith("-"):
        raise InputError(f"{ref} is not a git ref")
    commit = _ask(repository, ref, "^{commit}")
    tree = _ask(repository, commit, "^{tree}")
    digest = hashlib.sha256(f"git tree {tree}".encode()).hexdigest()
    name = f"{repository}#{ref}"
    return tree_named(
        digest, wish.cache, lambda staging: _unpack(repository, tree, staging, name), f"git commit {commit}"
    )


def _ask(repository: Path, ref: str, kind: str) -> str:
    try:
        said = _git(repository, "rev-parse", "--verify", "--end-of-options", ref + kind).strip()
    except CommandError as problem:
        raise InputError(f"git cannot find {ref} in {repository}: {command.last_line(problem.tail)}") from problem
    if not _OBJECT.fullmatch(said):
        raise InputError(f"git cannot find {ref} in {repository}: it says {said!r}")
    return said


def _git(directory: Path, *words: str) -> str:
    return command.run("git", "--no-replace-objects", "-C", str(directory), *words, env=dict(GIT)).output


def _unpack(repository: Path, tree: str, staging: Path, name: str) -> Path:
    # A repository's own settings and attributes can leave files out, or put text into them: ours has none, and only
    # borrows the objects.
    bare, home, archive = staging / "git", staging / "linux", staging / "linux.tar"
    home.mkdir()
    try:
        objects = _git(repository, "rev-parse", "--path-format=absolute", "--git-path", "objects").strip()
        _git(staging, "init", "--quiet", "--bare", f"--object-format={_FORMATS[len(tree)]}", str(bare))
        (bare / "objects/info").mkdir(exist_ok=True)
        (bare / "objects/info/alternates").write_text(f"{objects}\n")
        _git(bare, "-c", "tar.umask=0022", "archive", "--format=tar", f"--output={archive}", tree)
        command.run("tar", "-C", str(home), "--no-same-owner", "-xf", str(archive))
    except CommandError as problem:
        raise InputError(f"cannot unpack {name}: {command.last_line(problem.tail)}") from problem
    return check_tree(home, name)
