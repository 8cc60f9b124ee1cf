"""Checks of settings against each other, without model or hardware; a single setting's limits are in its `option()`."""

from __future__ import annotations

import math

from nemo_r3.config.schema import show
from nemo_r3.config.tree import Config
from nemo_r3.errors import ConfigError


def check(config: Config) -> None:
    """Refuse settings that do not fit each other.

    Raises:
        ConfigError: the settings, their values and what would fit.
    """
    if not config.model.path:
        raise ConfigError(
            "model.path: name a Hugging Face checkpoint, by its directory or its name on the hub, or 'embedded'"
        )
    _check_lengths(config)
    _check_arithmetic(config)
    _check_optimizer(config)
    _check_method(config)
    _check_mismatch(config)
    _check_cluster(config)


def check_world(config: Config, world_size: int) -> None:
    """Refuse a layout that the launched ranks cannot be divided into.

    Raises:
        ConfigError: the ranks, the layout and what would fit.
    """
    _check_divides(config, world_size, f"{world_size} ranks were launched")


def fewest_ranks(config: Config) -> int:
    """The least number of ranks that `check_world` accepts."""
    actor = config.actor
    stage = math.lcm(actor.tensor_parallel, actor.expert_parallel)
    return math.lcm(stage * actor.pipeline_parallel, config.rollout.tensor_parallel)


def lengths_that_fit(config: Config, room: int) -> str:
    """A hint for an error, "; try rollout.max_model_len=512 ...": settings for dialogues of at most `room` tokens."""
    lengths = {"max_model_len": room}
    if _sampled(config) >= room:  # half for the answers, an eighth for the reflection, the rest for what is asked
        lengths |= {"max_answer_tokens": max(room // 4, 1), "max_reflection_tokens": max(room // 8, 1)}
    return "; try " + " ".join(f"rollout.{name}={value}" for name, value in lengths.items())


def _sampled(config: Config) -> int:
    """The most tokens that are sampled in a dialogue."""
    return 2 * config.rollout.max_answer_tokens + config.rollout.max_reflection_tokens


def _check_lengths(config: Config) -> None:
    rollout, actor = config.rollout, config.actor
    if (longest := _sampled(config)) >= rollout.max_model_len:
        raise ConfigError(
            f"rollout.max_model_len: {rollout.max_model_len} cannot hold task, attempt, reflection and retry; it "
            f"must be above 2 * rollout.max_answer_tokens + rollout.max_reflection_tokens = {longest}"
            + lengths_that_fit(config, rollout.max_model_len)
        )
    if actor.microbatch_tokens < rollout.max_model_len:
        raise ConfigError(
            f"actor.microbatch_tokens: {actor.microbatch_tokens} cannot hold the longest sequence; it must be at least "
            f"rollout.max_model_len = {rollout.max_model_len}"
        )


def _check_optimizer(config: Config) -> None:
    actor = config.actor
    if actor.lr_min > actor.lr:
        raise ConfigError(f"actor.lr_min: {actor.lr_min:g} is above actor.lr = {actor.lr:g}, where the cosine starts")
    if actor.lr_warmup_ratio >= 1:
        raise ConfigError(f"actor.lr_warmup_ratio: {actor.lr_warmup_ratio:g} leaves no step to the cosine; go below 1")
    for name, beta in (("adam_beta1", actor.adam_beta1), ("adam_beta2", actor.adam_beta2)):
        if beta >= 1:
            raise ConfigError(f"actor.{name}: {beta:g} never forgets; it must be below 1")


def _check_method(config: Config) -> None:
    phases, failures, train = config.algo.trained_phases, config.failures, config.train
    if train.updates_per_step > train.failures_per_step:
        raise ConfigError(
            f"train.updates_per_step: {train.updates_per_step} updates cannot share train.failures_per_step = "
            f"{train.failures_per_step} groups"
        )
    if not phases or len(set(phases)) < len(phases):
        raise ConfigError(f"algo.trained_phases: {phases} must name at least one phase, and none twice")
    least, most = failures.min_solve_rate, failures.max_solve_rate
    for name, value, off in (("max_solve_rate", most, 1), ("min_solve_rate", least, 0)):
        if value != off and failures.samples_per_problem == 1:
            raise ConfigError(
                f"failures.{name}: {value:g} needs failures.samples_per_problem above 1: "
                "one sample says nothing about how often a problem is solved"
            )
    if least > most:
        raise ConfigError(f"failures.min_solve_rate: {least:g} is above failures.max_solve_rate = {most:g}")


def _check_mismatch(config: Config) -> None:
    """Refuses bounds that the chosen correction would ignore; their defaults are in nemo_r3.algo.mismatch."""
    algo, ignored = config.algo, {"none": ("mismatch_low", "mismatch_high"), "tis": ("mismatch_low",)}
    correction = algo.mismatch_correction
    for name in ignored.get(correction, ()):
        if (value := getattr(algo, name)) is not None:
            raise ConfigError(
                f"algo.{name}: {show(value)} has no effect with algo.mismatch_correction={correction}; leave it out"
            )


def _check_cluster(config: Config) -> None:
    actor, cluster = config.actor, config.cluster
    if actor.routing_replay and not config.rollout.prefix_caching:
        raise ConfigError(
            "actor.routing_replay: true needs rollout.prefix_caching=true, without which vLLM returns no experts"
        )
    if actor.sequence_parallel and actor.tensor_parallel == 1:
        raise ConfigError("actor.sequence_parallel: true needs actor.tensor_parallel above 1, got 1")
    if cluster.gpus_per_node:
        world_size = cluster.nodes * cluster.gpus_per_node
        _check_divides(config, world_size, f"cluster.nodes * cluster.gpus_per_node = {world_size} ranks")
    if 0 < cluster.time_minutes * 60 <= cluster.signal_seconds:
        raise ConfigError(
            f"cluster.time_minutes: {cluster.time_minutes} leaves no time to train: the job stops to save "
            f"cluster.signal_seconds = {cluster.signal_seconds} before it"
        )


def _check_arithmetic(config: Config) -> None:
    """Refuses what needs no look at the machine; nemo_r3.fp8_support does the rest."""
    actor, quantization = config.actor, config.rollout.quantization
    if "fp8" in actor.precision and actor.layer_spec == "local":
        raise ConfigError(f"actor.precision: {actor.precision} needs Transformer Engine's layers: not layer_spec=local")
    if actor.precision == "fp32" and actor.layer_spec == "te":
        raise ConfigError("actor.precision: fp32 would be TF32 with actor.layer_spec=te; leave that auto, or local")
    if actor.precision == "fp32" and quantization != "none":
        raise ConfigError(
            f"rollout.quantization: {quantization} quantises bf16 weights; actor.precision=fp32 rolls out in fp32"
        )
    if config.train.on_mismatch == "bf16" and "fp8" not in actor.precision:
        raise ConfigError(
            f"train.on_mismatch: bf16 takes layers out of FP8, and actor.precision={actor.precision} has none"
        )


def _check_divides(config: Config, world_size: int, ranks: str) -> None:
    actor, rollout = config.actor, config.rollout
    layout = actor.tensor_parallel * actor.pipeline_parallel
    ranks += f" (allowed: {', '.join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)})"
    if world_size % layout:
        raise ConfigError(
            f"actor.tensor_parallel * actor.pipeline_parallel = {actor.tensor_parallel} * {actor.pipeline_parallel} = "
            f"{layout} does not divide the world: {ranks}"
        )
    if (stage := world_size // actor.pipeline_parallel) % actor.expert_parallel:
        allowed = ", ".join(str(n) for n in range(1, stage + 1) if stage % n == 0)
        raise ConfigError(
            f"actor.expert_parallel: {actor.expert_parallel} does not divide the {stage} ranks of a pipeline stage "
            f"(allowed: {allowed})"
        )
    if world_size % rollout.tensor_parallel:
        raise ConfigError(
            f"rollout.tensor_parallel: {rollout.tensor_parallel} ranks per engine do not divide the world: {ranks}"
        )
