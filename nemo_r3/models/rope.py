"""`Rope`: the rotary positions that a config.json describes; `actor/rotary.py` computes them. No torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_r3.errors import ConfigError, in_one_line


@dataclass(frozen=True)
class Llama3:
    """Llama 3.1's scaling: slow channels rotate `factor` times slower, fast ones as before, the others in between."""

    factor: float  # how many times longer the context became
    low_freq_factor: float  # channels with fewer rotations than this within the original context are slow
    high_freq_factor: float  # channels with more rotations than this within the original context are fast
    original_positions: int  # the context before scaling, in tokens


@dataclass(frozen=True)
class LongRope:
    """Phi-3's scaling (arXiv 2402.13753): every channel has a factor of its own, and there are two sets of factors."""

    short: tuple[float, ...]  # factors [dim / 2] for sequences that never exceed `original_positions` tokens
    long: tuple[float, ...]  # factors [dim / 2] for others, at all of their positions
    original_positions: int  # the context before scaling, in tokens
    magnitude: float  # what cosines and sines are multiplied by, in both regimes


@dataclass(frozen=True)
class Rope:
    """Rotary positions."""

    theta: float  # base of the wavelengths
    dim: int  # how many channels of a head rotate; those after them do not
    scaling: Llama3 | LongRope | None = None  # how they were stretched to a longer context; None if they were not

    def regime(self, max_model_len: int) -> str:
        """Which factors apply to sequences of up to `max_model_len` tokens: "short" or "long"; "only" without a choice.

        vLLM's rule: one set of factors for all positions of all sequences, because its cache holds rotated keys.
        transformers goes by the length of the sequence at hand.
        """
        if not isinstance(self.scaling, LongRope):
            return "only"
        return "long" if max_model_len > self.scaling.original_positions else "short"


def read_rope(hf: Mapping[str, Any], head_dim: int) -> Rope:
    """The rotary positions of a config.json, from any of the places where transformers has kept them.

    Raises:
        ConfigError: a scaling that the actor does not compute, or values that make none.
    """
    settings = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0} | _settings(hf)
    share = positive_number(settings, "partial_rotary_factor")
    dim = int(head_dim * share)
    if share > 1 or dim % 2 or not dim:
        raise ConfigError(f"partial_rotary_factor={share:g} of a head's {head_dim} channels makes no pairs")
    return Rope(positive_number(settings, "rope_theta"), dim, _read_scaling(hf, settings, dim))


def _settings(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Everything about rotary positions in one place; the order of precedence is transformers'."""
    key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    inner = hf.get(key) or {}
    if not isinstance(inner, dict):
        raise ConfigError(f"{key}={in_one_line(repr(inner))} is no object")
    if any(isinstance(value, dict) for value in inner.values()):
        raise ConfigError(f"rope settings per layer type ({', '.join(inner)}) are not supported")
    outer = {key: hf[key] for key in ("rope_theta", "partial_rotary_factor") if key in hf}
    original = {key: hf[key] for key in ("original_max_position_embeddings",) if key in hf}
    return outer | inner | original


def _read_scaling(hf: Mapping[str, Any], settings: Mapping[str, Any], dim: int) -> Llama3 | LongRope | None:
    kind = settings.get("rope_type", settings.get("type", "default"))
    if kind == "default":
        return None
    if kind == "llama3":
        low, high = positive_number(settings, "low_freq_factor"), positive_number(settings, "high_freq_factor")
        if not low < high:
            raise ConfigError(f"rope's low_freq_factor={low:g} is not below high_freq_factor={high:g}")
        return Llama3(
            positive_number(settings, "factor"),
            low,
            high,
            positive_integer(settings, "original_max_position_embeddings"),
        )
    if kind in ("longrope", "su"):  # its first name
        return _read_longrope(hf, settings, dim)
    raise ConfigError(f"rope type {kind!r} is not supported (only 'default', 'llama3' and 'longrope')")


def _read_longrope(hf: Mapping[str, Any], settings: Mapping[str, Any], dim: int) -> LongRope:
    original = positive_integer(settings, "original_max_position_embeddings")
    if original == 1:
        raise ConfigError("longrope's original_max_position_embeddings=1 makes no magnitude: its logarithm is 0")
    stretch = hf["max_position_embeddings"] / original
    for key in ("attention_factor", "short_mscale", "long_mscale"):
        if settings.get(key) is not None:
            raise ConfigError(f"longrope's {key} is not supported: transformers and vLLM differ about it")
    if settings.get("factor", stretch) != stretch:
        raise ConfigError(
            f"longrope's factor={settings['factor']} is not supported: only {stretch:g}, which is "
            "max_position_embeddings / original_max_position_embeddings and what vLLM takes"
        )
    short, long = (_factors(settings, key, dim // 2) for key in ("short_factor", "long_factor"))
    magnitude = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return LongRope(short, long, original, magnitude)


def _factors(settings: Mapping[str, Any], key: str, count: int) -> tuple[float, ...]:
    factors = settings[key]
    if not isinstance(factors, list) or len(factors) != count:
        raise ConfigError(f"longrope's {key} must be a list of {count} numbers, one per turning pair")
    return tuple(_positive(factor, key) for factor in factors)


def positive_number(hf: Mapping[str, Any], key: str) -> float:
    """A field that must be a number above 0.

    Raises:
        ConfigError: it is none.
        KeyError: it is missing.
    """
    return _positive(hf[key], key)


def positive_integer(hf: Mapping[str, Any], key: str, most: int = 2**31 - 1) -> int:
    """A field that must be a whole number from 1 to `most`; raises as `positive_number`."""
    value = hf[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ConfigError(f"{key}={in_one_line(repr(value))} is not an integer from 1 to {most}")
    return value


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"{key}={in_one_line(repr(value))} is not a positive number")
    return float(value)
