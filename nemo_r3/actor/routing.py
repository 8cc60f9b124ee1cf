"""Rollout routing replay (arXiv 2510.11370): the actor sends tokens to the experts to which vLLM sent them.

Only the choice is vLLM's. The weights of the chosen experts are those of the actor's own router, with their gradient.

A microbatch brings its experts, as it brings its layout, in what megatron-core hands to every layer. So each layer has
those of the microbatch under way: in a pipeline, where several are, and when the backward pass runs a layer again.
megatron-core's own `RouterReplay` is global and keeps a queue, which would have to be filled in that order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from nemo_r3.actor.model import Trunk


class RoutingReplay:
    """Has the routers of this rank's stage follow vLLM's, where a microbatch says what these chose."""

    def __init__(self, trunk: Trunk, device: torch.device) -> None:
        self._seen = torch.zeros(2, dtype=torch.int64, device=device)
        for layer in trunk.decoder.layers:
            layer.mlp.router.router_replay = replay = _Replay(layer.layer_number - 1, self._seen)
            layer.register_forward_pre_hook(replay.take, with_kwargs=True)

    def start_counting(self) -> None:
        """Forgets what `mismatch` has counted so far."""
        self._seen.zero_()

    def mismatch(self) -> float:
        """The share of (token, layer) pairs, over all ranks, whose experts the actor would have chosen differently.

        All ranks call this together. Every pass since `start_counting` counts, among the pairs and among those that
        differ; full recompute makes two passes of one.
        """
        total = self._seen.clone()
        dist.all_reduce(total)
        differ, count = total.tolist()
        return differ / max(count, 1)


class _Replay:
    """Stands where a router looks for megatron-core's `RouterReplay`."""

    def __init__(self, layer: int, seen: Tensor) -> None:
        """`seen` counts the tokens whose choices differ, and all."""
        self._layer, self._seen = layer, seen
        self._routed: Tensor | None = None

    def take(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes the layer's experts from a microbatch, before the layer runs."""
        routed = kwargs["packed_seq_params"].routed_experts
        self._routed = None if routed is None else routed[:, self._layer]

    def get_replay_topk(
        self, scores: Tensor, topk: int, groups: int | None, group_topk: int | None, choose: Callable[..., Any]
    ) -> tuple[Tensor, Tensor]:
        """Scores [tokens, top_k] and numbers [tokens, top_k] of the experts for `scores` [tokens, experts].

        Sequence parallelism gives each rank its part of the tokens. Dummy tokens, at the end, go where the router sends
        them: nothing attends to them, and they predict nothing.
        """
        if self._routed is None:
            own: tuple[Tensor, Tensor] = choose(scores, topk, groups, group_topk)
            return own
        with torch.no_grad():
            _, experts = choose(scores, topk, groups, group_topk)
            start = parallel_state.get_tensor_model_parallel_rank() * len(scores)
            routed = self._routed[start : start + len(scores)].long()
            self._routed = None  # what is made in an update does not outlive it
            differ = (routed.sort(-1).values != experts[: len(routed)].sort(-1).values).any(-1)
            self._seen += torch.stack([differ.sum(), differ.new_full((), len(differ), dtype=torch.int64)])
            experts = torch.cat([routed, experts[len(routed) :]])
        return scores.gather(1, experts), experts
