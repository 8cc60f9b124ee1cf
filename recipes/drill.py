"""The resume drill: a run that is killed and resumed several times must give the same as one that is not.

<run.dir>/drill/whole    runs to its end undisturbed
<run.dir>/drill/killed   is killed at random, killed while it saves, or stopped by SIGUSR1, in turns, and resumed
verdict                  same failure bank, rollouts and metrics (except times and the like), each step logged once
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from pathlib import Path

from nemo_r3 import config as configuration
from nemo_r3 import entry
from nemo_r3.errors import UserError
from recipes.fault_injection import PATIENCE, Launch, differences, ranks_of

KINDS = ("at random", "while saving", "SIGUSR1")


def drill(argv: Sequence[str]) -> None:
    """`python -m recipes.drill CONFIG.yaml key=value ...`; an error if the two runs differ."""
    config = configuration.load(argv)
    ranks, kills, steps = ranks_of(config), config.drill.kills, config.train.steps
    home = Path(config.run.dir) / "drill"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    whole, killed = (Launch(argv, ranks, home / name) for name in ("whole", "killed"))

    seconds = whole.finish()
    print(f"left alone: {steps} steps in {seconds:.0f} s", flush=True)
    draw = random.Random(config.seed)
    for number in range(kills):
        kind, wait = KINDS[number % len(KINDS)], draw.uniform(0.3, 1.0) * seconds
        waits = [killed.writing if kind == "while saving" else wait]
        code, lived = killed.interrupt(kind, waits, patience=PATIENCE * seconds)
        print(f"kill {number + 1}/{kills} {kind}: after {lived:.0f} s, code {code}", flush=True)
    killed.finish()
    differing = differences(whole.path, killed.path, steps)
    for line in differing:
        print(f"differs: {line}")
    if differing:
        raise UserError(f"the run that was killed {kills} times differs from the one left alone")
    print(f"the same, after {kills} kills: failure bank, {steps} steps, rollouts")


if __name__ == "__main__":
    entry.main(drill)
