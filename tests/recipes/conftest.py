from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from launch import QUICKSTART, SMALL, run


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A failure bank that `recipes.mine` made from the embedded model."""
    path = tmp_path_factory.mktemp("bank") / "failures"
    run("mine", QUICKSTART, *SMALL, f"failures.path={path}", f"run.dir={path.parent}/unused")
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, bank: Path) -> Path:
    """The run directory of four steps with a checkpoint at 2 and 4, then `evaluate` and `export`."""
    path = tmp_path_factory.mktemp("run") / "quickstart"
    settings = (QUICKSTART, *SMALL, f"failures.path={bank}", f"run.dir={path}", "train.steps=4", "train.save_every=2")
    for verb in ("train", "evaluate", "export"):
        run(verb, *settings)
    return path
