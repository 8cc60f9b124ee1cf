"""`task`: which verifiable task is trained, and the words of its three turns."""

from dataclasses import dataclass
from typing import Any

from nemo_r3.config.option import option

TOOLS_TEXT = """\
You can call these functions:
{tools}

{task}

Answer with nothing but a JSON list of calls: [{"name": <function>, "arguments": {<parameter>: <value>}}]"""


@dataclass
class TaskConfig:
    """The task and its own options (validated against the task's Options dataclass)."""

    name: str = option("countdown", help="countdown, function_calling, or the dotted path of your own module")
    options: dict[str, Any] = option(
        factory=dict,
        help="the task's own settings: the Options in nemo_r3/tasks/countdown.py, function_calling.py or your own file",
    )
    verifier_threads: int = option(
        0,
        low=0,
        resume=True,
        help="calls of verify at once on each rank, while the engine samples on; 0: one, while the engine waits for it",
    )


@dataclass
class DialogueConfig:
    """The system turn, the wording of the user turns, and the chat template. A null wording means the task's own."""

    system: str | None = option(None, help="system turn; none by default")
    task: str | None = option(None, help="wording of the task turn, with the task's {placeholders}")
    reflect: str | None = option(
        None, help="user turn that asks for a reflection after a failed answer; {task} repeats the task turn"
    )
    retry: str | None = option(
        None, help="user turn that asks to try again after the reflection; {task} repeats the task turn"
    )
    tools: str = option(
        "auto",
        choices=("auto", "template", "plain"),
        help="how a problem's tools are offered: as the chat template shows them, or in the user's turn; auto: the "
        "template's way, if it has one that leaves earlier turns in their places",
    )
    tools_text: str = option(
        TOOLS_TEXT, help="with tools in the user's turn: its wording around {tools} (JSON) and {task} (the task turn)"
    )
    chat_template: str | None = option(
        None,
        help="a Jinja file that replaces the tokenizer's chat template; a relative path, as all but that of `extends`, "
        "is one from the working directory",
    )
    template_options: dict[str, Any] = option(
        factory=dict, help="variables for the chat template, such as {enable_thinking: false} for Qwen3"
    )
