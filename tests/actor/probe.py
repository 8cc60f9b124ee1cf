"""Runs real policies at several layouts in one launch and stores what they found; the tests assert on it.

    python probe.py one HOME            makes the models and what the others are compared with; kills itself at the end
    torchrun ... probe.py two HOME      TP2, PP2 and DP2, one after the other; ends in a full disk on one rank
    torchrun ... probe.py four HOME     TP2xPP2 and TP2xDP2, both with sequence parallel

A launch costs seconds of imports, so it holds many policies; between layouts the parallel groups are made anew.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

from nemo_r3 import runtime
from nemo_r3.actor import checkpoint
from nemo_r3.actor import policy as policy_module
from nemo_r3.actor.model import start_parallel_groups
from nemo_r3.actor.policy import Policy
from nemo_r3.config import Config
from nemo_r3.errors import UserError
from nemo_r3.runtime import World
from nemo_r3.types import Phase, Row, UpdateBatch

KINDS = ("llama_tied", "llama", "qwen2_tied", "qwen2")
TEMPERATURES = (0.7, 1.0)
VOCAB = 131  # not a multiple of 2: padded at TP2
LENGTHS = (5, 60, 33, 97, 120, 7, 90)
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": {"tensor_parallel": 2},
    "pp2": {"pipeline_parallel": 2},
    "dp2": {},
    "tp2pp2": {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
    "tp2dp2": {"tensor_parallel": 2, "sequence_parallel": True},
}
TENSORS = dict[str, torch.Tensor]


def make_models(home: Path) -> None:
    """One tiny checkpoint of each kind, and transformers' log-probabilities of `sequences()`."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    expected: TENSORS = {}
    for seed, kind in enumerate(KINDS):
        shape = {"head_dim": 24} if kind == "llama" else {}
        layers = 4 if kind == "llama_tied" else 2
        hf_config = (LlamaConfig if "llama" in kind else Qwen2Config)(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            rope_theta=10000.0 if "llama" in kind else 1000000.0,
            tie_word_embeddings="tied" in kind,
            **shape,
        )
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2 if parameter.ndim == 1 else 0.12)
            filled = torch.tensor(
                [ids + [0] * (max(LENGTHS) - len(ids)) for ids in sequences()]
            )  # causal: filling is unseen
            logits = model(filled).logits
            for number, ids in enumerate(sequences()):
                for temperature in TEMPERATURES:
                    logprobs = torch.log_softmax(logits[number, : len(ids) - 1] / temperature, -1)
                    picked = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
                    expected[f"{kind} {temperature} {number}"] = picked
        model.save_pretrained(home / kind)
    save_file(expected, home / "transformers.safetensors")


def sequences() -> list[list[int]]:
    draw = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (length,), generator=draw).tolist() for length in LENGTHS]


def plain_updates(home: Path, kind: str, count: int = 3) -> list[dict[str, float]]:
    """What `Lab.trial`'s first updates should give, by transformers, torch's AdamW and the formulas as they stand."""
    from transformers import AutoModelForCausalLM

    filled = torch.tensor([ids + [0] * (max(LENGTHS) - len(ids)) for ids in sequences()])
    rows = batch_of().rows
    weights, advantages = torch.zeros(filled.shape), torch.zeros(filled.shape)
    for number, row in enumerate(rows):
        weights[number, : len(row)] = torch.tensor(row.weights)
        advantages[number, : len(row)] = torch.tensor(row.advantages)
    weights, advantages = weights[:, 1:], advantages[:, 1:]

    def logprobs_of(network: torch.nn.Module) -> torch.Tensor:
        logits = network(filled).logits[:, :-1] / 0.7
        return torch.log_softmax(logits, -1).gather(2, filled[:, 1:, None])[..., 0]

    model, frozen = (AutoModelForCausalLM.from_pretrained(home / kind, dtype=torch.float32) for _ in range(2))
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-5)
    with torch.no_grad():
        reference = logprobs_of(frozen)
    metrics = []
    for step in range(count):
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 + 9e-4 * (1 + math.cos(math.pi * step / 8)) / 2
        logprobs = logprobs_of(model)
        drift = torch.exp(reference - logprobs) - (reference - logprobs) - 1
        policy = -torch.exp(logprobs - logprobs.detach()) * advantages
        loss, kl = (weights * (policy + 0.2 * drift)).sum(), (weights * drift).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        metrics.append({"loss": loss.item(), "kl": kl.item(), "grad_norm": norm.item()})
    tied = {"lm_head.weight"} if "tied" in kind else set()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(state, home / f"plain-{kind}-{count}.weights.safetensors")
    return metrics


def batch_of(rows: Sequence[int] = range(len(LENGTHS))) -> UpdateBatch:
    """Rows with an uneven prompt, uneven advantages of both signs, and uneven weights that sum to 1."""
    made, total = [], 0.0
    for number in rows:
        ids = sequences()[number]
        draw = torch.Generator().manual_seed(number)
        prompt = 1 + len(ids) * (number + 1) // 9
        trained = len(ids) - prompt
        weights = (0.5 + torch.rand(trained, generator=draw)).tolist()
        logprobs = (-4 - 2 * torch.rand(trained, generator=draw)).tolist()
        advantage = (-1) ** number * (0.4 + 0.2 * number)
        made.append(
            Row(
                ids,
                [Phase.TASK] * prompt + [Phase.REFLECTION] * trained,
                [False] * prompt + [True] * trained,
                [0.0] * prompt + [advantage] * trained,
                [0.0] * prompt + weights,
                [0.0] * prompt + logprobs,
            )
        )
        total += sum(weights)
    scaled = [replace(row, weights=[weight / total for weight in row.weights]) for row in made]
    return UpdateBatch(tuple(scaled), (), 1, 0)


def broken(batch: UpdateBatch, number: int, **columns: Any) -> UpdateBatch:
    """The batch with columns of one row replaced."""
    rows = list(batch.rows)
    rows[number] = replace(rows[number], **columns)
    return replace(batch, rows=tuple(rows))


class Lab:
    """Makes policies of any kind at any layout of this launch."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.world: World = runtime.start(Config())
        self.groups: tuple[int, int] | None = None
        policy_module.start_parallel_groups = self._start_groups  # type: ignore[assignment]
        if self.world.is_main and not (home / KINDS[0]).exists():
            make_models(home)
        self.world.barrier()
        self.expected = load_file(home / "transformers.safetensors")
        self.results: dict[str, Any] = {}

    def _start_groups(self, actor: Any, seed: int) -> None:
        groups = (actor.tensor_parallel, actor.pipeline_parallel)
        if groups == self.groups:
            return
        if self.groups is not None:
            parallel_state.destroy_model_parallel()
        start_parallel_groups(actor, seed)
        self.groups = groups

    def policy(self, layout: str, kind: str, **actor: Any) -> Policy:
        config = Config()
        config.model.path = str(self.home / kind)
        config.rollout.temperature = 0.7
        config.rollout.max_model_len = 128
        config.train.steps = 8
        config.algo.kl_beta = 0.2
        settings = {
            "precision": "fp32",
            "microbatch_tokens": 130,
            "lr": 1e-3,
            "lr_min": 1e-4,
            "lr_warmup_ratio": 0.0,
            "adam_eps": 1e-5,
            "weight_decay": 0.1,
            "clip_grad": 1.0,
        }
        for name, value in (settings | LAYOUTS[layout] | actor).items():
            setattr(config.actor, name, value)
        return Policy(config, self.world)

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
        """Everything that is compared between layouts, on one policy."""
        policy = self.policy(layout, kind, **actor)
        found: dict[str, Any] = {"score": self.score_errors(policy, kind), "export": self.export_facts(policy, kind)}
        metrics = [policy.update(batch_of()) for _ in range(2)]
        if save:
            checkpoint.save(policy, self.home / f"{layout}-{kind}-checkpoints", 2, {"cursor": 5}, keep=2)
        name = "-".join([layout, kind, *(f"{key}={value}" for key, value in actor.items())])
        found |= self.second_half(policy, name, metrics)
        self.note(name, found)

    def second_half(self, policy: Policy, name: str, metrics: list[dict[str, float]]) -> dict[str, Any]:
        """The third update, a NaN, a batch to refuse, a fourth update, and one of a single row."""
        metrics = [*metrics, policy.update(batch_of())]
        third = self.weights(policy)
        found = {
            "same_everywhere": self.same_everywhere(third),
            "nan": self.nan(policy),
            "refused": self.refuse(policy),
        }
        metrics.append(policy.update(batch_of()))
        metrics.append(policy.update(batch_of([3])))
        self.keep(f"{name}-3", third)
        self.keep(f"{name}-5", self.weights(policy))
        return found | {"metrics": metrics, "version": policy.version, "steps": policy.schedule.num_steps}

    def resume(self, saved: str, layout: str, kind: str, **actor: Any) -> None:
        policy = self.policy(layout, kind, **actor)
        manifest = checkpoint.load(policy, self.home / f"{saved}-{kind}-checkpoints" / "step_000002")
        name = "-".join([saved, "to", layout, kind, *(f"{key}={value}" for key, value in actor.items())])
        found = {"step": manifest["step"], "state": manifest["state"], "loaded_version": policy.version}
        self.note(name, found | self.second_half(policy, name, []))

    def score_errors(self, policy: Policy, kind: str) -> dict[str, float]:
        """Largest differences from transformers; the last entry: a lone sequence, for which other ranks have no row."""
        errors = {}
        for temperature in TEMPERATURES:
            policy.config.rollout.temperature = temperature
            expected = [self.expected[f"{kind} {temperature} {number}"] for number in range(len(LENGTHS))]
            errors[f"{temperature}"] = largest_gap(policy.score(sequences()), expected)
            errors[f"{temperature} alone"] = largest_gap(policy.score(sequences()[3:4]), expected[3:4])
        policy.config.rollout.temperature = 0.7
        return errors

    def export_facts(self, policy: Policy, kind: str) -> dict[str, Any]:
        ours, theirs = self.weights(policy), load_file(self.home / kind / "model.safetensors")
        return {
            "same_names": ours.keys() == theirs.keys(),
            "bit_exact": all(torch.equal(ours[name], theirs[name]) for name in ours.keys() & theirs.keys()),
            "tensors": len(ours),
            "same_everywhere": self.same_everywhere(ours),
        }

    def unchanged(self, policy: Policy, act: Callable[[], Any]) -> tuple[Any, bool]:
        """What `act` gave, and whether it left weights, version, schedule and learning rate alone."""

        def state() -> tuple[Any, ...]:
            return policy.version, policy.schedule.num_steps, policy.optimizer.param_groups[0]["lr"]

        before, facts = self.weights(policy), state()
        given = act()
        after = self.weights(policy)
        return given, facts == state() and all(torch.equal(before[name], after[name]) for name in before)

    def nan(self, policy: Policy) -> dict[str, Any]:
        batch = batch_of()
        bad = broken(batch, 1, advantages=[float("nan") if weight else 0.0 for weight in batch.rows[1].weights])
        metrics, same = self.unchanged(policy, lambda: policy.update(bad))
        return {"skipped": metrics["skipped"], "unchanged": same}

    def refuse(self, policy: Policy) -> dict[str, Any]:
        batch = batch_of()
        row = batch.rows[2]
        bad = {
            "phase": broken(batch, 2, phases=[Phase.RETRY] * len(row)),
            "text": broken(batch, 2, sampled=[False] * len(row)),
        }
        found = {}
        for name, one in bad.items():
            message, same = self.unchanged(policy, lambda one=one: error_of(lambda: policy.update(one), RuntimeError))
            found[name] = {"message": message, "unchanged": same}
        return found


def largest_gap(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    return max((ours - theirs).abs().max().item() for ours, theirs in zip(found, expected, strict=True))


def error_of(act: Callable[[], Any], kind: type[Exception]) -> str:
    try:
        act()
    except kind as error:
        return str(error)
    return "accepted"


def one(lab: Lab) -> None:
    for kind in KINDS:
        lab.trial("one", kind, save=True)
        lab.note(f"plain-{kind}", plain_updates(lab.home, kind))
    lab.trial("one", "llama_tied", packing=False)
    for actor in ({"recompute": "selective"}, {"recompute": "full"}, {"distributed_optimizer": False}):
        lab.trial("one", "qwen2", **actor)
    lab.resume("one", "one", "llama_tied")
    lab.resume("one", "one", "qwen2")
    lab.note("bad_checkpoints", bad_checkpoints(lab))
    lab.note("full_disk", full_disk(lab))
    killed_while_saving(lab)


def bad_checkpoints(lab: Lab) -> dict[str, Any]:
    """What loading says of checkpoints that are foreign or damaged, and whether the policy stayed as it was."""
    policy = lab.policy("one", "qwen2")
    policy.update(batch_of())
    good = lab.home / "one-qwen2-checkpoints" / "step_000002"
    largest = max(good.glob("*.distcp"), key=lambda file: file.stat().st_size).name

    def damage(name: str, act: Callable[[Path], Any]) -> Path:
        copy = lab.home / "damaged" / name
        shutil.copytree(good, copy)
        act(copy)
        return copy

    cases = {
        "foreign": lab.home / "one-llama_tied-checkpoints" / "step_000002",
        "absent": lab.home / "damaged" / "nowhere",
        "truncated": damage(
            "truncated", lambda path: os.truncate(path / largest, (path / largest).stat().st_size // 2)
        ),
        "emptied": damage("emptied", lambda path: os.truncate(path / largest, 0)),
        "shard_lost": damage("shard_lost", lambda path: (path / largest).unlink()),
        "metadata_lost": damage("metadata_lost", lambda path: (path / ".metadata").unlink()),
        "metadata_cut": damage("metadata_cut", lambda path: os.truncate(path / ".metadata", 100)),
        "common_lost": damage("common_lost", lambda path: (path / "common.pt").unlink()),
        "common_cut": damage("common_cut", lambda path: os.truncate(path / "common.pt", 100)),
        "garbled": damage("garbled", lambda path: (path / largest).write_bytes(bytes((path / largest).stat().st_size))),
        "manifest_lost": damage("manifest_lost", lambda path: (path / "manifest.json").unlink()),
        "manifest_cut": damage("manifest_cut", lambda path: os.truncate(path / "manifest.json", 30)),
        "manifest_empty": damage("manifest_empty", lambda path: (path / "manifest.json").write_text("{}")),
    }
    found = {}
    for name, path in cases.items():
        message, same = lab.unchanged(policy, lambda path=path: refusal(lambda: checkpoint.load(policy, path)))
        found[name] = {"message": message, "unchanged": same}
    return found


def refusal(act: Callable[[], Any]) -> str:
    """A `UserError`'s message; anything else is told by its type, so that a test can say what came instead."""
    try:
        act()
    except UserError as error:
        return str(error)
    except BaseException as error:  # noqa: BLE001  torch's CheckpointException is no Exception
        return f"{type(error).__name__}, no UserError"
    return "accepted"


def full_disk(lab: Lab) -> dict[str, Any]:
    """A save that runs out of room, at two places, and what is left of the earlier checkpoint."""
    directory, policy = lab.home / "full", lab.policy("one", "llama")
    policy.update(batch_of())
    checkpoint.save(policy, directory, 1, {"cursor": 1}, keep=1)
    expected = lab.weights(policy)
    policy.update(batch_of())
    found: dict[str, Any] = {}
    for name, limit in (("at_once", 0), ("in_a_shard", 50_000)):
        found[name] = refusal(lambda limit=limit: limited(limit, lambda: checkpoint.save(policy, directory, 2, {}, 1)))
        found[f"{name} left"] = sorted(path.name for path in directory.iterdir())
    again = lab.policy("one", "llama")
    found["cursor"] = checkpoint.load(again, checkpoint.latest(directory))["state"]
    restored = lab.weights(again)
    found["earlier_loads"] = all(torch.equal(restored[name], expected[name]) for name in expected)
    checkpoint.save(policy, directory, 2, {}, keep=1)  # once there is room again
    found["afterwards"] = sorted(path.name for path in directory.iterdir())
    return found


def limited(size: int, act: Callable[[], Any]) -> Any:
    """Runs `act` where no file may grow beyond `size` bytes: writes fail as they do on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        return act()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def killed_while_saving(lab: Lab) -> None:
    """Ends this process by SIGKILL when all shards of step 2 are written and nothing says so yet."""
    policy, directory = lab.policy("one", "qwen2_tied"), lab.home / "killed"
    policy.update(batch_of())
    checkpoint.save(policy, directory, 1, {"cursor": 1}, keep=2)
    lab.keep("killed-1", lab.weights(policy))
    policy.update(batch_of())
    checkpoint._finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    checkpoint.save(policy, directory, 2, {"cursor": 2}, keep=2)


def two(lab: Lab) -> None:
    for kind in KINDS:
        lab.trial("tp2", kind, save=kind == "qwen2")
    lab.resume("one", "tp2", "llama_tied")
    lab.resume("tp2", "tp2", "qwen2")
    lab.note("killed", after_the_kill(lab))
    for kind in ("llama_tied", "qwen2"):
        lab.trial("pp2", kind, save=True)
    lab.resume("tp2", "pp2", "qwen2")
    lab.resume("pp2", "pp2", "llama_tied")
    for kind in ("llama_tied", "qwen2"):
        lab.trial("dp2", kind, save=True)
    lab.trial("dp2", "qwen2", packing=False)
    lab.resume("pp2", "dp2", "llama_tied")
    lab.resume("dp2", "dp2", "qwen2")
    policy = lab.policy("dp2", "llama")
    checkpoint.save(policy, lab.home / "full-two", 1, {}, keep=1)
    policy.update(batch_of())
    limit = 50_000 if lab.world.rank == 1 else resource.RLIM_INFINITY
    limited(limit, lambda: checkpoint.save(policy, lab.home / "full-two", 2, {}, keep=1))


def after_the_kill(lab: Lab) -> dict[str, Any]:
    directory = lab.home / "killed"
    before = sorted(path.name for path in directory.iterdir())
    newest = checkpoint.latest(directory)
    assert newest is not None
    policy = lab.policy("tp2", "qwen2_tied")
    state = checkpoint.load(policy, newest)["state"]
    ours, theirs = lab.weights(policy), load_file(lab.home / "killed-1.weights.safetensors")
    checkpoint.save(policy, directory, 3, {}, keep=1)
    return {
        "before": before,
        "latest": newest.name,
        "state": state,
        "same_weights": all(torch.equal(ours[name], theirs[name]) for name in theirs),
        "after": sorted(path.name for path in directory.iterdir()),
    }


def four(lab: Lab) -> None:
    for kind in ("llama_tied", "qwen2"):
        lab.trial("tp2pp2", kind, save=kind == "llama_tied")
    lab.resume("dp2", "tp2pp2", "qwen2")
    lab.trial("tp2dp2", "qwen2")
    lab.resume("tp2pp2", "tp2dp2", "llama_tied")


def probe(arguments: Sequence[str]) -> None:
    verb, home = arguments
    {"one": one, "two": two, "four": four}[verb](Lab(Path(home)))


if __name__ == "__main__":
    runtime.main(probe)
