"""The policy update in one precision, at a real model's layer dimensions: tokens per second, MFU, distance from fp32.

    build/gpu_check/SHAPE                   random weights, made by the first check that needs them
    build/gpu_check/SHAPE-fp32[-lora].json  float32's log-probabilities and gradient norm, by a check in float32

Head, embedding and the layers at the ends are BF16 under FP8 too, and weigh more the fewer layers there are. Times are
linear in the layers: those of an 8B's 32 lie on the line through its 8 and its 16.

Rows are packed after shared contexts, half of each group's retries pass. MFU counts the model's own FLOPs: no
recompute, no padding, and with LoRA no gradients of weights. `peak` is GiB of torch's allocator in an update, 0
on a CPU. A precision that this machine cannot run is skipped with the reason.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_check import command_line
from benchmarks.machine import ROOT
from benchmarks.update import Point, rows_of
from nemo_r3 import fp8_support, memory, runtime
from nemo_r3.config import Config
from nemo_r3.errors import ConfigError
from nemo_r3.models import architecture_of
from nemo_r3.models.flops import speed
from nemo_r3.precision import PRECISIONS
from nemo_r3.types import UpdateBatch
from nemo_r3.units import GIB

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy
    from nemo_r3.actor.trainer import Trainer

ROPE = {"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
LLAMA, MIXTURE = ROPE | {"model_type": "llama"}, ROPE | {"model_type": "qwen3_moe", "norm_topk_prob": True}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
SHAPES = {
    "8b": LLAMA | LLAMA_8B | {"num_hidden_layers": 8, "vocab_size": 128256},  # 8 of Llama-3.1-8B's 32 layers
    "8b-16": LLAMA | LLAMA_8B | {"num_hidden_layers": 16, "vocab_size": 128256},
    "8b-full": LLAMA | LLAMA_8B | {"num_hidden_layers": 32, "vocab_size": 128256},
    "1b": LLAMA  # Llama-3.2-1B
    | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "tie_word_embeddings": True}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "moe": MIXTURE  # 4 of Qwen3-30B-A3B's 48 layers
    | {"hidden_size": 2048, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4}
    | {"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
    | {"vocab_size": 151936},
    "tiny": LLAMA | TINY,
    "tiny-moe": MIXTURE | TINY | {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
LORA_RANK = 32
POINT, SMALL = Point(1024, 256, 8, groups=8), Point(32, 8, 4, groups=2)
WARM, ROUNDS = 2, 5
SCORED = 16
"""Sequences that are compared with float32."""


def tiny(shape: str) -> str:
    """The shape that stands for another with `--small`."""
    return "tiny-moe" if shape == "moe" else "tiny"


def model_of(shape: str) -> Path:
    """The shape's checkpoint, made where it is not there; bf16, so that all precisions begin with the same numbers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = ROOT / "build" / "gpu_check" / shape
    if not (path / "config.json").exists():
        torch.manual_seed(0)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape])).bfloat16()
        making = path.with_name(f"{shape}.making")
        made.save_pretrained(making)
        making.rename(path)
    return path


def config_of(name: str, lora: bool = False) -> Config:
    """The settings of an update in a precision, but for the model's path."""
    config = Config()
    config.actor.precision = name
    config.actor.lr = 0.0
    config.actor.lora_rank = LORA_RANK if lora else 0
    if name == "fp32":  # its activations take twice the room, beside a state as large
        config.actor.microbatch_tokens //= 2
    return config


def started(shape: str, name: str, lora: bool = False) -> Trainer:
    """A policy of the shape in the precision. Its weights stay what they are: every update has the same gradient.

    With `lora` it is that of LoRA's factors, which are all that is trained.

    Raises:
        ConfigError: this machine cannot run the precision.
    """
    config = config_of(name, lora)
    config.model.path = str(model_of(shape))
    world = runtime.start(config)
    fp8_support.prepare(config, architecture_of(Path(config.model.path)))
    from nemo_r3.actor.policy import Policy  # megatron-core and Transformer Engine: after `prepare`
    from nemo_r3.actor.trainer import Trainer

    return Trainer(Policy(config, world))


def batch_of(policy: Policy, shape: str) -> UpdateBatch:
    """What a shape is measured with."""
    point = SMALL if shape.startswith("tiny") else POINT
    return UpdateBatch(tuple(rows_of(point, policy.arch.vocab_size)), (), 1, 0)


def timed(trainer: Trainer, batch: UpdateBatch) -> tuple[float, dict[str, float]]:
    """Seconds of an update, to the device's end of it, and what it says."""
    begun = time.perf_counter()
    metrics = trainer.update(batch)
    if trainer.policy.world.gpu_name:
        torch.cuda.synchronize()
    return time.perf_counter() - begun, metrics


def scores(policy: Policy, batch: UpdateBatch) -> list[list[float]]:
    """Log-probabilities of the first sequences. After updates: delayed scaling begins with scales of 1."""
    return [part.tolist() for part in policy.score([row.ids for row in batch.rows[:SCORED]])]


def float32_of(shape: str, lora: bool = False) -> dict[str, Any] | None:
    """float32's `logprobs` and `grad_norm` at a shape; None before its check has run."""
    file = _float32_file(shape, lora)
    return json.loads(file.read_text()) if file.exists() else None


def _float32_file(shape: str, lora: bool) -> Path:
    return ROOT / "build" / "gpu_check" / f"{shape}-fp32{'-lora' if lora else ''}.json"


def measure(shape: str, name: str, lora: bool) -> dict[str, Any]:
    """What is found, or `skipped` with the reason."""
    try:
        trainer = started(shape, name, lora)
    except ConfigError as error:
        return {"skipped": str(error)}
    policy = trainer.policy
    batch = batch_of(policy, shape)
    if name == "fp32":
        _, metrics = timed(trainer, batch)
        reference = {"logprobs": scores(policy, batch), "grad_norm": metrics["grad_norm"]}
        _float32_file(shape, lora).write_text(json.dumps(reference))
        return {"sequences": len(reference["logprobs"]), "grad_norm": metrics["grad_norm"]}
    runs = [timed(trainer, batch) for _ in range(WARM + ROUNDS)][WARM:]
    median, metrics = statistics.median(seconds for seconds, _ in runs), runs[-1][1]
    found = {"peak": memory.peak() / GIB}
    if (theirs := float32_of(shape, lora)) is not None:
        found |= distance(scores(policy, batch), theirs["logprobs"])
        found["grad_norm_error"] = abs(metrics["grad_norm"] / theirs["grad_norm"] - 1)
    tokens = sum(map(len, batch.rows))
    fast = speed("update", metrics["update_flops"], median, policy.world.size, policy.world.gpu_name, name)
    return found | {"seconds": median, "tokens_per_second": tokens / median, "loss": metrics["loss"]} | fast


def distance(ours: list[list[float]], theirs: list[list[float]]) -> dict[str, float]:
    """How far log-probabilities are from float32's, over all tokens: `prob_error`, its mean, and the largest."""
    gaps = [abs(a - b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True)]
    return {"prob_error": statistics.fmean(map(math.exp, gaps)), "largest_gap": max(gaps)}


def arguments(doc: str, *flags: str) -> argparse.Namespace:
    """The command line of a check of the update, which may have flags of its own; `shape` is tiny with `--small`."""
    parser = command_line(doc)
    parser.add_argument("--shape", choices=("8b", "8b-16", "1b", "moe"), default="8b")
    parser.add_argument("--precision", choices=list(PRECISIONS), default="bf16")
    for flag in flags:
        parser.add_argument(flag, action="store_true")
    options = parser.parse_args()
    if options.small:
        options.shape = tiny(options.shape)
    return options


def main() -> None:
    """Writes what was found as JSON."""
    options = arguments(__doc__, "--lora")
    options.out.write_text(json.dumps(measure(options.shape, options.precision, options.lora)))


if __name__ == "__main__":
    main()
