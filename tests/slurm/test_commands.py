"""Slurm's commands while the controller does not answer; no Slurm is needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from processes import program

from nemo_r3.errors import UserError
from slurm import commands, job, slices

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"
TIMED_OUT = "echo 'slurm_load_jobs error: Socket timed out on send/recv operation' >&2; exit 1"


@pytest.fixture(autouse=True)
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Slurm whose squeue times out, and whose scontrol notes what it is asked; nobody waits."""
    program(tmp_path, "squeue", TIMED_OUT)
    program(tmp_path, "scontrol", f'[ "$1" = show ] && echo n1 || echo "$@" >>{tmp_path}/asked')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(commands, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(slices.signal, "signal", lambda number, handler: None)


def test_a_command_is_tried_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program(
        tmp_path,
        "squeue",
        f"echo >>{tmp_path}/tries; [ $(wc -l <{tmp_path}/tries) = 3 ] && echo RUNNING && exit\n{TIMED_OUT}",
    )
    assert commands.ask("squeue", "--me", attempts=3) == "RUNNING\n"
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and said[0].startswith("`squeue --me` failed: slurm_load_jobs error: Socket timed out")


def test_the_last_failure_is_an_error_and_so_is_a_missing_slurm() -> None:
    with pytest.raises(UserError, match="`squeue --me` failed: .*Socket timed out"):
        commands.ask("squeue", "--me", attempts=2)
    with pytest.raises(UserError, match="no-such-command was not found: there is no Slurm here"):
        commands.ask("no-such-command", attempts=2)


def test_a_job_whose_state_cannot_be_read_is_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "SLURM_RESTART_COUNT": "0"}.items():
        monkeypatch.setenv(name, value)
    logs = tmp_path / "run" / "logs" / "7_0"
    logs.mkdir(parents=True)
    (logs / "health.log").write_text("n1: fine\n")
    assert job.main(["end", "75", str(QUICKSTART), f"run.dir={tmp_path}/run"]) == 75
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    out, err = capsys.readouterr()
    assert "stopped on request before the ranks began; requeued" in out
    assert err.count("trying again") == commands.ATTEMPTS - 1 and "as if the job were still running" in err
