"""Model families: one file each, from a Hugging Face config.json to an `Architecture`."""

from __future__ import annotations

from pathlib import Path

from nemo_r3.errors import ConfigError, in_one_line
from nemo_r3.models import llama, mistral, phi3, qwen2, qwen3
from nemo_r3.models.architecture import Architecture, check_layout, read_hf_config
from nemo_r3.models.fingerprint import fingerprint
from nemo_r3.models.location import EMBEDDED, model_path

FAMILIES = (llama, mistral, phi3, qwen2, qwen3)

__all__ = [
    "EMBEDDED",
    "Architecture",
    "architecture_of",
    "check_layout",
    "fingerprint",
    "model_path",
]


def architecture_of(path: Path) -> Architecture:
    """Reads a config.json, or that of a checkpoint directory, with the family that its class belongs to.

    Raises:
        ConfigError: no such checkpoint, no family for it, or a field that is missing or cannot be used.
    """
    hf = read_hf_config(path)
    classes = hf.get("architectures") or ["?"]
    if not isinstance(classes, list):
        raise ConfigError(f"model.path: {path}: architectures={in_one_line(repr(classes))} is no list of classes")
    for family in FAMILIES:
        if family.HF_CLASS in classes:
            try:
                return family.architecture(hf)
            except KeyError as error:
                raise ConfigError(f"model.path: config.json of {path} lacks {error.args[0]!r}") from error
            except ConfigError as error:
                raise ConfigError(f"model.path: config.json of {path}: {error}") from error
    known = ", ".join(family.HF_CLASS for family in FAMILIES)
    raise ConfigError(f"model.path: {path} is a {classes[0]}; supported: {known}")
