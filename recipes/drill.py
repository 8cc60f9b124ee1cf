"""The resume drill: a run that is killed and resumed several times must give the same as one that is not.

<run.dir>/drill/whole    runs to its end undisturbed
<run.dir>/drill/killed   is killed at random, killed while it saves, or stopped by SIGUSR1, in turns, and resumed
verdict                  same failure bank, rollouts and metrics (but for times and the like), each step logged once
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nemo_r3 import config as configuration
from nemo_r3 import runtime, signals
from nemo_r3.actor.manifest import WRITING
from nemo_r3.config import Config
from nemo_r3.errors import UserError
from nemo_r3.run_directory import MEASURED

KINDS = ("at random", "while saving", "SIGUSR1")
PATIENCE = 5.0
"""A launch counts as hung after this many times the undisturbed run's duration."""


@dataclass(frozen=True)
class Launch:
    """How the run under test is started.

    Attributes:
        argv: CONFIG.yaml and settings, as on the command line.
        ranks: processes; torchrun starts them where there are several.
        path: the run directory.
    """

    argv: Sequence[str]
    ranks: int
    path: Path

    def start(self) -> subprocess.Popen[bytes]:
        """Starts it in its own process group; its output is appended to <path>.log."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        settings = [f"run.dir={self.path}", f"failures.path={self.path}/failures"]
        with Path(f"{self.path}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, *(launcher if self.ranks > 1 else []), "-m", "recipes.train", *self.argv, *settings],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def drill(argv: Sequence[str]) -> None:
    """`python -m recipes.drill CONFIG.yaml key=value ...`; an error where the two runs differ."""
    config = configuration.load(argv)
    ranks = ranks_of(config)
    home = Path(config.run.dir) / "drill"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    whole, killed = (Launch(argv, ranks, home / name) for name in ("whole", "killed"))

    begun = time.monotonic()
    if code := whole.start().wait():
        raise UserError(f"the run that is left alone ended with code {code}; see {whole.path}.log")
    seconds = time.monotonic() - begun
    print(f"left alone: {config.train.steps} steps in {seconds:.0f} s", flush=True)

    draw = random.Random(config.seed)
    for number in range(config.drill.kills):
        kind = KINDS[number % len(KINDS)]
        wait = draw.uniform(0.3, 1.0) * seconds
        code, lived = end(killed, kind, wait, PATIENCE * seconds)
        print(f"kill {number + 1}/{config.drill.kills} {kind}: after {lived:.0f} s, code {code}", flush=True)
    if code := killed.start().wait():
        raise UserError(f"the killed run did not come to its end (code {code}); see {killed.path}.log")
    differing = differences(whole.path, killed.path, config.train.steps)
    for line in differing:
        print(f"differs: {line}")
    if differing:
        raise UserError(f"the run that was killed {config.drill.kills} times differs from the one left alone")
    print(f"the same, after {config.drill.kills} kills: failure bank, {config.train.steps} steps, rollouts")


def ranks_of(config: Config) -> int:
    """How many ranks the config needs on this machine.

    Raises:
        UserError: rollouts are not deterministic, so that two runs differ even undisturbed.
    """
    asked, actor = config.rollout.deterministic, config.actor
    if asked is False or (asked is None and torch.cuda.is_available()):
        raise UserError(f"rollout.deterministic: {asked}: two runs would differ anyway; a drill needs true")
    return config.cluster.gpus_per_node or actor.tensor_parallel * actor.pipeline_parallel


def end(launch: Launch, kind: str, wait: float, patience: float) -> tuple[int, float]:
    """Starts the run and kills or stops it, unless it finishes first.

    Args:
        launch: the run.
        kind: how it ends, one of KINDS.
        wait: seconds until then, except while saving.
        patience: seconds after which it counts as hung.

    Returns:
        Its exit code, and how many seconds it ran.

    Raises:
        UserError: SIGUSR1 did not stop it as it should.
    """
    writing = launch.path / "checkpoints" / WRITING
    shutil.rmtree(writing, ignore_errors=True)  # of the kill before
    process, begun = launch.start(), time.monotonic()
    while process.poll() is None:
        lived = time.monotonic() - begun
        saving = kind == "while saving" and writing.exists()
        if saving or lived > (patience if kind == "while saving" else wait):
            soft = kind == "SIGUSR1"
            send(process.pid, launch.ranks, signal.SIGUSR1 if soft else signal.SIGKILL)
            try:
                process.wait(patience)
            except subprocess.TimeoutExpired:
                send(process.pid, launch.ranks, signal.SIGKILL)
                raise UserError(f"{signal.Signals.SIGUSR1.name} did not end the run; see {launch.path}.log") from None
            if soft and process.returncode not in (0, signals.STOPPED, 1):
                raise UserError(f"SIGUSR1 ended the run with code {process.returncode}; see {launch.path}.log")
        time.sleep(0.002)
    return process.returncode, time.monotonic() - begun


def send(process: int, ranks: int, number: signal.Signals) -> None:
    """Sends a signal to every rank, and SIGKILL to their launcher too.

    torchrun gets no SIGUSR1: it would die of it and kill the ranks. Nor does a rank before it has a handler.
    """
    if number is signal.SIGKILL:
        os.killpg(process, number)
        return
    try:
        while len(pids := _ranks(process, ranks)) < ranks or not all(_hears(pid, number) for pid in pids):
            time.sleep(0.01)
        for pid in pids:
            os.kill(pid, number)
    except (FileNotFoundError, ProcessLookupError):
        return  # it has finished


def _ranks(process: int, ranks: int) -> list[int]:
    """Process ids of the ranks: the launcher's children, where there is a launcher."""
    if ranks == 1:
        return [process]
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _hears(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; True for a zombie, which needs none."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return "Z" in status["State"] or bool(int(status["SigCgt"], 16) >> (number - 1) & 1)


def differences(whole: Path, killed: Path, steps: int) -> list[str]:
    """Where the killed run differs, a line each; none if the runs are the same."""
    found = []
    ours, theirs = (untimed(path / "metrics.jsonl") for path in (killed, whole))
    if [line["step"] for line in ours] != list(range(1, steps + 1)):
        found.append(f"metrics.jsonl has the steps {[line['step'] for line in ours]}")
    found += [f"metrics of step {b['step']}: {a} != {b}" for a, b in zip(ours, theirs, strict=False) if a != b]
    for folder, pattern in (("failures", "shard_*.jsonl"), ("rollouts", "step_*.jsonl")):
        names = {file.name for path in (whole, killed) for file in (path / folder).glob(pattern)}
        for name in sorted(names):
            one, other = (path / folder / name for path in (whole, killed))
            if not (one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()):
                found.append(f"{folder}/{name}")
    return found


def untimed(file: Path) -> list[dict[str, object]]:
    """A run's metrics by step, without times and other measurements; a last line that was cut short is left out."""
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in lines]


if __name__ == "__main__":
    runtime.main(drill)
