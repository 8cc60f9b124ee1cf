"""verl's side of an update: its FSDP actor and reference workers on a given workload, in one process, without Ray.

    python -m benchmarks.verl_worker WORKLOAD.json

    step N        the reference's log-probabilities and an update of the actor, timed
    loss WEIGHTS  verl's loss and gradient norm of the weights in WEIGHTS on the workload's check

The reflections are random tokens of the workload's lengths; nothing is sampled. The calls are those of verl's trainer
(`verl/trainer/ppo/v1/trainer_base.py`), which hands the same batches over through a queue. What had to be changed for
a CPU, always in verl's favour or to make it run at all, is in `OnCPU` and `adapt`.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file
from tensordict import TensorDict
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from verl.plugin.platform import set_platform
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.utils.tensordict_utils import assign_non_tensor, get, get_tensordict
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.utils.losses import ppo_loss
from verl.workers.utils.padding import response_from_nested

from benchmarks.timing import Stopwatch
from benchmarks.worker import serve
from benchmarks.workload import SPECIAL, Context, Workload

Ids = list[list[int]]
METRICS = {"loss": "loss", "grad_norm": "grad_norm", "kl": "kl_loss"}
LONE_RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


class OnCPU(PlatformCUDA):
    """A platform as verl's plugins define them; it has none for a CPU.

    What its metrics ask of a GPU (memory, the name) is answered with nothing.
    """

    device_name = "cpu"
    device_module = SimpleNamespace(
        is_available=lambda: False,
        empty_cache=lambda: None,
        synchronize=lambda: None,
        get_device_name=lambda: "CPU",
        mem_get_info=lambda: (0, 0),
        memory_allocated=lambda: 0,
        memory_reserved=lambda: 0,
        max_memory_allocated=lambda: 0,
        max_memory_reserved=lambda: 0,
    )

    def current_device(self) -> torch.device:
        """Where verl moves tensors to."""
        return torch.device("cpu")

    def communication_backend_name(self) -> str:
        """gloo."""
        return "gloo"


def adapt() -> None:
    """What verl does otherwise on a GPU.

    - Its FSDP engine is registered for "cuda" and "npu" only.
    - It starts a process group "cpu:gloo,cpu:gloo", which torch refuses, unless there is one.
    - It offloads the reference to pinned host memory, of which a CPU has none.
    """
    set_platform(OnCPU())
    os.environ |= LONE_RANK | {"VERL_ENGINE_DEVICE": "cuda"}
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    offload = transformer_impl.CPUOffloadPolicy
    transformer_impl.CPUOffloadPolicy = lambda pin_memory: offload(pin_memory=False)


def settings(workload: Workload) -> DictConfig:
    """verl's own configuration with the workload's settings and the fastest ones that leave the mathematics alone.

    FSDP2, as FSDP1 refuses a CPU. A microbatch is as long as the longest row and so holds one row without padding. Two
    rows take 10 % more CPU time padded, and 33 % more packed, which without flash attention masks all pairs of tokens.
    verl's fused head and parameters that stay gathered save nothing here.
    """
    contexts = [context for step in workload.steps for context in step]
    fp32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}
    chosen = {
        "model.path": workload.model,
        "model.override_config.attn_implementation": "sdpa",
        "model.enable_gradient_checkpointing": False,
        "model.use_remove_padding": True,
        "rollout.name": "vllm",
        "rollout.n": workload.group,
        "actor.strategy": "fsdp2",
        "actor.fsdp_config.mixed_precision": fp32,
        "ref.fsdp_config.mixed_precision": fp32,
        "actor.use_dynamic_bsz": True,
        "rollout.log_prob_use_dynamic_bsz": True,
        "actor.ppo_max_token_len_per_gpu": max(len(context.prompt) + max(context.lengths) for context in contexts),
        "actor.ppo_mini_batch_size": len(workload.steps[0]),
        "actor.loss_agg_mode": "seq-mean-token-mean",
        "actor.use_kl_loss": True,
        "actor.kl_loss_coef": workload.kl_beta,
        "actor.optim.lr": workload.lr,
        "actor.optim.weight_decay": 0.0,
        "actor.optim.clip_grad": workload.clip_grad,
    }
    with initialize_config_module("verl.trainer.config", version_base=None):
        defaults = compose("ppo_trainer").actor_rollout_ref
    for name, value in chosen.items():
        OmegaConf.update(defaults, name, value, force_add=True)
    return defaults


class Bench:
    """An actor and a reference as verl's trainer has them."""

    def __init__(self, workload: Workload) -> None:
        """Loads both."""
        adapt()
        config = settings(workload)
        self.workload = workload
        self.actor, self.reference = (ActorRolloutRefWorker(config, role) for role in ("actor", "ref"))
        self.actor.init_model()
        self.reference.init_model()

    def step(self, number: int) -> dict[str, Any]:
        """One update with its times."""
        contexts = self.workload.steps[number]
        draw, vocabulary = random.Random(number), self.actor.actor.model_config.hf_config.vocab_size
        completions = [
            [[draw.randrange(len(SPECIAL), vocabulary) for _ in range(length)] for length in context.lengths]
            for context in contexts
        ]
        data = self._batch(contexts, completions, [advantages(context.rewards) for context in contexts])
        watch = Stopwatch()
        with watch.time("old"):
            data["old_log_probs"] = self._log_probs(self.actor.compute_log_prob, data, calculate_entropy=True)
        with watch.time("update"):
            with watch.time("reference"):
                data["ref_log_prob"] = self._log_probs(self.reference.compute_ref_log_prob, data)
            metrics = self._update(data)
        return {"wall": watch.wall, "cpu": watch.cpu, "metrics": metrics}

    def loss(self, weights: Path) -> dict[str, Any]:
        """verl's loss on the check's batch, with its own reference; the update that follows is of no interest."""
        check, actor = self.workload.check, self.actor.actor
        whole = StateDictOptions(full_state_dict=True, strict=False)
        set_model_state_dict(actor.engine.module, load_file(weights), options=whole)
        actor.set_loss_fn(
            partial(ppo_loss, config=replace(actor.loss_fn.keywords["config"], kl_loss_coef=check.kl_beta))
        )
        data = self._batch(check.contexts, check.completions, check.advantages)
        data["old_log_probs"] = self._log_probs(self.actor.compute_log_prob, data)
        data["ref_log_prob"] = self._log_probs(self.reference.compute_ref_log_prob, data)
        return self._update(data)

    def _batch(
        self, contexts: Sequence[Context], completions: Sequence[Ids], advantages: Sequence[Sequence[float]]
    ) -> TensorDict:
        """The rows as verl's trainer gets them, nested and without padding."""
        rows = [
            (context.prompt, ids, advantage)
            for context, *group in zip(contexts, completions, advantages, strict=True)
            for ids, advantage in zip(*group, strict=True)
        ]
        mask = nested([1] * len(ids) for _, ids, _ in rows)
        tensors = {
            "prompts": nested(prompt for prompt, _, _ in rows),
            "responses": nested(ids for _, ids, _ in rows),
            "input_ids": nested(prompt + ids for prompt, ids, _ in rows),
            "position_ids": nested(range(len(prompt) + len(ids)) for prompt, ids, _ in rows),
            "response_mask": mask,
            "loss_mask": mask,
            "advantages": nested([advantage] * len(ids) for _, ids, advantage in rows),
        }
        return get_tensordict(tensors, {"temperature": self.workload.temperature})

    def _log_probs(
        self, compute: Callable[[TensorDict], TensorDict], data: TensorDict, calculate_entropy: bool = False
    ) -> torch.Tensor:
        """Of the responses: nested [rows][tokens]."""
        asked = data.copy()
        assign_non_tensor(asked, calculate_entropy=calculate_entropy, compute_loss=False)
        return response_from_nested(compute(asked)["log_probs"], data["response_mask"])

    def _update(self, data: TensorDict) -> dict[str, float]:
        """One optimizer step on all rows."""
        rows = len(data)
        assign_non_tensor(
            data,
            calculate_entropy=False,
            global_batch_size=rows,
            mini_batch_size=rows,
            epochs=1,
            seed=self.workload.seed,
            dataloader_kwargs={"shuffle": False},
        )
        metrics = get(self.actor.update_actor(data), "metrics")
        return {ours: float(metrics[name][0]) for ours, name in METRICS.items()}


def nested(rows: Iterable[Sequence[float]]) -> torch.Tensor:
    """[rows][tokens], jagged."""
    return torch.nested.as_nested_tensor([torch.tensor(row) for row in rows], layout=torch.jagged)


def advantages(rewards: Sequence[float]) -> list[float]:
    """verl's GRPO advantages of one group."""
    scores, mask = torch.tensor(rewards)[:, None], torch.ones(len(rewards), 1)
    found, _ = compute_grpo_outcome_advantage(scores, mask, np.zeros(len(rewards)))
    return found[:, 0].tolist()


def main(argv: Sequence[str]) -> None:
    """Serves commands until there are no more."""
    serve(lambda: Bench(Workload.read(Path(argv[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
