r"""`same_value`: whether two answers in LaTeX are the same mathematics, by math-verify, kept away from harm.

math-verify 0.9.0 reads LaTeX by an ANTLR grammar, but it evaluates text in two places: what it takes for a plain
expression goes to sympy's `parse_expr`, which runs it as Python, and so does every number, in `sympy.Number("12")`. And
sympy may compute for hours (`9^{9^{9}}`). Hence

- only short answers made of known commands and characters come near it;
- only its LaTeX reader is used, its numbers are read by `sympy.Rational`, and sympy's evaluation of text is switched
  off (`comparison.py`);
- it runs in a process of its own, which is ended when it takes too long.

Needs math-verify (`pip install nemo_r3[math]`), in that process only.
"""

from __future__ import annotations

import re

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

_compare = Worker("nemo_r3.tasks.latex.comparison:compare", SECONDS)


def same_value(expected: str, answer: str) -> bool:
    r"""Whether an answer is what was expected, as mathematics: `\frac{1}{2}`, `\frac{2}{4}` and `0.5` are the same.

    An answer that takes longer than SECONDS to compare is wrong.

    Args:
        expected: LaTeX without delimiters, from the data set.
        answer: LaTeX, from a model; see `nemo_r3.tasks.arithmetic.answer_of`.

    Raises:
        UserError: math-verify cannot be imported.
    """
    answer = answer.strip().strip("$").strip()
    if len(answer) > MAX_CHARACTERS or not PLAIN.fullmatch(answer):
        return False
    return _compare(expected, answer) is True
