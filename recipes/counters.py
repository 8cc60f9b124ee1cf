"""`Counters`: where a training run is, and when it has gone wrong for too long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nemo_r3.config import TrainConfig


@dataclass
class Counters:
    """Where a run is: what a checkpoint keeps beside the policy.

    Attributes:
        step: the last one done.
        cursor: where the source of failures is.
        empty_steps, skipped_steps, drift_steps: in a row, up to now.
        bf16_layers: taken out of FP8 because they drifted.
    """

    step: int = 0
    cursor: int = 0
    empty_steps: int = 0
    skipped_steps: int = 0
    drift_steps: int = 0
    bf16_layers: list[int] = field(default_factory=list)

    def after(self, step: int, cursor: int, metrics: Mapping[str, float | None], config: TrainConfig) -> Counters:
        """Where it is one step later; a step without a loss had nothing to train on."""
        empty, drift = metrics["loss"] is None, metrics["token_mult_prob_error"]
        return Counters(
            step=step,
            cursor=cursor,
            empty_steps=self.empty_steps + 1 if empty else 0,
            skipped_steps=self.skipped_steps + 1 if metrics.get("skipped") else 0,
            drift_steps=self.drift_steps + 1 if drift is not None and not drift <= config.drift_stop else 0,
            bf16_layers=self.bf16_layers,
        )


def hopeless(at: Counters, config: TrainConfig, good: str) -> str | None:
    """Why a run should end that learns nothing, or the wrong thing; `good` is the last checkpoint.

    That is too many steps in a row with nothing to train on, with a skipped update, or with drift.
    """
    if at.empty_steps >= config.max_empty_steps:
        return (
            f"{at.empty_steps} steps in a row had nothing to train on "
            f"(train.max_empty_steps={config.max_empty_steps}): all retries of each group pass, or all fail; "
            "look at rollouts/, and at the task's difficulty"
        )
    if at.skipped_steps >= config.max_skipped_steps:
        return (
            f"{at.skipped_steps} updates in a row were skipped (train.max_skipped_steps={config.max_skipped_steps}): "
            "their gradient was NaN or Inf (lower actor.lr, or resume an earlier checkpoint), or "
            "algo.mismatch_correction rejected every token (token_mult_prob_error tells how far vLLM is off); "
            f"last checkpoint: {good}"
        )
    if at.drift_steps >= config.max_drift_steps:
        return (
            f"token_mult_prob_error was above train.drift_stop={config.drift_stop} in {at.drift_steps} steps in a row "
            f"(train.max_drift_steps={config.max_drift_steps}): vLLM samples from another policy than is trained; "
            f"try actor.precision=bf16 and rollout.quantization=none; last checkpoint: {good}"
        )
    return None
