"""Where a run's failures come from: the failure bank, mined where it is missing, or the current policy."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from nemo_r3.failures import Bank, BankSource, OnlineSource, Source, Stamp
from nemo_r3.models import fingerprint
from nemo_r3.rollout.scheduler import Rollout
from nemo_r3.types import Problem
from recipes.plan import Plan, Setup

TOOLS_ARE = {"template": "offered as the chat template shows them", "plain": "written into the user's turn"}
"""`Dialogue.tools` in words."""


def problems_to_mine(plan: Plan) -> Sequence[Problem]:
    """The training problems that the failure bank asks."""
    return plan.task.problems("train")[: plan.config.failures.problems or None]


def open_bank(setup: Setup) -> Bank | None:
    """The failure bank that this run trains from; None where `failures.source` is online.

    Raises:
        UserError: there is a bank, and it is of another model, problems, verifier or wording.
    """
    plan = setup.plan
    config = plan.config
    if config.failures.source == "online":
        return None
    stamp = Stamp(
        model=fingerprint(plan.model, plan.arch),
        problems=hashlib.sha256("\n".join(p.id for p in problems_to_mine(plan)).encode()).hexdigest()[:16],
        task=plan.task.name,
        verifier=plan.task.verifier,
        dialogue=setup.dialogue.fingerprint[:16],
        temperature=config.rollout.temperature,
        max_answer_tokens=config.rollout.max_answer_tokens,
        samples_per_problem=config.failures.samples_per_problem,
    )
    bank = Bank(config, stamp, setup.world)
    bank.check()
    return bank


def mine_missing(setup: Setup, bank: Bank, rollout: Rollout) -> None:
    """Mines what a bank lacks, if anything; the engine holds the starting weights."""
    if setup.world.broadcast(bank.check()):
        return
    problems, progress = problems_to_mine(setup.plan), setup.progress
    if any(problem.tools for problem in problems):
        tools = TOOLS_ARE[setup.dialogue.tools]
        progress.say(f"tools are {tools} (dialogue.tools={setup.plan.config.dialogue.tools})")
    progress.begin(f"mine {len(problems)} problems:")
    with setup.run.timed("mine"):
        bank.mine(rollout, problems)
    progress.say(f"mined {bank.path}: {len(bank.read())} failures of {len(problems)} problems")


def failure_source(setup: Setup, bank: Bank | None, rollout: Rollout) -> Source:
    """Gives each training step its failures: from the bank, or without one from the current policy."""
    config = setup.plan.config
    count = config.train.failures_per_step
    if bank is None:
        return OnlineSource(rollout, setup.plan.task.problems("train"), count, config.seed)
    mine_missing(setup, bank, rollout)
    return BankSource(bank.read(), count, config.seed)
