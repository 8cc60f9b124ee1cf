"""`Counters`: how far a training run has come, and for how long it has gone wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nemo_r3.config import TrainConfig
from nemo_r3.errors import in_one_line
from nemo_r3.types import Group

FEW_GROUPS = 0.2
"""Groups of mixed rewards are few if they are a smaller share of a step's groups than this."""
ALIKE = 1.1
"""The reflections of a step's groups are alike if fewer than this many of a group differ, on average."""
MANY_TRUNCATED = 0.2
"""A larger share of truncated turns is warned of."""
FEW_STEPS = 10
"""A step's line says so once they were few in that many steps in a row."""


@dataclass
class Counters:
    """The loop's state; every checkpoint keeps it beside the policy."""

    step: int = 0  # the last finished step
    cursor: int = 0  # how far the source of failures has come
    empty_steps: int = 0  # consecutive steps, up to this one, without a group of mixed rewards
    sparse_steps: int = 0  # consecutive steps whose groups of mixed rewards were few
    skipped_steps: int = 0  # consecutive steps whose updates were all skipped
    mismatch_steps: int = 0  # consecutive steps above `train.mismatch_stop`
    bf16_layers: list[int] = field(default_factory=list)  # layers that were moved from FP8 to BF16

    @property
    def had_groups(self) -> bool:
        """Whether groups of mixed rewards are few now, but were not from the first step on."""
        return 0 < self.sparse_steps < self.step

    @property
    def last_update(self) -> int:
        """The last step with a group of mixed rewards; 0: none."""
        return self.step - self.empty_steps

    def after(self, step: int, cursor: int, metrics: Mapping[str, float | None], config: TrainConfig) -> Counters:
        """The counters after one more step."""
        mismatch = metrics["token_mult_prob_error"]
        mismatched = mismatch is not None and not mismatch <= config.mismatch_stop  # NaN is one, too
        skipped = "updates" in metrics and metrics["skipped"] == metrics["updates"]
        used = metrics["groups_used"] or 0
        return Counters(
            step=step,
            cursor=cursor,
            empty_steps=0 if used else self.empty_steps + 1,
            sparse_steps=self.sparse_steps + 1 if used < FEW_GROUPS * config.failures_per_step else 0,
            skipped_steps=self.skipped_steps + 1 if skipped else 0,
            mismatch_steps=self.mismatch_steps + 1 if mismatched else 0,
            bf16_layers=self.bf16_layers,
        )


def why_few(counters: Counters, metrics: Mapping[str, float | None]) -> str | None:
    """What may keep groups of mixed rewards few, as far as the last step tells; None: how hard its failures are."""
    success = metrics["retry_success"] or 0
    if success >= 0.5:
        return None
    if counters.had_groups and not success:
        return "there were more before, has too high an actor.lr broken the model?"
    if (metrics["distinct_reflections"] or 0) < ALIKE:
        return "a group's reflections are alike, raise rollout.temperature"
    for name, limit in (("truncated", "max_reflection_tokens"), ("retries_truncated", "max_answer_tokens")):
        if (cut := metrics[name] or 0) > MANY_TRUNCATED:
            return f"{cut:.0%} are cut, raise rollout.{limit}"
    return None


def reason_to_stop(
    counters: Counters,
    config: TrainConfig,
    last_checkpoint: Path | None,
    groups: Sequence[Group],
    metrics: Mapping[str, float | None],
) -> str | None:
    """Why the run should end, or None: it has long learned nothing, or the wrong thing.

    `groups` and `metrics` are the last step's.
    """
    checkpoint = f"last checkpoint: {last_checkpoint or 'none yet'}"
    if last_checkpoint:
        checkpoint += (
            f"; to go on from it with other settings, name a new run.dir and train.start_from={last_checkpoint}"
        )
    if counters.empty_steps >= config.max_empty_steps:
        return (
            f"{counters.empty_steps} steps in a row had no group whose rewards differ "
            f"(train.max_empty_steps={config.max_empty_steps}): {_how_retries_ended(groups)}; "
            f"look at rollouts/: {why_few(counters, metrics) or 'is the task too hard or too easy, or verify wrong?'}"
        )
    if counters.skipped_steps >= config.max_skipped_steps:
        return (
            f"all updates of {counters.skipped_steps} steps in a row were skipped "
            f"(train.max_skipped_steps={config.max_skipped_steps}): "
            "their gradient was NaN or Inf (lower actor.lr), or "
            "algo.mismatch_correction rejected every token (token_mult_prob_error tells how far vLLM is off); "
            f"{checkpoint}"
        )
    if counters.mismatch_steps >= config.max_mismatch_steps:
        return (
            f"token_mult_prob_error was above train.mismatch_stop={config.mismatch_stop} in "
            f"{counters.mismatch_steps} steps in a row (train.max_mismatch_steps={config.max_mismatch_steps}): vLLM "
            "samples from another policy than is trained; try actor.precision=bf16 and rollout.quantization=none; "
            f"{checkpoint}"
        )
    return None


def _how_retries_ended(groups: Sequence[Group]) -> str:
    """Whether the retries of a step with nothing to train on passed or failed, and one of them."""
    verdicts = [[reflection.passed for reflection in group.reflections] for group in groups]
    passed, failed = sum(map(all, verdicts)), len(groups) - sum(map(any, verdicts))
    if passed == len(groups):
        ended = "all retries passed"
    elif failed == len(groups):
        ended = "all retries failed"
    else:
        ended = f"all retries of {passed} groups passed, all of {failed} failed"
        if mixed := len(groups) - passed - failed:
            ended += f", and {mixed} had equal rewards or no reflection to train on"
    problem, retry = groups[0].failure.problem, groups[0].reflections[0].retry
    text = in_one_line(repr(retry.text))
    return f"in the last one {ended}, such as {text} to problem {problem.id!r} ({in_one_line(problem.text)})"
