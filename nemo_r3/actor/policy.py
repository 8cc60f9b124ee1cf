"""`Policy`: the model on megatron-core, on all ranks at once (SPMD). It scores sequences and exports its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from megatron.core import parallel_state
from torch import Tensor

from nemo_r3.actor import cpu, heap
from nemo_r3.actor.lora import Lora
from nemo_r3.actor.model import build_model, start_parallel_groups
from nemo_r3.actor.pipeline import Pipeline
from nemo_r3.actor.rotary import Rotary
from nemo_r3.actor.routing import RoutingReplay
from nemo_r3.actor.weights import export_hf, load_hf
from nemo_r3.algo.balance import Balance
from nemo_r3.algo.packing import Microbatch, pack
from nemo_r3.config import Config
from nemo_r3.models import architecture_of, fingerprint, model_path
from nemo_r3.models.flops import scoring_cost, training_cost
from nemo_r3.precision import precision_of
from nemo_r3.runtime import World
from nemo_r3.types import Row

Scores = dict[tuple[int, ...], Tensor]
"""Log-probabilities [trained] of a microbatch's targets, by the microbatch's rows; empty except on the last stage."""


class Policy:
    """This rank's shard of the policy; a `Trainer` changes its weights.

    Every method is collective: all ranks call it together with the same arguments.

    Attributes:
        config: the run's settings.
        world: all ranks.
        arch: the model's shape.
        fingerprint: of the starting checkpoint.
        version: how many optimizer steps the weights have seen; stamped on every sampled token.
        module: this rank's stage of the model.
        lora: what is trained of it; None if that is all weights.
        replay: what makes its routers follow vLLM's; None without `actor.routing_replay`.
        pipeline: runs microbatches through all stages.
    """

    def __init__(self, config: Config, world: World, with_weights: bool = True) -> None:
        """Builds the model and reads the starting checkpoint.

        Args:
            config: the run's settings; of a policy that is not trained, `without_fp8`.
            world: all ranks.
            with_weights: False leaves the weights to `checkpoint.load_weights`, which must come first; with LoRA it
                needs the starting ones, so they are read all the same.

        Raises:
            ConfigError: the checkpoint does not exist or does not fit its config.json.
        """
        cpu.prepare()
        heap.keep_freed_memory()
        checkpoint = model_path(config)
        self.config, self.world = config, world
        self.arch = architecture_of(checkpoint)
        self.fingerprint = fingerprint(checkpoint, self.arch)
        self.version = 0
        with cpu.cuda_stand_in():
            start_parallel_groups(config)
            self.module = build_model(config, self.arch, world)
            if with_weights or config.actor.lora_rank:
                load_hf(self.module, self.arch, checkpoint)
        self.lora = Lora(self.module, self.arch, config) if config.actor.lora_rank else None
        self.replay = RoutingReplay(self.module, world.device) if config.actor.routing_replay else None
        rotary = Rotary.of(self.arch.rope, config.rollout.max_model_len, world.device)
        self.pipeline = Pipeline(self.module, self.arch.vocab_size, rotary, config.rollout.temperature)
        torch.cuda.empty_cache()  # for the engine, which starts next

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Log-probabilities of every token but the first, at the rollout temperature.

        Returns:
            One [length - 1] float32 tensor per sequence, on the CPU, on every rank.
        """
        rows = [_scored_row(ids) for ids in sequences]
        microbatches, _ = self.microbatches(rows)
        own: dict[int, Tensor] = {}
        with cpu.cuda_stand_in():
            scores = self.logprobs(microbatches)
        for numbers, logprobs in scores.items():
            lengths = [len(rows[number]) - 1 for number in numbers]
            own.update(zip(numbers, logprobs.cpu().split(lengths), strict=True))
        merged = self.world.merge(own)
        return [merged[number] for number in range(len(rows))]

    def export_hf(self) -> Iterator[tuple[str, Tensor]]:
        """Streams the weights under their Hugging Face names; every rank iterates to the end, in lockstep."""
        return export_hf(self.module, self.arch)

    def microbatches(self, rows: Sequence[Row]) -> tuple[list[Microbatch], tuple[float, float]]:
        """This rank's microbatches, and the FLOPs of training on all rows and of scoring them.

        Shared contexts count once, and no padding.
        """
        actor = self.config.actor
        if not actor.shared_context:
            rows = [replace(row, shared=0) for row in rows]
        cost = training_cost(self.arch, actor.lora_rank > 0)
        balance = Balance(rows, cost, actor.microbatch_tokens)
        dealt = balance.deal(parallel_state.get_data_parallel_world_size(), stages=actor.pipeline_parallel)
        multiple = precision_of(self.config).row_multiple(actor)
        mine = dealt[parallel_state.get_data_parallel_rank()]
        flops = balance.all_flops(cost), balance.all_flops(scoring_cost(self.arch))
        return [pack(rows, pieces, multiple).to(self.world.device) for pieces in mine], flops

    def logprobs(self, microbatches: Sequence[Microbatch]) -> Scores:
        """The microbatches' `Scores`."""

        def keep_logprobs(_: Microbatch, logprobs: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
            return logprobs.sum(), logprobs

        self.module.eval()
        scores = self.pipeline.run(self.module, microbatches, keep_logprobs, train=False)
        self.module.train()
        return {microbatch.rows: logprobs for microbatch, logprobs in zip(microbatches, scores, strict=False)}


def _scored_row(ids: Sequence[int]) -> Row:
    """A row whose tokens are all targets."""
    count = len(ids)
    zeros = [0.0] * count
    return Row(ids, phases=(), sampled=(), advantages=zeros, loss_weights=[1.0] * count, rollout_logprobs=zeros)
