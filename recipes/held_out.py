"""`HeldOut`: how a run does on held-out problems while it trains.

The problems and the seeds are those of `recipes.evaluate`, so its rates of a checkpoint are those of the measurement
with the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_r3.evaluate import EVALUATION_STEP, measure_while_training
from nemo_r3.failures.bank import failure_of, row_of
from nemo_r3.files import sealed, unsealed, write_whole
from nemo_r3.progress import warn
from nemo_r3.rollout.scheduler import Rollout
from nemo_r3.types import Attempt, Problem
from recipes.bank import stamp_of
from recipes.setup import Setup
from recipes.start import refit_if_behind

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy

FILE = "held_out.json"
"""In the run directory: the starting model's failures on the held-out problems, and what they depend on."""


def held_out_problems(setup: Setup) -> Sequence[Problem]:
    """The problems that are measured, and never trained on."""
    return setup.task.problems("test")[: setup.config.evaluate.problems or None]


class HeldOut:
    """Measures the weights after every `evaluate.every`-th step, and the starting ones. Ranks make the same calls.

    The second try is always on the starting model's failures: the policy's own would be fewer and harder each time.
    """

    def __init__(self, setup: Setup, policy: Policy, rollout: Rollout) -> None:
        """Has the policy answer the problems once in a run's life, while it still has its starting weights."""
        self._setup, self._policy, self._rollout = setup, policy, rollout
        self._every = setup.config.evaluate.every
        if self._every:
            self._problems = held_out_problems(setup)
            self._failures = _starting_failures(setup, policy, rollout, self._problems)

    def measured(self, step: int) -> dict[str, float | None]:
        """The rates of the weights that sample `step`, which the engine holds, as metrics; none if none are due.

        Raises:
            Stopped: a signal asked for that.
            VerifierError: the verifier failed on an answer.
        """
        if not self._every or (step - 1) % self._every:
            return {}
        assert self._rollout.engine.version == self._policy.version, "a step is sampled by the newest weights"
        self._rollout.turns.begin(step)  # what a stopped process kept of it outlives what is sampled here
        with self._setup.run.timed("held_out"):
            rates = measure_while_training(self._rollout, self._problems, self._failures)
        shown = "  ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in rates.items())
        self._setup.progress.say(f"held out, after step {step - 1}: {shown}")
        return {f"held_out/{name}": value for name, value in rates.items()}


def _starting_failures(setup: Setup, policy: Policy, rollout: Rollout, problems: Sequence[Problem]) -> list[Attempt]:
    """The starting model's failures that this run keeps; if it has none, or those of other settings, new ones."""
    stamp = vars(stamp_of(setup, problems, samples=1)) | {"seed": setup.config.seed}
    file = setup.run.path / FILE
    kept = setup.world.on_main(lambda: _read(file, stamp))
    if kept is not None:
        return kept
    refit_if_behind(setup, policy, rollout)
    asked = setup.config.evaluate
    setup.progress.say(
        f"the starting model answers {len(problems):,} held-out problems, as later weights will "
        f"(evaluate.problems={asked.problems} evaluate.every={asked.every})"
    )
    setup.progress.begin("held out")
    with setup.run.timed("held_out"):
        attempts = rollout.first_attempts(problems, EVALUATION_STEP)
    failures = [attempt for attempt in attempts if attempt.is_failure]
    rows = [row_of(failure, solve_rate=0.0) for failure in failures]
    setup.world.on_main(lambda: write_whole(file, sealed({"stamp": stamp, "failures": rows})))
    return failures


def _read(file: Path, stamp: dict[str, Any]) -> list[Attempt] | None:
    """The failures in a file, if it has this stamp."""
    try:
        kept = unsealed(file.read_text()) if file.exists() else {}
    except ValueError as error:
        warn(f"{file} is damaged ({error}): its problems are asked again")
        return None
    return [failure_of(row) for row in kept["failures"]] if kept.get("stamp") == stamp else None


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
