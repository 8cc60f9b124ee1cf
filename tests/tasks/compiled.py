"""Runs in a worker: which texts Python compiles while math-verify reads answers."""

from __future__ import annotations

import sys
from typing import Any

MARK = "8675309"


def compiled(harmless: bool, answers: list[str]) -> list[str]:
    seen: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "compile" and MARK in str(arguments[0]):
            seen.append(str(arguments[0]))

    if harmless:
        from nemo_r3.tasks.latex.comparison import compare
    sys.addaudithook(hook)
    for answer in answers:
        if harmless:
            compare(r"\frac{1}{2}", answer)
        else:
            import math_verify

            math_verify.verify(math_verify.parse(r"$\frac{1}{2}$"), math_verify.parse(answer))
    return seen
