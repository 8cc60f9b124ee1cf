"""All verbs on the embedded model: real megatron-core, real vLLM, a few steps."""

from __future__ import annotations

import html
import importlib.metadata
import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from launch import QUICKSTART, ROOT, SMALL, lines, run, start
from safetensors.torch import load_file
from served import Served

from nemo_r3 import signals
from nemo_r3.actor.manifest import latest
from nemo_r3.config import load
from nemo_r3.dialogue import Dialogue
from nemo_r3.models import EMBEDDED
from nemo_r3.results import rates
from nemo_r3.tasks import load as load_task
from nemo_r3.types import Phase, Problem, Segment, Trajectory
from recipes.fault_injection import untimed


def settings(bank: Path, path: Path, *more: str) -> tuple[str, ...]:
    places = (f"failures.path={bank}", f"run.dir={path}")
    return (QUICKSTART, *SMALL, *places, "train.steps=4", "train.save_every=2", "evaluate.every=2", *more)


def dialogue() -> Dialogue:
    from transformers import AutoTokenizer

    config = load([QUICKSTART])
    task = load_task(config.task, config.dialogue)
    return Dialogue(AutoTokenizer.from_pretrained(EMBEDDED), config.dialogue, task.wording)


def test_the_bank_holds_only_failures_with_ids_and_text(bank: Path) -> None:
    rows = [row for shard in sorted(bank.glob("shard_*.jsonl")) for row in lines(shard)]
    assert len(rows) > 100
    turns = dialogue()
    config = load([QUICKSTART])
    task = load_task(config.task, config.dialogue)
    by_id = {problem.id: problem for problem in task.problems("train")}
    for row in rows[:50]:
        problem = by_id[row["problem_id"]]  # held-out problems are never mined
        assert not task.verify(problem, row["attempt"])
        assert turns.decode(row["attempt_ids"]) == row["attempt"]
        assert tuple(row["task_ids"]) == turns.task(problem).segments[0].ids


def test_a_bank_that_is_complete_is_said_so_without_an_engine(bank: Path, tmp_path: Path) -> None:
    done = run("mine", QUICKSTART, *SMALL, f"failures.path={bank}", f"run.dir={tmp_path}/run")
    assert [line for line in done.stdout.splitlines() if line.startswith(str(bank))]
    assert "starting vLLM" not in done.stdout and not (tmp_path / "run").exists()


def test_every_step_is_logged_once_with_the_promised_fields(trained: Path) -> None:
    logged = lines(trained / "metrics.jsonl")
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    promised = "loss grad_norm reward retry_success token_mult_prob_error groups_used groups_dropped reflection_solves"
    promised += " retries_truncated attempts_truncated time/rollout time/update time/refit"
    for line in logged:
        assert set(promised.split()) <= line.keys()
        assert all(0.1 < line[f"memory/{phase}_rss"] < 64 for phase in ("rollout", "update", "refit"))  # GiB
        assert line["groups_used"] + line["groups_dropped"] == 8
        assert line["groups_used"] > 0 and line["grad_norm"] > 0


def test_a_run_that_gives_up_leaves_its_report_and_its_last_update(bank: Path, tmp_path: Path) -> None:
    """Such a learning rate breaks the model at once."""
    settings = (QUICKSTART, *SMALL, f"failures.path={bank}", f"run.dir={tmp_path}/run")
    ended = run("train", *settings, "actor.lr=0.1", "train.steps=6", "train.max_empty_steps=1", succeed=False)
    assert ended.returncode == 2 and "1 steps in a row had no group whose rewards differ" in ended.stderr
    last = lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert 1 < last < 6 and f"report: {tmp_path}/run/report.html" in ended.stdout
    assert (tmp_path / "run" / "checkpoints" / f"step_{last:06d}" / "manifest.json").exists()


def test_every_metric_is_explained(trained: Path) -> None:
    explained = (ROOT / "docs" / "metrics.md").read_text()
    for name in lines(trained / "metrics.jsonl")[-1].keys() - {"step"}:
        phase = name.startswith(("time/", "memory/"))
        assert phase or f"`{name}`" in explained, name


def test_the_actor_agrees_with_vllm_on_every_step(trained: Path) -> None:
    """Step 1 before any update, later ones after updates and refits: a stale weight or cache would show."""
    logged = lines(trained / "metrics.jsonl")
    assert all(abs(line["token_mult_prob_error"] - 1) < 1e-4 for line in logged)
    assert logged[-1]["kl"] > 0  # the weights did move


def test_rollouts_hold_whole_turns_and_their_verdicts(trained: Path) -> None:
    config = load([QUICKSTART])
    task, turns = load_task(config.task, config.dialogue), dialogue()
    by_id = {problem.id: problem for problem in task.problems("train")}
    (end,) = turns.end_of_turn
    for step in (1, 4):
        rows = lines(trained / "rollouts" / f"step_{step:06d}.jsonl")
        assert len(rows) == 64
        for row in rows:
            assert row["reward"] == float(task.verify(by_id[row["problem_id"]], row["retry"]))
            assert row["reflection_ids"].count(end) == int(row["finish_reason"] == "stop")
            assert row["finish_reason"] != "stop" or row["reflection_ids"][-1] == end
            assert len(row["reflection_logprobs"]) == len(row["reflection_ids"])
            assert row["weights_version"] == step - 1
            assert row["reflection_solves"] == task.verify(by_id[row["problem_id"]], row["reflection"])
            assert row["retry_ids"].count(end) == int(row["retry_finish_reason"] == "stop")


def test_the_summary_has_before_and_after(trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    for when in ("before", "after"):
        for name in ("first_try", "retry_success_fixed", "within_two"):
            for mode in ("sampled", "greedy"):
                found = summary[when][name][mode]
                assert found["low"] <= found["value"] <= found["high"]
                assert 0 < found["n"] <= 24
        assert summary[when]["within_two_resampled"]["sampled"]["n"] == 24
        second, donor, adds = (
            summary[when][name]["sampled"] for name in ("retry_success_fixed", "retry_success_donor", "content_adds")
        )
        assert second["n"] == donor["n"] == adds["n"] > 1
        assert adds["value"] == pytest.approx(second["value"] - donor["value"], abs=2e-4)
        assert {"reflection_solves", "attempts_truncated", "retries_truncated"} <= summary[when].keys()
    assert summary["before"] != summary["after"]
    verdicts = json.loads((trained / "verdicts.json").read_text())
    for name, asked in (("within_two", verdicts["problems"]), ("retry_success_fixed", verdicts["failures"])):
        before, after = (verdicts[when][name]["sampled"] for when in ("before", "after"))
        assert len(before) == len(after) == len(asked)
        found = summary["difference"][name]["sampled"]
        assert found["value"] == pytest.approx((sum(after) - sum(before)) / len(asked), abs=1e-4)
        assert found["low"] <= found["value"] <= found["high"]
    assert {"rollout", "update", "refit"} <= summary["seconds"].keys()
    assert summary["versions"]["torch"] == importlib.metadata.version("torch")
    assert Path(summary["export"]).is_dir()


HELD_OUT = {
    "held_out/first_try": "first_try",
    "held_out/second_try": "retry_success_fixed",
    "held_out/within_two": "within_two",
}


def test_training_measures_what_evaluation_does(trained: Path) -> None:
    first, second, third, fourth = lines(trained / "metrics.jsonl")
    before = json.loads((trained / "summary.json").read_text())["before"]
    assert {name: first[name] for name in HELD_OUT} == {
        name: before[it]["sampled"]["value"] for name, it in HELD_OUT.items()
    }
    assert HELD_OUT.keys() <= third.keys() and third["time/held_out"] > 0
    assert not [name for line in (second, fourth) for name in line if "held_out" in name]


@pytest.mark.slow
def test_a_checkpoint_is_measured_as_in_training(trained: Path, bank: Path, tmp_path: Path) -> None:
    """The second one from another directory, as docs/training.md has it."""
    checkpoint = trained / "checkpoints" / "step_000002"
    run("evaluate", str(trained / "config.yaml"), f"run.dir={tmp_path}/two", f"evaluate.checkpoint={checkpoint}")
    after = json.loads((tmp_path / "two" / "summary.json").read_text())["after"]
    third = lines(trained / "metrics.jsonl")[2]
    assert {name: third[name] for name in HELD_OUT} == {
        name: after[it]["sampled"]["value"] for name, it in HELD_OUT.items()
    }


def test_an_evaluation_keeps_its_dialogues(trained: Path) -> None:
    config = load([QUICKSTART])
    task = load_task(config.task, config.dialogue)
    by_id = {problem.id: problem for problem in task.problems("test")}
    verdicts = json.loads((trained / "verdicts.json").read_text())
    rows = lines(trained / "evaluation.jsonl")
    for when, step in (("before", 0), ("after", 4)):
        own = [row for row in rows if row["step"] == step]
        assert [row["problem_id"] for row in own] == verdicts["failures"]
        assert [row["retry_passed"] for row in own] == verdicts[when]["retry_success_fixed"]["sampled"]
        for row in own:
            assert row["weights_version"] == step and not task.verify(by_id[row["problem_id"]], row["attempt"])
            assert row["retry_passed"] == task.verify(by_id[row["problem_id"]], row["retry"])
    assert len(rows) == 2 * len(verdicts["failures"])


def test_the_report_shows_what_was_written_and_what_was_measured(trained: Path, bank: Path) -> None:
    of_evaluate = (trained / "report.html").read_text()
    assert run("report", *settings(bank, trained)).stdout == f"report: {trained}/report.html\n"
    summary = json.loads((trained / "summary.json").read_text())
    best = max(lines(trained / "rollouts" / "step_000004.jsonl"), key=lambda row: row["advantage"])
    for page in map(html.unescape, (of_evaluate, (trained / "report.html").read_text())):
        assert "4 of 4 steps" in page and all(cell in page for row in rates(summary) for cell in row)
        assert best["reflection"] in page and best["retry"] in page
        assert "second try on a failure: " in page and "Second tries on the starting model's failures" in page


def test_an_answer_limit_that_is_too_low_is_seen(tmp_path: Path) -> None:
    done = run("evaluate", QUICKSTART, "evaluate.problems=8", "rollout.max_answer_tokens=6", f"run.dir={tmp_path}/run")
    assert "warning: 100% of the first answers were cut at rollout.max_answer_tokens=6" in done.stderr
    assert f"no checkpoint in {tmp_path}/run: measuring the starting model only" in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for turns in ("attempts", "retries"):
        assert summary["before"][f"{turns}_truncated"]["sampled"]["value"] == 1.0
    assert "after" not in summary and "difference" not in summary, "there is no checkpoint"
    assert "after" not in json.loads((tmp_path / "run" / "verdicts.json").read_text())


def test_evaluation_reads_the_checkpoint_before_it_measures(trained: Path, bank: Path, tmp_path: Path) -> None:
    """A run on its way would remove the checkpoint while the starting model is measured."""
    path = tmp_path / "damaged"
    shutil.copytree(trained, path)
    file = max((path / "checkpoints" / "step_000004").glob("__*.distcp"), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[:-1])
    done = run("evaluate", *settings(bank, path), succeed=False)
    assert done.returncode == 2 and f"{file.name} has" in done.stderr, done.stderr
    assert "loading the model" in done.stdout and "starting vLLM" not in done.stdout


def test_the_export_generates_with_transformers(trained: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(trained / "export")
    tokenizer = AutoTokenizer.from_pretrained(trained / "export")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Use the numbers 1, 2, 3 to make 6."}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    ids = prompt["input_ids"] if hasattr(prompt, "keys") else prompt
    sampled = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    assert sampled[-1] == tokenizer.eos_token_id
    base = load_file(EMBEDDED / "model.safetensors")
    assert any(
        not torch.equal(tensor, base[name])
        for name, tensor in load_file(trained / "export" / "model.safetensors").items()
    )


def test_the_exports_card_asks_for_a_retry_as_training_did(trained: Path) -> None:
    from transformers import AutoTokenizer

    text, tokenizer, turns = (
        (trained / "export" / "README.md").read_text(),
        AutoTokenizer.from_pretrained(trained / "export"),
        dialogue(),
    )
    assert "--dtype float32 --max-model-len 256 --generation-config vllm\n" in text
    card = Served(text)
    groups = [row for row in lines(trained / "rollouts" / "step_000001.jsonl") if "attempt" in row]
    same = []
    for row in groups:
        card.requests.clear()
        assert card.two_tries(row["problem"], (row["attempt"], row["reflection"], row["retry"])) == row["retry"]
        assert {(request["temperature"], request["max_tokens"]) for request in card.requests} == {(1.0, 24)}
        failed = Segment(Phase.ATTEMPT, tuple(row["context_ids"]), version=0)
        reflected = Segment(Phase.REFLECTION, tuple(row["reflection_ids"]), version=0)
        problem = Problem("", row["problem"], {})
        retry = turns.retry(turns.reflect(Trajectory((failed,)), problem).then(reflected), problem)
        assert turns.whole(retry.ids) == card.prompt(2, tokenizer)
        same.append(tokenizer.encode(card.prompt(2, tokenizer), add_special_tokens=False) == retry.ids)
    assert sum(same) >= 0.9 * len(groups) > 0, "a model seldom writes a text in other tokens"


def test_a_finished_run_says_so_without_a_model_and_logs_nothing(trained: Path, bank: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    (trained / "curve.png").unlink()
    done = run("train", *settings(bank, trained))
    first, finished, report, best, last = done.stdout.splitlines()
    assert first.startswith(f"run.dir={trained}  model.path=embedded")
    assert finished == "step 4 of train.steps=4 is done: nothing to train"
    assert report == f"report: {trained}/report.html" and (trained / "curve.png").exists()
    assert best.startswith("best second try on held-out problems: 0.")
    assert last.startswith("done: retry success ") and f"next: python -m recipes.evaluate {QUICKSTART} " in last
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_kill_a_damaged_checkpoint_a_lost_bank_and_a_request_to_stop_cost_nothing_but_time(
    trained: Path, bank: Path, tmp_path: Path
) -> None:
    """Killed, the run goes on from its last sound checkpoint and mines again, by the starting weights; then SIGUSR1."""
    path, own = tmp_path / "run", tmp_path / "bank"
    shutil.copytree(bank, own)
    process = start("train", *settings(own, path, "train.save_every=1"))
    until(path / "checkpoints" / "step_000002" / "manifest.json", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    newest = latest(path / "checkpoints")
    assert newest is not None and newest.name < "step_000004"
    largest = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    (own / "shard_00000.jsonl").unlink()
    (path / "rollouts" / "step_000003.jsonl").unlink(missing_ok=True)

    process = start("train", *settings(own, path, "train.save_every=4"))
    until(path / "rollouts" / "step_000003.jsonl", process)
    process.send_signal(signal.SIGUSR1)
    told, _ = process.communicate(timeout=300)
    assert process.returncode == signals.STOPPED, told
    assert "loading the model: 0.6M parameters" in told and "starting vLLM" in told
    assert f"warning: {newest} is damaged: {largest.name} has other content" in told
    assert "stopped by SIGUSR1" in told
    assert (path / "checkpoints" / "step_000003" / "manifest.json").exists()  # between two saves
    assert newest.with_name(f"damaged_{newest.name}").exists() and not largest.exists()
    assert (own / "shard_00000.jsonl").read_bytes() == (bank / "shard_00000.jsonl").read_bytes()

    run("train", *settings(own, path, "train.save_every=4"))
    assert untimed(path / "metrics.jsonl") == untimed(trained / "metrics.jsonl")
    for step in (3, 4):
        name = f"rollouts/step_{step:06d}.jsonl"
        assert (path / name).read_text() == (trained / name).read_text()


def until(file: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while not file.exists():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(
            8,
            ("actor.tensor_parallel=2", "actor.pipeline_parallel=2", "rollout.tensor_parallel=2"),
            marks=pytest.mark.slow,
            id="tp2_pp2_dp2_engines_of_2",
        ),
        pytest.param(
            4,
            ("actor.tensor_parallel=2", "actor.sequence_parallel=true", "train.save_in_background=true"),
            id="tp2_dp2_sp",
        ),
    ],
)
def test_another_layout_resumes_trains_and_exports_the_same(
    trained: Path, bank: Path, tmp_path: Path, ranks: int, layout: tuple[str, ...]
) -> None:
    """From one process's checkpoint at step 2, several ranks repeat steps 3 and 4."""
    path = tmp_path / "other"
    shutil.copytree(trained, path)
    shutil.rmtree(path / "checkpoints" / "step_000004")
    shutil.rmtree(path / "export")
    done = run("train", *settings(bank, path, *layout), ranks=ranks)
    said = " ".join(line for line in done.stdout.splitlines() if line.startswith("step    4/4  "))
    used = lines(path / "metrics.jsonl")[-1]["groups_used"]
    assert f"  groups {used}/8  kl 0." in said and said.endswith(" s/step"), "of all ranks"
    for ours, theirs in zip(untimed(path / "metrics.jsonl"), untimed(trained / "metrics.jsonl"), strict=True):
        for key in ("reward", "groups_used", "reflection_tokens", *HELD_OUT):
            assert ours.get(key) == theirs.get(key)
        for key in ("loss", "grad_norm", "kl"):
            assert math.isclose(ours[key], theirs[key], rel_tol=1e-4, abs_tol=1e-6), (key, ours, theirs)
    run("export", *settings(bank, path, *layout), "train.keep_checkpoints=9", ranks=ranks)
    assert "keep_checkpoints: 2\n" in (path / "export" / "README.md").read_text(), "what it was trained with"
    exported, expected = (load_file(where / "export" / "model.safetensors") for where in (path, trained))
    assert exported.keys() == expected.keys()
    for name, tensor in exported.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)
