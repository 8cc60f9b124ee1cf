"""`Tracker`: a place that shows the steps of a run; `Server`: one that another machine may be."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from nemo_r3.errors import UserError

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


def run_name(path: Path) -> str:
    """What servers call the run in a directory: its last two parts, as the points of all sweeps have the same names."""
    return "/".join(path.absolute().parts[-2:])


def library(name: str, setting: str) -> Any:
    """A library of the extra `track`, which `setting` asks for.

    Raises:
        UserError: it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"{setting}: {name} cannot be imported ({error}): pip install -e '.[track]', or for a container see "
            "docs/install-gpu.md"
        ) from error
