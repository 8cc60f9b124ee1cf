"""Groups -> rows: which groups and tokens carry loss and how much, and the last gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from nemo_r3.algo.advantages import Advantage
from nemo_r3.algo.batch import build_update, check_loss_weights
from nemo_r3.config import AlgoConfig, Config, RolloutConfig
from nemo_r3.types import Answer, Attempt, Group, Phase, Problem, Reflection, Segment, Trajectory, UpdateBatch


def sampled(phase: Phase, first: int, length: int) -> Segment:
    return Segment(phase, tuple(range(first, first + length)), tuple(-0.1 * (i + 1) for i in range(length)), 3)


def group_of(rewards: Sequence[float], lengths: Sequence[int] | None = None) -> Group:
    """[task 3][attempt 2][request 2][reflection n][request 1][retry 2] for each reward."""
    lengths = lengths or [4] * len(rewards)
    attempt = sampled(Phase.ATTEMPT, 20, 2)
    context = Trajectory((Segment(Phase.TASK, (1, 2, 3)), attempt))
    failure = Attempt(Problem("p", "?", {}), 0, context, Answer(attempt, "", "stop"), False)
    reflections = []
    for number, (reward, length) in enumerate(zip(rewards, lengths, strict=True)):
        reflection, retry = sampled(Phase.REFLECTION, 40, length), sampled(Phase.RETRY, 60, 2)
        trajectory = context.then(Segment(Phase.REQUEST, (30, 31)), reflection, Segment(Phase.REQUEST, (50,)), retry)
        reflections.append(
            Reflection(number, trajectory, Answer(reflection, "", "stop"), Answer(retry, "", "stop"), reward)
        )
    return Group(failure, tuple(reflections))


def with_algo(**settings: Any) -> Config:
    return Config(algo=AlgoConfig(**settings), rollout=RolloutConfig(max_reflection_tokens=16, max_answer_tokens=5))


def cut(group: Group, *samples: int) -> Group:
    """The group with these reflections cut at their token limit."""
    cuts = (replace(it, answer=replace(it.answer, finish_reason="length")) for it in group.reflections)
    both = zip(group.reflections, cuts, strict=True)
    return replace(group, reflections=tuple(short if it.sample in samples else it for it, short in both))


def trained_ids(batch: UpdateBatch, row: int) -> list[int]:
    return [token for token, weight in zip(batch.rows[row].ids, batch.rows[row].loss_weights, strict=True) if weight]


@pytest.mark.parametrize("trained", [["reflection"], ["retry"], ["reflection", "retry"]])
def test_a_row_has_the_experts_of_all_its_tokens_but_the_last(trained: list[str]) -> None:
    """The context's are the first reflection's, also where that has no row."""
    group = group_of([1, 0, 0], [4, 2, 1])

    def routed(first: int, count: int) -> NDArray[np.uint8]:
        """An expert of one layer, which tells the token's place."""
        return np.arange(first, first + count, dtype=np.uint8)[:, None, None]

    def with_experts(reflection: Reflection) -> Reflection:
        known, length = (7 if reflection.sample else 0), len(reflection.answer.segment.ids)
        first = replace(reflection.answer.segment, routed_experts=routed(known, 7 + length - 1 - known))
        second = replace(reflection.retry.segment, routed_experts=routed(7 + length - 1, 1 + 1 + 2 - 1))
        *before, _, request, _ = reflection.trajectory.segments
        whole = Trajectory((*before, first, request, second))
        answer, retry = replace(reflection.answer, segment=first), replace(reflection.retry, segment=second)
        return replace(reflection, trajectory=whole, answer=answer, retry=retry)

    group = replace(cut(group, 0), reflections=tuple(map(with_experts, cut(group, 0).reflections)))
    settings = with_algo(trained_phases=trained, mask_truncated=True)
    batch = build_update([group], settings, 0)
    assert len(batch.rows) == (2 if "reflection" in trained else 3)
    for row in batch.rows:
        assert np.concatenate(row.routed_experts).ravel().tolist() == list(range(len(row) - 1))
    assert not build_update([group_of([1, 0])], settings, 0).rows[0].routed_experts


def test_a_row_ends_with_its_reflection_and_only_that_has_weight() -> None:
    batch = build_update([group_of([1, 0], [4, 2])], with_algo(), 0)
    first, second = batch.rows
    assert list(first.ids) == [1, 2, 3, 20, 21, 30, 31, 40, 41, 42, 43]
    assert list(second.ids) == [1, 2, 3, 20, 21, 30, 31, 40, 41]
    assert trained_ids(batch, 0) == [40, 41, 42, 43] and trained_ids(batch, 1) == [40, 41]
    assert list(first.loss_weights) == [0.0] * 7 + [0.5 / 4] * 4
    assert list(second.loss_weights) == [0.0] * 7 + [0.5 / 2] * 2
    assert list(first.advantages) == [0.0] * 7 + [batch.advantages[0][0]] * 4
    expected = [0.0] * 3 + [-0.1, -0.2] + [0.0] * 2 + [-0.1, -0.2, -0.3, -0.4]
    assert list(first.rollout_logprobs) == pytest.approx(expected)
    assert [str(phase) for phase in first.phases] == (
        ["task"] * 3 + ["attempt"] * 2 + ["request"] * 2 + ["reflection"] * 4
    )
    assert list(first.sampled) == [False] * 3 + [True] * 2 + [False] * 2 + [True] * 4
    check_loss_weights(batch, AlgoConfig())


REWARDS = st.lists(st.sampled_from([0.0, 1.0]), min_size=4, max_size=4)


@given(st.lists(st.tuples(REWARDS, st.lists(st.integers(1, 9), min_size=4, max_size=4)), min_size=1, max_size=5))
def test_weights_sum_to_one_and_every_row_has_the_same_share(found: list[tuple[list[float], list[int]]]) -> None:
    batch = build_update([group_of(*group) for group in found], with_algo(), 0)
    mixed = sum(len(set(rewards)) == 2 for rewards, _ in found)
    assert (batch.groups_used, batch.groups_dropped) == (mixed, len(found) - mixed)
    assert len(batch.rows) == 4 * mixed
    shares = [sum(row.loss_weights) for row in batch.rows]
    assert shares == pytest.approx([1 / len(shares)] * len(shares)) if shares else mixed == 0
    assert all(
        bool(weight) == bool(value)
        for row in batch.rows
        for weight, value in zip(row.loss_weights, row.advantages, strict=True)
    )


SPREAD = 0.5 + 1e-4  # sample standard deviation of one pass in four, and TRL's epsilon


@pytest.mark.parametrize(
    ("loss", "advantages", "weights"),
    [
        ("grpo", [0.75 / SPREAD, -0.25 / SPREAD], [1 / 4, 1 / 8]),
        ("dr_grpo", [0.75, -0.25], [1 / 64, 1 / 64]),  # 4 rows, at most 16 tokens each
        ("dapo", [0.75 / SPREAD, -0.25 / SPREAD], [1 / 10, 1 / 10]),  # 10 tokens
        ("gspo", [0.75 / SPREAD, -0.25 / SPREAD], [1 / 4, 1 / 8]),
        ("cispo", [0.75 / SPREAD, -0.25 / SPREAD], [1 / 10, 1 / 10]),
        ("rloo", [1.0, -1 / 3], [1 / 4, 1 / 4]),
    ],
)
def test_advantages_and_weights_are_those_of_the_loss(loss: str, advantages: list[float], weights: list[float]) -> None:
    rows = build_update([group_of([1, 0, 0, 0], [1, 2, 3, 4]), group_of([1, 1])], with_algo(loss=loss), 0).rows
    assert [row.advantages[-1] for row in rows[:2]] == pytest.approx(advantages, rel=1e-12)
    assert [row.loss_weights[-1] for row in rows[:2]] == pytest.approx(weights, rel=1e-12)


def test_the_advantage_can_be_chosen() -> None:
    assert AlgoConfig.__dataclass_fields__["advantage"].metadata["choices"] == tuple(Advantage)
    group = group_of([1, 0, 0, 0])
    assert build_update([group], with_algo(advantage="centred"), 0).advantages[0][0] == 0.75
    assert build_update([group], with_algo(loss="dr_grpo", advantage="std"), 0).advantages[0][0] == 0.75 / SPREAD


@pytest.mark.parametrize(("phases", "limit"), [(["reflection"], 16), (["retry"], 5), (["reflection", "retry"], 21)])
def test_the_limit_of_a_row_is_that_of_its_trained_phases(phases: list[str], limit: int) -> None:
    rows = build_update([group_of([1, 0])], with_algo(loss="dr_grpo", trained_phases=phases), 0).rows
    assert rows[0].loss_weights[-1] == pytest.approx(1 / (2 * limit))


@pytest.mark.parametrize("loss", ["grpo", "dapo"])
def test_a_reflection_cut_at_its_limit_leaves_loss_and_denominators_but_not_its_group(loss: str) -> None:
    group = cut(group_of([1, 0, 0, 1], [4, 2, 3, 5]), 0, 2)
    masked = build_update([group], with_algo(loss=loss, mask_truncated=True), 0)
    assert [len(row) for row in masked.rows] == [9, 12]
    assert sum(sum(row.loss_weights) for row in masked.rows) == pytest.approx(1)
    whole = build_update([group], with_algo(loss=loss), 0)
    assert len(whole.rows) == 4 and masked.advantages == whole.advantages
    assert masked.rows[0].advantages == whole.rows[1].advantages


@pytest.mark.parametrize(
    ("phases", "left"),
    [(["reflection"], [1, 2]), (["retry"], [0, 2]), (["reflection", "retry"], [2])],
    ids=lambda value: "-".join(map(str, value)),
)
def test_only_a_cut_turn_that_would_be_trained_masks_its_row(phases: list[str], left: list[int]) -> None:
    lengths = [4, 2, 3]
    group = cut(group_of([1, 0, 0], lengths), 0)
    second = replace(group.reflections[1], retry=replace(group.reflections[1].retry, finish_reason="length"))
    group = replace(group, reflections=(group.reflections[0], second, group.reflections[2]))
    batch = build_update([group], with_algo(mask_truncated=True, trained_phases=phases), 0)
    assert [row.phases.count(Phase.REFLECTION) for row in batch.rows] == [lengths[number] for number in left]


def test_masking_every_reflection_leaves_no_rows() -> None:
    batch = build_update([cut(group_of([1, 0]), 0, 1)], with_algo(mask_truncated=True), 0)
    assert (batch.rows, batch.groups_used, batch.groups_dropped) == ((), 0, 1)
    batch = build_update([cut(group_of([1, 0]), 0, 1), cut(group_of([1, 0]), 0)], with_algo(mask_truncated=True), 0)
    assert (len(batch.rows), batch.groups_used, batch.groups_dropped) == (1, 1, 1)


def test_groups_whose_retries_agree_leave_the_update_and_rows_know_their_group_and_what_it_shares() -> None:
    batch = build_update([group_of([0, 1]), group_of([1, 1]), group_of([1, 0, 0]), group_of([0, 0])], with_algo(), 0)
    assert (batch.groups_used, batch.groups_dropped) == (2, 2)
    assert batch.advantages[1] == batch.advantages[3] == (0.0, 0.0)
    assert batch.advantages[0][0] < 0 < batch.advantages[0][1]
    assert [row.group for row in batch.rows] == [0, 0, 2, 2, 2]
    assert [row.shared for row in batch.rows] == [7] * 5  # task 3, attempt 2, request 2


def test_updates_share_the_groups_that_train_and_each_has_its_own_denominators() -> None:
    config = with_algo()
    config.train.updates_per_step = 2
    batch = build_update([group_of([0, 1]), group_of([1, 1]), *[group_of([1, 0, 0])] * 2], config, 0)
    assert [[row.group for row in rows] for rows in batch.updates] == [[0, 0, 2, 2, 2], [3, 3, 3]]
    assert [sum(sum(row.loss_weights) for row in rows) for rows in batch.updates] == pytest.approx([1, 1])
    config.train.updates_per_step = 9
    batch = build_update([group_of([0, 1]), group_of([1, 1]), group_of([1, 0])], config, 0)
    assert [[row.group for row in rows] for rows in batch.updates] == [[0, 0], [2, 2]], "no update is empty"


def test_what_is_trained_or_differs_is_not_shared() -> None:
    group = group_of([0, 1])
    alike = build_update([group], with_algo(), 0)
    assert [row.shared for row in alike.rows] == [7, 7], "the reflections are the same, and trained"

    first, second = group.reflections
    segments = list(second.trajectory.segments)
    segments[2] = Segment(Phase.REQUEST, (30, 99))
    other = replace(second, trajectory=Trajectory(tuple(segments)))
    differing = build_update([replace(group, reflections=(first, other))], with_algo(), 0)
    assert [row.shared for row in differing.rows] == [5, 5]
    alone = build_update([cut(replace(group, reflections=(first, other)), 0)], with_algo(mask_truncated=True), 0)
    assert [row.shared for row in alone.rows] == [7], "a row alone shares all that is not trained"


def test_a_group_that_shares_nothing_is_a_bug() -> None:
    group = group_of([0, 1])
    first, second = group.reflections
    other = replace(second, trajectory=Trajectory(second.trajectory.segments[1:]))
    with pytest.raises(AssertionError, match="begins with its task"):
        build_update([replace(group, reflections=(first, other))], with_algo(), 0)


def test_equal_groups_can_be_kept_without_an_advantage() -> None:
    groups = [group_of([1, 1], [3, 4]), group_of([0, 1], [5, 2])]
    batch = build_update(groups, with_algo(keep_equal_groups=True), 0)
    assert (batch.groups_used, batch.groups_dropped, len(batch.rows)) == (1, 1, 4)
    assert [row.loss_weights[-1] for row in batch.rows] == pytest.approx([1 / (4 * length) for length in (3, 4, 5, 2)])
    assert [row.advantages[-1] for row in batch.rows[:2]] == [0.0, 0.0]
    alone = build_update(groups, with_algo(), 0)
    assert batch.advantages == alone.advantages
    halves = [row.loss_weights[-1] / 2 for row in alone.rows]
    assert [row.loss_weights[-1] for row in batch.rows[2:]] == pytest.approx(halves)


def test_the_shuffled_control_deals_the_same_rewards_by_the_seed_alone() -> None:
    groups = [group_of([1, 1, 1, 1]), group_of([0, 0, 0, 0]), group_of([1, 0, 0, 0]), group_of([0, 1, 1, 0])]
    config = with_algo(shuffle_rewards=True, advantage="centred")
    batch = build_update(groups, config, 5)
    assert batch == build_update(groups, config, 5)
    assert len({build_update(groups, config, seed).advantages for seed in range(8)}) > 4
    true = build_update(groups, with_algo(advantage="centred"), 5)
    assert batch.advantages != true.advantages and batch.rewards == true.rewards
    assert (batch.groups_used, batch.groups_dropped) == (true.groups_used, true.groups_dropped) == (2, 2)


def leaking(group: Group, *samples: int) -> Group:
    """The group with these reflections passing as answers themselves."""
    reflections = (replace(reflection, solves=reflection.sample in samples) for reflection in group.reflections)
    return replace(group, reflections=tuple(reflections))


def test_a_reflection_that_gives_the_answer_away_can_be_made_to_earn_nothing() -> None:
    groups = [leaking(group_of([1, 1, 0, 0]), 0, 2), leaking(group_of([1, 1]), 0, 1), leaking(group_of([1, 1]), 1)]
    as_ever = build_update(groups, with_algo(), 0)
    assert as_ever == build_update([leaking(group) for group in groups], with_algo(), 0)
    assert as_ever.rewards == ((1, 1, 0, 0), (1, 1), (1, 1)) and as_ever.groups_used == 1
    strict = build_update(groups, with_algo(reward_leaks=False, advantage="centred"), 0)
    assert strict.rewards == ((0, 1, 0, 0), (0, 0), (1, 0))
    assert strict.advantages == ((-0.25, 0.75, -0.25, -0.25), (0, 0), (0.5, -0.5))
    assert [row.group for row in strict.rows] == [0, 0, 0, 0, 2, 2]


def test_reflection_and_retry_can_be_trained_together() -> None:
    config = with_algo(trained_phases=["reflection", "retry"])
    batch = build_update([group_of([1, 0])], config, 0)
    row = batch.rows[0]
    assert list(row.ids)[-3:] == [50, 60, 61] and trained_ids(batch, 0) == [40, 41, 42, 43, 60, 61]
    assert [weight for weight in row.loss_weights if weight] == pytest.approx([0.5 / 6] * 6)
    check_loss_weights(batch, config.algo)
    with pytest.raises(RuntimeError, match="phase retry"):
        check_loss_weights(batch, AlgoConfig())


def test_a_reflection_that_was_never_sampled_makes_no_row() -> None:
    group = group_of([1, 0, 0])
    silent = replace(group.reflections[2], trajectory=Trajectory(group.failure.context.segments))
    batch = build_update([replace(group, reflections=(*group.reflections[:2], silent))], with_algo(), 0)
    assert len(batch.rows) == 2
    assert sum(sum(row.loss_weights) for row in batch.rows) == pytest.approx(1)


@pytest.mark.parametrize(
    ("position", "weight", "expected"),
    [
        (0, 0.25, r"row 1, token 0: phase task \(not sampled by vLLM\)"),
        (3, -0.1, r"token 3: phase attempt \(sampled\)"),
        (0, float("nan"), "token 0: phase task"),
    ],
)
def test_the_gate_names_the_token_that_must_not_be_trained(position: int, weight: float, expected: str) -> None:
    batch = build_update([group_of([1, 0])], with_algo(), 0)
    weights = list(batch.rows[1].loss_weights)
    weights[position] = weight
    rows = (batch.rows[0], replace(batch.rows[1], loss_weights=weights))
    with pytest.raises(RuntimeError, match=expected):
        check_loss_weights(replace(batch, rows=rows), AlgoConfig())


def test_the_gate_refuses_a_reflection_that_vllm_did_not_sample() -> None:
    batch = build_update([group_of([1, 0])], with_algo(), 0)
    row = replace(batch.rows[0], sampled=[False] * len(batch.rows[0]))
    with pytest.raises(RuntimeError, match="reflection .not sampled by vLLM"):
        check_loss_weights(replace(batch, rows=(row,)), AlgoConfig())
