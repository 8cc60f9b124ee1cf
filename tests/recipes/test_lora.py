"""A run that trains LoRA, from mining's bank to its export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from launch import QUICKSTART, SMALL, lines, run
from safetensors.torch import load_file
from served import Served

from nemo_r3.models import EMBEDDED
from recipes.fault_injection import untimed


def test_a_run_resumes_from_its_factors_and_exports_their_sum_with_the_starting_weights(
    bank: Path, tmp_path: Path
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    settings = (QUICKSTART, *SMALL, f"failures.path={bank}", "train.steps=2", "train.save_every=1")
    settings += ("actor.lora_rank=4", "actor.lr=5e-4")
    run("train", *settings, f"run.dir={whole}")
    assert [line["kl"] > 0 for line in lines(whole / "metrics.jsonl")] == [False, True]
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step_000002")
    done = run("train", *settings, f"run.dir={resumed}")
    assert f"resuming after step 1 from {resumed}/checkpoints/step_000001" in done.stdout
    assert untimed(resumed / "metrics.jsonl") == untimed(whole / "metrics.jsonl")

    (resumed / "adapter").mkdir()
    (resumed / "adapter" / "notes.txt").write_text("mine")
    refused = run("export", *settings, f"run.dir={resumed}", succeed=False)
    assert refused.returncode == 2 and f"{resumed}/adapter holds something else than an export" in refused.stderr
    assert not (resumed / "export").exists()
    (resumed / "adapter" / "notes.txt").unlink()
    (resumed / "adapter").rmdir()
    (resumed / "adapter").symlink_to(resumed / "export")
    linked = run("export", *settings, f"run.dir={resumed}", succeed=False)
    assert linked.returncode == 2 and f"{resumed}/export and {resumed}/adapter are one directory" in linked.stderr
    assert not (resumed / "export").exists()
    (resumed / "adapter").unlink()
    run("export", *settings, f"run.dir={resumed}")
    exported, start = (load_file(path / "model.safetensors") for path in (resumed / "export", EMBEDDED))
    moved = {name for name in start if not exported[name].equal(start[name])}
    assert moved == {name for name in start if name.endswith("_proj.weight")}

    said = json.loads((resumed / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (4, 32, str(EMBEDDED))
    factors = load_file(resumed / "adapter" / "adapter_model.safetensors")
    for name in moved:
        a, b = (factors.pop(f"base_model.model.{name.removesuffix('.weight')}.lora_{end}.weight") for end in "AB")
        torch.testing.assert_close(start[name] + 8 * b @ a, exported[name], rtol=0, atol=1e-6)
    assert not factors
    card = (resumed / "adapter" / "README.md").read_text()
    assert "library_name: peft" in card and "library_name: transformers" in (resumed / "export/README.md").read_text()
    assert f"vllm serve {EMBEDDED} --enable-lora --max-lora-rank 8 --lora-modules trained=. --dtype float32" in card
    assert Served(card).two_tries("make 8", ("7", "think", "8")) == "8"
