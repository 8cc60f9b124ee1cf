"""What every precision sets in megatron-core's configs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from paper_models import NAMES, shape

from nemo_r3.actor import spec
from nemo_r3.actor.model import transformer_config
from nemo_r3.actor.spec import resolve_layer_spec
from nemo_r3.config import ActorConfig, Config
from nemo_r3.config.schema import leaves
from nemo_r3.errors import ConfigError
from nemo_r3.precision import PRECISIONS, precision_of

BF16 = {"params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16, "bf16": True, "fp16": False}
FP8 = BF16 | {
    "fp8_param": False,
    "fp8_margin": 0,
    "fp8_amax_history_len": 1024,
    "fp8_amax_compute_algo": "max",
    "fp8_wgrad": True,
    **dict.fromkeys(("fp8_dot_product_attention", "fp8_multi_head_attention", "tp_only_amax_red"), False),
    **{"num_layers_at_start_in_bf16": 1, "num_layers_at_end_in_bf16": 1, "first_last_layers_bf16": True},
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


@pytest.mark.parametrize(
    ("name", "model"),  # there is no FP8 for experts
    [(name, model) for name in PRECISIONS for model in NAMES if not (PRECISIONS[name].fp8 and shape(model).experts)],
)
def test_transformer_config(name: str, model: str) -> None:
    found = transformer_config(ActorConfig(), shape(model), PRECISIONS[name], on_cuda=True)
    assert {key: getattr(found, key) for key in TRANSFORMER[name]} == TRANSFORMER[name]
    assert not getattr(found, "fp8_output_proj", False), "the head stays in BF16"
    fusions = ("apply_rope_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "gradient_accumulation_fusion")
    assert not any(getattr(found, fusion) for fusion in fusions)
    assert found.bias_activation_fusion


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_optimizer_keeps_main_weights_and_moments_in_fp32(name: str) -> None:
    optimizer = OptimizerConfig(**PRECISIONS[name].optimizer_fields())
    assert (optimizer.bf16, optimizer.fp16) == (name != "fp32", False)
    assert optimizer.params_dtype == TRANSFORMER[name]["params_dtype"]
    assert optimizer.fp8_recipe == RECIPES.get(name)
    assert not optimizer.use_precision_aware_optimizer
    assert {getattr(optimizer, key) for key in MAIN} == {torch.float32}


def test_choices_are_those_of_the_config() -> None:
    choices = {leaf.key: leaf.field.metadata["choices"] for leaf in leaves(Config)}
    assert tuple(PRECISIONS) == choices["actor.precision"]
    assert [precision_of(Config(actor=ActorConfig(precision=name))).name for name in PRECISIONS] == list(PRECISIONS)


def test_rollouts_are_in_the_dtype_of_the_weights() -> None:
    found = {name: (one.dtype_name, one.dtype) for name, one in PRECISIONS.items()}
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


def test_layer_spec(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_layer_spec("auto", PRECISIONS["bf16"], on_cuda=False) == "local"
    monkeypatch.setattr(spec, "HAVE_TE", True)
    assert resolve_layer_spec("auto", PRECISIONS["bf16"], on_cuda=True) == "te"
    assert resolve_layer_spec("local", PRECISIONS["bf16"], on_cuda=True) == "local"
    monkeypatch.setattr(spec, "HAVE_TE", False)
    with pytest.raises(ConfigError, match="cannot be imported.*or ask for the slower actor.layer_spec=local"):
        resolve_layer_spec("auto", PRECISIONS["bf16"], on_cuda=True)
    assert resolve_layer_spec("auto", PRECISIONS["fp32"], on_cuda=True) == "local"
    for asked in ("auto", "local"):
        with pytest.raises(ConfigError, match="fp8-blockwise needs Transformer Engine's layers"):
            resolve_layer_spec(asked, PRECISIONS["fp8-blockwise"], on_cuda=False)
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        resolve_layer_spec("te", PRECISIONS["bf16"], on_cuda=False)
