"""`objection`: finds out, by rendering marked turns, whether sampled ids can be spliced into a chat template.

    opening + answer one + close(user two) + answer two + close(user three) + ...

They can if every dialogue renders like this, so that ids can replace the answers. Two differences between the prompt
for an answer and the rendering of a past one are harmless, because prompt and sampled ids stay as they were: white
space before a past answer (Mistral; the model samples it), and an empty thought in the generation prompt that past
answers lose (Qwen3 with enable_thinking: false).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from os.path import commonprefix

from nemo_r3.dialogue.chat_template import ChatTemplate, RenderError, Tool
from nemo_r3.errors import describe
from nemo_r3.types import Problem

USER = ("[[user turn one]]", "[[user turn two]]", "[[user turn three]]", "[[user turn four]]")
ANSWER = (
    "[[answer one]] a\n\n  b <x> {y} 'z' [[end of one]]",
    "[[answer two]] a\n\n  b <x> {y} 'z' [[end of two]]",
    "[[answer three]] a\n\n  b <x> {y} 'z' [[end of three]]",
)
COUNTS = (1, 2, 3)
THOUGHT = "<think>\n[[thought]]\n</think>\n\n"
NO_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")
MOVES = (
    "renders a longer conversation differently from a shorter one (it rewrites or moves earlier turns), so sampled ids "
    "could not be kept"
)
FUNCTION, PARAMETER = "probe_function", "probe_parameter"
TOOL: Tool = {
    "type": "function",
    "function": {
        "name": FUNCTION,
        "description": "Probes.",
        "parameters": {
            "type": "object",
            "properties": {PARAMETER: {"type": "string", "description": "What to probe."}},
            "required": [PARAMETER],
        },
    },
}
PROBLEM = Problem("probe", USER[0], {}, (TOOL,))


def objection(template: ChatTemplate, tools: Sequence[Tool] = ()) -> str | None:
    """Why sampled answers could not be kept as they are; None if they can.

    With `(TOOL,)`, dialogues are tried whose first turn offers a tool; later turns do not repeat it.
    """
    try:
        return _objection(template, tools)
    except RenderError as error:
        return f"cannot render this dialogue: {describe(error.__cause__ or error)}"


def after_answer(rendered: str) -> str:
    """What a template wrote after `ANSWER[0]`."""
    return rendered[rendered.index(ANSWER[0]) + len(ANSWER[0]) :]


def _objection(template: ChatTemplate, tools: Sequence[Tool]) -> str | None:
    """The checks, one after the other; each relies on the earlier ones having passed."""
    first = template.render(USER[:1], tools)
    if tools and not (FUNCTION in first and PARAMETER in first):
        return "does not show the tools"
    dialogues = [template.render(_alternate(count), tools) for count in COUNTS]
    for rendered, count in zip(dialogues, COUNTS, strict=True):
        for answer in ANSWER[:count]:
            if (times := rendered.count(answer)) > 1:
                return "repeats the text of an answer; sampled ids could not be kept"
            if not times and answer[: answer.index("]]") + 2] not in rendered:
                return "drops an earlier answer; the failed answer must stay in context"
            if not times:
                return "trims or rewrites the text of an answer; sampled ids could not be kept"
    if not NO_THOUGHT.search(first):
        if THOUGHT.strip() not in template.render((USER[0], THOUGHT + ANSWER[0], USER[1]), tools):
            return (
                "drops the reasoning (<think>...</think>) of earlier answers, so a reflection would not see the "
                "attempt it is about; switch reasoning off where the template can (Qwen3: dialogue.template_options="
                "{enable_thinking: false}), or name a template that keeps it in dialogue.chat_template (for ChatML, "
                "configs/templates/hermes.jinja)"
            )
    opening = dialogues[0][: dialogues[0].index(ANSWER[0])]
    close = after_answer(template.render(_alternate(1)))
    same = len(commonprefix([first, opening]))
    asked, shown = first[same:], opening[same:]
    if shown.strip() or (asked and not NO_THOUGHT.fullmatch(asked)):
        return MOVES
    expected = opening
    for rendered, count in zip(dialogues, COUNTS, strict=True):
        expected = expected + ANSWER[count - 1] + close.replace(USER[1], USER[count])
        if rendered != expected:
            return MOVES
        expected = expected.removesuffix(asked) + shown
    return None


def _alternate(count: int) -> list[str]:
    """User, answer, user, ... with `count` answers; a user's turn is last."""
    turns = [USER[0]]
    for index in range(count):
        turns += [ANSWER[index], USER[index + 1]]
    return turns
