"""Policies whose tokens are sent to given experts, and what transformers makes of the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from data import GROUPS, LENGTHS, SPLIT, batch_of, plain_steps, sequences, split_batch
from families import EXPERTS, TINY
from lab import Lab
from torch import Tensor, nn

from nemo_r3.types import UpdateBatch

KIND = "qwen3_moe"
LAYERS, COUNT, CHOSEN = TINY["num_hidden_layers"], EXPERTS["num_experts"], EXPERTS["num_experts_per_tok"]


def drawn() -> list[Tensor]:
    """[length - 1, layers, 2] of each of `sequences()`: any experts; those of a group have one context."""
    draw = torch.Generator().manual_seed(4)
    own = [torch.rand(length - 1, LAYERS, COUNT, generator=draw).topk(CHOSEN).indices for length in LENGTHS]
    contexts = {group: own[number][:shared] for number, (group, shared) in reversed(list(enumerate(GROUPS)))}
    return [torch.cat([contexts[group], ids[shared:]]) for ids, (group, shared) in zip(own, GROUPS, strict=True)]


def replayed(batch: UpdateBatch, experts: list[Tensor]) -> UpdateBatch:
    """All `sequences()`, with these experts, in pieces."""
    numbers = [each.to(torch.uint8).numpy() for each in experts]
    rows = [
        replace(row, routed_experts=(chosen[: row.shared], chosen[row.shared :]))
        for row, chosen in zip(batch.rows, numbers, strict=True)
    ]
    return replace(batch, rows=tuple(rows))


def routers(model: Any) -> list[nn.Module]:
    return [layer.mlp.gate for layer in model.model.layers]


def force(model: Any) -> None:
    """Makes transformers' routers choose what was drawn, in a batch of all `sequences()`, filled up."""
    table = torch.zeros(len(LENGTHS), max(LENGTHS), LAYERS, CHOSEN, dtype=torch.int64) + torch.arange(CHOSEN)
    for number, experts in enumerate(drawn()):
        table[number, : len(experts)] = experts

    def forward(router: nn.Module, chosen: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
        def choose(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = nn.functional.linear(hidden.reshape(-1, hidden.shape[-1]), router.weight)
            return logits, logits.gather(1, chosen).softmax(-1), chosen

        return choose

    for number, router in enumerate(routers(model)):
        router.forward = forward(router, table[:, :, number].flatten(0, 1))  # type: ignore[method-assign]


def plain_routed(home: Path) -> list[dict[str, float]]:
    return plain_steps(home, KIND, count=2, updates=SPLIT, change=force)


@torch.no_grad()
def natural(home: Path) -> list[Tensor]:
    """What transformers' routers choose by themselves."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(home / KIND, dtype=torch.float32), []
    for router in routers(model):
        router.register_forward_hook(lambda _, args, output: found.append(output[2]))
    for ids in sequences():
        model(torch.tensor([ids[:-1]]))
    each = [found[start : start + LAYERS] for start in range(0, len(found), LAYERS)]
    return [torch.stack(layers, 1) for layers in each]


def routed(lab: Lab, layout: str, **actor: Any) -> None:
    """Two steps, to the experts that were drawn; and one of tokens that are sent where they would go anyway."""
    name = "-".join(["routed", layout, *(str(value) for value in actor.values())])
    trainer = lab.trainer(layout, KIND, routing_replay=True, **actor)
    metrics = [trainer.update(replayed(split_batch(), drawn())) for _ in range(2)]
    weights = lab.weights(trainer.policy)
    lab.keep(f"{name}-4", weights)
    found = {"metrics": metrics, "same_everywhere": lab.same_everywhere(weights)}
    if layout == "one" and not actor:
        own = replayed(batch_of(), natural(lab.home))
        found["natural"] = lab.trainer(layout, KIND, routing_replay=True).update(own)
        found["free"] = lab.trainer(layout, KIND).update(batch_of())
    lab.note(name, found)
