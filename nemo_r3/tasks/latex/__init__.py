r"""`same_value`: whether two answers in LaTeX are the same mathematics, by math-verify, kept away from harm.

math-verify 0.9.0 reads LaTeX by an ANTLR grammar, but it evaluates text in two places: what it takes for a plain
expression goes to sympy's `parse_expr`, which runs it as Python, and so does every number, in `sympy.Number("12")`. And
sympy may compute for hours (`9^{9^{9}}`). Hence

- only short answers made of known commands and characters come near it;
- only its LaTeX reader is used, its numbers are read by `sympy.Rational`, and sympy's evaluation of text is switched
  off (`comparison.py`);
- it runs in a process of its own, which is ended when it takes too long.

An answer written like the expected one is right before any of that: `\theta`, `\text{(C)}` or `6:30` need no reading.

Needs math-verify (`pip install -e '.[math]'`), in that process only.
"""

from __future__ import annotations

import re

from nemo_r3.tasks.arithmetic import braced
from nemo_r3.tasks.worker import Worker

MAX_CHARACTERS = 200
SECONDS = 2.0
COMMANDS = (
    "frac dfrac tfrac sqrt pi cdot times div pm mp left right infty le leq ge geq lt gt ne neq in cup cap pmatrix "
    "begin end sin cos tan cot sec csc arcsin arccos arctan log ln exp circ"
).split()
PLAIN = re.compile(
    rf"(?:[0-9A-Za-z\s+\-*/^_=<>(){{}}\[\].,|&]|\\(?:{'|'.join(COMMANDS)})(?![A-Za-z])|\\[{{}},;! %\\])+"
)
LOOKS = ("boxed", "text", "textbf", "mathrm", "mathbf")
QUANTITY = re.compile(r"(?P<value>.+)\\(?:text|mathrm)\{(?P<unit>[^{}\\]+)\}(?P<power>\^\S+)?", re.DOTALL)

_compare = Worker("nemo_r3.tasks.latex.comparison:compare", SECONDS)


def same_value(expected: str, answer: str) -> bool:
    r"""Whether an answer is what was expected, as mathematics: `\frac{1}{2}`, `\frac{2}{4}` and `0.5` are the same.

    Commands around the whole answer that only change its looks do not matter, as in `\text{7}` or `\boxed{7}`, nor does
    the sign of `\$7`. A unit in `\text{..}` behind an answer must be the expected one's, but may be left out. An answer
    that takes longer than SECONDS to compare is wrong.

    Args:
        expected: LaTeX without delimiters, from the data set.
        answer: LaTeX, from a model; see `nemo_r3.tasks.arithmetic.answer_of`.

    Raises:
        ValueError: no answer could be the expected one, since that is empty, too long or has unmatched braces.
        UserError: math-verify cannot be imported.
    """
    expected, answer = _trimmed(expected), _trimmed(answer)
    if not expected or braced(expected + "}", 0) != expected:
        raise ValueError(f"no answer can be {expected!r:.80}: it is empty, too long, or its braces do not match")
    if answer == expected:
        return True
    if len(answer) > MAX_CHARACTERS:
        return False
    answer = _bare(answer)
    if answer == _bare(expected):
        return True
    answer = _without_unit(expected, answer)
    return PLAIN.fullmatch(answer) is not None and _compare(expected, answer) is True


def _trimmed(text: str) -> str:
    return text.strip().strip("$").strip()


def _bare(text: str) -> str:
    r"""A text without a dollar sign before it and without commands of LOOKS around it: `\boxed{\text{7}}` is 7."""
    text = _trimmed(text).removeprefix("\\$").strip()
    for command in LOOKS:
        opening = f"\\{command}{{"
        inside = braced(text, len(opening)) if text.startswith(opening) else ""
        if inside and text == f"{opening}{inside}}}":
            return _bare(inside)
    return text


def _without_unit(expected: str, answer: str) -> str:
    r"""The 7 of an answer `7\text{ cm}^2`, if that is also the unit of the expected one; else the whole answer."""
    theirs, ours = QUANTITY.fullmatch(answer), QUANTITY.fullmatch(expected)
    if not theirs or not ours or theirs["power"] != ours["power"] or theirs["unit"].strip() != ours["unit"].strip():
        return answer
    return theirs["value"]
