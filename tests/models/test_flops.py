"""FLOPs counted from shapes against those that torch counts on transformers' model; what chips reach at most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import EXPERTS, TINY
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from nemo_r3.algo.balance import Balance
from nemo_r3.models import Architecture, architecture_of
from nemo_r3.models.flops import peak_of, rollout_flops, scoring_cost, speed, step_flops, training_cost
from nemo_r3.types import Answer, Attempt, Group, Phase, Problem, Reflection, Row, Segment, Trajectory

SHARED, OWN, TRAINED = 24, 16, 10


@pytest.fixture(scope="module", params=["dense", "experts"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM | Qwen3MoeForCausalLM:
    # "eager" multiplies whole squares, and one expert at a time, so that torch counts what it sees
    torch.manual_seed(0)
    if request.param == "dense":
        return LlamaForCausalLM(LlamaConfig(**TINY | {"num_hidden_layers": 3}, attn_implementation="eager"))
    config = Qwen3MoeConfig(**TINY | EXPERTS, attn_implementation="eager", experts_implementation="eager")
    return Qwen3MoeForCausalLM(config)


@pytest.fixture(scope="module")
def arch(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    path = tmp_path_factory.mktemp("flops")
    model.save_pretrained(path)
    return architecture_of(path)


def row(shared: int, own: int) -> Row:
    """`shared` tokens of context, `own` of which the last ones are trained; the very last is only a target."""
    count = shared + own + 1
    weights = [0.0] * (count - TRAINED) + [1.0] * TRAINED
    phases, sampled = [Phase.REFLECTION] * count, [weight > 0 for weight in weights]
    return Row(range(count), phases, sampled, weights, weights, [0.0] * count, group=0, shared=shared)


def counted(model: Any, ids: torch.Tensor, cache: DynamicCache | None, trained: int) -> torch.Tensor:
    hidden = model.model(ids, past_key_values=cache).last_hidden_state
    return model.lm_head(hidden[:, hidden.shape[1] - trained :])


def test_a_row_of_its_own_costs_what_torch_counts(model: Any, arch: Architecture) -> None:
    with FlopCounterMode(display=False) as counter:
        counted(model, torch.arange(SHARED + OWN)[None], None, TRAINED).sum().backward()
    cost = training_cost(arch)
    length = SHARED + OWN
    square = cost.per_pair * (length * length - length * (length + 1) / 2)  # eager attends to the future, masked
    ours = Balance([row(0, length)], cost, budget=1000).flops((0,))
    assert ours + square == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert ours < counter.get_total_flops()


def test_lora_has_no_gradient_of_a_weight(model: Any, arch: Architecture) -> None:
    """But of what a weight reads; here of the embedding, which every weight's input comes from."""
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    with FlopCounterMode(display=False) as counter:
        counted(model, torch.arange(SHARED + OWN)[None], None, TRAINED).sum().backward()
    model.requires_grad_(True)
    cost, length = training_cost(arch, lora=True), SHARED + OWN
    square = cost.per_pair * (length * length - length * (length + 1) / 2)
    ours = Balance([row(0, length)], cost, budget=1000).flops((0,))
    assert ours + square == pytest.approx(counter.get_total_flops(), rel=1e-3)
    assert cost.per_pair == training_cost(arch).per_pair


def test_a_shared_context_costs_once(model: Any, arch: Architecture) -> None:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = DynamicCache()
        counted(model, torch.arange(SHARED)[None], cache, 0)
        for _ in range(3):
            counted(model, torch.arange(OWN)[None], cache, TRAINED)
            cache.crop(-OWN)
    cost = scoring_cost(arch)
    future = SHARED * (SHARED - 1) / 2 + 3 * OWN * (OWN - 1) / 2
    ours = Balance([row(SHARED, OWN)] * 3, cost, budget=1000).flops((0, 1, 2)) + cost.per_pair * future
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-3)


def group(context: int, reflection: int, retry: int, count: int) -> Group:
    """`count` reflections after one context, with a request of 2 tokens before the retry."""
    before, request = Segment(Phase.TASK, tuple(range(context))), Segment(Phase.REQUEST, (1, 2))
    answers = [
        Answer(Segment(phase, tuple(range(length)), (0.0,) * length, 0), "", "stop")
        for phase, length in ((Phase.REFLECTION, reflection), (Phase.RETRY, retry))
    ]
    problem = Problem("p", "text", {})
    trajectory = Trajectory((before, answers[0].segment, request, answers[1].segment))
    failure = Attempt(problem, 0, Trajectory((before,)), answers[0], False)
    return Group(failure, tuple(Reflection(number, trajectory, *answers, False) for number in range(count)))


def test_a_rollout_reads_each_token_once_and_samples_with_the_head(model: Any, arch: Architecture) -> None:
    context, reflection, retry = 24, 6, 4
    own = reflection + 2 + retry - 1  # the last token is sampled and not read
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        cache = DynamicCache()
        counted(model, torch.arange(context)[None], cache, 0)
        for _ in range(3):
            counted(model, torch.arange(own)[None], cache, reflection + retry)
            cache.crop(-own)
    future = context * (context - 1) / 2 + 3 * own * (own - 1) / 2
    ours = rollout_flops(arch, [group(context, reflection, retry, 3)])
    ours += scoring_cost(arch).per_pair * future
    assert ours == pytest.approx(counter.get_total_flops(), rel=1e-3)


@pytest.mark.parametrize(
    ("chip", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989e12),
        ("NVIDIA H100 80GB HBM3", "fp8-blockwise", 1979e12),
        ("NVIDIA H100 PCIe", "bf16", 756e12),
        ("NVIDIA H100 80GB HBM3", "fp32", None),
        ("NVIDIA B200", "mxfp8", 4500e12),
        ("NVIDIA A100-SXM4-80GB", "fp8-delayed", None),
        ("NVIDIA GeForce RTX 4090", "bf16", None),
        ("", "bf16", None),
    ],
)
def test_a_chips_peak_is_known_or_none(chip: str, precision: str, peak: float | None) -> None:
    assert peak_of(chip, precision) == peak


def test_speed_is_of_a_rank() -> None:
    assert speed("update", 8e15, 4.0, 2, "", "bf16") == {"speed/update_tflops": 1000.0}
    found = speed("rollout", 989e12 * 8, 16.0, 1, "NVIDIA H100 80GB HBM3", "bf16")
    assert found == {"speed/rollout_tflops": 494.5, "speed/rollout_mfu": 0.5}


def test_a_step_counts_what_scores_for_its_updates() -> None:
    """The later updates' rows by the old policy, and all rows by the reference."""
    assert step_flops([(3.0, 1.0)], reference=False) == 3
    assert step_flops([(3.0, 1.0)], reference=True) == 3 + 1
    assert step_flops([(3.0, 1.0), (6.0, 2.0)], reference=False) == 9 + 2
    assert step_flops([(3.0, 1.0), (6.0, 2.0)], reference=True) == 9 + 2 + 3
