"""Measures a run on held-out problems, before and after: first try, second try, and within two tries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nemo_r3 import entry, trackers
from nemo_r3.evaluate import differences, measure, numbers, scores
from nemo_r3.refit import refit
from nemo_r3.results import table
from recipes.held_out import held_out_problems
from recipes.metrics import versions, warn_of_long_problems, warn_of_truncated_answers
from recipes.outcome import report
from recipes.setup import join
from recipes.start import start_policy, start_rollout


def evaluate(argv: Sequence[str]) -> None:
    """`python -m recipes.evaluate CONFIG.yaml key=value ...`; without a checkpoint, the starting model alone."""
    setup = join(argv, trains=False)
    setup.check_trackers()
    from nemo_r3.actor import checkpoint  # megatron-core: after `join`
    from recipes import checkpoints

    run, progress, config = setup.run, setup.progress, setup.config
    trained = checkpoints.trained(setup)
    if trained is None:
        progress.say(f"no checkpoint in {run.path}: measuring the starting model only")
    policy, step = None, None
    if trained is not None:  # read before anything is measured: a run on its way removes it after some more saves
        policy = start_policy(setup)
        step = checkpoint.load_weights(policy, trained)["step"]
    rollout = start_rollout(setup)
    problems = held_out_problems(setup)

    progress.begin("evaluate the starting model:")
    with run.timed("evaluate"):
        before, reflected = measure(rollout, problems)
    verdicts, dialogues = {"before": before}, {0: reflected}
    entries: dict[str, Any] = {"before": scores(before), "after": None, "difference": None, "step": step}
    if policy is not None:
        refit(policy, rollout.engine)
        progress.begin(f"evaluate step {step}:")
        with run.timed("evaluate"):
            after, dialogues[entries["step"]] = measure(rollout, problems, reflected)
        verdicts["after"] = after
        entries |= {"after": scores(after), "difference": differences(before, after)}
    warn_of_long_problems(setup, rollout)
    warn_of_truncated_answers(setup, scores(before)["attempts_truncated"]["sampled"]["value"])
    summary = run.add_to_summary(**entries, versions=versions())
    run.write_verdicts(problems, [group.failure for group in reflected], verdicts)
    run.write_dialogues(dialogues)
    if setup.world.is_main:
        trackers.show_results(config, run.path, numbers(summary))
    progress.say(table(summary))
    report(setup)


if __name__ == "__main__":
    entry.main(evaluate)
