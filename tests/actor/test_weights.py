"""Reading safetensors: sharded files, and what is missing, cut or of another shape, in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from refusals import refusal
from safetensors.torch import save_file
from torch import nn

from nemo_r3.actor import weights
from nemo_r3.actor.weights import HFTensors, load_hf
from nemo_r3.errors import ConfigError
from nemo_r3.models import Architecture, convert, names, tensors
from nemo_r3.models.rope import Rope

ARCH = Architecture("llama", 0, 4, 4, 2, 2, 2, 5, 64, 1e-6, Rope(1e4, 2), False)
TENSORS = {
    "model.embed_tokens.weight": torch.arange(20.0).reshape(5, 4),
    "model.norm.weight": torch.ones(4),
    "lm_head.weight": torch.arange(20.0, 40.0).reshape(5, 4),
}


class Bare(nn.Module):
    """A model of which nothing is in its layer, under megatron-core's names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.decoder, self.output_layer = nn.Module(), nn.Module(), nn.Module()
        self.embedding.word_embeddings = nn.Embedding(5, 4)
        self.decoder.final_layernorm = nn.RMSNorm(4)
        self.output_layer.weight = nn.Parameter(torch.zeros(5, 4))
        self.decoder.layers = [SimpleNamespace(layer_number=1)]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor-parallel rank, without process groups."""
    monkeypatch.setattr(weights, "_sharing", lambda row: group_of(0, 1))


def group_of(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size)


def save(path: Path, changes: dict[str, torch.Tensor | None]) -> Path:
    kept = {name: tensor for name, tensor in (TENSORS | changes).items() if tensor is not None}
    save_file(kept, path / "model.safetensors")
    return path


def refused(path: Path) -> str:
    return refusal(lambda: load_hf(Bare(), ARCH, path))


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
    assert "part-2.safetensors cannot be read" in refused(tmp_path)


@pytest.mark.usefixtures("alone")
def test_a_missing_tensor_and_another_shape_are_named(tmp_path: Path) -> None:
    message = refused(save(tmp_path, {"model.norm.weight": None}))
    assert message.startswith(f"model.path: {tmp_path} has no tensor 'model.norm.weight'")
    message = refused(save(tmp_path, {"lm_head.weight": torch.zeros(7, 4)}))
    assert "lm_head.weight has shape (7, 4), config.json says (5, 4)" in message


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("query", "key"), [((3, 4), (4, 4)), ((6, 4), (2, 4)), ((4, 5), (4, 4))])
def test_projections_of_another_shape_are_named_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query: tuple[int, int], key: tuple[int, int]
) -> None:
    """Also where their merged tensor would have the shape that is expected."""
    parts = {"q": query, "k": key, "v": (4, 4)}
    row = names.NameRow("qkv.weight", tuple(f"{part}_proj.weight" for part in parts), (12, 4), "qkv", 0)
    monkeypatch.setattr(weights.names, "rows", lambda arch: [row])
    monkeypatch.setattr(weights, "parameters_by_name", lambda *_: {"qkv.weight": nn.Parameter(torch.zeros(12, 4))})
    found = save(tmp_path, {f"{part}_proj.weight": torch.zeros(shape) for part, shape in parts.items()})
    assert f"q_proj.weight has shape {query}, config.json says (4, 4)" in refused(found)


@pytest.mark.usefixtures("alone")
def test_a_cut_file_and_a_broken_index_are_named(tmp_path: Path) -> None:
    file = save(tmp_path, {}) / "model.safetensors"
    whole = file.read_bytes()
    for size in (0, 20, 300):
        file.write_bytes(whole[:size])
        assert f"{file} cannot be read" in refused(tmp_path)
    file.write_bytes(whole)
    for text in ("{cut", "{}", '{"weight_map": 3}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        assert "model.safetensors.index.json" in refused(tmp_path)


class Watched:
    """A safetensors file that notes how many numbers of each tensor are read."""

    opened: list[Path]
    read: dict[str, int]

    def __init__(self, path: Path, **how: Any) -> None:
        self._handle = OPEN(path, **how)
        self.opened.append(path)

    def get_slice(self, name: str) -> Any:
        self._slice, self._name = self._handle.get_slice(name), name
        return self

    def get_shape(self) -> list[int]:
        return self._slice.get_shape()

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor = self._slice[index]
        self.read[self._name] = self.read.get(self._name, 0) + tensor.numel()
        return tensor


OPEN = tensors.safe_open


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    Watched.opened, Watched.read = [], {}
    monkeypatch.setattr(tensors, "safe_open", Watched)
    return Watched


@pytest.mark.parametrize("fused", [False, True])
def test_a_rank_reads_its_own_part_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, watched: type[Watched], fused: bool
) -> None:
    arch = replace(ARCH, num_layers=4, qkv_bias=True, qk_norm=True, fused=fused)
    whole = saved_in_parts(tmp_path, arch)
    ranks: list[dict[str, nn.Parameter]] = []
    for rank in range(2):
        ranks.append(
            {row.megatron: nn.Parameter(torch.empty(names.part_shape(row, arch, 2))) for row in names.rows(arch)}
        )
        monkeypatch.setattr(weights, "parameters_by_name", lambda *_, rank=rank: ranks[rank])
        monkeypatch.setattr(weights, "_sharing", lambda row, rank=rank: group_of(rank, 2))
        load_hf(nn.Module(), arch, tmp_path)
    for row in names.rows(arch):
        parts = [rank[row.megatron].detach() for rank in ranks]
        full = convert.join(row, parts[0] if row.cut is None else torch.cat(parts), 2)
        for name, tensor in zip(row.hf, convert.split(row, full, arch), strict=True):
            assert torch.equal(tensor, whole[name])
            assert watched.read[name] == whole[name].numel() * (2 if row.cut is None else 1)  # by both ranks
    assert len(watched.opened) == 2 * 2 * 3, "each rank opens each file to check it, and again to read it"
    assert str(tmp_path) not in Path("/proc/self/maps").read_text(), "no file stays open"


def saved_in_parts(path: Path, arch: Architecture) -> dict[str, torch.Tensor]:
    """A random checkpoint in three files: what comes before the layers, the layers, what comes after them."""
    whole: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    for row in names.rows(arch):
        for name, tensor in zip(
            row.hf, convert.split(row, torch.randn(names.full_shape(row, arch, 1)), arch), strict=True
        ):
            whole[name] = tensor.clone()
            files[name] = "layers" if row.layer is not None else row.megatron.split(".")[0]
    files = {name: {"embedding": "1", "layers": "2"}.get(file, "3") + ".safetensors" for name, file in files.items()}
    for file in set(files.values()):
        save_file({name: whole[name] for name in whole if files[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return whole


def test_no_safetensors_at_all_says_so(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match="has no model.safetensors .pickled weights are not read"):
        HFTensors(tmp_path)
