"""Our verdicts against those of the leaderboard's own checker, on every gold and every corrupted answer."""

import collections
import json
import sys
import types

import pytest
from corruption import gold_calls, wrong_answers

from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.tasks import bfcl, load

GOLD_THEY_REFUSE = {
    "bfcl-parallel_multiple_12",
    "bfcl-parallel_multiple_26",
    "bfcl-live_simple_106-63-0",
    "bfcl-live_simple_112-68-0",
    "bfcl-live_multiple_507-149-4",
    "bfcl-live_multiple_862-181-3",
    "bfcl-live_multiple_964-207-0",
}
CORRUPTED_THEY_ACCEPT = {
    "signs in numbers, dates, formulas, paths": 506,
    "case in codes": 297,
    "types within objects and lists": 79,
    "an empty list": 5,
    "an empty text": 1,
}
"""Answers by cause; docs/log.md says which and why."""


def cause_of(how: str) -> str:
    if "sign that counts" in how:
        return "signs in numbers, dates, formulas, paths"
    if "case of a code" in how or how == "a call instead of another":
        return "case in codes"
    groups = {"type": "types within objects and lists", "element too few": "an empty list"}
    return groups.get(how.rpartition("'s ")[2], "an empty text" if how == "empty text" else how)


@pytest.fixture
def checker(monkeypatch):
    """The leaderboard's checker; of its table of models, which imports every vendor's client, it needs one entry."""
    models = types.ModuleType("bfcl_eval.constants.model_config")
    models.MODEL_CONFIG_MAPPING = {"any": types.SimpleNamespace(underscore_to_dot=False)}
    monkeypatch.setitem(sys.modules, models.__name__, models)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    questions = {f"bfcl-{row['id']}": row for _, row in bfcl._rows(bfcl.folder_of("bfcl"))}

    def accepts(problem, calls) -> bool:
        row = questions[problem.id]
        category = row["id"].split("-")[0].rpartition("_")[0]
        answer = [{call["name"]: json.loads(json.dumps(call["arguments"]))} for call in calls]
        return ast_checker(row["function"], answer, row["ground_truth"], Language.PYTHON, category, "any")["valid"]

    yield accepts
    for name in [name for name in sys.modules if name.partition(".")[0] == "bfcl_eval"]:
        del sys.modules[name]


@pytest.mark.slow
def test_every_disagreement_with_the_leaderboards_checker_is_known(checker) -> None:
    options = {"source": "bfcl", "test_size": 2351}
    task = load(TaskConfig("function_calling", options), DialogueConfig())
    refused, accepted = set(), collections.defaultdict(list)
    for problem in task.problems("test"):
        gold = gold_calls(problem)
        assert task.verify(problem, json.dumps(gold)), problem.id
        if not checker(problem, gold):
            refused.add(problem.id)
        for how, calls in wrong_answers(problem):
            assert not task.verify(problem, json.dumps(calls)), (problem.id, how, calls)
            if checker(problem, calls):
                accepted[cause_of(how)].append((problem.id, how, calls))
    print(*(one for group in accepted.values() for one in group), sep="\n")
    assert refused == GOLD_THEY_REFUSE
    assert {cause: len(answers) for cause, answers in accepted.items()} == CORRUPTED_THEY_ACCEPT
