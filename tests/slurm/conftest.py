"""The virtual cluster that the tests marked `slurm` share."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cluster import Cluster

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
