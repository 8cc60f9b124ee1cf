"""The tasks of docs/add-a-task.md, from the files that it shows."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch import ROOT, run

from nemo_r3.config import load
from nemo_r3.errors import UserError
from nemo_r3.tasks import load as load_task
from nemo_r3.tasks.protocol import Task

SHOWN = (ROOT / "docs" / "add-a-task.md").read_text(encoding="utf-8")
FILES = {name: text for text, name in re.findall(r"```\w+\n(# (\S+\.(?:py|yaml))\n.*?)```", SHOWN, flags=re.DOTALL)}
QUESTIONS = [{"question": f"What is {n} / 4?", "answer": rf"\frac{{{n}}}{{4}}"} for n in range(20)]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the files of the document, as `python -m` would have it."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name.removesuffix(".py"), None)


def task_of(config: str) -> Task:
    loaded = load([config])
    return load_task(loaded.task, loaded.dialogue)


def test_the_document_shows_four_tasks() -> None:
    shown = [name for name in FILES if name.endswith(".py")]
    assert shown == ["doubles.py", "final_answers.py", "gym_task.py", "code_tests.py"]


def test_two_functions_are_a_task(home: Path) -> None:
    task = task_of("doubles.yaml")
    problem = task.problems("test")[21]
    assert len(task.problems("train")) == 900 and problem.text == "What is 21 + 21?"
    assert task.verify(problem, "That is 42") and not task.verify(problem, "41")


def test_final_answers_are_compared_as_mathematics(home: Path) -> None:
    task = task_of("final_answers.yaml")
    half = next(problem for problem in task.problems("train") if problem.data["answer"] == r"\frac{2}{4}")
    assert half.text.endswith("Put your final answer within \\boxed{}.")
    assert [len(task.problems(split)) for split in ("train", "test")] == [18, 2]
    assert all(task.verify(half, rf"So \boxed{{{answer}}}.") for answer in ("0.5", r"\frac12", "1/2", r"\sqrt{0.25}"))
    assert not any(task.verify(half, answer) for answer in (r"\boxed{2}", "", "half", r"\boxed{__import__('os')}"))


@pytest.mark.parametrize("answer", ["", " $$ ", r"\frac{1}{2", "1" * 1_001, 7])
def test_a_final_answer_that_none_could_match_is_refused_with_its_problem(home: Path, answer: str | int) -> None:
    with (home / "questions.jsonl").open("a") as file:
        file.write(json.dumps({"question": "What?", "answer": answer}))
    with pytest.raises(UserError, match=r"final_answers\.verify raised .* on an answer to problem 'question-20'"):
        task_of("final_answers.yaml")


def test_a_generator_of_reasoning_gym_is_a_task(home: Path) -> None:
    task = task_of("gym_task.yaml")
    train, test = task.problems("train"), task.problems("test")
    assert len(test) == 50 and 300 < len(train) <= 450
    assert not {problem.text for problem in train} & {problem.text for problem in test}
    assert train[0].text.endswith("End with the answer on a line of its own.")
    assert task.verify(train[0], f"I add.\n{train[0].data['answer']}")
    assert not task.verify(train[0], f"I add.\n__import__('os').getpid()*0 + {train[0].data['answer']}")


@pytest.mark.parametrize(
    ("code", "right"),
    [
        ("def times(x):\n    return 21 * x", True),
        ("print('x' * 2**10)\nprint(input.__name__)\ndef times(x):\n    return 21 * x", True),
        ("def times(x):\n    return 20 * x", False),
        ("def times(x):", False),
        ("import os\nos._exit(0)", False),
        ("raise SystemExit(0)", False),
        ("while True: pass", False),
        ("x = 'x' * 2**31\ndef times(x):\n    return 21 * x", False),
        ("while True: print('x' * 2**16)", False),
    ],
)
def test_answers_that_are_code_run_within_limits(home: Path, code: str, right: bool) -> None:
    loaded = load(["doubles.yaml", "task.name=code_tests"])
    task = load_task(loaded.task, loaded.dialogue)
    problem = next(problem for problem in task.problems("train") if problem.id == "times-21")
    assert task.verify(problem, f"Here it is:\n```python\n{code}\n```") is right
    assert not task.verify(problem, code), "without a block"


def test_a_verb_finds_a_task_in_the_working_directory(home: Path) -> None:
    done = run("train", "doubles.yaml", "model.path=/nowhere", succeed=False, path=home)
    assert "error: model.path: /nowhere" in done.stderr  # the task comes before the model


def test_problems_that_differ_between_ranks_are_refused(home: Path) -> None:
    """Each would have a share of other problems than rank 0 thinks."""
    with (home / "doubles.py").open("a") as file:
        file.write("\n\nproblems_in_order = problems\n\n\ndef problems(split):\n")
        file.write(
            "    by_id = {it.id: it for it in problems_in_order(split)}\n    return map(by_id.get, set(by_id))\n"
        )
    done = run("mine", "doubles_laptop.yaml", ranks=2, succeed=False, path=home)
    assert "error: task.name: doubles: problems() differ between ranks" in done.stderr
    assert not (home / "runs").exists()


def test_the_laptops_config_shows_dialogues(home: Path) -> None:
    """On the embedded model, which solves none of these problems."""
    shown = run("preview", "doubles_laptop.yaml", "2", "seed=2", path=home).stdout
    parts = ["task", "attempt", "verdict: failed", "request", "reflection", "request", "retry", "verdict: failed"]
    assert re.findall(r"^--- (?!cut at)([a-z]+(?:: [a-z]+)?)", shown, flags=re.MULTILINE) == 2 * parts
    assert "=== problem double-100 {'sum': 200}\n--- task\n<|user|>What is 100 + 100?<|end|><|assistant|>\n" in shown
    doubt = "every answer failed: are they too hard, or does verify reject right answers?"
    assert shown.endswith(f"0 of 16 problems solved at first try\n{doubt}\n")
    assert not list(home.glob("runs/*"))
