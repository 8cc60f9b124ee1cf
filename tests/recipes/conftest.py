from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launch import QUICKSTART, SMALL, run

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, bank: Path) -> Path:
    """The run directory of four steps with a checkpoint at 2 and 4, then `evaluate` and `export`.

    Held-out problems are measured in steps 1 and 3, so after 0 and 2.
    """
    path = tmp_path_factory.mktemp("run") / "quickstart"
    settings = (QUICKSTART, *SMALL, f"failures.path={bank}", f"run.dir={path}")
    settings += ("train.steps=4", "train.save_every=2", "evaluate.every=2")
    for verb in ("train", "evaluate", "export"):
        run(verb, *settings, fresh=True)
    return path
