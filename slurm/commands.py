"""Runs Slurm's commands, and retries them if the controller is too busy to answer."""

from __future__ import annotations

import subprocess
import sys
import time

from nemo_r3.errors import UserError

ATTEMPTS, PAUSE_SECONDS = 13, 20.0
"""Four minutes of pauses, for a job that would end for good without an answer."""


def ask(*command: str, attempts: int = 1) -> str:
    """Runs a Slurm command; returns what it prints.

    Raises:
        UserError: there is no such command, or every attempt failed.
    """
    for left in reversed(range(attempts)):
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError(
                f"{command[0]} was not found: there is no Slurm here (`slurm.launch --local` runs a chain without)"
            ) from None
        if not done.returncode:
            return done.stdout
        failed = f"`{' '.join(command)}` failed: {done.stderr.strip()}"
        if left:
            print(f"{failed}; trying again in {PAUSE_SECONDS:g} s, at most {left} times", file=sys.stderr, flush=True)
            time.sleep(PAUSE_SECONDS)
    raise UserError(failed)
