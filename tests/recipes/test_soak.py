"""The soak: what it counts is found where it is, and its tally outlives its calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from launch import ROOT, run

from recipes.fault_injection import untimed
from recipes.soak import Tally, mined_shards, next_kind, rows_lost


def test_lost_rows_and_steps_logged_twice_are_found(tmp_path: Path) -> None:
    whole, mined = tmp_path / "whole.jsonl", tmp_path / "mined.jsonl"
    whole.write_text('{"row": 1}\n{"row": 2}\n')
    assert rows_lost(whole, whole) == 0
    assert rows_lost(mined, whole) == 2, "a shard that is gone"
    mined.write_text('{"row": 2}\n')
    assert rows_lost(mined, whole) == 1
    mined.write_text('{"step": 1, "time/save": 2}\n{"step": 1}\n{"step": 2, "re')
    assert untimed(mined) == [{"step": 1}, {"step": 1}], "the last line was being written"


def test_harm_is_all_but_the_kills_themselves() -> None:
    assert Tally({"at random": 3}, cut_saves=2, rounds=1, seconds=9.0).harm == {}
    assert Tally(lost_checkpoints=1, differing_rounds=2).harm == {"lost_checkpoints": 1, "differing_rounds": 2}


def test_a_round_begins_with_kills_while_it_mines(tmp_path: Path) -> None:
    assert mined_shards(tmp_path) == set()
    assert [next_kind(tmp_path, number) for number in range(3)] == ["while saving", "while mining", "while mining"]
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures" / "bank.json").write_text('{"complete": true}')
    assert [next_kind(tmp_path, number) for number in (1, 3)] == ["at random", "SIGUSR1"]


@pytest.mark.slow
def test_the_tally_goes_on_where_it_was(tmp_path: Path) -> None:
    settings = (str(ROOT / "configs" / "soak.yaml"), f"run.dir={tmp_path}/soak", "train.steps=8")
    assert "kill 2/2 at random" in run("soak", *settings, "drill.kills=2").stdout
    again = run("soak", *settings, "drill.kills=3").stdout
    assert "kill 3/3 " in again and "kill 2/" not in again
    tally = Tally(**json.loads((tmp_path / "soak" / "tally.json").read_text()))
    assert (tally.total, tally.harm) == (3, {})
