"""Reading safetensors: sharded files, and what is missing, cut or of another shape, in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nemo_r3.actor import weights
from nemo_r3.actor.weights import HFTensors, load_hf
from nemo_r3.errors import ConfigError
from nemo_r3.models import Architecture, names
from nemo_r3.models.rope import Rope

ARCH = Architecture("llama", 0, 4, 4, 2, 2, 2, 5, 64, 1e-6, Rope(1e4, 2), False)
TENSORS = {
    "model.embed_tokens.weight": torch.arange(20.0).reshape(5, 4),
    "model.norm.weight": torch.ones(4),
    "lm_head.weight": torch.arange(20.0, 40.0).reshape(5, 4),
}


class Bare(nn.Module):
    """A model without layers, under megatron-core's names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder, self.output_layer = nn.Module(), nn.Module(), nn.Module()
        self.embedding.word_embeddings = nn.Embedding(5, 4)
        self.decoder.final_layernorm = nn.RMSNorm(4)
        self.output_layer.weight = nn.Parameter(torch.zeros(5, 4))


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor-parallel rank, without process groups."""
    monkeypatch.setattr(weights.parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(weights.parallel_state, "get_tensor_model_parallel_world_size", lambda: 1)


def save(path: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    kept = {name: tensor for name, tensor in (TENSORS | changes).items() if tensor is not None}
    save_file(kept, path / "model.safetensors")
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_hf(Bare(), ARCH, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("alone")
def test_tensors_land_where_they_belong(tmp_path: Path) -> None:
    model = Bare()
    load_hf(model, ARCH, save(tmp_path, {}))
    assert torch.equal(model.embedding.word_embeddings.weight, TENSORS["model.embed_tokens.weight"])
    assert torch.equal(model.output_layer.weight, TENSORS["lm_head.weight"])


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_in_many_files_is_read_through_its_index(tmp_path: Path) -> None:
    files = {name: f"part-{number}.safetensors" for number, name in enumerate(TENSORS)}
    for name, file in files.items():
        save_file({name: TENSORS[name]}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    model = Bare()
    load_hf(model, ARCH, tmp_path)
    assert torch.equal(model.output_layer.weight, TENSORS["lm_head.weight"])
    (tmp_path / files["lm_head.weight"]).unlink()
    assert "part-2.safetensors cannot be read" in refusal(tmp_path)


@pytest.mark.usefixtures("alone")
def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    message = refusal(save(tmp_path, {"model.norm.weight": None}))
    assert message.startswith(f"model.path: {tmp_path} has no tensor 'model.norm.weight'")


@pytest.mark.usefixtures("alone")
def test_another_shape_is_told_with_both_shapes(tmp_path: Path) -> None:
    message = refusal(save(tmp_path, {"lm_head.weight": torch.zeros(7, 4)}))
    assert "lm_head.weight has shape (7, 4), config.json says (5, 4)" in message


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("query", "key"), [((3, 4), (4, 4)), ((6, 4), (2, 4)), ((4, 5), (4, 4))])
def test_projections_of_another_shape_are_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: tuple[int, int], key: tuple[int, int]
) -> None:
    """Also where their merged tensor would have the shape that is expected."""
    parts = {"q": query, "k": key, "v": (4, 4)}
    row = names.NameRow("qkv.weight", tuple(f"{part}_proj.weight" for part in parts), "qkv", 0)
    monkeypatch.setattr(weights.names, "rows", lambda arch: [row])
    monkeypatch.setattr(weights, "parameters_by_name", lambda *_: {"qkv.weight": nn.Parameter(torch.zeros(12, 4))})
    found = save(tmp_path, {f"{part}_proj.weight": torch.zeros(shape) for part, shape in parts.items()})
    assert f"q_proj.weight has shape {query}, config.json says (4, 4)" in refusal(found)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("size", [0, 20, 300])
def test_a_cut_file_is_named(tmp_path: Path, size: int) -> None:
    file = save(tmp_path, {}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert f"{file} cannot be read" in refusal(tmp_path)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("text", ["{cut", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    (save(tmp_path, {}) / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_no_safetensors_at_all_says_so(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match="has no model.safetensors .pickled weights are not read"):
        HFTensors(tmp_path)
