"""The drill: kills leave no trace, a trace is found, and a drill that was stopped goes on."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from launch import QUICKSTART, SMALL, run

from recipes import drill
from recipes.drill import Tally, differences, kill, next_kind, step_seconds, waits_of
from recipes.fault_injection import Launch, untimed


def a_run(path: Path, steps: list[int], reward: float = 0.5) -> Path:
    for folder in ("failures", "rollouts"):
        (path / folder).mkdir(parents=True)
        (path / folder / ("shard_00000.jsonl" if folder == "failures" else "step_000001.jsonl")).write_text("{}\n")
    lines = [{"step": step, "reward": reward, "time/rollout": len(str(path)), "time/cpu_rollout": 9} for step in steps]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_differences_are_named(tmp_path: Path) -> None:
    whole = a_run(tmp_path / "whole", [1, 2])
    assert differences(whole, a_run(tmp_path / "same but slower", [1, 2]), ended=True) == []
    begun = a_run(tmp_path / "begun", [1])
    with (begun / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "re')  # the last line was being written
    assert untimed(begun / "metrics.jsonl") == [{"step": 1, "reward": 0.5}]
    assert differences(whole, begun, ended=False) == []
    assert differences(whole, begun, ended=True) == [
        "line 2 of metrics.jsonl: None != {'step': 2, 'reward': 0.5}",
    ]
    (found,) = differences(whole, a_run(tmp_path / "twice", [1, 1]), ended=False)
    assert found.startswith("line 2 of metrics.jsonl: {'step': 1, 'reward': 0.5} != {'step': 2")
    (found,) = differences(whole, a_run(tmp_path / "other", [1], 0.25), ended=False)
    assert found.startswith("line 1 of metrics.jsonl: {'step': 1, 'reward': 0.25}")
    lost = a_run(tmp_path / "lost", [1, 2])
    (lost / "failures" / "shard_00000.jsonl").unlink()
    (lost / "rollouts" / "step_000001.jsonl").write_text("{")
    assert differences(whole, lost, ended=True) == ["failures/shard_00000.jsonl", "rollouts/step_000001.jsonl"]
    assert differences(whole, lost, ended=False) == ["rollouts/step_000001.jsonl"], "it may be mined yet"


def test_a_round_begins_with_kills_while_it_mines(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    assert next_kind(killed, whole, 1) == "SIGUSR1", "a run without a bank"
    for path in (killed, whole):
        (path / "failures").mkdir(parents=True)
    waits = waits_of(Launch([], 1, killed), "while mining", 0.0)
    assert waits == [killed / "failures" / "bank.json", 0.0]
    kinds = [next_kind(killed, whole, number) for number in range(3)]
    assert kinds == ["while saving", "while mining", "while mining"]
    (killed / "failures" / "bank.json").write_text('{"complete": true}')
    assert [next_kind(killed, whole, number) for number in (1, 3)] == ["SIGUSR1", "at random"]


def test_a_kill_waits_for_a_step_that_no_checkpoint_has(tmp_path: Path) -> None:
    launch = Launch([], 1, a_run(tmp_path / "run", [1, 2]))
    assert waits_of(launch, "SIGUSR1", 0.0) == [launch.path / "rollouts" / "step_000001.jsonl", 0.0]
    (launch.checkpoints / "step_000001").mkdir(parents=True)
    (launch.checkpoints / "step_000001" / "manifest.json").touch()
    step, pause, save, _ = waits_of(launch, "while saving", 0.0)
    assert (step, pause, save) == (launch.path / "rollouts" / "step_000002.jsonl", 0.0, launch.writing)


def test_a_step_takes_its_wall_time(tmp_path: Path) -> None:
    path = a_run(tmp_path / "run", [1, 2])
    assert step_seconds(path) == 2 * [len(str(path))]


def test_a_drill_that_was_stopped_goes_on_and_one_that_is_over_begins_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, killed = tmp_path / "drill", list[tuple[str, int, float]]()

    def finish(launch: Launch) -> float:
        if not launch.path.exists():
            a_run(launch.path, [1, 2])
        return 1.0

    def kill(launch: Launch, whole: Path, tally: Tally, kills: int, patience: float) -> bool:
        killed.append((launch.path.name, tally.total, patience))
        tally.rounds += 1
        tally.kills["SIGUSR1"] = kills
        return True

    monkeypatch.setattr(drill.Launch, "finish", finish)
    monkeypatch.setattr(drill, "kill", kill)
    monkeypatch.setattr(drill.signal, "signal", lambda *_: None)
    (home / "round_002").mkdir(parents=True)
    (home / "tally.json").write_text(json.dumps({"kills": {"SIGUSR1": 6}, "rounds": 1}))
    for _ in range(2):
        drill.drill([QUICKSTART, f"run.dir={tmp_path}", "drill.kills=6"])
    patience = 5 * (30 + 2 * len(str(home / "whole")))
    assert killed == [("round_002", 6, patience), ("round_001", 0, patience)]


def test_what_a_kill_has_cost_is_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, tally = a_run(tmp_path / "whole", [1, 2]), Tally()
    launch = Launch([], 1, a_run(tmp_path / "run", [1]))
    for step in (1, 2):
        (launch.checkpoints / f"step_{step:06d}").mkdir(parents=True)
        (launch.checkpoints / f"step_{step:06d}" / "manifest.json").touch()

    def interrupt(*_: object) -> tuple[int, float]:
        (launch.checkpoints / "step_000002" / "manifest.json").unlink()
        (launch.path / "failures" / "shard_00000.jsonl").unlink()
        (launch.path / "rollouts" / "step_000001.jsonl").write_text("{")
        launch.writing.mkdir()
        return -9, 1.5

    monkeypatch.setattr(Launch, "interrupt", interrupt)
    assert not kill(launch, whole, tally, 6, 60.0)
    assert tally == Tally({"while saving": 1}, cut_saves=1, seconds=1.5, harm=tally.harm)
    assert tally.harm == [
        f"{launch.checkpoints}/step_000001 is damaged",
        f"{launch.checkpoints} went back from step 2 to 1",
        f"{launch.path}/failures/shard_00000.jsonl is lost",
        "rollouts/step_000001.jsonl",
    ]


@pytest.mark.slow
def test_a_run_that_is_killed_ends_the_same_and_the_tally_goes_on_where_it_was(tmp_path: Path) -> None:
    home = tmp_path / "run" / "drill"
    settings = (QUICKSTART, *SMALL, f"run.dir={tmp_path}/run", "train.steps=8", "train.save_every=1")
    first = run("drill", *settings, "drill.kills=2").stdout
    assert re.search(r"kill 2/2 SIGUSR1 after .* s, at step [1-8]\n", first), "a step was saved, to resume from"
    assert "round_001: came to its end" in first and "no harm" in first
    again = run("drill", *settings, "drill.kills=3").stdout
    assert "kill 3/3 " in again and "kill 2/" not in again and "round_002: came to its end" in again
    tally = Tally(**json.loads((home / "tally.json").read_text()))
    assert (tally.total, tally.rounds, tally.harm) == (3, 2, [])
