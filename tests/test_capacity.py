"""Which runs fit their machines."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from paper_models import shape

from nemo_r3 import capacity
from nemo_r3.config import Config
from nemo_r3.errors import ConfigError
from nemo_r3.precision import PRECISIONS
from nemo_r3.units import GIB


def config_of(tensor_parallel: int = 1, pipeline_parallel: int = 1, offload: bool = False) -> Config:
    config = Config()
    config.actor.tensor_parallel, config.actor.pipeline_parallel = tensor_parallel, pipeline_parallel
    config.actor.offload_optimizer = offload
    return config


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_weight_is_as_wide_as_its_precision_says(name: str) -> None:
    assert PRECISIONS[name].width == PRECISIONS[name].dtype.itemsize, "a plan has no torch to ask"


def test_a_tied_embedding_is_at_both_ends_of_a_pipeline() -> None:
    """Plans of other actors, by hand, are in test_plan.py."""
    size = capacity.size_of(config_of(pipeline_parallel=4), shape("qwen2.5-1.5b"), 4)
    assert size.at_work / GIB == pytest.approx(10.4, abs=0.1)  # 7.2 were its stages equal


def test_without_a_reference_and_in_fp32() -> None:
    config = config_of()
    config.algo.kl_beta, config.actor.precision = 0.0, "fp32"
    size = capacity.size_of(config, shape("qwen2.5-1.5b"), 1)
    assert (size.reference, size.gradients) == (0, size.weights)
    assert size.optimizer == 2 * size.weights, "its main weights are the model's own"


def test_lora_of_a_70b_fits_a_node_and_its_checkpoint_a_laptop() -> None:
    config = config_of(8, offload=True)
    config.actor.lora_rank, config.rollout.tensor_parallel, config.algo.kl_beta = 32, 8, 0.0
    arch = shape("llama-3.1-70b")
    size = capacity.size_of(config, arch, 8)
    layer = (8192 + 8192) + 2 * (1024 + 8192) + (8192 + 8192) + 2 * (28672 + 8192) + (8192 + 28672)
    factors = 80 * 32 * layer
    # A + B of query, key and value, gate and up, output, down: tensor parallelism cuts B, in the last two A
    own = (8192 + 1024) + 2 * (8192 + 128) + 2 * (8192 + 3584) + (1024 + 8192) + (3584 + 8192)
    assert (size.gradients, size.optimizer, size.factors) == (0, 0, 16 * 80 * 32 * own)
    matrices = 80 * (8192 * (2 * 8192 + 2 * 1024) + 3 * 8192 * 28672)
    assert size.reference == 2 * matrices / 8, "what the product is added to, with or without a KL"
    assert size.weights == 2 * (matrices + 2 * 128256 * 8192 + 161 * 8192) / 8
    assert size.at_rest == size.weights + size.factors
    assert capacity.gpu_problem(config, size, 79 * GIB) is None
    assert str(capacity.gpu_problem(config, size, 19 * GIB)).endswith(
        "actor.tensor_parallel or actor.pipeline_parallel"
    )
    assert capacity.checkpoint_bytes(config, arch) == 12 * factors < 5 * GIB
    assert "algo.kl_beta" not in str(capacity.cpu_problem(config, size, capacity.Node("b", 1, 0, GIB)))
    config.actor.lora_rank = 0
    assert_is(capacity.gpu_problem(config, capacity.size_of(config, arch, 8), 79 * GIB), "the actor needs 148 GiB")


@pytest.mark.parametrize(
    ("tensor", "offload", "share", "gpu", "expected"),
    [
        (2, True, 0.5, 79, None),
        (4, False, 0.5, 79, None),
        (2, False, 0.4, 79, None),
        (2, False, 0.46, 79, "room for 77"),  # CUDA and NCCL take some
        (2, False, 0.5, 79, "the actor's 41 GiB and vLLM's 40 .* actor.offload_optimizer=true"),
        (1, True, 0.3, 66, "the actor needs 71 GiB of each GPU, which has room for 64"),
    ],
)
def test_an_8b_beside_vllm(tensor: int, offload: bool, share: float, gpu: int, expected: str | None) -> None:
    config = config_of(tensor, offload=offload)
    config.rollout.gpu_memory_utilization = share
    size = capacity.size_of(config, shape("llama-3.1-8b"), 8)
    assert_is(capacity.gpu_problem(config, size, gpu * GIB), expected)


def test_an_engine_that_does_not_sleep_needs_its_room_during_the_update_too() -> None:
    config = config_of(2, offload=True)
    config.rollout.sleep = False
    size = capacity.size_of(config, shape("llama-3.1-8b"), 8)
    assert_is(capacity.gpu_problem(config, size, 79 * GIB), "do not fit")


@pytest.mark.parametrize(
    ("ways", "share", "quantization", "expected"),
    [
        (4, 0.5, "none", None),
        (2, 0.5, "none", "vLLM's 40 GiB .rollout.gpu_memory_utilization=0.5. hold no dialogue of .*=4096 beside 66 of"),
        (4, 0.418, "none", "hold no dialogue"),  # the weights alone would fit
        (2, 0.5, "fp8_per_tensor", None),  # how much vLLM quantises is its own affair
    ],
)
def test_an_engine_without_room_for_a_dialogue(
    ways: int, share: float, quantization: str, expected: str | None
) -> None:
    config = config_of(8, 4, offload=True)
    config.rollout.tensor_parallel, config.rollout.gpu_memory_utilization = ways, share
    config.rollout.quantization = quantization
    size = capacity.size_of(config, shape("llama-3.1-70b"), 32)
    assert_is(
        capacity.gpu_problem(config, size, 79 * GIB), expected and expected.replace("(", r"\(").replace(")", r"\)")
    )


@pytest.mark.parametrize(
    ("tensor", "offload", "free", "expected"),
    [
        (2, False, 105, None),
        (2, False, 104, "104 GiB of host memory .* 8 ranks need 105 to save a checkpoint and 0 .*cluster.memory_gb"),
        (2, True, 250, "need 105 to save a checkpoint and 150 for what is offloaded"),
        (8, True, 250, None),
    ],
)
def test_host_memory_of_a_node_with_8_ranks(tensor: int, offload: bool, free: int, expected: str | None) -> None:
    config = config_of(tensor, offload=offload)
    size = capacity.size_of(config, shape("llama-3.1-8b"), 8)
    assert_is(capacity.host_problem(config, size, capacity.Node("b", 8, 80 * GIB, free * GIB)), expected)


@pytest.mark.parametrize(("free", "expected"), [(263, None), (262, "has 262 GiB of host memory, .* takes 263: ")])
def test_an_export_holds_the_model_in_fp32_on_one_host(free: int, expected: str | None) -> None:
    assert_is(capacity.export_problem(shape("llama-3.1-70b"), free * GIB), expected)


@pytest.mark.parametrize("trouble", [None, "node b has 1 GiB"])
def test_ranks_share_the_memory_of_their_own_node_and_all_hear_what_any_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str | None
) -> None:
    def gather(item: str | None) -> list[str | None]:
        return ["a", "b", "a", "a"] if item == "a" else [item, trouble, None, None]

    shared: list[int] = []
    monkeypatch.setattr(capacity.socket, "gethostname", lambda: "a")
    monkeypatch.setattr(capacity, "cpu_problem", lambda config, size, node: shared.append(node.ranks))
    world: Any = SimpleNamespace(size=4, gpu_bytes=0, is_main=False, gather=gather)
    with nullcontext() if trouble is None else pytest.raises(ConfigError, match=trouble):
        capacity.check(config_of(), shape("qwen2.5-1.5b"), world, tmp_path)
    assert shared == [3]


def test_rank_0_refuses_for_its_memory_and_for_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    world: Any = SimpleNamespace(size=1, gpu_bytes=0, is_main=True, gather=lambda item: [item])
    for host, refusal in ((GIB, "host memory for this run"), (99 * GIB, r"run\.dir: .* free for checkpoints")):
        monkeypatch.setattr(capacity, "host_bytes", lambda host=host: host)
        with pytest.raises(ConfigError, match=refusal):
            capacity.check(config_of(), shape("qwen2.5-1.5b"), world, tmp_path)


@pytest.mark.parametrize(
    ("tensor", "ranks", "background", "offload", "free", "expected"),
    [
        (1, 1, False, False, 32, None),
        (1, 1, False, False, 31, "31.0 GiB .*1 here. needs 28.8 for the actor, 2.9 for vLLM's weights: share"),
        (1, 1, True, False, 50, "2.9 for vLLM's weights and 20.1 for what train.save_in_background=true copies"),
        (1, 1, False, True, 48, "needs 46.0 for the actor"),
        (2, 2, False, False, 35, None),
        (1, 2, False, False, 35, "2 here. needs 20.1 for the actor"),
    ],
)
def test_without_a_gpu_host_memory_holds_actor_and_engine(
    tensor: int, ranks: int, background: bool, offload: bool, free: int, expected: str | None
) -> None:
    config = config_of(tensor)
    config.train.save_in_background, config.actor.offload_optimizer = background, offload
    size = capacity.size_of(config, shape("qwen2.5-1.5b"), ranks)
    found = capacity.cpu_problem(config, size, capacity.Node("b", ranks, 0, free * GIB))
    assert_is(found, expected)
    assert found is None or "keep no reference (algo.kl_beta=0), train LoRA (actor.lora_rank), or use a" in found


def test_lora_of_a_real_1_5b_fits_a_laptop() -> None:
    config = config_of()
    config.actor.lora_rank = 16
    size = capacity.size_of(config, shape("qwen2.5-1.5b"), 1)
    assert capacity.cpu_problem(config, size, capacity.Node("b", 1, 0, 9 * GIB)) is None
    refused = capacity.cpu_problem(config, size, capacity.Node("b", 1, 0, 8 * GIB))
    assert refused is not None and refused.endswith("rollout.tensor_parallel), or use a machine with more memory")


def test_a_disk_without_room_for_the_checkpoints_still_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, arch, checkpoints = config_of(), shape("llama-3.1-8b"), tmp_path / "run" / "checkpoints"
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda path: SimpleNamespace(free=250 * GIB))
    assert_is(
        capacity.disk_problem((config, arch, checkpoints)),
        f"run.dir: {tmp_path} has 250.0 GiB free for checkpoints, and 3 x 104.7 GiB are still to come .*=2, and",
    )
    (checkpoints / "step_000001").mkdir(parents=True)
    (checkpoints / "step_000001-mine").mkdir()  # a user's copy, which is not one of those that are kept
    assert capacity.disk_problem((config, arch, checkpoints)) is None
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert_is(capacity.disk_problem((config, arch, checkpoints)), "2 x 104.7 GiB")
    (checkpoints / "step_001750").mkdir()
    assert capacity.disk_problem((config, arch, checkpoints)) is None, "a finished run saves nothing"


def test_what_a_killed_save_left_makes_room_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, arch = config_of(), shape("qwen2.5-1.5b")
    monkeypatch.setattr(capacity.shutil, "disk_usage", lambda path: SimpleNamespace(free=70 * GIB - 1000))
    config.train.keep_checkpoints = 1
    monkeypatch.setattr(capacity, "count_parameters", lambda arch: 70 * GIB // 28)
    assert_is(capacity.disk_problem((config, arch, tmp_path)), "2 x 35.0 GiB")
    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing" / "shard").write_bytes(b"x" * 1000)
    assert capacity.disk_problem((config, arch, tmp_path)) is None


def test_the_lowest_limit_of_a_cgroup_and_its_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "CGROUPS", tmp_path)
    job = tmp_path / "slurm" / "job_7"
    (job / "step_0").mkdir(parents=True)
    (job / "memory.max").write_text("4096\n")
    (job / "step_0" / "memory.max").write_text("max\n")
    assert list(capacity.cgroup_limits("0::/slurm/job_7/step_0\n")) == [4096]
    (tmp_path / "memory" / "job_7").mkdir(parents=True)
    (tmp_path / "memory" / "job_7" / "memory.limit_in_bytes").write_text("8192\n")
    assert list(capacity.cgroup_limits("4:cpu:/\n3:memory:/job_7\n")) == [8192]
    monkeypatch.setattr(capacity, "cgroup_limits", lambda _: iter([2.0**70, 4096.0]))
    assert capacity.host_bytes() == 4096
    monkeypatch.setattr(capacity, "cgroup_limits", lambda _: iter([2.0**70]))
    assert 2**20 < capacity.host_bytes() < 2**60, "what the kernel says is available"


def assert_is(found: str | None, expected: str | None) -> None:
    if expected is None:
        assert found is None
    else:
        assert found is not None and re.search(expected, found) and "\n" not in found, found
