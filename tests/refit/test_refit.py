"""vLLM's sampled log-probabilities are the actor's, before and after updates and refits, at every layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SETTINGS = """
actor: {precision: fp32, lr: 1.0e-3, microbatch_tokens: 512}
rollout: {max_model_len: 256, max_answer_tokens: 32, max_reflection_tokens: 32, max_num_seqs: 16}
train: {steps: 10}
"""


def checkpoint(path: Path, kind: str, tied: bool) -> Path:
    """A tiny checkpoint whose every weight is random, with 131 tokens, which tensor parallelism has to pad."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    shape = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = {"llama": LlamaConfig, "qwen2": Qwen2Config}[kind](
        vocab_size=131, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=tied, **shape
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1)
    model.save_pretrained(path)
    return path


def launch(home: Path, kind: str, tied: bool, ranks: int, *overrides: str) -> list[dict[str, Any]]:
    yaml, out = home / "refit.yaml", home / "out.json"
    yaml.write_text(SETTINGS)
    model = checkpoint(home / kind, kind, tied)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, str(Path(__file__).with_name("probe.py")), model, yaml, out, *overrides],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("kind", "tied", "ranks", "overrides"),
    [
        pytest.param("qwen2", True, 1, ["rollout.temperature=0.7"], id="qwen2_tied"),
        pytest.param("llama", False, 1, ["rollout.temperature=1.0"], marks=pytest.mark.slow, id="llama_untied"),
        pytest.param(
            "qwen2",
            False,
            2,
            ["rollout.temperature=0.7", "actor.tensor_parallel=2", "actor.sequence_parallel=true"],
            marks=pytest.mark.slow,
            id="qwen2_untied_tp2_sp",
        ),
        pytest.param(
            "llama",
            True,
            2,
            ["rollout.temperature=1.0", "actor.pipeline_parallel=2", "rollout.tensor_parallel=2"],
            marks=pytest.mark.slow,
            id="llama_tied_pp2_engine_of_2",
        ),
    ],
)
def test_engine_and_actor_agree(tmp_path: Path, kind: str, tied: bool, ranks: int, overrides: list[str]) -> None:
    results = launch(tmp_path, kind, tied, ranks, *overrides)
    for version, result in enumerate(results):
        assert result["error"] < 1e-4
        assert result["reported"] - 1 < 1e-4
        assert result["versions"] == [version]
        assert result["moved"] > 0.1  # so that a stale engine could not pass
