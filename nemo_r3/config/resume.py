"""`differing`: the settings that two configs do not share; `diff_for_resume`: those that a resumed run must."""

from __future__ import annotations

from typing import Any

from nemo_r3.config.schema import Leaf, leaves, show
from nemo_r3.config.tree import Config


def diff_for_resume(old: Config, new: Config) -> list[str]:
    """The forbidden differences between a run's config and the one it is resumed with: "key: old -> new".

    Settings marked `resume=True` (layout, train.steps, paths, logging) may differ.
    """
    return [
        f"{leaf.key}: {show(before)} -> {show(after)}"
        for leaf, before, after in differing(old, new)
        if not leaf.field.metadata["resume"]
    ]


def differing(old: Config, new: Config) -> list[tuple[Leaf, Any, Any]]:
    """The settings whose values differ, with both values."""
    compared = [(leaf, leaf.of(old), leaf.of(new)) for leaf in leaves(Config)]
    return [(leaf, before, after) for leaf, before, after in compared if before != after]
