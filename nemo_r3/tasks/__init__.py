"""Verifiable tasks: one module each, found by name.

A task module, here or the user's own, has

    Options                       a dataclass: the settings under `task.options`
    WORDING: Wording              its own words for the three user turns
    PLACEHOLDERS: tuple[str, ...] the {names} that the wording of the task turn may use
    build(options, wording)       -> Task

Importing this package needs neither torch nor the network.
"""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import replace
from types import ModuleType
from typing import cast

from nemo_r3.config.schema import Layer, build
from nemo_r3.config.task import DialogueConfig, TaskConfig
from nemo_r3.errors import ConfigError
from nemo_r3.tasks.protocol import Task, Wording
from nemo_r3.tasks.template import unknown_placeholders

CONTRACT = ("Options", "WORDING", "PLACEHOLDERS", "build")


def load(task: TaskConfig, dialogue: DialogueConfig) -> Task:
    """The task that the configuration names, with its options and wording.

    Example: ``load(TaskConfig("countdown", {"size": 1000, "test_size": 100}), DialogueConfig())``

    Args:
        task: `name` is a module of nemo_r3.tasks or the dotted path of a user's module.
        dialogue: None in it means the task's own wording.

    Raises:
        ConfigError: unknown task, option or {placeholder}, or a value that is not allowed.
        UserError: the task's data cannot be read.
    """
    module = find(task.name)
    options = build(module.Options, [Layer(task.options)], "task.options")
    return cast(Task, module.build(options, read_wording(module, dialogue)))


def find(name: str) -> ModuleType:
    """The module of a task.

    Raises:
        ConfigError: there is no such module, or it is not a task.
    """
    path = name if "." in name else f"{__name__}.{name}"
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name is None or not (path == error.name or path.startswith(f"{error.name}.")):
            raise
        raise ConfigError(f"task.name: no task is called {name!r}; {_known()}") from None
    missing = [part for part in CONTRACT if not hasattr(module, part)]
    if missing:
        raise ConfigError(f"task.name: {name!r} is not a task: {path} lacks {', '.join(missing)}; {_known()}")
    return module


def _known() -> str:
    names = [info.name for info in pkgutil.iter_modules(__path__)]
    known = [name for name in names if hasattr(importlib.import_module(f"{__name__}.{name}"), "build")]
    return f"known: {', '.join(known)}, or the dotted path of your own module"


def read_wording(module: ModuleType, dialogue: DialogueConfig) -> Wording:
    """The task's wording with what `dialogue` replaces.

    Raises:
        ConfigError: `dialogue.task` holds a {placeholder} that the task does not fill.
    """
    given = {name: getattr(dialogue, name) for name in ("task", "reflect", "retry")}
    wording: Wording = replace(module.WORDING, **{name: text for name, text in given.items() if text is not None})
    unknown = unknown_placeholders(wording.task, module.PLACEHOLDERS)
    if unknown:
        known = ", ".join(f"{{{name}}}" for name in module.PLACEHOLDERS)
        raise ConfigError(f"dialogue.task: unknown placeholder {{{unknown[0]}}} in {wording.task!r}; known: {known}")
    return wording
