"""Countdown's verifier takes answers and nothing else."""

import ast
import operator
import random
import re
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import quickest

from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.tasks import load
from nemo_r3.tasks.countdown import Deal, problem_of, solutions


def countdown(**options):
    return load(TaskConfig("countdown", {"size": 300, "test_size": 100, **options}), DialogueConfig())


TASK = countdown()
STRICT = countdown(allow_fractions=False)
SEVEN = problem_of(Deal((3, 4), 7), "{numbers} {target}")
LONG = problem_of(Deal((8, 6, 4), 72), "{numbers} {target}")

ACCEPTED = [
    " 6 * ( 4 + 8 ) ",
    "((((8+4))))*(6)",
    "(8+4)×6 = 9·8 = 9⋅8 = 9∗8 = 9•8",
    "（8＋4）＊6＝72",
    "(8+4)*6 = 12*6 == 72",
    "72 = 12*6 = (8+4)*6",
    "+(8+4)*6 = (8--4)*6 = (8-(-4))*+6 = -(8+4)*(-6) = (-8-4)*-6",
    "Let me think: 8*4=32, no.\n\n(8+4)*6 = 72.",
    "<answer> (8+4)*6 = 72 </answer> I hope so.",
    "<answer>8+4+6</answer> no, <answer>(8+4)*6.</answer>",
    "<answer>(8+4)*6</answer> or <answer> that was it",
    r"\boxed{1} but <answer>(8+4)*6</answer>",
    r"\boxed{(8+4)*6}",
    r"So \boxed{(8+4) \times 6}.",
    r"\boxed{8+4+6} no, \boxed{\left(8+4\right)\cdot 6}",
    r"\boxed {1} no, \boxed{(8+4)*6 = 144/2 = 72.}",
    r"\boxed{1} no, \boxed {(8 + 4)\,\ast\;6 \quad = \! 72\:}",
    "$(8+4)*6$",
    "$$(8+4)*6 = 72$$",
    r"\((8+4)*6\)",
    "**(8+4)*6 = 72**",
    "`(8+4)*6`",
]

REJECTED = [
    "",
    "72",
    "8+4+6",
    "8+4 = 12*6 = 72",
    "(8+4)*6 = 71 = 72",
    "(8+4)*6 = 72 =",
    "(8+4)*6 === 72",
    "(8+4)*6 = 72 = x",
    "(8+4)*6 = 72/(1-1)",
    "(8+4)*6 ≈ 72",
    "(8+4)*6*1",
    "(8+4)*(6",
    "(8+4)6",
    "(8+4)*6 is my answer",
    "<answer></answer>(8+4)*6",
    "<answer>(8+4)*6</answer><answer>8</answer>",
    "</answer><answer>8</answer>\n(8+4)*6",
    r"\boxed{(8+4)*6",
    r"\boxed{} (8+4)*6",
    r"(8+4) \pow 6",
    r"\frac{8+4}{6",
    "(8---4)*6",
    "(8+4)*6-",
    r"(8+4)*\,",
    "**(8+4)*6",
    "(8+4)*06",
    "(8+4)*6.0",
    "(8+4)*6_0",
    "(٨+٤)*٦",
    "(8+4)*6²",
    r"(8+4)*6\,0",
    "(8+4)\x00*6",
    "\ud800(8+4)*6",
]

TRAPS = [
    "3.5+4",
    "3**4",
    "3//4",
    "4!+3",
    "7 if 3 else 4",
    "3+4 # 7",
    "0x3+4",
    "3+4;print(1)",
    '__import__("os").getpid()*0+3+4',
    "eval('3+4')",
    "9" * 40 + "**" + "9" * 40,
    "(3+4)**(2**(2**(2**99)))",
    "(3+4)/(3-3)",
    "７-0+3-3",
    "3\u200b+4",
    "3\\,4",
    "4 = 3+4",
    "3 = 3, 4 = 4",
    "7.0 = 3+4",
]

DEEP = 10_000
MILLION = 1_000_000
HUGE = [
    "(" * DEEP + "3+4" + ")" * DEEP,
    "<answer>" + "(" * DEEP + "3+4" + ")" * DEEP + "</answer>",
    "\\frac{" * DEEP + "3+4" + "}{1}" * DEEP,
    "(" * 400 + "3+4" + ")" * 400,
    "9" * MILLION,
    "3+4 " * (MILLION // 4),
    "<answer>" * (MILLION // 8),
    "<answer>3+4</answer" * (MILLION // 19),
    "\\boxed{" * (MILLION // 7),
    "\\boxed{" + "{}" * (MILLION // 2),
    "\n" * MILLION,
    " \n" * (MILLION // 2) + ".",
    "7=" * (MILLION // 2) + "3+4",
    "7=" * 490 + "3+5",
    "-" * 990 + "7",
    "(-" * 490 + "7",
    "\\," * MILLION,
    "\\boxed {" * (MILLION // 8),
    "\\boxed" + " " * MILLION + "{3+4}",
    "\\boxed{" + "\\" * MILLION + "}",
    "." * MILLION,
    "3+4" + "+0" * 50_000,
    "9" * 900 + "*" + "9" * 90,
    "<answer></answer>" * 6_000,
    "</answer>" * 12_000,
    "\\boxed{" + "{" * 100_000,
    "-" * 100_000 + "3+4",
    " " * 100_000 + "x",
    "\n" * 100_000 + "no",
]


@pytest.mark.parametrize("text", ACCEPTED)
def test_right_answers_are_accepted(text: str) -> None:
    assert TASK.verify(LONG, text)


@pytest.mark.parametrize("text", REJECTED)
def test_other_texts_are_rejected(text: str) -> None:
    assert not TASK.verify(LONG, text)


@pytest.mark.parametrize("text", TRAPS)
def test_exploits_of_other_verifiers_are_rejected(text: str) -> None:
    assert TASK.verify(SEVEN, "3+4")
    assert not TASK.verify(SEVEN, text)


@pytest.mark.parametrize("text", HUGE, ids=range(len(HUGE)))
def test_huge_texts_are_rejected_at_once(text: str) -> None:
    assert not TASK.verify(SEVEN, text)
    assert quickest(lambda: TASK.verify(SEVEN, text)) < 0.05


@pytest.mark.parametrize("code", ["{}", "3+4+0*({})", "<answer>{}</answer>", r"\boxed{{{}}}", "3+4 if {} else 0"])
def test_nothing_is_executed(code: str, tmp_path) -> None:
    trace = tmp_path / "executed"
    for call in (f"open({str(trace)!r}, 'w').close()", f"__import__('os').mkdir({str(trace)!r})"):
        assert not TASK.verify(SEVEN, code.format(call))
    assert not trace.exists()


def test_a_long_thought_before_the_answer_does_not_matter() -> None:
    assert TASK.verify(SEVEN, "hmm (\n" * 20_000 + "<answer>3 + 4</answer>")


def test_fractions_are_exact_and_may_be_refused() -> None:
    problem = problem_of(Deal((8, 3, 8, 3), 24), "{numbers} {target}")
    for text in ("8/(3-8/3)", "8 ÷ (3 − 8 ÷ 3)", r"\boxed{\frac{8}{3-\dfrac{8}{3}} = 24}", r"8 \div (3 - 8 \div 3)"):
        assert TASK.verify(problem, text)
        assert not countdown(allow_fractions=False).verify(problem, text)
        assert not countdown(operators="+-*").verify(problem, text)
    tenths = problem_of(Deal((1, 10, 2, 10, 3), 3), "{numbers} {target}")
    assert not TASK.verify(tenths, "(1/10+2/10)*3")
    assert not countdown(allow_fractions=False).verify(problem_of(Deal((3, 2, 2), 3), ""), "3/2*2")


def test_a_sign_is_an_operator_and_not_part_of_the_number() -> None:
    two = problem_of(Deal((3, 5), 2), "{numbers} {target}")
    for text in ("-3+5", "(-3)+5", "(−3)+5", "5+-3", "5 — 3", "5-(+3)", "-(3-5) = 2"):
        assert TASK.verify(two, text)
        assert not countdown(operators="+*").verify(two, text)
    assert not TASK.verify(problem_of(Deal((3, 5), -2), ""), "-3+5")
    assert TASK.verify(problem_of(Deal((3, 5), -2), ""), "3-5 = -2")
    assert STRICT.verify(two, "5+-3")
    assert TASK.verify(problem_of(Deal((44, 19, 35), 98), ""), "44-(-19)+35")


def test_what_an_option_forbids_may_stand_in_another_side_only() -> None:
    assert not countdown(operators="+-/").verify(LONG, "(8+4)*6")
    plain = countdown(operators="+*", allow_fractions=False)
    assert plain.verify(LONG, "(8+4)*6 = 144/2 = 73-1")
    assert not plain.verify(LONG, "(8--4)*6 = 12*6")


def test_numbers_are_used_as_often_as_given() -> None:
    problem = problem_of(Deal((5, 5, 2), 27), "{numbers} {target}")
    assert TASK.verify(problem, "5*5+2")
    assert not TASK.verify(problem, "5*5+2+0")
    assert not TASK.verify(problem_of(Deal((5, 2, 2), 27), ""), "5*5+2")
    assert not TASK.verify(problem_of(Deal((52, 5), 57), ""), "5+2*5")


def test_the_verifiers_version_names_what_bears_on_a_verdict() -> None:
    versions = {countdown(**options).verifier for options in ({}, {"allow_fractions": False}, {"operators": "+-*"})}
    assert len(versions) == 3
    assert countdown(seed=7, size=200).verifier == TASK.verifier


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text("0123456789+-*/()= {}\\fracboxed<answer>.$", max_size=80))
def test_no_text_raises(text: str) -> None:
    TASK.verify(SEVEN, text)
    TASK.verify(SEVEN, f"<answer>{text}</answer>")


def by_python(text: str) -> tuple[Fraction, list[int]] | None:
    """What Python's own grammar, of + - * / and integers alone, makes of an expression: its value and its numbers."""
    numbers: list[int] = []

    def value(node: ast.AST) -> Fraction:
        match node:
            case ast.Constant(value=int(number)):
                numbers.append(number)
                return Fraction(number)
            case ast.UnaryOp(op=ast.UAdd() | ast.USub()):
                return value(node.operand) * (-1 if isinstance(node.op, ast.USub) else 1)
            case ast.BinOp():
                return OPERATORS[type(node.op)](value(node.left), value(node.right))
        raise KeyError(node)

    try:
        return value(ast.parse(text.strip(), mode="eval").body), numbers
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None


TWO_SIGNS = re.compile(r"(?:^|[-+*/(=]) *[-+] *[-+]")
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def damaged(text: str, rng: random.Random) -> str:
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        start = rng.randrange(len(text) + 1)
        text = text[:start] + rng.choice("0123456789+-*/()= .") + text[start + rng.choice((0, 1)) :]
    return text


def test_accepted_is_what_pythons_exact_arithmetic_finds_right() -> None:
    rng = random.Random(0)
    accepted = refused = 0
    for _ in range(4_000):
        hand = tuple(rng.randint(1, 12) for _ in range(rng.randint(2, 3)))
        target, text = rng.choice(list(solutions(hand, "+-*/")))
        text = damaged(rng.choice((text, f"{text}={target}", f"{target}={text}", f"{text}={target + 1}-1")), rng)
        sides = [by_python(side) for side in text.strip().removesuffix(".").replace("==", "=").split("=")]
        right = all(side and side[0] == target for side in sides)
        right = right and any(side and sorted(side[1]) == sorted(hand) for side in sides)
        verdict = TASK.verify(problem_of(Deal(hand, target), ""), f"\\boxed{{{text}}}")
        assert verdict == (right and not TWO_SIGNS.search(text)), (hand, target, text)
        accepted, refused = accepted + verdict, refused + (not verdict)
    assert accepted > 800 and refused > 800


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=4), st.data())
def test_every_witness_verifies(hand: list[int], data) -> None:
    value, text = data.draw(st.sampled_from(list(solutions(tuple(hand), "+-*/"))))
    problem = problem_of(Deal(tuple(hand), value), "{numbers} {target}")
    if value >= 0:
        assert STRICT.verify(problem, f"{text} = {value}")
    assert not TASK.verify(problem, f"{text}+1")
