"""Which problems are asked, what their answers depend on, and what mining tells the person who waits for it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from nemo_r3.config import Config, RolloutConfig
from nemo_r3.errors import UserError
from nemo_r3.failures.stamp import Stamp
from nemo_r3.failures.tally import Tally
from nemo_r3.models import EMBEDDED, architecture_of
from nemo_r3.types import Answer, Attempt, Phase, Problem, Segment, Trajectory
from recipes.bank import bank_rows, failure_source, problems_to_mine, stamp_of


def said_of_mining(tally: Tally, example: Attempt | None = None) -> list[str]:
    """What is said while a bank with this tally is mined of five problems, with answers of up to six tokens."""
    said: list[str] = []
    task = SimpleNamespace(problems=lambda split: [SimpleNamespace(tools=())] * 5)
    setup: Any = SimpleNamespace(
        config=Config(rollout=RolloutConfig(max_answer_tokens=6)),
        task=task,
        progress=SimpleNamespace(say=said.append, begin=lambda title: None),
        run=SimpleNamespace(timed=lambda phase: nullcontext()),
        world=SimpleNamespace(is_main=True),
    )
    bank: Any = SimpleNamespace(
        path=Path("failures"),
        is_complete=lambda: False,
        mine=lambda rollout, problems, progress: None,
        read=lambda: [1, 2, 3],
        tally=lambda: tally,
        example=example,
    )
    rollout: Any = SimpleNamespace(too_long=set())
    assert bank_rows(setup, bank, rollout) == [1, 2, 3]
    return said


def test_mining_says_how_many_answers_were_cut(capsys: pytest.CaptureFixture[str]) -> None:
    said = said_of_mining(Tally(100, 40, truncated=97))
    assert said[:2] == ["mining 5 problems", "40 of 100 answers to 5 problems right at first try"]
    cut = "97% of the answers cut at rollout.max_answer_tokens"
    assert said[-1] == f"mined failures: 3 failures of 5 problems, {cut}"
    assert "were cut at rollout.max_answer_tokens=6" in capsys.readouterr().err


def test_mining_without_a_right_answer_shows_one_and_doubts_it() -> None:
    answer = Answer(Segment(Phase.ATTEMPT, (7,)), "7 8", "stop")
    example = Attempt(Problem("p", "What is 1 + 1?", {}), 0, Trajectory(), answer, False)
    _, tally, doubt, _ = said_of_mining(Tally(5, 0), example)
    assert tally.startswith("0 of 5 problems solved at first try")
    assert doubt.splitlines() == [
        "one of them:",
        "  problem  What is 1 + 1?",
        "  answer   7 8",
        "  verdict  failed",
        "every answer failed: are they too hard, or does verify reject right answers?",
    ]


def test_a_task_that_is_only_there_to_be_measured_on_has_nothing_to_mine() -> None:
    setup: Any = SimpleNamespace(config=Config(), task=SimpleNamespace(problems=lambda split: []))
    with pytest.raises(UserError, match=r"failures\.source=bank: the task has no training problems"):
        problems_to_mine(setup)


@pytest.mark.parametrize(("count", "expected"), [(0, 5), (3, 3), (8, 5)])
def test_held_out_problems_are_never_trained_on(count: int, expected: int) -> None:
    setup: Any = SimpleNamespace(config=Config(), task=SimpleNamespace(problems=lambda split: [split] * 5))
    setup.config.failures.problems, setup.config.train.failures_per_step = count, 2
    assert problems_to_mine(setup) == ["train"] * expected
    asked: list[Any] = []
    rollout: Any = SimpleNamespace(
        first_attempts=lambda problems, step: asked.extend(problems) or [SimpleNamespace(is_failure=True)] * 2
    )
    failure_source(setup, None, cast(Any, None), rollout).draw(1)
    assert asked == ["train"] * 2, "failures.source=online"


def test_a_stamp_has_all_that_first_answers_depend_on() -> None:
    def stamp(samples: int = 1, count: int = 2, verifier: str = "v1", template: str = "t1", **rollout: Any) -> Stamp:
        setup: Any = SimpleNamespace(
            config=Config(rollout=RolloutConfig(**rollout)),
            task=SimpleNamespace(name="countdown", verifier=verifier),
            model=EMBEDDED,
            arch=architecture_of(EMBEDDED),
            dialogue=SimpleNamespace(fingerprint=template),
        )
        return stamp_of(setup, [Problem(str(number), "", {}) for number in range(count)], samples)

    others = [{"samples": 2}, {"count": 3}, {"verifier": "v2"}, {"template": "t2"}]
    others += [{"temperature": 0.5}, {"max_answer_tokens": 9}]
    assert len({stamp(**other) for other in others} | {stamp()}) == 7
    assert stamp(max_reflection_tokens=9, max_num_seqs=3) == stamp()
