"""Runs a real engine that records experts and compares them with transformers'; test_recording.py asserts on it.

python recorded.py DIR
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from families import make_checkpoint
from safetensors.torch import load_file
from torch import Tensor

from nemo_r3 import runtime
from nemo_r3.config import Config
from nemo_r3.imports import importing
from nemo_r3.models import architecture_of
from nemo_r3.rollout import environment
from nemo_r3.rollout.sampling import Completion, Sampling

KIND = "qwen3_moe"
BLOCKS = 14
"""Of the KV cache, of 32 tokens: fewer than three long requests need, so vLLM preempts some."""


class Probe:
    def __init__(self, home: Path) -> None:
        config = Config()
        config.model.path, config.actor.precision = str(home / "a"), "fp32"
        config.rollout.max_model_len, config.actor.routing_replay = 256, True
        self.model: Any = make_checkpoint(home / "a", KIND)
        runtime.start(config)
        environment.prepare(config, on_cuda=False)
        with importing():
            from nemo_r3.rollout import engine
        engine._cpu_cache_bytes = lambda config, arch: BLOCKS * engine.KV_BLOCK * arch.cached_bytes(1, 4)
        self.engine = engine.Engine.start(config, home / "a")
        self.cached: dict[str, int] = {}
        self.preempted = 0
        self._watch()

    def _watch(self) -> None:
        """Notes how many tokens of each request were cached, and how many requests were preempted."""
        llm = self.engine._llm
        step, scheduler = llm.step, llm.engine_core.engine_core.scheduler
        preempt = scheduler._preempt_request

        def noting_step() -> Any:
            outputs = step()
            self.cached |= {output.request_id: output.num_cached_tokens for output in outputs if output.finished}
            return outputs

        def noting_preempt(*arguments: Any, **named: Any) -> Any:
            self.preempted += 1
            return preempt(*arguments, **named)

        llm.step, scheduler._preempt_request = noting_step, noting_preempt

    def sample(self, name: str, *prompts: list[int], tokens: int = 40, first: int | None = 0) -> list[Completion]:
        for number, prompt in enumerate(prompts):
            self.engine.add(f"{name}{number}", prompt, Sampling(1.0, tokens, (), number, first))
        done: dict[str, Completion] = {}
        while len(done) < len(prompts):
            done.update((completion.request_id, completion) for completion in self.engine.step())
        return [done[f"{name}{number}"] for number in range(len(prompts))]

    @torch.no_grad()
    def differing(self, prompt: list[int], completion: Completion, first: int = 0) -> int:
        """In how many (token, layer) pairs vLLM's experts are not transformers'; fails unless it has all pairs."""
        found: list[Tensor] = []
        routers = [layer.mlp.gate for layer in self.model.model.layers]
        hooks = [router.register_forward_hook(lambda _, args, output: found.append(output[2])) for router in routers]
        self.model(torch.tensor([[*prompt, *completion.ids[:-1]]]))
        for hook in hooks:
            hook.remove()
        theirs = torch.stack(found, 1)[first:]
        assert completion.routed_experts is not None
        ours = torch.from_numpy(completion.routed_experts).long()
        assert ours.shape == theirs.shape, f"{ours.shape} for {theirs.shape}"
        return int((ours.sort(-1).values != theirs.sort(-1).values).any(-1).sum())

    def stopped(self, prompt: list[int]) -> tuple[Completion, Completion]:
        """What had been sampled when a request was aborted, and what went on from there."""
        self.engine.add("stopped", prompt, Sampling(1.0, 40, (), 1, 0))
        for _ in range(8):
            self.engine.step()
        (begun,) = self.engine.abort()
        known = len(prompt) + len(begun.ids) - 1
        return begun, self.sample("rest", [*prompt, *begun.ids], first=known)[0]

    def forgotten(self, prompt: list[int]) -> str:
        """What is said if vLLM returns no experts."""
        llm, step = self.engine._llm, self.engine._llm.step

        def forgetful_step() -> Any:
            outputs = step()
            for output in outputs:
                output.outputs[0].routed_experts = None
            return outputs

        llm.step = forgetful_step
        try:
            self.sample("forgotten", prompt)
        except AssertionError as error:
            return str(error)
        finally:
            llm.step = step
        return "nothing"

    def refit(self, home: Path) -> None:
        """Other routers, to the engine and to transformers' model."""
        weights = load_file(home / "a" / "model.safetensors")
        turned = {name: tensor.flip(0) if "gate.weight" in name else tensor for name, tensor in weights.items()}
        self.engine.load(turned.items(), 1)
        with torch.no_grad():
            for layer in self.model.model.layers:
                layer.mlp.gate.weight.copy_(layer.mlp.gate.weight.flip(0))


def probe(home: Path) -> dict[str, Any]:
    probe = Probe(home)
    text = torch.randint(0, 131, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    prompt, many = text[:100], [text[start : start + 100] for start in range(10, 70, 10)]
    found: dict[str, Any] = {"dtype": str(probe.sample("dtype", [1, 2])[0].routed_experts.dtype)}  # type: ignore[union-attr]
    for name in ("new", "cached"):
        found[name] = probe.differing(prompt, probe.sample(name, prompt)[0])
    found["after the prompt"] = probe.differing(prompt, probe.sample("after", prompt, first=100)[0], 100)
    found["not wanted"] = probe.sample("unwanted", prompt, first=None)[0].routed_experts is None
    together = probe.sample("together", *many, tokens=100)
    found["together"] = [probe.differing(*each) for each in zip(many, together, strict=True)]
    begun, rest = probe.stopped(prompt)
    found["stopped"] = [len(begun.ids), probe.differing(prompt, begun), probe.differing(prompt, rest.continuing(begun))]
    probe.refit(home)
    after = probe.sample("refit", prompt)[0]
    found["refit"] = probe.differing(prompt, after)
    probe.refit(home)
    found["of other weights"] = probe.differing(prompt, after)
    found["forgotten"] = probe.forgotten(prompt)
    found |= {"cached tokens": probe.cached, "preempted": probe.preempted}
    return found | {"asked of a GPU": asked_of_a_gpu(home)}


def asked_of_a_gpu(home: Path) -> list[bool]:
    """Whether vLLM is asked to record, without the setting and with it."""
    from nemo_r3.rollout.engine import arguments

    found = []
    for replay in (False, True):
        config = Config()
        config.actor = replace(config.actor, routing_replay=replay)
        asked = arguments(config, home / "a", architecture_of(home / "a"), on_cuda=True, reads=True)
        found.append(asked.aux_output_config.enabled)
    return found


if __name__ == "__main__":
    home = Path(sys.argv[1])
    (home / "result.json").write_text(json.dumps(probe(home)))
    os._exit(0)  # an engine that is shut down searches all objects of the process, several times
