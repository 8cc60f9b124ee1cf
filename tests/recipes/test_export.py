"""What the verb chooses; what it writes is in tests/test_export.py, whole exports in test_verbs.py and test_lora.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from families import TINY

from nemo_r3.config import Config
from nemo_r3.models import architecture_of
from recipes.export import base_name, probe_of


@pytest.mark.parametrize(
    ("path", "directory", "name"),
    [
        ("org/tiny", "snapshots/0a1b2c", "org/tiny"),
        ("/models/tiny", "/models/tiny", "tiny"),
        ("/runs/first/export", "/runs/first/export", "first"),
        ("export", "export", Path.cwd().name),
    ],
)
def test_a_card_names_the_starting_model_as_people_know_it(path: str, directory: str, name: str) -> None:
    config = Config()
    config.model.path = path
    assert base_name(config, Path(directory)) == name


def test_the_probe_is_what_the_run_sampled(tmp_path: Path) -> None:
    hf = TINY | {"architectures": ["LlamaForCausalLM"], "vocab_size": 50, "max_position_embeddings": 20}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    arch = architecture_of(tmp_path)
    drawn = probe_of(tmp_path, arch)
    assert drawn == probe_of(tmp_path, arch)
    assert {len(ids) for ids in drawn} == {20}
    assert all(0 <= token < 50 for ids in drawn for token in ids)
    (tmp_path / "rollouts").mkdir()
    for step in (2, 1):
        first = {"context_ids": [step] * 99}
        rows = [{"problem_id": n // 2, "reflection_ids": [n, 9]} | ({} if n % 2 else first) for n in range(40)]
        lines = [json.dumps(row) for row in rows]
        (tmp_path / "rollouts" / f"step_{step:06d}.jsonl").write_text("\n".join(lines) + "\n")
    assert probe_of(tmp_path, arch) == [[1] * 62 + [2 * problem + 1, 9] for problem in range(8)]
    first_step = tmp_path / "rollouts" / "step_000001.jsonl"
    first_step.write_text(first_step.read_text().replace("9]", "50]"))  # damaged: the model has no such token
    assert probe_of(tmp_path, arch) == drawn
