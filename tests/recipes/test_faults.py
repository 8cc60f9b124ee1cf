"""What breaks under a run of two ranks: each ends soon, with one cause."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import QUICKSTART, ROOT, SMALL, environment

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def broken(how: str, bank: Path, path: Path) -> tuple[str, float]:
    """A run whose engine on rank 1 breaks in step 2: what it printed, and the seconds from step 1's end to its own."""
    script = str(Path(__file__).with_name("broken_engine.py"))
    settings = [QUICKSTART, *SMALL, f"failures.path={bank}", f"run.dir={path}", "train.save_every=1"]
    process = subprocess.Popen(
        [*LAUNCHER, script, how, *settings, "run.timeout_minutes=1"],
        cwd=ROOT,
        env=environment() | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    saved = path / "checkpoints" / "step_000001" / "manifest.json"
    while not saved.exists():
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.05)
    begun = time.monotonic()
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 1, said[-4000:]
    return said, time.monotonic() - begun


def root_cause(said: str) -> str:
    """Rank and exit code of the process that torchrun saw fail first."""
    found = re.search(r"Root Cause.*?rank +: (\d+).*?exitcode +: (-?\d+)", said, re.DOTALL)
    assert found is not None, said[-4000:]
    return f"rank {found[1]}: {found[2]}"


@pytest.mark.slow
@pytest.mark.parametrize(("how", "cause"), [("raises", "rank 1: 1"), ("killed", "rank 1: -9")])
def test_an_engine_that_dies_ends_the_run_soon_with_its_own_message(
    bank: Path, tmp_path: Path, how: str, cause: str
) -> None:
    said, seconds = broken(how, bank, tmp_path / "run")
    print(f"{how}: the run ended after {seconds:.0f} s")
    assert seconds < 20
    assert root_cause(said) == cause
    ours = said.partition("torch/distributed/elastic")[0]
    assert ours.count("Traceback") == (how == "raises"), "a rank that only follows shows no stack"
    assert ours.count("RuntimeError: CUDA error: an illegal memory access") == (how == "raises")


@pytest.mark.slow
def test_an_engine_that_hangs_shows_the_stacks_of_every_rank_and_ends_the_run(bank: Path, tmp_path: Path) -> None:
    said, seconds = broken("hangs", bank, tmp_path / "run")
    print(f"hangs: the run ended after {seconds:.0f} s of a minute's patience")
    assert 50 < seconds < 90
    assert said.count("Timeout (0:00:54)!") == 2
    assert re.search(r"broken_engine.py\", line \d+ in breaks_in_step_2", said)
    assert re.search(r"placement.py\", line \d+ in collect", said)
    assert "error: a collective waited for another rank until run.timeout_minutes; the stacks of all ranks" in said
