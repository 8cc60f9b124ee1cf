"""`rank.sh` passes signals on: where Slurm tracks processes by cgroups it signals that script alone."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from cluster import search_path
from launch import QUICKSTART, ROOT, SMALL, environment

from nemo_r3 import signals

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
@pytest.mark.parametrize("early", [True, False])
def test_a_signal_to_the_script_alone_stops_its_ranks(tmp_path: Path, bank: Path, launcher: str, early: bool) -> None:
    run_dir, logs = tmp_path / "run", tmp_path / "logs"
    logs.mkdir()
    job = {"PATH": search_path(), "LAUNCHER": launcher, "LOGS": str(logs), "SLURM_PROCID": "0", "SLURMD_NODENAME": "n1"}
    job |= {"RECIPE": "train", "SLURM_NNODES": "1", "SLURM_NODEID": "0", "RANKS_PER_NODE": "1"}
    job |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(20_000 + os.getpid() % 10_000)}
    settings = (QUICKSTART, *SMALL, f"failures.path={bank}", f"run.dir={run_dir}", "train.steps=200")
    script = subprocess.Popen(["bash", "slurm/rank.sh", *settings], cwd=ROOT, env=environment() | job)
    waited = time.monotonic()
    while not early and not (run_dir / "metrics.jsonl").exists():
        assert script.poll() is None and time.monotonic() - waited < 120, (logs / "rank_0.log").read_text()
        time.sleep(0.05)
    time.sleep(0.2)
    script.send_signal(signal.SIGUSR1)
    script.wait(timeout=120)
    assert (logs / "rank_0.exit").read_text().split()[:2] == [str(signals.STOPPED), "n1"]
    assert "stopped by SIGUSR1" in (logs / "rank_0.log").read_text()
    assert early or (run_dir / "checkpoints").exists()
