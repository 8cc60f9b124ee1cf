"""MLflow. Every call waits for the server and raises without it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemo_r3 import signals
from nemo_r3.config import Config
from nemo_r3.config.schema import leaves
from nemo_r3.errors import UserError, describe
from nemo_r3.trackers.tracker import Metrics, library, run_name

SETTING = "run.mlflow_experiment"
PARAMS_PER_CALL = 100
"""The server takes no more."""
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # with its own numbers a call waits 4 to 20 minutes for a lost server,
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",  # and `InBackground` asks again
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Unless the user has set them; telemetry begins with the import."""


def check(experiment: str, begun: bool) -> None:
    """Checks the library; only at a run's first start, that the server answers.

    Raises:
        UserError: there is no library or no answer.
    """
    mlflow = _library()
    try:
        if not begun:
            mlflow.get_experiment_by_name(experiment)
    except Exception as error:  # noqa: BLE001  the kind depends on the server
        uri = os.environ.get("MLFLOW_TRACKING_URI", "not set")
        raise UserError(f"{SETTING}: {describe(error)} (MLFLOW_TRACKING_URI is {uri})") from error


class MLflow:
    """An MLflow run."""

    def __init__(self, config: Config, path: Path, run_id: str | None) -> None:
        mlflow = self._mlflow = _library()
        if run_id is None:
            mlflow.set_experiment(config.run.mlflow_experiment)
        # after a failure below it is active
        run = mlflow.active_run() or mlflow.start_run(run_id, run_name=run_name(path))
        self.run_id: str = run.info.run_id
        if run_id is None:
            settings = [(leaf.key, leaf.of(config)) for leaf in leaves(Config)]
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


def _library() -> Any:
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    return library("mlflow", SETTING)
