"""Function calling through mine, train, evaluate and export at TP2, on a model that half-remembers its problems."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from launch import lines, run
from served import Served

from nemo_r3.config import load
from nemo_r3.tasks import load as load_task
from nemo_r3.tasks.template import fill

pytestmark = pytest.mark.slow

LAYOUT = ("actor.tensor_parallel=2", "actor.sequence_parallel=true", "rollout.tensor_parallel=1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, its model and its run after all verbs."""
    import half_memory

    home = tmp_path_factory.mktemp("function_calling")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    config = half_memory.make(home)
    torch.set_num_threads(threads)
    for verb in ("mine", "train", "evaluate", "export"):
        done = run(verb, str(config), f"run.dir={home}/run", *LAYOUT, ranks=2)
        (home / f"{verb}.out").write_text(done.stdout)
    return home


def test_the_bank_holds_wrong_calls_and_their_tools(home: Path) -> None:
    config = load([str(home / "half.yaml")])
    task = load_task(config.task, config.dialogue)
    by_id = {problem.id: problem for problem in task.problems("train")}
    rows = lines(home / "run" / "failures" / "shard_00000.jsonl")
    assert 5 < len(rows) < 50
    for row in rows:
        problem = by_id[row["problem_id"]]
        assert row["problem"]["tools"] == list(problem.tools)
        assert not task.verify(problem, row["attempt"])
    assert any(row["attempt"].startswith('[{"name":') for row in rows)


def test_mining_says_once_how_tools_are_offered(home: Path) -> None:
    said = "tools are written into the user's turn (dialogue.tools=auto)"
    assert (home / "mine.out").read_text().count(said) == 1
    assert said not in (home / "train.out").read_text(), "the bank was there"


def test_rewards_are_the_verifiers_and_mixed(home: Path) -> None:
    config = load([str(home / "half.yaml")])
    task = load_task(config.task, config.dialogue)
    by_id = {problem.id: problem for problem in task.problems("train")}
    for step in (1, 2):
        rows = lines(home / "run" / "rollouts" / f"step_{step:06d}.jsonl")
        assert all(row["reward"] == float(task.verify(by_id[row["problem_id"]], row["retry"])) for row in rows)
        assert 0 < sum(row["reward"] for row in rows) < len(rows)


def test_only_reflections_are_trained_and_the_weights_move(home: Path) -> None:
    for number, line in enumerate(lines(home / "run" / "metrics.jsonl"), 1):
        rows = lines(home / "run" / "rollouts" / f"step_{number:06d}.jsonl")
        groups = [rows[at : at + 8] for at in range(0, len(rows), 8)]
        used = [group for group in groups if len({row["reward"] for row in group}) > 1]
        assert line["groups_used"] == len(used) > 0
        assert line["trained_tokens"] == sum(len(row["reflection_ids"]) for group in used for row in group)
        assert math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0
        assert abs(line["token_mult_prob_error"] - 1) < 1e-4
    assert line["kl"] > 0


def test_evaluation_has_before_and_after(home: Path) -> None:
    summary = json.loads((home / "run" / "summary.json").read_text())
    assert summary["before"]["first_try"]["sampled"]["n"] == summary["after"]["first_try"]["sampled"]["n"] == 6


def test_the_exports_card_asks_with_the_tools_as_training_did(home: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(home / "run" / "export")
    card = Served((home / "run" / "export" / "README.md").read_text())
    for row in lines(home / "run" / "failures" / "shard_00000.jsonl"):
        tools = ",\n ".join(json.dumps(tool["function"], ensure_ascii=False) for tool in row["problem"]["tools"])
        card.requests.clear()
        card.two_tries(fill(card.shown["TASK"], {"query": row["problem"]["text"], "tools": f"[{tools}]"}), ["", "", ""])
        assert tokenizer.encode(card.prompt(0, tokenizer), add_special_tokens=False) == row["task_ids"]
