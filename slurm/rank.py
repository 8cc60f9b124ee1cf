"""Runs a recipe that listens to Slurm's signals before it imports torch, so that an early one is not lost."""

import os
import runpy
import signal
from pathlib import Path

from nemo_r3 import signals

if __name__ == "__main__":
    signals.listen()
    if Path(os.environ["LOGS"], "stop").exists():  # a signal came even earlier
        os.kill(os.getpid(), signal.SIGUSR1)
    runpy.run_module(f"recipes.{os.environ['RECIPE']}", run_name="__main__")
