"""The tiny models of the layout tests, the batches they train on, and what transformers makes of both."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import torch
from families import VOCAB
from safetensors.torch import save_file
from torch.nn.utils import parametrize

from nemo_r3.types import Phase, Row, UpdateBatch

TEMPERATURES = (0.7, 1.0)
LENGTHS = (25, 60, 33, 97, 120, 7, 90)
PROMPTS = (20, 25, 20, 61, 70, 4, 71)
GROUPS = ((0, 20), (0, 20), (0, 20), (1, 61), (1, 61), (2, 4), (3, 71))  # of each row: its group, what that shares
TENSORS = dict[str, torch.Tensor]
SPLIT = (range(3), range(3, len(LENGTHS)))
"""The rows of each update of a step that has two."""


def make_models(home: Path) -> None:
    """One tiny checkpoint of each family and head, and transformers' log-probabilities of `sequences()`."""
    expected: TENSORS = {}
    filled = torch.tensor([ids + [0] * (max(LENGTHS) - len(ids)) for ids in sequences()])  # causal: filling is unseen
    for kind in families.KINDS:
        model = families.make_checkpoint(home / kind, kind)
        with torch.no_grad():
            logits = model(filled).logits
        for number, ids in enumerate(sequences()):
            for temperature in TEMPERATURES:
                logprobs = torch.log_softmax(logits[number, : len(ids) - 1] / temperature, -1)
                expected[f"{kind} {temperature} {number}"] = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    save_file(expected, home / "transformers.safetensors")


def sequences() -> list[list[int]]:
    """Seven sequences; those of a group begin alike."""
    draw = torch.Generator().manual_seed(3)
    drawn = [torch.randint(0, VOCAB, (length,), generator=draw).tolist() for length in LENGTHS]
    contexts = {group: drawn[number][:shared] for number, (group, shared) in reversed(list(enumerate(GROUPS)))}
    return [contexts[group] + ids[shared:] for ids, (group, shared) in zip(drawn, GROUPS, strict=True)]


class LowRank(torch.nn.Module):
    """W + 32 / rank * B A."""

    def __init__(self, name: str, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        digest = hashlib.sha256(f"1 {name}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        uniform = 2 * torch.rand(rank, weight.shape[1], generator=draw) - 1
        self.a = torch.nn.Parameter(uniform / math.sqrt(weight.shape[1]))
        self.b = torch.nn.Parameter(torch.zeros(weight.shape[0], rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + 32 / len(self.a) * self.b @ self.a


def lower(model: torch.nn.Module, rank: int) -> None:
    """Leaves nothing to train but LoRA of the layers' matrices."""
    model.requires_grad_(False)
    for name, part in list(model.named_modules()):
        if isinstance(part, torch.nn.Linear) and "layers" in name:
            parametrize.register_parametrization(part, "weight", LowRank(f"{name}.weight", part.weight, rank))


def merged(model: Any) -> Any:
    """A model with its usual parameters."""
    for part in model.modules():
        if parametrize.is_parametrized(part):
            parametrize.remove_parametrizations(part, "weight")
    return model


def plain_steps(
    home: Path,
    kind: str,
    count: int = 3,
    updates: Sequence[range] = (range(len(LENGTHS)),),
    lora_rank: int = 0,
    change: Callable[[Any], None] = lambda model: None,
) -> list[dict[str, float]]:
    """What `Lab.trial`'s first steps should give, by transformers, torch's AdamW and the formulas as they stand.

    `change` is what the trained model has that the reference lacks.
    """
    from transformers import AutoModelForCausalLM

    filled = torch.tensor([ids + [0] * (max(LENGTHS) - len(ids)) for ids in sequences()])
    rows = batch_of().rows
    weights, advantages = torch.zeros(filled.shape), torch.zeros(filled.shape)
    for number, row in enumerate(rows):
        weights[number, : len(row)] = torch.tensor(row.loss_weights)
        advantages[number, : len(row)] = torch.tensor(row.advantages)
    weights, advantages = weights[:, 1:], advantages[:, 1:]

    def logprobs_of(network: torch.nn.Module) -> torch.Tensor:
        logits = network(filled).logits[:, :-1] / 0.7
        return torch.log_softmax(logits, -1).gather(2, filled[:, 1:, None])[..., 0]

    model, frozen = (AutoModelForCausalLM.from_pretrained(home / kind, dtype=torch.float32) for _ in range(2))
    change(model)
    if lora_rank:
        lower(model, lora_rank)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-5)
    with torch.no_grad():
        reference = logprobs_of(frozen)
    metrics = []
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 8)) / 2
        found = {"loss": 0.0, "kl": 0.0, "grad_norm": 0.0, "clipped": 0.0}
        for number, rows_of_it in enumerate(updates):
            logprobs, share = logprobs_of(model), torch.zeros_like(weights)
            share[rows_of_it] = weights[rows_of_it]
            if number == 0:
                old = logprobs.detach()
            ratio = torch.exp(logprobs - old)
            drift = torch.exp(reference - logprobs) - (reference - logprobs) - 1
            policy = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            loss, kl = (share * (policy + 0.2 * drift)).sum(), (share * drift).sum()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            beyond = torch.where(advantages > 0, ratio > 1.2, ratio < 0.8)[share > 0].sum() / (weights > 0).sum()
            for name, value in (("loss", loss), ("kl", kl), ("grad_norm", norm)):
                found[name] += value.item() / len(updates)
            found["clipped"] += beyond.item()
        metrics.append(found)
    merged(model).save_pretrained(home / "plain")
    low = f"-lora_rank={lora_rank}" if lora_rank else ""
    (home / "plain" / "model.safetensors").rename(
        home / f"plain-{kind}{low}-{count * len(updates)}.weights.safetensors"
    )
    return metrics


def batch_of(rows: Sequence[int] = range(len(LENGTHS))) -> UpdateBatch:
    """Rows with an uneven prompt, uneven advantages of both signs, and uneven weights that sum to 1."""
    made, total = [], 0.0
    for number in rows:
        ids = sequences()[number]
        draw = torch.Generator().manual_seed(number)
        prompt = PROMPTS[number]
        trained = len(ids) - prompt
        weights = (0.5 + torch.rand(trained, generator=draw)).tolist()
        logprobs = (-4 - 2 * torch.rand(trained, generator=draw)).tolist()
        advantage = (-1) ** number * (0.4 + 0.2 * number)
        made.append(
            Row(
                ids,
                [Phase.TASK] * prompt + [Phase.REFLECTION] * trained,
                [False] * prompt + [True] * trained,
                [0.0] * prompt + [advantage] * trained,
                [0.0] * prompt + weights,
                [0.0] * prompt + logprobs,
                *GROUPS[number],
            )
        )
        total += sum(weights)
    scaled = [replace(row, loss_weights=[weight / total for weight in row.loss_weights]) for row in made]
    return UpdateBatch(tuple(scaled), (), 1, 0)


def split_batch() -> UpdateBatch:
    rows = batch_of().rows
    return UpdateBatch(tuple(replace(row, update=int(number in SPLIT[1])) for number, row in enumerate(rows)), (), 1, 0)


def broken(batch: UpdateBatch, number: int, **columns: Any) -> UpdateBatch:
    rows = list(batch.rows)
    rows[number] = replace(rows[number], **columns)
    return replace(batch, rows=tuple(rows))
