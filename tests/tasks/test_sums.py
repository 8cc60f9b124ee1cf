"""The sums of configs/smollm2.yaml."""

from pathlib import Path

import pytest

from nemo_r3.config import load
from nemo_r3.tasks import load as load_task
from nemo_r3.types import Problem

CONFIG = Path(__file__).parents[2] / "configs" / "smollm2.yaml"


def test_pairs_are_held_out_in_every_text() -> None:
    config = load([str(CONFIG)])
    task = load_task(config.task, config.dialogue)
    pairs = {split: {it.id.split("-")[0] for it in task.problems(split)} for split in ("train", "test")}
    assert {split: len(found) for split, found in pairs.items()} == {"train": 108, "test": 36}
    assert len(task.problems("test")) == 4 * 36
    assert not pairs["train"] & pairs["test"]


RIGHT, WRONG = ("6 + 7 = 13.", "Tom has 13 apples."), ("13 is not 14", "6 + 7", "It is 113.", "thirteen", "")


@pytest.mark.parametrize("text", RIGHT + WRONG)
def test_the_last_number_counts(text: str) -> None:
    config = load([str(CONFIG)])
    task = load_task(config.task, config.dialogue)
    assert task.verify(Problem("6+7-0", "What is 6 + 7?", {"sum": 13}), text) is (text in RIGHT)
