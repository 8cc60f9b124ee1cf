"""A recipe, its ears open for Slurm's signals before it imports torch: one that comes early is not lost."""

import os
import runpy
import signal
from pathlib import Path

from nemo_r3 import signals

if __name__ == "__main__":
    signals.listen()
    if Path(os.environ["LOGS"], "stop").exists():  # it came before this process could hear it
        os.kill(os.getpid(), signal.SIGUSR1)
    runpy.run_module(f"recipes.{os.environ['RECIPE']}", run_name="__main__")
