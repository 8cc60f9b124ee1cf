"""vLLM beside the actor on one device: how fast it samples, sleeps and takes new weights, and how well the two agree.

    start without weights, as a run does -> refit -> sample -> sleep -> refit -> sample again

There is no optimizer: the actor's weights and the engine are all that is in memory. `prob_error` is
`token_mult_prob_error` of the first sample, `prob_error_after` of the last one; a refit is timed from a sleeping engine
to one that could sample.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_check import command_line
from benchmarks.gpu_check.update import distance, model_of, tiny
from nemo_r3 import fp8_support, runtime
from nemo_r3.config import Config
from nemo_r3.errors import ConfigError
from nemo_r3.models import architecture_of
from nemo_r3.refit import refit
from nemo_r3.rollout import environment
from nemo_r3.rollout.sampling import Completion, Sampling

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy
    from nemo_r3.rollout.engine import Engine

FULL, SMALL = (256, 512, 128), (8, 24, 8)
"""Prompts, tokens of each, tokens sampled for each."""
REFITS, COMPARED = 3, 32
"""How often weights are replaced; sequences that the actor scores."""


def config_of(shape: str, quantization: str, small: bool) -> Config:
    """One engine that takes half of the device, and an actor in BF16."""
    config = Config()
    config.model.path = str(model_of(shape))
    config.rollout.temperature = 1.0
    config.rollout.quantization = quantization
    config.rollout.max_model_len = 128 if small else 2048
    return config


def prompts(sizes: tuple[int, int, int], vocabulary: int) -> list[list[int]]:
    """Random ids, no two prompts alike."""
    draw = torch.Generator().manual_seed(2)
    return torch.randint(vocabulary, sizes[:2], generator=draw).tolist()


def sample(engine: Engine, asked: list[list[int]], length: int) -> tuple[list[Completion], float]:
    """A completion of every prompt, in order, and the seconds that took."""
    begun = time.perf_counter()
    for number, prompt in enumerate(asked):
        engine.add(str(number), prompt, Sampling(1.0, length, ()))
    done: dict[int, Completion] = {}
    while len(done) < len(asked):
        done.update((int(completion.request_id), completion) for completion in engine.step())
    return [done[number] for number in range(len(asked))], time.perf_counter() - begun


def gap(policy: Policy, asked: list[list[int]], sampled: list[Completion]) -> float:
    """`token_mult_prob_error` of the actor on the first of the samples."""
    pairs = list(zip(asked, sampled, strict=True))[:COMPARED]
    scores = policy.score([[*prompt, *completion.ids] for prompt, completion in pairs])
    ours = [row.tolist()[-len(completion.ids) :] for row, (_, completion) in zip(scores, pairs, strict=True)]
    return distance(ours, [list(completion.logprobs) for _, completion in pairs])["prob_error"]


def free_bytes() -> float:
    """Of the GPU; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    return float(torch.cuda.mem_get_info()[0])


def measure(shape: str, quantization: str, small: bool) -> dict[str, Any]:
    """What is found, or `skipped` with the reason."""
    config = config_of(shape, quantization, small)
    arch = architecture_of(Path(config.model.path))
    try:
        environment.prepare(config, torch.cuda.is_available())
        world = runtime.start(config)
        fp8_support.prepare(config, arch)
        from nemo_r3.actor.policy import Policy  # megatron-core and vLLM: after the environment is ready
        from nemo_r3.rollout.engine import Engine

        policy = Policy(config, world)
    except ConfigError as error:
        return {"skipped": str(error)}
    begun = time.perf_counter()
    engine = Engine.start(config, Path(config.model.path), with_weights=False)
    started = time.perf_counter() - begun
    refit(policy, engine)
    sizes = SMALL if small else FULL
    asked = prompts(sizes, arch.vocab_size)
    sample(engine, asked, sizes[2])  # compiles, and is not counted
    engine.reset_prefix_cache()
    sampled, seconds = sample(engine, asked, sizes[2])
    found = {"tokens_per_second": len(asked) * sizes[2] / seconds, "prob_error": gap(policy, asked, sampled)}
    slept, freed, refitted = [], [], []
    for _ in range(REFITS):
        before, begun = free_bytes(), time.perf_counter()
        engine.sleep()
        slept.append(time.perf_counter() - begun)
        freed.append(free_bytes() - before)
        begun = time.perf_counter()
        refit(policy, engine)
        free_bytes()  # waits for the device
        refitted.append(time.perf_counter() - begun)
    again, _ = sample(engine, asked, sizes[2])
    return found | {
        "start_seconds": started,
        "sleep_seconds": statistics.median(slept),
        "freed_gib": statistics.median(freed) / 2**30,
        "refit_seconds": statistics.median(refitted),
        "weights_gib": sum(weight.nbytes for weight in policy.module.parameters()) / 2**30,
        "prob_error_after": gap(policy, asked, again),
    }


def main() -> None:
    """Writes what was found as JSON."""
    parser = command_line(__doc__)
    parser.add_argument("--shape", choices=("8b-full", "1b", "moe"), default="1b")
    parser.add_argument("--quantization", choices=("none", *fp8_support.VLLM), default="none")
    options = parser.parse_args()
    shape = tiny(options.shape) if options.small else options.shape
    found = measure(shape, options.quantization, options.small)
    options.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
