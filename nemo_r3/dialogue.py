"""`Dialogue`: the turns of a trajectory as token ids, spliced around what vLLM sampled.

    [system, user turn, generation prompt] sampled [close, user turn, generation prompt] sampled ...
     `-- text, tokenised once -----------'          `-- text, tokenised once ---------'

Text comes from the model's own chat template; sampled ids are never decoded and tokenised again, so a longer
trajectory begins with exactly the ids of the shorter one. No torch, no vLLM.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from jinja2 import TemplateError

from nemo_r3.config.task import DialogueConfig
from nemo_r3.errors import UserError
from nemo_r3.tasks.protocol import Wording
from nemo_r3.types import Phase, Problem, Segment, Trajectory

USER = ("[[user turn one]]", "[[user turn two]]", "[[user turn three]]", "[[user turn four]]")
ANSWER = (
    "[[answer one]] a\n\n  b <x> {y} 'z' [[end of one]]",
    "[[answer two]] a\n\n  b <x> {y} 'z' [[end of two]]",
    "[[answer three]] a\n\n  b <x> {y} 'z' [[end of three]]",
)
THOUGHT = "<think>\n[[thought]]\n</think>\n\n"
DATE = "26 Jul 2024"
"""Templates that print today's date get this one (Llama 3's own default): contexts must not change overnight."""


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any
    eos_token_id: int | None
    all_special_ids: list[int]

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any:
        """Renders messages as text."""
        ...

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Text -> ids; special tokens written out in the text become their ids."""
        ...

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Ids -> text."""
        ...


class Dialogue:
    """The conversation of a task, turn by turn.

    Example: ``context = dialogue.task(problem).then(answer); dialogue.reflect(context)`` is the prompt of a reflection.

    Attributes:
        end_of_turn: ids that end an assistant's turn, sorted: the tokenizer's, the checkpoint's, the template's.
        fingerprint: changes when the text, template or stop tokens around a first answer do; banks store it.
    """

    def __init__(
        self, tokenizer: Tokenizer, config: DialogueConfig, wording: Wording, stop_ids: Iterable[int] = ()
    ) -> None:
        """Cuts the chat template into pieces.

        Args:
            tokenizer: with the chat template of the model.
            config: the system turn, and what replaces the task's wording.
            wording: the task's own words.
            stop_ids: the checkpoint's further end-of-turn ids, see `stop_token_ids`.

        Raises:
            UserError: there is no chat template, or one in which an answer would not stay what was sampled.
        """
        if tokenizer.chat_template is None:
            raise UserError("model.path: the tokenizer has no chat template; add one (chat_template.jinja)")
        self._tokenizer = tokenizer
        self._system = config.system
        self._task = wording.task if config.task is None else config.task
        self._reflect = wording.reflect if config.reflect is None else config.reflect
        self._retry = wording.retry if config.retry is None else config.retry
        self._pieces: dict[str, tuple[int, ...]] = {}
        self._check_template()
        known = {*stop_ids} | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())
        self._close = self._closing_token(known)
        self.end_of_turn = tuple(sorted(known | {self._close}))
        self.fingerprint = self._fingerprint()

    def task(self, problem: Problem) -> Trajectory:
        """[task]: the prompt of a first attempt."""
        ids = self._encode(self._render(problem.text))
        return Trajectory((Segment(Phase.TASK, ids),))

    def reflect(self, trajectory: Trajectory) -> Trajectory:
        """[..., sampled] -> [..., sampled][request]: the prompt of a reflection on what was sampled last."""
        return self.ask(trajectory, Phase.REQUEST, self._reflect)

    def retry(self, trajectory: Trajectory) -> Trajectory:
        """[..., sampled] -> [..., sampled][request]: the prompt of another try after the reflection."""
        return self.ask(trajectory, Phase.REQUEST, self._retry)

    def ask(self, trajectory: Trajectory, phase: Phase, text: str) -> Trajectory:
        """Closes the turn that was sampled last and adds a user turn and the generation prompt.

        Args:
            trajectory: ends with a sampled segment. If that one ends with the template's end-of-turn token, the
                template's own is left out; if not (it was cut at the token limit), the template closes the turn.
            phase: of the added segment.
            text: what the user says.
        """
        last = trajectory.segments[-1]
        assert last.sampled and last.ids, "only a sampled turn can be followed by a user turn"
        piece = self._piece(text)
        if last.ids[-1] == self._close:
            piece = piece[piece.index(self._close) + 1 :]
        return trajectory.then(Segment(phase, piece))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _piece(self, text: str) -> tuple[int, ...]:
        """[close][user turn][generation prompt] for a user's `text`, tokenised once."""
        if text not in self._pieces:
            self._pieces[text] = self._encode(self._after(self._render(USER[0], ANSWER[0], text), ANSWER[0]))
        return self._pieces[text]

    def _closing_token(self, known: set[int]) -> int:
        """The first token after an answer that ends a turn: a known one, or the template's own special token."""
        rendered = self._after(self._render(USER[0], ANSWER[0], USER[1]), ANSWER[0])
        closing = self._encode(rendered[: rendered.index(USER[1])])
        special = known.union(self._tokenizer.all_special_ids)
        for token in closing:
            if token in special:
                return token
        raise UserError(
            "model.path: the chat template ends an assistant's turn without a special token; sampling could not know "
            "where a turn ends"
        )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))

    def _render(self, *turns: str) -> str:
        """User and assistant turns in alternation, with the generation prompt at the end."""
        messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": turn} for i, turn in enumerate(turns)]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        rendered: str = self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, date_string=DATE
        )
        return rendered

    @staticmethod
    def _after(text: str, answer: str) -> str:
        return text[text.index(answer) + len(answer) :]

    def _check_template(self) -> None:
        """Refuses templates in which the model would not see every answer, unchanged and in its place."""
        try:
            first = self._render(USER[0])
            longer = [self._render(*_alternate(count)) for count in (1, 2, 3)]
            thinking = self._render(USER[0], THOUGHT + ANSWER[0], USER[1])
        except TemplateError as error:
            raise UserError(f"model.path: the chat template cannot render this dialogue ({error})") from error
        if self._system is not None and self._system.strip() not in first:
            raise UserError("dialogue.system: the chat template drops the system turn; leave it unset")
        for rendered, count in zip(longer, (1, 2, 3), strict=True):
            for answer in ANSWER[:count]:
                _require_kept(rendered, answer)
        if THOUGHT.strip() not in thinking:
            raise UserError(
                "model.path: the chat template drops the reasoning (<think>...</think>) of earlier answers, so a "
                "reflection would not see the attempt it is about"
            )
        close = self._after(longer[0], ANSWER[0])
        expected = first + ANSWER[0] + close
        for rendered, count in zip(longer, (1, 2, 3), strict=True):
            if count > 1:
                expected += ANSWER[count - 1] + close.replace(USER[1], USER[count])
            if rendered != expected:
                raise UserError(
                    f"model.path: the chat template renders a conversation of {count} answer(s) differently from a "
                    "shorter one (it rewrites or moves earlier turns), so sampled ids cannot be kept"
                )

    def _fingerprint(self) -> str:
        pieces = (
            self._encode(self._render(USER[0])),
            self._piece(USER[1]),
            self._task,
            self.end_of_turn,
        )
        return hashlib.sha256(json.dumps(pieces).encode()).hexdigest()


def stop_token_ids(model_dir: Path) -> list[int]:
    """The end-of-sequence ids of a checkpoint: generation_config.json's, else config.json's, else none."""
    for name in ("generation_config.json", "config.json"):
        file = model_dir / name
        found = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return [found] if isinstance(found, int) else list(found)
    return []


def _alternate(count: int) -> list[str]:
    """User, answer, user, ... with `count` answers; a user's turn is last."""
    turns = [USER[0]]
    for index in range(count):
        turns += [ANSWER[index], USER[index + 1]]
    return turns


def _require_kept(rendered: str, answer: str) -> None:
    found = rendered.count(answer)
    if found == 1:
        return
    start = answer[: answer.index("]]") + 2]
    if start not in rendered:
        raise UserError("model.path: the chat template drops an earlier answer; the failed answer must stay in context")
    how = "repeats" if found > 1 else "trims or rewrites"
    raise UserError(f"model.path: the chat template {how} the text of an answer; sampled ids could not be kept")
