"""Settings of all tests, and how `pytest -n` shares them out."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import launch
import pytest
from hypothesis import HealthCheck, settings
from xdist.scheduler import LoadScopeScheduling

gc.disable()  # until the tests are collected: what they import is no garbage

# two busy cores: how long an example takes says nothing about the code
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

LONGEST_FIRST = ("tests/recipes", "tests/actor", "tests/refit", "tests/rollout")
"""Folders whose launches take minutes; those of one folder serve all its files, so one worker runs them."""


class ByFolder(LoadScopeScheduling):
    """Keeps a folder of launches, and elsewhere a file, on one worker."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return next((folder for folder in LONGEST_FIRST if file.startswith(folder)), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFolder:
    return ByFolder(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts what takes longest first, so that the workers end together."""
    order = {folder: place for place, folder in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get("/".join(item.nodeid.split("/")[:2]), len(order)))


def pytest_collection_finish() -> None:
    """Looks for garbage again, and never among what was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A failure bank that `recipes.mine` made from the embedded model."""
    path = tmp_path_factory.mktemp("bank") / "failures"
    settings = (launch.QUICKSTART, *launch.SMALL, f"failures.path={path}", f"run.dir={path.parent}/unused")
    launch.run("mine", *settings, fresh=True)
    return path


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch  # not for the tests that need none

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA GPU")
