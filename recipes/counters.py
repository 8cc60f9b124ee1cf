"""`Counters`: how far a training run has come, and when it has gone wrong for too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_r3.config import TrainConfig
from nemo_r3.errors import in_one_line
from nemo_r3.types import Group


@dataclass
class Counters:
    """The loop's state, which every checkpoint keeps beside the policy.

    Attributes:
        step: the last finished step.
        cursor: how far the source of failures has come.
        empty_steps: consecutive steps, up to this one, in which no group had mixed rewards.
        skipped_steps: consecutive steps whose update was skipped.
        drift_steps: consecutive steps above `train.drift_stop`.
        bf16_layers: layers that were moved from FP8 to BF16.
    """

    step: int = 0
    cursor: int = 0
    empty_steps: int = 0
    skipped_steps: int = 0
    drift_steps: int = 0
    bf16_layers: list[int] = field(default_factory=list)

    def after(self, step: int, cursor: int, metrics: Mapping[str, float | None], config: TrainConfig) -> Counters:
        """The counters after one more step."""
        empty, drift = not metrics["groups_used"], metrics["token_mult_prob_error"]
        return Counters(
            step=step,
            cursor=cursor,
            empty_steps=self.empty_steps + 1 if empty else 0,
            skipped_steps=self.skipped_steps + 1 if metrics.get("skipped") else 0,
            drift_steps=self.drift_steps + 1 if drift is not None and not drift <= config.drift_stop else 0,
            bf16_layers=self.bf16_layers,
        )


def reason_to_stop(
    counters: Counters, config: TrainConfig, last_checkpoint: Path | None, groups: Sequence[Group]
) -> str | None:
    """Why the run should end, or None.

    It should after too many consecutive steps that had no group with both outcomes, skipped their update, or drifted:
    it would learn nothing, or the wrong thing. `groups` are the last step's.
    """
    checkpoint = f"last checkpoint: {last_checkpoint or 'none yet'}"
    if counters.empty_steps >= config.max_empty_steps:
        return (
            f"{counters.empty_steps} steps in a row had no group with both outcomes "
            f"(train.max_empty_steps={config.max_empty_steps}): {_how_retries_ended(groups)}; "
            "look at rollouts/, and at the task's difficulty"
        )
    if counters.skipped_steps >= config.max_skipped_steps:
        return (
            f"{counters.skipped_steps} updates in a row were skipped "
            f"(train.max_skipped_steps={config.max_skipped_steps}): "
            "their gradient was NaN or Inf (lower actor.lr, or resume an earlier checkpoint), or "
            "algo.mismatch_correction rejected every token (token_mult_prob_error tells how far vLLM is off); "
            f"{checkpoint}"
        )
    if counters.drift_steps >= config.max_drift_steps:
        return (
            f"token_mult_prob_error was above train.drift_stop={config.drift_stop} in {counters.drift_steps} steps "
            f"in a row (train.max_drift_steps={config.max_drift_steps}): vLLM samples from another policy than is "
            f"trained; try actor.precision=bf16 and rollout.quantization=none; {checkpoint}"
        )
    return None


def _how_retries_ended(groups: Sequence[Group]) -> str:
    """Of a step without anything to train on: whether the retries passed, and one of them."""
    passed, failed = sum(min(group.rewards) > 0 for group in groups), sum(not max(group.rewards) for group in groups)
    ended = f"all retries of {passed} groups passed, all of {failed} failed"
    if mixed := len(groups) - passed - failed:
        ended += f", and {mixed} had no reflection to train on"
    if len(groups) in (passed, failed):
        ended = f"all retries {'passed' if passed else 'failed'}"
    problem, retry = groups[0].failure.problem, groups[0].reflections[0].retry
    text = in_one_line(repr(retry.text))
    return f"in the last one {ended}, such as {text} to problem {problem.id!r} ({in_one_line(problem.text)})"
