"""`recipes.train`, which listens for Slurm's signals before it imports torch: one that comes early is not lost."""

import runpy

from nemo_r3 import signals

if __name__ == "__main__":
    signals.listen()
    runpy.run_module("recipes.train", run_name="__main__")
