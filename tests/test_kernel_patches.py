"""Patches on a toy tree: read, ordered, applied whole or not at all; and ours, on the real one."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from osbuild.cache import Cache
from osbuild.errors import BuildError, InputError
from osbuild.kernel_patches import FIELDS, find_patches, patch_source, read_patch
from osbuild.kernel_pins import default_file
from osbuild.kernel_source import KernelSource
from osbuild.resources import resource

HEADER = "toy: more words\n\nWhy: a test\nOrigin: here\nUpstream: never\n\n"
WORDS = "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight\nnine\nten\neleven\ntwelve\n"
EARLY, LATE = ("two\n", "two\ntwo and a half\n"), ("eleven\n", "eleven\neleven and a half\n")

Change = tuple[str, str]


@pytest.fixture
def source(tmp_path: Path) -> KernelSource:
    tree = tmp_path / "clean"
    (tree / "lib").mkdir(parents=True)
    (tree / "lib/words").write_text(WORDS)
    (tree / "lib/other").write_text("other\n")
    return KernelSource(unpack=lambda: tree, sha256="0" * 64, series="6.12")


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    home = tmp_path / "patches/6.12"
    home.mkdir(parents=True)
    return home


def diff(tmp_path: Path, *changes: Change, text: str = WORDS, file: str = "lib/words") -> str:
    """What git says the changes are: a patch not of our own making."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text(text)
    for before, after in changes:
        assert before in text
        text = text.replace(before, after)
    new.write_text(text)
    done = subprocess.run(["git", "diff", "--no-index", old, new], capture_output=True, text=True, check=False)
    said = done.stdout.replace(f"a{old}", f"a/{file}").replace(f"b{new}", f"b/{file}")
    assert f"--- a/{file}\n+++ b/{file}\n@@ -" in said
    return said


def apply(source: KernelSource, patches: Path, cache: Cache) -> Path:
    return patch_source(source, find_patches(patches.parent, source.series), cache)


def contents(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in sorted(tree.rglob("*")) if path.is_file()}


def trees(cache: Cache) -> list[Path]:
    return [path for path in cache.scratch("kernel-source").iterdir() if path.is_dir()]


def test_a_patch_says_why_where_from_and_what_became_of_it(patches: Path, tmp_path: Path) -> None:
    path = patches / "0001-x.patch"
    header = "toy: x\n\nUpstream: sent,\n  not answered\nWhy: it is\nquicker\n\nMore: of it\nOrigin: here\n\n"
    path.write_text(header + diff(tmp_path, EARLY, LATE))
    patch = read_patch(path)
    assert (patch.subject, patch.why, patch.origin, patch.upstream) == (
        "toy: x", "it is quicker", "here", "sent, not answered",
    )  # fmt: skip
    lines = path.read_text().splitlines()
    assert [(hunk.file, hunk.number) for hunk in patch.hunks] == [("lib/words", 1), ("lib/words", 2)]
    assert all(lines[hunk.line - 1].startswith(f"@@ -{hunk.start},") for hunk in patch.hunks)


def test_a_line_that_looks_like_the_name_of_a_file_is_a_line(patches: Path, tmp_path: Path) -> None:
    path = patches / "0001-x.patch"
    text = "-- a/nothing\n" + WORDS
    path.write_text(HEADER + diff(tmp_path, ("-- a/nothing\n", ""), LATE, text=text))
    assert "\n--- a/nothing\n" in path.read_text()
    assert {hunk.file for hunk in read_patch(path).hunks} == {"lib/words"}


@pytest.mark.parametrize("field", FIELDS)
def test_a_patch_that_leaves_one_of_the_questions_open_is_refused(patches: Path, tmp_path: Path, field: str) -> None:
    path = patches / "0001-x.patch"
    body = diff(tmp_path, EARLY)
    for header in (HEADER.replace(f"{field}:", f"{field}"), "".join(
        f"{field}:\n" if line.startswith(field) else f"{line}\n" for line in HEADER.splitlines()
    )):  # fmt: skip
        path.write_text(header + body)
        with pytest.raises(InputError, match=f"{path}: its header does not say {field}:"):
            read_patch(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("", "no patch in it", id="nothing"),
        pytest.param(HEADER, "no patch in it", id="a header alone"),
        pytest.param(
            "Why: a\nOrigin: b\nUpstream: c\n\ndiff --git a/x b/x\n", "begins with its subject", id="untitled"
        ),
    ],
)
def test_what_is_no_patch_is_refused(patches: Path, text: str, said: str) -> None:
    path = patches / "0001-x.patch"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_patch(path)


@pytest.mark.parametrize("name", ["x.patch", "1-x.patch", "00001-x.patch", "0001.patch", "0001-.patch"])
def test_a_patch_without_a_number_of_four_digits_and_a_name_is_refused(patches: Path, name: str) -> None:
    (patches / name).touch()
    with pytest.raises(InputError, match="by number"):
        find_patches(patches.parent, "6.12")


def test_two_patches_with_one_number_are_refused(patches: Path, tmp_path: Path) -> None:
    for name in ("0001-a.patch", "0001-b.patch"):
        (patches / name).write_text(HEADER + diff(tmp_path, EARLY))
    with pytest.raises(InputError, match=r"0001-b\.patch has the number of 0001-a\.patch"):
        find_patches(patches.parent, "6.12")


def test_a_series_without_patches_has_none(patches: Path) -> None:
    assert find_patches(patches.parent, "6.1") == ()
    assert find_patches(None, "6.12") == ()


def test_patches_are_applied_in_the_order_of_their_numbers_to_a_copy(
    source: KernelSource, patches: Path, cache: Cache, tmp_path: Path
) -> None:
    first = ("two\n", "two\n2b\n")
    (patches / "0010-later.patch").write_text(HEADER + diff(tmp_path, ("2b\n", "2b\n2c\n"), text=WORDS.replace(*first)))
    (patches / "0002-sooner.patch").write_text(HEADER + diff(tmp_path, first))
    before = contents(source.tree)
    tree = apply(source, patches, cache)
    assert (tree / "lib/words").read_text().startswith("one\ntwo\n2b\n2c\nthree\n")
    assert contents(source.tree) == before
    assert (tree / "lib/other").samefile(source.tree / "lib/other")


def test_a_patch_is_found_a_few_lines_away_but_never_with_other_lines_around_it(
    source: KernelSource, patches: Path, cache: Cache, tmp_path: Path
) -> None:
    (patches / "0001-x.patch").write_text(HEADER + diff(tmp_path, LATE))
    (source.tree / "lib/words").write_text("more\nand more\n" + WORDS)
    assert "eleven and a half\n" in (apply(source, patches, cache) / "lib/words").read_text()
    (source.tree / "lib/words").write_text(WORDS.replace("nine", "9"))
    with pytest.raises(BuildError, match="does not apply"):
        apply(source, patches, Cache(root=tmp_path / "another"))


def test_a_patch_that_does_not_apply_names_every_hunk_that_finds_other_text(
    source: KernelSource, patches: Path, cache: Cache, tmp_path: Path
) -> None:
    path = patches / "0001-x.patch"
    path.write_text(
        HEADER + diff(tmp_path, EARLY, LATE) + diff(tmp_path, ("other\n", "mother\n"), text="other\n", file="lib/other")
    )
    (source.tree / "lib/words").write_text(WORDS.replace("twelve", "a dozen"))
    (source.tree / "lib/other").write_text("another\n")
    second, third = (
        number for number, line in enumerate(path.read_text().splitlines(), 1) if line[:7] in ("@@ -9,4", "@@ -1 +")
    )
    with pytest.raises(BuildError) as refused:
        apply(source, patches, cache)
    assert str(refused.value) == (
        f"{path} does not apply: "
        f"hunk 2 of lib/words (line {second} of the patch) finds other text at lib/words:9; "
        f"hunk 1 of lib/other (line {third} of the patch) finds other text at lib/other:1"
    )


def test_a_patch_to_a_file_that_is_not_there_says_so(
    source: KernelSource, patches: Path, cache: Cache, tmp_path: Path
) -> None:
    (patches / "0001-x.patch").write_text(HEADER + diff(tmp_path, EARLY, file="lib/gone"))
    with pytest.raises(BuildError, match="does not apply: error: lib/gone: No such file"):
        apply(source, patches, cache)


def test_a_patch_that_the_source_contains_is_stale(
    source: KernelSource, patches: Path, cache: Cache, tmp_path: Path
) -> None:
    path = patches / "0001-x.patch"
    path.write_text(HEADER + diff(tmp_path, EARLY, LATE))
    text = WORDS.replace(*EARLY)
    (source.tree / "lib/words").write_text(text.replace(*LATE))
    with pytest.raises(BuildError, match=f"{path} is stale: this source already contains it"):
        apply(source, patches, cache)
    (source.tree / "lib/words").write_text(text)
    with pytest.raises(BuildError, match="hunk 1 of lib/words"):  # half of it is not all of it
        apply(source, patches, cache)


def test_a_patch_that_an_earlier_one_contains_is_stale(
    source: KernelSource, patches: Path, cache: Cache, tmp_path: Path
) -> None:
    for name in ("0001-x.patch", "0002-x.patch"):
        (patches / name).write_text(HEADER + diff(tmp_path, EARLY))
    with pytest.raises(BuildError, match=r"0002-x\.patch is stale"):
        apply(source, patches, cache)


def test_of_several_patches_none_is_applied_when_one_is_not(
    source: KernelSource, patches: Path, cache: Cache, tmp_path: Path
) -> None:
    (patches / "0001-good.patch").write_text(HEADER + diff(tmp_path, EARLY))
    (patches / "0002-bad.patch").write_text(
        HEADER + diff(tmp_path, LATE).replace("+eleven", "+12").replace(" ten", " 10")
    )
    before = contents(source.tree)
    with pytest.raises(BuildError, match="0002-bad"):
        apply(source, patches, cache)
    assert trees(cache) == []
    assert contents(source.tree) == before


def test_a_patch_that_leaves_the_tree_is_refused(
    source: KernelSource, patches: Path, cache: Cache, tmp_path: Path
) -> None:
    (patches / "0001-x.patch").write_text(HEADER + diff(tmp_path, EARLY, file="../words"))
    with pytest.raises(BuildError, match="does not apply"):
        apply(source, patches, cache)


def test_a_patch_is_applied_also_inside_a_repository_with_a_configuration_of_its_own(
    source: KernelSource, patches: Path, cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".gitconfig").write_text("[apply]\n\tignoreWhitespace = change\n\twhitespace = error-all\n")
    (patches / "0001-x.patch").write_text(HEADER + diff(tmp_path, ("two\n", "two \n")))
    assert "two \n" in (apply(source, patches, cache) / "lib/words").read_text()


def test_what_a_patch_says_of_itself_does_not_make_another_tree(
    source: KernelSource, patches: Path, cache: Cache, tmp_path: Path
) -> None:
    path = patches / "0001-x.patch"
    path.write_text(HEADER + diff(tmp_path, EARLY))
    first = apply(source, patches, cache)
    path.write_text(HEADER.replace("a test", "a better reason") + diff(tmp_path, EARLY))
    assert apply(source, patches, cache) == first
    path.write_text(HEADER + diff(tmp_path, LATE))
    assert apply(source, patches, cache) != first


def test_every_patch_of_ours_has_a_header_and_is_signed_off_by_nobody() -> None:
    found = sorted(resource("patches").glob("*/*.patch"))
    assert found
    for path in found:
        assert ": " in read_patch(path).subject
        assert "Signed-off-by" not in path.read_text(errors="replace")


@pytest.mark.skipif(not default_file().is_file(), reason=f"no {default_file()}: apt-get install linux-source-6.12")
def test_our_patches_apply_to_linux_without_moving_a_line(tmp_path: Path) -> None:
    """An offset is the first sign that a patch is going stale."""
    from osbuild import command
    from osbuild.cache import default_cache
    from osbuild.kernel_sources import open_source

    source = open_source(None, default_cache())
    tree = tmp_path / "linux"
    for patch in find_patches(resource("patches"), source.series):
        for file in {hunk.file for hunk in patch.hunks} - {str(p.relative_to(tree)) for p in tree.rglob("*")}:
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            (tree / file).write_bytes((source.tree / file).read_bytes())
        said = command.run(
            "git", "apply", "--verbose", str(patch.path), cwd=tree, env={"GIT_CEILING_DIRECTORIES": str(tmp_path)}
        )
        assert "offset" not in said.output
