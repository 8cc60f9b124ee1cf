"""Measures a run on held-out problems, before and after: first try, second try, and within two tries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_r3 import runtime
from nemo_r3.evaluate import as_json, measure
from nemo_r3.refit import refit
from nemo_r3.report import table
from recipes import session


def evaluate(argv: Sequence[str]) -> None:
    """`python -m recipes.evaluate CONFIG.yaml key=value ...`; without a checkpoint, the starting model alone."""
    ground = session.join(session.plan(argv), trains=False)
    plan, run = ground.plan, ground.run
    trained = session.trained_checkpoint(ground)
    policy = session.start_policy(ground, trains=False) if trained is not None else None
    rl = session.start_engine(ground)
    problems = plan.task.problems("test")[: plan.config.evaluate.problems or None]

    rl.progress.begin("evaluate the starting model:")
    with run.timed("evaluate"):
        before, failures = measure(rl.rollout, problems)
    entries: dict[str, Any] = {"before": as_json(before), "after": None, "step": None}
    if policy is not None and trained is not None:
        from nemo_r3.actor import checkpoint  # megatron-core: after `join` has prepared the environment

        entries["step"] = checkpoint.load(policy, trained)["step"]
        refit(policy, rl.engine)
        rl.progress.begin(f"evaluate step {entries['step']}:")
        with run.timed("evaluate"):
            after, _ = measure(rl.rollout, problems, failures)
        entries["after"] = as_json(after)
    rl.progress.say(table(run.add_to_summary(**entries, versions=session.versions())))


if __name__ == "__main__":
    runtime.main(evaluate)
