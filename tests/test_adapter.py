"""LoRA's adapter: what PEFT's readers make of its files is the merged model, of families that fuse matrices, too.

The launch runs this file: `python test_adapter.py HOME KIND`.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import VOCAB, make_checkpoint
from processes import run_script
from refusals import refusal
from safetensors.torch import load_file, save_file

from nemo_r3.adapter import export_adapter, largest_rank, peft_config, peft_tensors
from nemo_r3.config import Config
from nemo_r3.models import Architecture, architecture_of, names

KINDS = ("llama", "phi3_short")
RANK = 4


def config_of() -> Config:
    config = Config()
    config.actor.lora_rank, config.actor.lora_alpha = RANK, 6.0
    return config


def trained(arch: Architecture) -> dict[str, torch.Tensor]:
    """Factors as `Lora.whole` gives them, as if they had been trained for long."""
    torch.manual_seed(3)
    factors = {}
    for row in names.rows(arch):
        for name, (rows, columns) in names.matrices(row, arch):
            factors |= {f"{name}.lora_A": torch.randn(RANK, columns), f"{name}.lora_B": 0.03 * torch.randn(rows, RANK)}
    return factors


def merged(start: dict[str, torch.Tensor], factors: dict[str, torch.Tensor], arch: Architecture) -> dict[str, Any]:
    """The weights with each matrix's own product added, by their Hugging Face names."""
    found = dict(start)
    for row in names.rows(arch):
        changes = [factors[f"{name}.lora_B"] @ factors[f"{name}.lora_A"] for name, _ in names.matrices(row, arch)]
        if len(changes) > len(row.hf):
            changes = [torch.cat(changes)]
        found |= {name: start[name] + 1.5 * change for name, change in zip(row.hf, changes, strict=False)}
    return found


def export(home: Path, kind: str, config: Config, factors: dict[str, torch.Tensor], main: bool = True) -> Path:
    lora = SimpleNamespace(whole=lambda world: factors)
    world = SimpleNamespace(on_main=lambda act: act() if main else None)
    policy: Any = SimpleNamespace(lora=lora, world=world, config=config, arch=architecture_of(home / kind))
    export_adapter(policy, home / kind, home / "run" / "adapter", "org/base", "a card")
    return home / "run" / "adapter"


def sum_with(adapter: Path, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What PEFT makes of an adapter: W + alpha / r * B A, with r and alpha as their patterns have them."""
    said = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    found = dict(start)
    for name in start:
        module = name.split(".")[-2]
        if module in said["target_modules"]:
            a, b = (tensors.pop(f"base_model.model.{name.removesuffix('.weight')}.lora_{end}.weight") for end in "AB")
            rank = said["rank_pattern"].get(module, said["r"])
            assert len(a) == b.shape[1] == rank
            found[name] = start[name] + said["alpha_pattern"].get(module, said["lora_alpha"]) / rank * b @ a
    assert not tensors
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("adapter")
    for kind in KINDS:
        make_checkpoint(place / kind, kind)
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_starting_weights_and_adapter_are_the_merged_model(home: Path, kind: str) -> None:
    arch = architecture_of(home / kind)
    factors, start = trained(arch), load_file(home / kind / "model.safetensors")
    found = sum_with(export(home, kind, config_of(), factors), start)
    for name, expected in merged(start, factors, arch).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6)
        assert found[name].equal(start[name]) != name.endswith("_proj.weight")


def test_what_peft_is_told(home: Path) -> None:
    arch = architecture_of(home / "llama")
    said = peft_config(peft_tensors(trained(arch), arch), config_of(), "org/base")
    assert said == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "org/base",
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    assert isinstance(said["lora_alpha"], int)
    assert largest_rank(config_of(), arch) == 4


def test_a_fused_tensor_has_the_rank_of_all_its_matrices_at_the_same_scale(home: Path) -> None:
    arch, config = architecture_of(home / "phi3_short"), config_of()
    config.actor.lora_alpha = 2.5
    said = peft_config(peft_tensors(trained(arch), arch), config, "org/base")
    assert said["rank_pattern"] == {"qkv_proj": 12, "gate_up_proj": 8}
    assert (said["lora_alpha"], said["alpha_pattern"]) == (2.5, {"qkv_proj": 7.5, "gate_up_proj": 5})
    assert said["target_modules"] == ["down_proj", "gate_up_proj", "o_proj", "qkv_proj"]
    assert largest_rank(config, arch) == 12


def test_an_adapter_is_written_whole_with_the_terms_of_its_model(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "llama", tmp_path / "llama")
    (tmp_path / "llama" / "LICENSE.txt").write_text("be nice")
    (tmp_path / "own.jinja").write_text("own")
    factors, config = trained(architecture_of(home / "llama")), config_of()
    place = tmp_path / "disk" / "adapter"
    for left in (place, place.with_name("adapter.writing"), place.with_name("adapter.replaced")):
        left.mkdir(parents=True)
        (left / "old").write_text("of earlier exports, of which some were killed")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter").symlink_to(place)
    config.dialogue.chat_template = str(tmp_path / "own.jinja")
    adapter = export(tmp_path, "llama", config, factors)
    files = {"adapter_model.safetensors", "adapter_config.json", "README.md", "LICENSE.txt", "chat_template.jinja"}
    assert {file.name for file in adapter.iterdir()} == files
    assert len({file.stat().st_mode for file in adapter.iterdir()}) == 1
    assert (adapter / "chat_template.jinja").read_text() == "own"
    assert adapter.is_symlink() and {path.name for path in place.parent.iterdir()} == {"adapter"}

    config.dialogue.chat_template = str(tmp_path / "gone")
    message = refusal(lambda: export(tmp_path, "llama", config, factors))
    assert f"cannot write {place}" in message and "free some space" in message
    assert {path.name for path in place.parent.iterdir()} == {"adapter"}
    assert {file.name for file in adapter.iterdir()} == files, "the earlier one"


def test_rank_0_alone_writes_what_it_alone_has(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "llama", tmp_path / "llama")
    assert not export(tmp_path, "llama", config_of(), {}, main=False).exists()


# a server


def serve(home: Path, kind: str) -> None:
    """Writes gap.json: how far vLLM is from the merged model's log-probabilities with the adapter, and without it."""
    from nemo_r3.rollout import environment

    config = config_of()
    config.model.path = str(home / kind)
    environment.prepare(config, on_cuda=False)
    from transformers import AutoModelForCausalLM
    from vllm import LLM, SamplingParams
    from vllm.config.lora import MaxLoRARanks
    from vllm.lora.request import LoRARequest

    from nemo_r3.model_card import SERVED_RANKS

    draw = random.Random(0)
    prompts = [[draw.randrange(VOCAB) for _ in range(length)] for length in range(1, 40, 4)]
    engine = {"max_model_len": 64, "dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    engine |= {"enable_lora": True, "max_lora_rank": 16, "kv_cache_memory_bytes": 2**26, "max_logprobs": VOCAB}
    llm = LLM(str(home / kind), **engine)
    model = AutoModelForCausalLM.from_pretrained(home / "merged", dtype=torch.float32)
    asked = SamplingParams(max_tokens=1, temperature=0.0, logprobs=VOCAB, detokenize=False)
    gaps = []
    for request in (LoRARequest("trained", 1, str(home / "run" / "adapter")), None):
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        answers = llm.generate(given, asked, use_tqdm=False, lora_request=request)
        gap = 0.0
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            ours = {token: found.logprob for token, found in answer.outputs[0].logprobs[0].items()}
            gap = max(gap, *(abs(logprob - expected[token].item()) for token, logprob in ours.items()))
        gaps.append(gap)
    ranks = list(MaxLoRARanks.__args__) == list(SERVED_RANKS)
    (home / "gap.json").write_text(json.dumps({"with": gaps[0], "without": gaps[1], "ranks": ranks}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_serves_starting_model_and_adapter_as_the_merged_one(home: Path, kind: str) -> None:
    arch = architecture_of(home / kind)
    factors, start = trained(arch), load_file(home / kind / "model.safetensors")
    export(home, kind, config_of(), factors)
    shutil.copytree(home / kind, home / "merged", dirs_exist_ok=True)
    save_file(merged(start, factors, arch), home / "merged" / "model.safetensors", metadata={"format": "pt"})
    run_script(Path(__file__), home, kind)
    found = json.loads((home / "gap.json").read_text())
    assert found["with"] < 1e-4 < 0.1 < found["without"]
    assert found["ranks"], "those that vLLM takes"


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
