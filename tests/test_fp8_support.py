"""What FP8 is refused on, by name."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paper_models import NAMES, shape
from refusals import refusal

from nemo_r3.config import Config, load
from nemo_r3.config.schema import leaves
from nemo_r3.errors import ConfigError
from nemo_r3.fp8_support import VLLM, Machine, advice, check, matrix_dimensions, prepare
from nemo_r3.models import Architecture
from nemo_r3.precision import PRECISIONS, without_fp8

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


@pytest.mark.parametrize(
    ("name", "machine", "words"),
    [
        ("fp8-tensorwise", CPU, ["fp8-tensorwise needs an NVIDIA GPU", "ask for bf16 or fp32"]),
        ("fp8-delayed", replace(H100, te=None, te_error="no such file"), ["cannot be imported (no such file)"]),
        ("mxfp8", replace(B200, te=None), ["needs Transformer Engine", "megatron-core would run BF16"]),
        ("fp8-tensorwise", A100, ["8.9 or above; this one has 8.0 (ask for bf16)"]),
        ("fp8-blockwise", L40, ["9.0 or above; this one has 8.9 (it has fp8-tensorwise, fp8-delayed)"]),
        ("fp8-blockwise", B200, ["below CUDA compute capability 10.0; this one has 10.0", "mxfp8"]),
        ("mxfp8", H100, ["10.0 or above; this one has 9.0 (it has fp8-tensorwise, fp8-blockwise, fp8-delayed)"]),
        ("mxfp8", RTX_5090, ["below CUDA compute capability 12.0", "(it has fp8-tensorwise, fp8-delayed)"]),
        ("fp8-delayed", replace(H100, megatron=(0, 16)), ["needs megatron-core 0.19 or newer, found 0.16"]),
    ],
)
def test_machines_that_cannot(name: str, machine: Machine, words: list[str]) -> None:
    message = refused(config_of(name), shape("llama-3.1-8b"), machine)
    assert message.startswith(f"actor.precision={name} ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("name", "te", "cuda"),
    [
        ("fp8-tensorwise", (2, 2), (12, 1)),
        ("fp8-blockwise", (2, 3), (12, 9)),
        ("fp8-delayed", (2, 0), (12, 1)),
        ("mxfp8", (2, 1), (12, 8)),
    ],
)
def test_the_oldest_versions_that_will_do(name: str, te: tuple[int, int], cuda: tuple[int, int]) -> None:
    config, arch = config_of(name), shape("llama-3.1-8b")
    oldest = replace(B200 if name == "mxfp8" else H100, te=te, cuda=cuda)
    check(config, arch, oldest)
    older = (cuda[0], cuda[1] - 1)
    expected = "needs CUDA {}.{} or newer, found {}.{}".format(*cuda, *older)
    assert expected in refused(config, arch, replace(oldest, cuda=older))
    expected = "needs Transformer Engine {}.{} or newer, found 1.14".format(*te)
    assert expected in refused(config, arch, replace(oldest, te=(1, 14)))


def test_a_real_model_that_does_not_divide() -> None:
    config = config_of("fp8-blockwise", tensor_parallel=8)
    found = refused(config, shape("qwen2-72b"), H100)
    assert "needs multiples of 128" in found
    assert "the model's feed-forward columns on a rank are 3696 (29568 / actor.tensor_parallel=8)" in found
    assert "needs multiples of 32," in refused(config_of("mxfp8", tensor_parallel=8), shape("qwen2-72b"), B200)
    for name in ("fp8-tensorwise", "fp8-delayed"):
        check(config_of(name, tensor_parallel=8), shape("qwen2-72b"), H100)
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
    assert words in refused(config_of("fp8-tensorwise", tensor_parallel=2), arch, H100)


def test_every_matrix_has_its_dimensions() -> None:
    arch = shape("llama-3.1-70b")
    found = {one.what.removesuffix(" columns"): one.total // one.ways for one in matrix_dimensions(arch, 8)}
    assert found == {"hidden size": 8192, "query, key and value": 1280, "attention": 1024, "feed-forward": 3584}


def test_a_model_of_two_layers_has_nothing_to_quantise() -> None:
    arch = replace(shape("llama-3.1-8b"), num_layers=2)
    assert "the model has 2 layers" in refused(config_of("fp8-tensorwise"), arch, H100)
    check(config_of("fp8-delayed"), arch, H100)


def test_quantizations_are_those_of_the_config() -> None:
    [choices] = [leaf.field.metadata["choices"] for leaf in leaves(Config) if leaf.key == "rollout.quantization"]
    assert {"none", *VLLM} == set(choices)


@pytest.mark.parametrize(
    ("quantization", "machine", "words"),
    [
        ("fp8_per_tensor", CPU, ["rollout.quantization=fp8_per_tensor needs an NVIDIA GPU"]),
        ("fp8_per_tensor", A100, ["8.9 or above; this one has 8.0, where vLLM would multiply in BF16"]),
        ("fp8_per_block", L40, ["9.0 or above; this one has 8.9"]),
    ],
)
def test_rollouts_that_cannot(quantization: str, machine: Machine, words: list[str]) -> None:
    message = refused(config_of(quantization=quantization), shape("llama-3.1-8b"), machine)
    assert all(word in message for word in words), message


def test_rollouts_that_do_not_divide() -> None:
    config = config_of(quantization="fp8_per_block")
    config.rollout.tensor_parallel = 8
    found = refused(config, shape("qwen2-72b"), H100)
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
    assert variable not in os.environ
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(RuntimeError, match=f"{variable} must be set before"):
        prepare(config_of("fp8-blockwise"), shape("llama-3.1-8b"))
    monkeypatch.delitem(sys.modules, "transformer_engine")
    prepare(config_of("fp8-blockwise"), shape("llama-3.1-8b"))
    assert os.environ[variable] == "1"
    monkeypatch.setenv(variable, "0")
    prepare(config_of("fp8-blockwise"), shape("llama-3.1-8b"))
    assert os.environ[variable] == "0", "a user's own choice stays"


def test_what_does_not_train_needs_no_fp8() -> None:
    config = config_of("fp8-tensorwise")
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU"):
        prepare(config, shape("llama-3.1-8b"))
    plain = without_fp8(config)
    prepare(plain, shape("llama-3.1-8b"))
    assert plain.actor == replace(config.actor, precision="bf16") and config.actor.precision == "fp8-tensorwise"
    for name in ("bf16", "fp32"):
        assert without_fp8(config_of(name)).actor.precision == name


def test_advice() -> None:
    assert advice(config_of("fp8-blockwise")) is None
    config = config_of(quantization="fp8_per_tensor")
    assert "algo.mismatch_correction=tis" in str(advice(config))
    config.algo.mismatch_correction = "icepop"
    assert advice(config) is None


def refused(config: Config, arch: Architecture, machine: Machine) -> str:
    return refusal(lambda: check(config, arch, machine))
