"""How a slice's end is read and what follows from it; no Slurm is needed."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from nemo_r3.config import Config, load
from nemo_r3.errors import UserError
from slurm import slices
from slurm.slices import FINISHED, REFUSED, STOPPED, End, Record, decide, read_end

ROOT = Path(__file__).parents[2]
HOSTS = ["n1", "n2"]


def leave(logs: Path, exits: dict[int, str], said: dict[int, str] | None = None, health: str = "fine") -> None:
    """What a slice leaves: exit files by rank, log texts by rank, and n2's health."""
    (logs / "health.log").write_text(f"n2: {health}\nn1: fine\n")
    for rank, text in exits.items():
        (logs / f"rank_{rank}.exit").write_text(text + "\n")
    for rank, text in (said or {}).items():
        (logs / f"rank_{rank}.log").write_text(text)


TRACEBACK = "step 1\nTraceback (most recent call last):\n  File x\n    raise\ntorch.OutOfMemoryError: 3 GiB\nlater\n"


@pytest.mark.parametrize(
    ("exits", "code", "ended"),
    [
        ({0: "1 n1 105.2", 3: "137 n2 101.5"}, 137, End(137, "rank 3 on n2 was killed by signal 9 (SIGKILL)", ("n2",))),
        # all of n2 was lost, and srun ended n1: no host's fault
        ({0: "143 n1 101.5", 1: "138 n1 101.6"}, 143, End(143, "rank 0 on n1 was killed by signal 15 (SIGTERM)")),
        ({0: "75 n1 100.0", 1: "137 n1 103.0"}, 137, End(STOPPED, "stopped on request")),  # srun killed late ranks
        ({0: "139 n1 9.0", 1: "75 n1 9.5"}, 75, End(139, "rank 0 on n1 was killed by signal 11 (SIGSEGV)", ("n1",))),
        ({}, STOPPED, End(STOPPED, "stopped on request before the ranks began")),
        ({}, 2, End(1, "srun ended with code 2 and no rank said why; see the lines above")),  # no rank's own code
    ],
)
def test_what_ranks_leave_says_how_a_slice_ended(tmp_path: Path, exits: dict[int, str], code: int, ended: End) -> None:
    leave(tmp_path, exits)
    assert read_end(tmp_path, code, HOSTS, 5) == ended


def test_the_first_rank_that_failed_is_the_cause(tmp_path: Path) -> None:
    """Rank 1 ran out of memory; the others lost their connection to it, or were killed by srun."""
    exits = {0: "1 n1 105.2", 1: "1 n1 101.5", 2: "143 n2 101.6", 3: "0 n2 100.0"}
    leave(tmp_path, exits, {0: "RuntimeError: Connection closed by peer\n", 1: TRACEBACK})
    ended = read_end(tmp_path, 143, HOSTS, 5)
    assert ended.code == 1 and ended.hosts == (), "what a program causes is no host's fault"
    assert ended.cause.startswith("rank 1 on n1 ended with code 1: torch.OutOfMemoryError: 3 GiB (")


@pytest.mark.parametrize(
    ("line", "blamed"),
    [
        ("torch.AcceleratorError: CUDA error: uncorrectable ECC error encountered", ("n1",)),
        ("RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable", ("n1",)),
        ("n1:7:7 [0] NCCL WARN Cuda failure 'uncorrectable NVLink error detected during the execution'", ("n1",)),
        ("torch.AcceleratorError: CUDA error: device-side assert triggered", ()),
        ("torch.AcceleratorError: CUDA error: an illegal memory access was encountered", ()),
        ("torch.AcceleratorError: CUDA error: out of memory", ()),
        ("TypeError: unsupported operand type(s)", ()),
    ],
)
def test_a_host_is_blamed_for_its_gpus_alone(tmp_path: Path, line: str, blamed: tuple[str, ...]) -> None:
    leave(tmp_path, {0: "1 n1 101.5", 2: "143 n2 102.0"}, {0: f"{line}\nRuntimeError: that was it\n"})
    assert read_end(tmp_path, 1, HOSTS, 5).hosts == blamed


@pytest.mark.parametrize(("second", "blamed"), [("n1", ("n1",)), ("n2", ())])
def test_the_same_trouble_on_several_hosts_is_no_hosts_fault(
    tmp_path: Path, second: str, blamed: tuple[str, ...]
) -> None:
    leave(tmp_path, {0: "139 n1 101.5", 3: f"139 {second} 104.0"})
    assert read_end(tmp_path, 139, HOSTS, 5).hosts == blamed
    lost = "RuntimeError: CUDA error: unknown error\n"
    leave(tmp_path, {0: "1 n1 101.5", 3: f"1 {second} 104.0"}, {0: lost, 3: lost})
    assert read_end(tmp_path, 1, HOSTS, 5).hosts == blamed


def test_a_code_beyond_all_signals_is_a_code(tmp_path: Path) -> None:
    leave(tmp_path, {0: "255 n1 1.0"})
    said = "rank 0 on n1 ended with code 255: its log names no error"
    assert read_end(tmp_path, 255, HOSTS, 5).cause.startswith(said)


@pytest.mark.parametrize("line", ["error: model.path: mend me", "[rank 3] error: mend me"])
def test_a_users_error_is_quoted(tmp_path: Path, line: str) -> None:
    leave(tmp_path, {0: "2 n1 100.0"}, {0: f"warning: ...\n{line}\n"})
    ended = read_end(tmp_path, 2, HOSTS, 5)
    assert ended.code == REFUSED and line in ended.cause


def test_an_unfit_node_is_named_and_blamed(tmp_path: Path) -> None:
    leave(tmp_path, {}, health="CUDA sees 7 GPUs, 8 were allocated")
    assert read_end(tmp_path, 2, HOSTS, 5) == End(1, "node n2: CUDA sees 7 GPUs, 8 were allocated", ("n2",))


def test_a_node_that_does_not_answer_is_blamed(tmp_path: Path) -> None:
    (tmp_path / "health.log").write_text("n2: fine\n")
    assert read_end(tmp_path, 1, HOSTS, 5) == End(1, "node n1: no answer to the health check", ("n1",))
    late = "the health check took longer than cluster.health_minutes=5"
    assert read_end(tmp_path, 124, HOSTS, 5) == End(1, f"node n1: {late}", ("n1",))
    (tmp_path / "health.log").write_text("")
    assert read_end(tmp_path, 124, HOSTS, 5).cause.startswith(f"{late} (")


def test_what_all_nodes_share_is_no_nodes_fault(tmp_path: Path) -> None:
    (tmp_path / "health.log").write_text("n2: disk full\nn1: disk full\n")
    assert read_end(tmp_path, 1, HOSTS, 5) == End(1, "node n1: disk full; node n2: disk full")
    (tmp_path / "health.log").write_text("")
    assert not read_end(tmp_path, 1, HOSTS, 5).hosts
    full = "/run has 3.0 GB free, cluster.min_disk_gb=10"
    (tmp_path / "health.log").write_text(f"n1: {full}\n")
    assert not read_end(tmp_path, 1, ["n1"], 5).hosts
    (tmp_path / "health.log").write_text(f"n1: {full}\nn2: CUDA sees 1 GPUs, 2 were allocated; {full}\n")
    assert read_end(tmp_path, 1, HOSTS, 5).hosts == ("n2",), "which has a fault of its own, too"


def verdicts(record: Record, ends: list[tuple[int, tuple[int, int]]], *overrides: str) -> list[bool]:
    """Whether each of some slices is followed by another; a pair is its code and where the run then stands."""
    config, requeued = load([str(ROOT / "configs/quickstart.yaml"), *overrides]), []
    for code, progress in ends:
        verdict = decide(config, record, End(code, "", ("n2",)), progress)
        record = replace(verdict.record, progress=progress)
        requeued.append(verdict.requeue)
    return requeued


STILL, ON, FAULT = (STOPPED, (0, 0)), (STOPPED, (5, 0)), (1, (0, 0))


@pytest.mark.parametrize(
    ("ends", "requeued"),
    [
        ([(FINISHED, (4, 1))], [False]),
        ([(REFUSED, (4, 1))], [False]),
        ([(STOPPED, (step, 1)) for step in range(1, 9)], [True] * 8),
        ([(STOPPED, (0, shards)) for shards in range(1, 9)], [True] * 8),  # of the failure bank
        ([(1, (step, 0)) for step in range(1, 9)], [True] * 8),  # progress forgives any number of faults
        ([STILL, STILL], [True, False]),
        ([STILL, ON, ON, ON], [True, True, True, False]),
        ([FAULT] * 4, [True, True, True, False]),
    ],
)
def test_a_slice_is_followed_by_another_while_that_helps(
    ends: list[tuple[int, tuple[int, int]]], requeued: list[bool]
) -> None:
    assert verdicts(Record(), ends) == requeued


def test_slices_too_short_and_faults_end_the_job_and_hosts_are_counted() -> None:
    said = decide(Config(), Record(idle=1), End(STOPPED), (0, 0)).reason
    assert "too short" in said and "cluster.signal_seconds=600" in said
    assert verdicts(Record(), [FAULT], "cluster.max_requeues=0") == [False]
    once = decide(Config(), Record(hosts={"n2": 1}), End(1, "", ("n2", "n1")), (0, 0))
    assert once.record.hosts == {"n2": 2, "n1": 1}


def test_progress_forgives_faults_and_hosts() -> None:
    """By a checkpoint or a shard: a broken run survives no faults beyond the cap."""
    before = Record(faults=3, idle=1, progress=(5, 2), hosts={"n1": 1, "n2": 1})
    verdict = decide(Config(), before, End(1, "", ("n2",)), (5, 3))
    assert verdict.requeue and verdict.record == Record(faults=1, progress=(5, 2), hosts={"n2": 1})
    assert not decide(Config(), before, End(1, "", ("n2",)), (5, 2)).requeue


def test_the_record_outlives_a_slice_and_is_the_jobs_own(tmp_path: Path) -> None:
    settings = [f"run.dir={tmp_path}/run", f"failures.path={tmp_path}/bank"]
    config = load([str(ROOT / "configs/quickstart.yaml"), *settings])
    slices.begin(config, "7", 0)
    (tmp_path / "bank").mkdir()
    for shard in range(3):
        (tmp_path / "bank" / f"shard_{shard:05d}.jsonl").touch()
    slices.write_record(config, "7", Record(faults=2, idle=1, hosts={"n2": 1}))
    for step in (5, 20):
        (tmp_path / f"run/checkpoints/step_{step:06d}").mkdir(parents=True)
    (tmp_path / "run/checkpoints/step_000005/manifest.json").write_text("{}")
    slices.begin(config, "8", 0)  # beside it, such as an export
    assert slices.read_record(config, "8") == Record(progress=(5, 3))
    slices.begin(config, "7", 1)
    assert slices.read_record(config, "7") == Record(2, 1, progress=(5, 3), hosts={"n2": 1})
    (tmp_path / "run/logs/8.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        slices.begin(config, "8", 1)


@pytest.mark.parametrize(
    ("state", "excluded", "asked"),
    [
        ("RUNNING", "(null)", ["requeue 7", "update jobid=7 ExcNodeList=n2"]),
        ("RUNNING", "n9", ["requeue 7", "update jobid=7 ExcNodeList=n9,n2"]),
        ("COMPLETING", "(null)", []),
    ],
)
def test_a_job_that_slurm_is_not_ending_is_requeued_without_the_host_that_failed_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str, excluded: str, asked: list[str]
) -> None:
    answers = {"hostnames": "n1\nn2\n", "job": f"JobId=7 ExcNodeList={excluded} Nodes=2\n"}
    told = []

    def ask(command: str, *words: str, attempts: int) -> str:
        if command == "squeue":
            return f"{state}\n"
        if words[0] == "show":
            return answers[words[1]]
        told.append(" ".join(words))
        return ""

    monkeypatch.setattr(slices, "ask", ask)
    monkeypatch.setattr(slices.signal, "signal", lambda *_: None)
    config = Config()
    config.run.dir, config.failures.path = str(tmp_path), str(tmp_path / "failures")
    slices.begin(config, "7", 0)
    slices.write_record(config, "7", Record(hosts={"n2": 1}))
    leave(slices.logs_of(config, "7", 0), {3: "137 n2 101.5"})
    assert slices.end(config, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]"}, 137) == 137
    assert told == asked
    assert slices.read_record(config, "7").faults == len(asked) // 2


def test_without_room_for_the_record_a_job_is_not_requeued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slices, "ask", lambda *_, **__: "RUNNING")
    config = load([str(ROOT / "configs/quickstart.yaml"), f"run.dir={tmp_path}"])
    slices.begin(config, "7", 0)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(slices, "write_record", full)
    assert slices.end(config, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}, 137) == 1
    said = capsys.readouterr().out
    assert f"not requeued: cannot write {tmp_path}/logs/7.json (No space left on device); fix that" in said
    assert slices.end(config, {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1"}, 0) == 0
    assert capsys.readouterr().out == "slice 0 of job 7: finished; done\n", "there is nothing to submit again"


def test_a_slice_keeps_the_settings_that_it_began_with(tmp_path: Path) -> None:
    config = load([str(ROOT / "configs/quickstart.yaml"), f"run.dir={tmp_path}", "cluster.max_requeues=7"])
    slices.begin(config, "7", 0)
    assert load([str(slices.logs_of(config, "7", 0) / "config.yaml")]) == config


def test_the_batch_script_needs_omegaconf_and_yaml_alone(tmp_path: Path) -> None:
    for name in ("omegaconf", "antlr4", "yaml"):
        (tmp_path / name).symlink_to(Path(str(import_module(name).__file__)).parent)
    command = [sys.executable, "-S", "-c", "import slurm.job, slurm.health, slurm.stage"]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
