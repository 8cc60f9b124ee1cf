"""Mines the failure bank: first answers on the training split, every rejected one kept. Resumes where it stopped."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_r3 import runtime
from nemo_r3.errors import UserError
from recipes import session


def mine(argv: Sequence[str]) -> None:
    """`python -m recipes.mine CONFIG.yaml key=value ...`."""
    ground = session.join(session.plan(argv), trains=False)
    bank = session.open_bank(ground)
    if bank is None:
        raise UserError("failures.source=online keeps no bank to mine; it must be bank")
    rows = session.fill(bank, ground, session.start_engine(ground))
    ground.run.add_to_summary()
    if ground.world.is_main:
        print(f"{bank.path} is complete: {len(rows)} failures")


if __name__ == "__main__":
    runtime.main(mine)
