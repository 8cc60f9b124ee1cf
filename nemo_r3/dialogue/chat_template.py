"""`ChatTemplate`: a model's chat template, from turns and tools to text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_r3.config.task import DialogueConfig
from nemo_r3.errors import ConfigError, UserError, describe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # slow

DATE = "26 Jul 2024"
"""The date for templates that print today's (it is Llama 3's own default): contexts must not change overnight."""

OWN_VARIABLES = ("messages", "tools", "add_generation_prompt")

Tool = Mapping[str, Any]


class RenderError(UserError):
    """The chat template fails on a dialogue; the cause is the template's own error."""


class ChatTemplate:
    """Renders dialogues that end with a user's turn and the generation prompt.

    Attributes:
        setting: the setting that chose this template; error messages begin with it.
        options: the variables that the template is given beside the dialogue, of those that it reads.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DialogueConfig) -> None:
        """Takes the tokenizer's own template, or the one that `dialogue.chat_template` names.

        Raises:
            ConfigError: that file cannot be read, or `dialogue.template_options` sets what the template never reads.
            UserError: there is no chat template.
        """
        self.setting = "model.path" if config.chat_template is None else "dialogue.chat_template"
        source = tokenizer.chat_template if config.chat_template is None else _read(config.chat_template)
        if source is None:
            raise UserError(
                "model.path: the tokenizer has no chat template; add one (chat_template.jinja), or name one in "
                "dialogue.chat_template"
            )
        given = {"date_string": DATE, **config.template_options}
        self.options = {name: given[name] for name in given if re.search(rf"\b{re.escape(name)}\b", str(source))}
        for name in config.template_options:
            if name in OWN_VARIABLES:
                raise ConfigError(f"dialogue.template_options.{name}: it is filled in from the dialogue; leave it out")
            if name not in self.options:
                raise ConfigError(
                    f"dialogue.template_options.{name}: the chat template of {self.setting} never reads it"
                )
        self._tokenizer = tokenizer
        self._system = config.system
        self._source = None if config.chat_template is None else source

    def render(self, turns: Sequence[str], tools: Sequence[Tool] = ()) -> str:
        """The text of alternating user and assistant turns, after the system turn, with the generation prompt.

        Raises:
            RenderError: the template refuses such a dialogue, or fails on it.
        """
        messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": turn} for i, turn in enumerate(turns)]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        try:
            rendered: str = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._source,
                tools=[dict(tool) for tool in tools] or None,
                tokenize=False,
                add_generation_prompt=True,
                **self.options,
            )
        except Exception as error:  # of any type: a template is a program of the model's author
            raise RenderError(
                f"{self.setting}: the chat template cannot render this dialogue: {describe(error)}"
            ) from error
        return rendered


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        place = "" if Path(path).is_absolute() else f"; the working directory is {Path.cwd()}"
        raise ConfigError(
            f"dialogue.chat_template: {path!r} cannot be read ({error}); name a Jinja file{place}"
        ) from None
