"""What mining tells the person who waits for it."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_r3.config import Config, RolloutConfig
from nemo_r3.errors import UserError
from nemo_r3.failures.tally import Tally
from recipes.bank import bank_rows, problems_to_mine


def test_mining_says_how_many_answers_were_cut(capsys: pytest.CaptureFixture[str]) -> None:
    said: list[str] = []
    task = SimpleNamespace(problems=lambda split: [SimpleNamespace(tools=())] * 5)
    setup: Any = SimpleNamespace(
        config=Config(rollout=RolloutConfig(max_answer_tokens=6)),
        task=task,
        progress=SimpleNamespace(say=said.append, begin=lambda title: None),
        run=SimpleNamespace(timed=lambda phase: nullcontext()),
        world=SimpleNamespace(is_main=True),
    )
    bank: Any = SimpleNamespace(
        path=Path("failures"),
        is_complete=lambda: False,
        mine=lambda rollout, problems, progress: None,
        read=lambda: [1, 2, 3],
        tally=lambda: Tally(100, 40, truncated=97),
        example=None,
    )
    rollout: Any = SimpleNamespace(too_long=set())
    assert bank_rows(setup, bank, rollout) == [1, 2, 3]
    assert said[:2] == ["mining 5 problems", "40 of 100 answers to 5 problems right at first try"]
    cut = "97% of the answers cut at rollout.max_answer_tokens"
    assert said[-1] == f"mined failures: 3 failures of 5 problems, {cut}"
    assert "were cut at rollout.max_answer_tokens=6" in capsys.readouterr().err


def test_a_task_that_is_only_there_to_be_measured_on_has_nothing_to_mine() -> None:
    setup: Any = SimpleNamespace(config=Config(), task=SimpleNamespace(problems=lambda split: []))
    with pytest.raises(UserError, match=r"failures\.source=bank: the task has no training problems"):
        problems_to_mine(setup)
