"""Groups -> `UpdateBatch`: advantages, dynamic sampling, and which tokens carry the loss."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from nemo_r3.algo.advantages import group_advantages, is_mixed, shuffled
from nemo_r3.config import AlgoConfig
from nemo_r3.types import Group, Phase, Row, Segment, Trajectory, UpdateBatch


def build_update(groups: Sequence[Group], config: AlgoConfig, seed: int) -> UpdateBatch:
    """The rows of one optimizer step.

    A group whose rewards are all equal has no advantage to give: it leaves the update and is counted. Over the
    rows that stay, each row's trained tokens share 1 / rows evenly (GRPO's mean over sequences of the mean over
    tokens), so the weights of a whole step sum to 1 however it is cut into microbatches and ranks.

    Args:
        groups: this step's rollouts, the same on every rank.
        config: group size, phases, and the shuffled-reward control.
        seed: of that control.
    """
    rewards = [group.rewards for group in groups]
    if config.shuffle_rewards:
        rewards = shuffled(rewards, seed)
    advantages = [
        group_advantages(scores, config.advantage_std) if is_mixed(scores) else [0.0] * len(scores)
        for scores in rewards
    ]
    phases = frozenset(Phase(phase) for phase in config.trained_phases)
    pairs = [
        (up_to_trained(reflection.trajectory, phases), advantage)
        for group, scores, group_values in zip(groups, rewards, advantages, strict=True)
        if is_mixed(scores)
        for reflection, advantage in zip(group.reflections, group_values, strict=True)
    ]
    pairs = [(trajectory, advantage) for trajectory, advantage in pairs if trajectory.segments]
    used = sum(is_mixed(scores) for scores in rewards)
    return UpdateBatch(
        rows=tuple(build_row(trajectory, advantage, phases, 1 / len(pairs)) for trajectory, advantage in pairs),
        advantages=tuple(tuple(values) for values in advantages),
        groups_used=used,
        groups_dropped=len(groups) - used,
    )


def up_to_trained(trajectory: Trajectory, phases: Collection[Phase]) -> Trajectory:
    """The trajectory cut behind its last trained segment: what follows never enters a row."""
    last = max((i for i, segment in enumerate(trajectory.segments) if _trained(segment, phases)), default=-1)
    return Trajectory(trajectory.segments[: last + 1])


def build_row(trajectory: Trajectory, advantage: float, phases: Collection[Phase], share: float) -> Row:
    """One training sequence whose trained tokens share `share` of the loss evenly."""
    count = sum(len(segment.ids) for segment in trajectory.segments if _trained(segment, phases))
    tokens = [
        (
            token,
            segment.phase,
            segment.sampled,
            advantage if _trained(segment, phases) else 0.0,
            share / count if _trained(segment, phases) else 0.0,
            segment.logprobs[i] if segment.sampled else 0.0,
        )
        for segment in trajectory.segments
        for i, token in enumerate(segment.ids)
    ]
    ids, kinds, sampled, advantages, weights, logprobs = zip(*tokens, strict=True)
    return Row(ids, kinds, sampled, advantages, weights, logprobs)


def _trained(segment: Segment, phases: Collection[Phase]) -> bool:
    return segment.sampled and segment.phase in phases and len(segment.ids) > 0


def refuse_untrained_weight(batch: UpdateBatch, config: AlgoConfig) -> None:
    """The last gate before an optimizer step.

    Raises:
        RuntimeError: a token of a phase that is not trained, or one that vLLM did not sample, has weight.
    """
    phases = frozenset(Phase(phase) for phase in config.trained_phases)
    for number, row in enumerate(batch.rows):
        for position, (phase, sampled, weight) in enumerate(zip(row.phases, row.sampled, row.weights, strict=True)):
            if weight and not (sampled and phase in phases):
                origin = "sampled" if sampled else "not sampled by vLLM"
                raise RuntimeError(
                    f"row {number}, token {position}: phase {phase} ({origin}) has weight {weight:.3g} in the loss; "
                    f"algo.trained_phases={list(config.trained_phases)}"
                )
