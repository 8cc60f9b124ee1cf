"""The virtual cluster that the tests marked `slurm` share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

from cluster import Cluster
from launch import QUICKSTART, SMALL, run

NODES = 3


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes; a test that breaks one mends it again."""
    if why := Cluster.lacks():
        pytest.skip(why)
    virtual = Cluster(tmp_path_factory.mktemp("cluster"), NODES)
    virtual.start()
    yield virtual
    virtual.stop()


@pytest.fixture(scope="session")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A failure bank that `recipes.mine` made from the embedded model."""
    path = tmp_path_factory.mktemp("bank") / "failures"
    run("mine", QUICKSTART, *SMALL, f"failures.path={path}", f"run.dir={path.parent}/unused")
    return path
