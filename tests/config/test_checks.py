"""Settings that do not fit each other."""

from pathlib import Path

import pytest
from refusals import refusal

from nemo_r3.config import Config, check_world, fewest_ranks, load
from nemo_r3.errors import ConfigError


def load_with(folder: Path, *overrides: str) -> Config:
    path = folder / "a.yaml"
    path.write_text("model: {path: embedded}\n")
    return load([str(path), *overrides])


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        (["rollout.max_answer_tokens=2000"], ["rollout.max_model_len: 4096", "4256"]),
        (["rollout.max_model_len=1280"], ["rollout.max_model_len: 1280", "1280"]),
        (["rollout.max_model_len=512"], ["rollout.max_answer_tokens=128", "rollout.max_reflection_tokens=64"]),
        (["actor.microbatch_tokens=4095"], ["actor.microbatch_tokens: 4095", "rollout.max_model_len = 4096"]),
        (["actor.lr_min=1e-6"], ["actor.lr_min: 1e-06", "actor.lr = 5e-07"]),
        (["actor.lr_warmup_ratio=1"], ["actor.lr_warmup_ratio: 1", "below 1"]),
        (["actor.adam_beta1=1"], ["actor.adam_beta1: 1", "below 1"]),
        (["actor.adam_beta2=1"], ["actor.adam_beta2: 1", "below 1"]),
        (["train.updates_per_step=33"], ["train.updates_per_step: 33", "train.failures_per_step = 32"]),
        (["algo.trained_phases=[]"], ["algo.trained_phases: []"]),
        (["algo.trained_phases=[retry,retry]"], ["algo.trained_phases", "none twice"]),
        (["algo.mismatch_high=3"], ["algo.mismatch_high: 3", "algo.mismatch_correction=none"]),
        (["algo.mismatch_correction=tis", "algo.mismatch_low=0.5"], ["algo.mismatch_low: 0.5", "correction=tis"]),
        (["failures.max_solve_rate=0.5"], ["failures.max_solve_rate: 0.5", "failures.samples_per_problem"]),
        (["failures.min_solve_rate=0.5"], ["failures.min_solve_rate: 0.5", "failures.samples_per_problem"]),
        (
            ["failures.samples_per_problem=8", "failures.max_solve_rate=0.25", "failures.min_solve_rate=0.5"],
            ["failures.min_solve_rate: 0.5", "failures.max_solve_rate = 0.25"],
        ),
        (["actor.sequence_parallel=true"], ["actor.sequence_parallel", "actor.tensor_parallel above 1"]),
        (
            ["actor.routing_replay=true", "rollout.prefix_caching=false"],
            ["actor.routing_replay: true needs rollout.prefix_caching=true"],
        ),
        (["cluster.gpus_per_node=3", "actor.tensor_parallel=2"], ["= 2 * 1 = 2", "= 3 ranks"]),
        (["cluster.gpus_per_node=4", "cluster.nodes=2", "actor.pipeline_parallel=3"], ["= 1 * 3 = 3", "= 8 ranks"]),
        (["cluster.gpus_per_node=4", "rollout.tensor_parallel=3"], ["rollout.tensor_parallel: 3", "= 4 ranks"]),
        (
            ["cluster.gpus_per_node=8", "actor.pipeline_parallel=2", "actor.expert_parallel=8"],
            ["actor.expert_parallel: 8 does not divide the 4 ranks of a pipeline stage (allowed: 1, 2, 4)"],
        ),
        (["actor.precision=fp8-delayed", "actor.layer_spec=local"], ["precision: fp8-delayed", "layer_spec=local"]),
        (["train.on_mismatch=bf16"], ["train.on_mismatch: bf16", "actor.precision=bf16"]),
        (["actor.precision=fp32", "actor.layer_spec=te"], ["actor.precision: fp32", "TF32", "actor.layer_spec=te"]),
        (["actor.precision=fp32", "rollout.quantization=fp8_per_block"], ["quantization: fp8_per_block", "fp32"]),
        (["cluster.time_minutes=10"], ["cluster.time_minutes: 10", "cluster.signal_seconds = 600"]),
    ],
)
def test_refused_together(tmp_path: Path, overrides: list[str], keys: list[str]) -> None:
    message = refusal(lambda: load_with(tmp_path, *overrides))
    assert all(key in message for key in keys), message


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo.trained_phases=[reflection, retry]"],
        ["failures.max_solve_rate=0.5", "failures.min_solve_rate=0.5", "failures.samples_per_problem=4"],
        ["actor.sequence_parallel=true", "actor.tensor_parallel=2"],
        ["cluster.gpus_per_node=4", "cluster.nodes=2", "actor.tensor_parallel=4", "actor.pipeline_parallel=2"],
        ["train.steps=0"],
        ["algo.loss=rloo"],
        ["algo.loss=gspo", "algo.advantage=leave_one_out"],
        ["algo.mismatch_correction=tis", "algo.mismatch_high=3"],
        ["algo.mismatch_correction=icepop", "algo.mismatch_low=0.1", "algo.mismatch_high=1.5"],
        ["actor.lr=0"],
        ["actor.precision=fp8-blockwise", "rollout.quantization=fp8_per_block"],
        ["actor.precision=fp8-blockwise", "train.on_mismatch=bf16"],
        ["actor.precision=bf16", "actor.layer_spec=te", "rollout.quantization=fp8_per_tensor"],
    ],
)
def test_allowed_together(tmp_path: Path, overrides: list[str]) -> None:
    load_with(tmp_path, *overrides)


def test_launched_ranks(tmp_path: Path) -> None:
    config = load_with(tmp_path, "actor.tensor_parallel=2", "actor.pipeline_parallel=2", "rollout.tensor_parallel=2")
    check_world(config, 4)
    check_world(config, 8)
    with pytest.raises(ConfigError, match=r"= 4 does not divide the world: 6 .* \(allowed: 1, 2, 3, 6\)"):
        check_world(config, 6)
    with pytest.raises(ConfigError, match=r"rollout.tensor_parallel: 3 .* 4 ranks were launched"):
        check_world(load_with(tmp_path, "rollout.tensor_parallel=3"), 4)


@pytest.mark.parametrize(
    ("tensor", "pipeline", "expert", "engine"), [(1, 1, 1, 1), (2, 2, 1, 1), (1, 1, 1, 2), (2, 3, 4, 1), (2, 2, 8, 3)]
)
def test_the_fewest_ranks_are_the_first_that_the_layout_divides(
    tensor: int, pipeline: int, expert: int, engine: int
) -> None:
    config = Config()
    config.actor.tensor_parallel, config.actor.pipeline_parallel = tensor, pipeline
    config.actor.expert_parallel, config.rollout.tensor_parallel = expert, engine

    def fits(ranks: int) -> bool:
        try:
            check_world(config, ranks)
        except ConfigError:
            return False
        return True

    assert fewest_ranks(config) == next(filter(fits, range(1, 100)))
