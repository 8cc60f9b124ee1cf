"""Where metrics are shown beside metrics.jsonl: TensorBoard, Weights & Biases and MLflow.

metrics.jsonl is the record. A server is for looking on: a thread sends to it, so it neither delays nor ends a run, and
what it lacks in the end is sent by the run's next process. The servers' libraries take everything but the project and
the name from their own environment variables.

Trackers belong to the process, which shows one run and has to end them, so this module keeps state of its own.
"""

from __future__ import annotations

import importlib
import json
import os
import secrets
import sys
from collections.abc import Callable, Mapping, Sequence
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
from nemo_r3.files import filename_in_errors, read_json_object, write_whole

WANDB, MLFLOW = "run.wandb_project", "run.mlflow_experiment"
SENT = "sent.json"
"""In wandb/ or mlflow/ of the run directory: the run's id on the server, and the last step sent there."""
RETRY_SECONDS = 60.0
"""How long a server that failed is left alone."""
CLOSE_SECONDS = 10.0
"""How long a process that ends waits for a server."""
PARAMS_PER_CALL = 100
"""MLflow takes no more."""

Metrics = Mapping[str, float]


class Tracker(Protocol):
    """A place that shows the steps of a run."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Shows a step."""

    def close(self, code: int) -> None:
        """Ends with the process, whose exit code this is."""


class Server(Tracker, Protocol):
    """One that also shows results of the whole run, which `run_id` names there."""

    run_id: str

    def summarise(self, results: Metrics) -> None:
        """Shows results."""


_open: list[Tracker] = []


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
        _check_wandb(begun=(path / "wandb" / SENT).exists())
    if config.run.mlflow_experiment:
        _check_mlflow(config.run.mlflow_experiment, begun=(path / "mlflow" / SENT).exists())


def open_all(config: Config, path: Path, step: int, logged: Sequence[Mapping[str, Any]]) -> None:
    """Opens what shows the steps of a training run.

    Args:
        config: the run's settings.
        path: the run directory.
        step: the last step before; TensorBoard drops those after it. (Servers take none back: a step that is repeated
            after a crash keeps the values that were sent first.)
        logged: the lines of metrics.jsonl, for servers that lack some.
    """
    servers = _servers(config, path)
    for line in logged:
        for server in servers:
            server.log(line["step"], _numbers(line))
    if config.run.tensorboard:
        _open.append(TensorBoard(path / "tensorboard", step))


def log(line: Mapping[str, Any]) -> None:
    """Shows a line of metrics.jsonl."""
    for tracker in _open:
        tracker.log(line["step"], _numbers(line))


def show_results(config: Config, path: Path, results: Metrics) -> None:
    """Shows numbers of the whole run on the servers asked for."""
    for server in _servers(config, path):
        server.summarise(results)


def close(code: int) -> None:
    """Ends what is open; the process is about to leave with this exit code."""
    while _open:
        signals.alive()
        _open.pop().close(code)


def _servers(config: Config, path: Path) -> list[InBackground]:
    """Opens those asked for, instead of what is open."""
    close(0)
    servers = []
    if config.run.wandb_project:
        servers.append(InBackground(WANDB, path / "wandb" / SENT, partial(WeightsAndBiases, config, path)))
    if config.run.mlflow_experiment:
        servers.append(InBackground(MLFLOW, path / "mlflow" / SENT, partial(MLflow, config, path)))
    _open.extend(servers)
    return servers


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if value is not None and name != "step"}


class TensorBoard:
    """Event files."""

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


class WeightsAndBiases:
    """A W&B run. Its own process copes with a lost network; if that is killed, up to 15 seconds of steps are lost."""

    def __init__(self, config: Config, path: Path, run_id: str | None) -> None:
        wandb = self._wandb = importlib.import_module("wandb")
        self.run_id = run_id or secrets.token_hex(4)
        try:
            self._run = wandb.init(
                project=config.run.wandb_project,
                id=self.run_id,
                name=path.name,
                dir=path,
                resume="allow",
                config=asdict(config),
                settings=wandb.Settings(finish_timeout=0.8 * CLOSE_SECONDS),  # by default it waits forever
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


class MLflow:
    """An MLflow run."""

    def __init__(self, config: Config, path: Path, run_id: str | None) -> None:
        mlflow = self._mlflow = importlib.import_module("mlflow")
        if run_id is None:
            mlflow.set_experiment(config.run.mlflow_experiment)
        run = mlflow.active_run() or mlflow.start_run(run_id, run_name=path.name)  # it is active after a failure below
        self.run_id = run.info.run_id
        if run_id is None:
            settings = [(leaf.key, reduce(getattr, leaf.key.split("."), config)) for leaf in leaves(Config)]
            for first in range(0, len(settings), PARAMS_PER_CALL):
                mlflow.log_params(dict(settings[first : first + PARAMS_PER_CALL]))

    def log(self, step: int, metrics: Metrics) -> None:
        """Sends a step."""
        self._mlflow.log_metrics(dict(metrics), step=step)

    def summarise(self, results: Metrics) -> None:
        """Sends results, as metrics of a single value."""
        self._mlflow.log_metrics(dict(results))

    def close(self, code: int) -> None:
        """Ends the run; a stop is shown as killed, not as failed."""
        self._mlflow.end_run("KILLED" if code == signals.STOPPED else "FAILED" if code else "FINISHED")


class InBackground:
    """A server that a thread makes and sends to, in order. What fails is tried again; a warning says so once.

    Args:
        setting: that asks for it; warnings begin with this.
        file: keeps its run's id, and the last step sent; it gets none up to that again.
        make: makes it, given the id that an earlier process kept.
    """

    def __init__(self, setting: str, file: Path, make: Callable[[str | None], Server]) -> None:
        self._setting, self._file, self._make = setting, file, make
        self._sent, self._warned, self._ending = 0, False, Event()
        self._acts: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._acts.put(self._begin)
        self._thread = Thread(target=self._work, daemon=True)
        self._thread.start()

    def log(self, step: int, metrics: Metrics) -> None:
        """See `Tracker`; returns at once."""
        self._acts.put(lambda: self._log(step, metrics))

    def summarise(self, results: Metrics) -> None:
        """See `Server`; returns at once."""
        self._acts.put(lambda: self._server.summarise(results))

    def close(self, code: int) -> None:
        """See `Tracker`; waits for what is not sent yet, `CLOSE_SECONDS` at most."""
        self._acts.put(lambda: self._server.close(code))
        self._acts.put(None)
        self._ending.set()
        self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive() or not self._acts.empty():
            _warn(f"{self._setting}: not everything was sent; this run's next process sends the steps that lack")

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
            if not self._warned and not self._ending.is_set():
                _warn(f"{self._setting}: {_line(error)}; the run goes on, and tries again every {RETRY_SECONDS:.0f} s")
            self._warned = True
            return False
        return True

    def _begin(self) -> None:
        kept = read_json_object(self._file, self._setting) if self._file.exists() else {}
        self._server = self._make(kept.get("run_id"))
        self._file.parent.mkdir(exist_ok=True)
        self._keep(kept.get("step", 0))

    def _log(self, step: int, metrics: Metrics) -> None:
        if step > self._sent:
            self._server.log(step, metrics)
            self._keep(step)

    def _keep(self, step: int) -> None:
        self._sent = step
        write_whole(self._file, json.dumps({"run_id": self._server.run_id, "step": step}))


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
        raise UserError(f"{setting}: {name} cannot be imported ({error}): pip install -e '.[track]'") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)
