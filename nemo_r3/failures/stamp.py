"""`Stamp`: what the answers of a failure bank depend on, and how two stamps differ, in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_r3.types import Problem


@dataclass(frozen=True)
class Stamp:
    """What a bank's answers depend on.

    Attributes:
        model: fingerprint of the checkpoint that answered.
        problems: `hash_of` the problems that were asked: another split, text or right answer is another bank.
        task: its name.
        verifier: its version and settings.
        dialogue: fingerprint of template and wording.
        temperature: of the answers.
        max_answer_tokens: of the answers.
        samples_per_problem: answers drawn for each problem.
    """

    model: str
    problems: str
    task: str
    verifier: str
    dialogue: str
    temperature: float
    max_answer_tokens: int
    samples_per_problem: int


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between a bank's stamp, as JSON keeps it, and the wanted one, in words."""
    return [_difference(key, found.get(key), wanted[key]) for key in wanted if found.get(key) != wanted[key]]


def hash_of(problems: Iterable[Problem]) -> str:
    """Changes with any problem's id, text, data or tools, and with their order."""
    found = hashlib.sha256()
    for problem in problems:
        found.update(json.dumps([problem.id, problem.text, problem.data, problem.tools]).encode() + b"\n")
    return found.hexdigest()[:16]


def _difference(key: str, found: Any, wanted: Any) -> str:
    """One difference; of a user's verifier, which is "name code options helpers", what changed is said instead."""
    old, new = str(found).split(" "), str(wanted).split(" ")
    if key != "verifier" or not len(old) == len(new) == 4 or old[0] != new[0]:
        return f"{key} {found!r} != {wanted!r}"
    parts = ("", f"the file {new[0].replace('.', '/')}.py has", "task.options have", "nemo_r3.tasks has")
    return f"verifier ({next(what for what, a, b in zip(parts, old, new, strict=True) if a != b)} changed since)"
