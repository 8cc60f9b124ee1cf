"""The example of docs/change-the-method.md, applied to a copy of the code and run there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

from nemo_r3.algo.losses import loss_named

ROOT = Path(__file__).parents[1]
SHOWN = (ROOT / "docs" / "change-the-method.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", SHOWN, flags=re.DOTALL)


def changed(text: str, lines: list[str]) -> str:
    """The text of a file after the lines of a diff, which stand in exactly one place of it."""
    before, after = ("".join(line[1:] + "\n" for line in lines if line[0] in signs) for signs in (" -", " +"))
    assert text.count(before) == 1, f"the code is another one now:\n{before}"
    return text.replace(before, after)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code with the document's changes."""
    for folder in ("nemo_r3", "recipes", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    for block in blocks("python"):
        (tmp_path / block.split("\n", 1)[0].removeprefix("# new: ")).write_text(block, encoding="utf-8")
    for block in blocks("diff"):
        name, *lines = block.splitlines()
        file = tmp_path / name.removeprefix("# ")
        file.write_text(changed(file.read_text(encoding="utf-8"), lines), encoding="utf-8")
    return tmp_path


def test_no_block_is_of_a_kind_that_is_not_tested() -> None:
    assert [
        re.findall(r"^```(\w+)", SHOWN, flags=re.MULTILINE).count(kind) for kind in ("python", "diff", "shell")
    ] == [*(1, 3, 1)]
    assert len(re.findall(r"^```\w", SHOWN, flags=re.MULTILINE)) == 5


def test_the_example_runs_and_its_reward_charges_for_length(tree: Path) -> None:
    (commands,) = blocks("shell")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-ec", commands], cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [json.loads(line) for line in (tree / "runs/tried/metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 3
    for step in steps:
        charged = step["retry_success"] - 0.01 * step["reflection_tokens"]
        assert step["reward"] == pytest.approx(charged) != step["retry_success"]
    page = (tree / "docs/config.md").read_text()
    assert "| `algo.length_penalty` |" in page and "dual_clip" in page


def test_the_examples_loss_is_dapos_until_ratios_are_large(tree: Path) -> None:
    spec = spec_from_file_location("dual_clip", tree / "nemo_r3/algo/losses/dual_clip.py")
    assert spec is not None and spec.loader is not None
    spec.loader.exec_module(loss := module_from_spec(spec))
    dapo = loss_named("dapo")
    assert (loss.CLIP, loss.AGGREGATION, loss.ADVANTAGE) == (dapo.CLIP, dapo.AGGREGATION, dapo.ADVANTAGE)
    advantages = torch.tensor([1.5, -2.0, -2.0, 1.5])
    new = torch.tensor([0.0, 0.0, 2.0, 2.0], requires_grad=True)
    ours, theirs = (it.policy_loss(new, torch.zeros(4), advantages, torch.arange(4), it.CLIP) for it in (loss, dapo))
    assert ours[[0, 1, 3]].tolist() == theirs[[0, 1, 3]].tolist()
    assert ours[2].item() == 6.0 < theirs[2].item()
    ours.sum().backward()
    assert new.grad is not None and new.grad.tolist() == [-1.5, 2.0, 0.0, 0.0]
