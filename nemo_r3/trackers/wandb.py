"""Weights & Biases. Its own process copes with a lost network; if that is killed, 15 seconds of steps may be lost."""

from __future__ import annotations

import secrets
from dataclasses import asdict
from pathlib import Path

from nemo_r3 import signals
from nemo_r3.config import Config
from nemo_r3.errors import UserError, in_one_line
from nemo_r3.trackers.background import END_SECONDS
from nemo_r3.trackers.tracker import Metrics, library, run_name

SETTING = "run.wandb_project"
LIMITS = dict.fromkeys(("init_timeout", "finish_timeout"), 0.8 * END_SECONDS)
"""Seconds. By default W&B tries to begin for 90, which also holds up the end of a process, and to finish for ever."""


def check(begun: bool) -> None:
    """Checks that there is a login; only at a run's first start, with the server.

    Raises:
        UserError: there is no library, no login, or no answer.
    """
    wandb = library("wandb", SETTING)
    try:
        offline = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
        if offline or wandb.login(prompt=False, verify=not begun):
            return
        why = "there is no login"
    except (wandb.Error, ValueError) as error:
        why = in_one_line(error)
    raise UserError(f"{SETTING}: {why}; say `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")


class WeightsAndBiases:
    """A W&B run."""

    def __init__(self, config: Config, path: Path, run_id: str | None) -> None:
        wandb = self._wandb = library("wandb", SETTING)
        self.run_id = run_id or secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=config.run.wandb_project,
                id=self.run_id,
                name=run_name(path),
                dir=path,
                resume="allow",
                config=asdict(config),
                settings=wandb.Settings(**LIMITS),
            )
        except wandb.Error:
            wandb.teardown()  # which frees the id for the next attempt
            raise

    def log(self, step: int, metrics: Metrics) -> None:
        """Hands a step to W&B's own process."""
        self._run.log(dict(metrics), step=step, commit=True)

    def summarise(self, results: Metrics) -> None:
        """Adds to the run's summary."""
        self._run.summary.update(dict(results))

    def close(self, code: int) -> None:
        """Finishes; a stop is shown as preempted, not as failed."""
        try:
            if code == signals.STOPPED:
                self._run.mark_preempting()
            self._run.finish(exit_code=code)
        finally:
            self._wandb.teardown(code)  # or Python's exit would, and wait
