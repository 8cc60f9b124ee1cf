"""Runs the real engine once and prints one line of JSON per rank; the tests assert on it.

    python probe.py engine DIR          one rank: the engine against transformers, and the guards around a refit
    torchrun ... probe.py fleet DIR TP  any number of ranks: what a rollout returns

Where an engine has several ranks, vLLM schedules as on a GPU.

An engine cannot be stopped in its process, so each launch has one.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from probed import STOPS, TEMPERATURE, Probe
from refusals import refusal

from nemo_r3 import signals
from nemo_r3.models import architecture_of
from nemo_r3.models.architecture import Experts
from nemo_r3.progress import Progress
from nemo_r3.rollout.sampling import Completion, Sampling
from nemo_r3.runtime import World
from nemo_r3.types import Attempt, Group, Trajectory


def probe_engine(home: Path) -> dict[str, Any]:
    probe = Probe(home, 1)
    draw = torch.Generator().manual_seed(0)
    text = torch.randint(34, 307, (280,), generator=draw).tolist()
    long, short = text[:200], text[200:220]
    result: dict[str, Any] = {
        "score_a": probe.score_error("a", text),
        "sampled_a": probe.sample_error("a", long),
        "a_is_not_b": probe.score_error("b", text),
    }

    prompts = [text[start : start + 150] for start in range(0, 120, 4)]  # too many for one forward pass
    batch = probe.sample(prompts, list(range(len(prompts))))
    result["alone"] = [probe.sample([prompts[i]], [i])[0].ids == batch[i].ids for i in (0, 7, 23)]
    result["other_seed_differs"] = probe.sample([prompts[0]], [99])[0].ids != batch[0].ids
    result["endings"] = [[c.finish_reason, c.ids[-1] in STOPS, len(c.ids)] for c in batch]
    probe.engine.add("endless", short, Sampling(TEMPERATURE, 24, (), 3))
    result["endless"] = drain(probe)
    greedy = probe.sample([short], [0], temperature=0.0)[0]
    follows = [
        int(probe.models["a"](torch.tensor([short + list(greedy.ids[:i])])).logits[0, -1].argmax())
        for i in range(len(greedy.ids))
    ]
    result["greedy"] = follows == list(greedy.ids)
    result |= arguments_of(probe)
    result["builds"] = builds()
    result["asleep"] = asleep(probe)
    result["refit"] = probe_refit(probe, text, long)
    result["rollout"] = probe_rollout(probe)
    result["sleep"] = probe_sleep(probe)
    return result


def probe_sleep(probe: Probe) -> dict[str, Any]:
    """What sleeps of vLLM's own bookkeeping, as on a GPU (a CPU's worker frees nothing), and whether it can sample."""
    engine = probe.engine
    executor = engine._llm.engine_core.engine_core.model_executor
    engine._can_sleep = True
    engine.sleep()
    found = {"asleep": sorted(executor.sleeping_tags), "refused": refusal(engine.step, RuntimeError)}
    engine.wake("weights")
    probe.load("a", 7)
    found |= {"loaded": [sorted(executor.sleeping_tags), engine.version]}
    engine.end()
    found |= {"end": [sorted(executor.sleeping_tags), engine._llm.is_sleeping()]}
    engine.sleep()
    engine.wake("weights")
    probe.load("a", 8)
    engine.wake("kv_cache")
    return found | {"awake": [sorted(executor.sleeping_tags), probe.sample([[40, 41, 42]], [0])[0].version]}


def arguments_of(probe: Probe) -> dict[str, Any]:
    """By device, what vLLM is asked for: the most tokens of a forward pass for dialogues of up to 300 and 20000 tokens,
    the attention in bf16, FP8 and fp32, and what multiplies by experts, if the model has any; None and "auto" leave the
    choice to vLLM."""
    from nemo_r3.rollout.engine import arguments

    config, model = probe.config, Path(probe.config.model.path)
    arch = architecture_of(model)
    longest = [replace(config.rollout, max_model_len=length) for length in (300, 20_000)]
    precisions = [replace(config.actor, precision=name) for name in ("bf16", "fp8-tensorwise", "fp32")]
    found: dict[str, Any] = {"batched_tokens": {}, "attention": {}, "experts": {}}
    for device in ("cpu", "cuda"):
        asked = partial(arguments, model_dir=model, arch=arch, on_cuda=device == "cuda", reads=True)
        tokens = [asked(replace(config, rollout=rollout)).max_num_batched_tokens for rollout in longest]
        backends = [asked(replace(config, actor=actor)).attention_backend for actor in precisions]
        found["batched_tokens"][device] = tokens
        found["attention"][device] = [backend and backend.name for backend in backends]
        mixture = replace(arch, experts=Experts(8, 2, normalized=True))
        found["experts"][device] = [asked(config, arch=each).moe_backend for each in (arch, mixture)]
    return found


def builds() -> dict[str, list[str]]:
    """By the device that vLLM was built for, what it says without a GPU and with one."""
    from nemo_r3.rollout import engine

    found = {}
    for device in ("cpu", "cuda", ""):  # vLLM's for GPUs has none where it finds no GPU
        with patch.object(engine, "current_platform", SimpleNamespace(device_type=device)):
            found[device] = [refusal(partial(engine._refuse_other_build, on_cuda)) for on_cuda in (False, True)]
    return found


def asleep(probe: Probe) -> dict[str, Any]:
    """What an engine that can sleep, as on a GPU, is asked to do while it sleeps and wakes."""
    from nemo_r3.rollout.engine import Engine

    llm, sleeps = MagicMock(), []
    llm.is_sleeping.side_effect = lambda: bool(sleeps)
    llm.sleep.side_effect = lambda level: sleeps.append(level)
    engine = Engine(llm, architecture_of(Path(probe.config.model.path)), 300, version=4)
    engine.wake("weights")
    engine.sleep()
    engine.sleep()
    found = {"version": engine.version, "slept": list(sleeps), "refused": refusal(engine.step, RuntimeError)}
    engine.wake("weights")
    return found | {"woken": [call.args for call in llm.wake_up.call_args_list]}


def probe_refit(probe: Probe, text: list[int], long: list[int]) -> dict[str, Any]:
    engine, result = probe.engine, {}
    probe.sample([long], [0])  # fills the prefix cache
    probe.load("b", 1)
    result["score_b"], result["sampled_b"] = probe.score_error("b", text), probe.sample_error("b", long)
    result["version"] = probe.sample([long], [0])[0].version

    engine._repack = lambda: None  # what the guards are for: without them the old weights live on
    probe.load("a", 2)
    result["without_repack"] = probe.score_error("a", text)
    del engine._repack
    probe.load("b", 3)
    probe.sample([long], [0])
    reset = engine._llm.reset_prefix_cache
    engine._llm.reset_prefix_cache = lambda: True
    probe.load("a", 4)
    result["without_reset"] = probe.sample_error("a", long)

    engine._llm.reset_prefix_cache = lambda: False
    result["errors"] = [refusal(lambda: probe.load("a", 5), RuntimeError)]
    engine._llm.reset_prefix_cache = reset
    state = [(key, value) for key, value in probe.models["a"].state_dict().items() if "layers.1.mlp.up" not in key]
    result["errors"].append(refusal(lambda: engine.load(state, 5), RuntimeError))
    engine.add("unfinished", long, Sampling(1.0, 4, ()))
    result["errors"].append(refusal(lambda: probe.load("a", 5), RuntimeError))
    drain(probe)
    probe.load("a", 6)
    result["restored"] = [probe.score_error("a", text), probe.sample_error("a", long)]
    return result


def drain(probe: Probe) -> list[Any]:
    """The finish reason and length of the one request that is left."""
    while not (completions := probe.engine.step()):
        pass
    return [completions[0].finish_reason, len(completions[0].ids)]


def probe_rollout(probe: Probe) -> dict[str, Any]:
    events: list[str] = []
    add, step = probe.engine.add, probe.engine.step

    def noting_add(request_id: str, prompt_ids: list[int], sampling: Sampling) -> None:
        events.append(f"add {request_id}")
        add(request_id, prompt_ids, sampling)

    def noting_step() -> list[Completion]:
        completions = step()
        events.extend(f"end {completion.request_id}" for completion in completions)
        return completions

    progress = MagicMock()
    probe.engine.add, probe.engine.step = noting_add, noting_step
    probe.rollout._progress = progress
    result = run_rollout(probe)
    probe.engine.add, probe.engine.step = add, step

    failures = failures_of(probe)
    groups = probe.rollout.reflect_and_retry(failures, 1, 4)
    versions = {r.answer.segment.version for g in groups for r in g.reflections}
    return result | {
        "donated": run_donated(probe),
        "events": events,
        "told": [call.args[0] for call in progress.call_args_list],
        "logprob_error": max(sampled_errors(probe, groups)),
        "versions": sorted(versions),
        "no_room": probe_no_room(probe, failures[0]),
        "stopped": probe_stop(probe, failures),
    }


def probe_stop(probe: Probe, failures: list[Attempt]) -> dict[str, Any]:
    """A step that is stopped after 8 tokens and again after 8 more, and then runs to its end, as on a GPU."""
    from nemo_r3.rollout.scheduler import Rollout
    from nemo_r3.rollout.turn_cache import TurnCache

    config = replace(probe.config, rollout=replace(probe.config.rollout, deterministic=False))
    rollout, asked = Rollout(probe.engine, probe.dialogue, probe.task, config, probe.world, Progress(enabled=False)), []
    add = probe.engine.add
    probe.engine.add = lambda request, ids, sampling: (
        asked.append((sampling.seed, tuple(ids))),
        add(request, ids, sampling),
    )
    kept = []
    for _ in range(2):
        steps = iter(range(9))
        rollout._fleet.asked_to_stop = lambda _, steps=steps: next(steps) == 8
        try:
            rollout.reflect_and_retry(failures, 3, 4)
        except AssertionError:  # no signal came, so `collect` misses what is unfinished
            kept.append(rollout.turns.sampled(3))
    del rollout._fleet.asked_to_stop
    rollout.turns = TurnCache(enabled=True)
    rollout.turns.restore(3, kept[-1])
    before = len(asked)
    groups = rollout.reflect_and_retry(failures, 3, 4)
    probe.engine.add = add
    turns = rollout.turns.restored(3) | rollout.turns.sampled(3)
    begun = [found for found in kept[-1].values() if found.finish_reason == "unfinished"]
    return {
        "counts": [[sum(c.finish_reason == "unfinished" for c in part.values()), len(part)] for part in kept],
        "asked_at_last": len(asked) - before,
        "turns": len(turns),
        # one that had no token yet when it was stopped is asked again as it was
        "seeds_differ": len({seed for seed, _ in asked}) == len(set(asked)),
        "prefixes": all(turns[name].ids[: len(found.ids)] == found.ids for name, found in kept[-1].items()),
        "longest_begun": max(len(found.ids) for found in begun),
        "longest": max(len(found.ids) for found in turns.values()),
        "logprob_error": max(sampled_errors(probe, groups)),
        "of_another_step": len(rollout.turns.sampled(4) | rollout.turns.restored(4)),
    }


def sampled_errors(probe: Probe, groups: list[Group]) -> list[float]:
    """Per reflection, how far vLLM's log-probabilities are from transformers'."""
    errors = []
    for group in groups:
        for reflection in group.reflections:
            ids, sampled = Trajectory(reflection.trajectory.segments[:4]).ids, reflection.answer.segment
            expected = probe.reference("a", ids, TEMPERATURE)[-len(sampled.ids) :]
            errors.append((torch.tensor(sampled.logprobs) - expected).abs().max().item())
    return errors


def probe_no_room(probe: Probe, failure: Attempt) -> list[Any]:
    """A failure after which no reflection fits, and one after which it does but no retry."""
    task, attempt = failure.context.segments
    around = len(probe.dialogue.reflect(failure.context, failure.problem)) - len(attempt.ids)
    found = []
    for room in (0, 5):
        filler = (50,) * (300 - around - room)
        context = Trajectory((task, replace(attempt, ids=filler, logprobs=(0.0,) * len(filler))))
        (group,) = probe.rollout.reflect_and_retry([replace(failure, context=context)], 1, 1)
        (reflection,) = group.reflections
        reasons = [reflection.answer.finish_reason == "no_room", reflection.retry.finish_reason == "no_room"]
        found.append([*reasons, len(reflection.answer.segment.ids) <= room, reflection.passed])
    return found


def failures_of(probe: Probe) -> list[Attempt]:
    attempts = probe.rollout.first_attempts(probe.task.problems("train"), 1, samples=2)
    return [attempt for attempt in attempts if attempt.is_failure]


def run_rollout(probe: Probe) -> dict[str, Any]:
    """What must not depend on how many ranks and engines there are."""
    failures = failures_of(probe)
    groups = probe.rollout.reflect_and_retry(failures, 1, 4)
    greedy = probe.rollout.first_attempts(probe.task.problems("train")[:1], 1, greedy=True)
    nothing = probe.rollout.reflect_and_retry([], 1, 4)
    return {
        "failures": [[failure.id, list(failure.answer.segment.ids)] for failure in failures],
        "reflections": [
            [list(r.answer.segment.ids), r.retry.text, r.retry.finish_reason, r.passed]
            for group in groups
            for r in group.reflections
        ],
        "order": [group.failure.id for group in groups],
        "greedy": [list(attempt.answer.segment.ids) for attempt in greedy],
        "nothing": nothing,
        "phases": [str(segment.phase) for segment in groups[0].reflections[0].trajectory.segments],
    }


def run_donated(probe: Probe) -> list[Any]:
    """A retry on each failure after the reflection on the next one, which another engine may have sampled."""
    groups = probe.rollout.reflect_and_retry(failures_of(probe), 1, 1)
    donors = [group.reflections[0].answer for group in (*groups[1:], groups[0])]
    retried = probe.rollout.retry_after([group.failure for group in groups], donors, 2)
    return [[list(r.answer.segment.ids), list(r.retry.segment.ids), r.passed] for r in retried]


def probe_fleet(home: Path, tensor_parallel: int) -> dict[str, Any]:
    probe = Probe(home, tensor_parallel)
    before = run_rollout(probe)
    donated, given = run_donated(probe), parts_given(probe)
    probe.load("b", 1)
    text = list(range(34, 234))
    scores = probe.score_error("b", text)
    probe.load("a", 2)
    return {
        "rank": probe.world.rank,
        "ahead": probe.engine._llm.engine_core.engine_core.batch_queue is not None,
        "before": before,
        "donated": donated,
        "given": given,
        "after": run_rollout(probe),
        "stopped": probe_stop(probe, failures_of(probe)) if tensor_parallel > 1 else None,
        "score_b": scores,
        "tensor_parallel": tensor_parallel,
        "looks": looks_until_stop(probe),
        "patience": patience(probe),
        "shared": shared_memory(),
        "mined": [it.id for it in probe.rollout.first_attempts(probe.task.problems("train"), 0, everywhere=False)],
    }


def shared_memory() -> tuple[str, list[str]]:
    """What vLLM names the memory of an engine's ranks after, and the names: none on a CPU without AVX-512."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    names = sorted({line.partition("/dev/shm/")[2] for line in maps if "cpushm" in line})
    return os.environ["VLLM_DIST_IDENT"], names


def patience(probe: Probe) -> list[float]:
    """Minutes that the collectives of vLLM's own groups may wait: all ranks', and an engine's."""
    from vllm.distributed.parallel_state import get_tp_group, get_world_group

    gloo = [group.cpu_group._get_backend(torch.device("cpu")) for group in (get_world_group(), get_tp_group())]
    return [backend.options._timeout.total_seconds() / 60 for backend in gloo]


def parts_given(probe: Probe) -> list[list[int]]:
    """Of ten results, two to a problem, those that each rank judges and hands to the others."""
    parts, gather = [], World.gather
    with (
        patch.object(World, "gather", lambda world, part: parts.append(part) or gather(world, part)),
        patch.object(probe.task, "verify", MagicMock(return_value=True)) as verify,
    ):
        probe.rollout.first_attempts(probe.task.problems("train"), 1, samples=2)
    assert verify.call_count == len(parts[-1]), "each answer is judged once"
    return probe.world.gather(sorted(parts[-1]))


def looks_until_stop(probe: Probe) -> int:
    """After how many looks this rank's engine stops for a signal that reached the last rank alone; 0: never."""
    if probe.world.rank == probe.world.size - 1:
        signals._noted.append(("SIGUSR1", 0.0))
    looks = next((number for number in range(1, 41) if probe.rollout._fleet.asked_to_stop(failed=False)), 0)
    signals._noted.clear()
    return looks


if __name__ == "__main__":
    verb, home = sys.argv[1], Path(sys.argv[2])
    found = probe_engine(home) if verb == "engine" else probe_fleet(home, int(sys.argv[3]))
    (home / f"result-{os.environ['RANK']}.json").write_text(json.dumps(found))
    os._exit(0)  # an engine that is shut down searches all objects of the process, several times
