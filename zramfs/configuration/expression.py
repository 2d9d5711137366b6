# SPDX-License-Identifier: Apache-2.0
"""Arithmetic in configuration files, such as `min(ram / 2, 4096)`: the language of zram-generator.conf.

That language is fasteval's, and no Python expression: `%` binds closer than `*`, `^` is a power, a
minus sign closest of all (-2^2 is 4), and numbers have SI suffixes. So it has a parser of its own,
which knows numbers, the given variables and the functions below, and nothing that could do anything.
All values are floats: a power overflows and is refused, it never becomes a number that fills memory.
"""
from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

MAX_LENGTH = 1000  # characters; the longest expression in zram-generator's documentation has 60
MAX_DEPTH = 50  # parentheses and signs inside each other; each takes three frames of Python's stack

_SUFFIXES = {"T": 12, "G": 9, "M": 6, "K": 3, "k": 3, "m": -3, "u": -6, "µ": -6, "μ": -6, "n": -9, "p": -12}
_TOKEN = re.compile(
    r"\s*(?:"
    rf"(?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+|(?P<suffix>[{''.join(_SUFFIXES)}]))?)"
    r"|(?P<name>[A-Za-z_π][A-Za-z0-9_]*)"
    r"|(?P<operator>\|\||&&|[<>=!]=|[-+*/%^<>!(),\[\]])"
    r"|(?P<end>\Z))"
)
_MEANING = {"and": "&&", "or": "||", "[": "(", "]": ")", "π": "pi"}


def _log(*values: float) -> float:
    """log(value) to base 10, or log(base, value)."""
    return math.log10(*values) if len(values) == 1 else math.log(values[1], values[0])


def _round(*values: float) -> float:
    """round(value), or round(modulus, value) to a multiple; halves go away from zero."""
    modulus = values[0] if len(values) == 2 else 1.0
    quotient = values[-1] / modulus
    return math.copysign(math.floor(abs(quotient) + 0.5), quotient) * modulus


# By name: how many values it takes at the least and at the most, and what it makes of them.
FUNCTIONS: dict[str, tuple[int, int, Callable[..., float]]] = {
    "min": (1, MAX_LENGTH, lambda *values: min(values)), "max": (1, MAX_LENGTH, lambda *values: max(values)),
    "abs": (1, 1, abs), "int": (1, 1, math.trunc), "ceil": (1, 1, math.ceil), "floor": (1, 1, math.floor),
    "round": (1, 2, _round), "sign": (1, 1, lambda value: math.copysign(1.0, value)), "log": (1, 2, _log),
    **{name: (1, 1, getattr(math, name)) for name in (
        "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh", "acosh", "atanh",
    )},
}
CONSTANTS = {"e": math.e, "pi": math.pi}

# From the one that binds least; `^` goes from the right, the others from the left.
_BINARY: dict[str, tuple[int, Callable[[float, float], float]]] = {
    "||": (1, lambda a, b: a or b),
    "&&": (2, lambda a, b: a and b),
    "==": (3, lambda a, b: float(a == b)), "!=": (3, lambda a, b: float(a != b)),
    "<": (3, lambda a, b: float(a < b)), "<=": (3, lambda a, b: float(a <= b)),
    ">": (3, lambda a, b: float(a > b)), ">=": (3, lambda a, b: float(a >= b)),
    "+": (4, lambda a, b: a + b),
    "-": (5, lambda a, b: a - b),
    "*": (6, lambda a, b: a * b),
    "/": (7, lambda a, b: a / b),
    "%": (8, math.fmod),
    "^": (9, math.pow),
}
_UNARY: dict[str, Callable[[float], float]] = {
    "-": lambda value: -value, "+": lambda value: value, "!": lambda value: float(value == 0),
}


def evaluate_expression(text: str, variables: Mapping[str, float]) -> float:
    """The value, a finite number. ValueError with a sentence about `text`."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"expected an expression of at most {MAX_LENGTH} characters, got {len(text)}")
    parser = _Parser(text, variables)
    value = parser.binary(1, 0)
    if parser.kind != "end":
        raise parser.unexpected("an operator or the end")
    return value


class _Parser:
    """Precedence climbing: each level takes the operators that bind at least as closely as asked."""

    def __init__(self, text: str, variables: Mapping[str, float]) -> None:
        self.text = text
        self.values = {**CONSTANTS, **variables}
        self.position = self.start = 0
        self.advance()

    def advance(self) -> None:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            self.start = len(self.text) - len(self.text[self.position:].lstrip())
            self.kind = "unknown"
            raise self.unexpected("a number, a name or an operator")
        self.kind = match.lastgroup or ""
        self.token, self.suffix = match[self.kind], match["suffix"]
        self.start, self.position = match.start(self.kind), match.end()
        self.token = _MEANING.get(self.token, self.token)
        if self.token in _BINARY:
            self.kind = "operator"

    def unexpected(self, wanted: str) -> ValueError:
        at = f"at character {self.start + 1}"
        got = "the end" if self.kind == "end" else f"{self.text[self.start]!r} {at}"
        hint = ""
        if self.kind == "end" and self.text.rstrip().endswith("%"):
            hint = "; % is the remainder of a division: for a share of the RAM write ram / 2, or 0.5 * ram"
        return ValueError(f"expected {wanted}, got {got} of {self.text!r}{hint}")

    def apply(self, what: str, function: Callable[..., float], *values: float) -> float:
        """Raises ValueError unless the result is a finite number."""
        try:
            result = float(function(*values))
        except ZeroDivisionError:
            raise ValueError(f"{what} divides by zero in {self.text!r}") from None
        except (OverflowError, ValueError):
            result = math.nan
        if not math.isfinite(result):
            given = ", ".join(f"{value:g}" for value in values)
            raise ValueError(f"{what} has no finite value for {given} in {self.text!r}")
        return result

    def binary(self, least: int, depth: int) -> float:
        value = self.unary(depth)
        while self.kind == "operator" and self.token in _BINARY and _BINARY[self.token][0] >= least:
            operator = self.token
            level, function = _BINARY[operator]
            self.advance()
            right = self.binary(level if operator == "^" else level + 1, depth + 1)
            value = self.apply(operator, function, value, right)
        return value

    def unary(self, depth: int) -> float:
        if depth > MAX_DEPTH:
            raise ValueError(f"expected at most {MAX_DEPTH} levels of parentheses and signs in {self.text!r}")
        kind, token = self.kind, self.token
        if kind == "number":
            return self.number()
        if kind == "name":
            return self.name(depth)
        if kind == "operator" and token in _UNARY:
            self.advance()
            return self.apply(token, _UNARY[token], self.unary(depth + 1))
        if kind == "operator" and token == "(":
            self.advance()
            value = self.binary(1, depth + 1)
            self.expect(")")
            return value
        raise self.unexpected("a number, a name or a parenthesis")

    def number(self) -> float:
        digits = self.token.rstrip("".join(_SUFFIXES)) if self.suffix else self.token
        value = self.apply("a number", float, float(digits))
        if self.suffix:
            # Through the text, as fasteval does it: 1.1k is 1100 exactly.
            value = self.apply("a number", float, float(f"{digits}e{_SUFFIXES[self.suffix]}"))
        self.advance()
        return value

    def name(self, depth: int) -> float:
        name, at = self.token, self.start
        self.advance()
        if self.kind != "operator" or self.token != "(":
            if name not in self.values:
                known = ", ".join(sorted(self.values))
                call = f"; {name} is a function: write {name}(...)" if name in FUNCTIONS else ""
                raise ValueError(
                    f"expected one of {known}, got {name!r} at character {at + 1} of {self.text!r}{call}"
                )
            return self.values[name]
        self.advance()
        if name in CONSTANTS:
            self.expect(")")
            return CONSTANTS[name]
        if name not in FUNCTIONS:
            known = ", ".join(sorted(FUNCTIONS))
            raise ValueError(
                f"unknown function {name!r} at character {at + 1} of {self.text!r}; expected one of {known}"
            )
        least, most, function = FUNCTIONS[name]
        values = [self.binary(1, depth + 1)]
        while self.kind == "operator" and self.token == ",":
            self.advance()
            values.append(self.binary(1, depth + 1))
        self.expect(")")
        if not least <= len(values) <= most:
            wanted = str(least) if least == most else f"{least} or {most}"
            raise ValueError(f"{name}() takes {wanted} values, got {len(values)} in {self.text!r}")
        return self.apply(f"{name}()", function, *values)

    def expect(self, token: str) -> None:
        if self.kind != "operator" or self.token != token:
            raise self.unexpected(f"{token!r}")
        self.advance()
