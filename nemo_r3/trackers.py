"""Where metrics are shown beside metrics.jsonl: TensorBoard, Weights & Biases and MLflow.

Servers are for looking on: a thread of its own sends to each, in order, so a slow or lost one neither delays nor ends
a run. Their libraries take everything but the project and the name from their own environment variables.
"""

from __future__ import annotations

import importlib
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial, reduce
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, Protocol

from nemo_r3 import signals
from nemo_r3.config import Config
from nemo_r3.config.schema import leaves
from nemo_r3.errors import UserError
from nemo_r3.files import filename_in_errors, write_whole

WANDB, MLFLOW = "run.wandb_project", "run.mlflow_experiment"
RETRY_SECONDS = 60.0
"""How long a server that failed is left alone."""
CLOSE_SECONDS = 10.0
"""How long a process that ends waits for a server."""
PARAMS_PER_CALL = 100
"""MLflow takes no more."""


class Tracker(Protocol):
    """A place that shows metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a step's metrics."""

    def summarise(self, results: Mapping[str, float]) -> None:
        """Shows results of the whole run."""

    def close(self, code: int) -> None:
        """Ends with the process, whose exit code this is."""


_open: list[Tracker] = []
"""This process's trackers, for `close`."""


def check(config: Config, path: Path) -> None:
    """Checks that the servers asked for can be used, without a question in the terminal.

    Only at its first start does a run need their answer.

    Args:
        config: the run's settings.
        path: the run directory.

    Raises:
        UserError: a library is not installed, there is no login, or a first start gets no answer.
    """
    if config.run.wandb_project:
        _check_wandb(begun=_run_id(path, "wandb").exists())
    if config.run.mlflow_experiment:
        _check_mlflow(config.run.mlflow_experiment, begun=_run_id(path, "mlflow").exists())


def open_all(config: Config, path: Path, step: int, shown: int) -> list[Tracker]:
    """What shows the steps of a training run.

    Args:
        config: the run's settings.
        path: the run directory.
        step: the last step before; TensorBoard drops those after it.
        shown: the last step that any process has logged. Servers take none back, so they get only those after it.
    """
    board: list[Tracker] = [TensorBoard(path / "tensorboard", step)] if config.run.tensorboard else []
    _open.extend(board)
    return board + open_servers(config, path, shown)


def open_servers(config: Config, path: Path, shown: int = 0) -> list[Tracker]:
    """The servers asked for, see `open_all`."""
    servers: list[Tracker] = []
    if config.run.wandb_project:
        servers.append(InBackground(WANDB, partial(WeightsAndBiases, config, path), shown))
    if config.run.mlflow_experiment:
        servers.append(InBackground(MLFLOW, partial(MLflow, config, path), shown))
    _open.extend(servers)
    return servers


def close(code: int) -> None:
    """Ends the trackers of this process, which is about to leave with this exit code."""
    while _open:
        signals.alive()
        _open.pop().close(code)


class TensorBoard:
    """Event files."""

    def __init__(self, path: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and not every recipe logs

        self._path, self._writer = path, SummaryWriter(path, purge_step=step + 1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a step's scalars; they are in the file when this returns."""
        with filename_in_errors(self._path):
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def summarise(self, results: Mapping[str, float]) -> None:
        """Nothing: TensorBoard shows steps."""

    def close(self, code: int) -> None:
        """Nothing: every step is in the file."""


class WeightsAndBiases:
    """A W&B run, which `wandb/run_id` in the run directory names. W&B itself copes with a lost server."""

    def __init__(self, config: Config, path: Path) -> None:
        wandb = importlib.import_module("wandb")
        if not (file := _run_id(path, "wandb")).exists():
            _keep(file, secrets.token_hex(4))
        begin = partial(
            wandb.init,
            project=config.run.wandb_project,
            id=file.read_text(),
            name=path.name,
            dir=path,
            resume="allow",
            config=asdict(config),
            settings=wandb.Settings(finish_timeout=CLOSE_SECONDS),  # by default it waits forever
        )
        try:
            self._run = begin()
        except wandb.Error as error:
            _warn(f"{WANDB}: {_line(error)}; this process logs offline, and `wandb sync` in {path} sends it")
            self._run = begin(mode="offline")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hands a step to W&B's own process."""
        self._run.log(dict(metrics), step=step, commit=True)

    def summarise(self, results: Mapping[str, float]) -> None:
        """Adds to the run's summary."""
        self._run.summary.update(dict(results))

    def close(self, code: int) -> None:
        """Finishes; a stop is shown as preempted, not as failed."""
        if code == signals.STOPPED:
            self._run.mark_preempting()
        self._run.finish(exit_code=code)


class MLflow:
    """An MLflow run, which `mlflow/run_id` in the run directory names."""

    def __init__(self, config: Config, path: Path) -> None:
        self._mlflow = importlib.import_module("mlflow")
        if (file := _run_id(path, "mlflow")).exists():
            self._mlflow.start_run(run_id=file.read_text())
            return
        self._mlflow.set_experiment(config.run.mlflow_experiment)
        run = self._mlflow.active_run() or self._mlflow.start_run(run_name=path.name)  # it may be another attempt
        settings = [(leaf.key, reduce(getattr, leaf.key.split("."), config)) for leaf in leaves(Config)]
        for first in range(0, len(settings), PARAMS_PER_CALL):
            self._mlflow.log_params(dict(settings[first : first + PARAMS_PER_CALL]))
        _keep(file, run.info.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends a step; raises if the server does not take it."""
        self._mlflow.log_metrics(dict(metrics), step=step)

    def summarise(self, results: Mapping[str, float]) -> None:
        """Sends results as metrics of a single value."""
        self._mlflow.log_metrics(dict(results))

    def close(self, code: int) -> None:
        """Ends the run; a stop is shown as killed, not as failed."""
        self._mlflow.end_run("KILLED" if code == signals.STOPPED else "FAILED" if code else "FINISHED")


class InBackground:
    """Makes a tracker and passes everything on to it in a thread. What fails is tried again; a warning says so once.

    Args:
        setting: that asks for this tracker; warnings begin with it.
        make: makes it.
        shown: steps up to this one are not passed on.
    """

    def __init__(self, setting: str, make: Callable[[], Tracker], shown: int) -> None:
        self._setting, self._shown, self._warned = setting, shown, False
        self._ending = Event()
        self._acts: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._acts.put(lambda: setattr(self, "_tracker", make()))
        self._tracker: Any = None
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """See `Tracker`; returns at once."""
        if step > self._shown:
            self._acts.put(lambda: self._tracker.log(step, metrics))

    def summarise(self, results: Mapping[str, float]) -> None:
        """See `Tracker`; returns at once."""
        self._acts.put(lambda: self._tracker.summarise(results))

    def close(self, code: int) -> None:
        """See `Tracker`; waits for what is not sent yet, `CLOSE_SECONDS` at most."""
        self._acts.put(lambda: self._tracker.close(code))
        self._acts.put(None)
        self._ending.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() or not self._acts.empty():
            _warn(f"{self._setting}: the end of this process was not sent; metrics.jsonl has every step")

    def _work(self) -> None:
        while (act := self._acts.get()) is not None:
            while not self._done(act):
                if self._ending.is_set():
                    return
                self._ending.wait(RETRY_SECONDS)

    def _done(self, act: Callable[[], None]) -> bool:
        try:
            act()
        except Exception as error:  # noqa: BLE001  a server must not end a run
            if not self._warned:
                _warn(f"{self._setting}: {_line(error)}; the run goes on, and tries again every {RETRY_SECONDS:.0f} s")
            self._warned = True
            return False
        return True


def _check_wandb(begun: bool) -> None:
    wandb = _library("wandb", WANDB)
    try:
        offline = wandb.setup().settings.mode in ("offline", "dryrun", "disabled")
        if offline or wandb.login(prompt=False, verify=not begun):
            return
        why = "there is no login"
    except (wandb.Error, ValueError) as error:
        why = _line(error)
    raise UserError(f"{WANDB}: {why}; say `wandb login`, or set WANDB_API_KEY or WANDB_MODE=offline")


def _check_mlflow(experiment: str, begun: bool) -> None:
    mlflow = _library("mlflow", MLFLOW)
    try:
        if not begun:
            mlflow.get_experiment_by_name(experiment)
    except Exception as error:  # noqa: BLE001  the kind depends on the server
        uri = os.environ.get("MLFLOW_TRACKING_URI", "not set")
        raise UserError(f"{MLFLOW}: {_line(error)} (MLFLOW_TRACKING_URI is {uri})") from error


def _library(name: str, setting: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{setting}: {name} cannot be imported ({error}): pip install 'nemo_r3[track]'") from error


def _run_id(path: Path, tracker: str) -> Path:
    """The file of the id by which the next process continues the same run on the server."""
    return path / tracker / "run_id"


def _keep(file: Path, run_id: str) -> None:
    file.parent.mkdir(exist_ok=True)
    write_whole(file, run_id)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
