"""Transformer Engine's FP8 model has the parameters that loading, refit and export expect, on every pipeline stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from paper_models import few_experts, shape
from processes import run_script

from nemo_r3.models import Architecture, convert, names
from nemo_r3.models.names import full_shape, rows

pytest.importorskip("transformer_engine", reason="Transformer Engine cannot be imported", exc_type=ImportError)
pytestmark = pytest.mark.te

STAGES = Path(__file__).with_name("te_stages.py")
EXPERTS = Path(__file__).with_name("te_experts.py")


def stages(model: str, tensor_parallel: int, pipeline_parallel: int, precision: str) -> list[dict[str, Any]]:
    done = run_script(STAGES, model, tensor_parallel, pipeline_parallel, precision, fresh=True)
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def expected(arch: Architecture, number: int, tensor_parallel: int, pipeline_parallel: int) -> dict[str, list[int]]:
    """Parameters of the first rank of a stage: the name table's, cut."""
    here = {}
    for row in rows(arch):
        ends = {"embedding.word_embeddings.weight": 0}
        owner = row.layer // (arch.num_layers // pipeline_parallel) if row.layer is not None else None
        owner = ends.get(row.megatron, pipeline_parallel - 1) if owner is None else owner
        if owner == number:
            here[row.megatron] = list(names.part_shape(row, arch, tensor_parallel))
    if arch.tied and 0 < number == pipeline_parallel - 1:  # the last stage's copy
        here["output_layer.weight"] = [arch.padded_vocab(tensor_parallel) // tensor_parallel, arch.hidden_size]
    return here


def whole_tensors(arch: Architecture, tensor_parallel: int) -> dict[str, list[int]]:
    found = {}
    for row in rows(arch):
        whole = torch.empty(full_shape(row, arch, tensor_parallel), device="meta")
        found |= {name: list(part.shape) for name, part in zip(row.hf, convert.split(row, whole, arch), strict=True)}
    return found


@pytest.mark.parametrize(
    ("model", "tensor_parallel", "pipeline_parallel", "precision", "recipe"),
    [
        ("llama-3.1-70b", 8, 4, "fp8-blockwise", "Float8BlockScaling"),
        ("qwen2.5-1.5b", 2, 2, "fp8-tensorwise", "Float8CurrentScaling"),
        ("phi-3.5-mini", 1, 2, "fp8-delayed", "DelayedScaling"),
        ("qwen2-7b", 4, 1, "mxfp8", "MXFP8BlockScaling"),
    ],
)
def test_stages(model: str, tensor_parallel: int, pipeline_parallel: int, precision: str, recipe: str) -> None:
    arch = shape(model)
    found = stages(model, tensor_parallel, pipeline_parallel, precision)
    assert len(found) == pipeline_parallel
    bf16_layers, in_fp8 = [], [[], [], []]
    for number, one in enumerate(found):
        assert one["parameters"] == expected(arch, number, tensor_parallel, pipeline_parallel)
        assert one["export"] == whole_tensors(arch, tensor_parallel)
        assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in one["raw"]
        assert one["linear"].startswith("transformer_engine.pytorch.module.")
        assert one["attention"] == "SharedContextAttention"
        assert one["checkpoint"] == one["local_checkpoint"], "either of actor.layer_spec resumes from the other's"
        assert one["kept_copies"] == [4 * arch.num_layers // pipeline_parallel, 0]
        assert one["dtypes"] == ["torch.bfloat16"], "weights stay BF16; products are FP8"
        assert f"{recipe}," in one["recipe"]
        cut = {name for name in one["parameters"] if not name.endswith("norm.weight")}
        assert set(one["cut"]) == cut
        bf16_layers += one["bf16_layers"]
        in_fp8 = [before + now for before, now in zip(in_fp8, one["in_fp8"], strict=True)]
    assert bf16_layers == ([] if precision == "fp8-delayed" else [0, arch.num_layers - 1])
    assert sorted(bf16_layers + in_fp8[0]) == list(range(arch.num_layers))
    assert in_fp8[1:] == [[layer for layer in in_fp8[0] if layer != 1], []]
    if precision == "fp8-blockwise":
        assert "power_2_scale=False" in found[0]["recipe"], "what prepare() set came before the import"


@pytest.mark.parametrize(("tensor_parallel", "expert_parallel", "rank"), [(1, 1, 0), (2, 1, 1), (1, 4, 3), (2, 4, 5)])
def test_experts_have_the_names_of_the_table_and_the_checkpoints_of_the_local_layers(
    tensor_parallel: int, expert_parallel: int, rank: int
) -> None:
    done = run_script(EXPERTS, tensor_parallel, expert_parallel, rank, fresh=True)
    found, arch = json.loads(done.stdout.splitlines()[-1]), few_experts()
    assert (found["te"]["experts"], found["local"]["experts"]) == ("TEGroupedMLP", "SequentialMLP")
    whole = expert_parallel > 1  # experts are shared whole, or cut as all else
    expected = {
        row.megatron: list(names.part_shape(row, arch, 1 if row.expert is not None and whole else tensor_parallel))
        for alike in names.side_by_side(arch, expert_parallel)
        for row in alike[rank % len(alike) :][:1]  # of experts that rank's
    }
    for kind in ("te", "local"):
        assert found[kind]["parameters"] == expected, kind
    assert found["te"]["checkpoint"] == found["local"]["checkpoint"]


POLICIES = Path(__file__).with_name("te_policies.py")
EMBEDDED = POLICIES.parents[2] / "nemo_r3" / "assets" / "countdown_tiny"


@pytest.fixture(scope="module", params=[("one", 1), ("tp2", 2), ("dp2", 2)], ids=["one", "tp2", "dp2"])
def policies(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What policies in each precision found, at a layout, on a GPU that is pretended."""
    return launch(*request.param, tmp_path_factory.mktemp("te"))


def launch(layout: str, ranks: int, home: Path) -> dict[str, Any]:
    (home / "embedded").symlink_to(EMBEDDED)
    run_script(POLICIES, layout, home, ranks=ranks, fresh=True, TORCHDYNAMO_DISABLE="1")
    found: dict[str, Any] = json.loads((home / f"{layout}.json").read_text())["policies"]
    return found


def test_a_policy_lives_in_every_precision(policies: dict[str, Any]) -> None:
    for name, found in policies.items():
        assert found["resumed"], f"{name}: a resumed run is the run that was not stopped"
        assert found["recomputed"], f"{name}: recompute changes no bit of the first update"
        assert found["nan"] == {"skipped": 1.0, "unchanged": True}, name
        assert found["exported"] < 0.5, name
        assert found["gap"] < {"fp32": 1e-9, "bf16": 0.06}.get(name, 0.35), name
        assert {row["fp8"] for row in found["layers"]} == expected_fp8(name), name
        assert found["behind"] == [], f"{name}: an update leaves a tensor that would hold its memory"
        assert found["split"] == 0, f"{name}: a step of two updates is two steps, where the loss has only the policy"


def test_the_first_gradient_is_float32s(policies: dict[str, Any]) -> None:
    for name, found in policies.items():
        assert found["metrics"][0]["grad_norm"] == pytest.approx(found["exact"], rel=0.05), name


def test_products_are_in_the_dtype_that_was_asked_for(policies: dict[str, Any]) -> None:
    for name, found in policies.items():
        products, left = found["products"], found.get("left", {})
        if "fp8" not in name:
            assert not left and products.keys() <= {"bfloat16"}, name
        elif "fp8-delayed" in name:
            assert products.keys() == {"fp8"} and left["fp8"] == 3 * left["bfloat16"], name
        else:
            assert products["fp8"] == products["bfloat16"], f"{name}: two layers of four"
            assert left["bfloat16"] == 3 * left["fp8"], f"{name}: three of four, once one has left"


def expected_fp8(name: str) -> set[bool]:
    return {"fp8-delayed": {True}, "fp32": {False}, "bf16": {False}}.get(name.removesuffix("+lora"), {False, True})


def test_every_family_is_transformers(tmp_path: Path) -> None:
    for kind, found in launch("families", 1, tmp_path).items():
        (mean, most), routed = found["score"], "moe" in kind  # BF16 sends some tokens to other experts
        assert mean < 0.05 and (most < 0.25 or routed) and found["export"], kind
        ours, exact = found["norms"]
        assert ours == pytest.approx(exact, rel=0.02 if routed else 0.01), kind


def test_experts_on_two_ranks(tmp_path: Path) -> None:
    for layout, found in launch("experts", 2, tmp_path).items():
        assert found["resumed"] and found["nan"] == {"skipped": 1.0, "unchanged": True}, layout
        assert found["metrics"][0]["grad_norm"] == pytest.approx(found["exact"], rel=0.02), layout
        assert (found["left"], found["connected late"]) == (0, []), layout
