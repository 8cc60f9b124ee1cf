"""Training runs that are started and interrupted, for the drill."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemo_r3 import signals
from nemo_r3.actor.manifest import WRITING
from nemo_r3.config import Config, fewest_ranks
from nemo_r3.errors import UserError
from nemo_r3.rollout.sampling import is_deterministic
from nemo_r3.run_directory import MEASURED


@dataclass(frozen=True)
class Launch:
    """A run in processes of its own."""

    argv: Sequence[str]  # CONFIG.yaml and settings, as on the command line
    ranks: int  # number of processes; with more than one, torchrun starts them
    path: Path  # the run directory

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints live."""
        return self.path / "checkpoints"

    @property
    def writing(self) -> Path:
        """The checkpoint that is being written."""
        return self.checkpoints / WRITING

    def start(self) -> subprocess.Popen[bytes]:
        """Starts the run in its own process group; its output is appended to <path>.log."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        settings = [f"run.dir={self.path}", f"failures.path={self.path}/failures"]
        with Path(f"{self.path}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *(launcher if self.ranks > 1 else []), "-m", "recipes.train", *self.argv, *settings],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> float:
        """Runs to the end; returns the seconds that took.

        Raises:
            UserError: the run failed.
        """
        code, lived = self.interrupt("", [math.inf], patience=math.inf)
        if code:
            raise UserError(f"{self.path} ended with code {code} although nothing disturbed it; see {self.path}.log")
        return lived

    def interrupt(self, kind: str, waits: Sequence[Path | float], patience: float) -> tuple[int, float]:
        """Starts the run and sends it a signal after some waits, unless it finishes first.

        Args:
            kind: "SIGUSR1" to make the run save and stop; anything else is SIGKILL.
            waits: one after the other: until the run has written this path, or this many seconds.
            patience: seconds after which the run counts as hung.

        Returns:
            The run's exit code, and how many seconds it ran.

        Raises:
            UserError: it hung, or ended with an unexpected code.
        """
        number = signal.SIGUSR1 if kind == "SIGUSR1" else signal.SIGKILL
        process, begun, now = self.start(), time.monotonic(), time.time()

        def wait_for(sign: Path | float) -> None:
            until = math.inf if isinstance(sign, Path) else time.monotonic() + sign
            while process.poll() is None and time.monotonic() < until:
                if isinstance(sign, Path) and is_newer(sign, now):
                    return
                if time.monotonic() - begun > patience:
                    raise UserError(f"the run hangs: it was not over after {patience:.0f} s; see {self.path}.log")
                time.sleep(0.002)

        try:
            for wait in waits:
                wait_for(wait)
            if process.poll() is None:
                _send(process, self.ranks, number)
            wait_for(math.inf)
        except BaseException:  # an error, or we ourselves are stopped: leave no run behind
            os.killpg(process.pid, signal.SIGKILL)
            raise
        code = process.returncode
        # torchrun itself ends with 1 when its ranks stop
        stopped = signals.STOPPED if self.ranks == 1 else 1
        if code not in (0, stopped if number is signal.SIGUSR1 else -number):
            raise UserError(f"{self.path} ended with code {code}; see {self.path}.log")
        return code, time.monotonic() - begun


def ranks_of(config: Config) -> int:
    """How many ranks the config needs on this machine.

    Raises:
        UserError: rollouts are not deterministic, so even two undisturbed runs differ.
    """
    if not is_deterministic(config.rollout, torch.cuda.is_available()):
        asked = config.rollout.deterministic
        raise UserError(f"rollout.deterministic: {asked}: two runs would differ anyway; a drill needs true")
    return config.cluster.gpus_per_node or fewest_ranks(config)


def _send(process: subprocess.Popen[bytes], ranks: int, number: signal.Signals) -> None:
    """Sends SIGKILL to the launcher and all ranks, or SIGUSR1 to the ranks alone, once they all have a handler for it.

    torchrun would die of SIGUSR1 and kill the ranks.
    """
    if number is signal.SIGKILL:
        os.killpg(process.pid, number)
        return
    with suppress(FileNotFoundError, ProcessLookupError):  # a rank has finished
        while process.poll() is None:
            pids = _ranks(process.pid, ranks)
            if len(pids) >= ranks and all(_handles(pid, number) for pid in pids):
                for pid in pids:
                    os.kill(pid, number)
                return
            time.sleep(0.01)


def _ranks(process: int, ranks: int) -> list[int]:
    """Process ids of the ranks: the launcher's children, if there is a launcher."""
    if ranks == 1:
        return [process]
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _handles(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; True for a zombie, which needs none."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return "Z" in status["State"] or bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


def is_newer(file: Path, than: float) -> bool:
    """Whether a file or directory was changed after a time of `time.time()`."""
    try:
        return file.stat().st_mtime > than
    except FileNotFoundError:
        return False


def untimed(file: Path) -> list[dict[str, Any]]:
    """A run's metrics by step, without times and other measurements; a last line that was cut short is left out."""
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in lines]
