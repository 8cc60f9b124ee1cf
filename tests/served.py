"""The Python of a model card, run against a server that gives the answers of a test."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch


class Served:
    """What a card shows: `shown` are its names, and `requests` what its client has asked for."""

    def __init__(self, card: str) -> None:
        self.requests: list[dict[str, Any]] = []
        self.shown: dict[str, Any] = {}
        self._answers: list[str] = []
        (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
        completions = SimpleNamespace(create=self._create)
        client = SimpleNamespace(chat=SimpleNamespace(completions=completions))
        with patch.dict(sys.modules, openai=SimpleNamespace(OpenAI=lambda **address: client)):
            exec(code, self.shown)

    def _create(self, **request: Any) -> SimpleNamespace:
        self.requests.append(request)
        message = SimpleNamespace(content=self._answers.pop(0))
        return SimpleNamespace(choices=[SimpleNamespace(message=message)])

    def two_tries(self, task: str, answers: Sequence[str], *tools: Any) -> str:
        """The card's two tries, of which the first is rejected; `answers` are an attempt, a reflection and a retry."""
        self._answers += answers
        return self.shown["two_tries"](task, lambda answer: answer != answers[0], *tools)

    def prompt(self, place: int, tokenizer: Any, **more: Any) -> str:
        """What the model reads of a request, the way that a server makes it."""
        request = self.requests[place]
        return tokenizer.apply_chat_template(
            request["messages"],
            tools=request.get("tools"),
            tokenize=False,
            add_generation_prompt=True,
            **request["extra_body"].get("chat_template_kwargs", {}),
            **more,
        )
