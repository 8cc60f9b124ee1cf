"""What LoRA has trained, as an adapter in PEFT's format for the starting model: written whole or not at all.

    policy.lora.whole()  -> adapter_model.safetensors   float32   \\
    their ranks          -> adapter_config.json                    > <out>.writing -> <out>
    model_card()         -> README.md                             /
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from nemo_r3.config import Config
from nemo_r3.export import cannot_write, copy_files, replace, save_tensors, write_json
from nemo_r3.models import Architecture, names
from nemo_r3.models.location import TERMS

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy


def export_adapter(policy: Policy, source: Path, out: Path, base: str, card: str) -> None:
    """Writes what a policy's LoRA adds to the starting model; every rank calls this.

    An existing `out` is replaced. The factors stay float32, as they were trained, whatever the model's dtype.

    Args:
        policy: on every rank, with LoRA.
        source: the starting checkpoint, whose terms of use go along.
        out: the directory to write.
        base: what the starting model is loaded by: its name on the hub, or its directory.
        card: the text of README.md.

    Raises:
        UserError: the directory cannot be written. Nothing is left behind.
    """
    assert policy.lora is not None, "with LoRA"
    factors, config = policy.lora.whole(policy.world), policy.config
    out = out.resolve()  # a link to another disk stays one
    writing = out.with_name(f"{out.name}.writing")

    def write() -> None:
        try:
            shutil.rmtree(writing, ignore_errors=True)  # what a killed export left
            writing.mkdir(parents=True)
            tensors = peft_tensors(factors, policy.arch)
            save_tensors(tensors, writing / "adapter_model.safetensors")
            write_json(writing / "adapter_config.json", peft_config(tensors, config, base))
            (writing / "README.md").write_text(card)
            copy_files(source, TERMS, writing)
            if config.dialogue.chat_template is not None:
                shutil.copyfile(config.dialogue.chat_template, writing / "chat_template.jinja")
            replace(out, writing)
        except (OSError, SafetensorError) as error:
            raise cannot_write(out, error) from error
        finally:
            shutil.rmtree(writing, ignore_errors=True)

    policy.world.on_main(write)


def largest_rank(config: Config, arch: Architecture) -> int:
    """The largest rank of the adapter's pairs: a fused tensor's is a multiple of `actor.lora_rank`."""
    return config.actor.lora_rank * max(len(names.matrices(row, arch)) // len(row.hf) for row in names.rows(arch))


def peft_tensors(factors: Mapping[str, Tensor], arch: Architecture) -> dict[str, Tensor]:
    """LoRA's factors by their names in a checkpoint -> by PEFT's, a pair for each Hugging Face tensor.

    Of a fused tensor, which has a pair for each of its matrices, A are one above the other, and B are the blocks of one
    that is zero elsewhere: their product is the same, and its rank the sum of theirs.
    """
    tensors: dict[str, Tensor] = {}
    for row in names.rows(arch):
        pairs = [(factors[f"{name}.lora_A"], factors[f"{name}.lora_B"]) for name, _ in names.matrices(row, arch)]
        if len(pairs) > len(row.hf):
            firsts, seconds = zip(*pairs, strict=True)
            pairs = [(torch.cat(firsts), torch.block_diag(*seconds))]
        for name, (a, b) in zip(row.hf, pairs, strict=False):  # no pairs of what LoRA leaves alone
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    return tensors


def peft_config(tensors: Mapping[str, Tensor], config: Config, base: str) -> dict[str, Any]:
    """adapter_config.json for tensors under PEFT's names; alpha / r is the same for all of them."""
    rank, alpha = config.actor.lora_rank, config.actor.lora_alpha
    ranks = {name.split(".")[-3]: len(a) for name, a in tensors.items() if name.endswith(".lora_A.weight")}
    fused = {module: own for module, own in ranks.items() if own != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": fused,
        "alpha_pattern": {module: _plain(alpha * own / rank) for module, own in fused.items()},
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _plain(alpha: float) -> float:
    """Without a fraction an integer, which some readers insist on."""
    return int(alpha) if alpha.is_integer() else alpha
