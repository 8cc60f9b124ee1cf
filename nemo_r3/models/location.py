"""Where the starting checkpoint is: the embedded one, a directory, or a snapshot from the Hugging Face hub."""

from __future__ import annotations

import re
from functools import cache
from os.path import expanduser
from pathlib import Path
from typing import Any

from nemo_r3.config import Config
from nemo_r3.errors import ModelNotFoundError, describe
from nemo_r3.files import parse_json_object, read_json_object

EMBEDDED = Path(__file__).parents[1] / "assets" / "countdown_tiny"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")
"""The terms of use of a checkpoint, which go along with what is made of it."""
FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", *TERMS]
"""What is downloaded from the hub: weights (never pickled ones), configs, tokenizers and terms of use."""
HUB_SECONDS = 10
"""How long the hub may take to answer."""


def model_path(config: Config) -> Path:
    """The directory of the starting checkpoint that `model.path` names.

    A hub name is looked up in the local cache of huggingface_hub, and downloaded if it is not there; processes that ask
    together wait for one download.

    Raises:
        ModelNotFoundError: a hub name that is neither cached nor can be downloaded.
    """
    if (name := hub_name(config)) is not None:
        return _snapshot(name)
    return EMBEDDED if config.model.path == "embedded" else Path(expanduser(config.model.path))


def config_on_hub(name: str) -> dict[str, Any]:
    """The config.json of a model on the hub: of all its files, the only one that is downloaded.

    It is not added to the cache: alone there, it would pass for the whole checkpoint where there is no network.

    Raises:
        ModelNotFoundError: it is neither cached nor can be downloaded.
    """
    try:
        from huggingface_hub import hf_hub_url, try_to_load_from_cache  # slow, and only needed here
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status
    except ImportError as error:  # slurm.launch needs no more than submitit
        raise ModelNotFoundError(
            f"model.path: {name!r} is no directory here, and to ask the Hugging Face hub for its config.json takes "
            "`pip install huggingface-hub`"
        ) from error
    # the HTTP library's own error, whichever it is, and OSError are bases of the hub's
    errors: tuple[Any, ...] = (*HfHubHTTPError.__bases__, HFValidationError)
    try:
        if isinstance(cached := try_to_load_from_cache(name, "config.json"), str):
            return read_json_object(Path(cached), "model.path")
        # not hf_hub_download, which asks five times, for half a minute, where there is no network
        answer = get_session().get(hf_hub_url(name, "config.json"), headers=build_hf_headers(), timeout=HUB_SECONDS)
        hf_raise_for_status(answer)
        return parse_json_object(answer.text, f"model.path: config.json of {name}")
    except errors as error:
        raise _not_to_be_had(name, error) from error


def hub_name(config: Config) -> str | None:
    """`model.path`, if it names a model on the hub."""
    name = config.model.path
    return name if HUB_NAME.fullmatch(name) and not Path(expanduser(name)).exists() else None


@cache
def _snapshot(name: str) -> Path:
    from huggingface_hub import snapshot_download  # slow, and only needed here
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _not_to_be_had(name, error) from error


def _not_to_be_had(name: str, error: Exception) -> ModelNotFoundError:
    return ModelNotFoundError(
        f"model.path: {name!r} is no directory here, nor a model that the Hugging Face hub gives "
        f"({describe(error)}); download it where there is a network (hf download {name}), or name a directory; for "
        "recipes.plan a config.json will do, such as one of tests/shapes"
    )
