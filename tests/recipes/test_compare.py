"""The table of several runs: how they are named, which have a mean, and what is said of one that is not done."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from launch import QUICKSTART
from refusals import refusal

from nemo_r3.config import load, to_yaml
from nemo_r3.evaluate import scores
from nemo_r3.results import rates
from recipes.compare import NOTE, compare

MEASURED = "first_try within_two within_two_resampled retry_success_fixed retry_success_donor retry_success_reread"


def a_run(
    path: Path, *settings: str, logged: int = 4, passed: tuple[int, int] | None = None, failures: int = 20
) -> Path:
    """What four steps leave, and an evaluation with so many of 20 passes before and after; None: there was none.

    Retries are those on the first of so many failures.
    """
    path.mkdir(parents=True)
    config = load([QUICKSTART, f"run.dir={path}", "train.steps=4", *settings])
    (path / "config.yaml").write_text(to_yaml(config))
    (path / "metrics.jsonl").write_text("{}\n" * logged)
    if passed:
        verdicts = [[place < count for place in range(20)] for count in passed]
        before, after = (
            scores({name: {"sampled": each[: failures if "retry" in name else 20]} for name in MEASURED.split()})
            for each in verdicts
        )
        (path / "summary.json").write_text(json.dumps({"before": before, "after": after, "step": 4}))
    return path


SWEEP = """\
                             steps              first try     second try    within two    resampled      gain
─────────────────────────────────────────────────────────────────────────────────────────────────────────────
actor.lr=0.0001, seed=2      4                  0.20 → 0.60   0.20 → 0.60   0.20 → 0.60   0.20 → 0.60   +0.40
actor.lr=0.0001, seed=10     4                  0.10 → 0.70   0.10 → 0.70   0.10 → 0.70   0.10 → 0.70   +0.60
actor.lr=0.0001, mean of 2                      0.15 → 0.65   0.15 → 0.65   0.15 → 0.65   0.15 → 0.65   +0.50
sd                                              0.07 → 0.07   0.07 → 0.07   0.07 → 0.07   0.07 → 0.07    0.14
actor.lr=1e-05, seed=2       3 of 4             - → -         - → -         - → -         - → -             -
actor.lr=1e-05, seed=10      4, not evaluated   - → -         - → -         - → -         - → -             -
"""


def test_a_sweep_has_a_mean_of_its_seeds_at_each_other_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, before = {2: (4, 12), 10: (2, 14)}, {2: 3, 10: 4}
    for seed in (2, 10):
        a_run(tmp_path / f"actor.lr=1e-4,seed={seed}", "actor.lr=1e-4", f"seed={seed}", passed=done[seed])
        a_run(tmp_path / f"actor.lr=1e-5,seed={seed}", "actor.lr=1e-5", f"seed={seed}", logged=before[seed])
    (tmp_path / "chain").mkdir()
    compare([str(tmp_path)])
    assert capsys.readouterr().out == f"{SWEEP}{NOTE}\n", "no mean of what is not evaluated"


def test_a_real_run_has_the_rates_of_its_evaluation(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare([str(trained)])
    name, steps, *found, gain = re.split(" {3,}", capsys.readouterr().out.splitlines()[2])
    table = {name: cells for name, *cells in rates(json.loads((trained / "summary.json").read_text()))}
    assert (name, steps) == ("seed=1", "4")
    rows = ("first try", "second try on a failure", "within two tries", "within two, resampled")
    assert found == [re.sub(r" \[.*?\]", "", table[row][0]) for row in rows]
    assert table["second try on a failure"][1].startswith(f"{gain} ±")


def test_runs_of_the_same_settings_and_seed_are_named_by_their_directories_which_may_hold_a_sweep(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {"a": 1, "b": 1, "a/seed=2": 2, "a/tried_1": 3}  # the last is what the run itself has put aside
    paths = [str(a_run(tmp_path / name, f"seed={seed}", passed=(5, 9))) for name, seed in runs.items()]
    compare(paths[:3])
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:6]]
    assert rows == [*paths[:2], "seed=2", "mean"], "the third is in the first, too"


def test_settings_that_take_too_much_room_in_a_row_are_told_in_full_below_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "Reflect on what went wrong. " * 4
    settings = {"a": ("algo.reward_leaks=false",), "b": ("actor.lr=1e-6", "actor.adam_beta2=0.95", "algo.loss=dapo")}
    for name, end in (("a", "Be short."), ("b", "Do not give the answer.")):
        for seed in (1, 2):
            reflect = f"dialogue.reflect={words}{end}"
            a_run(tmp_path / f"{name}{seed}", reflect, f"seed={seed}", *settings[name], passed=(5, 9))
    compare([str(tmp_path)])
    shown = capsys.readouterr().out.splitlines()
    assert max(map(len, shown)) <= 120
    names = [line.split("  ")[0] for line in shown[2:10]]
    of_each = ("seed=1", "seed=2", "mean of 2")
    assert names == [f"group 1, {it}" for it in of_each] + ["sd"] + [f"group 2, {it}" for it in of_each] + ["sd"]
    first, second = " ".join(map(str.strip, shown[10:-3])).removeprefix("group 1: ").split(" group 2: ")
    assert first == (
        f"dialogue.reflect='{words}Be short.', algo.loss='grpo', algo.reward_leaks=false, actor.lr=5e-05, "
        "actor.adam_beta2=0.999"
    )
    assert second == (
        f"dialogue.reflect='{words}Do not give the answer.', algo.loss='dapo', algo.reward_leaks=true, actor.lr=1e-06, "
        "actor.adam_beta2=0.95"
    )


def test_of_a_tasks_options_only_those_that_differ_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options in (("a", {"numbers": 3, "low": 2}), ("b", {"numbers": 4, "low": 2}), ("c", {"low": 2})):
        a_run(tmp_path / name, f"task.options={options}")
    compare([str(tmp_path)])
    names = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert names == [f"task.options.numbers={count}, seed=1" for count in (3, 4, "default")]


def test_every_row_says_its_group_and_no_path_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = "train.start_from=" + "/scratch/runs-of-the-group/seed-1" * 4
    runs = [a_run(tmp_path / "a", passed=(5, 9)), *(a_run(tmp_path / it, start, passed=(5, 9)) for it in "bc")]
    compare(list(map(str, runs)))
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in shown[2:5]] == ["group 1, seed=1", *(f"group 2, {it}" for it in runs[1:])]
    assert shown[-4].strip() == start.replace("=", "='") + "'"


def test_an_evaluation_of_fewer_steps_than_the_run_now_has_counts_as_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    compare([str(a_run(tmp_path / "run", "train.steps=8", logged=8, passed=(5, 9)))])
    assert re.search(r"seed=1 +8, not evaluated +- → -", capsys.readouterr().out)


def test_a_mean_lacks_what_one_of_its_runs_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, failures in ((1, 20), (2, 0)):
        a_run(tmp_path / f"seed={seed}", f"seed={seed}", passed=(5, 9), failures=failures)
    compare([str(tmp_path)])
    _, _, *rows = capsys.readouterr().out.splitlines()
    cells = [[cell for cell in re.split(" {2,}", row) if cell] for row in rows[1:4]]
    assert cells[0] == ["seed=2", "4", "0.25 → 0.45", "- → -", "0.25 → 0.45", "0.25 → 0.45", "-"]
    assert cells[1] == ["mean of 2", "0.25 → 0.45", "- → -", "0.25 → 0.45", "0.25 → 0.45", "-"]
    assert cells[2] == ["sd", "0.00 → 0.00", "- → -", "0.00 → 0.00", "0.00 → 0.00", "-"]


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    assert "name the directories" in refusal(lambda: compare([]))
    assert refusal(lambda: compare([QUICKSTART])).startswith(f"{QUICKSTART} holds no trained run")
    path = a_run(tmp_path / "run", passed=(5, 9))
    (path / "summary.json").write_text('{"after": {"first_try": {"sampled": {"value": "high"}}}}')
    assert refusal(lambda: compare([str(path)])).startswith(f"{path}: summary.json holds damaged rates")
    (path / "summary.json").write_text("[")
    assert f"{path}/summary.json is not JSON" in refusal(lambda: compare([str(path)]))
