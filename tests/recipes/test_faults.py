"""What breaks under a run of two ranks: each ends soon, with one cause."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import QUICKSTART, ROOT, SMALL, environment, lines, run

from nemo_r3.rollout import turn_cache
from nemo_r3.rollout.sampling import UNFINISHED

LAUNCHER = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def broken(how: str, bank: Path, path: Path, *more: str) -> tuple[str, float]:
    """A run whose engine on rank 1 breaks in step 2: what it printed, and the seconds from step 1's end to its own."""
    script = str(Path(__file__).with_name("broken_engine.py"))
    settings = [QUICKSTART, *SMALL, f"failures.path={bank}", f"run.dir={path}", "train.save_every=1"]
    process = subprocess.Popen(
        [*LAUNCHER, script, how, *settings, "run.timeout_minutes=1", *more],
        cwd=ROOT,
        env=environment(),
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
    assert re.search(r"in leave_if_asked\n.*scheduler.py\", line \d+ in _hold", said)
    assert "error: a collective waited for another rank until run.timeout_minutes; the stacks of all ranks" in said


@pytest.mark.slow
def test_a_step_that_is_stopped_keeps_its_turns_where_it_would_not_give_the_same(bank: Path, tmp_path: Path) -> None:
    """Ended turns are taken as they are and the others go on, by the weights that began them, at another layout."""
    path, more = tmp_path / "run", ("rollout.deterministic=false", "train.steps=2")
    said, _ = broken("stops", bank, path, *more)  # with torchrun's own code; each rank's is 75
    file = path / "checkpoints" / "step_000001" / turn_cache.FILE
    assert f"turns of step 2 in {file}" in said
    turns = turn_cache.read(file)
    ended = {turn.ids for turn in turns.values() if turn.finish_reason != UNFINISHED}
    begun = {turn.ids for turn in turns.values() if turn.finish_reason == UNFINISHED}
    assert len(ended) > 5 and len(begun) > 2, f"{len(ended)} ended and {len(begun)} unfinished turns"

    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    settings = [QUICKSTART, *SMALL, f"failures.path={bank}", "train.save_every=1", *more]
    damaged = tmp_path / "damaged"
    shutil.copytree(path, damaged)
    again = run("train", *settings, f"run.dir={damaged}")
    assert "warning: step 2 is sampled again: " in again.stderr and f"{turn_cache.FILE} is damaged" in again.stderr

    file.write_bytes(whole)
    resumed = run("train", *settings, f"run.dir={path}")
    assert f"continuing with {len(turns)} turns of step 2 from {file}" in resumed.stdout
    rows = lines(path / "rollouts" / "step_000002.jsonl")
    sampled = [tuple(row[name]) for row in rows for name in ("reflection_ids", "retry_ids")]
    assert ended <= set(sampled)
    assert all(any(turn[: len(ids)] == ids for turn in sampled) for ids in begun)
    steps = lines(path / "metrics.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    assert steps[1]["token_mult_prob_error"] < 1.001, "not the weights that sampled these turns"


@pytest.mark.slow
def test_a_run_that_gives_up_ends_the_save_under_way(bank: Path, tmp_path: Path) -> None:
    mismatch = ("train.mismatch_stop=1", "train.max_mismatch_steps=1")  # float32's own noise is above it
    save = ("train.save_every=1", "train.save_in_background=true")
    settings = [QUICKSTART, *SMALL, f"failures.path={bank}", f"run.dir={tmp_path}", *mismatch, *save]
    said = run("train", *settings, succeed=False)
    assert said.returncode == 2
    checkpoint = tmp_path / "checkpoints" / "step_000001"
    assert f"last checkpoint: {checkpoint}" in said.stderr
    assert json.loads((checkpoint / "manifest.json").read_text())["step"] == 1
