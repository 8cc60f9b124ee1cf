"""An update with a vocabulary of 150,000 in less memory than its logits at all trained positions would take."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch
from lab import Lab
from shared import rows_of

from nemo_r3.actor import head, heap
from nemo_r3.config import Config
from nemo_r3.types import UpdateBatch

VOCAB = 150_000
GROUPS = [(60, [256] * 8)]
ROOM = 900 * 2**20
"""Bytes that the update may add; float32 logits at its 2,048 trained positions alone take 1,170 MiB."""


def ceiling(lab: Lab) -> None:
    """Runs the update under the limit, and again with a head that would make all logits at once."""
    config = make_model(lab.home / "wide")
    heap.keep_freed_memory = lambda: None  # what is freed is given back: holes in the heap would count as used
    from nemo_r3.actor.policy import Policy  # after `Lab` has started the world
    from nemo_r3.actor.trainer import Trainer

    trainer = Trainer(Policy(config, lab.world))
    batch = UpdateBatch(tuple(rows_of(GROUPS)), (), 1, 0)
    trainer.update(UpdateBatch(tuple(rows_of([(60, [8])])), (), 1, 0))  # the optimizer's state exists from here on
    found: dict[str, Any] = {"chunked": attempt(lambda: trainer.update(batch)["grad_norm"])}
    head.CHUNK_ELEMENTS["cpu"] = 2**40
    found["at_once"] = attempt(lambda: trainer.update(batch)["grad_norm"])
    lab.note("ceiling", found)


def attempt(act: Any) -> float | str:
    """What `act` gives while this process may grow by no more than ROOM."""
    used = next(int(line.split()[1]) for line in Path("/proc/self/status").open() if line.startswith("VmData"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used * 1024 + ROOM, hard))
    try:
        return float(act())
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def make_model(path: Path) -> Config:
    from transformers import AutoModelForCausalLM, LlamaConfig

    shape = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(path)
    config = Config()
    config.model.path = str(path)
    config.actor.precision = "fp32"
    config.rollout.max_model_len = 512
    return config
