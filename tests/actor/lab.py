"""`Lab`: real trainers of any kind of policy at any layout of one launch, and what is compared between them."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from data import LENGTHS, TEMPERATURES, TENSORS, batch_of, broken, sequences, split_batch
from megatron.core import parallel_state
from megatron.core.optimizer import optimizer
from refusals import refusal
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from nemo_r3 import runtime
from nemo_r3.actor import checkpoint
from nemo_r3.actor import optimizer as optimizer_module
from nemo_r3.actor import policy as policy_module
from nemo_r3.actor.checkpoint_writer import ThreadedSave
from nemo_r3.actor.manifest import latest, read_manifest
from nemo_r3.actor.model import start_parallel_groups
from nemo_r3.actor.numerics import LayerWatch
from nemo_r3.actor.optimizer import schedule_state
from nemo_r3.actor.policy import Policy
from nemo_r3.actor.trainer import Trainer
from nemo_r3.capacity import size_of
from nemo_r3.config import Config
from nemo_r3.models import names
from nemo_r3.runtime import World
from nemo_r3.types import Phase

LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "dp2": {},
    "ep2": {"expert_parallel": 2},
    "tp2pp2": {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    "tp2dp2": {"tensor_parallel": 2, "sequence_parallel": True},
    "pp2ep2": {"pipeline_parallel": 2, "expert_parallel": 2},
    "tp2ep2": {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2},
    "tp2pp2dp2": {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    "tp2pp4": {"tensor_parallel": 2, "pipeline_parallel": 4, "sequence_parallel": True},
    "pp4dp2": {"pipeline_parallel": 4},
    "dp8": {},
}

STEP = 3
"""Of two updates: a step without anything to train on has none."""
SAVED = "step_000003"
BUCKET = 20_000
"""Numbers of a gradient bucket, so that even these models have many: data-parallel ranks reduce them one by one."""


class Lab:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.world: World = runtime.start(Config())
        self.groups: tuple[int, ...] | None = None
        policy_module.start_parallel_groups = self._start_groups  # type: ignore[assignment]
        many_buckets = partial(optimizer_module.DistributedDataParallelConfig, bucket_size=BUCKET)
        optimizer_module.DistributedDataParallelConfig = many_buckets  # type: ignore[assignment, misc]
        self.results: dict[str, Any] = {}

    @cached_property
    def expected(self) -> TENSORS:
        return load_file(self.home / "transformers.safetensors")

    def _start_groups(self, config: Config) -> None:
        actor = config.actor
        groups = (actor.tensor_parallel, actor.pipeline_parallel, actor.expert_parallel)
        if groups == self.groups:
            return
        if self.groups is not None:
            parallel_state.destroy_model_parallel()
        start_parallel_groups(config)
        self.groups = groups

    def trainer(self, layout: str, kind: str, kl_beta: float = 0.2, **actor: Any) -> Trainer:
        config = Config()
        config.model.path, config.algo.kl_beta = str(self.home / kind), kl_beta
        config.rollout.temperature, config.rollout.max_model_len = 0.7, 128
        config.train.steps, config.train.updates_per_step = 8, 2
        settings = {"precision": "fp32", "microbatch_tokens": 130, "weight_decay": 0.1, "clip_grad": 1.0}
        settings |= {"lr": 1e-3, "lr_min": 1e-4, "lr_warmup_ratio": 0.0, "adam_eps": 1e-5}
        settings |= {"sequence_parallel": layout == "tp2" and "moe" in kind}  # experts need it
        for name, value in (settings | LAYOUTS[layout] | actor).items():
            setattr(config.actor, name, value)
        return Trainer(Policy(config, self.world))

    def weights(self, policy: Policy) -> TENSORS:
        return {name: tensor.detach().clone().contiguous() for name, tensor in policy.export_hf()}

    def same_everywhere(self, weights: TENSORS) -> bool:
        digest = hashlib.sha256()
        for name in sorted(weights):
            digest.update(name.encode() + weights[name].numpy().tobytes())
        return len(set(self.world.gather(digest.hexdigest()))) == 1

    def keep(self, name: str, weights: TENSORS) -> None:
        if self.world.is_main:
            save_file(weights, self.home / f"{name}.weights.safetensors")

    def note(self, name: str, found: Any) -> None:
        self.results[name] = found
        if self.world.is_main:
            (self.home / f"{sys.argv[1]}.json").write_text(json.dumps(self.results))

    def trial(self, layout: str, kind: str, save: bool = False, **actor: Any) -> None:
        trainer = self.trainer(layout, kind, **actor)
        policy = trainer.policy
        found: dict[str, Any] = {"score": self.score_errors(policy, kind), "export": self.export_facts(policy, kind)}
        found |= {"held": trainer.held(), "planned": asdict(size_of(policy.config, policy.arch, self.world.size))}
        watch = LayerWatch(policy.module, None)
        with watch.watching():
            metrics = [trainer.update(batch_of())]
        found["layers"] = watch.rows(self.world)
        metrics.append(trainer.update(batch_of()))
        found["with_gradients"] = sum(parameter.requires_grad for parameter in policy.module.parameters())
        wrapped: Any = trainer.optimizer.model
        found["buckets"] = 0 if policy.lora else sum(len(buffer.buckets) for buffer in wrapped.buffers)
        name = "-".join([layout, kind, *(f"{key}={value}" for key, value in actor.items())])
        if save:
            saved = save_at_work(trainer, self.home / f"{name}-checkpoints", STEP, {"cursor": 5}, keep=2)
            with written_late() as let_write:
                elsewhere = self.home / f"{name}-background"
                saving = checkpoint.begin(trainer, elsewhere, STEP, {"cursor": 5}, background=True)
                found |= self.second_half(trainer, name, metrics)
                counted = latest(elsewhere)
                let_write()
                late = checkpoint.finish(saving, keep=2)
            found["background"] = {"early": counted is not None, "same": content_of(saved) == content_of(late)}
        else:
            found |= self.second_half(trainer, name, metrics)
        self.note(name, found)

    def family(self, layout: str, kind: str) -> None:
        """What every family has to pass: log-probabilities, export, and one update with its gradients."""
        trainer = self.trainer(layout, kind)
        policy = trainer.policy
        expected = [self.expected[f"{kind} 0.7 {number}"] for number in range(len(LENGTHS))]
        found = {"score": largest_gap(policy.score(sequences()), expected), "export": self.export_facts(policy, kind)}
        found["update"] = trainer.update(batch_of())
        self.keep(f"family-{layout}-{kind}-1", self.weights(policy))
        self.note(f"family-{layout}-{kind}", found)

    def split(self, layout: str, kind: str) -> None:
        trainer = self.trainer(layout, kind)
        with patch.object(optimizer, "get_grad_norm_fp32", wraps=optimizer.get_grad_norm_fp32) as norm:
            metrics = [trainer.update(split_batch()) for _ in range(2)]
        self.keep(f"split-{layout}-{kind}-4", self.weights(trainer.policy))
        found = {"metrics": metrics, "version": trainer.policy.version, "steps": trainer.schedule.num_steps}
        found["norms"] = norm.call_count
        self.note(f"split-{layout}-{kind}", found)

    def second_half(self, trainer: Trainer, name: str, metrics: list[dict[str, float]]) -> dict[str, Any]:
        """The third update, a NaN, a batch to refuse, a fourth update, and one of a single row."""
        metrics = [*metrics, trainer.update(batch_of())]
        third = self.weights(trainer.policy)
        found: dict[str, Any] = {"same_everywhere": self.same_everywhere(third)}
        found |= {"nan": self.nan(trainer), "refused": self.refuse(trainer)}
        metrics.append(trainer.update(batch_of()))
        metrics.append(trainer.update(batch_of([3])))
        self.keep(f"{name}-3", third)
        self.keep(f"{name}-5", self.weights(trainer.policy))
        if trainer.policy.lora is not None:
            self.keep(f"{name}-5-factors", trainer.policy.lora.whole(self.world))
        return found | {"metrics": metrics, "version": trainer.policy.version, "steps": trainer.schedule.num_steps}

    def resume(self, saved: str, layout: str, kind: str, **actor: Any) -> None:
        trainer = self.trainer(layout, kind, **actor)
        kind = "-".join([kind, *(f"{key}={value}" for key, value in actor.items())])
        path = self.home / f"{saved}-{kind}-checkpoints" / SAVED
        manifest = checkpoint.load(trainer, path)
        name = "-".join([saved, "to", layout, kind])
        found = {"step": manifest["step"], "state": manifest["state"], "loaded_version": trainer.policy.version}
        found["same_without_weights"] = self.same_without_weights(trainer.policy, path)
        self.note(name, found | self.second_half(trainer, name, []))

    def fork(self, layout: str, kind: str) -> None:
        """The first update of two runs with `train.start_from`: one where the run that resumed is, one at its start."""
        path, found = self.home / f"one-{kind}-checkpoints" / SAVED, {}
        for name, steps, lr in (("same", 2, 1e-3), ("other", 0, 2e-3)):
            trainer = self.trainer(layout, kind, lr=lr)
            own = schedule_state(trainer.schedule)
            checkpoint.load(trainer, path, with_schedule=False)
            found["schedule"] = "its own" if schedule_state(trainer.schedule) == own else "the checkpoint's"
            found["version"] = trainer.policy.version
            trainer.schedule.step(steps)
            found[name] = trainer.update(batch_of())
            if name == "same":
                self.keep(f"fork-{layout}-{kind}-3", self.weights(trainer.policy))
        self.note(f"fork-{layout}-{kind}", found)

    def same_without_weights(self, policy: Policy, path: Path) -> bool:
        """Whether a policy without weights gets all of this one's from the checkpoint, on every rank."""
        bare = Policy(policy.config, self.world, with_weights=False)
        for parameter in bare.module.parameters() if bare.lora is None else ():
            parameter.data.fill_(float("nan"))
        checkpoint.load_weights(bare, path)
        pairs = zip(bare.module.parameters(), policy.module.parameters(), strict=True)
        return all(self.world.gather(all(torch.equal(ours, theirs) for ours, theirs in pairs)))

    def score_errors(self, policy: Policy, kind: str) -> dict[str, float]:
        """Largest differences from transformers; the last entry: a lone sequence, for which other ranks have no row."""
        errors = {}
        for temperature in TEMPERATURES:
            policy.pipeline = replace(policy.pipeline, temperature=temperature)
            expected = [self.expected[f"{kind} {temperature} {number}"] for number in range(len(LENGTHS))]
            errors[f"{temperature}"] = largest_gap(policy.score(sequences()), expected)
            errors[f"{temperature} alone"] = largest_gap(policy.score(sequences()[3:4]), expected[3:4])
        policy.pipeline = replace(policy.pipeline, temperature=0.7)
        return errors

    def export_facts(self, policy: Policy, kind: str) -> dict[str, Any]:
        with patch.object(dist, "broadcast", wraps=dist.broadcast) as broadcast:
            ours, theirs = self.weights(policy), load_file(self.home / kind / "model.safetensors")
        tensor_parallel = policy.config.actor.tensor_parallel
        parts = [names.part_shape(row, policy.arch, tensor_parallel) for row in names.rows(policy.arch)]
        return {
            "broadcast": sum(call.args[0].numel() for call in broadcast.call_args_list),
            "part": sum(map(math.prod, parts)),
            "same_names": ours.keys() == theirs.keys(),
            "bit_exact": all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()),
            "tensors": len(ours),
            "same_everywhere": self.same_everywhere(ours),
        }

    def unchanged(self, trainer: Trainer, act: Callable[[], Any]) -> tuple[Any, bool]:
        """What `act` gave, and whether it left weights, version, schedule and learning rate alone."""

        def state() -> tuple[Any, ...]:
            return trainer.policy.version, trainer.schedule.num_steps, trainer.optimizer.param_groups[0]["lr"]

        before, facts = self.weights(trainer.policy), state()
        given = act()
        after = self.weights(trainer.policy)
        return given, facts == state() and all(torch.equal(before[name], after[name]) for name in before)

    def nan(self, trainer: Trainer) -> dict[str, Any]:
        batch = batch_of()
        bad = broken(batch, 1, advantages=[float("nan") if weight else 0.0 for weight in batch.rows[1].loss_weights])
        metrics, same = self.unchanged(trainer, lambda: trainer.update(bad))
        return {"skipped": metrics["skipped"], "unchanged": same}

    def refuse(self, trainer: Trainer) -> dict[str, Any]:
        batch = batch_of()
        row = batch.rows[2]
        bad = {
            "phase": broken(batch, 2, phases=[Phase.RETRY] * len(row)),
            "text": broken(batch, 2, sampled=[False] * len(row)),
        }
        found = {}
        for name, one in bad.items():
            message, same = self.unchanged(trainer, lambda one=one: refusal(lambda: trainer.update(one), RuntimeError))
            found[name] = {"message": message, "unchanged": same}
        return found


def save_at_work(trainer: Trainer, directory: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Saves at once, as `Saver` does without a background."""
    with trainer.at_work():
        return checkpoint.finish(checkpoint.begin(trainer, directory, step, state), keep)


def content_of(path: Path) -> tuple[Any, ...]:
    """A checkpoint's manifest and index, without the id that torch draws for each index."""
    manifest, index = read_manifest(path), FileSystemReader(path).read_metadata()
    del manifest["files"][".metadata"]
    return manifest, index.state_dict_metadata, index.storage_data


@contextmanager
def written_late() -> Iterator[Callable[[], None]]:
    """Inside, a checkpoint's shards are written once what this gives is called."""
    gate, write = Event(), ThreadedSave._write_file

    def wait(*arguments: Any) -> Any:
        gate.wait(60)  # in vain where a save waits for its shards that should not: then it fails, and does not hang
        return write(*arguments)

    ThreadedSave._write_file = wait  # type: ignore[method-assign]
    yield gate.set
    ThreadedSave._write_file = write  # type: ignore[method-assign]


def largest_gap(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max((ours - theirs).abs().max().item() for ours, theirs in zip(found, expected, strict=True))
