"""Reads Kconfig files of a few lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from osbuild.errors import InputError
from osbuild.kconfig_lang.model import Clause, Line, Model, from_json
from osbuild.kconfig_lang.parser import read_tree


def read(tmp_path: Path, text: str, **files: str) -> Model:
    (tmp_path / "Kconfig").write_text(text)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    return read_tree(tmp_path, {"ARCH": "x86"}, lambda script: "y")


EVERYTHING = """\
mainmenu "Linux/$(ARCH)"
# a comment
answer = $(shell,$(1))

config MODULES
\tbool "modules"   # trailing
\tmodules

if MODULES
menu "Devices"
\tdepends on NET && \\
\t\tPCI
\tvisible if EXPERT

config X
\ttristate "it says \\"x\\"" if EXPERT
\tdepends on $(answer,true)
\tselect Y if Z || !W
\timply V
\tdefault m if NET
\tdefault y
\thelp
\t  config NOT_A_SYMBOL

\t  still help
config N
\tint
\trange 1 0x10 if X
\tdefault 5

comment "not much"
\tdepends on X

choice
\tprompt "which"
\tdefault B

config A
\tbool "a"
if NET
config B
\tbool "b"
endif
endchoice
endmenu
endif
"""


def test_everything_that_the_language_has_is_read_with_its_line(tmp_path: Path) -> None:
    model = read(tmp_path, EVERYTHING)
    assert model.modules == "MODULES"
    assert model.kinds == {"MODULES": "bool", "X": "tristate", "N": "int", "A": "bool", "B": "bool"}
    (x,) = model.definitions["X"]
    assert (x.place, x.prompts) == ("Kconfig:15", [Line('it says \\"x\\"', "EXPERT", "Kconfig:16")])
    assert model.clauses(x) == [
        Clause("MODULES", "Kconfig:9"), Clause("NET && PCI", "Kconfig:11"), Clause("y", "Kconfig:17"),
    ]  # fmt: skip
    assert x.selects == [Line("Y", "Z || !W", "Kconfig:18")]
    assert x.implies == [Line("V", "", "Kconfig:19")]
    assert x.defaults == [Line("m", "NET", "Kconfig:20"), Line("y", "", "Kconfig:21")]
    (n,) = model.definitions["N"]
    assert (n.ranges, n.defaults) == ([Line("1 0x10", "X", "Kconfig:28")], [Line("5", "", "Kconfig:29")])
    (choice,) = model.choices
    assert (choice.members, choice.defaults) == (["A", "B"], [Line("B", "", "Kconfig:36")])
    assert [clause.text for clause in model.clauses(model.definitions["B"][0])] == ["MODULES", "NET && PCI", "NET"]
    assert [d.symbol for d, _ in model.selectors["Y"]] == ["X"]


def test_a_model_is_the_same_after_the_cache(tmp_path: Path) -> None:
    model = read(tmp_path, EVERYTHING)
    assert from_json(model.to_json()) == model


def test_help_ends_where_its_indentation_does(tmp_path: Path) -> None:
    model = read(
        tmp_path,
        "config A\n\tbool\n\thelp\n\n\t  text\n\t\tmore\n\tdefault y\nconfig B\n\tbool\n\thelp\nconfig C\n\tbool\n",
    )
    assert model.definitions["A"][0].defaults == [Line("y", "", "Kconfig:7")]
    assert set(model.definitions) == {"A", "B", "C"}


def test_files_name_others_relative_to_the_tree_or_to_themselves_and_some_need_not_be_there(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/Kconfig").write_text('rsource "more"\n')
    (tmp_path / "sub/more").write_text("config MORE\n\tbool\n")
    model = read(
        tmp_path, 'source "sub/Kconfig"\nosource "nowhere/Kconfig"\norsource "ex*"\n', extra="config E\n\tbool\n"
    )
    assert {name: d[0].place for name, d in model.definitions.items()} == {"MORE": "sub/more:1", "E": "extra:1"}


def test_what_a_macro_expands_to_is_one_word(tmp_path: Path) -> None:
    text = 'dir := a && b\nconfig A\n\tstring "$(ARCH) $(dir)"\n\tdefault $(dir)\n\tdefault \'q"$(ARCH)\'\n'
    (a,) = read(tmp_path, text).definitions["A"]
    assert a.prompts[0].value == "x86 a && b"
    assert [line.value for line in a.defaults] == ['"a && b"', '"q\\"x86"']


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("config A\n\tbool\n\tfoo bar\n", "Kconfig:3: no statement 'foo'", id="an unknown word"),
        pytest.param("config A\n\tbool\n\tdepends on B &&\n", "Kconfig:3: ", id="half an expression"),
        pytest.param('menu "m"\nconfig A\n\tbool\n', "Kconfig:1: this menu has no end", id="no end"),
        pytest.param("if A\nendmenu\n", "Kconfig:2: endmenu without its menu", id="another end"),
        pytest.param("endif\n", "Kconfig:1: endif without its if", id="an end too many"),
        pytest.param('config A\n\tbool "a\n', "Kconfig:2: a quotation mark", id="an open quotation"),
        pytest.param('source "nowhere"\n', "Kconfig:1: cannot read nowhere", id="a missing file"),
        pytest.param('source "Kconfig"\n', "Kconfig reads itself", id="a file that reads itself"),
        pytest.param("config A-B\n\tbool\n", "Kconfig:1: config", id="no symbol's name"),
        pytest.param("\tbool\n", "Kconfig:1: bool belongs to no entry", id="an attribute alone"),
        pytest.param("$(error-if,y,broken)\n", "Kconfig:1: broken", id="the tree's own error"),
        pytest.param("config A\n\tint\n\trange 1\n", "Kconfig:3: range 1", id="half a range"),
        pytest.param("config A\n\tbool\n\tdepends B\n", "Kconfig:3: depends B: `on`", id="on is missing"),
    ],
)
def test_what_cannot_be_read_is_refused_with_file_and_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert said in str(caught.value)
