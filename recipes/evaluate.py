"""Measures a run on held-out problems, before and after: first try, second try, and within two tries."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_r3 import runtime
from nemo_r3.evaluate import as_json, fixed_failures, measure
from nemo_r3.refit import refit
from nemo_r3.report import table
from recipes import session


def evaluate(argv: Sequence[str]) -> None:
    """`python -m recipes.evaluate CONFIG.yaml key=value ...`; without a checkpoint, the starting model alone."""
    plan = session.plan(argv)
    world, run = session.join(plan)

    from nemo_r3.actor import checkpoint  # megatron-core: after `join` has prepared the environment

    asked = plan.config.evaluate.checkpoint
    trained = Path(asked) if asked else checkpoint.latest(run.checkpoints)
    run.path.mkdir(parents=True, exist_ok=True)
    rl = session.start_engine(plan, world, run)
    problems = plan.task.problems("test")[: plan.config.evaluate.problems or None]

    rl.progress.begin("evaluate the starting model")
    with run.timed("evaluate"):
        fixed = fixed_failures(rl.rollout, problems)
        before = measure(rl.rollout, problems, fixed)
    entries = {"before": as_json(before), "versions": session.versions()}
    if trained is not None:
        policy = session.start_policy(plan, world)
        step = checkpoint.load(policy, trained)["step"]
        refit(policy, rl.engine)
        rl.progress.begin(f"evaluate step {step}")
        with run.timed("evaluate"):
            entries |= {"after": as_json(measure(rl.rollout, problems, fixed)), "step": step}
    result = run.add_to_summary(**entries, seconds=run.seconds())
    rl.progress.say(table(result))


if __name__ == "__main__":
    runtime.main(evaluate)
