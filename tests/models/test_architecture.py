"""config.json -> Architecture, and every refusal as one line that names the file or the key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nemo_r3.config import Config
from nemo_r3.errors import ConfigError
from nemo_r3.models import Architecture, architecture_of, check_layout, model_path

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
    "max_position_embeddings": 512,
}


def write(path: Path, text: str) -> Path:
    (path / "config.json").write_text(text)
    return path


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        act()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_llama_is_read_with_its_defaults(tmp_path: Path) -> None:
    found = architecture_of(write(tmp_path, json.dumps(LLAMA)))
    assert found == Architecture("llama", 4, 64, 96, 4, 2, 16, 131, 512, 1e-6, 10000.0, False, False)


def test_a_qwen2_has_a_bias_and_keeps_its_theta(tmp_path: Path) -> None:
    hf = LLAMA | {
        "architectures": ["Qwen2ForCausalLM"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
    }
    found = architecture_of(write(tmp_path, json.dumps(hf)))
    assert found == Architecture("qwen2", 4, 64, 96, 4, 2, 16, 131, 512, 1e-5, 1e6, True, True)


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}, {"rope_scaling": None, "rope_theta": 5e5}],
)
def test_theta_is_found_where_transformers_has_kept_it(tmp_path: Path, change: dict[str, Any]) -> None:
    assert architecture_of(write(tmp_path, json.dumps(LLAMA | change))).rope_theta == 5e5


def test_head_dim_may_differ_from_hidden_over_heads(tmp_path: Path) -> None:
    assert architecture_of(write(tmp_path, json.dumps(LLAMA | {"head_dim": 24}))).head_dim == 24


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    from transformers import LlamaConfig, Qwen2Config

    shape = {key: value for key, value in LLAMA.items() if key != "architectures"}
    for hf_config in (LlamaConfig(**shape), Qwen2Config(**shape)):
        hf_config.architectures = [type(hf_config).__name__.replace("Config", "ForCausalLM")]
        hf_config.save_pretrained(tmp_path)
        found = architecture_of(tmp_path)
        assert (found.num_kv_heads, found.head_dim, found.rope_theta) == (2, 16, 10000.0)
        assert found.qkv_bias is (found.family == "qwen2")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{not json", "config.json is not JSON"),
        ("[1, 2]", "config.json holds no object"),
        (
            json.dumps(LLAMA | {"architectures": ["GPT2LMHeadModel"]}),
            "is a GPT2LMHeadModel; supported: LlamaForCausalLM, Qwen2ForCausalLM",
        ),
        ("{}", "supported: LlamaForCausalLM, Qwen2ForCausalLM"),
        (json.dumps(LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8}}), "rope type 'llama3'"),
        (json.dumps(LLAMA | {"rope_scaling": {"type": "linear", "factor": 2}}), "rope type 'linear'"),
        (json.dumps(LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}), "rope type 'yarn'"),
        (json.dumps({key: LLAMA[key] for key in LLAMA if key != "vocab_size"}), "config.json lacks 'vocab_size'"),
        (json.dumps(LLAMA | {"attention_bias": True}), "attention_bias=true is not supported"),
        (json.dumps(LLAMA | {"mlp_bias": True}), "mlp_bias=true is not supported"),
        (json.dumps(LLAMA | {"hidden_act": "gelu"}), "hidden_act='gelu' is not supported"),
        (
            json.dumps(LLAMA | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True}),
            "use_sliding_window=true is not supported",
        ),
    ],
)
def test_a_config_json_that_cannot_be_used_is_refused(tmp_path: Path, text: str, expected: str) -> None:
    message = refusal(lambda: architecture_of(write(tmp_path, text)))
    assert message.startswith("model.path: ") and expected in message


def test_no_directory_and_no_config_json_are_refused(tmp_path: Path) -> None:
    message = refusal(lambda: architecture_of(tmp_path / "nowhere"))
    assert f"{tmp_path}/nowhere is not a directory" in message and "'embedded'" in message
    assert "has no config.json" in refusal(lambda: architecture_of(tmp_path))


def test_a_config_json_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00\x80")
    assert "is not JSON" in refusal(lambda: architecture_of(tmp_path))


def test_embedded_and_home_paths() -> None:
    config = Config()
    config.model.path = "embedded"
    assert model_path(config).name == "countdown_tiny"
    config.model.path = "~/models/x"
    assert model_path(config) == Path.home() / "models" / "x"


ARCH = Architecture("llama", 6, 96, 90, 12, 4, 8, 131, 512, 1e-6, 1e4, True, False)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "actor.tensor_parallel",
            5,
            "actor.tensor_parallel=5 does not divide the model's 12 attention heads (allowed: 1, 2, 3, 4, 6, 12)",
        ),
        (
            "actor.tensor_parallel",
            3,
            "actor.tensor_parallel=3 does not divide the model's 4 key/value heads (allowed: 1, 2, 4)",
        ),
        ("actor.tensor_parallel", 4, "actor.tensor_parallel=4 does not divide the model's 90 feed-forward columns"),
        (
            "actor.pipeline_parallel",
            4,
            "actor.pipeline_parallel=4 does not divide the model's 6 layers (allowed: 1, 2, 3, 6)",
        ),
        ("rollout.tensor_parallel", 8, "rollout.tensor_parallel=8 does not divide the model's 12 attention heads"),
        ("rollout.max_model_len", 513, "rollout.max_model_len=513 exceeds the model's 512 positions"),
    ],
)
def test_a_layout_that_does_not_divide_is_refused_by_key(key: str, value: int, expected: str) -> None:
    config = Config()
    config.rollout.max_model_len = 512
    section, name = key.split(".")
    setattr(getattr(config, section), name, value)
    assert refusal(lambda: check_layout(config, ARCH)).startswith(expected)


def test_a_layout_that_divides_is_accepted() -> None:
    config = Config()
    config.rollout.max_model_len = 512
    config.actor.tensor_parallel = config.rollout.tensor_parallel = 2
    config.actor.pipeline_parallel = 3
    check_layout(config, ARCH)
