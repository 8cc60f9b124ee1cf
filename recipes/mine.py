"""Mines the failure bank: first answers on the training split, every rejected one kept. Resumes where it stopped."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_r3 import runtime
from recipes import session


def mine(argv: Sequence[str]) -> None:
    """`python -m recipes.mine CONFIG.yaml key=value ...`."""
    plan = session.plan(argv)
    world, run = session.join(plan)
    mining = session.start_engine(plan, world, run)
    bank = session.open_bank(mining)
    if bank.check():
        mining.progress.say(f"{bank.path} is complete: {len(bank.read())} failures")
        return
    session.mine(mining, bank)


if __name__ == "__main__":
    runtime.main(mine)
