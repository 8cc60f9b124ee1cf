"""`load`: a YAML file, the files it extends and `key=value` arguments, made into a `Config`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from io import StringIO
from os.path import expanduser
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_r3.config.checks import check
from nemo_r3.config.schema import Layer, build, show
from nemo_r3.config.task import TaskConfig
from nemo_r3.config.tree import Config
from nemo_r3.errors import ConfigError

USAGE = (
    "name a config file, then settings: CONFIG.yaml key=value ..., as in `python -m recipes.train "
    "configs/quickstart.yaml run.dir=runs/mine train.steps=10`; docs/config.md lists all settings"
)
OF_A_TASK = (("task", "options"), ("dialogue", "task"))
"""Sections and keys that belong to one task: its options, and its wording with {placeholders}."""
UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError, KeyError, AttributeError)
"""What reading YAML raises; PyYAML the last two, at `!!bool 3` and `!!timestamp x`."""


def load(argv: Sequence[str]) -> Config:
    """The config of a command line `[CONFIG.yaml, key=value, ...]`.

    Defaults, then the file that CONFIG.yaml `extends:`, then CONFIG.yaml, then the arguments; empty `run.dir` and
    `failures.path` are filled in. If one of these names another task than those before it, their settings for that
    earlier task are dropped, see `OF_A_TASK`.

    Raises:
        ConfigError: in one line, what is wrong and what is allowed.
    """
    if not argv or (("=" in argv[0] or argv[0].startswith("-")) and not Path(argv[0]).is_file()):
        raise ConfigError(USAGE + (f"; got {show(argv[0])}" if argv else ""))
    path = Path(argv[0])
    places = [*([layer] for layer in _files(path)), [_override(argument) for argument in argv[1:]]]
    config = build(Config, _of_one_task(places))
    _fill(config, path)
    check(config)
    return config


def to_yaml(config: Config) -> str:
    """The whole config as YAML, which `load` reads back to the same."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def _fill(config: Config, path: Path) -> None:
    """Fills in settings whose default follows from others, and ~ in paths."""
    config.run.dir = expanduser(config.run.dir) or str(Path("runs", path.stem))
    config.failures.path = expanduser(config.failures.path) or str(Path(config.run.dir, "failures"))
    config.train.start_from = expanduser(config.train.start_from)
    config.evaluate.checkpoint = expanduser(config.evaluate.checkpoint)
    if config.dialogue.chat_template is not None:
        config.dialogue.chat_template = expanduser(config.dialogue.chat_template)


def _files(path: Path, children: tuple[Path, ...] = ()) -> list[Layer]:
    """A file's settings, after those of the files that it extends."""
    if path.resolve() in [child.resolve() for child in children]:
        raise ConfigError(f"{children[-1]}: `extends` goes in a circle: " + " -> ".join(map(str, [*children, path])))
    values = _read(path, f"; {children[-1]} extends it" if children else "")
    parent = values.pop("extends", None)
    layer = Layer(values, f"{path}: ")
    if parent is None:
        return [layer]
    if not isinstance(parent, str) or not parent:
        raise ConfigError(f"{path}: extends: expected the path of one YAML file, got {show(parent)}")
    return [*_files(path.parent / parent, (*children, path)), layer]


def _of_one_task(places: Sequence[Sequence[Layer]]) -> list[Layer]:
    """The layers of all places in order, without settings for a task other than the one named last."""
    named: list[tuple[str, Layer]] = []
    task = ""  # none yet
    for layers in places:
        sections = [layer.values["task"] for layer in layers if isinstance(layer.values.get("task"), dict)]
        names = [section["name"] for section in sections if "name" in section]
        task = names[-1] if names else task or (TaskConfig().name if sections else "")
        named += [(task, layer) for layer in layers]
    return [layer if name in ("", task) else _without_task(layer) for name, layer in named]


def _without_task(layer: Layer) -> Layer:
    """The layer without what is `OF_A_TASK`."""
    values = dict(layer.values)
    for section, key in OF_A_TASK:
        if isinstance(values.get(section), dict):
            values[section] = {name: value for name, value in values[section].items() if name != key}
    return replace(layer, values=values)


def _read(path: Path, named_by: str) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = get_close_matches(path.name.removesuffix(".yaml"), [file.stem for file in path.parent.glob("*.yaml")])
        meant = f"; did you mean {path.with_name(f'{near[0]}.yaml')}?" if near else ""
        raise ConfigError(f"{path}: no such config file{named_by}{meant}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text{named_by}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}{named_by}") from None
    try:
        values = OmegaConf.to_container(OmegaConf.load(StringIO(text)), resolve=False)
    except UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: broken YAML: {_reason(error)}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections and keys, as in `train: {{steps: 10}}`")
    return values


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if type(error) in (KeyError, AttributeError):
        return "a value is not what its !!type says"
    return getattr(error, "problem", None) or str(error).partition("\n")[0]


def _override(argument: str) -> Layer:
    """One `key=value` argument; the value is YAML without comments, and no value is empty text."""
    key, equals, value = argument.partition("=")
    if not equals or not re.fullmatch(r"[\w-]+(\.[\w-]+)*", key):
        raise ConfigError(f"{show(argument)}: expected key=value without spaces, as in train.steps=10")
    try:
        comment = _comment(value)
        tree = OmegaConf.from_dotlist([f"{key}={value}" if value else f"{key}=''"])
    except UNREADABLE as error:
        raise ConfigError(f"{show(argument)}: the value is broken YAML: {_reason(error)}") from None
    if comment:
        raise ConfigError(f"{show(argument)}: YAML reads {show(comment)} as a comment; put quotes inside the value")
    values = OmegaConf.to_container(tree, resolve=False)
    assert isinstance(values, dict)
    return Layer(values)


def _comment(value: str) -> str:
    """What YAML would drop as a comment at the end of a value."""
    ends = [token.end_mark.index for token in yaml.scan(value) if token.end_mark.index > token.start_mark.index]
    return value[max(ends, default=0) :].strip()
