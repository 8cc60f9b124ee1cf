"""config.json -> Architecture, and every refusal as one line that names the file or the key."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from config_json import LLAMA, write
from paper_models import NAMES, shape
from refusals import refusal

from nemo_r3.config import Config
from nemo_r3.config.checks import check
from nemo_r3.models import Architecture, architecture_of, check_layout
from nemo_r3.models.architecture import Experts
from nemo_r3.models.names import count_parameters
from nemo_r3.models.rope import Rope

QWEN2 = {"architectures": ["Qwen2ForCausalLM"]}


def test_a_llama_is_read_with_its_defaults(tmp_path: Path) -> None:
    found = architecture_of(write(tmp_path, json.dumps(LLAMA)))
    assert found == Architecture("llama", 4, 64, 96, 4, 2, 16, 131, 512, 1e-6, Rope(10000.0, 16), tied=False)


def test_a_qwen2_has_a_bias_and_keeps_its_theta(tmp_path: Path) -> None:
    own = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "tie_word_embeddings": True}
    found = architecture_of(write(tmp_path, json.dumps(LLAMA | QWEN2 | own | {"rms_norm_eps": 1e-5})))
    assert found == Architecture("qwen2", 4, 64, 96, 4, 2, 16, 131, 512, 1e-5, Rope(1e6, 16), tied=True, qkv_bias=True)


def test_head_dim_may_differ_from_hidden_over_heads(tmp_path: Path) -> None:
    assert architecture_of(write(tmp_path, json.dumps(LLAMA | {"head_dim": 24}))).head_dim == 24


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig, Qwen2Config

    shape = {key: value for key, value in LLAMA.items() if key != "architectures"}
    for hf_config in (LlamaConfig(**shape), Qwen2Config(**shape)):
        hf_config.architectures = [type(hf_config).__name__.replace("Config", "ForCausalLM")]
        hf_config.save_pretrained(tmp_path)
        found = architecture_of(tmp_path)
        assert (found.num_kv_heads, found.head_dim, found.rope) == (2, 16, Rope(10000.0, 16))
        assert found.qkv_bias is (found.family == "qwen2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (b"{not json", "config.json is not JSON"),
        (b"\xff\xfe\x00\x80", "config.json is not JSON"),
        (b"[1, 2]", "config.json holds no object"),
        (b"{}", "supported: LlamaForCausalLM, MistralForCausalLM, Phi3ForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
    ],
)
def test_a_config_json_that_cannot_be_read_is_refused(tmp_path: Path, text: bytes, expected: str) -> None:
    (tmp_path / "config.json").write_bytes(text)
    message = refusal(lambda: architecture_of(tmp_path))
    assert message.startswith("model.path: ") and expected in message


def test_no_directory_and_no_config_json_are_refused(tmp_path: Path) -> None:
    message = refusal(lambda: architecture_of(tmp_path / "nowhere"))
    assert f"{tmp_path}/nowhere is not a directory" in message and "'embedded'" in message
    assert "has no config.json" in refusal(lambda: architecture_of(tmp_path))
    (tmp_path / "adapter_config.json").touch()
    assert f"{tmp_path} is an adapter; name the merged model" in refusal(lambda: architecture_of(tmp_path))


def test_a_run_is_not_its_export(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    assert f"{tmp_path} is a run; its model is {tmp_path}/export" in refusal(lambda: architecture_of(tmp_path))


def test_a_model_with_few_positions_says_all_that_has_to_change() -> None:
    message = refusal(lambda: check_layout(Config(), ARCH))
    assert "rollout.max_model_len=4096 exceeds the model's 512 positions; try rollout.max_model_len=512 " in message
    config = Config()
    config.model.path = "embedded"
    for name, value in re.findall(r"rollout\.(\w+)=(\d+)", message.partition("; try ")[2]):
        setattr(config.rollout, name, int(value))
    check(config)
    check_layout(config, ARCH)


MIXTURE: dict[str, Any] = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def test_a_qwen3_with_experts_has_their_width_and_number(tmp_path: Path) -> None:
    found = architecture_of(write(tmp_path, json.dumps(MIXTURE)))
    rope, experts = Rope(1e4, 16), Experts(6, 2, normalized=True)
    ours = Architecture("qwen3_moe", 4, 64, 32, 4, 2, 16, 131, 512, 1e-6, rope, False, qk_norm=True, experts=experts)
    assert (found, found.active_columns) == (ours, 64)
    saved = {key: value for key, value in MIXTURE.items() if key != "num_experts"} | {"num_local_experts": 6}
    assert architecture_of(write(tmp_path, json.dumps(saved))) == ours, "as transformers saves it since version 5"
    lone = {"norm_topk_prob": None, "num_experts_per_tok": 1}
    assert architecture_of(write(tmp_path, json.dumps(MIXTURE | lone))).experts == Experts(6, 1, normalized=False)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported: only 1"),
        ({"mlp_only_layers": [0]}, "mlp_only_layers=[0] is not supported: only []"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7 is not an integer from 1 to 6"),
        ({"num_experts_per_tok": 1}, "num_experts_per_tok=1 with norm_topk_prob=true"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob='yes' is neither true nor false"),
    ],
)
def test_experts_that_the_actor_does_not_compute_are_refused(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    assert expected in refusal(lambda: architecture_of(write(tmp_path, json.dumps(MIXTURE | change))))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"actor.expert_parallel": 4},
            "actor.expert_parallel=4 does not divide the model's 6 experts (allowed: 1, 2, 3",
        ),
        ({"actor.tensor_parallel": 2}, "actor.sequence_parallel: false with actor.tensor_parallel=2: a model with"),
        ({"actor.lora_rank": 8, "actor.precision": "mxfp8"}, "actor.precision=mxfp8 is not supported for a model with"),
        ({"actor.lora_rank": 8, "actor.routing_replay": True}, "accepted"),
        ({"actor.precision": "fp8-delayed"}, "actor.precision=fp8-delayed is not supported for a model with experts"),
        ({"rollout.quantization": "fp8_per_block"}, "rollout.quantization=fp8_per_block is not supported for a model"),
        ({"actor.tensor_parallel": 2, "actor.sequence_parallel": True, "actor.expert_parallel": 3}, "accepted"),
    ],
)
def test_layouts_of_experts(tmp_path: Path, settings: dict[str, Any], expected: str) -> None:
    config = Config()
    config.rollout.max_model_len = 512
    for key, value in settings.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    arch = architecture_of(write(tmp_path, json.dumps(MIXTURE)))
    assert refusal(lambda: check_layout(config, arch)).startswith(expected)


@pytest.mark.parametrize(("ways", "expected"), [(1, "actor.tensor_parallel=2 does not divide"), (3, "accepted")])
def test_experts_that_are_held_whole_may_have_any_width(tmp_path: Path, ways: int, expected: str) -> None:
    config, arch = Config(), architecture_of(write(tmp_path, json.dumps(MIXTURE | {"moe_intermediate_size": 33})))
    config.rollout.max_model_len = 512
    config.actor.tensor_parallel, config.actor.sequence_parallel, config.actor.expert_parallel = 2, True, ways
    assert refusal(lambda: check_layout(config, arch)).startswith(expected)


SMOLLM3: dict[str, Any] = LLAMA | {"architectures": ["SmolLM3ForCausalLM"]}


@pytest.mark.parametrize(
    ("change", "nope"),
    [
        ({}, (3,)),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, (1, 3)),
        ({"no_rope_layer_interval": 1}, (0, 1, 2, 3)),
        ({"no_rope_layer_interval": 5}, ()),
        ({"no_rope_layers": [0, 1, 1, 0], "no_rope_layer_interval": 2}, (0, 3)),
        ({"tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}, (3,)),
    ],
)
def test_a_smollm3_is_read_as_transformers_reads_it(
    tmp_path: Path, change: dict[str, Any], nope: tuple[int, ...]
) -> None:
    from transformers import SmolLM3Config

    found = architecture_of(write(tmp_path, json.dumps(SMOLLM3 | change)))
    theirs = SmolLM3Config.from_pretrained(tmp_path)
    rope = Rope(theirs.rope_parameters["rope_theta"], 16)
    tied = theirs.tie_word_embeddings
    assert found == Architecture("smollm3", 4, 64, 96, 4, 2, 16, 131, 512, 1e-6, rope, tied, nope_layers=nope)
    assert theirs.no_rope_layers == [int(layer not in nope) for layer in range(4)]
    theirs.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text()) | {"architectures": ["SmolLM3ForCausalLM"]}
    assert architecture_of(write(tmp_path, json.dumps(saved))) == found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"no_rope_layers": [1, 0]}, "no_rope_layers=[1, 0] is no list of 4 values, one for each layer"),
        ({"no_rope_layers": []}, "no_rope_layers=[] is no list of 4 values"),
        ({"no_rope_layers": 4}, "no_rope_layers=4 is no list of 4 values"),
        ({"no_rope_layers": [1, 2, 1, 0]}, "no_rope_layers has 2, which is neither 0 nor 1"),
        ({"no_rope_layers": [1, True, 1, 0]}, "no_rope_layers has True, which is neither 0 nor 1"),
        ({"no_rope_layers": [1, [0], 1, 0]}, "no_rope_layers has [0], which is neither 0 nor 1"),
        ({"no_rope_layer_interval": 0}, "no_rope_layer_interval=0 is not an integer from 1"),
        ({"layer_types": ["full_attention"] * 3}, "is no list of 4 values, one for each layer"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types has 'chunked_attention', which is neither 'full_at"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is not an integer from 1 to 10000"),
        ({"attention_bias": True}, "smollm3 with attention_bias=true is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn' is not supported"),
    ],
)
def test_a_smollm3_that_the_actor_does_not_compute_is_refused(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    message = refusal(lambda: architecture_of(write(tmp_path, json.dumps(SMOLLM3 | change))))
    assert message.startswith("model.path: ") and expected in message


def test_a_model_is_described_as_before_there_were_the_fields_that_it_lacks() -> None:
    """Fingerprints and checkpoints compare descriptions: of a new field there must be nothing in those of others."""
    plain = {*"family num_layers hidden_size ffn_hidden_size num_heads num_kv_heads head_dim vocab_size".split()}
    plain |= {*"max_positions norm_eps rope tied qkv_bias qk_norm fused window".split()}
    assert ARCH.described().keys() == plain
    assert replace(ARCH, nope_layers=(3,), experts=Experts(2, 1, True)).described().keys() == plain | {
        "nope_layers",
        "experts",
    }


ARCH = Architecture("llama", 6, 96, 90, 12, 4, 8, 131, 512, 1e-6, Rope(1e4, 8), tied=True)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("actor.tensor_parallel", 5, "does not divide the model's 12 attention heads (allowed: 1, 2, 3, 4, 6, 12)"),
        ("actor.tensor_parallel", 3, "does not divide the model's 4 key/value heads (allowed: 1, 2, 4)"),
        ("actor.tensor_parallel", 4, "does not divide the model's 90 feed-forward columns"),
        ("actor.pipeline_parallel", 4, "does not divide the model's 6 layers (allowed: 1, 2, 3, 6)"),
        ("actor.expert_parallel", 2, "needs a model with experts (allowed here: 1)"),
        ("rollout.tensor_parallel", 8, "does not divide the model's 12 attention heads"),
        ("rollout.tensor_parallel", 4, "does not divide the model's 90 feed-forward columns"),
        ("rollout.tensor_parallel", 6, "neither divides nor is divided by the model's 4 "),
        ("rollout.max_model_len", 513, "exceeds the model's 512 positions"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_by_key(key: str, value: int, expected: str) -> None:
    config = Config()
    config.rollout.max_model_len = 512
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)
    assert refusal(lambda: check_layout(config, ARCH)).startswith(f"{key}={value} {expected}")


def test_without_experts_there_is_no_routing_to_replay() -> None:
    config = Config()
    config.rollout.max_model_len, config.actor.routing_replay = 512, True
    assert "actor.routing_replay=true needs a model with experts" in refusal(lambda: check_layout(config, ARCH))


def test_a_layout_that_divides_is_accepted() -> None:
    config = Config()
    config.rollout.max_model_len = 512
    config.actor.tensor_parallel = config.rollout.tensor_parallel = 2
    config.actor.pipeline_parallel = 3
    check_layout(config, ARCH)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "is a GPT2LMHeadModel; supported: LlamaForCausalLM, MistralForCausalLM",
        ),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
        ({"mlp_bias": True}, "mlp_bias=true is not supported"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the checkpoint is quantized"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        (QWEN2 | {"dual_chunk_attention_config": {"x": 8}}, "dual_chunk_attention_config is not supported"),
        ({"hidden_size": "big"}, "hidden_size='big' is not an integer from 1"),
        ({"hidden_size": [64] * 999}, "... is not an integer from 1"),
        ({"intermediate_size": True}, "intermediate_size=True is not"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is not"),
        ({"num_attention_heads": 128}, "of a head's 0 channels makes no pairs"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide num_attention_heads=4"),
        ({"vocab_size": 10**400}, "... is not an integer from 1"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is not an integer from 1 to 10000"),
        ({"rms_norm_eps": "abc"}, "rms_norm_eps='abc' is not a positive number"),
        ({"rms_norm_eps": math.inf}, "rms_norm_eps=inf is not a positive number"),
        ({"rope_theta": math.nan}, "rope_theta=nan is not a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' is no object"),
        ({"rope_parameters": 3}, "rope_parameters=3 is no object"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes' is neither true nor false"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": "wide"}, "sliding_window='wide' is not"),
        ({"architectures": 3}, "architectures=3 is no list of classes"),
    ],
)
def test_a_field_that_makes_no_model_is_refused_with_its_file_and_value(
    tmp_path: Path, change: dict[str, Any], expected: str
) -> None:
    message = refusal(lambda: architecture_of(write(tmp_path, json.dumps(LLAMA | change))))
    assert message.startswith("model.path: ") and str(tmp_path) in message and expected in message


@pytest.mark.parametrize(
    ("family", "settings", "window"),
    [
        ("Mistral", {"sliding_window": 256}, 256),
        ("Mistral", {"sliding_window": None}, None),
        ("Phi3", {"sliding_window": 256}, 256),
        ("Qwen2", {"sliding_window": 256, "use_sliding_window": False}, None),
        ("Qwen3", {"sliding_window": 256, "use_sliding_window": True}, 256),
        ("Qwen3Moe", MIXTURE | {"sliding_window": 256, "use_sliding_window": True}, 256),
        ("SmolLM3", {"sliding_window": 256, "use_sliding_window": True}, 256),
        ("SmolLM3", {"sliding_window": 256, "layer_types": ["full_attention"] * 4}, None),
        ("SmolLM3", {"sliding_window": 256, "layer_types": [*["full_attention"] * 3, "sliding_attention"]}, 256),
    ],
)
def test_a_sliding_window_is_refused_where_it_would_matter(
    tmp_path: Path, family: str, settings: dict[str, Any], window: int | None
) -> None:
    hf = LLAMA | settings | {"architectures": [f"{family}ForCausalLM"], "head_dim": 16}
    arch = architecture_of(write(tmp_path, json.dumps(hf)))
    assert arch.window == window
    config = Config()
    config.rollout.max_model_len = 256
    check_layout(config, arch)
    config.rollout.max_model_len = 257
    said = "max_model_len=257 exceeds the model's sliding window of 256" if window else "accepted"
    assert said in refusal(lambda: check_layout(config, arch))


BILLIONS = {  # as their authors count them
    "llama-3.1-70b": 70.6,
    "llama-3.1-8b": 8.03,
    "llama-3.2-3b": 3.21,
    "phi-3.5-mini": 3.82,
    "qwen2-1.5b": 1.54,
    "qwen2-7b": 7.62,
    "qwen2-72b": 72.7,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62,
    "qwen2.5-32b": 32.8,
    "qwen2.5-72b": 72.7,
    "qwen3-30b-a3b": 30.5,
}


def test_every_model_has_its_known_size() -> None:
    assert set(NAMES) == BILLIONS.keys()
    found = {name: count_parameters(shape(name)) / 1e9 for name in NAMES}
    assert found == pytest.approx(BILLIONS, rel=0.01)
