"""Verifiable tasks: one module each, found by name.

A task module, here or the user's own, has two functions,

    problems(split)        -> the Problems of "train" or "test", in a fixed order; problems(split, options) with Options
    verify(problem, text)  -> True or False

and may have

    Options                a dataclass: the settings under `task.options`
    WORDING: Wording       its own words for the three user turns; {problem} is a problem's text

A task that words its own problems has, instead of the functions,

    build(options, wording)       -> Task
    Options, WORDING              as above
    PLACEHOLDERS: tuple[str, ...] the {names} that the wording of the task turn may use

Importing this package needs neither torch nor the network.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from nemo_r3.config.schema import Layer, build, can_be_set, leaves, show
from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.errors import ConfigError
from nemo_r3.tasks.protocol import Task, Wording
from nemo_r3.tasks.template import unknown_placeholders
from nemo_r3.tasks.user_code import user_code
from nemo_r3.tasks.user_task import PLACEHOLDERS, UserTask

BUILT = ("Options", "WORDING", "PLACEHOLDERS", "build")
FUNCTIONS = ("problems", "verify")
TOOLS_PLACEHOLDERS = ("tools", "task")
LATER_PLACEHOLDERS = ("task",)


def load(task: TaskConfig, dialogue: DialogueConfig) -> Task:
    """The task that the configuration names, with its options and wording.

    Example: ``load(TaskConfig("countdown", {"size": 1000, "test_size": 100}), DialogueConfig())``

    Args:
        task: `name` is countdown, function_calling or the dotted path of a user's module.
        dialogue: None in it means the task's own wording.

    Raises:
        ConfigError: unknown task, option or {placeholder}, or a value that is not allowed.
        UserError: the task's data cannot be read, or its module or verifier does not work.
    """
    module = find(task.name)
    options = read_options(module, task)
    wording = read_wording(module, dialogue)
    if hasattr(module, "build"):
        with user_code(f"{task.name}.build", "; it must give a task"):
            return cast(Task, module.build(options, wording))
    return UserTask(module, options, wording)


def find(name: str) -> ModuleType:
    """The module of a task: one of this package, else one that Python finds, from the working directory on.

    Raises:
        ConfigError: there is no such module, or it is not a task.
        UserError: it cannot be imported.
    """
    module = None
    if re.fullmatch(r"\w+(\.\w+)*", name):
        module = _import(f"{__name__}.{name}" if name in _own() else name)
    if module is None:
        raise ConfigError(f"task.name: no task is called {name!r}{_near(name)} {_known()}")
    wanted = BUILT if hasattr(module, "build") else FUNCTIONS
    missing = [part for part in wanted if not hasattr(module, part)]
    if missing:
        raise ConfigError(
            f"task.name: {name!r} is not a task: {module.__name__} lacks {', '.join(missing)}; {_known()}"
        )
    return module


def _import(path: str) -> ModuleType | None:
    with user_code(f"importing {path}", f"; `python -c 'import {path}'` must work"):
        try:
            return importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
                raise
    return None


def _known() -> str:
    return f"known: {', '.join(_own())}, or the dotted path of your own module, as seen from the working directory"


def _own() -> list[str]:
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    return [name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "build")]


def _near(name: str) -> str:
    """A hint at the task that was meant: one of this package, or a file: "./sorting.py" means "sorting"."""
    *folders, leaf = name.removesuffix(".py").removeprefix("./").replace("/", ".").split(".")
    files = [".".join([*folders, file.stem]) for file in sorted(Path(*folders).glob("*.py"))]
    near = get_close_matches(".".join([*folders, leaf]), [*_own(), *files], n=1)
    return f"; did you mean {near[0]}?" if near else ";"


def read_options(module: ModuleType, task: TaskConfig) -> Any:
    """The task's options as an object of the module's Options; None where it has none.

    Raises:
        ConfigError: an option that is unknown, missing or not allowed.
        UserError: the module's Options cannot be used.
    """
    if hasattr(module, "Options"):
        if isinstance(module.Options, type) and not is_dataclass(module.Options):
            raise ConfigError(f"task.name: {module.__name__}.Options is no dataclass: write @dataclass above it")
        with user_code(f"{module.__name__}.Options", "; it must be a dataclass of text, numbers, lists and mappings"):
            if fixed := [leaf for leaf in leaves(module.Options) if not can_be_set(leaf.type)]:
                raise ConfigError(
                    f"task.name: {module.__name__}.Options.{fixed[0].key} is of type {fixed[0].type}, of which YAML "
                    "has no values: use str, int, float, bool, list[...] or dict[str, ...] of these, or None beside "
                    "one; for a choice, option(choices=...)"
                )
            return build(module.Options, [Layer(task.options)], "task.options")
    if task.options:
        raise ConfigError(f"task.options: {task.name} has no options, got {show(task.options)}")
    return None


def read_wording(module: ModuleType, dialogue: DialogueConfig) -> Wording:
    """The task's wording with what `dialogue` replaces.

    Raises:
        ConfigError: a {placeholder} that nothing fills, or one that the task turn or `dialogue.tools_text` lacks; or a
            WORDING that is none.
    """
    given = {name: getattr(dialogue, name) for name in ("task", "reflect", "retry")}
    own = module.WORDING if hasattr(module, "WORDING") else Wording()
    if not isinstance(own, Wording) or not all(isinstance(text, str) for text in vars(own).values()):
        raise ConfigError(
            f"task.name: {module.__name__}.WORDING must be a nemo_r3.tasks.protocol.Wording of texts, got {show(own)}"
        )
    wording = replace(own, **{name: text for name, text in given.items() if text is not None})
    places = {
        name: f"task.name: {module.__name__}.WORDING" if text is None else f"dialogue.{name}"
        for name, text in given.items()
    }
    if hasattr(module, "build"):
        _check_placeholders(places["task"], wording.task, module.PLACEHOLDERS, needed=())
    else:
        _check_placeholders(places["task"], wording.task, PLACEHOLDERS, needed=PLACEHOLDERS)
    for name in ("reflect", "retry"):
        _check_placeholders(places[name], getattr(wording, name), LATER_PLACEHOLDERS, needed=())
    _check_placeholders("dialogue.tools_text", dialogue.tools_text, TOOLS_PLACEHOLDERS, needed=TOOLS_PLACEHOLDERS)
    return wording


def _check_placeholders(place: str, text: str, placeholders: Sequence[str], needed: Sequence[str]) -> None:
    if unknown := unknown_placeholders(text, placeholders):
        known = ", ".join(f"{{{name}}}" for name in placeholders)
        raise ConfigError(f"{place}: unknown placeholder {{{unknown[0]}}} in {text!r}; known: {known}")
    for name in needed:
        if f"{{{name}}}" not in text:
            raise ConfigError(f"{place}: {{{name}}} is missing in {show(text)}")
