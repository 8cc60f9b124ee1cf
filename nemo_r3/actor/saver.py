"""`Saver`: when a run saves, how many checkpoints it keeps, and the save that is under way."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nemo_r3.actor import checkpoint
from nemo_r3.actor.trainer import Trainer
from nemo_r3.config import TrainConfig


class Saver:
    """Saves a run's policy and its optimizer as `config.train` says.

    Args:
        trainer: on every rank.
        directory: the run's `checkpoints`.
        config: when to save, how many checkpoints to keep, and whether to write them in the background.
        make_room: makes room on the device for the trainer at work.
    """

    def __init__(self, trainer: Trainer, directory: Path, config: TrainConfig, make_room: Callable[[], None]) -> None:
        self._trainer, self._directory, self._config, self._make_room = trainer, directory, config, make_room
        self._saving: checkpoint.Saving | None = None
        self._begun = time.monotonic()

    def after(self, step: int, state: Mapping[str, Any]) -> Path | None:
        """Finishes a save that all ranks have written, and saves `step` if that is due; every rank calls this.

        Returns:
            The step's checkpoint as `save` does; None if it is not due.

        Raises:
            UserError: it, or the one before, cannot be written.
        """
        if self._saving is not None and self._saving.is_written():
            self.finish()
        return self.save(step, state) if self.is_due(step) else None

    def is_due(self, step: int) -> bool:
        """Whether to save `step`; every rank calls this after the step, and all hear the same."""
        config = self._config
        if step % config.save_every == 0 or step == config.steps:
            return True
        if not config.save_minutes:
            return False
        return bool(self._trainer.policy.world.broadcast(time.monotonic() - self._begun >= 60 * config.save_minutes))

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Begins a save after finishing the one before, and unless it is in the background, finishes it.

        Returns:
            The checkpoint, which counts once its save has finished.

        Raises:
            UserError: one of the two cannot be written.
        """
        self.finish()
        self._begun = time.monotonic()
        background = self._config.save_in_background
        self._make_room()
        with self._trainer.at_work():
            self._saving = saving = checkpoint.begin(self._trainer, self._directory, step, state, background)
            if not background:
                self.finish()
        return saving.final

    def finish(self) -> None:
        """Finishes the save that is under way, if there is one."""
        saving, self._saving = self._saving, None
        if saving is not None:
            checkpoint.finish(saving, self._config.keep_checkpoints)
