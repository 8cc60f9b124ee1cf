"""What every precision sets in megatron-core's configs, and what it is refused on."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from paper_models import NAMES, shape

from nemo_r3 import precision
from nemo_r3.actor.model import transformer_config
from nemo_r3.actor.spec import resolve_layer_spec
from nemo_r3.config import ActorConfig, Config, ConfigError, load
from nemo_r3.config.schema import leaves
from nemo_r3.models import FAMILIES, Architecture
from nemo_r3.precision import PRECISIONS, Machine, advice, check, matrix_dimensions, precision_of, prepare, without_fp8

BF16 = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True, "fp16": False}
FP8 = BF16 | {
    "fp8_param": False,
    "fp8_margin": 0,
    "fp8_amax_history_len": 1024,
    "fp8_amax_compute_algo": "max",
    "fp8_wgrad": True,
    "fp8_dot_product_attention": False,
    "fp8_multi_head_attention": False,
    "tp_only_amax_red": False,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
    "first_last_layers_bf16": True,
}
NO_EDGES = {"first_last_layers_bf16": False, "num_layers_at_start_in_bf16": 0, "num_layers_at_end_in_bf16": 0}
TRANSFORMER: dict[str, dict[str, Any]] = {
    "bf16": BF16 | {"fp8": None, "fp8_param": False, "first_last_layers_bf16": False},
    "fp8-tensorwise": FP8 | {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    "fp8-blockwise": FP8 | {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    "fp8-delayed": FP8 | {"fp8": "hybrid", "fp8_recipe": "delayed"} | NO_EDGES,
    "mxfp8": FP8 | {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
    "fp32": {"params_dtype": torch.float32, "pipeline_dtype": torch.float32, "bf16": False, "fp8": None},
}
MAIN = {"main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"}
RECIPES = {"fp8-tensorwise": "tensorwise", "fp8-blockwise": "blockwise", "fp8-delayed": "delayed", "mxfp8": "mxfp8"}

H100 = Machine(megatron=(0, 19), te=(2, 20), cuda=(13, 0), capability=(9, 0))
B200, RTX_5090 = replace(H100, capability=(10, 0)), replace(H100, capability=(12, 0))
L40, A100 = replace(H100, capability=(8, 9)), replace(H100, capability=(8, 0))
CPU = Machine(megatron=(0, 16))
FP8_CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*-fp8.yaml"))


def config_of(name: str = "bf16", quantization: str = "none", **actor: Any) -> Config:
    config = Config()
    config.actor.precision, config.rollout.quantization = name, quantization
    for key, value in actor.items():
        setattr(config.actor, key, value)
    return config


def architecture(kind: str) -> Architecture:
    """A tiny model of a kind of tests/families.py."""
    family = families.KINDS[kind]
    module = next(module for module in FAMILIES if module.HF_CLASS == f"{family.hf}ForCausalLM")
    return module.architecture(families.TINY | family.settings | {"tie_word_embeddings": kind.endswith("_tied")})


@pytest.mark.parametrize("kind", families.KINDS)
@pytest.mark.parametrize("name", PRECISIONS)
def test_transformer_config(name: str, kind: str) -> None:
    found = transformer_config(ActorConfig(), architecture(kind), PRECISIONS[name], on_cuda=True)
    assert {key: getattr(found, key) for key in TRANSFORMER[name]} == TRANSFORMER[name]
    assert not getattr(found, "fp8_output_proj", False), "the head stays in BF16"
    fusions = ("apply_rope_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion")
    assert not any(getattr(found, fusion) for fusion in fusions)
    assert found.bias_activation_fusion


@pytest.mark.parametrize("name", PRECISIONS)
def test_gradients_and_optimizer(name: str) -> None:
    gradients = DistributedDataParallelConfig(**PRECISIONS[name].gradient_fields())
    assert gradients.grad_reduce_in_fp32
    assert not gradients.fp8_param_gather and not gradients.reuse_grad_buf_for_mxfp8_param_ag
    optimizer = OptimizerConfig(**PRECISIONS[name].optimizer_fields())
    assert (optimizer.bf16, optimizer.fp16) == (name != "fp32", False)
    assert optimizer.params_dtype == TRANSFORMER[name]["params_dtype"]
    assert optimizer.fp8_recipe == RECIPES.get(name)
    assert not optimizer.use_precision_aware_optimizer
    assert {getattr(optimizer, key) for key in MAIN} == {torch.float32}


def test_choices_are_those_of_the_config() -> None:
    choices = {leaf.key: leaf.field.metadata["choices"] for leaf in leaves(Config)}
    assert tuple(PRECISIONS) == choices["actor.precision"]
    assert {"none", *precision.VLLM} == set(choices["rollout.quantization"])
    assert [precision_of(config_of(name)).name for name in PRECISIONS] == list(PRECISIONS)


def test_rollouts_are_in_the_dtype_of_the_weights() -> None:
    found = {name: (one.vllm_dtype, one.dtype) for name, one in PRECISIONS.items()}
    assert found.pop("fp32") == ("float32", torch.float32)
    assert set(found.values()) == {("bfloat16", torch.bfloat16)}


@pytest.mark.parametrize(
    ("name", "layout", "multiple"),
    [
        ("bf16", (1, False), 1),
        ("bf16", (8, False), 1),
        ("fp32", (8, True), 8),
        ("fp8-tensorwise", (1, False), 16),
        ("fp8-delayed", (2, True), 16),
        ("fp8-tensorwise", (8, True), 64),
        ("fp8-blockwise", (1, False), 128),
        ("fp8-blockwise", (8, True), 128),
        ("fp8-blockwise", (6, True), 384),
        ("mxfp8", (1, False), 32),
        ("mxfp8", (8, True), 64),
    ],
)
def test_rows_are_padded(name: str, layout: tuple[int, bool], multiple: int) -> None:
    ways, sequence_parallel = layout
    actor = ActorConfig(tensor_parallel=ways, sequence_parallel=sequence_parallel)
    assert PRECISIONS[name].row_multiple(actor) == multiple


@pytest.mark.parametrize(
    ("name", "machine", "words"),
    [
        ("fp8-tensorwise", CPU, ["fp8-tensorwise needs an NVIDIA GPU", "ask for bf16 or fp32"]),
        ("fp8-delayed", replace(H100, te=None, te_error="no such file"), ["cannot be imported (no such file)"]),
        ("mxfp8", replace(B200, te=None), ["needs Transformer Engine", "megatron-core would run BF16"]),
        ("fp8-tensorwise", A100, ["8.9 or above; this one has 8.0 (ask for bf16)"]),
        ("fp8-delayed", A100, ["8.9 or above"]),
        ("fp8-blockwise", L40, ["9.0 or above; this one has 8.9 (it has fp8-tensorwise, fp8-delayed)"]),
        ("fp8-blockwise", B200, ["below CUDA compute capability 10.0; this one has 10.0", "mxfp8"]),
        ("mxfp8", H100, ["10.0 or above; this one has 9.0 (it has fp8-tensorwise, fp8-blockwise, fp8-delayed)"]),
        ("mxfp8", RTX_5090, ["below CUDA compute capability 12.0", "(it has fp8-tensorwise, fp8-delayed)"]),
        ("fp8-blockwise", replace(H100, cuda=(12, 8)), ["needs CUDA 12.9 or newer, found 12.8"]),
        ("fp8-tensorwise", replace(H100, cuda=(11, 8)), ["needs CUDA 12.1 or newer, found 11.8"]),
        ("mxfp8", replace(B200, cuda=(12, 6)), ["needs CUDA 12.8 or newer"]),
        ("fp8-tensorwise", replace(H100, te=(2, 1)), ["needs Transformer Engine 2.2 or newer, found 2.1"]),
        ("fp8-blockwise", replace(H100, te=(2, 2)), ["needs Transformer Engine 2.3 or newer"]),
        ("fp8-delayed", replace(H100, te=(1, 13)), ["needs Transformer Engine 2.0 or newer, found 1.13"]),
        ("mxfp8", replace(B200, te=(2, 0)), ["needs Transformer Engine 2.1 or newer"]),
        ("fp8-delayed", replace(H100, megatron=(0, 16)), ["needs megatron-core 0.19 or newer, found 0.16"]),
    ],
)
def test_machines_that_cannot(name: str, machine: Machine, words: list[str]) -> None:
    message = refusal(config_of(name), shape("llama-3.1-8b"), machine)
    assert message.startswith(f"actor.precision={name} ")
    assert all(word in message for word in words), message


def test_a_real_model_that_does_not_divide() -> None:
    config = config_of("fp8-blockwise", tensor_parallel=8)
    found = refusal(config, shape("qwen2-72b"), H100)
    assert "needs multiples of 128" in found
    assert "the model's feed-forward columns on a rank are 3696 (29568 / actor.tensor_parallel=8)" in found
    check(config_of("fp8-tensorwise", tensor_parallel=8), shape("qwen2-72b"), H100)
    check(config_of("fp8-blockwise", tensor_parallel=8), shape("llama-3.1-70b"), H100)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hidden_size": 4100}, "multiples of 16, and the model's hidden size on a rank are 4100"),
        ({"num_kv_heads": 1, "head_dim": 8}, "query, key and value columns on a rank are 136 (272 / actor.tensor"),
        ({"num_heads": 2, "num_kv_heads": 2, "head_dim": 8}, "query, key and value columns on a rank are 24"),
        ({"num_heads": 1, "num_kv_heads": 1, "head_dim": 48}, "query, key and value columns on a rank are 72"),
        ({"ffn_hidden_size": 14352}, "feed-forward columns on a rank are 7176 (14352 / actor.tensor_parallel=2)"),
    ],
)
def test_every_dimension_is_looked_at(changed: dict[str, int], words: str) -> None:
    arch = replace(shape("llama-3.1-8b"), **changed)
    assert words in refusal(config_of("fp8-tensorwise", tensor_parallel=2), arch, H100)


def test_every_matrix_has_its_dimensions() -> None:
    arch = shape("llama-3.1-70b")
    found = {one.what: one.total // one.ways for one in matrix_dimensions(arch, 8)}
    assert found == {
        "hidden size": 8192,
        "query, key and value columns": 1280,
        "attention columns": 1024,
        "feed-forward columns": 3584,
    }


def test_a_model_of_two_layers_has_nothing_to_quantise() -> None:
    arch = replace(shape("llama-3.1-8b"), num_layers=2)
    assert "the model has 2 layers" in refusal(config_of("fp8-tensorwise"), arch, H100)
    check(config_of("fp8-delayed"), arch, H100)


@pytest.mark.parametrize(
    ("quantization", "machine", "words"),
    [
        ("fp8_per_tensor", CPU, ["rollout.quantization=fp8_per_tensor needs an NVIDIA GPU"]),
        ("fp8_per_tensor", A100, ["8.9 or above; this one has 8.0, where vLLM would multiply in BF16"]),
        ("fp8_per_block", L40, ["9.0 or above; this one has 8.9"]),
    ],
)
def test_rollouts_that_cannot(quantization: str, machine: Machine, words: list[str]) -> None:
    message = refusal(config_of(quantization=quantization), shape("llama-3.1-8b"), machine)
    assert all(word in message for word in words), message


def test_rollouts_that_do_not_divide() -> None:
    config = config_of(quantization="fp8_per_block")
    config.rollout.tensor_parallel = 8
    found = refusal(config, shape("qwen2-72b"), H100)
    assert "feed-forward columns on a rank are 3696 (29568 / rollout.tensor_parallel=8)" in found
    odd = replace(shape("llama-3.1-8b"), num_kv_heads=1, head_dim=132, num_heads=16)
    check(config_of(quantization="fp8_per_tensor"), odd, H100)  # what no product sums over need not divide


@pytest.mark.parametrize("model", NAMES)
def test_what_runs(model: str) -> None:
    """The paper's models, on the chips that are made for it."""
    for machine, names in ((H100, {*PRECISIONS} - {"mxfp8"}), (B200, {*PRECISIONS} - {"fp8-blockwise"})):
        for name in names:
            check(config_of(name, quantization="none" if name == "fp32" else "fp8_per_block"), shape(model), machine)
    check(config_of(), shape(model), CPU)
    check(config_of("fp32"), shape(model), CPU)


@pytest.mark.parametrize("path", FP8_CONFIGS, ids=lambda path: path.stem)
def test_configs_run_on_an_h100(path: Path) -> None:
    config = load([str(path)])
    check(config, shape(config.model.path.split("/")[1].lower().removesuffix("-instruct")), H100)
    assert advice(config) is None


def test_without_a_gpu_nothing_is_imported() -> None:
    before = set(sys.modules)
    found = Machine.here()
    assert (found.te, found.cuda, found.capability) == (None, None, None)
    assert found.megatron >= (0, 16)
    assert not {name for name in set(sys.modules) - before if name.startswith("transformer_engine")}


def test_preparing(monkeypatch: pytest.MonkeyPatch) -> None:
    variable = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
    monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Machine, "here", classmethod(lambda cls: H100))
    prepare(config_of("fp8-tensorwise"), shape("llama-3.1-8b"))
    assert variable not in precision.os.environ
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(RuntimeError, match=f"{variable} must be set before"):
        prepare(config_of("fp8-blockwise"), shape("llama-3.1-8b"))
    monkeypatch.delitem(sys.modules, "transformer_engine")
    prepare(config_of("fp8-blockwise"), shape("llama-3.1-8b"))
    assert precision.os.environ[variable] == "1"
    monkeypatch.setenv(variable, "0")
    prepare(config_of("fp8-blockwise"), shape("llama-3.1-8b"))
    assert precision.os.environ[variable] == "0", "a user's own choice stays"


def test_what_does_not_train_needs_no_fp8() -> None:
    config = config_of("fp8-tensorwise")
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        prepare(config, shape("llama-3.1-8b"))
    plain = without_fp8(config)
    prepare(plain, shape("llama-3.1-8b"))
    assert plain.actor == replace(config.actor, precision="bf16") and config.actor.precision == "fp8-tensorwise"
    for name in ("bf16", "fp32"):
        assert without_fp8(config_of(name)).actor.precision == name


def test_layer_spec() -> None:
    assert resolve_layer_spec("auto", PRECISIONS["bf16"], on_cuda=False) == "local"
    assert resolve_layer_spec("auto", PRECISIONS["fp32"], on_cuda=True) == "local"
    for asked in ("auto", "local"):
        with pytest.raises(ConfigError, match="fp8-blockwise needs Transformer Engine's layers"):
            resolve_layer_spec(asked, PRECISIONS["fp8-blockwise"], on_cuda=False)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        resolve_layer_spec("te", PRECISIONS["bf16"], on_cuda=False)


def test_advice() -> None:
    assert advice(config_of("fp8-blockwise")) is None
    config = config_of(quantization="fp8_per_tensor")
    assert "algo.mismatch_correction=tis" in str(advice(config))
    config.algo.mismatch_correction = "icepop"
    assert advice(config) is None


def refusal(config: Config, arch: Architecture, machine: Machine) -> str:
    with pytest.raises(ConfigError) as caught:
        check(config, arch, machine)
    return str(caught.value)
