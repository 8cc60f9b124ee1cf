"""The part of `nemo_r3.tasks.latex` that runs in the worker: math-verify with nothing in it that evaluates text.

Importing this module changes math-verify and sympy for the whole process. What is changed is private to the versions
that pyproject.toml pins; an attribute that another version lacks stops the import.
"""

from __future__ import annotations

from typing import Any, NoReturn

import math_verify
import sympy.physics.units  # noqa: F401  it evaluates texts of its own when sympy first needs it: now, not later
from latex2sympy2_extended import latex2sympy2
from math_verify import grader, parser
from sympy.parsing import sympy_parser

LATEX = [math_verify.LatexExtractionConfig()]
FIRST = ((r"\frac{1}{2}", "0.5"), (r"\{1,2\}", r"\{2,1\}"), ("x^2-1", "(x-1)(x+1)"), ("(1,2]", "[1,2)"), ("x<2", "x>2"))
"""Compared at once: sympy loads parts of itself on first need, which may take longer than an answer is given."""


def compare(expected: str, answer: str) -> bool:
    """Whether two texts of LaTeX are the same mathematics."""
    read = [
        math_verify.parse(f"${text}$", LATEX, fallback_mode="no_fallback", parsing_timeout=None)
        for text in (expected, answer)
    ]
    return bool(math_verify.verify(*read, timeout_seconds=None))


def _refuse(code: str, *_: Any) -> NoReturn:
    raise ValueError(f"{code!r} is text, and text is never evaluated")


def _change(module: Any, name: str, replacement: Any) -> None:
    getattr(module, name)
    setattr(module, name, replacement)


_change(latex2sympy2, "Number", sympy.Rational)
_change(latex2sympy2._Latex2Sympy, "parse_number", lambda self, text: sympy.Rational(text.replace(",", "")))
_change(sympy_parser, "eval_expr", _refuse)
for _module in (parser, grader):
    _change(_module.logger, "disabled", True)  # they warn that time limits are left to the caller
for _pair in FIRST:
    compare(*_pair)
