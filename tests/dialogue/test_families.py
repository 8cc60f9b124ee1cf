"""The three turns of every family, as golden files that a person can read: golden/FAMILY.txt.

    --- reflection (sampled, loss)      a segment: its phase, and what happens to its tokens
    I misread the city.⏎                its text, special tokens and all; ⏎ is a newline of the text itself

`REWRITE_GOLDEN=1 pytest tests/dialogue/test_families.py` rewrites them; read the difference before you commit it.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from chat_families import FAMILIES, Family
from served import Served

from nemo_r3.algo.batch import build_update
from nemo_r3.config import Config
from nemo_r3.config.task import DialogueConfig
from nemo_r3.dialogue import Dialogue
from nemo_r3.errors import ConfigError, UserError
from nemo_r3.model_card import how_to_use
from nemo_r3.tasks.protocol import Wording
from nemo_r3.tasks.template import fill
from nemo_r3.types import Answer, Attempt, Group, Phase, Problem, Reflection, Segment, Trajectory

GOLDEN = Path(__file__).with_name("golden")
NO_THOUGHT = "<think>\n\n</think>\n\n"
CITY = {"type": "string", "description": "A city, such as Köln."}
TIME = {"type": "object", "properties": {"city": CITY}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "get_time", "description": "The local time.", "parameters": TIME}}
PROBLEMS = {
    "no tools": (
        Problem("sum", "Using the numbers [3, 5, 7], create an equation that equals 22.", {}),
        Wording("{problem}", "You got the wrong answer. Reflect on what went wrong.", "Now try to solve it again."),
        ("3 + 5 + 7", "I added where I had to multiply.", "3 * 5 + 7"),
    ),
    "tools": (
        Problem("time", "What time is it in Oslo and in Köln?", {}, (TOOL,)),
        Wording("{problem}", "You made the wrong calls. Reflect on what went wrong.", "Now make the calls again."),
        ("CALLS", "I left out the second city.", "CALLS"),
    ),
}


def dialogue_of(family: Family, wording: Wording = PROBLEMS["tools"][1], **settings: object) -> Dialogue:
    return Dialogue(family.tokenizer(), DialogueConfig(**{**family.settings, **settings}), wording)


def group_of(family: Family, kind: str, repeats: bool = False) -> tuple[Dialogue, Group]:
    """Two reflections, one of which helps, on the failure of a problem with or without tools.

    If it `repeats`, the later turns repeat the task.
    """
    problem, wording, texts = PROBLEMS[kind]
    if repeats:
        wording = Wording(wording.task, f"{wording.reflect}\n\n{{task}}", f"{{task}} {wording.retry}")
    dialogue, tokenizer = dialogue_of(family, wording), family.tokenizer()

    def said(phase: Phase, text: str) -> Answer:
        whole = family.space + text.replace("CALLS", family.calls) + family.end
        ids = tuple(tokenizer.encode(whole, add_special_tokens=False))
        return Answer(Segment(phase, ids, (-1.0,) * len(ids), 3), dialogue.decode(ids), "stop")

    attempt, reflection, retry = map(said, (Phase.ATTEMPT, Phase.REFLECTION, Phase.RETRY), texts)
    context = dialogue.task(problem).then(attempt.segment)
    whole = dialogue.retry(dialogue.reflect(context, problem).then(reflection.segment), problem).then(retry.segment)
    reflections = [Reflection(sample, whole, reflection, retry, passed) for sample, passed in enumerate((True, False))]
    return dialogue, Group(Attempt(problem, 0, context, attempt, False), tuple(reflections))


def transcript(family: Family, kind: str) -> str:
    """The turns as text, marked by what the training row makes of them."""
    dialogue, group = group_of(family, kind)
    row = build_update([group], Config(), 0).rows[0]
    tokenizer, place = family.tokenizer(), 0
    offered = f"tools ({dialogue.tools})" if kind == "tools" else kind
    lines = [f"=== {offered}\n"]
    for segment in group.reflections[0].trajectory.segments:
        weights = row.loss_weights[place : place + len(segment.ids)]
        place += len(segment.ids)
        marks = ["sampled"] * segment.sampled + ["loss"] * any(weights) + ["not in the row"] * (not weights)
        assert all(weights) or not any(weights)
        lines.append(f"--- {segment.phase}{' (' + ', '.join(marks) + ')' if marks else ''}\n")
        lines.append(tokenizer.decode(segment.ids).replace("\n", "⏎\n") + "\n")
    return "".join(lines)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_three_turns_are_the_golden_ones(name: str) -> None:
    found = "\n".join(transcript(FAMILIES[name], kind) for kind in PROBLEMS)
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("REWRITE_GOLDEN"):
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")


@pytest.mark.parametrize("repeats", [False, True], ids=["once", "repeated"])
@pytest.mark.parametrize("kind", PROBLEMS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_turns_are_what_a_server_shows_that_is_asked_as_the_model_card_says(
    name: str, kind: str, repeats: bool
) -> None:
    family = FAMILIES[name]
    dialogue, group = group_of(family, kind, repeats)
    problem, first, tokenizer = group.failure.problem, group.reflections[0], family.tokenizer()
    settings = DialogueConfig(**family.settings)
    config = Config(dialogue=settings)
    card = Served(how_to_use(config, dialogue, with_tools=bool(problem.tools)))
    offered = ([*problem.tools],) if problem.tools and dialogue.tools == "template" else ()
    functions = "[" + ",\n ".join(json.dumps(tool["function"], ensure_ascii=False) for tool in problem.tools) + "]"
    task = fill(card.shown["TASK"], {"problem": problem.text, "tools": functions})
    texts = [answer.text.strip() for answer in (group.failure.answer, first.answer, first.retry)]
    assert card.two_tries(task, texts, *offered) == texts[2]
    template = {"chat_template": Path(settings.chat_template).read_text()} if settings.chat_template else {}
    served = card.prompt(2, tokenizer, **template)
    assert served.count(task.strip()) == (3 if repeats else 1)
    trained = tokenizer.decode(Trajectory(first.trajectory.segments[:-1]).ids)
    assert trained.replace(NO_THOUGHT, "") == served.replace(NO_THOUGHT, "")
    assert all(request["extra_body"]["stop_token_ids"] == [*dialogue.end_of_turn] for request in card.requests)
    limits = [config.rollout.token_limit(phase) for phase in (Phase.ATTEMPT, Phase.REFLECTION, Phase.RETRY)]
    assert [request["max_tokens"] for request in card.requests] == limits and limits[0] != limits[1]
    assert all(request.get("tool_choice") == ("none" if offered else None) for request in card.requests)


@pytest.mark.parametrize("name", FAMILIES)
def test_tools_are_offered_the_templates_way_where_it_has_one(name: str) -> None:
    family = FAMILIES[name]
    assert dialogue_of(family).tools == family.way
    assert dialogue_of(family, tools="plain").tools == "plain"
    if family.way == "plain":
        reason = "moves" if name == "mistral" else "does not show the tools"
        with pytest.raises(ConfigError, match=rf"dialogue\.tools: template: .*{reason}"):
            dialogue_of(family, tools="template")


@pytest.mark.parametrize("name", FAMILIES)
def test_decoding_keeps_what_a_parser_of_calls_needs(name: str) -> None:
    family = FAMILIES[name]
    prefix = {"llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}.get(name, "")
    ids = family.tokenizer().encode(prefix + family.calls + family.end, add_special_tokens=False)
    assert dialogue_of(family).decode(ids) == family.calls


def test_reasoning_that_a_template_drops_is_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"model\.path: .*drops the reasoning.*enable_thinking: false.*hermes\.jinja"):
        dialogue_of(replace(FAMILIES["qwen3"], settings={}))


def test_a_system_turn_that_moves_is_refused() -> None:
    assert "moves" not in FAMILIES["llama3"].tokenizer().decode(
        dialogue_of(FAMILIES["llama3"], system="Be brief.").task(PROBLEMS["tools"][0]).ids
    )
    with pytest.raises(UserError, match="moves earlier turns"):
        dialogue_of(FAMILIES["mistral"], system="Be brief.")


def test_template_options_that_nothing_reads_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"dialogue\.template_options\.thinkin: .*model\.path never reads it"):
        dialogue_of(FAMILIES["qwen3"], template_options={"enable_thinking": False, "thinkin": False})
    with pytest.raises(ConfigError, match=r"dialogue\.template_options\.tools"):
        dialogue_of(FAMILIES["qwen3"], template_options={"tools": []})


def test_a_template_file_that_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dialogue\.chat_template: .*nowhere\.jinja"):
        dialogue_of(FAMILIES["qwen2"], chat_template=str(tmp_path / "nowhere.jinja"))
    with pytest.raises(ConfigError, match=rf"'nowhere\.jinja' cannot be .*; the working directory is {Path.cwd()}"):
        dialogue_of(FAMILIES["qwen2"], chat_template="nowhere.jinja")
    (tmp_path / "broken.jinja").write_text("{% for message in messages %}")
    with pytest.raises(UserError, match=r"dialogue\.chat_template: the chat template cannot render"):
        dialogue_of(FAMILIES["qwen2"], chat_template=str(tmp_path / "broken.jinja"))


def test_the_fingerprint_covers_how_tools_are_offered() -> None:
    qwen2, qwen3 = FAMILIES["qwen2"], FAMILIES["qwen3"]
    prints = [
        dialogue_of(qwen2).fingerprint,
        dialogue_of(qwen2, tools_text="{tools} {task}").fingerprint,
        dialogue_of(FAMILIES["qwen2-hermes"]).fingerprint,
        dialogue_of(qwen3).fingerprint,
        dialogue_of(qwen3, tools="plain").fingerprint,
        dialogue_of(replace(qwen3, template="qwen2.5"), template_options={}).fingerprint,
    ]
    assert len(set(prints)) == len(prints)
