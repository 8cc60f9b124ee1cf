"""What a user gets wrong: one line that names the setting or file, an exit code that is not 0, nothing half-written."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from launch import QUICKSTART, SMALL, run

from nemo_r3.models import EMBEDDED


def refused(verb: str, *arguments: str, before: str = "never said") -> str:
    """The one line of an error, which comes before the output gets to `before`."""
    done = run(verb, *arguments, succeed=False)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2, done.stderr[-2000:]
    assert len(errors) == 1, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and before not in done.stdout
    return errors[0]


def test_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    """By themselves, by the model, by the ranks, and by what this machine has."""
    home = f"run.dir={tmp_path}/run"
    assert "algo.group_sise" in refused("train", QUICKSTART, home, "algo.group_sise=4")
    assert "actor.tensor_parallel=3" in refused("train", QUICKSTART, home, "actor.tensor_parallel=3")
    assert "1 ranks were launched" in refused("train", QUICKSTART, home, "actor.tensor_parallel=2")
    if find_spec("wandb") is None:
        assert "run.wandb_project: wandb cannot" in refused("train", QUICKSTART, home, "run.wandb_project=p")
    assert not (tmp_path / "run").exists()


def test_a_plan_is_printed_even_if_it_is_refused(tmp_path: Path) -> None:
    settings = (QUICKSTART, f"run.dir={tmp_path}/run", "cluster.gpus_per_node=2", "cluster.gpu_memory_gb=2")
    done = run("plan", *settings, succeed=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the actor needs 0 GiB of each GPU, which has room for 0")
    assert done.stderr.count("\n") == 1
    assert "MiB of each GPU  " in done.stdout and "fits" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_weights_that_are_cut_are_refused_before_vllm_starts(tmp_path: Path) -> None:
    shutil.copytree(EMBEDDED, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    line = refused("mine", QUICKSTART, *SMALL, f"model.path={tmp_path}/model", f"run.dir={tmp_path}/run")
    assert f"model.path: {weights} cannot be read" in line


def test_a_bank_of_another_model_is_refused_and_kept(bank: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(EMBEDDED, model)
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-4:] = b"\x00\x00\x80\x3f"
    (model / "model.safetensors").write_bytes(weights)
    before = {file.name: file.read_bytes() for file in bank.iterdir()}
    line = refused(
        "mine", QUICKSTART, *SMALL, f"failures.path={bank}", f"model.path={model}", f"run.dir={tmp_path}/run"
    )
    assert "was mined otherwise: model" in line and "failures.allow_foreign=true" in line
    assert {file.name: file.read_bytes() for file in bank.iterdir()} == before


def test_a_changed_setting_is_refused_by_key_on_resume(trained: Path, bank: Path) -> None:
    before = (trained / "metrics.jsonl").read_bytes()
    line = refused("train", QUICKSTART, *SMALL, f"failures.path={bank}", f"run.dir={trained}", "actor.lr=1e-3")
    assert "actor.lr" in line
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_not_extended_at_a_learning_rate_of_zero(trained: Path, bank: Path) -> None:
    logs = [trained / "metrics.jsonl", trained / "config.yaml"]
    before = [log.read_bytes() for log in logs]
    settings = (QUICKSTART, *SMALL, f"failures.path={bank}", f"run.dir={trained}", "train.steps=6")
    line = refused("train", *settings, before="loading the model")
    assert "train.steps=6: the learning rate is 0 after step 4, so steps 5 to 6 would change nothing" in line
    assert [log.read_bytes() for log in logs] == before


def test_a_place_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lucky.py").touch()
    assert "lucky.py is a file" in refused("mine", QUICKSTART, f"run.dir={tmp_path}/lucky.py")
    assert "holds no run, but lucky.py" in refused("train", QUICKSTART, f"run.dir={tmp_path}")
    assert [file.name for file in tmp_path.iterdir()] == ["lucky.py"]
