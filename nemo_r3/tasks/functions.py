"""`FunctionTask`: a task made of two functions of a user's module, `problems` and `verify`, which are checked here."""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_r3.errors import ConfigError, UserError
from nemo_r3.tasks.protocol import Wording
from nemo_r3.tasks.template import fill
from nemo_r3.types import Problem

PLACEHOLDERS = ("problem",)
SPLITS = ("train", "test")


class FunctionTask:
    """The task (see `nemo_r3.tasks.protocol.Task`)."""

    def __init__(self, module: ModuleType, options: Any, wording: Wording) -> None:
        """Calls `problems` for both splits, and `verify` once, on an empty answer.

        Args:
            module: has `problems(split)`, or `problems(split, options)` where there are options, and `verify(problem,
                text)`.
            options: an object of the module's Options; None where it has none.
            wording: its task turn is the text of a problem, `{problem}`, and perhaps words around it.

        Raises:
            ConfigError: there are no problems, or they cannot be used.
            UserError: `verify` raised, or gave something else than True or False.
        """
        self.name = module.__name__
        self.wording = wording
        self.verifier = f"{self.name} {_version(module, options)}"
        self._verify = module.verify
        arguments = () if options is None else (options,)
        self._splits = {split: self._read(split, module.problems(split, *arguments)) for split in SPLITS}
        shared = {problem.id for problem in self._splits["train"]} & {problem.id for problem in self._splits["test"]}
        if shared:
            raise ConfigError(f"task.name: {self.name}: problem {min(shared)!r} is in train and in test")
        self.verify(self._splits["train"][0], "")

    def problems(self, split: str) -> tuple[Problem, ...]:
        """The problems of "train" or "test"; KeyError for any other split."""
        return self._splits[split]

    def verify(self, problem: Problem, text: str) -> bool:
        """The verdict of the module's own `verify`.

        Raises:
            UserError: it raised, or gave something else than True or False.
        """
        try:
            verdict = self._verify(problem, text)
        except Exception as error:  # whatever it is, the user's way out is the same
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"task.name: {self.name}.verify raised {type(error).__name__} ({error}) in {place.filename}:"
                f"{place.lineno} on an answer to problem {problem.id!r}; it must give a verdict on any text"
            ) from error
        if not isinstance(verdict, bool):
            raise UserError(
                f"task.name: {self.name}.verify returned {verdict!r} of type {type(verdict).__name__} on an answer to "
                f"problem {problem.id!r}; it must return True or False"
            )
        return verdict

    def _read(self, split: str, problems: Iterable[Problem]) -> tuple[Problem, ...]:
        """The problems of a split in the words of the task turn."""
        found: dict[str, Problem] = {}
        for problem in problems:
            self._check(split, problem)
            if problem.id in found:
                raise ConfigError(f"task.name: {self.name}: problems({split!r}) gives the id {problem.id!r} twice")
            found[problem.id] = replace(problem, text=fill(self.wording.task, {"problem": problem.text}))
        if not found:
            raise ConfigError(f"task.name: {self.name}: problems({split!r}) gives no problems")
        return tuple(found.values())

    def _check(self, split: str, problem: Any) -> None:
        where = f"task.name: {self.name}: problems({split!r})"
        if not isinstance(problem, Problem):
            raise ConfigError(f"{where} gives {problem!r:.80}; it must give nemo_r3.types.Problem objects")
        if not (isinstance(problem.id, str) and isinstance(problem.text, str) and problem.id and problem.text):
            raise ConfigError(
                f"{where} gives the id {problem.id!r} and the text {problem.text!r:.80}; both must be text"
            )
        for name, value in (("data", problem.data), ("tools", [*problem.tools])):
            if not _survives_json(value):
                raise ConfigError(
                    f"{where}: {name} of problem {problem.id!r} is not what JSON would read back, and banks keep it as "
                    f"JSON: use dicts with text keys, lists, text, numbers, true, false and null; got {value!r:.200}"
                )


def _survives_json(value: Any) -> bool:
    try:
        return bool(json.loads(json.dumps(value, allow_nan=False)) == value)
    except (TypeError, ValueError):
        return False


def _version(module: ModuleType, options: Any) -> str:
    """Changes with the module's file and its options: a verdict may then change, and a bank is another one."""
    source = Path(str(module.__file__)).read_bytes()
    return hashlib.sha256(source + repr(options).encode()).hexdigest()[:12]
