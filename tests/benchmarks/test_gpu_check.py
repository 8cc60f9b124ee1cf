"""The checks of `make gpu-check` at tiny size, and what the runner makes of those that fail."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from paper_models import shape
from processes import program

from benchmarks.gpu_check import attention, fusions, training
from benchmarks.gpu_check.__main__ import CHECKS, MEMORY, Check, row, run
from benchmarks.gpu_check.update import SHAPES, config_of, distance
from nemo_r3.actor import fused, head
from nemo_r3.capacity import OWN_BYTES, size_of
from nemo_r3.models import architecture_of
from nemo_r3.plan import activation_bytes
from nemo_r3.units import GIB

CPU = torch.device("cpu")


def test_a_check_runs_in_its_own_process() -> None:
    result = run(Check("attention", "benchmarks.gpu_check.attention", ("torch",), 120), "cpu", small=True)
    assert result["status"] == "ok", result
    assert result["found"]["error_actor"] < 1e-5 and result["found"]["ms_actor"] > 0


def test_a_failed_a_late_and_an_impossible_check_say_why() -> None:
    failed = run(Check("a", "benchmarks.no_such_module", (), 60), "cpu", small=True)
    assert failed["status"] == "failed" and "no_such_module" in failed["reason"]
    late = run(Check("b", "benchmarks.gpu_check.attention", (), 0.2), "cpu", small=True)
    assert late["status"] == "failed" and "stopped after 0.2 s" in late["reason"]
    absent = run(Check("c", "benchmarks.gpu_check.attention", ("no_such.package",), 60), "cpu", small=True)
    assert absent == {"status": "skipped", "seconds": 0.0, "reason": "not installed: no_such.package"}


def test_a_check_is_skipped_where_its_gpu_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, "nvidia-smi", "echo 81559\necho 143771")  # MiB of an H100 and an H200
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = Check("e", "benchmarks.no_such_module", (), 60, memory=120)
    skipped = run(check, "cuda", small=False)
    assert skipped == {"status": "skipped", "seconds": 0.0, "reason": "needs 120 GiB on a GPU, found 80"}
    assert run(check, "cpu", small=False)["status"] == run(check, "cuda", small=True)["status"] == "failed"
    program(tmp_path, "nvidia-smi", "echo '[N/A]'")  # as it answers on GPUs that share the host's memory
    assert run(check, "cuda", small=False)["status"] == "failed"


def test_a_check_that_fails_midway_says_what_it_had_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "midway.py").write_text("import sys; open(sys.argv[4], 'w').write('{\"ratio\": 0.5}'); sys.exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    failed = run(Check("d", "midway", (), 60), "cpu", small=True)
    assert failed["status"] == "failed" and failed["found"] == {"ratio": 0.5}
    line = row("d", failed)
    assert "ratio 0.5" in line and "exit code 3" in line


def test_the_mask_is_what_a_row_per_reflection_sees() -> None:
    point = attention.Point(5, 4, 3, 2)
    rows = attention.rows_of(point, 512)
    mask = attention.mask_of(attention.layout_of(point, CPU))
    assert len(mask) == sum(len(row) - 1 - row.shared for row in rows) + point.context * point.groups
    pairs = sum(sum(range(row.shared + 1, len(row))) for row in rows) + point.groups * sum(range(point.context + 1))
    assert int(mask.sum()) == pairs


def test_a_wrong_attention_is_seen() -> None:
    layout = attention.layout_of(attention.SMALL, CPU)
    tensors = attention.draws(layout.positions.numel(), attention.TINY, CPU, torch.float32)
    causal = attention.Layout((0, len(layout.positions)), (), layout.positions)
    assert attention.errors(attention.actor(causal, tensors[0]), attention.masked(layout), tensors) > 0.1


def test_an_update_is_measured_against_float32() -> None:
    checks = {check.name: check for check in CHECKS}
    reference = run(checks["8b-fp32"], "cpu", small=True)["found"]
    assert reference["sequences"] == 8 and reference["grad_norm"] > 0
    found = run(checks["8b-bf16"], "cpu", small=True)["found"]
    assert 1 < found["prob_error"] < 1.05 and found["tokens_per_second"] > 0 and found["speed/update_tflops"] > 0
    assert 0 < found["grad_norm_error"] < 0.05
    assert "speed/update_mfu" not in found, "the peak of a CPU is not known"


def test_so_is_one_of_lora_of_a_model_with_experts() -> None:
    """At first LoRA's B are zeros: log-probabilities are those of the starting weights, gradients B's alone."""
    checks = {check.name: check for check in CHECKS}
    assert all(("--lora" in check.arguments) == name.endswith("-lora") for name, check in checks.items())
    reference = run(checks["moe-fp32-lora"], "cpu", small=True)["found"]
    assert reference["sequences"] == 8 and reference["grad_norm"] > 0
    found = run(checks["moe-bf16-lora"], "cpu", small=True)["found"]
    assert 1 < found["prob_error"] < 1.05 and found["tokens_per_second"] > 0 and found["peak"] == 0
    assert 0 < found["grad_norm_error"] < 0.05


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_experts_fit_the_gpu_that_they_are_measured_on(precision: str, tmp_path: Path) -> None:
    """By the arithmetic of a plan, at most an 80 GB one, of which nvidia-smi tells 79.6 GiB."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["moe"] | {"architectures": ["Qwen3MoeForCausalLM"]}))
    config, arch = config_of(precision), architecture_of(tmp_path)
    tokens = config.actor.microbatch_tokens
    held = size_of(config, arch, 1).at_work + activation_bytes(config, arch, tokens, trained=tokens)
    assert held + OWN_BYTES < MEMORY["moe"] * GIB < 79.6 * GIB
    real = shape("qwen3-30b-a3b")
    assert replace(arch, num_layers=48, max_positions=real.max_positions, rope=real.rope, norm_eps=1e-6) == real


def test_a_change_to_the_kernels_is_measured_and_taken_back() -> None:
    checks = {check.name: check for check in CHECKS}
    found = run(checks["8b-bf16-fusions"], "cpu", small=True)["found"]
    changes = {"swiglu", "head_chunk_26", "head_chunk_27", "head_chunk_29"}
    assert {name.removeprefix("ratio_") for name in found if name.startswith("ratio_")} == changes
    assert all(found[f"ratio_{change}"] > 0 for change in changes)
    assert found["moved_head_chunk_26"] == 0 < found["moved_swiglu"] < 0.1
    assert found["grad_norm_head_chunk_26"] == 0 < found["grad_norm_swiglu"] < 0.01


def test_every_change_of_a_gpu_is_made_and_taken_back() -> None:
    layer, config = SimpleNamespace(fuse_wgrad_accumulation=True), SimpleNamespace(bias_activation_fusion=True)
    module = SimpleNamespace(config=config, modules=lambda: [layer, object()])
    policy = SimpleNamespace(module=module, world=SimpleNamespace(device=torch.device("cuda")))

    def state() -> dict[str, object]:
        return {
            "swiglu": config.bias_activation_fusion,
            "main_grad": layer.fuse_wgrad_accumulation,
            "eager": fused._compiled,
            "keep_memory": torch.cuda.empty_cache,
            "head_chunk": head.CHUNK_ELEMENTS["cuda"],
        }

    before, seen = state(), set()
    for name, change in fusions.changes(policy).items():  # type: ignore[arg-type]
        for _ in range(2):
            with change():
                [changed] = [key for key, value in state().items() if value != before[key]]
                assert name.startswith(changed)
            assert state() == before
        seen.add(changed)
    assert seen == set(before)


def test_distance_is_that_of_the_tokens() -> None:
    found = distance([[-1.0, -2.0], [-3.0]], [[-1.0, -2.1], [-3.0]])
    assert found["largest_gap"] == pytest.approx(0.1)
    assert found["prob_error"] == pytest.approx((2 + 2.718281828**0.1) / 3)


@pytest.mark.parametrize("shape", ["8b-full", pytest.param("moe", marks=pytest.mark.slow)])
def test_engine_and_actor_agree_before_and_behind_a_refit(shape: str) -> None:
    checks = {check.name: check for check in CHECKS}
    found = run(checks[f"rollout-{shape}"], "cpu", small=True)["found"]
    assert 1 < found["prob_error"] < 1.01 and 1 < found["prob_error_after"] < 1.01
    assert found["tokens_per_second"] > 0 and found["refit_seconds"] > 0 and found["freed_gib"] == 0


@pytest.mark.parametrize("what", ["update", "training"])
def test_a_precision_that_cannot_run_here_is_skipped_with_the_reason(what: str) -> None:
    check = Check("fp8", f"benchmarks.gpu_check.{what}", (), 120, ("--precision", "fp8-blockwise"))
    skipped = run(check, "cpu", small=True)
    assert skipped["status"] == "skipped" and skipped["reason"].startswith("actor.precision=fp8-blockwise needs an")


@pytest.mark.slow
def test_a_training_says_how_it_went() -> None:
    checks = {check.name: check for check in CHECKS}
    found = run(checks["training-bf16"], "cpu", small=True)["found"]
    assert found["steps"] == 2 and 1 < found["prob_error"] < 1.05 and found["skipped_updates"] == 0


@pytest.mark.slow
def test_a_training_that_gives_up_has_failed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="token_mult_prob_error was above"):
        training.run("bf16", True, tmp_path, "train.mismatch_stop=1", "train.max_mismatch_steps=1")


def test_a_trainings_summary_is_of_its_first_and_last_steps() -> None:
    line = {"skipped": 0.0, "time/rollout": 2.0, "time/update": 1.0, "time/refit": 0.5, "token_mult_prob_error": 1.01}
    lines = [line | {"retry_success": step / 100, "loss": None if step == 99 else float(step)} for step in range(100)]
    found = training.summary(lines)
    assert (found["first_retry_success"], found["retry_success"]) == pytest.approx((0.095, 0.895))
    assert found["plus_minus"] == pytest.approx(1.96 * 0.0591608 / 20**0.5, rel=1e-5)
    assert found["loss"] == pytest.approx(88.5), "a step without an update has none"
