# SPDX-License-Identifier: Apache-2.0
"""Size expressions: golden values of zram-generator's language, and whatever hypothesis thinks of."""
from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from zramfs.configuration.expression import FUNCTIONS, MAX_DEPTH, MAX_LENGTH, evaluate_expression

RAM = {"ram": 8000.0}


@pytest.mark.parametrize(("text", "value"), [
    ("min(ram / 2, 4096)", 4000),
    ("0.5 * ram", 4000),
    ("min(min(ram, 4096) + max(ram - 4096, 0) / 2, 32 * 1024)", 6048),
    ("500k", 500_000), ("1.1k", 1100), ("2M", 2e6), ("3G", 3e9), (".5T", 5e11), ("4m", 0.004),
    ("5u", 5e-6), ("5µ", 5e-6), ("5n", 5e-9), ("5p", 5e-12), ("1e3", 1000), ("1E-2", 0.01), ("7.", 7),
    ("3+3-3/3", 5),
    # fasteval's levels: ^ then % then / then * then - then +
    ("10 * 7 % 4", 30), ("100 / 7 % 4", 100 / 3), ("2 * 12 / 4", 6), ("10 - 4 + 3", 9), ("1 + 10 - 4", 7),
    ("2 ^ 3 ^ 2", 512), ("-2 ^ 2", 4), ("2 ^ -1", 0.5), ("10 - 3 - 2", 5), ("64 / 4 / 2", 8),
    ("-7 % 4", -3), ("!0", 1), ("!5.5", 0), ("+5.5", 5.5), ("4.4 + -5.5", 4.4 - 5.5), ("--3", 3),
    ("(3 * (3 + 3) / 3)", 6), ("[3*(3-3)/3]", 0),
    ("1 < 2", 1), ("2 <= 1", 0), ("1 == 1", 1), ("1 != 1", 0), ("2 > 1", 1), ("1 >= 2", 0),
    ("1 and 2", 2), ("0 && 2", 0), ("2 or 0", 2), ("0 || 3", 3), ("ram > 4096 && 4096 || ram", 4096),
    ("log(100)", 2), ("log(2, 1024)", 10), ("log(e(), e)", 1), ("pi()", math.pi), ("π", math.pi),
    ("int(-2.7)", -2), ("ceil(2.1)", 3), ("floor(-2.1)", -3), ("round(2.5)", 3), ("round(-2.5)", -3),
    ("round(0.001, 1.23456)", 1.235), ("round(1024, ram)", 8192), ("abs(-1)", 1), ("sign(-5)", -1),
    ("max(1, -2, 3, -4)", 3), ("min(7)", 7), ("sin(0) + cos(0) + atan(0)", 1), ("acosh(1)", 0),
    ("1+2*3/4^5%6 + log(100K) + log(e(),100) + [3*(3-3)/3] + (2<3) && 1.23", 1.23),
])
def test_values(text: str, value: float) -> None:
    assert evaluate_expression(text, RAM) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("text", "complaint"), [
    ("", "expected a number, a name or a parenthesis, got the end of ''"),
    ("ram / (2", "expected ')', got the end of 'ram / (2'"),
    ("(2]]", "expected an operator or the end, got ']' at character 4 of '(2]]'"),
    ("ram $ 2", "expected a number, a name or an operator, got '$' at character 5 of 'ram $ 2'"),
    ("2 ram", "expected an operator or the end, got 'r' at character 3 of '2 ram'"),
    ("12.34.5", "expected an operator or the end, got '.' at character 6 of '12.34.5'"),
    ("50%", "expected a number, a name or a parenthesis, got the end of '50%'; % is the remainder of a "
            "division: for a share of the RAM write ram / 2, or 0.5 * ram"),
    ("swap", "expected one of e, pi, ram, got 'swap' at character 1 of 'swap'"),
    ("min + 1", "expected one of e, pi, ram, got 'min' at character 1 of 'min + 1'; min is a function: "
                "write min(...)"),
    ("ram(1)", "unknown function 'ram' at character 1 of 'ram(1)'; expected one of "
               f"{', '.join(sorted(FUNCTIONS))}"),
    ("__import__('os')", "expected a number, a name or an operator, got \"'\" at character 12 of "
                         "\"__import__('os')\""),
    ("abs(1, 2)", "abs() takes 1 values, got 2 in 'abs(1, 2)'"),
    ("log(1, 2, 3)", "log() takes 1 or 2 values, got 3 in 'log(1, 2, 3)'"),
    ("min()", "expected a number, a name or a parenthesis, got ')' at character 5 of 'min()'"),
    ("1 / 0", "/ divides by zero in '1 / 0'"),
    ("1 % 0", "% has no finite value for 1, 0 in '1 % 0'"),
    ("9^9^9^9", "^ has no finite value for 9, 3.8742e+08 in '9^9^9^9'"),
    ("(0-8)^0.5", "^ has no finite value for -8, 0.5 in '(0-8)^0.5'"),
    ("log(0)", "log() has no finite value for 0 in 'log(0)'"),
    ("1e400", "a number has no finite value for inf in '1e400'"),
    ("1e308 * 10", "* has no finite value for 1e+308, 10 in '1e308 * 10'"),
])
def test_complaints(text: str, complaint: str) -> None:
    with pytest.raises(ValueError) as caught:
        evaluate_expression(text, RAM)
    assert str(caught.value) == complaint


@pytest.mark.parametrize("text", [
    "(" * 400 + "1" + ")" * 400, "-" * 900 + "1", "[" * 900, "abs(" * 190 + "1" + ")" * 190, "2^" * 450 + "1",
])
def test_depth_is_bounded(text: str) -> None:
    with pytest.raises(ValueError, match=f"at most {MAX_DEPTH} levels"):
        evaluate_expression(text, RAM)


def test_length_is_bounded() -> None:
    assert evaluate_expression("1" + "+1" * ((MAX_LENGTH - 1) // 2), RAM) == 1 + (MAX_LENGTH - 1) // 2
    with pytest.raises(ValueError, match="at most 1000 characters, got 1001"):
        evaluate_expression(" " * MAX_LENGTH + "1", RAM)


@limits(deadline=None)  # a busy machine is no failure
@given(st.one_of(st.text(max_size=60), st.text(alphabet="0123456789.()+-*/%^ ,<>=!&|[]eram", max_size=60)))
def test_any_text_is_a_finite_number_or_a_complaint(text: str) -> None:
    try:
        value = evaluate_expression(text, RAM)
    except ValueError as error:
        assert str(error)
    else:
        assert isinstance(value, float) and math.isfinite(value)


# Of + - * / with parentheses around everything Python and we mean the same.
_terms = st.recursive(
    st.one_of(st.integers(0, 10**6).map(str), st.just("ram"), st.floats(0.001, 1e6).map(repr)),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
        inner.map(lambda t: f"(-{t})"),
        st.tuples(st.sampled_from(["min", "max"]), inner, inner).map(lambda t: f"{t[0]}({t[1]}, {t[2]})"),
    ),
    max_leaves=12,
)


@limits(deadline=None)  # a busy machine is no failure
@given(_terms)
def test_the_same_as_python_where_both_mean_the_same(text: str) -> None:
    try:
        expected = float(eval(text, {"__builtins__": {}, "min": min, "max": max, "ram": 8000.0}))
    except (ZeroDivisionError, OverflowError):
        expected = math.inf
    if math.isfinite(expected):
        assert evaluate_expression(text, RAM) == pytest.approx(expected)
    else:
        with pytest.raises(ValueError):
            evaluate_expression(text, RAM)
