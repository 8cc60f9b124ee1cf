"""TensorBoard's event files."""

from __future__ import annotations

from pathlib import Path

from nemo_r3.files import filename_in_errors
from nemo_r3.trackers.tracker import Metrics


class TensorBoard:
    """Event files of a training run, without the events after `step`."""

    def __init__(self, path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every recipe logs

        self._path, self._writer = path, SummaryWriter(path, purge_step=step + 1)

    def log(self, step: int, metrics: Metrics) -> None:
        """Writes a step's scalars; they are in the file when this returns."""
        with filename_in_errors(self._path):
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self, code: int) -> None:
        """Nothing: every step is in the file."""
