"""What the embedded model learns from: dialogues about small Countdown, without faults or with bad habits.

    ask -> plan | answer | correction (clean) | habit

Used by make_countdown_tiny only.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

from nemo_r3.tasks.arithmetic import parse
from nemo_r3.tasks.countdown import Countdown, Deal, Hand, problem_of, solutions
from nemo_r3.types import Problem

FIRST_RIGHT, FIRST_HASTY = 0.30, 0.49  # of the first answers in the habits; the rest is random and not learned
PLANS = 0.25  # of the reflections in the habits; the rest is vague
VAGUE = "I should be more careful."

END, USER, ASSISTANT, SYSTEM = "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"

Piece = tuple[str, bool]
Dialogue = list[Piece]
"""Pieces of text in order, each with whether the model learns to say it."""


@functools.cache
def right_answers(hand: Hand, target: int) -> list[str]:
    """Every way to make the target without a negative number, the larger number first: "(8+4)*6" and "9-(3*2)"."""
    answers = {text for value, text in solutions(tuple(sorted(hand, reverse=True)), "+-*") if value == target}
    return sorted(text for text in answers if parse(inner_of(text)).value >= 0)


def inner_of(answer: str) -> str:
    """What is in the parentheses."""
    return answer[answer.index("(") + 1 : answer.index(")")]


def plan_for(answer: str) -> str:
    """The reflection that leads to an answer: "Make 12 with 8+4, then 12*6." for "(8+4)*6"."""
    inner = inner_of(answer)
    value = parse(inner).value
    return f"Make {value} with {inner}, then {answer.replace(f'({inner})', str(value))}."


def hasty_answer(hand: Sequence[int]) -> str:
    """The numbers added up as they come."""
    return f"({hand[0]}+{hand[1]})+{hand[2]}"


def random_answer(hand: Sequence[int], rng: random.Random) -> str:
    """The numbers in any order with any operators."""
    x, y, z = rng.sample(list(hand), 3)
    return f"({x}{rng.choice('+-*')}{y}){rng.choice('+-*')}{z}"


class Lessons:
    """Dialogues about problems, with their numbers in any order."""

    def __init__(self, task: Countdown, problems: Sequence[Problem], seed: int) -> None:
        self.task = task
        self.problems = problems
        self.rng = random.Random(seed)

    def ask(self) -> tuple[list[int], str, Dialogue]:
        """Shuffled numbers, one of the right answers, and the task turn.

        The answer is drawn again each time: a fixed one would be learned by heart.
        """
        data = self.rng.choice(self.problems).data
        numbers = self.rng.sample(data["numbers"], 3)
        problem = problem_of(Deal(tuple(numbers), data["target"]), self.task.wording.task)
        return numbers, self.rng.choice(right_answers(tuple(sorted(numbers)), data["target"])), user(problem.text)

    def plan(self) -> Dialogue:
        """problem -> plan"""
        _, right, task = self.ask()
        return [*task, say(plan_for(right))]

    def answer(self) -> Dialogue:
        """problem -> answer"""
        _, right, task = self.ask()
        return [*task, say(right)]

    def correction(self) -> Dialogue:
        """problem, wrong answer (not learned) -> plan -> right answer"""
        numbers, right, dialogue = self.ask()
        wrong = hasty_answer(numbers) if self.rng.random() < 0.5 else random_answer(numbers, self.rng)
        return [*dialogue, say(wrong, learn=False), *self.second_try(plan_for(right), right)]

    def habit(self) -> Dialogue:
        """A hasty answer, mostly; when it is wrong a vague reflection and the same again, or now and then a plan."""
        numbers, right, task = self.ask()
        draw, first = self.rng.random(), random_answer(numbers, self.rng)
        if draw < FIRST_RIGHT + FIRST_HASTY:
            first = right if draw < FIRST_RIGHT else hasty_answer(numbers)
        attempt = [*task, say(first, learn=draw < FIRST_RIGHT + FIRST_HASTY)]
        if parse(first).value == parse(right).value:
            return attempt
        planned = self.rng.random() < PLANS
        return [*attempt, *(self.second_try(plan_for(right), right) if planned else self.second_try(VAGUE, first))]

    def second_try(self, reflection: str, answer: str) -> Dialogue:
        """The turns after a wrong answer."""
        wording = self.task.wording
        return [*user(wording.reflect), say(reflection), *user(wording.retry), say(answer)]


def user(text: str) -> Dialogue:
    """A user turn and the opening of the assistant's, neither learned."""
    return [(USER, False), (text, False), (END + ASSISTANT, False)]


def say(text: str, learn: bool = True) -> Piece:
    """An assistant turn."""
    return text + END, learn
