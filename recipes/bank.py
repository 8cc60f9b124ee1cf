"""Where a run's failures come from: the failure bank, mined if it is missing, or the current policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from nemo_r3.errors import UserError
from nemo_r3.failures.bank import Bank, BankRow
from nemo_r3.failures.source import BankSource, OnlineSource, Source
from nemo_r3.failures.stamp import Stamp, hash_of
from nemo_r3.failures.tally import show
from nemo_r3.models import fingerprint
from nemo_r3.rollout.scheduler import Rollout
from nemo_r3.types import Problem
from recipes.metrics import warn_of_long_problems, warn_of_truncated_answers
from recipes.setup import Setup
from recipes.start import refit_if_behind

if TYPE_CHECKING:
    from nemo_r3.actor.policy import Policy

TOOLS_ARE = {"template": "offered as the chat template shows them", "plain": "written into the user's turn"}
"""`Dialogue.tools` in words."""


def problems_to_mine(setup: Setup) -> Sequence[Problem]:
    """The training problems that the failure bank is mined from.

    Raises:
        UserError: the task has none.
    """
    if problems := setup.task.problems("train")[: setup.config.failures.problems or None]:
        return problems
    raise UserError("failures.source=bank: the task has no training problems; lower task.options.test_size")


def open_bank(setup: Setup) -> Bank | None:
    """The failure bank that this run trains from; None if `failures.source` is online.

    Raises:
        UserError: there is a bank of another model, problems, verifier or wording; or the task has nothing to mine.
    """
    config = setup.config
    if config.failures.source == "online":
        return None
    stamp = stamp_of(setup, problems_to_mine(setup), config.failures.samples_per_problem)
    return Bank(config, stamp, setup.world, setup.dialogue.decode)


def stamp_of(setup: Setup, problems: Sequence[Problem], samples: int) -> Stamp:
    """What the starting model's answers, so many to each of the problems, depend on."""
    return Stamp(
        model=fingerprint(setup.model, setup.arch),
        problems=hash_of(problems),
        task=setup.task.name,
        verifier=setup.task.verifier,
        dialogue=setup.dialogue.fingerprint[:16],
        temperature=setup.config.rollout.temperature,
        max_answer_tokens=setup.config.rollout.max_answer_tokens,
        samples_per_problem=samples,
    )


def bank_rows(setup: Setup, bank: Bank, rollout: Rollout) -> list[BankRow]:
    """The bank's failures, after mining what is missing, for which the engine must hold the starting weights."""
    if bank.is_complete():
        return bank.read()
    problems, progress = problems_to_mine(setup), setup.progress
    if any(problem.tools for problem in problems):
        tools = TOOLS_ARE[setup.dialogue.tools]
        progress.say(f"tools are {tools} (dialogue.tools={setup.config.dialogue.tools})")
    progress.say(f"mining {len(problems):,} problems")
    progress.begin("mine")
    with setup.run.timed("mine"):
        bank.mine(rollout, problems, progress)
    tally = bank.tally()
    warn_of_long_problems(setup, rollout)
    warn_of_truncated_answers(setup, tally.truncated_share)
    progress.say(tally.line(len(problems)))
    if doubt := tally.doubt():
        progress.say(f"one of them:\n{show(bank.example)}\n{doubt}" if bank.example else doubt)
    rows = bank.read()
    cut = f"{tally.truncated_share:.0%} of the answers cut at rollout.max_answer_tokens"
    progress.say(f"mined {bank.path}: {len(rows)} failures of {len(problems)} problems, {cut}")
    return rows


def failure_source(setup: Setup, bank: Bank | None, policy: Policy, rollout: Rollout) -> Source:
    """Gives each training step its failures: from the bank, or if there is none, from the current policy.

    A bank that is not complete is mined first, from the policy's starting weights.
    """
    config = setup.config
    count = config.train.failures_per_step
    if bank is None:
        return OnlineSource(rollout, setup.task.problems("train"), count, config.seed)
    if not bank.is_complete():
        refit_if_behind(setup, policy, rollout)
    return BankSource(bank_rows(setup, bank, rollout), count, config.seed, setup.world)
