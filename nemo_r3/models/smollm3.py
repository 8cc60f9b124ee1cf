"""SmolLM3: Llama's shape with a tied head, and some layers without positions (NoPE): every fourth, as published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_r3.errors import ConfigError, in_one_line
from nemo_r3.models.architecture import MOST_LAYERS, Architecture, decoder
from nemo_r3.models.rope import positive_integer

HF_CLASS = "SmolLM3ForCausalLM"
DEFAULTS = {"tie_word_embeddings": True, "rope_theta": 2e6, "no_rope_layer_interval": 4}
"""What transformers takes where config.json has none."""


def architecture(hf: Mapping[str, Any]) -> Architecture:
    """Reads a SmolLM3 config.json.

    Raises:
        ConfigError: no_rope_layers or layer_types is no list of what each layer is.
    """
    hf = DEFAULTS | dict(hf)
    layers = positive_integer(hf, "num_hidden_layers", MOST_LAYERS)
    return decoder(hf, "smollm3", window=_window(hf, layers), nope_layers=_nope_layers(hf, layers))


def _nope_layers(hf: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """The layers whose no_rope_layers is 0: it says where there are rotary positions, despite its name."""
    if hf.get("no_rope_layers") is None:
        interval = positive_integer(hf, "no_rope_layer_interval")
        return tuple(range(interval - 1, layers, interval))
    rotary = _of_each_layer(hf, "no_rope_layers", layers, (0, 1))
    return tuple(layer for layer, rotates in enumerate(rotary) if not rotates)


def _window(hf: Mapping[str, Any], layers: int) -> int | None:
    """The sliding window. Where layer_types has one, transformers and vLLM apply it, whatever use_sliding_window is."""
    kinds: Sequence[str] = ()
    if hf.get("layer_types") is not None:
        kinds = _of_each_layer(hf, "layer_types", layers, ("full_attention", "sliding_attention"))
    return hf.get("sliding_window") if hf.get("use_sliding_window") or "sliding_attention" in kinds else None


def _of_each_layer(hf: Mapping[str, Any], key: str, layers: int, allowed: Sequence[Any]) -> list[Any]:
    """A list that has one of the allowed values, all of one type, for each layer."""
    values = hf[key]
    if not isinstance(values, list) or len(values) != layers:
        raise ConfigError(f"{key}={in_one_line(repr(values))} is no list of {layers} values, one for each layer")
    for value in values:
        if value not in allowed or type(value) is not type(allowed[0]):
            known = " nor ".join(repr(one) for one in allowed)
            raise ConfigError(f"{key} has {in_one_line(repr(value))}, which is neither {known}")
    return values
