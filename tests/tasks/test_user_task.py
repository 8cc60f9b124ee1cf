"""Tasks made of two functions: what they become, and what is refused by name."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.errors import ConfigError, UserError
from nemo_r3.tasks import load, slow_calls, user_task
from nemo_r3.tasks.protocol import Task
from nemo_r3.types import Problem

PROBLEMS = """
from nemo_r3.types import Problem

def problems(split):
    yield Problem(split + "-1", "Say {word} in the " + split + ".", {"word": "one", "more": [1, None, 0.5]})
"""
VERIFY = """
def verify(problem, text):
    return problem.data["word"] in text
"""
OPTIONS = """
from dataclasses import dataclass
from nemo_r3.config.option import option
from nemo_r3.types import Problem

@dataclass
class Options:
    word: str = option("one", help="what to say")

def problems(split, options):
    return [Problem(split, f"Say it in the {split}.", {"word": options.word})]
"""

BUILDS = """
from dataclasses import dataclass
from nemo_r3.tasks.protocol import Wording

PLACEHOLDERS, WORDING = ("problem",), Wording()

@dataclass
class Options:
    pass

def build(options, wording):
    return 1 / 0
"""

Write = Callable[..., Task]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def write(*parts: str, options: dict[str, Any] | None = None, **dialogue: str) -> Task:
        sys.modules.pop("said", None)
        (tmp_path / "said.py").write_text("".join(parts))
        return load(TaskConfig("said", options or {}), DialogueConfig(**dialogue))

    yield write
    sys.modules.pop("said", None)


def test_problems_keep_their_text_or_get_words_around_it(write: Write) -> None:
    task = write(PROBLEMS, VERIFY)
    assert task.problems("train") == (
        Problem("train-1", "Say {word} in the train.", {"word": "one", "more": [1, None, 0.5]}),
    )
    assert task.name == "said" and task.wording.reflect.startswith("You tried solving the problem")
    assert task.verify(task.problems("test")[0], "one!") is True
    assert write(PROBLEMS, VERIFY, task="Now: {problem}").problems("test")[0].text == "Now: Say {word} in the test."
    with pytest.raises(ConfigError, match=r"dialogue\.task: unknown placeholder \{word\}"):
        write(PROBLEMS, VERIFY, task="{word}")
    with pytest.raises(ConfigError, match=r"dialogue\.task: \{problem\} is missing in 'Think first\.'"):
        write(PROBLEMS, VERIFY, task="Think first.")
    own = "from nemo_r3.tasks.protocol import Wording\nWORDING = Wording('Solve: {problems}')"
    with pytest.raises(ConfigError, match=r"task\.name: said\.WORDING: unknown placeholder \{problems\}"):
        write(own, PROBLEMS, VERIFY)
    with pytest.raises(ConfigError, match=r"task\.name: said\.WORDING: \{problem\} is missing in 'Solve: it'"):
        write(own.replace("{problems}", "it"), PROBLEMS, VERIFY)
    with pytest.raises(KeyError):
        task.problems("validation")


def test_options_go_to_problems(write: Write) -> None:
    assert write(OPTIONS, VERIFY, options={"word": "two"}).problems("test")[0].data == {"word": "two"}
    with pytest.raises(ConfigError, match=r"task\.options\.wort.*task\.options\.word"):
        write(OPTIONS, VERIFY, options={"wort": "two"})
    with pytest.raises(ConfigError, match=r"task\.options: said has no options"):
        write(PROBLEMS, VERIFY, options={"word": "two"})


def test_the_verifiers_stamp_follows_the_file_and_its_options(write: Write) -> None:
    stamps = [
        write(OPTIONS, VERIFY).verifier,
        write(OPTIONS, VERIFY, options={"word": "two"}).verifier,
        write(OPTIONS, VERIFY.replace(" in ", " not in ")).verifier,
    ]
    assert len(set(stamps)) == 3 and write(OPTIONS, VERIFY).verifier == stamps[0]
    assert write(OPTIONS, "\n# a comment\n\n", VERIFY.replace(" in ", "  in  ")).verifier == stamps[0]
    name, file, options, _ = stamps[0].split(" ")
    assert name == "said" and stamps[1].split(" ")[1] == file and stamps[2].split(" ")[2] == options


def test_the_verifiers_stamp_follows_the_files_beside_it_that_it_imports(write: Write, tmp_path: Path) -> None:
    beside, further, other = (tmp_path / f"{name}.py" for name in ("beside", "further", "other"))
    beside.write_text("import further")
    further.write_text("RIGHT = 1")
    other.write_text("RIGHT = 1")
    parts = PROBLEMS, "\ndef verify(problem, text):\n    from beside import further\n    return False\n"
    stamp = write(*parts).verifier
    other.write_text("RIGHT = 2")
    further.write_text("RIGHT = 1  # a comment")
    assert write(*parts).verifier == stamp
    further.write_text("RIGHT = 2")
    assert write(*parts).verifier != stamp


def test_the_verifiers_stamp_follows_what_verifiers_are_made_of(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    stamp = write(PROBLEMS, VERIFY).verifier
    monkeypatch.setattr(user_task, "HELPERS_VERSION", user_task.HELPERS_VERSION + 1)
    assert write(PROBLEMS, VERIFY).verifier != stamp


GIVES = "from nemo_r3.types import Problem\ndef problems(split):\n    "


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ("[]", r"problems\('train'\) gives no problems"),
        ("[Problem('a', 't', {'word': 'x'})] * 2", "gives the id 'a' twice"),
        ("[Problem('a', 't', {'word': 'x'})]", "problem 'a' is in train and in test"),
        ("[('a', 't')]", r"gives \('a', 't'\); it must give nemo_r3.types.Problem"),
        ("[Problem(1, 't', {})]", "gives the id 1 and the text 't'"),
        ("[Problem('a', '', {})]", "gives the id 'a' and the text ''; both must be text, and not empty"),
        (r"[Problem('a', '\ud800', {})]", "problem 'a' holds half a character"),
        ("[Problem('a', 't', {'word': (1, 2)})]", "data of problem 'a' is not what JSON would"),
        ("[Problem('a', 't', {'word': {1}})]", "data of problem 'a' is not what JSON would"),
        ("[Problem('a', 't', {'word': float('nan')})]", "data of problem 'a' is not"),
        (r"[Problem('a', 't', {'word': '\ud800'})]", "data of problem 'a' is not what JSON"),
        ("[Problem('a', 't', {}, ({'type': print},))]", "tools of problem 'a' must be"),
        ("[Problem('a', 't', {}, ({'function': print},))]", "tools of problem 'a' is not"),
        ("[Problem('a', 't', {}, None)]", "tools of problem 'a' must be a list of .* got None"),
    ],
)
def test_problems_that_cannot_be_used_are_refused(write: Write, problems: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"task\.name: .*{message}"):
        write(GIVES, "return ", problems, VERIFY)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PROBLEMS, "'said' is not a task: said lacks verify"),
        (VERIFY, "'said' is not a task: said lacks problems"),
        ("WORDING = 'hello'" + PROBLEMS + VERIFY, r"said\.WORDING must be a .*Wording of texts, got 'hello'"),
    ],
)
def test_a_module_that_is_no_task_is_refused(write: Write, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"task\.name: .*{message}"):
        write(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import sys; sys.exit('bye')", r"importing said raised SystemExit \(bye\) in .*said\.py:1;"),
        ("def problems(:", r"importing said raised SyntaxError \(.*\) in .*said\.py:1;"),
        ("class Options: pass" + PROBLEMS + VERIFY, r"said\.Options is no dataclass: write @dataclass above it"),
        ("Options = 3" + PROBLEMS + VERIFY, r"said\.Options raised TypeError"),
        ("def problems(): pass" + VERIFY, r"said\.problems\('train'\) raised TypeError .*; problems\(split\) must"),
        (OPTIONS.replace("(split, options)", "(split)") + VERIFY, r"TypeError .*; problems\(split, options\) must"),
        (PROBLEMS + "def verify(text): pass", r"said\.verify raised TypeError .*; verify\(problem, text\) must give"),
        (GIVES + "return None" + VERIFY, r"said\.problems\('train'\) raised TypeError \('NoneType' object is not iter"),
        (
            GIVES + "import json; json.loads('{')" + VERIFY,
            r"raised JSONDecodeError \(.*\) in .*said\.py:3 \(at .*json/decoder\.py:\d+\);",
        ),
        (GIVES + "raise ValueError('a\\nb' * 999)" + VERIFY, r"ValueError \(a ba .{280,296}\.\.\.\) in .*said\.py:3;"),
        (BUILDS, r"said\.build raised ZeroDivisionError \(.*\) in .*said\.py:12;"),
    ],
)
def test_whatever_a_users_module_raises_is_one_line_with_its_place(write: Write, text: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"task\.name: .*{message}") as caught:
        write(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bytes", "tuple", "list[bytes]", "bytes | None"])
def test_an_option_that_no_setting_can_give_is_refused(write: Write, kind: str) -> None:
    text = OPTIONS.replace('word: str = option("one"', f"word: {kind} = option(factory=lambda: None")
    with pytest.raises(ConfigError, match=r"task\.name: said\.Options\.word is of type .*, of which YAML has no"):
        write(text, VERIFY)


def test_an_option_without_a_default_must_be_set(write: Write) -> None:
    text = OPTIONS.replace('option("one", help="what to say")', 'option(help="what to say")')
    assert write(text, VERIFY, options={"word": "two"}).problems("test")[0].data == {"word": "two"}
    with pytest.raises(ConfigError, match=r"task\.options\.word: has no default and must be set"):
        write(text, VERIFY)


def test_a_users_module_leaves_the_working_directory_where_it_was(write: Write) -> None:
    here = Path.cwd()
    leaves = "\nimport os\nos.chdir('/')\ndef verify(problem, text):\n    os.chdir('/')\n    return True\n"
    task = write(PROBLEMS, leaves)
    assert task.verify(task.problems("test")[0], "") and Path.cwd() == here


def test_a_users_time_limit_leaves_our_signals_as_they_were(write: Write) -> None:
    """`signal.alarm` is one timer for all: without this a hang of the run would not end it, or Ctrl-C not stop it."""
    limits = """
import signal

def verify(problem, text):
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGVTALRM):
        signal.signal(number, lambda *_: 1 / 0)
    signal.alarm(1)
    signal.alarm(0)
    return text == "yes"
"""
    ours = [signal.SIGALRM, signal.SIGTERM, signal.SIGINT, signal.SIGVTALRM]
    task = write(PROBLEMS, limits)
    before = [signal.getsignal(number) for number in ours]
    signal.setitimer(signal.ITIMER_REAL, 50)
    try:
        assert task.verify(task.problems("test")[0], "yes")
        assert 40 < signal.getitimer(signal.ITIMER_REAL)[0] <= 50
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert [signal.getsignal(number) for number in ours] == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise SystemExit(3)", r"said\.verify raised SystemExit \(3\) in .*said\.py:8 on .* problem 'train-1'"),
        ("import asyncio; raise asyncio.CancelledError", r"said\.verify raised CancelledError in .*said\.py:8 on "),
        ("return None", r"returned None of type NoneType .* True or False on every path"),
        ("import numpy; return numpy.True_", r"returned np\.True_ of type numpy\.bool .*, such as bool\(match\)"),
        ("import re; return re.match('', text)", r"of type re\.Match .*, such as bool\(match\)"),
    ],
)
def test_a_verifier_that_gives_no_verdict_is_refused_at_load(write: Write, body: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"task\.name: .*{message}"):
        write(PROBLEMS, f"\ndef verify(problem, text):\n    {body}\n")


def test_a_verifier_is_tried_on_every_problem_at_load(write: Write) -> None:
    with pytest.raises(UserError, match=r"said\.verify raised KeyError .* in .*said\.py:8 on .* problem 'test-1'"):
        write(PROBLEMS, "\ndef verify(problem, text):\n    return bool({'train-1': text}[problem.id])\n")


def test_a_slow_verifier_is_tried_on_empty_answers_while_time_lasts(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_task, "TRIED_SECONDS", 0.55)
    write(
        SAME.format(tests=2, tools=TOOLS),
        "\ndef verify(problem, text):\n    import time; time.sleep(0.3)\n    return True",
    )
    slow = r"warning: said\.verify took 0\.\d+ s for an empty answer, and was tried on 2 of 10 problems; "
    accepts, took = capsys.readouterr().err.splitlines()
    assert "accepts an empty answer to 2 of 2 problems" in accepts and re.match(slow, took)


@pytest.mark.parametrize("change", ["problem.data.setdefault('seen', {text})", "problem.data['more'].pop()"])
def test_a_verifier_that_changes_a_problems_data_is_refused(change: str, write: Write) -> None:
    """A bank would keep what it became, or could not: what a verifier keeps for the next call, or ticks off a list."""
    task = write(PROBLEMS, f"\ndef verify(problem, text):\n    return bool(text and {change})\n")
    with pytest.raises(UserError, match=r"said\.verify changed the data on an answer to problem 'test-1'"):
        task.verify(task.problems("test")[0], "x")


def test_a_verifier_that_fails_later_stops_with_its_problem(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    task = write(PROBLEMS, "\ndef verify(problem, text):\n    return text == '' or int(text) == 1\n")
    assert task.verify(task.problems("test")[0], "1")
    with pytest.raises(UserError, match=r"said\.verify raised ValueError .*on an answer to problem 'test-1'"):
        task.verify(task.problems("test")[0], "one" * 200)
    *_, said = capsys.readouterr().err.splitlines()
    assert said == f"the answer to problem 'test-1' was {'one' * 200!r}", "all of it, to call verify by hand"


SAME = """
from nemo_r3.types import Problem

def problems(split):
    for number in range(8 if split == "train" else {tests}):
        yield Problem(f"{{split}}-{{number}}", f"Sort {{number}}.", {{"word": "x"}}, {tools})
"""
TOOLS = "({'type': 'function', 'function': {'name': split}},)"


def test_held_out_problems_that_are_all_training_problems_are_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="8 of 8 test problems have the text of a training problem"):
        write(SAME.format(tests=8, tools="()"), VERIFY)


def test_some_held_out_problems_that_are_training_problems_are_warned_of(
    write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(SAME.format(tests=10, tools="()"), VERIFY)
    said = "warning: said: 8 of 10 test problems have the text of a training problem, such as 'test-0': "
    assert capsys.readouterr().err.startswith(said)
    write(SAME.format(tests=8, tools=TOOLS), VERIFY)  # other tools make it another problem
    monkeypatch.setenv("RANK", "1")
    write(SAME.format(tests=10, tools="()"), VERIFY)
    assert capsys.readouterr().err == ""


def test_a_verifier_that_accepts_an_empty_answer_is_warned_of(write: Write, capsys: pytest.CaptureFixture[str]) -> None:
    write(PROBLEMS, VERIFY)
    assert capsys.readouterr().err == ""
    write(PROBLEMS, "\ndef verify(problem, text):\n    return True\n")
    said = "warning: said.verify accepts an empty answer to 2 of 2 problems, such as 'train-1': "
    assert capsys.readouterr().err.startswith(said)


HANGS = """
def verify(problem, text):
    import re, time
    end = time.monotonic() + 1.5
    while text == "waits" and time.monotonic() < end:
        time.sleep(0.01)
    return bool(text == "backtracks" and re.match(r"(a+)+$", "a" * 25 + "b"))
"""


@pytest.mark.parametrize("text", ["waits", "backtracks"])
def test_a_verifier_that_takes_long_is_named_while_it_works(
    write: Write, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The one lets go of Python's lock, the other keeps it."""
    monkeypatch.setattr(slow_calls, "LOOK", 0.1)
    task = write(PROBLEMS, HANGS)
    assert not task.verify(task.problems("test")[0], "")
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(slow_calls, "_seconds", 0.2)
    assert not task.verify(task.problems("test")[0], text)
    line = "warning: said.verify has been working for 0 s on an answer to problem 'test-1'; the run waits for it\n"
    assert capfd.readouterr().err == line
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
