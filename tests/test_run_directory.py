from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from refusals import refusal
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemo_r3 import run_directory
from nemo_r3.config import Config, load
from nemo_r3.errors import UserError
from nemo_r3.files import _locks, take_lock
from nemo_r3.run_directory import RunDirectory
from nemo_r3.runtime import World
from nemo_r3.types import Answer, Attempt, Group, Phase, Problem, Reflection, Segment, Trajectory, UpdateBatch


def directory(path: Path, *overrides: str) -> RunDirectory:
    yaml = path.parent / "run.yaml" if path.parent.is_dir() else path.parents[1] / "run.yaml"
    yaml.write_text("model: {path: embedded}\nrun: {tensorboard: false}\n")
    config: Config = load([str(yaml), f"run.dir={path}", *overrides])
    alone = SimpleNamespace(is_main=True, rank=0, size=1, barrier=lambda: None, on_main=lambda act: act())
    return RunDirectory(config, cast(World, cast(Any, alone)))


def opened(path: Path, *overrides: str) -> RunDirectory:
    run = directory(path, *overrides)
    run.open(resuming=False)
    return run


class Clock:
    """Time passes only where it is spent."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def perf_counter(self) -> float:
        return self.wall

    def process_time(self) -> float:
        return self.cpu

    def spend(self, wall: float, cpu: float) -> None:
        self.wall += wall
        self.cpu += cpu


def steps(run: RunDirectory) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]


def test_a_resumed_run_logs_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened(tmp_path / "run")
    for step in (1, 2, 3):
        run.log(step, {"loss": math.nan, "lr": 0.5})
        run.log_layers(step, [{"layer": 0, "error": math.nan}, {"layer": 1, "error": 0.5}])
        (run.path / "rollouts" / f"step_{step:06d}.jsonl").write_text("")
    with run.metrics.open("a") as file:
        file.write('{"step": 4, "lo')  # a crash in the middle of a line
    shown: list[Any] = []
    monkeypatch.setattr(run_directory.trackers, "open_all", lambda *given: shown.append(given[2:]))
    run.cut_back(2)
    ((last, lines),) = shown
    assert (last, [line["step"] for line in lines]) == (2, [1, 2]), "for servers that lack some"
    run.log(3, {"loss": 0.25, "lr": 0.5})
    assert [json.loads(line) for line in run.metrics.read_text().splitlines()] == [
        {"step": step, "loss": loss, "lr": 0.5} for step, loss in ((1, None), (2, None), (3, 0.25))
    ]
    assert [json.loads(line) for line in run.layers.read_text().splitlines()] == [
        {"step": step, "layer": layer, "error": error} for step in (1, 2) for layer, error in ((0, None), (1, 0.5))
    ]
    assert sorted(file.name[-7] for file in (run.path / "rollouts").iterdir()) == ["1", "2"]


def test_a_step_is_on_the_disk_once_it_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, synced = opened(tmp_path / "run"), list[str]()
    sync = lambda descriptor: synced.append(Path(f"/proc/self/fd/{descriptor}").read_text())  # noqa: E731
    monkeypatch.setattr(run_directory.os, "fsync", sync)
    run.log(1, {"loss": 0.5})
    assert synced == [run.metrics.read_text()]


def test_a_run_without_a_checkpoint_starts_its_log_anew_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = opened(tmp_path / "run")
    run.log(1, {"loss": 0.5})
    run.cut_back(0)
    assert steps(run) == []
    assert "starts again at step 1 and replaces the 1 steps in" in capsys.readouterr().err


def test_steps_before_the_first_checkpoint_make_way_for_other_settings_and_are_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = directory(tmp_path / "run")
    for seed in (2, 3):
        run.open(resuming=False)
        run.cut_back(0)
        run.log(1, {"loss": 0.5})
        (run.path / "rollouts" / "step_000001.jsonl").write_text("")
        _locks.pop().close()
        run = directory(tmp_path / "run", f"seed={seed}")
    run.open(resuming=False)
    assert not run.metrics.exists() and not any((run.path / "rollouts").iterdir())
    for number, seed in ((1, 1), (2, 2)):
        tried = RunDirectory(load([str(run.path / f"tried_{number}" / "config.yaml")]), cast(World, None))
        assert tried._config.seed == seed
        assert (run.path / f"tried_{number}" / "rollouts" / "step_000001.jsonl").exists()
    assert f"which no checkpoint has, to {run.path}/tried_2 (seed: 2 -> 3)" in capsys.readouterr().out


def test_other_settings_are_refused_and_the_runs_own_config_has_them_all(tmp_path: Path) -> None:
    run = opened(tmp_path / "run", "algo.group_size=4")
    run.cut_back(0)
    _locks.pop().close()
    own = tmp_path / "run" / "config.yaml"
    with pytest.raises(UserError, match=rf"algo\.group_size: 4 -> 8\. .* old values, which {own} has"):
        directory(tmp_path / "run").open(resuming=True)
    with pytest.raises(UserError, match="can begin it with .*, or if LoRA changes model.path with an export"):
        directory(tmp_path / "run", "actor.lora_rank=8").open(resuming=True)
    run = RunDirectory(load([str(own)]), cast(World, None))
    assert run.path == tmp_path / "run"
    run.refuse_other_settings()


def test_settings_may_change_while_no_step_is_logged(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    run.metrics.touch()
    _locks.pop().close()
    directory(tmp_path / "run", "seed=2").open(resuming=False)
    assert not (run.path / "tried_1").exists()


def test_a_directory_of_something_else_is_not_filled(tmp_path: Path) -> None:
    place = tmp_path / "configs"
    place.mkdir()
    for name in ("a.yaml", "b.yaml", "c.yaml", "d.yaml"):
        (place / name).touch()
    with pytest.raises(UserError, match=r"run\.dir: .*configs holds no run, but a.yaml, b.yaml, c.yaml, \.\.\.: name"):
        directory(place).check_directory()
    assert len(list(place.iterdir())) == 4
    with pytest.raises(UserError, match=r"run\.dir: .*a\.yaml is a file; name a directory"):
        directory(place / "a.yaml").check_directory()


@pytest.mark.parametrize("names", [["logs/1_0/", "chain/", "train.log"], ["failures/"], ["notes.md", "summary.json"]])
def test_a_run_and_what_comes_before_it_is_no_other_thing(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        file = tmp_path / "run" / name
        (file if name.endswith("/") else file.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            file.touch()
    directory(tmp_path / "run").check_directory()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "no config.yaml"), ("model: [", "config.yaml should have the settings"), ("", "model.path")],
)
def test_checkpoints_whose_settings_are_unknown_are_not_resumed(
    tmp_path: Path, content: str | None, expected: str
) -> None:
    run = directory(tmp_path / "run")
    run.path.mkdir()
    if content is not None:
        (run.path / "config.yaml").write_text(content)
    said = refusal(lambda: run.open(resuming=True))
    assert said.startswith("run.dir: ") and expected in said


def test_damaged_logs_cost_their_own_lines_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = opened(tmp_path / "run")
    for step in (1, 2, 3):
        run.log(step, {"loss": 0.5})
    lines = run.metrics.read_bytes().splitlines()
    run.metrics.write_bytes(b"\n".join([b"5", b"\xff\xfe", lines[1], lines[2]]) + b"\n")
    (run.path / "rollouts" / "step_notes.jsonl").touch()
    (run.path / "summary.json").write_text("[]")
    run.cut_back(3)
    assert steps(run) == [2, 3]
    assert run.add_to_summary(export="here")["export"] == "here"
    (run.path / "summary.json").write_text('{"export": "here", "seconds": "many"}')
    assert run.add_to_summary() == {"export": "here", "seconds": {}}
    errors = capsys.readouterr().err
    assert f"{run.metrics} lacks 1 of the 3 steps before" in errors
    assert f"{run.path}/summary.json is damaged, and starts again" in errors


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"run\.dir: cannot write to .*file/run \(Not a directory\)"):
        directory(tmp_path / "file" / "run").check_directory()
    with pytest.raises(UserError, match=r"run\.dir: cannot write .*file/run"):
        directory(tmp_path / "file" / "run").open(resuming=False)
    directory(tmp_path / "mistyped" / "run").check_directory()
    assert not (tmp_path / "mistyped").exists()


def test_resuming_may_change_layout_steps_and_logging(tmp_path: Path) -> None:
    changed = "actor.tensor_parallel=2", "train.steps=9", "run.tensorboard=true"
    for run, resuming in ((directory(tmp_path / "run"), False), (directory(tmp_path / "run", *changed), True)):
        run.open(resuming)
        run.cut_back(0)
        _locks.pop().close()  # as the end of its process would
    assert load([str(tmp_path / "run" / "config.yaml")]) == load(
        [str(tmp_path / "run.yaml"), f"run.dir={tmp_path}/run", *changed]
    )


def test_times_add_up_per_phase_and_start_anew_with_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(run_directory, "time", clock)
    run = opened(tmp_path / "run")

    def spend(phase: str, wall: float, cpu: float) -> None:
        with run.timed(phase):
            clock.spend(wall, cpu)

    spend("update", 2.0, 1.0)
    spend("update", 3.0, 1.5)
    clock.spend(100.0, 100.0)  # outside of all phases
    run.log(1, {})
    spend("refit", 0.5, 0.25)
    run.log(2, {})
    spend("update", 10.0, 4.0)
    spend("evaluate", 7.0, 6.0)
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [{name: value for name, value in line.items() if name.startswith("time/")} for line in lines] == [
        {"time/update": 5.0, "time/cpu_update": 2.5},
        {"time/refit": 0.5, "time/cpu_refit": 0.25},
    ]
    assert [[name for name in line if name.endswith("_rss")] for line in lines] == [
        [f"memory/{phase}_rss"] for phase in ("update", "refit")
    ]
    with run.metrics.open("a") as log:
        log.write('{"step": 3, "time/update": "x"}\n')  # damaged
        log.write('{"step": 3, "time/upd')  # a crash cut it short
    assert run.add_to_summary()["seconds"] == {
        "update": {"wall": 15.0, "cpu": 6.5},
        "refit": {"wall": 0.5, "cpu": 0.25},
        "evaluate": {"wall": 7.0, "cpu": 6.0},
    }
    later = directory(run.path)  # another verb leaves a training's seconds as they are
    with later.timed("export"):
        clock.spend(1.0, 1.0)
    assert later.add_to_summary()["seconds"]["update"] == {"wall": 15.0, "cpu": 6.5}
    resumed = directory(run.path)
    resumed.cut_back(1)
    assert resumed.add_to_summary()["seconds"]["update"] == {"wall": 5.0, "cpu": 2.5}


def test_tensorboard_shows_every_step_once(tmp_path: Path) -> None:
    run = opened(tmp_path / "run", "run.tensorboard=true")
    run.cut_back(0)
    for step in (1, 2, 3):
        run.log(step, {"loss": step / 4, "kl": None})
    run.cut_back(1)
    run.log(2, {"loss": 8.0})
    board = EventAccumulator(str(run.path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(1, 0.25), (2, 8.0)]
    assert board.Tags()["scalars"] == ["loss"]


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    directory(tmp_path / "run").open(resuming=False)
    with pytest.raises(UserError, match="another process is writing"):
        take_lock(tmp_path / "run")


def test_the_summary_is_merged(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    run.add_to_summary(before={"a": 1}, step=3)
    assert run.add_to_summary(export="x", step=None) == {"before": {"a": 1}, "export": "x", "seconds": {}}


def group_of(problem: str, passed: list[bool]) -> Group:
    def answer(phase: Phase, text: str) -> Answer:
        return Answer(Segment(phase, tuple(map(ord, text)), (-0.5,) * len(text), 3), text, "stop")

    attempt = answer(Phase.ATTEMPT, f"attempt at {problem}")
    context = Trajectory((Segment(Phase.TASK, (1, 2)), attempt.segment))
    failure = Attempt(Problem(problem, "?", {}), 0, context, attempt, False)
    turns = [(answer(Phase.REFLECTION, f"why {n}"), answer(Phase.RETRY, f"again {n}")) for n in range(len(passed))]
    return Group(failure, tuple(Reflection(n, context, *turns[n], verdict) for n, verdict in enumerate(passed)))


def test_a_rollout_is_a_line_and_what_its_group_shares_is_written_once(tmp_path: Path) -> None:
    run = opened(tmp_path / "run")
    groups = [group_of("a", [True, False, False]), group_of("b", [False, True, True])]
    advantages, rewards = ((1.0, -0.5, -0.5), (-1.0, 0.5, 0.5)), ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))
    run.log_rollouts(7, groups, UpdateBatch((), advantages, 2, 0, rewards))
    rows = [json.loads(line) for line in (run.path / "rollouts" / "step_000007.jsonl").read_text().splitlines()]
    assert [(row["step"], row["group"], row["sample"]) for row in rows] == [
        (7, g, s) for g in (0, 1) for s in (0, 1, 2)
    ]
    assert [row["problem_id"] for row in rows] == ["a"] * 3 + ["b"] * 3
    assert [(row["reflection"], row["retry"]) for row in rows] == [(f"why {n}", f"again {n}") for n in (0, 1, 2)] * 2
    assert [row["reward"] for row in rows] == [1, 0, 0, 0, 0, 1]
    assert [row["retry_passed"] for row in rows] == [True, False, False, False, True, True]
    assert [row["advantage"] for row in rows] == [1, -0.5, -0.5, -1, 0.5, 0.5]
    assert [row.get("problem") for row in rows] == ["?", None, None] * 2
    assert [row.get("attempt") for row in rows] == ["attempt at a", None, None, "attempt at b", None, None]
    assert [row.get("context_ids") for row in rows[:2]] == [[1, 2, *map(ord, "attempt at a")], None]
