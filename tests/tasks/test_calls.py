"""Calls are read from each family's format, strictly; no text raises anything else, or takes long."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from timing import quickest

from nemo_r3.tasks.calls import FORMATS, MAX_CHARACTERS, MAX_DEPTH, Call, NotCallsError, parse_json, read_calls

F = '{"name": "f", "arguments": {"x": 1}}'
G = '{"name": "g", "arguments": {}}'
LLAMA_F = '{"name": "f", "parameters": {"x": 1}}'
LLAMA_G = '{"name": "g", "parameters": {}}'
FIRST, SECOND = Call("f", {"x": 1}), Call("g", {})
QUOTED = '"</tool_call>;```"'

READ = [
    ("hermes", f"<tool_call>{F}</tool_call>", [FIRST]),
    ("hermes", f"I will call two.\n<tool_call>\n{F}\n</tool_call> and <tool_call>{G}</tool_call>.", [FIRST, SECOND]),
    ("hermes", f"<think>\nf? <tool_call>{G}</tool_call> no\n</think>\n\n<tool_call>\n{F}\n</tool_call>", [FIRST]),
    ("hermes", f"<tool_call>{F.replace('1', QUOTED)}</tool_call>", [Call("f", {"x": "</tool_call>;```"})]),
    ("hermes", '<tool_call>{"arguments": "{\\"x\\": 1}", "name": "f"}</tool_call>', [FIRST]),
    ("llama", LLAMA_F, [FIRST]),
    ("llama", f"<|python_tag|> {LLAMA_F} ;\n {LLAMA_G};", [FIRST, SECOND]),
    ("llama", f"{LLAMA_F};{LLAMA_G}, {LLAMA_F}", [FIRST, SECOND, FIRST]),
    ("llama", f"{LLAMA_F} {LLAMA_G}\n\n{LLAMA_F}\n", [FIRST, SECOND, FIRST]),
    ("llama", f"{LLAMA_F},\n{LLAMA_G};\n{LLAMA_F}\n", [FIRST, SECOND, FIRST]),
    ("llama", '{"name": "f", "parameters": {"x": "}\\n{; "}}; ' + LLAMA_G, [Call("f", {"x": "}\n{; "}), SECOND]),
    ("llama", '{"name": "f", "parameters": "{\\"x\\": 1}"}', [FIRST]),
    ("llama", f"[{LLAMA_F}]", [FIRST]),
    ("llama", f"<|python_tag|> [\n    {LLAMA_F},\n    {LLAMA_G}\n];", [FIRST, SECOND]),
    ("llama", '[{"name": "f", "parameters": {"x": "}, {"}}, ' + LLAMA_G + "]", [Call("f", {"x": "}, {"}), SECOND]),
    ("llama", f"The calls:\n```\n[{LLAMA_F}, {LLAMA_G}]\n```\nDone.", [FIRST, SECOND]),
    ("llama", '{"name": "f", "parameters": {"arguments": {}}}', [Call("f", {"arguments": {}})]),
    ("json", F, [FIRST]),
    ("json", f"[{F}, {G}]", [FIRST, SECOND]),
    ("json", "[]", []),
    ("json", f"```json\n[{F}]\n```", [FIRST]),
    ("json", f"Here it is:\n\n```JSON\n{F}\n```\n\nAnything else?", [FIRST]),
    ("json", f"```\n{F.replace('1', QUOTED)}\n```", [Call("f", {"x": "</tool_call>;```"})]),
    ("json", '[{"name": "f", "arguments": {"x": "<tool_call>"}}]', [Call("f", {"x": "<tool_call>"})]),
    ("json", '{"name": "f", "arguments": {"parameters": {}}}', [Call("f", {"parameters": {}})]),
]

REFUSED = [
    ("auto", ""),
    ("auto", "f(x=1)"),
    ("auto", "{'name': 'f', 'arguments': {'x': 1}}"),
    ("auto", f"<think>{F}"),
    ("auto", f"<tool_call>{F}"),
    ("auto", f"{F}</tool_call>"),
    ("auto", f"<tool_call>{F}</tool_call></tool_call>"),
    ("auto", f"</tool_call><tool_call>{F}</tool_call>"),
    ("auto", f"<tool_call><tool_call>{F}</tool_call></tool_call>"),
    ("auto", f"<tool_call>{F}</tool_call><tool_call></tool_call>"),
    ("auto", f"<tool_call>{F} and so on</tool_call>"),
    ("auto", f"<tool_call>[{F}]</tool_call>"),
    ("auto", f"<tool_call>{LLAMA_F}</tool_call>"),
    ("auto", f"{LLAMA_F};;"),
    ("auto", f"{LLAMA_F};,{LLAMA_G}"),
    ("auto", f"; {LLAMA_F}"),
    ("auto", f"{LLAMA_F}{LLAMA_G}"),
    ("auto", f"{LLAMA_F}\N{NO-BREAK SPACE}{LLAMA_G}"),
    ("auto", f"{LLAMA_F}; {G}"),
    ("auto", f"{LLAMA_F} Done."),
    ("auto", f"{LLAMA_F}\n{LLAMA_G[:-1]}"),
    ("auto", f"{LLAMA_F}\n[{LLAMA_G}]"),
    ("auto", f"Call {LLAMA_F}"),
    ("auto", f"[{LLAMA_F}]\n{LLAMA_G}"),
    ("auto", f"[{LLAMA_F}, {LLAMA_G}"),
    ("auto", f"[{LLAMA_F}, {G}]"),
    ("auto", f"[[{LLAMA_F}]]"),
    ("auto", f"```json\n{LLAMA_F}; {LLAMA_G}\n```"),
    ("auto", f"```json\n{LLAMA_F}\n```\n```json\n{LLAMA_G}\n```"),
    ("auto", f"<|python_tag|>```json\n{LLAMA_F}\n```"),
    ("auto", f"<|python_tag|>{F}"),
    ("auto", f"<|python_tag|><|python_tag|>{LLAMA_F}"),
    ("auto", f"{F}\n{G}"),
    ("auto", f"{F};"),
    ("auto", f"[{F},]"),
    ("auto", f"[{F}, 1]"),
    ("auto", f"```json\n{F}"),
    ("auto", f"```json\n{F} Done.\n```"),
    ("auto", f"```json\n{F}\n``` or ```json\n{G}\n```"),
    ("auto", f"```python\n{F}\n```"),
    ("auto", f"```python\n1\n```\n```json\n{F}\n```"),
    ("auto", '{"name": "f", "arguments": {"x": 1}, "id": 7}'),
    ("auto", '{"name": "f", "arguments": {"x": 1}, "name": "f"}'),
    ("auto", '{"name": "f", "arguments": {"x": {"y": 1, "y": 1}}}'),
    ("auto", '{"name": "f", "parameters": {"x": 1}, "arguments": {"x": 1}}'),
    ("auto", '{"name": "f"}'),
    ("auto", '{"name": 1, "arguments": {"x": 1}}'),
    ("auto", '{"name": "f", "arguments": null}'),
    ("auto", '{"name": "f", "arguments": "x=1"}'),
    ("auto", '{"name": "f", "arguments": "{\\"x\\": 1} extra"}'),
    ("auto", '{"name": "f", "arguments": "\\"{}\\""}'),
    ("auto", '{"name": "f", "arguments": {"x": NaN}}'),
    ("auto", '{"name": "f", "arguments": {"x": 1e999}}'),
    ("auto", '{"name": "f", "arguments": {"x": "a\nb"}}'),
    ("auto", '{"name": "f", "arguments": {"x": 1 // one\n}}'),
    ("auto", '{"name": "f", "arguments": {"x": ' + "9" * 5000 + "}}"),
    ("hermes", F),
    ("llama", F),
    ("llama", f"[{F}]"),
    ("llama", f"```json\n{F}\n```"),
    ("llama", f"<tool_call>{F}</tool_call>"),
    ("json", LLAMA_F),
    ("json", f"<tool_call>{F}</tool_call>"),
]

DEEP = 10_000
HUGE = [
    "[" * DEEP,
    "[" * DEEP + "]" * DEEP,
    '{"name": "f", "arguments": {"x": ' + "[" * DEEP + "]" * DEEP + "}}",
    '{"name": "f", "arguments": "' + "[" * DEEP + '"}',
    "<tool_call>" * DEEP,
    "<tool_call>{}</tool_call>" * 800,
    f"<tool_call>{F}</tool_call>" * 300 + "<tool_call>",
    "<think>" + "</think" * 150_000,
    "```json\n[" * 2_000,
    "```" * 6_000,
    "```json" + " " * 19_000,
    '"' * 20_000,
    '{"' + '\\"' * 9_000,
    '{"' + "\\" * 19_000,
    '[{"' * 6_000,
    ";" * 20_000,
    f"{LLAMA_F};" * 600,
    f"{LLAMA_F}" + " 1" * 9_900,
    "{} " * 6_600 + "1",
    "[" + "{}," * 6_600,
    "{}" + " " * 19_000 + ";",
    "[" + "9" * 19_000,
    "[" + "1e9" * 6_000,
    "a" * 1_000_000,
    "\ud800" * 20_000,
]


@pytest.mark.parametrize(("form", "text", "calls"), READ)
def test_calls_are_read_in_their_format_and_by_their_markers(form: str, text: str, calls: list[Call]) -> None:
    assert read_calls(text, form) == calls
    assert read_calls(text, "auto") == calls
    assert read_calls(f"\n {text}\n", "auto") == calls
    assert read_calls(f"\ufeff{text}", "auto") == calls
    if "<think>" not in text:
        assert read_calls(f"<think>\n\n</think>\n\n{text}", "auto") == calls


@pytest.mark.parametrize(("form", "text"), REFUSED)
def test_one_malformed_call_spoils_the_answer(form: str, text: str) -> None:
    with pytest.raises(NotCallsError):
        read_calls(text, form)


def test_numbers_keep_their_types() -> None:
    assert repr(parse_json("[1, 1.0, 1e0, -0, true, null, 123456789012345678901234567890]")) == (
        "[1, 1.0, 1.0, 0, True, None, 123456789012345678901234567890]"
    )


def test_length_and_depth_are_bounded() -> None:
    def nested(depth: int) -> str:
        return '{"name": "f", "arguments": {"x": ' + "[" * depth + "]" * depth + "}}"

    assert read_calls(nested(MAX_DEPTH - 2))
    with pytest.raises(NotCallsError, match="nested too deeply"):
        read_calls(nested(MAX_DEPTH - 1))
    brackets = json.dumps({"name": "f", "arguments": {"x": '["[{' * 1000}})
    assert read_calls(brackets)[0].arguments == {"x": '["[{' * 1000}
    with pytest.raises(NotCallsError, match="too long"):
        read_calls(F + " " * MAX_CHARACTERS + "x")
    assert read_calls(f"<think>{'hm ' * 100_000}</think>{F}") == [FIRST]


@pytest.mark.parametrize("text", HUGE, ids=range(len(HUGE)))
def test_huge_texts_are_refused_at_once(text: str) -> None:
    def refused(form: str) -> None:
        with pytest.raises(NotCallsError):
            read_calls(text, form)

    assert max(quickest(lambda form=form: refused(form)) for form in FORMATS) < 0.1


@settings(max_examples=300)
@given(
    st.text()
    | st.lists(
        st.sampled_from(
            [*'{}[]",:;\\` 1e', "```json", "<tool_call>", "</tool_call>", "<think>", "<|python_tag|>", F, LLAMA_F]
        )
    ).map("".join)
)
def test_no_text_raises_anything_else(text: str) -> None:
    for form in FORMATS:
        try:
            read_calls(text, form)
        except NotCallsError:
            continue
