"""`diff_for_resume`: the settings that a resumed run may not change."""

from __future__ import annotations

from functools import reduce
from typing import Any

from nemo_r3.config.schema import leaves, show
from nemo_r3.config.tree import Config


def diff_for_resume(old: Config, new: Config) -> list[str]:
    """The forbidden differences between a run's config and the one it is resumed with: "key: old -> new".

    Settings marked `resume=True` (layout, train.steps, paths, logging) may differ.
    """
    fixed = [leaf.key for leaf in leaves(Config) if not leaf.field.metadata["resume"]]
    pairs = [(key, _get(old, key), _get(new, key)) for key in fixed]
    return [f"{key}: {show(before)} -> {show(after)}" for key, before, after in pairs if before != after]


def _get(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)
