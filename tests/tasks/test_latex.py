"""`same_value`: mathematics, not text; and nothing of a model's text is ever run."""

from __future__ import annotations

from pathlib import Path

import pytest

from nemo_r3.tasks.latex import same_value
from nemo_r3.tasks.worker import Worker

MARK = "8675309"
SHAPES = (
    "{}",
    "-{}",
    r"\frac{{{}}}{{2}}",
    r"\sqrt{{{}}}",
    r"\{{{}, 2\}}",
    "[{},3)",
    "({}, 1)",
    r"\begin{{pmatrix}} {} \\ 1 \end{{pmatrix}}",
    r"x = {}",
    r"\text{{{}}}",
    r"\operatorname{{{}}}(x)",
    r"\gcd({}, 2)",
    r"\max({}, 1)",
    "f({})",
    "x_{{{}}}",
    r"{}\%",
    r"\int {} dx",
)
CODE = (MARK, f"{MARK}.5", f"{MARK},000", f"__import__('os').system('{MARK}')")


@pytest.mark.parametrize(
    ("expected", "right", "wrong"),
    [
        (
            r"\frac{1}{2}",
            [r"\frac{2}{4}", "0.5", r"\frac12", "1/2", "$0.50$", r"50\%"],
            ["2", "0.6", "", r"\frac{1}{}"],
        ),
        ("-3", ["-3", "-3.0", r"-\frac{6}{2}"], ["3"]),
        ("1,234", ["1234"], ["1.234"]),
        (r"\frac{\sqrt{3}}{2}", [r"\sqrt{\frac{3}{4}}", r"\sqrt{3}/2"], [r"\frac{\sqrt{2}}{2}"]),
        ("x^2+2x+1", ["(x+1)^2"], ["(x-1)^2"]),
        (r"\{1,2\}", [r"\{2,1\}"], [r"\{1,3\}"]),
        ("(1,2)", ["(1,2)"], ["(2,1)"]),
    ],
)
def test_answers_are_compared_as_mathematics(expected: str, right: list[str], wrong: list[str]) -> None:
    assert [answer for answer in right if not same_value(expected, answer)] == []
    assert [answer for answer in wrong if same_value(expected, answer)] == []


def test_an_answer_that_takes_forever_is_wrong() -> None:
    assert not same_value("9", "9^{9^{9^{9}}}")
    assert same_value("9", "9")


@pytest.mark.parametrize(
    "answer", ["__import__('os').getpid()", r"\operatorname{zeros}(9)", "9!", "9" * 201, "9; 9", "'9'"]
)
def test_what_is_not_plain_mathematics_never_reaches_math_verify(answer: str) -> None:
    assert not same_value(answer, answer)


def test_python_never_compiles_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    answers = [shape.format(code) for shape in SHAPES for code in CODE]
    compiled = Worker("compiled:compiled", seconds=300)
    assert compiled(True, answers) == []  # even where they were let through
    assert compiled(False, [f"${MARK}$", f"{MARK}+1"]) != []  # as math-verify comes
