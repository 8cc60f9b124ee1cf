"""`Layers`: measures FP8's error in each layer, and moves the worst layers to BF16 when vLLM and actor disagree."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from nemo_r3.actor.numerics import LayerWatch
from nemo_r3.precision import precision_of
from recipes.counters import Counters
from recipes.setup import Setup


class Layers:
    """The policy's layers; every rank makes the same calls."""

    def __init__(self, setup: Setup, trunk: nn.Module, counters: Counters) -> None:
        """Moves those layers to BF16 that were there when the checkpoint was saved that the run resumes from."""
        config = setup.config
        self._config, self._setup = config.train, setup
        self._watch = LayerWatch(trunk, precision_of(config).fp8)
        self._measured: list[dict[str, Any]] = []
        if counters.bf16_layers:
            self._watch.leave_fp8(counters.bf16_layers)

    @contextmanager
    def watched(self, counters: Counters) -> Iterator[None]:
        """Measures the update in its block and logs it to layers.jsonl, in every `train.layers_every`-th step.

        With `train.on_mismatch=bf16` also in each step that may be one mismatch too many: `move_worst_to_bf16` then
        knows which layers are the worst.
        """
        step, config = counters.step + 1, self._config
        may_move = config.on_mismatch == "bf16" and counters.mismatch_steps + 1 >= config.max_mismatch_steps
        if not (may_move or (config.layers_every and step % config.layers_every == 0)):
            yield
            return
        with self._watch.watching():
            yield
        self._measured = self._watch.rows(self._setup.world)
        self._setup.run.log_layers(step, self._measured)

    def move_worst_to_bf16(self, counters: Counters) -> Counters:
        """After too many mismatches, moves the worst FP8 layers to BF16 and restarts the count, instead of stopping.

        Only with `train.on_mismatch=bf16`, and while there are FP8 layers.
        """
        config = self._config
        if config.on_mismatch == "stop" or counters.mismatch_steps < config.max_mismatch_steps:
            return counters
        if not (worst := worst_layers(self._measured)):
            return counters
        self._watch.leave_fp8(worst)
        names = ", ".join(f"{layer} ({error:.1%} off)" for layer, error in sorted(worst.items()))
        self._setup.progress.say(
            f"MISMATCH: {counters.mismatch_steps} steps above train.mismatch_stop={config.mismatch_stop}: from here on "
            f"layers {names} multiply in BF16 (train.on_mismatch=bf16)"
        )
        return replace(counters, mismatch_steps=0, bf16_layers=sorted({*counters.bf16_layers, *worst}))


def worst_layers(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Of `LayerWatch.rows`, the quarter of the FP8 layers, at least one, with the largest relative error, and that.

    A product's error is that of its input and its weight together; a layer's is that of its worst product. Errors of
    gradients do not count: a mismatch is an error of log-probabilities, which the forward pass alone makes.
    """
    squares: dict[tuple[int, str], float] = {}
    for row in rows:
        if row["fp8"] and row["operand"] != "gradient":
            error = row["error"] if math.isfinite(row["error"]) else math.inf
            squares[row["layer"], row["matrix"]] = squares.get((row["layer"], row["matrix"]), 0.0) + error**2
    errors: dict[int, float] = {}
    for (layer, _), square in squares.items():
        errors[layer] = max(errors.get(layer, 0.0), math.sqrt(square))
    worst = sorted(errors, key=lambda layer: (-errors[layer], layer))[: math.ceil(len(errors) / 4)]
    return {layer: errors[layer] for layer in worst}
