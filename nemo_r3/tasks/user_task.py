"""`UserTask`: a task made of the two functions `problems` and `verify` of a user's module, which it checks."""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_r3.errors import ConfigError, UserError, in_one_line
from nemo_r3.progress import put, warn
from nemo_r3.tasks.protocol import Wording
from nemo_r3.tasks.slow_calls import warn_if_slow
from nemo_r3.tasks.template import fill, is_unicode
from nemo_r3.tasks.user_code import user_code
from nemo_r3.types import Problem

PLACEHOLDERS = ("problem",)
SPLITS = ("train", "test")
TRIED_SECONDS = 10.0
"""How long `verify` is tried on empty answers when a command starts."""
HELPERS_VERSION = 2
"""Version of `nemo_r3.tasks.arithmetic` and `.latex`; raise it when they change a verdict."""


class UserTask:
    """The task (see `nemo_r3.tasks.protocol.Task`)."""

    def __init__(self, module: ModuleType, options: Any, wording: Wording) -> None:
        """Calls `problems` for both splits, and `verify` on an empty answer to each problem, for `TRIED_SECONDS`.

        Args:
            module: has `problems(split)`, or `problems(split, options)` where there are options, and `verify(problem,
                text)`.
            options: an object of the module's Options; None if it has none.
            wording: its task turn has the problem's text as `{problem}`.

        Raises:
            ConfigError: there are no problems, or they cannot be used.
            UserError: `problems` raised, or `verify` gave no verdict, see there.
        """
        self.name = module.__name__
        self.wording = wording
        self.verifier = f"{self.name} {_version(module, options)}"
        self._module = module
        self._splits = {split: self._read(split, () if options is None else (options,)) for split in SPLITS}
        shared = {problem.id for problem in self._splits["train"]} & {problem.id for problem in self._splits["test"]}
        if shared:
            raise ConfigError(f"task.name: {self.name}: problem {min(shared)!r} is in train and in test")
        self._compare_splits()
        self._try_verify([problem for split in SPLITS for problem in self._splits[split]])

    def problems(self, split: str) -> tuple[Problem, ...]:
        """The problems of "train" or "test"; KeyError for any other split."""
        return self._splits[split]

    def verify(self, problem: Problem, text: str) -> bool:
        """The verdict of the module's own `verify`.

        Raises:
            UserError: it raised, gave something else than True or False, or changed the problem's data. The whole
                answer is on standard error then.
        """
        try:
            return self._verdict(problem, text)
        except UserError:
            put(f"the answer to problem {problem.id!r} was {text!r}", sys.stderr)
            raise

    def _verdict(self, problem: Problem, text: str) -> bool:
        answer = f"on an answer to problem {problem.id!r}"
        before = copy.deepcopy(problem.data)
        with (
            warn_if_slow(f"{self.name}.verify", answer),
            user_code(f"{self.name}.verify", f" {answer}; verify(problem, text) must give a verdict on any text"),
        ):
            verdict = self._module.verify(problem, text)
        if not isinstance(verdict, bool):
            kind = type(verdict)
            name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
            raise UserError(
                f"task.name: {self.name}.verify returned {in_one_line(repr(verdict))} of type {name} {answer}; it must "
                f"return True or False{' on every path' if verdict is None else ''}, such as bool(match) or score == 1"
            )
        if problem.data != before:
            raise UserError(
                f"task.name: {self.name}.verify changed the data {answer}, which banks keep; work on a copy, and keep "
                "what another call needs in a variable of the module"
            )
        return verdict

    def _try_verify(self, problems: Sequence[Problem]) -> None:
        """Calls `verify` on an empty answer to each problem while time lasts; warns if it accepts one."""
        began, tried = time.monotonic(), 0
        accepted: list[str] = []
        while tried < len(problems) and time.monotonic() < began + TRIED_SECONDS:
            if self.verify(problems[tried], ""):
                accepted.append(problems[tried].id)
            tried += 1
        if accepted:
            warn(
                f"{self.name}.verify accepts an empty answer to {len(accepted)} of {tried} problems, such as "
                f"{accepted[0]!r}: does it refuse wrong ones? They are what this method learns from"
            )
        if tried < len(problems):
            seconds = (time.monotonic() - began) / tried
            warn(
                f"{self.name}.verify took {seconds:.2g} s for an empty answer, and was tried on {tried:,} of "
                f"{len(problems):,} problems; an engine waits for each call, two for each reflection, unless "
                "task.verifier_threads is set"
            )

    def _compare_splits(self) -> None:
        """Warns of test problems that are training problems under other ids.

        Raises:
            ConfigError: all of them are, so nothing is held out.
        """
        known = {_asked(problem) for problem in self._splits["train"]}
        again = [problem.id for problem in self._splits["test"] if _asked(problem) in known]
        count = len(self._splits["test"])
        said = f"{len(again)} of {count} test problems have the text of a training problem"
        if len(again) == count:
            raise ConfigError(f"task.name: {self.name}: {said}: evaluation would measure memory; hold other ones out")
        if again:
            warn(f"{self.name}: {said}, such as {again[0]!r}: evaluation will measure memory there")

    def _read(self, split: str, options: tuple[Any, ...]) -> tuple[Problem, ...]:
        """The problems of a split in the words of the task turn."""
        problems: dict[str, Problem] = {}
        call = f"problems(split{', options' if options else ''})"
        with user_code(f"{self.name}.problems({split!r})", f"; {call} must give the Problems of that split"):
            for problem in self._module.problems(split, *options):
                self._check(split, problem)
                if problem.id in problems:
                    raise ConfigError(f"task.name: {self.name}: problems({split!r}) gives the id {problem.id!r} twice")
                problems[problem.id] = replace(problem, text=fill(self.wording.task, {"problem": problem.text}))
        if not problems:
            raise ConfigError(f"task.name: {self.name}: problems({split!r}) gives no problems")
        return tuple(problems.values())

    def _check(self, split: str, problem: Any) -> None:
        where = f"task.name: {self.name}: problems({split!r})"
        if not isinstance(problem, Problem):
            raise ConfigError(f"{where} gives {problem!r:.80}; it must give nemo_r3.types.Problem objects")
        if not (isinstance(problem.id, str) and isinstance(problem.text, str) and problem.id and problem.text):
            raise ConfigError(
                f"{where} gives the id {problem.id!r} and the text {problem.text!r:.80}; both must be text, "
                "and not empty"
            )
        if not is_unicode(problem.id + problem.text):
            raise ConfigError(f"{where}: id or text of problem {problem.id!r} holds half a character, a lone surrogate")
        tools = problem.tools
        if not isinstance(tools, (tuple, list)) or not all(isinstance(t, dict) and "function" in t for t in tools):
            raise ConfigError(
                f"{where}: tools of problem {problem.id!r} must be a list of {{'type': 'function', 'function': ...}}; "
                f"got {tools!r:.200}"
            )
        for name, value in (("data", problem.data), ("tools", [*tools])):
            if not _survives_json(value):
                raise ConfigError(
                    f"{where}: {name} of problem {problem.id!r} is not what JSON would read back, and banks keep it as "
                    f"JSON: use dicts with text keys, lists, text, numbers, true, false and null; got {value!r:.200}"
                )


def _survives_json(value: Any) -> bool:
    try:
        written = json.dumps(value, allow_nan=False, ensure_ascii=False)
        return bool(json.loads(written) == value) and is_unicode(written)
    except (TypeError, ValueError, RecursionError):
        return False


def _asked(problem: Problem) -> tuple[str, str]:
    """What the model sees of a problem."""
    return problem.text, json.dumps(problem.tools) if problem.tools else ""


def _version(module: ModuleType, options: Any) -> str:
    """Changes with the module's code, its options and our helpers, any of which may change a verdict.

    `nemo_r3.failures.stamp` says which of them changed.
    """
    code = b"".join(_sources(Path(str(module.__file__))))
    return f"{_hash(code)} {_hash(repr(options).encode())} {HELPERS_VERSION}"


def _sources(path: Path) -> list[bytes]:
    """The code of a file, and of the files beside it that it imports, without comments and layout."""
    waiting = [path]
    found: dict[Path, bytes] = {}
    for file in waiting:  # grows
        source = file.read_bytes()
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # compiled
            found[file] = source
            continue
        found[file] = _written(tree).encode()
        beside = [file.with_name(f"{name}.py") for name in _imported(tree)]
        waiting += [other for other in beside if other not in waiting and other.is_file()]
    return list(found.values())


def _imported(tree: ast.AST) -> list[str]:
    """Every name that an import names, in order: of `from a.b import c` a, b and c."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            dotted = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            names += [part for name in dotted for part in name.split(".") if part]
    return names


def _written(node: Any) -> str:
    """Code without comments and layout; `ast.dump` and `ast.unparse` write it differently in every Python."""
    if isinstance(node, ast.AST):
        found = {name: value for name, value in ast.iter_fields(node) if value is not None and value != []}
        return f"{type(node).__name__}({', '.join(f'{name}={_written(value)}' for name, value in found.items())})"
    return f"[{', '.join(map(_written, node))}]" if isinstance(node, list) else repr(node)


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
