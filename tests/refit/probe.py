"""Launched by test_refit.py: actor and engine in one process, compared before and after updates and refits.

    probe.py CONFIG_YAML OUT_JSON MODEL_DIR,MODEL_DIR,... key=value ...

The models come one after the other, each with an engine that is given its weights; the first two also with one that
reads them. The engines stay alive: one that goes takes vLLM's groups with it.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from refusals import refusal

from nemo_r3 import config as configuration
from nemo_r3 import entry, runtime
from nemo_r3.imports import importing
from nemo_r3.refit import refit
from nemo_r3.rollout import environment
from nemo_r3.rollout.sampling import Sampling
from nemo_r3.types import Phase, Row, UpdateBatch

if TYPE_CHECKING:
    from nemo_r3.actor.trainer import Trainer
    from nemo_r3.rollout.engine import Engine

PROMPTS = [[(7 * i + j * j) % 131 for j in range(length)] for i, length in enumerate((3, 40, 150, 17))]


def main(argv: list[str]) -> None:
    yaml, out, models, *overrides = argv
    paths = [Path(path) for path in models.split(",")]
    config = configuration.load([yaml, f"model.path={paths[0]}", *overrides])
    environment.prepare(config, on_cuda=False)
    world = runtime.start(config)

    with importing():
        from nemo_r3.actor import policy as actor
        from nemo_r3.actor.trainer import Trainer
        from nemo_r3.rollout.engine import Engine

    engines: list[Engine] = []
    results: dict[str, dict[str, Any]] = {}
    for path in paths:
        config.model.path = str(path)
        trainer = Trainer(actor.Policy(config, world))
        actor.start_parallel_groups = lambda *_: None  # all models share the first one's
        engines.append(waits := Engine.start(config, path, with_weights=False))
        results[path.name] = found = {"refused": refusal(waits.step, RuntimeError)}
        refit(trainer.policy, waits)
        if path in paths[:2]:
            engines.append(reads := Engine.start(config, path))
            found["same"] = [sample(waits, temperature) == sample(reads, temperature) for temperature in (0.0, 0.7)]
        found["rounds"] = compare(trainer, waits)
    if world.is_main:
        Path(out).write_text(json.dumps(results))
    os._exit(0)  # an engine that is shut down searches all objects of the process, several times


def compare(trainer: Trainer, engine: Engine) -> list[dict[str, Any]]:
    """What the two think of the same tokens: with the starting weights, then after one and after two updates."""
    policy, results = trainer.policy, []
    for _ in range(3):
        sampled = sample(engine, policy.config.rollout.temperature)
        whole = [prompt + ids for prompt, (ids, _, _) in zip(PROMPTS, sampled, strict=True)]
        scored = policy.score(whole)
        errors = [
            (torch.tensor(logprobs) - scores[-len(ids) :]).abs().max().item()
            for (ids, logprobs, _), scores in zip(sampled, scored, strict=True)
        ]
        metrics = trainer.update(batch(sampled))
        refit(policy, engine)
        results.append(
            {
                "error": max(errors),
                "reported": metrics["token_mult_prob_error"],
                "versions": sorted({version for *_, version in sampled}),
                "moved": (policy.score(whole)[2] - scored[2]).abs().max().item(),
            }
        )
    return results


def sample(engine: Engine, temperature: float) -> list[tuple[list[int], list[float], int]]:
    """(ids, log-probabilities, version) of one completion of each prompt."""
    for number, prompt in enumerate(PROMPTS):
        engine.add(str(number), prompt, Sampling(temperature, 30, (), seed=number))
    done: dict[int, Any] = {}
    while len(done) < len(PROMPTS):
        done.update((int(completion.request_id), completion) for completion in engine.step())
    return [(list(done[i].ids), list(done[i].logprobs), done[i].version) for i in range(len(PROMPTS))]


def batch(sampled: list[tuple[list[int], list[float], int]]) -> UpdateBatch:
    rows = []
    for number, (prompt, (ids, logprobs, _)) in enumerate(zip(PROMPTS, sampled, strict=True)):
        before, count = len(prompt), len(ids)
        rows.append(
            Row(
                ids=prompt + ids,
                phases=[Phase.TASK] * before + [Phase.REFLECTION] * count,
                sampled=[False] * before + [True] * count,
                advantages=[0.0] * before + [1.0 - 2 * (number % 2)] * count,
                loss_weights=[0.0] * before + [1 / count / len(PROMPTS)] * count,
                rollout_logprobs=[0.0] * before + logprobs,
            )
        )
    return UpdateBatch(tuple(rows), (), 1, 0)


if __name__ == "__main__":
    entry.main(main)
