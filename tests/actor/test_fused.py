"""What is compiled on CUDA can be traced, for any number of tokens, and computes what it does on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_r3.actor import attention, head
from nemo_r3.actor.fused import fused

VOCAB, HEADS, DIM, TURNING = 37, 3, 10, 8


def calls(tokens: int) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every compiled function with arguments as the actor gives them."""
    draw = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    logits = (normal(tokens, VOCAB) * 5).bfloat16()
    heads, other = normal(tokens, HEADS, DIM).bfloat16(), normal(tokens, HEADS, DIM).bfloat16()
    waves = normal(tokens, 1, TURNING // 2).bfloat16(), normal(tokens, 1, TURNING // 2).bfloat16()
    sums = normal(HEADS, tokens), normal(HEADS, tokens)
    return [
        (head._softmax_sums, (logits, 0.7)),
        (head._softmax_times, (logits, normal(tokens) + 9, normal(tokens), 0.7)),
        (attention._rotated, (heads, *waves)),
        (attention.merge, ((heads, sums[0]), (other, sums[1]))),
    ]


def test_it_can_be_traced_and_stays_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.setattr(torch._dynamo.config, "disable", False)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    counters.clear()
    for tokens in (20, 1, 5):
        for function, arguments in calls(tokens):
            traced = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
            torch.testing.assert_close(traced(*arguments), function(*arguments), rtol=0, atol=0)
    assert counters["unique_graphs"] >= len(calls(1))


def test_on_a_cpu_nothing_is_compiled() -> None:
    assert fused(attention.merge, torch.zeros(1)) is attention.merge


def test_what_is_compiled_turns_as_what_is_not() -> None:
    [arguments] = [arguments for function, arguments in calls(5) if function is attention._rotated]
    heads, cos, sin = (tensor.double() for tensor in arguments)
    torch.testing.assert_close(attention._rotated(heads, cos, sin), attention.rotate(heads, cos, sin))


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_it_is_on_a_cpu() -> None:
    for tokens in (20, 1, 5):
        for function, arguments in calls(tokens):
            moved = torch.utils._pytree.tree_map_only(Tensor, Tensor.cuda, arguments)
            ours = fused(function, torch.zeros(1, device="cuda"))(*moved)
            back = torch.utils._pytree.tree_map_only(Tensor, Tensor.cpu, ours)
            torch.testing.assert_close(back, function(*arguments), rtol=0.02, atol=0.02)
