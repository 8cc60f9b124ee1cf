"""Integer arithmetic as models write it, read by a dedicated parser: Python never evaluates what a model wrote.

    equation   = expression ("=" expression)*
    expression = term (("+" | "-") term)*
    term       = factor (("*" | "/") factor)*
    factor     = ["+" | "-"] (integer | "(" expression ")" | "\\frac" "{" expression "}" "{" expression "}")

A number or a parenthesis may have one sign, which counts as the operator that it is: the paper asks for every number
exactly once with + - * /, and -3+5 is made of 3 and 5. TinyZero's verifier takes signs, too; but it runs any text of
digits and + - * / . ( ) as Python, and so takes ** and // and 3.5 as well. Here there are no powers, decimals, names,
implicit products or comments. Values are exact fractions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS = 1000
MAX_DEPTH = 40

_SYMBOLS = str.maketrans("×·⋅∗•＊÷／−–—－＋（）＝", "******//----+()=")
_COMMANDS = {"times": "*", "cdot": "*", "ast": "*", "div": "/", "frac": "frac", "dfrac": "frac", "tfrac": "frac"}
_IGNORED_COMMANDS = {"left", "right", "quad", "qquad"}
_TOKEN = re.compile(
    r"(?P<space>[ \t\r\n]|\\[,:;! ])|\\(?P<command>[A-Za-z]+)|(?P<plain>[0-9]+|[-+*/(){}])|(?P<other>.)", re.DOTALL
)
_INTEGER = re.compile(r"0|[1-9][0-9]*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_AROUND = (("**", "**"), ("`", "`"), ("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))


class NotArithmeticError(ValueError):
    """The text is not an expression of the grammar, or has no value."""


@dataclass(frozen=True, slots=True)
class Expression:
    """What an expression comes to."""

    value: Fraction  # exact
    numbers: tuple[int, ...]  # the integers written in it, left to right
    operators: frozenset[str]  # the operators used, each of "+-*/"
    integral: bool  # whether every division in it came out even


def answer_of(text: str) -> str:
    r"""The part of a reply that is its answer: the last `<answer>..</answer>`, else the last `\boxed{..}`, else the
    last line that is not empty. Time is linear in the length of `text`."""
    start = text.rfind("<answer>", 0, max(text.rfind("</answer>"), 0))
    if start >= 0:
        start += len("<answer>")
        return text[start : text.index("</answer>", start)]
    start = max(text.rfind("\\boxed{"), text.rfind("\\boxed {"))
    if start >= 0:
        return braced(text, text.index("{", start) + 1)
    return text.rstrip().rpartition("\n")[2].strip().removesuffix(".")


def braced(text: str, start: int) -> str:
    r"""The text from `start` up to the brace that closes it, past `\{` and `\}`; empty if none does within the cap."""
    depth = 1
    for match in _BRACE.finditer(text, start, start + MAX_CHARACTERS + 1):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()]
    return ""


def parse_equation(text: str) -> list[Expression]:
    """The sides of an answer such as `44 + 19 + 35 = 98.`, or of one without `=`; marks around the whole are left out.

    Whether the sides are equal is left to the caller.

    Raises:
        NotArithmeticError: a side that `parse` refuses, or a text too long.
    """
    _refuse_long(text)
    text = text.translate(_SYMBOLS).strip().removesuffix(".")
    for opening, closing in _AROUND:
        if len(text) >= len(opening + closing) and text.startswith(opening) and text.endswith(closing):
            text = text[len(opening) : -len(closing)].strip().removesuffix(".")
    return [parse(side) for side in text.replace("==", "=").split("=")]


def parse(text: str) -> Expression:
    """The value of an arithmetic expression and what it is made of.

    Raises:
        NotArithmeticError: anything outside the grammar, a division by zero, a text too long or nested too deeply.
    """
    _refuse_long(text)
    parser = _Parser(_tokens(text.translate(_SYMBOLS)))
    value = parser.expression(0)
    if parser.peek():
        raise NotArithmeticError(f"unexpected {parser.peek()!r}")
    return Expression(value, tuple(parser.numbers), frozenset(parser.operators), parser.integral)


def _refuse_long(text: str) -> None:
    if len(text) > MAX_CHARACTERS:
        raise NotArithmeticError("too long")


def _tokens(text: str) -> list[str]:
    tokens = []
    for match in _TOKEN.finditer(text):
        command = match["command"]
        if match["other"]:
            raise NotArithmeticError(f"unexpected {match[0]!r}")
        if match["space"] or command in _IGNORED_COMMANDS:
            continue
        if command is not None and command not in _COMMANDS:
            raise NotArithmeticError(f"unknown command {command!r}")
        tokens.append(match[0] if command is None else _COMMANDS[command])
    return tokens


class _Parser:
    """Recursive descent over a list of tokens; the empty string stands for the end."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens = tokens
        self.position = 0
        self.numbers: list[int] = []
        self.operators: set[str] = set()
        self.integral = True

    def peek(self) -> str:
        return self.tokens[self.position] if self.position < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.position += 1
        return token

    def expect(self, wanted: str) -> None:
        token = self.take()
        if token != wanted:
            raise NotArithmeticError(f"expected {wanted!r}, found {token!r}")

    def expression(self, depth: int) -> Fraction:
        if depth > MAX_DEPTH:
            raise NotArithmeticError("nested too deeply")
        value = self.term(depth)
        while self.peek() in ("+", "-"):
            operator = self.take()
            self.operators.add(operator)
            term = self.term(depth)
            value = value + term if operator == "+" else value - term
        return value

    def term(self, depth: int) -> Fraction:
        value = self.factor(depth)
        while self.peek() in ("*", "/"):
            operator = self.take()
            factor = self.factor(depth)
            if operator == "*":
                self.operators.add("*")
                value *= factor
            else:
                value = self.divide(value, factor)
        return value

    def factor(self, depth: int) -> Fraction:
        if self.peek() not in ("+", "-"):
            return self.unsigned(depth)
        sign = self.take()
        self.operators.add(sign)
        value = self.unsigned(depth)
        return -value if sign == "-" else value

    def unsigned(self, depth: int) -> Fraction:
        token = self.take()
        if token == "(":
            value = self.expression(depth + 1)
            self.expect(")")
            return value
        if token == "frac":
            return self.divide(self.braced(depth), self.braced(depth))
        if not _INTEGER.fullmatch(token):
            raise NotArithmeticError(f"expected a number, found {token!r}")
        self.numbers.append(int(token))
        return Fraction(self.numbers[-1])

    def braced(self, depth: int) -> Fraction:
        self.expect("{")
        value = self.expression(depth + 1)
        self.expect("}")
        return value

    def divide(self, value: Fraction, by: Fraction) -> Fraction:
        if by == 0:
            raise NotArithmeticError("division by zero")
        self.operators.add("/")
        quotient = value / by
        self.integral = self.integral and quotient.denominator == 1
        return quotient
