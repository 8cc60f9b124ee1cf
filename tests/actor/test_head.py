"""The head on trained positions against a full softmax; its tensor parallelism is in test_policy.py's layouts."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nemo_r3.actor import head
from nemo_r3.actor.head import Columns, target_logprobs

VOCAB, PADDED, HIDDEN, TOKENS = 53, 56, 16, 21


def draws(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, generator=draw, dtype=torch.float64)
    weight = torch.randn(PADDED, HIDDEN, generator=draw, dtype=torch.float64)
    targets = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), targets


@pytest.mark.parametrize("chunk_tokens", [1, 5, 21, 1000])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_logprobs_entropies_and_gradients_equal_a_full_softmax(
    monkeypatch: pytest.MonkeyPatch, chunk_tokens: int, temperature: float
) -> None:
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", chunk_tokens * VOCAB)
    hidden, weight, targets = draws()
    outside = torch.linspace(-1, 1, TOKENS)
    logprobs, entropies = target_logprobs(hidden, weight, targets, temperature, Columns(0, VOCAB, None))
    assert not entropies.requires_grad
    found = torch.autograd.grad((logprobs * outside).sum(), (hidden, weight))

    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    whole = torch.log_softmax(exact[0] @ exact[1][:VOCAB].t() / temperature, -1)
    expected = whole.gather(1, targets[:, None])[:, 0]
    gradients = torch.autograd.grad((expected * outside).sum(), exact)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies.double(), -(whole.exp() * whole).sum(-1), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    assert not found[1][VOCAB:].any(), "padding rows of the vocabulary learn nothing"


def test_the_largest_chunk_is_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", 8 * PADDED)  # 8, 8 and 5 tokens
    hidden, weight, targets = draws()
    logprobs, _ = target_logprobs(hidden, weight, targets, 1.0, Columns(0, VOCAB, None))
    with FlopCounterMode(display=False) as backward:
        logprobs.sum().backward()
    one_token = 2 * HIDDEN * VOCAB
    assert backward.get_total_flops() == one_token * (2 * TOKENS + 8 + 5)


def test_bfloat16_is_as_exact_as_bfloat16_logits_are() -> None:
    hidden, weight, targets = draws(torch.bfloat16)
    logprobs, _ = target_logprobs(hidden, weight, targets, 1.0, Columns(0, VOCAB, None))
    logprobs.sum().backward()
    exact = torch.log_softmax(hidden.detach().double() @ weight.detach().double()[:VOCAB].t(), -1)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), exact.gather(1, targets[:, None])[:, 0], rtol=0, atol=0.05)
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_many_chunks_in_bfloat16_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    _, weight, _ = draws(torch.bfloat16)
    hidden, targets = torch.ones(600, HIDDEN, dtype=torch.bfloat16), torch.zeros(600, dtype=torch.int64)
    gradients = []
    for chunk_tokens in (1, 600):
        monkeypatch.setitem(head.CHUNK_ELEMENTS, "cpu", chunk_tokens * PADDED)
        logprobs, _ = target_logprobs(hidden, weight, targets, 1.0, Columns(0, VOCAB, None))
        gradients += torch.autograd.grad(logprobs.sum(), weight)
    torch.testing.assert_close(*gradients, rtol=0.01, atol=0.01)


def test_huge_logits_do_not_overflow() -> None:
    hidden, weight, targets = draws()
    logprobs, entropies = target_logprobs(hidden * 1e4, weight, targets, 1.0, Columns(0, VOCAB, None))
    assert logprobs.isfinite().all() and entropies.isfinite().all() and (entropies >= 0).all()


def test_no_targets_have_a_gradient_of_zero() -> None:
    hidden, weight, targets = draws()
    logprobs, entropies = target_logprobs(hidden[:0], weight, targets[:0], 1.0, Columns(0, VOCAB, None))
    assert logprobs.shape == entropies.shape == (0,)
    logprobs.sum().backward()
    assert not weight.grad.any() and not hidden.grad.any()


@pytest.mark.gpu
def test_on_a_gpu_it_is_what_it_is_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(head.CHUNK_ELEMENTS, "cuda", 8 * VOCAB)
    found = []
    for device in ("cpu", "cuda"):
        hidden, weight, targets = (tensor.detach().to(device) for tensor in draws(torch.bfloat16))
        inputs = hidden.requires_grad_(), weight.requires_grad_()
        logprobs, entropies = target_logprobs(*inputs, targets, 0.7, Columns(0, VOCAB, None))
        gradients = torch.autograd.grad((logprobs * torch.linspace(-1, 1, TOKENS, device=device)).sum(), inputs)
        found.append([tensor.float().cpu() for tensor in (logprobs.detach(), entropies, *gradients)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0.05)
