"""Groups -> `UpdateBatch`: advantages, which groups are dropped, and which tokens carry the loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from itertools import compress, groupby, takewhile
from operator import itemgetter

from nemo_r3.algo.advantages import Advantage, group_advantages, is_mixed, shuffled
from nemo_r3.algo.aggregation import token_weights
from nemo_r3.algo.losses import loss_named
from nemo_r3.algo.rewards import reward
from nemo_r3.config import AlgoConfig, Config
from nemo_r3.types import Group, Phase, Row, Segment, Trajectory, UpdateBatch


def build_update(groups: Sequence[Group], config: Config, seed: int) -> UpdateBatch:
    """The rows of one training step, from its rollouts, which are the same on every rank.

    A group whose rewards are all equal has no advantages: it is dropped and counted, unless `algo.keep_equal_groups`.
    The other groups are dealt evenly over the step's updates. The rows of an update share its loss as `algo.loss`
    aggregates it (GRPO: 1 / rows each, evenly over the row's trained tokens), so the loss does not depend on how it is
    cut into microbatches and ranks. The seed is that of `algo.shuffle_rewards`.
    """
    algo, loss = config.algo, loss_named(config.algo.loss)
    earned = [[reward(reflection, algo) for reflection in group.reflections] for group in groups]
    rewards = shuffled(earned, seed) if algo.shuffle_rewards else earned
    kind = Advantage(algo.advantage or loss.ADVANTAGE)
    mixed = [is_mixed(scores) for scores in rewards]
    advantages = [
        group_advantages(scores, kind) if teaches else [0.0] * len(scores)
        for scores, teaches in zip(rewards, mixed, strict=True)
    ]
    phases = frozenset(Phase(phase) for phase in algo.trained_phases)
    chosen: list[tuple[int, Trajectory, float]] = []
    for number, group in enumerate(groups):
        if not (mixed[number] or algo.keep_equal_groups):
            continue
        for reflection, advantage in zip(group.reflections, advantages[number], strict=True):
            trajectory = _up_to_trained(reflection.trajectory, phases)
            trained = [turn for turn in (reflection.answer, reflection.retry) if turn.segment.phase in phases]
            masked = algo.mask_truncated and any(turn.truncated for turn in trained)  # arXiv 2503.14476, section 3.4
            if trajectory.segments and not masked:
                chosen.append((number, trajectory, advantage))
    shared = {
        number: _shared_tokens([trajectory for _, trajectory, _ in members], phases)
        for number, members in groupby(chosen, key=itemgetter(0))
    }
    update = {number: place * config.train.updates_per_step // len(shared) for place, number in enumerate(shared)}
    rows: list[Row] = []
    for _, members in groupby(chosen, key=lambda one: update[one[0]]):
        together = list(members)
        lengths = [_trained_tokens(trajectory, phases) for _, trajectory, _ in together]
        weights = token_weights(lengths, loss.AGGREGATION, _token_limit(config))
        for (number, trajectory, advantage), weight in zip(together, weights, strict=True):
            row = _build_row(trajectory, phases, advantage, weight)
            rows.append(replace(row, group=number, shared=shared[number], update=update[number]))
    used = len({number for number, _, _ in chosen if mixed[number]})
    return UpdateBatch(
        rows=tuple(rows),
        advantages=tuple(map(tuple, advantages)),
        groups_used=used,
        groups_dropped=len(groups) - used,
        rewards=tuple(map(tuple, earned)),
    )


def _token_limit(config: Config) -> int:
    """The most tokens that a row can train: the token limits of the trained phases."""
    rollout = config.rollout
    return sum(
        rollout.max_reflection_tokens if phase == Phase.REFLECTION else rollout.max_answer_tokens
        for phase in config.algo.trained_phases
    )


def _up_to_trained(trajectory: Trajectory, phases: Collection[Phase]) -> Trajectory:
    """The trajectory up to its last trained segment; nothing after that enters a row."""
    last = max((i for i, segment in enumerate(trajectory.segments) if _trained(segment, phases)), default=-1)
    return Trajectory(trajectory.segments[: last + 1])


def _shared_tokens(trajectories: Sequence[Trajectory], phases: Collection[Phase]) -> int:
    """How many leading tokens all trajectories share, up to the first segment that is trained."""
    columns = zip(*(trajectory.segments for trajectory in trajectories), strict=False)
    alike = takewhile(
        lambda column: column.count(column[0]) == len(column) and not _trained(column[0], phases), columns
    )
    shared = sum(len(column[0].ids) for column in alike)
    assert shared, "a trajectory begins with its task, which is never trained and the same for a whole group"
    return shared


def _build_row(trajectory: Trajectory, phases: Collection[Phase], advantage: float, weight: float) -> Row:
    """One training sequence, on its own; each of its trained tokens has this advantage and weight."""
    ids: list[int] = []
    kinds: list[Phase] = []
    sampled: list[bool] = []
    advantages: list[float] = []
    weights: list[float] = []
    logprobs: list[float] = []
    for segment in trajectory.segments:
        length, trains = len(segment.ids), _trained(segment, phases)
        ids += segment.ids
        kinds += [segment.phase] * length
        sampled += [segment.sampled] * length
        advantages += [advantage if trains else 0.0] * length
        weights += [weight if trains else 0.0] * length
        logprobs += segment.logprobs if segment.sampled else [0.0] * length
    assert len(logprobs) == len(ids), "every sampled token has a log-probability"
    return Row(ids, kinds, sampled, advantages, weights, logprobs)


def _trained_tokens(trajectory: Trajectory, phases: Collection[Phase]) -> int:
    return sum(len(segment.ids) for segment in trajectory.segments if _trained(segment, phases))


def _trained(segment: Segment, phases: Collection[Phase]) -> bool:
    return segment.sampled and segment.phase in phases and len(segment.ids) > 0


def check_loss_weights(batch: UpdateBatch, config: AlgoConfig) -> None:
    """The last check before an optimizer step.

    Raises:
        RuntimeError: a token that vLLM did not sample, or of a phase that is not trained, carries loss.
    """
    phases = frozenset(Phase(phase) for phase in config.trained_phases)
    for number, row in enumerate(batch.rows):
        for position in compress(range(len(row)), row.loss_weights):
            phase, sampled = row.phases[position], row.sampled[position]
            if not (sampled and phase in phases):
                origin = "sampled" if sampled else "not sampled by vLLM"
                weight = row.loss_weights[position]
                raise RuntimeError(
                    f"row {number}, token {position}: phase {phase} ({origin}) has weight {weight:.3g} in the loss; "
                    f"algo.trained_phases={list(config.trained_phases)}"
                )
