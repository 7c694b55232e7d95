"""The examples of the kernel's own documentation of its macro language, and what is wrong in ways of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from osbuild.kconfig_lang.macros import MacroError, Macros
from osbuild.kconfig_lang.questions import questions


def macros(**environment: str) -> Macros:
    return Macros(environment=environment, ask=lambda script: f"<{script}>\n", file="Kconfig", line=7)


def test_a_simple_variable_keeps_what_it_was_when_it_was_read_and_a_recursive_one_does_not() -> None:
    m = macros()
    m.assign("X", ":=", "1")
    m.assign("SIMPLE", ":=", "$(X)")
    m.assign("RECURSIVE", "=", "$(X)")
    m.assign("X", ":=", "2")
    assert m.expand("$(SIMPLE) $(RECURSIVE)") == "1 2"


def test_what_is_appended_is_expanded_as_the_variable_was_first_given() -> None:
    m = macros()
    m.assign("Y", ":=", "3")
    m.assign("SIMPLE", ":=", "1")
    m.assign("RECURSIVE", "=", "1")
    m.assign("SIMPLE", "+=", "$(Y)")
    m.assign("RECURSIVE", "+=", "$(Y)")
    m.assign("Y", ":=", "4")
    assert (m.expand("$(SIMPLE)"), m.expand("$(RECURSIVE)")) == ("1 3", "1 4")


def test_a_function_gets_its_arguments_by_number_blanks_and_all() -> None:
    m = macros()
    m.assign("greet", "=", "$(1)|$(2)|$(3)")
    assert m.expand("$(greet,Hello, World)") == "Hello| World|"


def test_commas_inside_parentheses_and_from_a_variable_do_not_divide() -> None:
    m = macros()
    m.assign("comma", ":=", ",")
    m.assign("first", "=", "$(1)")
    assert m.expand("$(first,(a,b)$(comma)c)") == "(a,b),c"


def test_a_name_may_itself_be_expanded() -> None:
    m = macros()
    m.assign("AB", ":=", "1")
    m.assign("A", ":=", "A")
    assert m.expand("$($(A)B)") == "1"


def test_a_dollar_before_anything_else_is_a_dollar() -> None:
    assert macros().expand("echo $1 $$ $X") == "echo $1 $$ $X"


def test_a_shells_lines_become_one_and_its_dollars_are_its_own() -> None:
    m = Macros(environment={}, ask=lambda script: f"{script}\nb\n\n")
    assert m.expand("$(shell,echo $1 (x))") == "echo $1 (x) b"


def test_an_unknown_name_is_an_environment_variable_and_an_unset_one_is_empty() -> None:
    m = macros(ARCH="x86_64")
    assert m.expand("$(ARCH)-$(NOTHING)") == "x86_64-"
    assert m.read == {"ARCH", "NOTHING"}


def test_what_is_said_is_kept_and_what_is_an_error_stops() -> None:
    m = macros()
    assert m.expand("$(info,hello)$(warning-if,y,careful)$(warning-if,n,never)$(error-if,n,never)") == ""
    assert m.said == ["hello", "Kconfig:7: careful"]
    assert m.expand("$(filename):$(lineno)") == "Kconfig:7"
    with pytest.raises(MacroError, match="no compiler"):
        m.expand("$(error-if,y,no compiler)")


@pytest.mark.parametrize("text", ["$(shell,a,b)", "$(shell)", "$(nosuch,1)", "$(open", "$(info,(x)"])
def test_what_cannot_be_expanded_is_refused(text: str) -> None:
    with pytest.raises(MacroError):
        macros().expand(text)


def test_a_variable_that_uses_itself_ends() -> None:
    m = macros()
    m.assign("LOOP", "=", "$(LOOP)")
    with pytest.raises(MacroError, match="uses itself"):
        m.expand("$(LOOP)")


def test_the_questions_of_a_tree_are_found_beforehand_in_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/Kconfig.include").write_text(
        'if-success = $(shell,{ $(1); } && echo "$(2)" || echo "$(3)")\nsuccess = $(if-success,$(1),y,n)\n'
        "cc-option = $(success,$(CC) $(1))\nflag := $(shell,flag)\n"
    )
    (tmp_path / "Kconfig").write_text('source "scripts/Kconfig.include"\nsource "$(SUB)/Kconfig"\nsource "nowhere"\n')
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/Kconfig").write_text(
        "config A\n\tdef_bool $(cc-option,-O2 $(flag)) && $(success,true)\n\thelp\n\t  it costs $(5\nconfig B\n"
        "\tdef_bool $(cc-option,-O2 $(flag))\n"
    )
    asked: list[str] = []

    def ask(script: str) -> str:
        asked.append(script)
        return "-m64"

    found = questions(tmp_path, {"CC": "gcc", "SUB": "sub"}, ask)
    assert found == ['{ gcc -O2 -m64; } && echo "y" || echo "n"', '{ true; } && echo "y" || echo "n"']
    assert asked == ["flag"]
