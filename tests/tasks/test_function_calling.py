"""Function calling: xLAM's rows are read and split cleanly; the verifier takes the gold's calls and nothing else."""

import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from refusals import refusal

from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.errors import ConfigError, UserError
from nemo_r3.tasks import load
from nemo_r3.tasks.calls import FORMATS, read_calls
from nemo_r3.tasks.schemas import object_of_python, tool
from nemo_r3.types import Problem

ROWS = Path(__file__).with_name("data") / "xlam.jsonl"
GIVEAWAYS, SORT, INTEGRATE, MERGE, TIME, GIVEAWAYS_AGAIN, TIME_AGAIN = map(json.loads, ROWS.read_text().splitlines())


def xlam(source=ROWS, dialogue=None, **options):
    config = TaskConfig("function_calling", {"source": str(source), "test_size": 1, **options})
    return load(config, dialogue or DialogueConfig())


def every(task):
    return [*task.problems("train"), *task.problems("test")]


def written(path: Path, rows) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


TASK = xlam()


def problem_of(row):
    (problem,) = (problem for problem in every(TASK) if problem.text == row["query"])
    return problem


def answers(row) -> list[dict]:
    return json.loads(row["answers"])


def test_a_row_becomes_a_problem() -> None:
    problem = problem_of(SORT)
    assert problem.id.startswith("xlam-") and len(problem.id) == 21
    calls = [{"name": "sort_numbers", "arguments": {"numbers": [3.0, 1.0, 2.5], "descending": True}}]
    assert json.dumps(problem.data) == json.dumps({"calls": calls})
    assert [one["function"]["name"] for one in problem.tools] == ["sort_numbers", "live_giveaways_by_type"]
    numbers = {"type": "array", "items": {"type": "number"}, "description": "The list of numbers to be sorted."}
    descending = {"type": "boolean", "description": "Whether to sort in descending order.", "default": False}
    properties = {"numbers": numbers, "descending": descending}
    parameters = {"type": "object", "properties": properties, "required": ["numbers"]}
    function = {"name": "sort_numbers", "description": "Sorts a list of numbers.", "parameters": parameters}
    assert problem.tools[0] == {"type": "function", "function": function}


def test_wording_is_the_papers_unless_replaced() -> None:
    assert TASK.wording.reflect.startswith(
        "You tried performing the task, but failed in generating the correct tool call."
    )
    task = xlam(dialogue=DialogueConfig(task="Answer with calls: {query}"))
    assert {problem.text for problem in every(task)} == {f"Answer with calls: {p.text}" for p in every(TASK)}
    with pytest.raises(ConfigError, match=r"dialogue.task.*\{tools\}.*\{query\}"):
        xlam(dialogue=DialogueConfig(task="{tools} {query}"))


def test_repeats_go_before_the_split_and_a_question_stays_in_one_split() -> None:
    assert len(ROWS.read_text().splitlines()) == 7
    repeated = {GIVEAWAYS["query"], GIVEAWAYS_AGAIN["query"]}
    for seed in range(8):
        task = xlam(seed=seed, test_size=2)
        problems = every(task)
        assert len({problem.id for problem in problems}) == len(problems)
        assert sum(problem.text in repeated for problem in problems) == 1
        train, test = ({problem.text for problem in task.problems(split)} for split in ("train", "test"))
        assert len(task.problems("test")) == 2 and not train & test
        assert len(problems) == 6 or TIME["query"] in test


def test_the_same_seed_splits_alike() -> None:
    assert every(xlam()) == every(TASK)
    assert len({tuple(problem.id for problem in xlam(seed=seed).problems("test")) for seed in range(9)}) > 1


def test_all_may_be_held_out_but_not_more() -> None:
    assert len(xlam(test_size=6).problems("train")) == 0
    with pytest.raises(ConfigError, match=r"task.options.test_size: 7 .* 6 problems"):
        xlam(test_size=7)
    with pytest.raises(ConfigError, match=r"task.options.test_size: 12000 .* 6 problems"):
        load(TaskConfig("function_calling", {"source": str(ROWS)}), DialogueConfig())


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_local_files_of_each_kind_are_read(suffix: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()]
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        from datasets import Dataset

        Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(json.dumps(rows) if suffix == ".json" else ROWS.read_text())
    assert every(xlam(path)) == every(TASK)


def test_a_source_that_cannot_be_read_says_what_to_do(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "broken.json").write_text('[{"query": ')
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, found in (("none.jsonl", "query, tools, answers"), ("broken.json", "line 1"), ("empty.jsonl", "no rows")):
        with pytest.raises(UserError, match=rf"task.options.source: '.*{name}'.*{found}"):
            xlam(tmp_path / name)


MALFORMED = [
    ("{", "Expecting"),
    ("[1]", "query is not text"),
    ({**SORT, "query": " "}, "query is not text"),
    ({**SORT, "query": None}, "query is not text"),
    ({**SORT, "query": "Sort \ud83d."}, "a lone surrogate"),
    ({**SORT, "tools": SORT["tools"].replace("Sorts", r"Sorts \ud83d", 1)}, "a lone surrogate"),
    ({"query": "?", "tools": SORT["tools"]}, "answers is not text"),
    ({**SORT, "tools": json.loads(SORT["tools"])}, "tools is not text"),
    ({**SORT, "tools": "{}"}, "tools is not a list"),
    ({**SORT, "tools": "[1]"}, "without a name"),
    ({**SORT, "tools": SORT["tools"][:-1]}, "tools is not JSON"),
    ({**SORT, "tools": '[{"name": "f", "parameters": []}]'}, "'f' has no object"),
    ({**SORT, "tools": '[{"name": "f", "parameters": {"x": {}}}]'}, "'f': parameter 'x' has no type"),
    ({**SORT, "tools": '[{"name": "f", "parameters": {"x": {"type": "List[int"}}}]'}, "'List.int' cannot be read"),
    ({**SORT, "answers": "[]"}, "answers has 0 calls"),
    ({**SORT, "answers": json.dumps(answers(SORT) * 65)}, "answers has 65 calls"),
    ({**SORT, "answers": json.dumps(answers(TIME))}, "'get_time', which tools does not offer"),
    ({**SORT, "answers": '[{"name": "sort_numbers"}]'}, "not a name and an object"),
    ({**SORT, "answers": '[{"name": "sort_numbers", "arguments": "{}"}]'}, "not a name and an object"),
    ({**SORT, "answers": '[{"name": "sort_numbers", "arguments": {"x": NaN}}]'}, "NaN"),
    ({**SORT, "answers": '[{"name": "sort_numbers", "arguments": {"x": 1, "x": 2}}]'}, "twice"),
    ({**SORT, "answers": '[{"name": "sort_numbers", "arguments": {"x": ' + "[" * 900 + "]" * 900 + "}}]"}, "deeply"),
]


@pytest.mark.parametrize(("row", "reason"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_row_is_named_with_its_line(row, reason: str, tmp_path) -> None:
    path = written(tmp_path / "rows.jsonl", [TIME, "", row, MERGE])
    with pytest.raises(
        UserError, match=rf"(?s)task.options.source: 1 of 3 rows .*line 3: .*{reason}.*max_malformed=0.01"
    ):
        xlam(path)
    assert len(every(xlam(path, max_malformed=0.34))) == 2


def test_a_few_malformed_rows_are_left_out_and_said(tmp_path, capsys) -> None:
    good = [{**TIME, "query": f"{TIME['query']} {number}"} for number in range(193)]
    path = written(tmp_path / "rows.jsonl", [*good, *["{"] * 7])
    assert len(every(xlam(path, max_malformed=0.035))) == 193
    said = capsys.readouterr().out
    assert said.startswith("task.options.source: left out: 7 of 200 rows") and said.count("\n") == 1
    assert "line 194: " in said and "line 198: " in said and "line 199: " not in said and "2 more" in said
    with pytest.raises(UserError, match="7 of 200 rows .*2 more"):
        xlam(path, max_malformed=0.034)
    xlam()
    assert not capsys.readouterr().out


def test_malformed_rows_of_a_list_have_numbers_too(tmp_path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([TIME, {"query": "?"}]))
    with pytest.raises(UserError, match="row 2: tools is not text"):
        xlam(path)


def with_arguments(row, **changed) -> str:
    (call,) = answers(row)
    return json.dumps([{**call, "arguments": {**call["arguments"], **changed}}])


def test_numbers_go_by_the_policy_and_by_what_is_declared() -> None:
    problem, equal = problem_of(INTEGRATE), xlam(numbers="equal")
    assert TASK.verify(problem, with_arguments(INTEGRATE, a=0.0, b=4.0))
    assert not TASK.verify(problem, with_arguments(INTEGRATE, n=100.0))
    assert equal.verify(problem, with_arguments(INTEGRATE, n=100.0))
    for wrong in ({"n": "100"}, {"n": 101}, {"n": None}, {"a": False}, {"a": -1}, {"a": "0"}, {"b": [4]}):
        assert not TASK.verify(problem, with_arguments(INTEGRATE, **wrong))
        assert not equal.verify(problem, with_arguments(INTEGRATE, **wrong))


def test_strings_and_structures_are_exact() -> None:
    for func in ("lambda x: x**2 ", "lambda x:x**2", "Lambda x: x**2", "lambda y: y**2", "lambda x: x2", ""):
        assert not TASK.verify(problem_of(INTEGRATE), with_arguments(INTEGRATE, func=func))
    for first in ({"a": [1, 1]}, {"a": [True, True]}, {"a": [1]}, {"a": [1, True], "b": 1}, {"A": [1, True]}, [], None):
        assert not TASK.verify(problem_of(MERGE), with_arguments(MERGE, first=first))
    assert not TASK.verify(problem_of(MERGE), with_arguments(MERGE, first='{"a": [1, true]}'))


def test_calls_are_a_multiset_and_may_be_ordered() -> None:
    problem, calls = problem_of(GIVEAWAYS), answers(GIVEAWAYS)
    assert TASK.verify(problem, json.dumps(calls[::-1]))
    assert not xlam(ordered=True).verify(problem, json.dumps(calls[::-1]))
    assert xlam(ordered=True).verify(problem, json.dumps(calls))
    for wrong in ([], calls[:1], calls[:1] * 2, calls + calls[:1], [*calls, {"name": "get_time", "arguments": {}}]):
        assert not TASK.verify(problem, json.dumps(wrong))


def test_defaults_count_only_when_asked_for() -> None:
    problem, lenient = problem_of(GIVEAWAYS), xlam(accept_defaults=True)
    beta, implied = answers(GIVEAWAYS)[0], {"name": "live_giveaways_by_type", "arguments": {}}
    assert not TASK.verify(problem, json.dumps([beta, implied]))
    assert lenient.verify(problem, json.dumps([beta, implied]))
    assert not lenient.verify(problem, json.dumps([implied, implied]))
    numbers = {"name": "sort_numbers", "arguments": {"numbers": [2, 1], "descending": False}}
    both = json.dumps([{"name": "get_time", "arguments": {}}, numbers])
    assert lenient.verify(problem_of(TIME), both) and not TASK.verify(problem_of(TIME), both)


def test_the_verifiers_version_names_what_bears_on_a_verdict() -> None:
    settings = [{}, {"format": "json"}, {"numbers": "equal"}, {"accept_defaults": True}, {"ordered": True}]
    assert len({xlam(**options).verifier for options in settings}) == len(settings)
    assert xlam(seed=7, test_size=2, max_malformed=0.5).verifier == TASK.verifier


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"format": "xml"}, ["task.options.format", "xml", "hermes"]),
        ({"numbers": "strict"}, ["task.options.numbers", "strict", "widen"]),
        ({"max_malformed": 1.5}, ["task.options.max_malformed", "1.5"]),
        ({"test_size": 0}, ["task.options.test_size", "0"]),
        ({"sorce": "bfcl"}, ["task.options.sorce", "task.options.source"]),
    ],
)
def test_bad_options_are_refused_by_name(options: dict, parts: list[str]) -> None:
    message = refusal(lambda: xlam(**options))
    assert all(part in message for part in parts), message


NAMES = st.text("abcde_.", min_size=1, max_size=6)
SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "1", "true", "a", "A", "a ", "null"])
SCALARS |= st.sampled_from([0.5, 1.5, -2.5, "</tool_call>", "```", ";", '"', "\\", "{", "é", "\u2028", "\ud800"])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3))
CALLS = st.fixed_dictionaries({"name": NAMES, "arguments": st.dictionaries(NAMES, VALUES, max_size=3)})
GOLDS = st.lists(CALLS, min_size=1, max_size=4)
FORMS = ["hermes", "json", *(f"llama {between}" for between in (";", ", ", "\n", ";\n", "list"))]


def canonical(calls) -> list[str]:
    return sorted(json.dumps(call, sort_keys=True) for call in calls)


def gold_problem(calls) -> Problem:
    return Problem("xlam-0", "?", {"calls": calls}, (tool("f", "", object_of_python({})),))


def rendered(calls, form: str, ascii_only: bool) -> str:
    form, _, between = form.partition(" ")
    if form == "hermes":
        return "\n".join(f"<tool_call>{json.dumps(call, ensure_ascii=ascii_only)}</tool_call>" for call in calls)
    if form == "llama":
        named = [{"name": call["name"], "parameters": call["arguments"]} for call in calls]
        listed = [json.dumps(call, ensure_ascii=ascii_only) for call in named]
        return f"[{','.join(listed)}]" if between == "list" else between.join(listed)
    return json.dumps(calls, ensure_ascii=ascii_only)


@pytest.mark.parametrize("form", FORMS)
def test_a_chosen_format_is_the_only_one_that_is_accepted(form: str) -> None:
    for row in (GIVEAWAYS, SORT, INTEGRATE, MERGE, TIME):
        text = rendered(answers(row), form, ascii_only=True)
        accepting = {name for name in FORMATS if xlam(format=name).verify(problem_of(row), text)}
        assert accepting == {"auto", form.partition(" ")[0]}


@settings(max_examples=120)
@given(GOLDS, st.randoms(use_true_random=False), st.sampled_from(FORMS), st.booleans())
def test_any_gold_is_accepted_however_it_is_written(calls, random, form: str, ascii_only: bool) -> None:
    shuffled = random.sample(calls, len(calls))
    assert TASK.verify(gold_problem(calls), rendered(shuffled, form, ascii_only))


@settings(max_examples=150)
@given(GOLDS, st.sampled_from(FORMS), st.data())
def test_no_other_calls_are_accepted(calls, form: str, data) -> None:
    """A changed name, a value however deep, an argument or a call too many or too few."""
    changed = json.loads(json.dumps(calls))
    call = data.draw(st.sampled_from(changed))
    how = data.draw(st.sampled_from(["name", "value", "argument", "dropped", "doubled", "other"]))
    if how == "name":
        call["name"] += data.draw(st.sampled_from(["_", " ", "x"]))
    elif how == "value":
        call["arguments"] = changed_value(call["arguments"], data)
    elif how == "argument":
        call["arguments"][data.draw(NAMES)] = data.draw(VALUES)
    elif how == "other":
        call |= data.draw(CALLS)
    else:
        changed.remove(call) if how == "dropped" else changed.append(call)
    assume(canonical(changed) != canonical(calls))
    assert not TASK.verify(gold_problem(calls), rendered(changed, form, ascii_only=True))


def changed_value(value, data):
    """The same with one part deep within replaced or left out."""
    if not value or not isinstance(value, (list, dict)):
        return data.draw(VALUES)
    key = data.draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    if data.draw(st.booleans()):
        value.pop(key)
    else:
        value[key] = changed_value(value[key], data)
    return value


@settings(max_examples=300)
@given(GOLDS, st.sampled_from(FORMS), st.data())
def test_a_text_that_was_tampered_with_is_accepted_only_if_it_says_the_same(calls, form: str, data) -> None:
    text = rendered(calls, form, True)
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(text)))
        end = data.draw(st.integers(start, min(len(text), start + 3)))
        text = text[:start] + data.draw(st.text('{}[]":;,\\ 01.e-truefalsn<>/', max_size=3)) + text[end:]
    if TASK.verify(gold_problem(calls), text):
        read = [{"name": call.name, "arguments": call.arguments} for call in read_calls(text)]
        assert canonical(read) == canonical(calls)


@settings(max_examples=100)
@given(st.text() | st.text('{}[]":;,\\ 1', max_size=60))
def test_no_text_raises(text: str) -> None:
    problem = problem_of(SORT)
    for answer in (text, f"<tool_call>{text}</tool_call>", f"[{text}]", SORT["answers"].replace("3", text)):
        if TASK.verify(problem, answer):
            assert text.strip() in ("3", "3.0", "3e0")
