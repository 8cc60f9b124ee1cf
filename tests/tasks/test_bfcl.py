"""The Berkeley leaderboard: its files are read, all 2,351 golds are accepted and no corrupted call is."""

import importlib.util
import json
import sys
from collections import Counter

import pytest
from corruption import gold_calls, plain, wrong_answers
from jsonschema import Draft202012Validator

from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.errors import UserError
from nemo_r3.tasks import bfcl, load
from nemo_r3.tasks.bfcl import CATEGORIES, Listed, spelling
from nemo_r3.tasks.matching import Equality

SIZES = (400, 200, 200, 200, 258, 1053, 16, 24)


def leaderboard(**options):
    return load(TaskConfig("function_calling", {"source": "bfcl", "test_size": 2351, **options}), DialogueConfig())


@pytest.fixture(scope="module")
def task():
    return leaderboard()


@pytest.fixture(scope="module")
def problems(task):
    return list(task.problems("test"))


def category_of(problem) -> str:
    return problem.id.removeprefix("bfcl-").split("-")[0].rpartition("_")[0]


def test_every_problem_is_there_once(task, problems) -> None:
    assert Counter(map(category_of, problems)) == dict(zip(CATEGORIES, SIZES, strict=True))
    assert len({problem.id for problem in problems}) == len(problems) == 2351
    assert not len(task.problems("train"))


def test_a_problem_has_text_gold_and_tools_in_json_schema(problems) -> None:
    by_id = {problem.id: problem for problem in problems}
    triangle = by_id["bfcl-simple_python_0"]
    assert triangle.text == "Find the area of a triangle with a base of 10 units and height of 5 units."
    arguments = {"base": [10], "height": [5], "unit": ["units", ""]}
    assert triangle.data == {"calls": [{"name": "calculate_triangle_area", "arguments": arguments}]}
    (tool,) = triangle.tools
    assert tool["function"]["parameters"]["type"] == "object"
    assert tool["function"]["parameters"]["required"] == ["base", "height"]
    assert all(problem.text.strip() for problem in problems)
    for function in (tool["function"] for problem in problems for tool in problem.tools):
        Draft202012Validator.check_schema(function["parameters"])


def test_a_system_message_comes_before_the_question(problems) -> None:
    (problem,) = (problem for problem in problems if problem.id == "bfcl-live_simple_58-27-0")
    assert problem.text.startswith("You are an AI chatbot") and problem.text.endswith("\n\nlist movies in Mumbai?")


def test_gold_is_accepted_in_every_format_and_order(task, problems) -> None:
    for problem in problems:
        calls = gold_calls(problem)
        assert task.verify(problem, json.dumps(calls)), problem.id
        blocks = [f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in reversed(calls)]
        assert task.verify(problem, "\n".join(blocks)), problem.id
        llama = [json.dumps({"name": call["name"], "parameters": call["arguments"]}) for call in calls]
        for text in ("; ".join(llama), ", ".join(llama), "\n".join(llama), f"[{', '.join(llama)}]"):
            assert task.verify(problem, text), problem.id


def test_every_allowed_value_is_accepted(task, problems) -> None:
    for problem in problems:
        calls = gold_calls(problem)
        for call, gold in zip(calls, problem.data["calls"], strict=True):
            kept = call["arguments"]
            for name, listed in gold["arguments"].items():
                for one in listed:
                    call["arguments"] = {**kept, name: plain(one)} if one != "" else without(kept, name)
                    assert task.verify(problem, json.dumps(calls)), (problem.id, name, one)
            call["arguments"] = kept


def without(mapping, name):
    return {key: one for key, one in mapping.items() if key != name}


def test_no_corrupted_answer_is_accepted(task, problems) -> None:
    count = Counter()
    for problem in problems:
        for how, calls in wrong_answers(problem):
            count[how] += 1
            assert not task.verify(problem, json.dumps(calls)), (problem.id, how, calls)
    assert sum(count.values()) > 40_000 and min(count.values()) > 0


@pytest.mark.parametrize(
    "same", ["texas hold'em st. helena,CA", "Texas Hold'em, St. Helena CA", "TEXAS HOLD'EM ST. HELENA CA"]
)
def test_words_may_be_spelt_otherwise(same: str) -> None:
    assert spelling(same) == spelling("Texas Hold'em, St. Helena, CA")


@pytest.mark.parametrize(
    ("text", "other"),
    [
        *(
            ("1.5", "15"),
            ("1,5", "15"),
            ("x^2", "x2"),
            ("2024-01-02", "2024/01/02"),
            ("-5", "5"),
            ("a_b", "a b"),
            ("a-b", "ab"),
        ),
        *(("well known", "wellknown"), ("Room B2", "room b2"), ("O'Hara", 'O"Hara'), ("/Users/Me", "/users/me")),
        *(("cat", "cats"), ("AA", "aa"), ("kg", "Kg")),
    ],
)
def test_another_text_is_another(text: str, other: str) -> None:
    assert spelling(text) != spelling(other)


def test_an_empty_text_is_a_value_only_where_no_other_is_listed() -> None:
    listed = Listed(Equality("widen"))
    assert listed.allows("", [""]) and not listed.allows("", ["m", ""]) and listed.optional(["m", ""])
    assert not listed.allows("m", [""]) and not listed.optional(["m"])
    assert listed.allows([{"a": 1}], [[{"a": [1, 2], "b": ["x", ""]}]])
    assert not listed.allows([{"b": "x"}], [[{"a": [1, 2], "b": ["x", ""]}]])


def test_files_in_a_directory_are_read(tmp_path) -> None:
    folder = bfcl.folder_of("bfcl")
    copied = tmp_path / "data"
    (copied / "possible_answer").mkdir(parents=True)
    for category in CATEGORIES:
        for name in (f"BFCL_v4_{category}.json", f"possible_answer/BFCL_v4_{category}.json"):
            lines = (folder / name).read_text().splitlines()[:9]
            (copied / name).write_text("\n".join(lines))
    assert len(leaderboard(source=str(copied), test_size=72).problems("test")) == 72
    (copied / "possible_answer" / "BFCL_v4_live_parallel.json").unlink()
    with pytest.raises(UserError, match=r"BFCL_v4_live_parallel.json.*--no-deps.*bfcl-eval==2026.3.23"):
        leaderboard(source=str(copied))


def test_without_the_wheel_it_says_what_to_do(monkeypatch) -> None:
    def absent(name: str):
        raise bfcl.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(bfcl.importlib.metadata, "distribution", absent)
    with pytest.raises(UserError, match=r"task.options.source.*pip install --no-deps bfcl-eval==2026.3.23"):
        leaderboard()


def test_the_wheels_python_stays_out(task) -> None:
    assert importlib.util.find_spec("bfcl_eval") is not None and "bfcl_eval" not in sys.modules
