"""`Architecture`: what a model family's config.json says, in the terms that the actor needs. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_r3.config import Config
from nemo_r3.errors import ConfigError


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, SwiGLU, grouped-query attention and rotary positions.

    Attributes:
        family: the module of nemo_r3.models that read it.
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the SwiGLU's gate.
        num_heads: query heads.
        num_kv_heads: key and value heads.
        head_dim: width of one head.
        vocab_size: rows of the embedding in the checkpoint, before any padding.
        max_positions: longest sequence the checkpoint was made for, in tokens.
        norm_eps: epsilon of the RMSNorms.
        rope_theta: base of the rotary positions.
        tied: whether the head shares the embedding's weight.
        qkv_bias: whether the query, key and value projections have a bias.
    """

    family: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    tied: bool
    qkv_bias: bool

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Embedding rows once padded so that every tensor-parallel rank holds as many."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel


def read_hf_config(path: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face checkpoint directory.

    Raises:
        ConfigError: the directory or a readable config.json is missing.
    """
    file = path / "config.json"
    if not path.is_dir():
        raise ConfigError(f"model.path: {path} is not a directory; name a Hugging Face checkpoint, or 'embedded'")
    if not file.is_file():
        raise ConfigError(f"model.path: {path} has no config.json; it is not a Hugging Face checkpoint")
    try:
        found = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"model.path: {file} is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise ConfigError(f"model.path: {file} holds no object")
    return found


def rope_theta(hf: Mapping[str, Any], default: float) -> float:
    """The rotary base, from either of the places where transformers has kept it.

    Raises:
        ConfigError: the checkpoint scales its rotary positions, which no family here reads yet.
    """
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"model.path: rope type {kind!r} is not supported yet (only 'default')")
    return float(scaling.get("rope_theta", hf.get("rope_theta", default)))


def check_layout(config: Config, arch: Architecture) -> None:
    """Refuses layouts that this model cannot be cut into, before any weight is read.

    Raises:
        ConfigError: naming the key, its value and what would divide.
    """
    actor, rollout = config.actor, config.rollout

    def must_divide(key: str, ways: int, count: int, what: str) -> None:
        if count % ways:
            allowed = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise ConfigError(f"{key}={ways} does not divide the model's {count} {what} (allowed: {allowed})")

    for key, ways in (
        ("actor.tensor_parallel", actor.tensor_parallel),
        ("rollout.tensor_parallel", rollout.tensor_parallel),
    ):
        must_divide(key, ways, arch.num_heads, "attention heads")
    must_divide("actor.tensor_parallel", actor.tensor_parallel, arch.num_kv_heads, "key/value heads")
    must_divide("actor.tensor_parallel", actor.tensor_parallel, arch.ffn_hidden_size, "feed-forward columns")
    must_divide("actor.pipeline_parallel", actor.pipeline_parallel, arch.num_layers, "layers")
    if rollout.max_model_len > arch.max_positions:
        raise ConfigError(
            f"rollout.max_model_len={rollout.max_model_len} exceeds the model's {arch.max_positions} positions"
        )
