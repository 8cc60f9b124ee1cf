"""When layers are watched, and which are taken out of FP8; Transformer Engine's part is in tests/actor/test_te.py."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from layers import Layer
from torch import nn

from nemo_r3.actor.numerics import LayerWatch
from nemo_r3.config import Config
from recipes.counters import Counters, reason_to_stop
from recipes.layers import Layers, worst_layers


def rows(errors: dict[int, float], operand: str = "input", fp8: bool = True) -> list[dict[str, Any]]:
    return [
        {"layer": layer, "matrix": matrix, "operand": operand, "fp8": fp8, "error": error}
        for layer, error in errors.items()
        for matrix in ("mlp.linear_fc1", "mlp.linear_fc2")
    ]


def test_a_quarter_of_the_layers_that_are_left_and_at_least_one() -> None:
    errors = {layer: 0.02 + 0.001 * (layer % 5) for layer in range(9)}
    assert list(worst_layers(rows(errors))) == [4, 3, 8]
    assert worst_layers(rows({7: 0.03})) == {7: 0.03}
    assert worst_layers(rows({7: 0.03}, fp8=False)) == {}


def test_input_and_weight_count_together_gradients_do_not_and_nan_is_the_worst() -> None:
    found = rows({1: 0.03, 2: 0.04}) + rows({1: 0.04, 2: 0.001}, "weight") + rows({2: 0.9}, "gradient")
    assert worst_layers(found) == {1: math.hypot(0.03, 0.04)}
    assert worst_layers([*found, *rows({2: math.nan})]) == {2: math.inf}


class Run:
    """A run of eight layers: what it logged, what it said, and which layers left FP8."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **train: Any) -> None:
        self.config = Config()
        self.config.actor.precision = "fp8-tensorwise"
        for name, value in ({"max_mismatch_steps": 2, "on_mismatch": "bf16", "layers_every": 0} | train).items():
            setattr(self.config.train, name, value)
        self.logged: dict[int, Any] = {}
        self.said: list[str] = []
        self.left: list[int] = []
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(Layer(number) for number in range(1, 9)))

        def leave_fp8(watch: LayerWatch, layers: Collection[int]) -> None:
            watch._plain |= set(layers)
            self.left += layers

        monkeypatch.setattr(LayerWatch, "leave_fp8", leave_fp8)

    def begin(self, counters: Counters) -> Layers:
        trunk: Any = SimpleNamespace(decoder=SimpleNamespace(layers=self.layers), config=SimpleNamespace(num_layers=8))
        world = SimpleNamespace(gather=lambda item: [item])
        run = SimpleNamespace(log_layers=self.logged.__setitem__)
        progress = SimpleNamespace(say=self.said.append)
        setup: Any = SimpleNamespace(config=self.config, world=world, run=run, progress=progress)
        return Layers(setup, trunk, counters)

    def step(self, layers: Layers, counters: Counters, mismatch: float) -> Counters:
        with layers.watched(counters):
            self.layers(torch.randn(5, 8)).sum().backward()
        metrics = {"loss": 0.1, "groups_used": 32.0, "token_mult_prob_error": mismatch}
        return layers.move_worst_to_bf16(counters.after(counters.step + 1, 0, metrics, self.config.train))


def test_a_record_is_made_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(monkeypatch, on_mismatch="stop", layers_every=3)
    layers, counters = run.begin(Counters()), Counters()
    for _ in range(7):
        counters = run.step(layers, counters, mismatch=1.5)
    assert list(run.logged) == [3, 6] and all(len(rows) == 8 * 4 * 3 for rows in run.logged.values())
    assert counters.mismatch_steps == 7 and not run.left, "on_mismatch=stop leaves the end to `reason_to_stop`"


def test_mismatches_cost_a_quarter_of_the_fp8_layers_after_a_quarter_and_then_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(monkeypatch)
    layers, counters = run.begin(Counters()), Counters()
    assert run.step(layers, counters, mismatch=1.0) == replace(counters, step=1) and not run.logged, (
        "sound steps are not watched"
    )
    counts = []
    while reason_to_stop(counters, run.config.train, None, (), {}) is None:
        counters = run.step(layers, counters, mismatch=1.5)
        counts.append(len(counters.bf16_layers))
    assert counts == [0, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 6], "layers 1 to 6 are FP8 at first"
    assert counters.bf16_layers == sorted(run.left) == [1, 2, 3, 4, 5, 6]
    assert all(row["fp8"] == (row["layer"] in (1, 2, 3, 4, 5, 6)) for row in run.logged[2])
    assert len(run.said) == 5 and all("multiply in BF16 (train.on_mismatch=bf16)" in line for line in run.said)
    resumed = Run(monkeypatch)
    resumed.begin(counters)
    assert resumed.left == counters.bf16_layers
