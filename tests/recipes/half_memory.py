"""A small model that half-remembers 50 problems of the Berkeley leaderboard: it answers right about every second time.

For each problem it is taught two answers, the right one and a wrong one, each as often as the other; so retries, and
with them rewards, are mixed. Qwen2 with random weights, a tokenizer of its own, plain chat turns.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from byte_level import CHAT, trained
from families import TINY
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from nemo_r3.assets.make_countdown_tiny import fit
from nemo_r3.config import load
from nemo_r3.dialogue import Dialogue
from nemo_r3.tasks import load as load_task
from nemo_r3.tasks.bfcl import CATEGORIES, folder_of
from nemo_r3.types import Phase, Problem, Segment

sys.path.append(str(Path(__file__).parents[1] / "tasks"))

from corruption import gold_calls

END = "<|end|>"
THOUGHTS = ("I chose the wrong values.", "I called the wrong function.")
TRAINED, HELD_OUT = 50, 6
STEPS, BATCH = 150, 24
RATE = 1e-2


def shortest_problems(folder: Path) -> None:
    """Writes the leaderboard's files with nothing in them but the shortest problems of its first category."""
    source = folder_of("bfcl")
    assert source is not None
    names = [f"BFCL_v4_{category}.json" for category in CATEGORIES]
    (folder / "possible_answer").mkdir(parents=True)
    for name in names:
        for part in (name, f"possible_answer/{name}"):
            (folder / part).write_text("")
    lines = sorted((source / names[0]).read_text().splitlines(), key=len)[: TRAINED + HELD_OUT]
    ids = {json.loads(line)["id"] for line in lines}
    answers = (source / "possible_answer" / names[0]).read_text().splitlines()
    (folder / names[0]).write_text("\n".join(lines))
    (folder / "possible_answer" / names[0]).write_text(
        "\n".join(line for line in answers if json.loads(line)["id"] in ids)
    )


def make(home: Path) -> Path:
    """Writes model, data and a config that names both; returns the config."""
    shortest_problems(home / "data")
    config = home / "half.yaml"
    settings = {
        "model": {"path": str(home / "model")},
        "task": {"name": "function_calling", "options": {"source": str(home / "data"), "test_size": HELD_OUT}},
        "dialogue": {"tools_text": "{tools}\n{task}", "reflect": "Wrong. Reflect.", "retry": "Try again."},
        "rollout": {"max_answer_tokens": 96, "max_reflection_tokens": 24, "max_model_len": 1024, "temperature": 1.0},
        "actor": {"precision": "fp32", "lr": 1e-4},
        "train": {"steps": 2, "failures_per_step": 6},
    }
    config.write_text(yaml.safe_dump(settings))
    loaded = load([str(config)])
    task = load_task(loaded.task, loaded.dialogue)
    problems = task.problems("train")[:TRAINED]
    tokenizer = make_tokenizer([f"{json.dumps(p.tools)} {p.text} {answer(p)}" for p in problems])
    lessons = Lessons(problems, tokenizer, Dialogue(tokenizer, loaded.dialogue, task.wording))
    torch.manual_seed(1)
    own = {"vocab_size": len(tokenizer), "intermediate_size": 384, "max_position_embeddings": 1024}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = Qwen2ForCausalLM(Qwen2Config(**TINY | own | ends, tie_word_embeddings=True)).float()
    fit(model, lambda: lessons.loss(model), STEPS, RATE, "half a memory")
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    return config


def make_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    core = trained(texts, 1024, (END, "<|user|>", "<|assistant|>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=END, pad_token=END)
    tokenizer.chat_template = CHAT
    return tokenizer


def answer(problem: Problem) -> str:
    return json.dumps(gold_calls(problem))


class Lessons:
    """Dialogues [task][answer][request][thought][request][answer], to be learned where they are the model's."""

    def __init__(self, problems: Sequence[Problem], tokenizer: PreTrainedTokenizerFast, dialogue: Dialogue) -> None:
        """A problem's wrong answer is the right one of the next problem."""
        self._tokenizer, self._dialogue, self._draw = tokenizer, dialogue, random.Random(1)
        following = [*problems[1:], problems[0]]
        self._known = [
            (problem, (answer(problem), answer(other))) for problem, other in zip(problems, following, strict=True)
        ]

    def loss(self, model: Qwen2ForCausalLM) -> torch.Tensor:
        """[2] the sum of the cross-entropies (nats) of a batch's tokens to learn, and how many they are."""
        rows = [self._dialogue_of(*self._draw.choice(self._known)) for _ in range(BATCH)]
        ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
        own = [[segment.sampled for segment in row.segments for _ in segment.ids] for row in rows]
        mask = pad_sequence([torch.tensor(row) for row in own], batch_first=True)
        hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state[mask[:, 1:]]
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[:, 1:][mask[:, 1:]], reduction="sum")
        return torch.stack([loss, mask.sum().float()])

    def _dialogue_of(self, problem: Problem, answers: tuple[str, str]):
        first, thought, second = self._draw.choice(answers), self._draw.choice(THOUGHTS), self._draw.choice(answers)
        context = self._dialogue.task(problem).then(self._said(Phase.ATTEMPT, first))
        reflected = self._dialogue.reflect(context, problem).then(self._said(Phase.REFLECTION, thought))
        return self._dialogue.retry(reflected, problem).then(self._said(Phase.RETRY, second))

    def _said(self, phase: Phase, text: str) -> Segment:
        ids = (*self._tokenizer.encode(text, add_special_tokens=False), self._tokenizer.eos_token_id)
        return Segment(phase, ids, (0.0,) * len(ids), 0)
