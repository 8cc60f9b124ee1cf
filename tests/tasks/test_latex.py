"""`same_value`: mathematics, not text; and nothing of a model's text is ever run."""

from __future__ import annotations

from pathlib import Path

import pytest
from timing import quickest

from nemo_r3.tasks import latex
from nemo_r3.tasks.arithmetic import answer_of
from nemo_r3.tasks.latex import same_value
from nemo_r3.tasks.worker import Worker

MARK = "8675309"
SHAPES = (
    *("{}", "-{}", "[{},3)", "({}, 1)", "x = {}", "f({})", "x_{{{}}}", r"{}\%", r"\int {} dx", r"\frac{{{}}}{{2}}"),
    *(r"\sqrt{{{}}}", r"\{{{}, 2\}}", r"\text{{{}}}", r"\operatorname{{{}}}(x)", r"\gcd({}, 2)", r"\max({}, 1)"),
    r"\begin{{pmatrix}} {} \\ 1 \end{{pmatrix}}",
)
CODE = (MARK, f"{MARK}.5", f"{MARK},000", f"__import__('os').system('{MARK}')")


PATIENT = Worker("nemo_r3.tasks.latex.comparison:compare", seconds=60)
QUICK = latex._compare


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine any comparison may take seconds."""
    monkeypatch.setattr(latex, "_compare", PATIENT)


@pytest.mark.parametrize(
    ("expected", "right", "wrong"),
    [
        (r"\frac{1}{2}", [r"\frac{2}{4}", r"\frac12", "1/2", "$0.50$", r"50\%"], ["2", "0.6", "", r"\frac{1}{}"]),
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


GOLDS = [
    r"\text{Evelyn}",
    r"\text{(C)}",
    r"90^\circ",
    r"\frac{3}{4}\pi",
    r"x \in [-2,7]",
    r"\$18.90",
    r"18\text{ cm}^2",
    r"\begin{cases}1\\2\end{cases}",
    r"\{1,2,\ldots,10\}",
    r"10\%",
    "f'(x)",
    r"(-\infty,-1)\cup(1,\infty)",
    r"1\frac{1}{2}",
    "9" * 900,
    "__import__('os').getpid()",
]


@pytest.mark.parametrize("gold", GOLDS)
def test_an_answer_written_like_the_expected_one_needs_no_reading(gold: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latex, "_compare", lambda *_: pytest.fail("read"))
    assert same_value(gold, gold) and same_value(f" {gold}\n", f"$ {gold} $")
    assert same_value(gold, answer_of(rf"So it is \boxed{{{gold}}}, I think."))
    assert not same_value(gold, "") and not same_value(gold, "?") and not same_value(gold, f"{gold}?")


@pytest.mark.parametrize(
    ("expected", "right", "wrong"),
    [
        (
            "7",
            [r"\text{7}", r"\mathbf{7}", r"\textbf{ 7 }", r"\boxed{\text{7}}", r"\$7", r"\boxed{\frac{14}{2}}"],
            [
                r"\text{8}",
                r"\$8",
                r"\boxed{}",
                r"\boxed{7",
                r"\boxed{7}}",
                r"\text{7}\text{0}",
                r"\text{7}0",
                r"7\$",
                r"\$",
            ],
        ),
        (
            "7",
            [],
            [r"7\text{ million}", r"7\text{ cm}", r"7\text{ or }8", r"7\text{ cm", r"-\text{7}", r"\text{seven}"],
        ),
        ("A", [r"\text{A}", r"\mathbf{A}", r"\text{(A)}"], [r"\text{B}", r"\text{A or B}", r"\text{A}, \text{B}"]),
        (r"\text{(C)}", ["C", "(C)", r"\mathbf{(C)}"], ["(B)", r"\text{(B)}", r"\text{(B) (C)}", "(C) (B)"]),
        (r"\text{Evelyn}", ["Evelyn", r"\mathrm{Evelyn}"], ["lEvyne", r"\text{lEvyne}", r"\text{Evelyn and Ann}"]),
        (r"\$18.90", ["18.90", "18.9", r"\$18.9", r"\text{18.90}"], ["1890", r"\$1890", r"\$ 18.09"]),
        (
            r"18\text{ cm}^2",
            ["18", r"18.0\text{ cm}^2", r"\frac{36}{2}\,\text{cm}^2", r"18 \mathrm{cm}^2"],
            [
                r"18\text{ cm}",
                r"18\text{ m}^2",
                r"18\text{ cm}^3",
                r"324\text{ cm}^2",
                r"\text{ cm}^2",
                r"9, 18\text{ cm}^2",
            ],
        ),
        (r"\frac{1}{2}\text{ hour}", [r"0.5\text{ hour}", "0.5"], [r"30\text{ minutes}", r"2\text{ hour}", "30"]),
    ],
)
def test_looks_do_not_matter_and_a_unit_must_be_the_expected_one(
    expected: str, right: list[str], wrong: list[str]
) -> None:
    assert [answer for answer in right if not same_value(expected, answer)] == []
    assert [answer for answer in wrong if same_value(expected, answer)] == []


def test_no_change_of_looks_makes_a_number_another() -> None:
    for expected in range(1, 7):
        plain = (r"\text{{{}}}", r"\boxed{{\mathbf{{{}}}}}", r"\${}")
        for shape in (*plain, r"{}\text{{ cm}}", r"\boxed{{\${}\text{{ cm}}}}"):
            accepted = [n for n in range(-8, 9) if same_value(rf"{expected}\text{{ cm}}", shape.format(n))]
            assert accepted == [expected], shape


@pytest.mark.parametrize("expected", ["", "  ", "$$", r"\frac{1}{2", "1}", "9" * 1_001])
def test_an_expected_answer_that_none_could_match_is_an_error(expected: str) -> None:
    with pytest.raises(ValueError, match="no answer can be"):
        same_value(expected, "1")


def test_a_long_answer_is_refused_at_once() -> None:
    for part in (" ", "$", "{", "}", r"\text{", r"\boxed{", r"\text{ }", r"\$", "\\", "9", r"\, "):
        for length in (190, 1_000, 1_000_000):
            text = (part * length)[:length]
            answer = text if length > 200 else f"{text}!"
            assert not same_value("7", answer)
            assert quickest(lambda answer=answer: same_value("7", answer)) < 0.05


def test_an_answer_that_takes_forever_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latex, "_compare", QUICK)
    assert not same_value("9", "9^{9^{9^{9}}}")
    assert same_value("9", "9")


@pytest.mark.parametrize(
    "answer", ["__import__('os').getpid()", r"\operatorname{zeros}(9)", "9!", "9" * 201, "9; 9", "'9'"]
)
def test_what_is_not_plain_mathematics_never_reaches_math_verify(answer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latex, "_compare", lambda *_: pytest.fail("reached"))
    for text in (answer, rf"\text{{{answer}}}", rf"\boxed{{\$ {answer}}}", rf"{answer}\text{{ cm}}"):
        assert not same_value(r"9\text{ cm}", text)


def test_python_never_compiles_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    answers = [shape.format(code) for shape in SHAPES for code in CODE]
    compiled = Worker("compiled:compiled", seconds=300)
    assert compiled(True, answers) == []  # even where they were let through
    assert compiled(False, [f"${MARK}$", f"{MARK}+1"]) != []  # as math-verify comes
