"""Model families: one file each, from a Hugging Face config.json to an `Architecture`."""

from __future__ import annotations

from pathlib import Path

from nemo_r3.errors import ConfigError
from nemo_r3.models import llama, qwen2
from nemo_r3.models.architecture import Architecture, check_layout, read_hf_config
from nemo_r3.models.fingerprint import fingerprint
from nemo_r3.models.location import EMBEDDED, model_path

FAMILIES = (llama, qwen2)

__all__ = ["EMBEDDED", "Architecture", "architecture_of", "check_layout", "fingerprint", "model_path"]


def architecture_of(path: Path) -> Architecture:
    """Reads a checkpoint directory's config.json with the family that its class belongs to.

    Raises:
        ConfigError: no such checkpoint, no family for it, or a missing field.
    """
    hf = read_hf_config(path)
    classes = hf.get("architectures") or ["?"]
    for family in FAMILIES:
        if family.HF_CLASS in classes:
            try:
                return family.architecture(hf)
            except KeyError as error:
                raise ConfigError(f"model.path: {path}/config.json lacks {error.args[0]!r}") from error
    known = ", ".join(family.HF_CLASS for family in FAMILIES)
    raise ConfigError(f"model.path: {path} is a {classes[0]}; supported: {known}")
