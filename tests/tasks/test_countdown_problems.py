"""Countdown's problems are solvable, unique and split cleanly."""

import json

import pytest

from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.errors import UserError
from nemo_r3.tasks import load
from nemo_r3.tasks.countdown import Deal, problem_of, solutions

SMALL = {"size": 0, "numbers_max": 3, "largest": 9, "operators": "+-*", "target_min": 1, "target_max": 99}


def countdown(**options):
    return load(TaskConfig("countdown", {"size": 300, "test_size": 100, **options}), DialogueConfig())


def every(task):
    return [*task.problems("train"), *task.problems("test")]


def canonical(problem):
    return tuple(sorted(problem.data["numbers"])), problem.data["target"]


TASK = countdown()


@pytest.mark.parametrize("options", [{}, {"seed": 3, "operators": "+*"}, {**SMALL, "test_size": 400}])
def test_generated_problems_are_solvable_unique_and_in_range(options: dict) -> None:
    task = countdown(**options)
    problems = every(task)
    assert (
        len({canonical(problem) for problem in problems}) == len({problem.id for problem in problems}) == len(problems)
    )
    for problem in problems[::7]:
        numbers, target = problem.data["numbers"], problem.data["target"]
        assert task.options.target_min <= target <= task.options.target_max
        assert all(task.options.smallest <= number <= task.options.largest for number in numbers)
        witness = next(text for value, text in solutions(tuple(numbers), task.options.operators) if value == target)
        assert task.verify(problem, witness)


def test_the_same_options_give_the_same_problems() -> None:
    assert every(countdown()) == every(TASK)
    assert every(countdown(seed=1)) != every(TASK)


def test_the_small_space_is_complete() -> None:
    task = countdown(**SMALL, test_size=400)
    assert len(task.problems("test")) == 400
    assert (len(task.problems("train")), len(every(task))) == (1464, 1864)
    assert any(canonical(problem) == ((2, 7, 8), 72) for problem in every(task))


def test_problems_are_a_sequence() -> None:
    problems = TASK.problems("train")
    assert len(problems) == 200
    assert list(problems[3:5]) == [problems[3], problems[4]]
    assert problems[-1] == list(problems)[-1]
    with pytest.raises(IndexError):
        problems[200]
    with pytest.raises(KeyError):
        TASK.problems("validation")


def test_ids_are_canonical_and_text_keeps_the_order() -> None:
    problem = problem_of(Deal((5, 3, 7), 22), "{numbers} -> {target}")
    assert problem.id == "countdown-3-5-7-22"
    assert problem.text == "[5, 3, 7] -> 22"
    assert json.loads(json.dumps(dict(problem.data))) == {"numbers": [5, 3, 7], "target": 22}


def test_a_data_set_on_disk_is_read_and_reordered_repeats_are_dropped(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"target": t, "nums": nums} for t in range(10, 20) for nums in ([t - 1, 1, 2, 2], [2, 1, 2, t - 1])]
    path = tmp_path / "rows.json"
    path.write_text("\n".join(map(json.dumps, rows)))
    task = countdown(source=str(path), test_size=3)
    problems = every(task)
    assert len(problems) == 10 and len({canonical(problem) for problem in problems}) == 10
    assert sorted(problem.data["numbers"][2:] == [2, 2] for problem in problems) == [True] * 10


def test_a_data_set_that_cannot_be_read_says_what_to_do(tmp_path) -> None:
    (tmp_path / "rows.json").write_text('{"other": 1}\n')
    (tmp_path / "null.json").write_text("null\n")
    for source in (tmp_path / "rows.json", tmp_path / "null.json", tmp_path / "nothing"):
        with pytest.raises(UserError, match="task.options.source.*columns target, nums"):
            countdown(source=str(source))


@pytest.mark.parametrize("row", [{"target": 7.5, "nums": [3, 4]}, {"target": 7, "nums": [3.5, 4]}])
def test_a_data_set_whose_numbers_are_no_integers_is_refused_not_rounded(tmp_path, monkeypatch, row) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, [{"target": 7.0, "nums": [3, 4]}, row])))
    with pytest.raises(UserError, match=r"task.options.source: a target or number is \d.5; all must be integers"):
        countdown(source=str(tmp_path / "rows.json"), test_size=1)
