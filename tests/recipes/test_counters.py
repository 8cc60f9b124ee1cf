"""What a run counts from step to step, and what makes it give up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from nemo_r3.config import TrainConfig
from nemo_r3.types import Answer, Attempt, Group, Phase, Problem, Reflection, Segment, Trajectory
from recipes.counters import Counters, reason_to_stop, why_few

CONFIG = TrainConfig(failures_per_step=10, max_empty_steps=2, max_skipped_steps=2, max_mismatch_steps=2)
FINE = {"loss": 0.1, "groups_used": 2.0, "token_mult_prob_error": 1.01, "updates": 1.0, "skipped": 0.0}
EMPTY = {"loss": None, "groups_used": 0.0, "token_mult_prob_error": None}
SAMPLED = {"retry_success": 0.0, "distinct_reflections": 2.0, "truncated": 0.0, "retries_truncated": 0.0}
UNKNOWN = "is the task too hard or too easy, or verify wrong?"
SKIPPED = FINE | {"skipped": 1.0}
MISMATCHED = FINE | {"token_mult_prob_error": 1.2}


def group(*passed: float) -> Group:
    context = Trajectory((Segment(Phase.TASK, (1,)), Segment(Phase.ATTEMPT, (2,), (-1.0,), 0)))
    answer = Answer(context.segments[1], "say\nabc", "stop")
    reflections = tuple(Reflection(n, context, answer, answer, bool(verdict)) for n, verdict in enumerate(passed))
    return Group(Attempt(Problem("sort-1", "Sort abc.", {}), 0, context, answer, False), reflections)


GROUP = group(0.0, 0.0)


def walk(*steps: dict[str, float | None]) -> Counters:
    counters = Counters()
    for number, metrics in enumerate(steps, 1):
        counters = counters.after(number, 8 * number, metrics, CONFIG)
    return counters


def test_counts_are_of_steps_in_a_row() -> None:
    assert walk(EMPTY, SKIPPED, MISMATCHED) == Counters(step=3, cursor=24, mismatch_steps=1)
    assert walk(MISMATCHED, EMPTY, EMPTY) == Counters(step=3, cursor=24, empty_steps=2, sparse_steps=2)
    few = FINE | {"groups_used": 1.0}
    assert walk(EMPTY, FINE, few, EMPTY, few).sparse_steps == 3, "2 of 10 groups are not few"
    assert walk(FINE, few, EMPTY).last_update == 2
    assert walk(FINE | {"groups_used": 0.0}).empty_steps == 1, "algo.keep_equal_groups leaves a loss, but only the KL's"
    assert walk(SKIPPED, SKIPPED).skipped_steps == 2
    assert walk(SKIPPED, SKIPPED | {"updates": 2.0}).skipped_steps == 0, "one of two updates was done"
    assert walk(FINE | {"token_mult_prob_error": math.nan}).mismatch_steps == 1, "NaN is no small mismatch"


def test_where_retries_pass_or_reflections_differ_the_failures_themselves_are_why() -> None:
    cut = SAMPLED | {"truncated": 1.0, "distinct_reflections": 1.0}
    assert why_few(walk(EMPTY), cut | {"retry_success": 0.5}) is None
    alike = why_few(walk(EMPTY), cut | {"retry_success": 0.4})
    assert alike is not None and "reflections are alike" in alike
    assert why_few(walk(EMPTY), SAMPLED | {"distinct_reflections": 1.2}) is None


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        (EMPTY, "2 steps in a row had no group whose rewards differ (train.max_empty_steps=2)"),
        (SKIPPED, "all updates of 2 steps in a row were skipped (train.max_skipped_steps=2)"),
        (MISMATCHED, "above train.mismatch_stop=1.1 in 2 steps in a row (train.max_mismatch_steps=2)"),
    ],
)
def test_a_run_gives_up_and_names_its_last_checkpoint(metrics: dict[str, float | None], said: str) -> None:
    assert reason_to_stop(walk(metrics), CONFIG, Path("c/step_000007"), [GROUP], SAMPLED) is None
    assert reason_to_stop(walk(metrics, FINE, metrics), CONFIG, Path("c/step_000007"), [GROUP], SAMPLED) is None
    reason = reason_to_stop(walk(metrics, metrics), CONFIG, Path("c/step_000007"), [GROUP], SAMPLED)
    assert reason is not None and said in reason
    way_on = "last checkpoint: c/step_000007; to go on from it with other settings, name a new run.dir and "
    assert (f"{way_on}train.start_from=c/step_000007" in reason) == (metrics is not EMPTY)


@pytest.mark.parametrize(
    ("groups", "ended"),
    [
        ([group(0.0, 0.0), group(0.0, 0.0)], "all retries failed, such as"),
        ([group(1.0, 1.0), group(1.0, 1.0)], "all retries passed, such as"),
        ([group(0.0, 0.0), group(1.0, 1.0)], "all retries of 1 groups passed, all of 1 failed, such as"),
        (
            [group(0.0, 0.0), group(0.0, 1.0)],
            "all of 1 failed, and 1 had equal rewards or no reflection to train on, such as",
        ),
    ],
)
def test_a_run_with_nothing_to_train_on_says_how_retries_ended(groups: list[Group], ended: str) -> None:
    reason = reason_to_stop(walk(EMPTY, EMPTY), CONFIG, None, groups, SAMPLED)
    assert reason is not None and "\n" not in reason
    assert f"{ended} 'say\\nabc' to problem 'sort-1' (Sort abc.)" in reason


@pytest.mark.parametrize(
    ("steps", "metrics", "cause"),
    [
        ([EMPTY, EMPTY], {}, UNKNOWN),
        ([FINE, EMPTY, EMPTY], {}, "there were more before, has too high an actor.lr broken the model?"),
        ([FINE, EMPTY, EMPTY], {"retry_success": 1.0, "truncated": 1.0}, UNKNOWN),
        ([EMPTY, EMPTY], {"distinct_reflections": 1.0}, "a group's reflections are alike, raise rollout.temperature"),
        ([EMPTY, EMPTY], {"truncated": 0.6}, "60% are cut, raise rollout.max_reflection_tokens"),
        ([EMPTY, EMPTY], {"retries_truncated": 0.6}, "60% are cut, raise rollout.max_answer_tokens"),
    ],
)
def test_a_run_with_nothing_to_train_on_says_what_may_be_wrong(
    steps: list[dict[str, float | None]], metrics: dict[str, float | None], cause: str
) -> None:
    reason = reason_to_stop(walk(*steps), CONFIG, None, [GROUP], SAMPLED | metrics)
    assert reason is not None and reason.endswith(f"; look at rollouts/: {cause}")
