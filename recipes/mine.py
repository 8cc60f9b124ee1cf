"""Mines the failure bank: samples first answers on the training split and keeps every rejected one. Resumes."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_r3 import entry
from nemo_r3.errors import UserError
from recipes.bank import bank_rows, open_bank
from recipes.setup import join
from recipes.start import start_rollout


def mine(argv: Sequence[str]) -> None:
    """`python -m recipes.mine CONFIG.yaml key=value ...`."""
    setup = join(argv, trains=False)
    setup.check_trackers()  # training will need them
    bank = open_bank(setup)
    if bank is None:
        raise UserError("failures.source=online keeps no bank to mine; it must be bank")
    if bank.is_complete():
        setup.progress.say(f"{bank.path} is complete: {len(bank.read())} failures")
        return
    bank_rows(setup, bank, start_rollout(setup))
    setup.run.add_to_summary()


if __name__ == "__main__":
    entry.main(mine)
