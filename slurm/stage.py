"""`Stage`: one recipe of a chain, run by submitit in a job, or directly on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from nemo_r3.files import write_whole

STAGES = ("mine", "train", "evaluate", "export")


@dataclass(frozen=True)
class Stage:
    """One recipe with its settings, at one point of a sweep."""

    recipe: str  # of STAGES
    point: str
    """Its settings of the sweep, such as "actor.lr=1e-6,seed=2"; empty if none, or if all points share the stage."""
    argv: tuple[str, ...]  # CONFIG.yaml key=value ...
    folder: Path  # the chain's directory, where the stage leaves its exit code

    @property
    def name(self) -> str:
        """Unique within the chain."""
        return f"{self.recipe} {self.point}" if self.point else self.recipe

    def __call__(self) -> None:
        """Runs train.sh in a job, on the batch host. A requeued job begins here again. Exits with the recipe's code."""
        environment = os.environ | {"RECIPE": self.recipe, "BATCH_PYTHON": sys.executable}
        self._end_file.unlink(missing_ok=True)
        script = Path("slurm/train.sh")  # read whole: bash reads a file as it runs, and it may be edited meanwhile
        process = subprocess.Popen(["bash", "-c", script.read_text(), str(script), *self.argv], env=environment)

        def forward(number: int, frame: FrameType | None) -> None:
            process.send_signal(number)

        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, forward)
        self._end(process.wait())

    def run_here(self, ranks: int) -> None:
        """Runs on this machine, with output on this console. Exits with the recipe's code if that is not 0."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, "-m", f"recipes.{self.recipe}", *self.argv]
        self._end(subprocess.run(command, check=False).returncode)

    def ended(self) -> int | None:
        """The exit code; None if it has not ended, or never began."""
        return int(self._end_file.read_text()) if self._end_file.exists() else None

    @property
    def _end_file(self) -> Path:
        return self.folder / f"{self.name.replace(' ', '_')}.code"

    def _end(self, code: int) -> None:
        write_whole(self._end_file, f"{code}\n")
        if code:
            sys.exit(code)
