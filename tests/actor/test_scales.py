"""Delayed scaling's scales in a checkpoint; with Transformer Engine itself in test_te.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import layers
import torch
from safetensors.torch import load
from torch import nn

from nemo_r3.actor import scales
from nemo_r3.actor.numerics import LayerWatch
from nemo_r3.precision import TENSORWISE
from nemo_r3.runtime import World


class Layer(nn.Module):
    """What of Transformer Engine's layers matters: `fp8_meta`, filled by `init_fp8_meta_tensors`."""

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {}

    def get_extra_state(self) -> torch.Tensor:
        raise AssertionError("would pickle")

    def set_extra_state(self, state: torch.Tensor) -> None:
        raise AssertionError("would refuse")

    def init_fp8_meta_tensors(self, recipe: object) -> None:
        for way, operands in (("scaling_fwd", 3), ("scaling_bwd", 2)):
            tensors = {"scale": torch.ones(operands), "amax_history": torch.zeros(4, operands)}
            self.fp8_meta[way] = SimpleNamespace(**tensors)


def model_of(monkeypatch: Any, delayed: bool = True) -> nn.Sequential:
    monkeypatch.setattr(scales, "get_fp8_recipe", lambda config: "a recipe")
    model = nn.Sequential(Layer(), nn.Linear(2, 2))
    model.config = None
    scales.keep_scales(model, delayed)
    return model


def test_scales_come_back_as_they_were_and_are_no_pickle(monkeypatch: Any) -> None:
    model, fresh = model_of(monkeypatch), model_of(monkeypatch)
    assert model[0].get_extra_state().numel() == 0 and not scales._knows_scales(model)
    model[0].init_fp8_meta_tensors("a recipe")
    assert not scales._knows_scales(model), "a history of zeros knows nothing"
    model[0].fp8_meta["scaling_bwd"].amax_history[1, 0] = 3.0
    model[0].fp8_meta["scaling_fwd"].scale[2] = 7.0
    state = model[0].get_extra_state()
    assert len(load(state.numpy().tobytes())) == 4
    fresh.load_state_dict(model.state_dict())
    assert scales._knows_scales(fresh) and fresh[0].fp8_meta["recipe"] == "a recipe"
    for way in ("scaling_fwd", "scaling_bwd"):
        ours, theirs = vars(fresh[0].fp8_meta[way]), vars(model[0].fp8_meta[way])
        assert all(torch.equal(ours[name], theirs[name]) for name in ("scale", "amax_history"))


def test_another_recipe_takes_no_scales(monkeypatch: Any) -> None:
    model, plain = model_of(monkeypatch), model_of(monkeypatch, delayed=False)
    model[0].init_fp8_meta_tensors("a recipe")
    plain.load_state_dict(model.state_dict())
    assert not plain[0].fp8_meta


def test_passes_that_are_thrown_away_are_not_measured() -> None:
    torch.manual_seed(0)
    stack, numbers = nn.Sequential(*(layers.Layer(number) for number in range(1, 4))), torch.randn(3, 8)
    trunk = SimpleNamespace(decoder=SimpleNamespace(layers=stack), config=SimpleNamespace(num_layers=3))
    watch, alone = LayerWatch(trunk, TENSORWISE), cast(World, SimpleNamespace(gather=lambda item: [item]))

    def accumulate() -> None:
        passes.append(stack(numbers).sum().backward())

    def measured(finds_scales: bool) -> dict[str, Any]:
        with watch.watching():
            if finds_scales:
                scales.find_scales(stack, alone, accumulate)
            accumulate()
        return {key: vars(rounding) for key, rounding in watch._roundings.items()}

    passes: list[None] = []
    expected = measured(finds_scales=False)
    assert len(expected) == 3 * 4 * 3 and measured(finds_scales=True) == expected
    assert len(passes) == 1 + 3
