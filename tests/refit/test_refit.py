"""vLLM's sampled log-probabilities are the actor's, before and after updates and refits, at every layout.

An engine that starts without weights refuses to sample, and after a refit is the one that read them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from families import KINDS, make_checkpoint
from processes import run_script

from nemo_r3.refit import refit

PROBE = Path(__file__).with_name("probe.py")
ALL = sorted(KINDS, key=lambda kind: "moe" not in kind)
"""Experts first: of a process's models, vLLM asks the first alone whether they need a group for experts."""
SETTINGS = """
actor: {precision: fp32, lr: 1.0e-3, microbatch_tokens: 512}
rollout: {max_model_len: 256, max_answer_tokens: 32, max_reflection_tokens: 32, max_num_seqs: 16}
train: {steps: 10}
"""


def test_weights_wake_before_they_are_replaced_and_the_cache_afterwards() -> None:
    calls: list[Any] = []
    engine: Any = SimpleNamespace(
        wake=lambda *tags: calls.append(tags), load=lambda weights, version: calls.append((dict(weights), version))
    )
    policy: Any = SimpleNamespace(version=3, export_hf=lambda: iter([("head", "a tensor")]))
    refit(policy, engine)
    assert calls == [("weights",), ({"head": "a tensor"}, 3), ("kv_cache",)]


def launch(home: Path, kinds: Iterable[str], ranks: int, *overrides: str) -> dict[str, dict[str, Any]]:
    yaml, out = home / "refit.yaml", home / "out.json"
    yaml.write_text(SETTINGS)
    for kind in kinds:
        make_checkpoint(home / kind, kind)
    models = ",".join(str(home / kind) for kind in kinds)
    run_script(PROBE, yaml, out, models, *overrides, ranks=ranks)
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("kinds", "ranks", "overrides"),
    [
        pytest.param(ALL, 1, ["rollout.temperature=0.7"], id="every_family"),
        pytest.param(
            [kind for kind in ALL if "moe" not in kind],  # experts need sequence parallelism
            2,
            ["rollout.temperature=1.0", "actor.tensor_parallel=2", "rollout.tensor_parallel=2"],
            marks=pytest.mark.slow,
            id="every_family_tp2_engine_of_2",
        ),
        pytest.param(
            ["qwen3_moe", "qwen3_moe_tied"],
            2,
            ["rollout.temperature=1.0", "actor.expert_parallel=2", "rollout.tensor_parallel=2"],
            marks=pytest.mark.slow,
            id="ep2_engine_of_2",
        ),
        pytest.param(
            ["qwen3_moe", "qwen2", "qwen3"],
            2,
            ["rollout.temperature=0.7", "actor.tensor_parallel=2", "actor.sequence_parallel=true"],
            marks=pytest.mark.slow,
            id="tp2_sp",
        ),
        pytest.param(
            ["llama_tied", "phi3_long"],
            2,
            ["rollout.temperature=1.0", "actor.pipeline_parallel=2", "rollout.tensor_parallel=2"],
            marks=pytest.mark.slow,
            id="pp2_engine_of_2",
        ),
    ],
)
def test_engine_and_actor_agree(tmp_path: Path, kinds: Iterable[str], ranks: int, overrides: list[str]) -> None:
    results = launch(tmp_path, kinds, ranks, *overrides)
    assert list(results) == list(kinds)
    same = [found["same"] for found in results.values() if "same" in found]
    assert same == [[True, True]] * 2  # greedy and sampled: ids, log-probabilities, version
    for kind, found in results.items():
        assert "the engine started without weights" in found["refused"]
        for version, result in enumerate(found["rounds"]):
            assert result["error"] < 1e-4, kind  # seen: 8e-6
            assert result["reported"] - 1 < 1e-4, kind
            assert result["versions"] == [version], kind
            assert result["moved"] > 0.1, kind  # so that a stale engine could not pass
