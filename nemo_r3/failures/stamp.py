"""`Stamp`: what the answers in a failure bank depend on, and how two stamps differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_r3.types import Problem

SETTINGS = {
    "model": "model.path",
    "problems": "failures.problems, task.options or the task's data; or problems() varies",
    "dialogue": "dialogue.* or the chat template",
    "temperature": "rollout.temperature",
    "max_answer_tokens": "rollout.max_answer_tokens",
    "samples_per_problem": "failures.samples_per_problem",
}
"""What a user may have changed where a stamp differs."""


@dataclass(frozen=True)
class Stamp:
    """What a bank's answers depend on."""

    model: str  # fingerprint of the checkpoint that answered
    problems: str  # `hash_of` the problems that were asked: another split, text or right answer is another bank
    task: str  # its name
    verifier: str  # its version and settings
    dialogue: str  # fingerprint of template and wording
    temperature: float  # of the answers
    max_answer_tokens: int  # of the answers
    samples_per_problem: int  # answers drawn for each problem


def differences(stamp: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How a bank's stamp, as JSON keeps it, differs from the wanted one, in words."""
    return [_difference(key, stamp.get(key), wanted[key]) for key in wanted if stamp.get(key) != wanted[key]]


def hash_of(problems: Iterable[Problem]) -> str:
    """A hash that changes with any problem's id, text, data or tools, and with their order."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.id, problem.text, problem.data, problem.tools]).encode() + b"\n")
    return digest.hexdigest()[:16]


def _difference(key: str, old: Any, new: Any) -> str:
    """One difference; for a user's verifier, whose stamp is "name code options helpers", which of these changed."""
    before, after = str(old).split(" "), str(new).split(" ")
    if key != "verifier" or not len(before) == len(after) == 4 or before[0] != after[0]:
        return f"{key} {old!r} != {new!r}" + (f" ({SETTINGS[key]})" if key in SETTINGS else "")
    parts = (
        "",
        f"{after[0].replace('.', '/')}.py or a file beside it that it imports has",
        "task.options have",
        "nemo_r3.tasks has",
    )
    return f"verifier ({next(part for part, a, b in zip(parts, before, after, strict=True) if a != b)} changed since)"
