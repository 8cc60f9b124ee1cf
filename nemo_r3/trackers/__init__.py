"""Where a run's steps are shown beside metrics.jsonl: TensorBoard, Weights & Biases and MLflow.

metrics.jsonl is the record. A server is for looking on: a thread sends to it, so it neither delays nor ends a run, and
what it lacks in the end is sent when the same command runs again. The servers' libraries take everything but the
project and the name from their own environment variables.

Trackers belong to the process, which shows one run and has to end them, so this module keeps state of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nemo_r3 import watchdog
from nemo_r3.config import Config, shareable
from nemo_r3.trackers import mlflow, wandb
from nemo_r3.trackers.background import InBackground
from nemo_r3.trackers.tensorboard import TensorBoard
from nemo_r3.trackers.tracker import Metrics, Tracker

SENT = "sent.json"
"""In wandb/ or mlflow/ of the run directory: the project or experiment, the run's id there, and the last step sent."""

_open: list[Tracker] = []


def check(config: Config, path: Path) -> None:
    """Checks that the servers asked for can be used, without a question in the terminal.

    Only at its first start does a run, whose directory is `path`, need their answer.

    Raises:
        UserError: a library is not installed, there is no login, or a first start gets no answer.
    """
    if config.run.wandb_project:
        wandb.check(begun=(path / "wandb" / SENT).exists())
    if config.run.mlflow_experiment:
        mlflow.check(config.run.mlflow_experiment, begun=(path / "mlflow" / SENT).exists())


def open_all(config: Config, path: Path, step: int, logged: Sequence[Mapping[str, Any]]) -> None:
    """Opens what shows the steps of a training run.

    Args:
        config: the run's settings.
        path: the run directory.
        step: the last step before; TensorBoard drops those after it. (Servers take none back: a step that is repeated
            after a crash keeps the values that were sent first.)
        logged: the lines of metrics.jsonl, for servers that lack some.
    """
    servers = _open_servers(config, path)
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
    for server in _open_servers(config, path):
        server.summarise(results)


def close(code: int) -> None:
    """Ends what is open; the process is about to leave with this exit code."""
    while _open:
        watchdog.alive()
        _open.pop().close(code)


def _open_servers(config: Config, path: Path) -> list[InBackground]:
    """Opens those asked for, instead of what is open."""
    close(0)
    servers = []
    config = shareable(config)
    if project := config.run.wandb_project:
        make_wandb = partial(wandb.WeightsAndBiases, config, path)
        servers.append(InBackground(wandb.SETTING, project, path / "wandb" / SENT, make_wandb))
    if experiment := config.run.mlflow_experiment:
        make_mlflow = partial(mlflow.MLflow, config, path)
        servers.append(InBackground(mlflow.SETTING, experiment, path / "mlflow" / SENT, make_mlflow))
    _open.extend(servers)
    return servers


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if value is not None and name != "step"}
