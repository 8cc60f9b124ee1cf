"""A small run of a random model with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from families import EXPERTS, TINY
from launch import QUICKSTART

from nemo_r3.models import EMBEDDED

EVEN = """
from nemo_r3.types import Problem


def problems(split):
    first = 0 if split == "train" else 100
    return [Problem(f"word-{i}", f"Say the number {i}.", {}) for i in range(first, first + 16)]


def verify(problem, text):
    return len(text) % 2 == 0
"""


def prepare(home: Path, **shape: Any) -> list[str]:
    """Writes a task that random answers pass half of the time, and a model; the arguments of a run in `home/run`.

    The model has random weights, the embedded model's tokenizer and chat template, and a shape unlike `TINY`'s where
    one is given.
    """
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    (home / "even.py").write_text(EVEN)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    tokenizer.save_pretrained(home / "model")
    torch.manual_seed(0)
    settings = TINY | EXPERTS | {"vocab_size": len(tokenizer)} | shape
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings, eos_token_id=tokenizer.eos_token_id)).save_pretrained(home / "model")
    few = ["train.save_every=1", "train.failures_per_step=4", "failures.problems=16", "actor.lr=1e-3"]
    return [QUICKSTART, "task={name: even}", f"model.path={home}/model", f"run.dir={home}/run", *few]
