"""matrix.toml and the plan that it comes to: decided from the file alone."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osbuild import matrix, matrix_index, oci
from osbuild.errors import SpecError
from osbuild.matrix import Plan, read_plan
from tests.test_cli import one_line, run

FULL = """
compress = "gzip"
[axes]
image = { small = "oci:images/busybox", big = "docker://debian:12" }
arch = ["x86_64", "aarch64"]
filesystem = ["ext4", "erofs"]
[axes.kernel]
plain = {}
old = { source = "6.1", features = ["xfs"] }
[[exclude]]
arch = "aarch64"
kernel = "old"
[guest]
timeout = 9
"""


def plan_of(text: str, home: Path, **given: Any) -> Plan:
    (home / "matrix.toml").write_text(text)
    return read_plan(home / "matrix.toml", given, epoch=None)


def test_cells_are_the_product_without_what_is_excluded(tmp_path: Path) -> None:
    plan = plan_of(FULL, tmp_path)
    wanted = {
        "-".join(each)
        for each in itertools.product(("small", "big"), ("x86_64", "aarch64"), ("plain", "old"), ("ext4", "erofs"))
        if each[1:3] != ("aarch64", "old")
    }
    assert {cell.name for cell in plan.cells} == wanted
    assert len(plan.cells) == 12


def test_every_cell_has_its_own_values_and_what_is_said_for_all(tmp_path: Path) -> None:
    (cell,) = [cell for cell in plan_of(FULL, tmp_path).cells if cell.name == "small-x86_64-old-erofs"]
    spec = cell.spec
    assert (spec.image, spec.arch.name) == (f"oci:{tmp_path}/images/busybox", "x86_64")
    assert (spec.kernel_source, spec.features) == ("6.1", ("xfs",))
    assert (spec.disk.filesystem, spec.compress, spec.guest.seconds) == ("erofs", "gzip", 9.0)
    assert cell.variant == "small-old-erofs"


def test_a_stage_that_cells_share_is_one_stage(tmp_path: Path) -> None:
    plan = plan_of(FULL, tmp_path)
    assert plan.summary() == "12 cells, 3 kernels, 4 trees, 8 disk images, 4 initramfs"
    for kind in ("kernel", "tree", "image", "initrd"):
        assert sum(len(cells) for cells in plan.stages(kind).values()) == 12
    shared = {cell.name: plan.shared(cell) for cell in plan.cells}
    assert shared["small-x86_64-plain-ext4"] == ["image", "initrd"], "with the other kernel"
    assert shared["small-aarch64-plain-ext4"] == ["initrd"], "only with the other filesystem"


def test_another_wish_is_another_stage_and_no_other_changes(tmp_path: Path) -> None:
    def keys(more: str) -> dict[str, str]:
        (cell,) = plan_of(more + '\n[axes]\nimage = ["oci:x"]\n', tmp_path).cells
        return {kind: stage.key for kind, stage in cell.stages.items()}

    usual = keys('arch = "x86_64"')

    def changed(more: str) -> set[str]:
        found = keys(f'arch = "x86_64"\n{more}')
        return {kind for kind in usual if usual[kind] != found[kind]}

    assert changed("verity = true") == {"image"}
    assert changed('compress = "gzip"') == {"initrd"}
    assert changed('kernel.with = ["xfs"]') == {"kernel"}
    assert changed("rootfs.slim = true") == {"tree", "image", "initrd"}
    assert changed("guest.cpus = 2") == set()
    other = keys('arch = "aarch64"')
    assert all(other[kind] != usual[kind] for kind in usual)


@pytest.mark.parametrize(
    ("text", "says", "hint"),
    [
        ("", "has no [axes]", "[axes] with some of image, arch"),
        ("[axes]\n", "has no [axes]", ""),
        ('[axes]\nimages = ["oci:x"]', "[axes] 'images' is no axis of ours", "did you mean image?"),
        ('[axes]\nimage = []', "[axes] 'image' has no values", "leave the axis out"),
        ('[axes]\nimage = "oci:x"', "[axes] 'image' is not what this axis takes", "image = ["),
        ('[axes]\nimage = [1]', "[axes] 'image' is not what this axis takes", "image = ["),
        ('[axes]\nkernel = ["6.12"]\nimage = ["oci:x"]', "'kernel' is not what this axis takes", "[axes.kernel]"),
        ('[axes]\nimage = ["oci:a/b", "oci:a-b"]', "would all be called", "give them names: image = {"),
        ('[axes]\nimage = ["oci:x", "oci:x"]', "would all be called", "say them once"),
        ('[axes]\nimage = ["oci:x"]\narch = ["z80"]', "[axes] 'arch': 'z80': ", "x86_64"),
        ('[axes]\nimage = ["oci:x"]\nfilesystem = ["ntfs"]', "[axes] 'filesystem': 'ntfs': no filesystem", "ext4"),
        ('[axes]\nimage = ["oci:x"]\nkind = ["cake"]', "[axes] 'kind': 'cake': ", "image, initrd"),
        ('[axes]\nimage = { "a b" = "oci:x" }', "no value can be called 'a b'", "up to 64 letters"),
        ('[axes]\nimage = { "../x" = "oci:x" }', "no value can be called '../x'", "up to 64 letters"),
        ('[axes]\nimage = ["oci:x"]\n[axes.kernel.k]\nsauce = "6.1"', "'k': 'sauce' is no word", "source and features"),
        ('[axes]\nimage = ["oci:x"]\n[axes.kernel.k]\nfeatures = "xfs"', "'features' is not a list", ""),
        ('[axes]\nimage = ["oci:x"]\n[axes.kernel.k]\nfeatures = ["warp"]', "no kernel feature 'warp'", "xfs"),
        ('[axes]\narch = ["x86_64"]', "no image is named", "IMAGE"),
        ('[axes]\nimage = { x = "nosuch:/x" }', "cell 'x': no source 'nosuch'", "docker-archive:"),
        ('image = "oci:x"\n[axes]\nimage = ["oci:y"]', "'image' is said for all cells, and image is an axis", "leave"),
        ('fs = "ext4"\n[axes]\nimage = ["oci:y"]\nfilesystem = ["ext4"]', "'fs' is said for all cells", "leave"),
        ('sise = "2M"\n[axes]\nimage = ["oci:y"]', "'sise' is no word of ours", "did you mean size?"),
        ('locked = true\n[axes]\nimage = ["oci:y"]', "'locked' is not for a matrix", "each cell has the lock"),
        ('[recipe]\nrecipe = "debian"\n[axes]\narch = ["x86_64"]', "'recipe' is not for a matrix", "osbuilder build"),
        ('[axes]\nimage = ["oci:y"]\n[[exclude]]\narch = "x86_64"', "[[exclude]] 'arch' is no axis of this", "image"),
        ('[axes]\nimage = ["oci:y"]\n[[exclude]]\nimage = "z"', "[[exclude]] 'image': 'z' is no value", "there are: y"),
        ('exclude = 3\n[axes]\nimage = ["oci:y"]', "'exclude' is not a list of tables", "[[exclude]]"),
        ('[axes]\nimage = ["oci:y"]\n[[exclude]]\nimage = "y"', "[[exclude]] leaves no cell", "take one"),
        (
            'free = "2M"\n[axes]\nimage = ["oci:y"]\nfilesystem = ["ext4", "erofs"]',
            "cell 'y-erofs': erofs is read-only", "[[exclude]] it",
        ),
        (
            '[axes]\nimage = { a = "oci:x", a-b = "oci:y" }\nfilesystem = ["ext4"]\n[axes.kernel]\nb-c = {}\nc = {}',
            "two cells are called 'a-b-c-ext4'; they differ in image, kernel", "other names",
        ),
        ("[axes", "is not TOML", ""),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line_with_its_place_and_what_to_do(
    text: str, says: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError) as caught:
        plan_of(text, tmp_path)
    assert says in str(caught.value)
    assert f"'{tmp_path}/matrix.toml'" in str(caught.value)
    assert hint in caught.value.hint
    assert "\n" not in str(caught.value) + caught.value.hint


def test_a_matrix_of_thousands_is_refused_before_anything_is_made_of_it(tmp_path: Path) -> None:
    images = ", ".join(f'i{number} = "oci:x{number}"' for number in range(600))
    with pytest.raises(SpecError, match="has 1200 cells, more than 1000"):
        plan_of(f'[axes]\nimage = {{ {images} }}\nfilesystem = ["ext4", "erofs"]', tmp_path)


def test_a_cell_whose_name_no_directory_could_have_is_refused(tmp_path: Path) -> None:
    text = '[axes]\nimage = { IMAGE = "oci:x" }\nagent = { AGENT = "/a" }\n[axes.kernel]\nKERNEL = {}\n'
    text = text.replace("IMAGE", "i" * 64).replace("KERNEL", "k" * 64)
    (cell,) = plan_of(text.replace("AGENT", "a" * 64), tmp_path).cells
    assert len(cell.name) == 194
    more = text.replace("AGENT", "a" * 64) + "[axes.kind]\n"
    with pytest.raises(SpecError, match="has 201 characters, more than 200"):
        plan_of(more.replace("[axes.kind]", "").replace("agent =", 'arch = ["x86_64"]\nagent ='), tmp_path)


TEXTS = st.text(min_size=1, max_size=80).filter(lambda text: text.strip() == text and "\0" not in text)


@given(st.lists(TEXTS, min_size=1, max_size=5, unique=True))
def test_whatever_values_are_called_their_names_are_safe(texts: list[str]) -> None:
    for text in texts:
        name = matrix._slug(text, "image")
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}", name), (text, name)
        assert name not in (".", "..")
        assert oci.parse_reference(f"h.example/r:1-{name}", frozenset(("docker",))).tag == f"1-{name}"


@given(st.data())
def test_no_two_cells_have_one_name_or_the_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    word = st.text("ab-", min_size=1, max_size=3).filter(lambda text: not text.startswith("-"))
    names = {axis: data.draw(st.lists(word, min_size=1, max_size=3, unique=True)) for axis in ("image", "kernel")}
    rows = {
        "image": "".join(f'"{name}" = "oci:{name}"\n' for name in names["image"]),
        "kernel": "".join(f'"{name}" = {{}}\n' for name in names["kernel"]),
    }
    text = "".join(f"[axes.{axis}]\n{row}" for axis, row in rows.items())
    joined = ["-".join(each) for each in itertools.product(*names.values())]
    home = tmp_path_factory.mktemp("matrix")
    if len(set(joined)) == len(joined):
        assert [cell.name for cell in plan_of(text, home).cells] == joined
    else:
        with pytest.raises(SpecError, match="two cells are called"):
            plan_of(text, home)


# --- tags ---


TARGET = oci.Reference(transport="", name="h.example/guests", tag="1")


def test_variants_are_what_a_platform_can_choose_from(tmp_path: Path) -> None:
    plan = plan_of(FULL, tmp_path)
    found = matrix_index.variants(plan)
    assert [cell.name for cell in found["small-plain-ext4"]] == ["small-x86_64-plain-ext4", "small-aarch64-plain-ext4"]
    for cells in found.values():
        assert len({cell.spec.arch.name for cell in cells}) == len(cells), "each platform once"
    only = plan_of('[axes]\nimage = ["oci:x"]\narch = ["x86_64", "aarch64"]', tmp_path)
    assert matrix_index.variants(only) == {}, "the whole index is one already"


def test_a_tag_that_would_be_too_long_is_refused_before_anything_is_built(tmp_path: Path) -> None:
    plan = plan_of(f'[axes]\nimage = ["oci:{"x" * 64}"]\nagent = ["/{"y" * 64}"]', tmp_path)
    with pytest.raises(SpecError, match="more than 128 characters") as caught:
        matrix_index.check_tags(plan, TARGET)
    assert "give the values names" in caught.value.hint


def test_a_tag_that_would_mean_two_things_is_refused(tmp_path: Path) -> None:
    plan = plan_of('[axes]\nimage = { a = "oci:a", a-x86_64 = "oci:b" }\narch = ["x86_64"]', tmp_path)
    with pytest.raises(SpecError, match="is both a cell and what"):
        matrix_index.check_tags(plan, TARGET)


def test_two_variants_of_one_name_are_refused_and_one_of_two_architectures_is_not(tmp_path: Path) -> None:
    text = '[axes]\nimage = { app = "oci:a", IMAGE = "oci:b" }\narch = ["x86_64", "aarch64"]\n[axes.kernel]\n'
    text += 'debug-old = {}\nold = { source = "6.1" }\n'
    plan = plan_of(text.replace("IMAGE", "app-debug"), tmp_path)
    with pytest.raises(SpecError, match="would both be 'app-debug-old' without") as caught:
        matrix_index.check_tags(plan, TARGET)
    assert str(caught.value).endswith("differ in image, kernel")
    matrix_index.check_tags(plan_of(text.replace("IMAGE", "other"), tmp_path), TARGET)
    few = text.replace("IMAGE", "app-debug") + "".join(
        f'[[exclude]]\nimage = "{image}"\nkernel = "{kernel}"\n'
        for image, kernel in (("app", "old"), ("app-debug", "debug-old"))
    )
    with pytest.raises(SpecError, match="would both be 'app-debug-old' without"):  # also when there is no other
        matrix_index.check_tags(plan_of(few, tmp_path), TARGET)


# --- the command ---


def test_a_plan_is_printed_and_nothing_is_made_or_opened(tmp_path: Path) -> None:
    (tmp_path / "matrix.toml").write_text(FULL)  # no such images
    done = run("matrix", "matrix.toml", "--plan", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert len(found["cells"]) == 12
    assert sorted(stage["kind"] for stage in found["stages"]).count("kernel") == 3
    keys = {stage["key"] for stage in found["stages"]}
    assert all(set(cell["stages"].values()) <= keys for cell in found["cells"])
    assert [path.name for path in tmp_path.iterdir()] == ["matrix.toml"]
    told = run("matrix", "matrix.toml", "--plan", cwd=tmp_path).stdout
    assert "12 cells, 3 kernels, 4 trees" in told
    assert "x86_64 6.1 +xfs" in told


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("--scheduler", "tcp://127.0.0.1:1"), 2, "--scheduler needs --publish"),
        (
            ("--scheduler", "tcp://127.0.0.1:1", "--publish", "h.example/x:1", "-j", "2"),
            2,
            "--jobs is for this machine",
        ),
        (("--scheduler", "localhost", "--publish", "h.example/x:1"), 2, "'localhost' is no scheduler's address"),
        (("--publish", "h.example/x"), 2, "names no tag"),
        (("--publish", "h.example/x:1", "--offline"), 2, "--offline touches no network"),
        (("--publish", "h.example/x:1", "--scheduler", "tcp://127.0.0.1:1", "--authfile", "f"), 2, "no password goes"),
        (("-j", "0"), 2, "--jobs: not a number from 1"),
        (("-o", "matrix.toml"), 2, "is not a directory"),
        (("-o", "."), 2, "holds 'matrix.toml', which is nothing of a matrix"),
    ],
)
def test_bad_words_get_one_line(words: tuple[str, ...], code: int, says: str, tmp_path: Path) -> None:
    (tmp_path / "matrix.toml").write_text('[axes]\nimage = ["oci:x"]')
    done = run("matrix", "matrix.toml", *words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert says in one_line(done.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["matrix.toml"]
