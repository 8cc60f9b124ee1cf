"""`Probe`: a real engine on one of two random models, these models in transformers, and a rollout around the engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from parity import Parity
from random_models import make_models
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_r3 import runtime
from nemo_r3.config import Config
from nemo_r3.dialogue import Dialogue
from nemo_r3.imports import importing
from nemo_r3.progress import Progress
from nemo_r3.rollout import environment
from nemo_r3.rollout.sampling import Completion, Sampling

STOPS = range(4, 34)  # a random model hardly ever says <|end|>: with these one turn in a few ends early
TEMPERATURE = 0.7


def settings(home: Path, tensor_parallel: int) -> Config:
    config = Config()
    config.run.timeout_minutes = 20  # none of torch's own
    config.model.path = str(home / "a")
    config.actor.precision = "fp32"
    config.rollout.tensor_parallel = tensor_parallel
    config.rollout.temperature = TEMPERATURE
    config.rollout.max_model_len = 300
    config.rollout.max_answer_tokens = 24
    config.rollout.max_reflection_tokens = 32
    return config


def schedule_ahead() -> None:
    """vLLM schedules a step ahead of its results on a GPU, and does not on a CPU: here it does."""
    from vllm.platforms.cpu import CpuPlatform

    checked = CpuPlatform.check_and_update_config

    def ahead(vllm_config: Any) -> None:
        checked(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(ahead)


def start_pipeline(config: Config) -> None:
    """The actor's groups, with stages in different numbers of them: no later group may be named after its rank's."""
    from nemo_r3.actor import cpu
    from nemo_r3.actor.model import start_parallel_groups

    cpu.prepare()
    with cpu.cuda_stand_in():
        start_parallel_groups(replace(config, actor=replace(config.actor, pipeline_parallel=2)))


class Probe:
    """An engine on model a, its reference models, and the rollout around it."""

    def __init__(self, home: Path, tensor_parallel: int) -> None:
        self.config = config = settings(home, tensor_parallel)
        self.world = runtime.start(config)
        if self.world.is_main:
            make_models(home)
        self.world.barrier()
        environment.prepare(config, on_cuda=False)
        with importing():
            from nemo_r3.rollout.engine import Engine
            from nemo_r3.rollout.scheduler import Rollout

        if tensor_parallel > 1:
            schedule_ahead()
            start_pipeline(config)
        self.engine = Engine.start(config, home / "a")
        self.models = {
            name: AutoModelForCausalLM.from_pretrained(home / name, dtype=torch.float32).eval() for name in "ab"
        }
        self.task = Parity()
        tokenizer = AutoTokenizer.from_pretrained(home / "a")
        self.dialogue = Dialogue(tokenizer, config.dialogue, self.task.wording, STOPS)
        self.rollout = Rollout(self.engine, self.dialogue, self.task, config, self.world, Progress(enabled=False))

    def load(self, name: str, version: int) -> None:
        state = self.models[name].state_dict()
        self.engine.load(((key, value) for key, value in state.items() if key != "lm_head.weight"), version)

    @torch.no_grad()
    def reference(self, name: str, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
        """[length - 1] transformers' log-probabilities of ids[1:]."""
        logits = self.models[name](torch.tensor([ids])).logits[0] / temperature
        return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    def score_error(self, name: str, ids: list[int]) -> float:
        return (torch.tensor(self.score(ids)) - self.reference(name, ids)).abs().max().item()

    def score(self, ids: list[int]) -> list[float]:
        """[length - 1] vLLM's log-probabilities of ids[1:] as a prompt, which bypasses the prefix cache."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        llm = self.engine._llm
        assert not llm.has_unfinished_requests()
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        llm.add_request("score", tokens_input(ids), params)
        scores: list[float] = []
        while llm.has_unfinished_requests():
            for output in llm.step():
                rows = output.prompt_logprobs or []
                scores = [row[token].logprob for row, token in zip(rows[1:], ids[1:], strict=True)]
        return scores

    def sample(self, prompts: list[list[int]], seeds: list[int], temperature: float = TEMPERATURE) -> list[Completion]:
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            self.engine.add(str(number), prompt, Sampling(temperature, 24, tuple(STOPS), seed))
        done: dict[str, Completion] = {}
        while len(done) < len(prompts):
            done.update((completion.request_id, completion) for completion in self.engine.step())
        return [done[str(number)] for number in range(len(prompts))]

    def sample_error(self, name: str, prompt: list[int], seed: int = 5) -> float:
        (completion,) = self.sample([prompt], [seed])
        expected = self.reference(name, prompt + list(completion.ids), TEMPERATURE)[len(prompt) - 1 :]
        return (torch.tensor(completion.logprobs) - expected).abs().max().item()
