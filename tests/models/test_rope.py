"""Rotary positions of a config.json, from wherever transformers has kept them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from config_json import LLAMA, write
from paper_models import shape
from refusals import refusal

from nemo_r3.models import architecture_of
from nemo_r3.models.rope import Llama3, LongRope, Rope

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
STRETCHED: dict[str, Any] = LONGROPE | {"type": "longrope", "original_max_position_embeddings": 128}


@pytest.mark.parametrize(
    "change", [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5}}, {"rope_scaling": None, "rope_theta": 5e5}]
)
def test_theta_is_found_where_transformers_has_kept_it(tmp_path: Path, change: dict[str, Any]) -> None:
    assert architecture_of(write(tmp_path, json.dumps(LLAMA | change))).rope.theta == 5e5


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_llama3s_scaling_is_read(tmp_path: Path, place: str, key: str) -> None:
    found = architecture_of(write(tmp_path, json.dumps(LLAMA | {place: LLAMA3 | {key: "llama3"}, "rope_theta": 5e5})))
    assert found.rope == Rope(5e5, 16, Llama3(8.0, 1.0, 4.0, 128))
    assert found.rope.regime(64) == found.rope.regime(512) == "only"


@pytest.mark.parametrize("kind", ["longrope", "su"])
@pytest.mark.parametrize("inside", [True, False])
def test_longrope_is_read_and_its_factors_follow_the_longest_sequence(tmp_path: Path, kind: str, inside: bool) -> None:
    original = {"original_max_position_embeddings": 128}
    scaling = LONGROPE | {"type": kind} | (original if inside else {})
    hf = LLAMA | {"architectures": ["Phi3ForCausalLM"], "rope_scaling": scaling} | ({} if inside else original)
    found = architecture_of(write(tmp_path, json.dumps(hf)))
    magnitude = math.sqrt(1 + math.log(4) / math.log(128))
    assert found.rope == Rope(1e4, 16, LongRope((1.0,) * 8, (4.0,) * 8, 128, magnitude))
    assert (found.rope.regime(128), found.rope.regime(129)) == ("short", "long")


@pytest.mark.parametrize("place", [{"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}])
def test_a_share_of_the_head_may_turn_where_transformers_can(tmp_path: Path, place: dict[str, Any]) -> None:
    phi = {"architectures": ["Phi3ForCausalLM"]}
    assert architecture_of(write(tmp_path, json.dumps(LLAMA | phi | place))).rope.dim == 8
    message = refusal(lambda: architecture_of(write(tmp_path, json.dumps(LLAMA | place))))
    assert "partial_rotary_factor is not supported: vLLM rotates 8 of a head's 16 channels, transformers all" in message


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (LLAMA3 | {"type": "dynamic"}, "rope type 'dynamic' is not supported (only 'default', 'llama3' and 'longrope'"),
        (LLAMA3 | {"rope_type": "llama3", "factor": 0}, "factor=0 is not a positive number"),
        (LLAMA3 | {"rope_type": "llama3", "low_freq_factor": 4.0}, "low_freq_factor=4 is not below high_freq_factor=4"),
        ({"rope_type": "llama3"}, "config.json of {} lacks 'low_freq_factor'"),
        (LONGROPE | {"type": "longrope"}, "lacks 'original_max_position_embeddings'"),
        (STRETCHED | {"factor": 3.0}, "longrope's factor=3.0 is not supported: only 4"),
        (
            LONGROPE | {"type": "longrope", "original_max_position_embeddings": 1},
            "longrope's original_max_position_embeddings=1 makes no magnitude",
        ),
        (STRETCHED | {"long_mscale": 1.2}, "longrope's long_mscale is not supported"),
        (STRETCHED | {"long_factor": [1.0] * 7}, "longrope's long_factor must be a list of 8 numbers"),
        ({"partial_rotary_factor": 0.05}, "partial_rotary_factor=0.05 of a head's 16 channels makes no pairs"),
        ({"full_attention": {"rope_type": "default"}}, "rope settings per layer type (full_attention)"),
    ],
)
def test_rotary_positions_that_the_actor_does_not_compute_are_refused(
    tmp_path: Path, rope: dict[str, Any], expected: str
) -> None:
    message = refusal(lambda: architecture_of(write(tmp_path, json.dumps(LLAMA | {"rope_scaling": rope}))))
    assert message.startswith("model.path: ") and expected.format(tmp_path) in message


def test_phi_turns_as_its_authors_say() -> None:
    scaling = shape("phi-3.5-mini").rope.scaling
    assert isinstance(scaling, LongRope) and len(scaling.short) == len(scaling.long) == 48
    assert scaling.magnitude == pytest.approx(1.190238)  # of Microsoft's modeling_phi3.py: sqrt(1 + ln 32 / ln 4096)
