"""`Layers`: the record of what FP8 costs each layer, and BF16 for those it costs most once a run drifts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from recipes.counters import Counters
from recipes.session import Ground, Session

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy


class Layers:
    """The layers of a run; every rank makes the same calls."""

    def __init__(self, ground: Ground, policy: Policy, session: Session, at: Counters) -> None:
        """Those that drifted before the checkpoint that the run goes on from multiply in BF16 again."""
        from nemo_r3.actor.numerics import LayerWatch  # torch: after `join` has prepared the environment
        from nemo_r3.precision import precision_of

        config = ground.plan.config
        self._config, self._ground, self._progress = config.train, ground, session.progress
        self._watch = LayerWatch(policy.module, precision_of(config).fp8)
        self._found: list[dict[str, Any]] = []
        if at.bf16_layers:
            self._watch.leave_fp8(at.bf16_layers)

    @contextmanager
    def watched(self, at: Counters) -> Iterator[None]:
        """Watches the update after `at`, where a record is due or the run may be about to drift for too long."""
        step, every = at.step + 1, self._config.layers_every
        last_chance = self._config.on_drift == "bf16" and at.drift_steps + 1 >= self._config.max_drift_steps
        if not (last_chance or (every and step % every == 0)):
            yield
            return
        with self._watch.watching():
            yield
        self._found = self._watch.found(self._ground.world)
        self._ground.run.log_layers(step, self._found)

    def relieve(self, at: Counters) -> Counters:
        """With `train.on_drift=bf16`, takes layers out of FP8 where the run would give up; then it need not, yet."""
        if self._config.on_drift == "stop" or at.drift_steps < self._config.max_drift_steps:
            return at
        if not (worst := costliest(self._found)):
            return at
        self._watch.leave_fp8(worst)
        names = ", ".join(f"{layer} ({error:.1%} off)" for layer, error in sorted(worst.items()))
        self._progress.say(
            f"DRIFT: {at.drift_steps} steps above train.drift_stop={self._config.drift_stop}: from here on layers "
            f"{names} multiply in BF16 (train.on_drift=bf16)"
        )
        return replace(at, drift_steps=0, bf16_layers=sorted({*at.bf16_layers, *worst}))


def costliest(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """A quarter of the layers in FP8, at least one: those whose products are furthest off, with how far that is.

    A product is as far off as its input and its weight together, a layer as its worst product. Gradients do not count:
    what drifts are log-probabilities.
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
