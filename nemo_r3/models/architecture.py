"""`Architecture`: what a model family's config.json says, in the terms that the actor needs. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nemo_r3.config import Config
from nemo_r3.config.checks import lengths_that_fit
from nemo_r3.errors import ConfigError, ModelNotFoundError
from nemo_r3.files import read_json_object
from nemo_r3.models.rope import Rope, positive_integer, positive_number, read_rope

MOST_LAYERS = 10_000
"""A slip in config.json beyond it: memory and names are counted layer by layer, which 10^9 layers would not end."""


@dataclass(frozen=True)
class Experts:
    """A mixture of experts: several SwiGLUs in each layer, of which a router picks some for each token."""

    count: int  # in each layer
    per_token: int  # how many of them a token passes
    normalized: bool  # whether the weights of a token's experts are scaled to add up to 1


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with RMSNorm, SwiGLU, grouped-query attention and rotary positions."""

    family: str  # the module of nemo_r3.models that read it
    num_layers: int
    hidden_size: int  # width of the residual stream
    ffn_hidden_size: int  # width of the SwiGLU's gate, of one expert if there are several
    num_heads: int  # of queries
    num_kv_heads: int  # of keys, and of values
    head_dim: int
    vocab_size: int  # rows of the embedding in the checkpoint, before any padding
    max_positions: int  # longest sequence the checkpoint was made for, in tokens
    norm_eps: float
    rope: Rope
    tied: bool  # whether the head shares the embedding's weight
    qkv_bias: bool = False  # whether the query, key and value projections have a bias
    qk_norm: bool = False  # whether every head's query and key pass an RMSNorm before they are rotated
    fused: bool = False  # whether the checkpoint holds query, key and value in one tensor, and gate and up in another
    window: int | None = None  # how many recent tokens a token sees in sliding-window layers; None if there are none
    experts: Experts | None = None  # None if every token passes the same, dense SwiGLU
    nope_layers: tuple[int, ...] = ()  # the layers, counted from 0, in which queries and keys are not rotated

    @property
    def query_width(self) -> int:
        """Columns of all query heads."""
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Columns of all key heads; the value heads have as many."""
        return self.num_kv_heads * self.head_dim

    @property
    def active_columns(self) -> int:
        """Columns of all the SwiGLU gates that a token passes in a layer."""
        return self.ffn_hidden_size * (self.experts.per_token if self.experts else 1)

    def described(self) -> dict[str, Any]:
        """All fields, but of those that came later only what a model has: fingerprints of others stay as they were."""
        later = ("experts", "nope_layers")
        return {key: value for key, value in asdict(self).items() if value or key not in later}

    def padded_vocab(self, tensor_parallel: int) -> int:
        """Embedding rows once padded so that all tensor-parallel ranks hold equally many."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel

    def cached_bytes(self, tensor_parallel: int, itemsize: int) -> int:
        """What a token's keys and values take in the KV cache of each of an engine's `tensor_parallel` ranks."""
        return 2 * self.num_layers * -(-self.num_kv_heads // tensor_parallel) * self.head_dim * itemsize


def read_hf_config(path: Path) -> dict[str, Any]:
    """The config.json of a Hugging Face checkpoint: in its directory, or a file of any name that ends in .json.

    Raises:
        ConfigError: there is no readable config.json.
    """
    file = path if path.suffix == ".json" else path / "config.json"
    if path != file and not path.is_dir():
        kind = ConfigError if path.exists() else ModelNotFoundError
        raise kind(f"model.path: {path} is not a directory; name a Hugging Face checkpoint, or 'embedded'")
    if (path / "config.yaml").is_file() and not file.is_file():
        raise ConfigError(f"model.path: {path} is a run; its model is {path / 'export'}, where recipes.export puts it")
    if (path / "adapter_config.json").is_file() and not file.is_file():
        raise ConfigError(f"model.path: {path} is an adapter; name the merged model that recipes.export puts beside it")
    if not file.is_file():
        raise ConfigError(f"model.path: {path} has no config.json; it is not a Hugging Face checkpoint")
    return read_json_object(file, "model.path")


def decoder(hf: Mapping[str, Any], family: str, partial_rotary: bool = False, **traits: Any) -> Architecture:
    """An architecture from the fields that nearly every config.json has.

    Args:
        hf: config.json.
        family: the module of nemo_r3.models that reads it.
        partial_rotary: whether transformers' class of the family can rotate a part of each head; vLLM's always can.
        traits: what is different in this family; takes precedence.

    Raises:
        ConfigError: an invalid field, biases or an activation that the actor lacks, or unsupported rotary positions;
            `architecture_of` puts the file before the message.
        KeyError: a field is missing.
    """
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            raise ConfigError(f"{family} with {key}=true is not supported")
    if hf.get("quantization_config"):
        raise ConfigError("the checkpoint is quantized (quantization_config); train from the unquantized one")
    if hf.get("hidden_act", "silu") != "silu":
        raise ConfigError(f"{family} with hidden_act={hf['hidden_act']!r} is not supported (only 'silu')")
    heads, hidden_size = positive_integer(hf, "num_attention_heads"), positive_integer(hf, "hidden_size")
    kv_heads = heads if hf.get("num_key_value_heads") is None else positive_integer(hf, "num_key_value_heads")
    if heads % kv_heads:
        raise ConfigError(f"num_key_value_heads={kv_heads} does not divide num_attention_heads={heads}")
    head_dim = hidden_size // heads if hf.get("head_dim") is None else positive_integer(hf, "head_dim")
    rope = read_rope(hf, head_dim)
    if rope.dim != head_dim and not partial_rotary:
        raise ConfigError(
            f"{family} with a partial_rotary_factor is not supported: vLLM rotates {rope.dim} of a head's {head_dim} "
            "channels, transformers all"
        )
    if traits.get("window") is not None:
        positive_integer({"sliding_window": traits["window"]}, "sliding_window")
    common: dict[str, Any] = {
        "num_layers": positive_integer(hf, "num_hidden_layers", MOST_LAYERS),
        "hidden_size": hidden_size,
        "ffn_hidden_size": positive_integer(hf, "intermediate_size"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": positive_integer(hf, "vocab_size"),
        "max_positions": positive_integer(hf, "max_position_embeddings"),
        "norm_eps": positive_number({"rms_norm_eps": 1e-6} | dict(hf), "rms_norm_eps"),
        "rope": rope,
        "tied": flag(hf, "tie_word_embeddings"),
    }
    return Architecture(family=family, **common | traits)


def flag(hf: Mapping[str, Any], key: str) -> bool:
    """A field that is true or false; false if it is missing.

    Raises:
        ConfigError: it is neither.
    """
    value = hf.get(key) or False
    if not isinstance(value, bool):
        raise ConfigError(f"{key}={value!r} is neither true nor false")
    return value


def check_layout(config: Config, arch: Architecture) -> None:
    """Refuses layouts into which this model cannot be cut, before any weight is read.

    Raises:
        ConfigError: naming the key, its value and what would fit.
    """
    actor, rollout = config.actor, config.rollout

    def must_divide(key: str, ways: int, count: int, what: str) -> None:
        if count % ways:
            allowed = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
            raise ConfigError(f"{key}={ways} does not divide the model's {count} {what} (allowed: {allowed})")

    both = {"actor.tensor_parallel": actor.tensor_parallel, "rollout.tensor_parallel": rollout.tensor_parallel}
    for key, ways in both.items():
        must_divide(key, ways, arch.num_heads, "attention heads")
    must_divide("actor.tensor_parallel", actor.tensor_parallel, arch.num_kv_heads, "key/value heads")
    for key, ways in (both | {"actor.tensor_parallel": actor.expert_tensor_parallel}).items():
        must_divide(key, ways, arch.ffn_hidden_size, "feed-forward columns")
    must_divide("actor.pipeline_parallel", actor.pipeline_parallel, arch.num_layers, "layers")
    if arch.experts is not None:
        must_divide("actor.expert_parallel", actor.expert_parallel, arch.experts.count, "experts")
        _check_experts(config)
    elif actor.expert_parallel > 1:
        raise ConfigError(f"actor.expert_parallel={actor.expert_parallel} needs a model with experts (allowed here: 1)")
    elif actor.routing_replay:
        raise ConfigError("actor.routing_replay=true needs a model with experts (allowed here: false)")
    if arch.num_kv_heads % rollout.tensor_parallel and rollout.tensor_parallel % arch.num_kv_heads:
        raise ConfigError(
            f"rollout.tensor_parallel={rollout.tensor_parallel} neither divides nor is divided by the model's "
            f"{arch.num_kv_heads} key/value heads"
        )
    if rollout.max_model_len > arch.max_positions:
        raise ConfigError(
            f"rollout.max_model_len={rollout.max_model_len} exceeds the model's {arch.max_positions} positions"
            + lengths_that_fit(config, arch.max_positions)
        )
    if arch.window is not None and rollout.max_model_len > arch.window:
        raise ConfigError(
            f"rollout.max_model_len={rollout.max_model_len} exceeds the model's sliding window of {arch.window} "
            "tokens, which the actor does not apply: up to there it makes no difference"
        )


def _check_experts(config: Config) -> None:
    """Refuses what the actor or the engine cannot do with experts."""
    actor, quantization = config.actor, config.rollout.quantization
    if actor.tensor_parallel > 1 and not actor.sequence_parallel:
        raise ConfigError(
            f"actor.sequence_parallel: false with actor.tensor_parallel={actor.tensor_parallel}: a model with experts "
            "needs true, as megatron-core's router expects each rank to have tokens of its own"
        )
    for key, value, plain in (
        ("actor.precision", actor.precision, "bf16"),
        ("rollout.quantization", quantization, "none"),
    ):
        if "fp8" in value:
            raise ConfigError(f"{key}={value} is not supported for a model with experts; ask for {plain}")
