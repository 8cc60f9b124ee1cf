"""Model families: one file each, from a Hugging Face config.json to an `Architecture`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_r3.config import Config
from nemo_r3.errors import ConfigError, in_one_line
from nemo_r3.models import llama, mistral, phi3, qwen2, qwen3, qwen3_moe, smollm3
from nemo_r3.models.architecture import Architecture, check_layout, read_hf_config
from nemo_r3.models.fingerprint import fingerprint
from nemo_r3.models.location import EMBEDDED, config_on_hub, hub_name, model_path

FAMILIES = (llama, mistral, phi3, qwen2, qwen3, qwen3_moe, smollm3)

__all__ = [
    "EMBEDDED",
    "Architecture",
    "architecture_of",
    "check_layout",
    "fingerprint",
    "hub_name",
    "model_path",
    "planned_architecture",
]


def architecture_of(path: Path) -> Architecture:
    """Reads a config.json, or that of a checkpoint directory, with the family that its class belongs to.

    Raises:
        ConfigError: no such checkpoint, no family for it, or a field that is missing or cannot be used.
    """
    return _read(read_hf_config(path), str(path))


def planned_architecture(config: Config) -> Architecture:
    """The architecture of `model.path` before its weights are there: of a hub name only config.json is downloaded.

    Raises:
        ConfigError: see `architecture_of`, and a hub name that the hub does not give.
    """
    if (name := hub_name(config)) is not None:
        return _read(config_on_hub(name), name)
    return architecture_of(model_path(config))


def _read(hf: Mapping[str, Any], place: str) -> Architecture:
    classes = hf.get("architectures") or ["?"]
    if not isinstance(classes, list):
        raise ConfigError(f"model.path: {place}: architectures={in_one_line(repr(classes))} is no list of classes")
    for family in FAMILIES:
        if family.HF_CLASS in classes:
            try:
                return family.architecture(hf)
            except KeyError as error:
                raise ConfigError(f"model.path: config.json of {place} lacks {error.args[0]!r}") from error
            except ConfigError as error:
                raise ConfigError(f"model.path: config.json of {place}: {error}") from error
    known = ", ".join(family.HF_CLASS for family in FAMILIES)
    raise ConfigError(f"model.path: {place} is a {classes[0]}; supported: {known}")
