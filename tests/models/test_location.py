"""A starting checkpoint is found where its name says, on disk or in the hub's cache."""

import shutil
from pathlib import Path

import pytest

from nemo_r3.config import Config
from nemo_r3.errors import ConfigError
from nemo_r3.models import EMBEDDED, architecture_of, model_path

REVISION = "0123456789012345678901234567890123456789"


def located(name: str) -> Path:
    config = Config()
    config.model.path = name
    return model_path(config)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_directory_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert located("embedded") == EMBEDDED
    assert located("/nowhere/at/all") == Path("/nowhere/at/all")
    assert located("org/model") == Path("org/model")


def test_a_hub_name_is_found_in_the_cache(hub: Path) -> None:
    home = hub / "models--org--tiny"
    shutil.copytree(EMBEDDED, home / "snapshots" / REVISION)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(REVISION)
    assert architecture_of(located("org/tiny")) == architecture_of(EMBEDDED)


def test_a_hub_name_that_is_not_to_be_had_says_what_to_do(hub: Path) -> None:
    with pytest.raises(ConfigError, match="model.path: 'org/gone' is no directory.*hf download org/gone"):
        located("org/gone")
