"""`reference`: docs/config.md, written from the dataclasses."""

from __future__ import annotations

from dataclasses import MISSING, is_dataclass
from itertools import groupby
from typing import get_type_hints

from nemo_r3.config.schema import Leaf, describe, describe_limits, leaves, show
from nemo_r3.config.tree import Config

HEAD = """\
# Settings

Written by `python -m nemo_r3.config > docs/config.md`; a test keeps it up to date.

A YAML file and `key=value` arguments hold only what differs from these defaults. A file may start from another one
with `extends: other.yaml` (one parent, relative to the file; chains are fine). Where a file or the command line names
another task than the file it builds on, that file's `task.options` and `dialogue.task` are dropped; its
`dialogue.reflect` and `dialogue.retry` stay. Unknown keys, wrong types and values outside the limits are refused when
the config loads. A resumed run may change only the settings marked "resume".
"""

ROW = "| {} | {} | {} | {} | {} | {} |\n"


def reference() -> str:
    """Every setting, as Markdown."""
    sections = groupby(leaves(Config), key=lambda leaf: leaf.key.rpartition(".")[0])
    return HEAD + "".join(_section(name, list(members)) for name, members in sections)


def _section(name: str, members: list[Leaf]) -> str:
    schema = get_type_hints(Config).get(name)
    intro = f"\n## `{name}`\n\n{schema.__doc__}\n\n" if is_dataclass(schema) else "\n## Top level\n\n"
    head = ROW.format("key", "type", "default", "allowed", "resume", "what it is")
    return intro + head + ROW.format(*["---"] * 6) + "".join(_row(leaf) for leaf in members)


def _row(leaf: Leaf) -> str:
    limits = leaf.field.metadata
    resume = "resume" if limits["resume"] else ""
    allowed = describe_limits(limits)
    about = limits["help"].replace("<", "&lt;").replace("|", "\\|")
    return ROW.format(f"`{leaf.key}`", describe(leaf.type), f"`{_default(leaf)}`", allowed, resume, about)


def _default(leaf: Leaf) -> str:
    field = leaf.field
    return show(field.default if field.default_factory is MISSING else field.default_factory())
