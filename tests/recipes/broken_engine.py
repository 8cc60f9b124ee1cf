"""`python broken_engine.py HOW CONFIG.yaml key=value ...`: recipes.train; rank 1's engine breaks in step 2.

HOW  raises, as vLLM does of a CUDA error in its worker; hangs; is killed with its process; or is asked to stop
"""

from __future__ import annotations

import os
import signal
import sys
import time

from nemo_r3 import entry
from nemo_r3.rollout.scheduler import Rollout
from recipes.train import train

take_engine = Rollout.__init__
before_the_stop = iter(range(12))


def breaks_in_step_2(how: str) -> None:
    """What happens in place of a token."""
    if how == "raises":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "stops" and next(before_the_stop, None) == 11:
        os.kill(os.getpid(), signal.SIGUSR1)
    while how == "hangs":
        time.sleep(1)


def take_broken_engine(rollout: Rollout, engine, dialogue, task, config, world, progress) -> None:
    """Takes the real engine; rank 1's breaks once its weights are those of step 1."""
    take_engine(rollout, engine, dialogue, task, config, world, progress)
    step = engine.step

    def broken():
        if engine.version == 1:
            breaks_in_step_2(how)
        return step()

    if world.rank == 1:
        engine.step = broken


how = sys.argv.pop(1)
Rollout.__init__ = take_broken_engine
entry.main(train)
