"""Where the starting checkpoint is: the embedded one, a directory, or a snapshot from the Hugging Face hub."""

from __future__ import annotations

import re
from functools import cache
from os.path import expanduser
from pathlib import Path

from nemo_r3.config import Config
from nemo_r3.errors import ConfigError

EMBEDDED = Path(__file__).parents[1] / "assets" / "countdown_tiny"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
"""What is downloaded from the hub: weights (never pickled ones), configs and tokenizers."""


def model_path(config: Config) -> Path:
    """The directory of the starting checkpoint that `model.path` names.

    A hub name is looked up in the local cache of huggingface_hub, and downloaded if it is not there; processes that ask
    together wait for one download.

    Raises:
        ConfigError: a hub name that is neither cached nor can be downloaded.
    """
    name = config.model.path
    path = Path(expanduser(name))
    if name == "embedded":
        return EMBEDDED
    return _snapshot(name) if HUB_NAME.fullmatch(name) and not path.exists() else path


@cache
def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow, and only needed here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"model.path: {name!r} is no directory here, nor a model that the Hugging Face hub gives "
            f"({type(error).__name__}: {str(error).strip().splitlines()[0]}); download it where there is a network "
            f"(hf download {name}), or name a directory"
        ) from error
