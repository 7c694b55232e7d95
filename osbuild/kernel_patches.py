"""Patches to the guest kernel: patches/<series>/NNNN-what-it-does.patch, all of them in order or no tree at all.

    9p: what it does                     a subject, as kernel people write one
                                         then three fields, in any order, each up to the next one or an empty line:
    Why: what a guest gains
    Origin: who wrote it, and for what
    Upstream: what became of it there
                                         anything more, then what git apply reads
    diff --git a/fs/… b/fs/…

Only what begins at the first `diff --git` decides bytes, and only that is part of a kernel's key.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osbuild import command
from osbuild.cache import Cache
from osbuild.errors import BuildError, CommandError, InputError
from osbuild.kernel_source import GIT, KernelSource, make_tree

FIELDS: Final = ("Why", "Origin", "Upstream")

_NAME: Final = re.compile(r"(\d{4})-.+\.patch")
_FIELD: Final = re.compile(rf"({'|'.join(FIELDS)}):(.*)")
_HUNK: Final = re.compile(r"@@ -(\d+)(?:,(\d+))? \+\d+(?:,(\d+))? @@")
_FAILED: Final = re.compile(r"^error: patch failed: (.+):(\d+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hunk:
    """One place that a patch changes."""

    file: str
    start: int  # the line of the file as it was where it begins
    number: int  # among those of its file, from 1
    line: int  # of the patch


@dataclass(frozen=True, slots=True, kw_only=True)
class Patch:
    """A patch, and what its header says of it."""

    path: Path
    subject: str
    why: str
    origin: str
    upstream: str
    sha256: str  # of what it changes, not of how that is explained
    hunks: tuple[Hunk, ...]

    def body(self) -> bytes:
        """What it changes, without its header: what the digest is over."""
        _, _, body = f"\n{_text(self.path)}".partition("\ndiff --git ")
        return f"diff --git {body}".encode(errors="surrogateescape")


def find_patches(directory: Path | None, series: str) -> tuple[Patch, ...]:
    """The patches of one kernel series, in the order of their numbers."""
    found = sorted((directory / series).glob("*.patch")) if directory is not None else []
    numbers: dict[str, Path] = {}
    for path in found:
        name = _NAME.fullmatch(path.name)
        if name is None:
            raise InputError(f"{path}: patches are applied by number", hint="call it NNNN-what-it-does.patch")
        other = numbers.setdefault(name[1], path)
        if other is not path:
            raise InputError(f"{path} has the number of {other.name}", hint="the number is the order")
    return tuple(read_patch(path) for path in found)


def read_patch(path: Path) -> Patch:
    """A patch with its header; InputError when that leaves a question open."""
    text = _text(path)
    header, mark, body = f"\n{text}".partition("\ndiff --git ")
    if not mark:
        raise InputError(f"{path}: no patch in it", hint="it is what `git diff` prints, below a header")
    lines = header.strip("\n").splitlines()
    fields = _fields(lines)
    for field in FIELDS:
        if not fields.get(field):
            hint = "a subject, then `Why:`, `Origin:` and `Upstream:`, above the first `diff --git`"
            raise InputError(f"{path}: its header does not say {field}:", hint=hint)
    if not lines[0] or _FIELD.fullmatch(lines[0]):
        raise InputError(f"{path}:1: a patch begins with its subject", hint="as in `9p: what it does`")
    return Patch(
        path=path,
        subject=lines[0].removeprefix("Subject: "),
        why=fields["Why"],
        origin=fields["Origin"],
        upstream=fields["Upstream"],
        sha256=hashlib.sha256(f"diff --git {body}".encode(errors="surrogateescape")).hexdigest(),
        hunks=tuple(_hunks(text)),
    )


def _text(path: Path) -> str:
    try:
        # Source files of Linux are not all UTF-8.
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as problem:
        raise InputError(f"cannot read {path}: {problem.strerror}") from problem


def patch_source(source: KernelSource, patches: Sequence[Patch], cache: Cache) -> Path:
    """A tree with the patches applied in order: all of them, or none and no tree."""
    if not patches:
        return source.tree
    digest = hashlib.sha256("".join(patch.sha256 for patch in patches).encode()).hexdigest()

    def make(staging: Path) -> Path:
        copy = staging / "linux"
        command.run("cp", "-al", str(source.tree), str(copy))
        for patch in patches:
            _apply(patch, copy)
        return copy

    return make_tree(cache, f"{source.sha256}-{digest[:16]}", make)


def _fields(lines: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    current = ""
    for line in lines:
        if match := _FIELD.fullmatch(line):
            current = match[1]
            found[current] = match[2].strip()
        elif not line.strip():
            current = ""
        elif current:
            found[current] = f"{found[current]} {line.strip()}".strip()
    return found


def _hunks(text: str) -> Iterator[Hunk]:
    """Every hunk. Its lines are counted: one that takes `-- a` away looks like the name of a file."""
    file, number, old, new = "", 0, 0, 0
    for place, line in enumerate(text.split("\n"), start=1):
        if old > 0 or new > 0:
            old -= line[:1] in ("", " ", "-")
            new -= line[:1] in ("", " ", "+")
        elif line.startswith("--- a/"):
            file, number = line.removeprefix("--- a/").split("\t")[0], 0
        elif match := _HUNK.match(line):
            number += 1
            old, new = int(match[2] or 1), int(match[3] or 1)
            yield Hunk(file=file, start=int(match[1]), number=number, line=place)


def _apply(patch: Patch, tree: Path) -> None:
    """Apply one patch to a tree of our own, and see for ourselves that it changed what it names."""
    try:
        _git(tree, "--check", patch)
    except CommandError as problem:
        raise _refusal(patch, tree, problem.tail) from problem
    names = [record.split("\t", 2)[2] for record in _git(tree, "--numstat", patch, "-z").split("\0") if record]
    before = [_fingerprint(tree / name) for name in names]
    try:
        # git replaces a file it changes rather than writing into it, so the links to the clean tree stay clean.
        _git(tree, "--apply", patch)
    except CommandError as problem:
        raise _refusal(patch, tree, problem.tail) from problem
    for name, old in zip(names, before, strict=True):
        if _fingerprint(tree / name) == old:
            raise BuildError(f"{patch.path} was applied, but {name} is what it was")
    if not names:
        raise BuildError(f"{patch.path} changes no file")


def _git(tree: Path, what: str, patch: Patch, *more: str) -> str:
    # git looks for no repository around the tree: inside one, `git apply` takes the patch's names as relative to the
    # repository, skips them all and exits 0.
    environment = GIT | {"GIT_CEILING_DIRECTORIES": str(tree.parent)}
    argv = ("git", "apply", what, *more, str(patch.path.absolute()))
    return command.run(*argv, cwd=tree, env=environment).output


def _refusal(patch: Patch, tree: Path, said: str) -> BuildError:
    """Why git refused: the source has it already, or which hunk finds something else."""
    try:
        _git(tree, "--check", patch, "--reverse")
    except CommandError:
        pass
    else:
        return BuildError(
            f"{patch.path} is stale: this source already contains it",
            hint="delete it, or keep it with the series that lacks it",
        )
    places = [_place(patch, file, int(line)) for file, line in _FAILED.findall(said)]
    reason = "; ".join(places) or command.last_line(said)
    return BuildError(f"{patch.path} does not apply: {reason}", hint="nothing was changed")


def _place(patch: Patch, file: str, start: int) -> str:
    for hunk in patch.hunks:
        if (hunk.file, hunk.start) == (file, start):
            return f"hunk {hunk.number} of {file} (line {hunk.line} of the patch) finds other text at {file}:{start}"
    return f"finds other text at {file}:{start}"


def _fingerprint(path: Path) -> tuple[int, bytes] | None:
    return (path.stat().st_mode, path.read_bytes()) if path.is_file() else None
