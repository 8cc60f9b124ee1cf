"""Model families: one file each, from a Hugging Face config.json to an `Architecture`."""

from __future__ import annotations

from pathlib import Path

from nemo_r3.config import Config
from nemo_r3.errors import ConfigError
from nemo_r3.models import llama, qwen2
from nemo_r3.models.architecture import Architecture, check_layout, read_hf_config
from nemo_r3.models.fingerprint import fingerprint

FAMILIES = (llama, qwen2)
EMBEDDED = Path(__file__).parents[1] / "assets" / "countdown_tiny"

__all__ = ["Architecture", "architecture_of", "check_layout", "fingerprint", "model_path"]


def model_path(config: Config) -> Path:
    """The directory of the starting checkpoint; 'embedded' is the one shipped with nemo_r3."""
    return EMBEDDED if config.model.path == "embedded" else Path(config.model.path).expanduser()


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
