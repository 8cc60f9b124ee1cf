"""nemo_r3's side: the parts of recipes/train.py in one process, on a given workload.

python -m benchmarks.r3_worker WORKLOAD.json

step N        reflect and retry -> build_update -> update -> refit, timed
loss WEIGHTS  writes the policy's weights, or LoRA's as PEFT names them, to WEIGHTS; its loss and gradient norm on the
              workload's check
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoTokenizer

from benchmarks.timing import Stopwatch
from benchmarks.worker import serve
from benchmarks.workload import Context, Workload, wording
from nemo_r3 import entry, runtime
from nemo_r3.adapter import peft_tensors
from nemo_r3.algo.batch import build_update
from nemo_r3.config import Config
from nemo_r3.dialogue import Dialogue
from nemo_r3.progress import Progress
from nemo_r3.refit import refit
from nemo_r3.rollout import environment
from nemo_r3.rollout.sampling import Sampling, request_seed
from nemo_r3.types import Answer, Attempt, Group, Phase, Problem, Reflection, Segment, Trajectory, UpdateBatch


class RejectsAll:
    """A task without problems: rewards are given by the workload."""

    name = "given"
    verifier = "given-1"
    wording = wording()

    def problems(self, split: str) -> list[Problem]:
        """None."""
        return []

    def verify(self, problem: Problem, text: str) -> bool:
        """No."""
        return False


def force_lengths(engine: Any) -> dict[int | None, int]:
    """Makes an engine's requests end at given lengths, and by no token: request seed -> tokens, to be filled in."""
    lengths: dict[int | None, int] = {}
    add = engine.add

    def add_forced(request_id: str, prompt_ids: Sequence[int], sampling: Sampling) -> None:
        add(request_id, prompt_ids, replace(sampling, max_tokens=lengths[sampling.seed], stop_ids=()))

    engine.add = add_forced
    return lengths


class Bench:
    """A policy and an engine as recipes/train.py has them."""

    def __init__(self, workload: Workload) -> None:
        """Starts both."""
        self.workload, self.config = workload, settings(workload)
        environment.prepare(self.config, on_cuda=False)
        world = runtime.start(self.config)

        from nemo_r3.actor.policy import Policy
        from nemo_r3.actor.trainer import Trainer
        from nemo_r3.rollout.engine import Engine
        from nemo_r3.rollout.scheduler import Rollout

        model = Path(workload.model)
        self.policy = Policy(self.config, world)
        self.trainer, self.engine = Trainer(self.policy), Engine.start(self.config, model)
        self.lengths = force_lengths(self.engine)
        dialogue = Dialogue(AutoTokenizer.from_pretrained(model), self.config.dialogue, RejectsAll.wording)
        self.rollout = Rollout(self.engine, dialogue, RejectsAll(), self.config, world, Progress(enabled=False))

    def step(self, number: int) -> dict[str, Any]:
        """One training step with its times."""
        contexts = self.workload.steps[number]
        failures = [failure(context, f"{number}/{index}") for index, context in enumerate(contexts)]
        self._force(failures, number)
        watch = Stopwatch()
        with watch.time("step"):
            runtime.seed_generators(self.config.seed, number)
            with watch.time("rollout"):
                groups = self.rollout.reflect_and_retry(failures, number, self.workload.group)
            batch = self._batch([rewarded(group, c.rewards) for group, c in zip(groups, contexts, strict=True)])
            self.engine.sleep()
            metrics = self.trainer.update(batch)
            with watch.time("sync"):
                refit(self.policy, self.engine)
        return watch.split() | {"metrics": metrics}

    def loss(self, weights: Path) -> dict[str, Any]:
        """The loss on the check's batch; the reference is the starting model."""
        lora = self.policy.lora
        if lora is None:
            trained = {name: tensor.detach().clone() for name, tensor in self.policy.export_hf()}
        else:
            trained = peft_tensors(lora.whole(self.policy.world), self.policy.arch)
        save_file(trained, weights)
        check = self.workload.check
        self.config.algo.kl_beta = check.kl_beta
        batch = self._batch([given_group(*item) for item in zip(check.contexts, check.completions, strict=True)])
        advantages = [advantage for group in check.advantages for advantage in group]
        rows = [
            replace(row, advantages=[advantage if weight else 0.0 for weight in row.loss_weights])
            for row, advantage in zip(batch.rows, advantages, strict=True)
        ]
        return dict(self.trainer.update(replace(batch, rows=tuple(rows))))

    def _batch(self, groups: Sequence[Group]) -> UpdateBatch:
        return build_update(groups, self.config, seed=self.config.seed)

    def _force(self, failures: Sequence[Attempt], number: int) -> None:
        """Gives every request of the step its length."""
        self.lengths.clear()
        for failed, context in zip(failures, self.workload.steps[number], strict=True):
            for sample, length in enumerate(context.lengths):
                for phase, tokens in ((Phase.REFLECTION, length), (Phase.RETRY, self.workload.retry_tokens)):
                    seed = request_seed(self.config.seed, number, failed.id, sample, phase)
                    self.lengths[seed] = tokens


def settings(workload: Workload) -> Config:
    """The run's settings; the learning rate is constant, and a microbatch holds one group."""
    config = Config()
    config.seed = workload.seed
    config.model.path = workload.model
    config.actor.precision = "fp32"
    config.actor.lr = config.actor.lr_min = workload.lr
    config.actor.lr_warmup_ratio = 0.0
    config.actor.clip_grad = workload.clip_grad
    config.actor.lora_rank, config.actor.lora_alpha = workload.lora_rank, workload.lora_alpha
    config.actor.microbatch_tokens = max(len(c.prompt) + sum(c.lengths) for step in workload.steps for c in step)
    config.algo.group_size = workload.group
    config.algo.kl_beta = workload.kl_beta
    config.rollout.temperature = workload.temperature
    config.rollout.max_model_len = workload.max_model_len
    return config


def sampled(phase: Phase, ids: Sequence[int]) -> Segment:
    """A segment as if vLLM had sampled it."""
    return Segment(phase, tuple(ids), (0.0,) * len(ids), 0)


def failure(context: Context, name: str) -> Attempt:
    """A row of a failure bank."""
    attempt = sampled(Phase.ATTEMPT, context.attempt)
    whole = Trajectory((Segment(Phase.TASK, tuple(context.task)), attempt))
    return Attempt(Problem(name, "", {}), 0, whole, Answer(attempt, "", "length"), passed=False)


def rewarded(group: Group, rewards: Sequence[float]) -> Group:
    """The group whose retries passed or failed as these rewards of 1 and 0 say."""
    pairs = zip(group.reflections, rewards, strict=True)
    return replace(group, reflections=tuple(replace(reflection, passed=reward > 0) for reflection, reward in pairs))


def given_group(context: Context, completions: Sequence[Sequence[int]]) -> Group:
    """A group of given reflections."""
    failed = failure(context, "check")
    request = Segment(Phase.REQUEST, tuple(context.prompt[len(failed.context) :]))
    found = []
    for sample, ids in enumerate(completions):
        segment = sampled(Phase.REFLECTION, ids)
        answer = Answer(segment, "", "length")
        trajectory = failed.context.then(request, segment)
        found.append(Reflection(sample, trajectory, answer, answer, context.rewards[sample] > 0))
    return Group(failed, tuple(found))


def main(argv: Sequence[str]) -> None:
    """Serves commands until there are no more."""
    serve(lambda: Bench(Workload.read(Path(argv[0]))))


if __name__ == "__main__":
    entry.main(main)
    sys.exit()
