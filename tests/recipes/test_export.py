"""Where an export goes; what is written there is in tests/test_export.py, and whole exports in test_verbs.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from refusals import refusal

from nemo_r3.config import Config
from recipes import checkpoints
from recipes import export as recipe


def test_lora_needs_a_place_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "adapter").symlink_to(tmp_path / "export")
    setup = SimpleNamespace(
        config=Config(),
        arch="tiny",
        model=tmp_path / "model",
        world=SimpleNamespace(broadcast=lambda value: value, on_main=lambda act: act()),
        run=SimpleNamespace(path=tmp_path, checkpoints=tmp_path / "checkpoints"),
    )
    setup.config.actor.lora_rank = 8
    monkeypatch.setattr(recipe, "join", lambda argv, trains: setup)
    monkeypatch.setattr(recipe, "export_problem", lambda arch, host_bytes: None)
    monkeypatch.setattr(checkpoints, "trained", lambda _: Path("step_000004"))
    said = refusal(lambda: recipe.export([]))
    assert said.startswith(f"{tmp_path}/export and {tmp_path}/adapter are one directory")
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]
