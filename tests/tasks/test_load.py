"""`nemo_r3.tasks.load`: tasks by name, options and wording checked, nothing heavy imported."""

import subprocess
import sys

import pytest
from refusals import refusal

from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.errors import UserError
from nemo_r3.tasks import load

SMALL = {"size": 200, "test_size": 50}

USER_TASK = """
from dataclasses import dataclass
from nemo_r3.config.option import option
from nemo_r3.tasks.protocol import Wording

PLACEHOLDERS = ("word",)
WORDING = Wording("Say {word}.", "Why not?", "Again.")

@dataclass
class Options:
    loud: bool = option(False, help="shout")

def build(options, wording):
    return options, wording
"""


def refused(name: str = "countdown", options: dict | None = None, **dialogue: str) -> str:
    return refusal(lambda: load(TaskConfig(name, options or SMALL), DialogueConfig(**dialogue)))


def test_none_means_the_tasks_own_wording() -> None:
    task = load(TaskConfig("countdown", SMALL), DialogueConfig(retry="Again!"))
    assert task.wording.retry == "Again!"
    assert task.wording.reflect.startswith("You tried solving the problem")
    assert "{numbers}" in task.wording.task


def test_dialogue_task_words_the_problems_and_leaves_other_braces() -> None:
    wording = r"Make {target} of {numbers} and put it in \boxed{}."
    problem = load(TaskConfig("countdown", SMALL), DialogueConfig(task=wording)).problems("test")[0]
    numbers = ", ".join(map(str, problem.data["numbers"]))
    assert problem.text == rf"Make {problem.data['target']} of [{numbers}] and put it in \boxed{{}}."


@pytest.mark.parametrize("turn", ["reflect", "retry"])
def test_a_later_turn_may_repeat_the_task_and_nothing_else(turn: str) -> None:
    wording = r"Again: {task} Put it in \boxed{}."
    assert getattr(load(TaskConfig("countdown", SMALL), DialogueConfig(**{turn: wording})).wording, turn) == wording
    message = refused(**{turn: "Of {numbers}?"})
    assert message == f"dialogue.{turn}: unknown placeholder {{numbers}} in 'Of {{numbers}}?'; known: {{task}}"


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"siz": 5}, ["task.options.siz", "task.options.size"]),
        ({"size": "many"}, ["task.options.size", "many", "integer"]),
        ({"test_size": 0}, ["task.options.test_size", "0", "at least 1"]),
        ({"allow_fractions": "maybe"}, ["task.options.allow_fractions", "maybe", "true or false"]),
        ({"operators": "+^"}, ["task.options.operators", "+^", "+ - * /"]),
        ({"smallest": 9, "largest": 3}, ["task.options.smallest", "9", "task.options.largest", "3"]),
        ({"size": 50, "test_size": 50}, ["task.options.test_size", "50"]),
        ({"size": 0}, ["task.options.size", "4,416,225"]),
        ({"size": 999, "numbers_max": 3, "largest": 3, "test_size": 1}, ["task.options.size", "999"]),
    ],
)
def test_bad_options_are_refused_by_name(options: dict, parts: list[str]) -> None:
    message = refused(options=options)
    assert all(part in message for part in parts), message


def test_unknown_tasks_are_refused_with_the_known_ones() -> None:
    for name in ("nope", "protocol", "no.such.module", "json", "nope.py", "./nope", ".nope", ""):
        message = refused(name)
        assert "task.name" in message and name in message and "countdown" in message


def test_a_task_that_lies_near_is_suggested(tmp_path, monkeypatch) -> None:
    (tmp_path / "sorting.py").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "parrot.py").touch()
    monkeypatch.chdir(tmp_path)
    near = {"sortign": "sorting", "./sorting.py": "sorting", "mine.parot": "mine.parrot", "countdwn": "countdown"}
    for name, meant in {**near, "mine/parrot.py": "mine.parrot"}.items():
        assert f"no task is called {name!r}; did you mean {meant}? known: " in refused(name)


def test_unknown_placeholders_are_refused() -> None:
    message = refused(task="Make {goal} of {numbers}")
    assert "dialogue.task" in message and "{goal}" in message and "{target}" in message
    message = refused(tools_text="{tools} {question}")
    assert "dialogue.tools_text" in message and "{question}" in message and "{task}" in message
    assert "dialogue.tools_text: {tools} is missing" in refused(tools_text="{task}")


def test_a_users_module_is_a_task(tmp_path, monkeypatch) -> None:
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "parrot.py").write_text(USER_TASK)
    (tmp_path / "my_tasks" / "broken.py").write_text("import a_module_that_is_missing\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    options, wording = load(TaskConfig("my_tasks.parrot", {"loud": True}), DialogueConfig())
    assert options.loud and wording.reflect == "Why not?"
    with pytest.raises(UserError, match=r"my_tasks\.broken raised ModuleNotFoundError \(.*a_module_that_is_missing"):
        load(TaskConfig("my_tasks.broken"), DialogueConfig())


def test_a_users_module_may_be_called_as_a_part_of_ours(tmp_path, monkeypatch) -> None:
    (tmp_path / "records.py").write_text(USER_TASK)
    monkeypatch.syspath_prepend(str(tmp_path))
    options, _ = load(TaskConfig("records", {"loud": True}), DialogueConfig())
    assert options.loud


def test_loading_a_task_imports_nothing_heavy() -> None:
    code = (
        "import sys; from nemo_r3.tasks import load; from nemo_r3.config.task import DialogueConfig, TaskConfig;"
        f"load(TaskConfig('countdown', {SMALL}), DialogueConfig());"
        "heavy = {'torch', 'transformers', 'datasets', 'vllm', 'megatron', 'sympy'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
