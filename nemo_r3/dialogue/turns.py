"""`Dialogue`: the conversation of a task, turn by turn, as trajectories of token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_r3.config.task import DialogueConfig
from nemo_r3.dialogue.chat_template import ChatTemplate, RenderError, Tool
from nemo_r3.dialogue.probe import ANSWER, PROBLEM, TOOL, USER, after_answer, objection
from nemo_r3.errors import ConfigError, UserError, in_one_line
from nemo_r3.files import read_json_object
from nemo_r3.tasks.protocol import Wording
from nemo_r3.tasks.template import fill
from nemo_r3.types import Phase, Problem, Segment, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # slow

KEPT_TURNS = 1024
"""So many user turns are kept as token ids: the retries of a group share theirs."""


class Dialogue:
    """The conversation of a task, turn by turn.

    Example: ``context = dialogue.task(problem).then(answer); dialogue.reflect(context, problem)`` is the prompt of a
    reflection.

    Attributes:
        wording: the words of its turns.
        template_options: the variables that the chat template is given, of those that it reads.
        tools: how a problem's tools are offered: "template" (as the model's own template shows them) or "plain" (in
            the user's turn, see `dialogue.tools_text`).
        end_of_turn: ids that end an assistant's turn, sorted: the tokenizer's, the checkpoint's and the template's.
        fingerprint: changes with the text, template, tools or stop tokens around a first answer; banks store it.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DialogueConfig, wording: Wording, stop_ids: Iterable[int] = ()
    ) -> None:
        """Checks the chat template and finds its end of a turn.

        Args:
            tokenizer: with the chat template of the model.
            config: the template, the system turn, and how to offer tools.
            wording: the task's, with what `dialogue.*` replaces.
            stop_ids: the checkpoint's further end-of-turn ids, see `stop_token_ids`.

        Raises:
            UserError: there is no chat template, or it would not keep answers as they were sampled.
            ConfigError: a setting that the chat template cannot fulfil.
        """
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, config)
        self.wording, self._tools_text = wording, config.tools_text
        self.template_options = self._template.options
        self._piece = lru_cache(KEPT_TURNS)(self._rendered)
        reason = objection(self._template)
        if reason is not None:
            raise UserError(f"{self._template.setting}: the chat template {reason}")
        if config.system is not None and config.system.strip() not in self._template.render(USER[:1]):
            raise ConfigError("dialogue.system: the chat template drops the system turn; leave it unset")
        self.tools = self._way_to_offer(config.tools)
        known = {*stop_ids} | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
        self._close = self._closing_token(known)
        self.end_of_turn = tuple(sorted(known | {self._close}))
        self.fingerprint = self._fingerprint()

    def task(self, problem: Problem) -> Trajectory:
        """[task]: the prompt of a first attempt, with the problem's tools.

        Raises:
            UserError: the chat template cannot render this problem.
        """
        tools = problem.tools if self.tools == "template" else ()
        try:
            rendered = self._template.render([self._first_turn(problem)], tools)
        except RenderError as error:
            raise UserError(f"problem {problem.id!r}: {error}") from error
        return Trajectory((Segment(Phase.TASK, self._encode(rendered)),))

    def _first_turn(self, problem: Problem) -> str:
        """What the user says first."""
        if problem.tools and self.tools == "plain":
            return fill(self._tools_text, {"tools": _written(problem.tools), "task": problem.text})
        return problem.text

    def reflect(self, trajectory: Trajectory, problem: Problem) -> Trajectory:
        """[..., sampled] -> [..., sampled][request]: the prompt of a reflection on what was sampled last."""
        return self._ask(trajectory, self.wording.reflect, problem)

    def retry(self, trajectory: Trajectory, problem: Problem) -> Trajectory:
        """[..., sampled] -> [..., sampled][request]: the prompt of another try after the reflection."""
        return self._ask(trajectory, self.wording.retry, problem)

    def _ask(self, trajectory: Trajectory, wording: str, problem: Problem) -> Trajectory:
        """Closes the turn that was sampled last and adds a user turn and the generation prompt.

        Args:
            trajectory: ends with a sampled segment. If the last token is not the template's end-of-turn token, because
                the turn was cut at the token limit, that token is added.
            wording: what the user says, where {task} is what was said first.
            problem: the trajectory's.
        """
        last = trajectory.segments[-1]
        assert last.sampled and last.ids, "only a sampled turn can be followed by a user turn"
        piece = self._piece(fill(wording, {"task": self._first_turn(problem)}) if "{task}" in wording else wording)
        if last.ids[-1] == self._close:
            piece = piece[piece.index(self._close) + 1 :]
        return trajectory.then(Segment(Phase.REQUEST, piece))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without special tokens."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def whole(self, ids: Sequence[int]) -> str:
        """The text of any ids, special tokens written out."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _rendered(self, text: str) -> tuple[int, ...]:
        """[close][user turn][generation prompt] for a user's `text`."""
        return self._encode(after_answer(self._template.render((USER[0], ANSWER[0], text))))

    def _way_to_offer(self, asked: str) -> str:
        """Resolves `dialogue.tools`: the template's way, if it has one that leaves earlier turns unchanged."""
        if asked == "plain":
            return asked
        reason = objection(self._template, (TOOL,))
        if reason is not None and asked == "template":
            raise ConfigError(
                f"dialogue.tools: template: with tools, the chat template of {self._template.setting} {reason}; choose "
                "auto or plain, or name another template in dialogue.chat_template"
            )
        return "template" if reason is None else "plain"

    def _closing_token(self, known: set[int]) -> int:
        """The first token after an answer that ends a turn: a known one, or the template's own special token."""
        rendered = after_answer(self._template.render((USER[0], ANSWER[0], USER[1])))
        closing = self._encode(rendered[: rendered.index(USER[1])])
        special = known.union(i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special)
        for token in closing:
            if token in special:
                return token
        raise UserError(
            f"{self._template.setting}: the chat template ends an assistant's turn without a special token; sampling "
            "could not know where a turn ends"
        )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))

    def _fingerprint(self) -> str:
        pieces = (
            self._encode(self._template.render(USER[:1])),
            self.task(PROBLEM).ids,
            self._piece(USER[1]),
            self.wording.task,
            self.end_of_turn,
        )
        return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


def stop_token_ids(model_dir: Path) -> list[int]:
    """The end-of-sequence ids of a checkpoint: generation_config.json's, else config.json's, else none.

    Raises:
        ConfigError: such a file is broken, or has something else there.
    """
    for file in (model_dir / "generation_config.json", model_dir / "config.json"):
        found = read_json_object(file, "model.path").get("eos_token_id") if file.is_file() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(i) is int and i >= 0 for i in ids):
                raise ConfigError(
                    f"model.path: {file}: eos_token_id={in_one_line(repr(found))} is no token id or list of them"
                )
            return ids
    return []


def _written(tools: Sequence[Tool]) -> str:
    """Tools as JSON, for `dialogue.tools_text`: names, descriptions and parameters, a line each."""
    return "[" + ",\n ".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools) + "]"
