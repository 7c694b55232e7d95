"""Tristate logic: what the kernel's documentation says of it, for every expression."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osbuild.kconfig_lang.expression import (
    LETTERS,
    All,
    Any,
    Compare,
    Expression,
    ExpressionError,
    Not,
    Text,
    Word,
    number,
    parse,
)

NAMES = ("A", "B", "C", "D")


class Table:
    """Symbols with values given beforehand."""

    def __init__(self, values: Mapping[str, str], *, modules: int = 2) -> None:
        self.values, self._modules = values, modules

    def tri(self, name: str) -> int:
        value = self.values.get(name, "n")
        return LETTERS.index(value) if value in ("n", "m", "y") else 0

    def text(self, name: str) -> str:
        return self.values.get(name, name)

    def number_base(self, name: str) -> int | None:
        return None if self.values.get(name, "0") in ("n", "m", "y") else 0

    def modules(self) -> int:
        return self._modules


def tables() -> st.SearchStrategy[Table]:
    return st.fixed_dictionaries({name: st.sampled_from("nmy") for name in NAMES}).map(Table)


def _grown(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    several = st.lists(inner, min_size=2, max_size=3).map(tuple)
    return st.one_of(inner.map(Not), several.map(All), several.map(Any))


words = st.sampled_from(NAMES).map(Word)
comparisons = st.builds(
    Compare, st.sampled_from(("=", "!=", "<", ">", "<=", ">=")), words, st.sampled_from("nmy").map(Word) | words
)
expressions: st.SearchStrategy[Expression] = st.recursive(words | comparisons, _grown, max_leaves=8)


@given(expressions, expressions, tables())
def test_and_is_the_smaller_or_is_the_larger_and_not_turns_around(a: Expression, b: Expression, t: Table) -> None:
    assert All((a, b)).tri(t) == min(a.tri(t), b.tri(t))
    assert Any((a, b)).tri(t) == max(a.tri(t), b.tri(t))
    assert Not(a).tri(t) == 2 - a.tri(t)


@given(expressions, expressions, tables())
def test_de_morgans_laws_hold_for_three_values(a: Expression, b: Expression, t: Table) -> None:
    assert Not(All((a, b))).tri(t) == Any((Not(a), Not(b))).tri(t)
    assert Not(Any((a, b))).tri(t) == All((Not(a), Not(b))).tri(t)


@given(expressions, tables())
def test_what_is_written_out_is_read_back_as_what_means_the_same(a: Expression, t: Table) -> None:
    again = parse(str(a))
    assert again.tri(t) == a.tri(t)
    assert set(again.names()) == set(a.names())


@given(words, words, tables())
def test_a_comparison_is_y_or_n_and_never_both_with_its_opposite(a: Word, b: Word, t: Table) -> None:
    for one, other in (("=", "!="), ("<", ">="), (">", "<=")):
        assert {Compare(one, a, b).tri(t), Compare(other, a, b).tri(t)} == {0, 2}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        pytest.param("Y && M", "m", id="the smaller"),
        pytest.param("Y || M && N", "y", id="and binds tighter than or"),
        pytest.param("!Y || !M && Y", "m", id="not binds tightest"),
        pytest.param("!(Y || M)", "n", id="parentheses"),
        pytest.param("M=m", "y", id="equal to a constant"),
        pytest.param('M = "m"', "y", id="a constant in quotes"),
        pytest.param("M!=m", "n", id="unequal"),
        pytest.param("M < Y", "y", id="m is less than y"),
        pytest.param("SIXTEEN >= 9", "y", id="numbers are compared as numbers"),
        pytest.param("HEX = 16", "y", id="whatever their base"),
        pytest.param('TEXT = "a b"', "y", id="texts are compared as texts"),
        pytest.param("SIXTEEN", "n", id="a number is no switch"),
        pytest.param("NOWHERE", "n", id="nor is what is not defined"),
        pytest.param("NOWHERE = n", "n", id="which is no n either, but its own name"),
        pytest.param("NOWHERE = NOWHERE", "y", id="so it equals itself"),
        pytest.param("y && !n", "y", id="constants"),
    ],
)
def test_an_expression_comes_to_what_the_documentation_says(text: str, value: str) -> None:
    table = Table({"Y": "y", "M": "m", "N": "n", "SIXTEEN": "16", "HEX": "0x10", "TEXT": "a b"})
    assert LETTERS[parse(text).tri(table)] == value


def test_m_is_never_met_where_nothing_can_be_a_module() -> None:
    assert parse("m").tri(Table({}, modules=0)) == 0
    assert parse("m").tri(Table({}, modules=2)) == 1


@pytest.mark.parametrize(
    "text", ["", "A &&", "(A", "A)", "A B", "A ==", "= A", "&& A", "A && || B", "A = (B)", "A % B"]
)
def test_what_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError):
        parse(text)


@pytest.mark.parametrize(
    ("text", "base", "value"),
    [("010", 0, 8), ("0x1F", 0, 31), ("1f", 16, 31), ("-3", 10, -3), ("1_0", 10, None), ("", 0, None), ("y", 0, None)],
)
def test_numbers_are_read_as_c_does(text: str, base: int, value: int | None) -> None:
    assert number(text, base) == value


def test_a_constant_survives_its_quotation_marks() -> None:
    text = Text('a "b" \\ c')
    assert parse(str(text)) == text
