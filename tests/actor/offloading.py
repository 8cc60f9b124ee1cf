"""A policy whose optimizer state is on the host between updates, beside one whose state stays, in bf16 and fp32."""

from __future__ import annotations

from typing import Any

import torch
from data import batch_of
from lab import Lab, save_at_work

from nemo_r3.actor import checkpoint
from nemo_r3.actor.manifest import latest
from nemo_r3.actor.offload import state_tensors
from nemo_r3.actor.trainer import Trainer


def offloaded(lab: Lab, layout: str, kind: str = "qwen2") -> dict[str, Any]:
    """Two updates, a checkpoint read by a fresh policy of each sort, a NaN, and a third update, by precision."""
    return {precision: _compared(lab, layout, kind, precision) for precision in ("bf16", "fp32")}


def _compared(lab: Lab, layout: str, kind: str, precision: str) -> dict[str, Any]:
    home = lab.home / f"offload-{layout}-{precision}"
    stays = lab.trainer(layout, kind, precision=precision)
    moves = lab.trainer(layout, kind, precision=precision, offload_optimizer=True)
    found: dict[str, Any] = {"held_at_start": [_held(stays), _held(moves)]}
    metrics = [[trainer.update(batch_of()) for _ in range(2)] for trainer in (stays, moves)]
    found |= {"metrics": metrics[0] == metrics[1], "held": [_held(stays), _held(moves)]}
    found["weights"] = _same(lab.weights(stays.policy), lab.weights(moves.policy))
    save_at_work(moves, home, 2, {}, keep=1)
    found["held_after_save"] = _held(moves)
    found["nan"] = lab.nan(moves)
    again = [lab.trainer(layout, kind, precision=precision, offload_optimizer=offloads) for offloads in (False, True)]
    for trainer in again:
        checkpoint.load(trainer, latest(home))
    found["held_after_load"] = _held(again[1])
    trainers = [stays, moves, *again]
    last = [trainer.update(batch_of()) for trainer in trainers]
    states = [_state(trainer) for trainer in trainers]
    found["third"] = [one == last[0] for one in last]
    found["states"] = [_same(one, states[0]) for one in states]
    found["parts"] = len(states[0])
    return found


def _held(trainer: Trainer) -> list[int]:
    held = trainer.held()
    return [held["optimizer state"], held["gradients"]]


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    with trainer.at_work():
        return {str(number): tensor.clone() for number, tensor in enumerate(state_tensors(trainer.optimizer.parts))}


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
